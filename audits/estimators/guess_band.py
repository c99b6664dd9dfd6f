"""How many guesses to make in one run: all numbers at once, for the price of their joint law.

Guesses are made in an order that scores alone settle, the surest first. Given what was released and the coins
before, each is right with probability q = e^epsilon / (1 + e^epsilon) at most (Steinke, Nasr and Jagielski
2023), so the number of right ones among the first r, as r grows, stays below a random walk with steps of
probability q. What counts is the least of the binomial p-values of all r that are looked at, and its law
under the walk is exact. Bonferroni would charge the same for numbers of guesses that nearly agree.

With delta the walk may be left behind at guess i by the excess of the posterior over q, which is
(P - e^epsilon Q)_+ / (P + Q) / (1 + e^epsilon), and so at most delta / (1 + e^epsilon) on average: over all
guesses together with probability guesses * delta / (1 + e^epsilon) at most, which is added.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betainc, expit
from scipy.stats import binom

from audits.estimators.validation import Floats

Counts = NDArray[np.int64]

_MOST_LOOKS = 48
_DELTA_SHARE = 0.1
"""Of the error probability that delta may take: it bounds the number of guesses."""
_ROUNDING = 1e-9
_MOST_EPSILON = 30.0


def numbers_of_guesses(canaries: int, delta: float, alpha: float) -> Counts:
    """The numbers that are looked at: all of the small ones, then in even ratios, up to all canaries."""
    most = canaries if delta == 0 else min(canaries, max(2, math.floor(_DELTA_SHARE * alpha * 2 / delta)))
    spread = np.geomspace(1, most, min(most, _MOST_LOOKS))
    return np.unique(np.rint(spread).astype(np.int64))


def banded_one_run(right: Counts, guesses: Counts, delta: float, alpha: float) -> float:
    """The largest epsilon that ``right`` of the first ``guesses`` rule out, each ``[number]`` and rising."""

    def excess(epsilon: float) -> float:
        q = float(expit(epsilon))
        least = float(_p_values(right, guesses, q).min())
        return _reached(least, guesses, q) + float(guesses[-1]) * delta * (1 - q) - alpha

    if excess(0.0) >= 0:
        return 0.0
    if excess(_MOST_EPSILON) < 0:
        return _MOST_EPSILON
    return float(brentq(excess, 0.0, _MOST_EPSILON, xtol=1e-6))


def _p_values(right: Counts, guesses: Counts, q: float) -> Floats:
    """P[Binomial(guesses, q) >= right]."""
    some = np.maximum(right, 1)
    return np.where(right > 0, betainc(some, guesses - some + 1, q), 1.0)


def _reached(p_value: float, guesses: Counts, q: float) -> float:
    """P[the walk has a binomial p-value of at most ``p_value`` at any of the numbers of ``guesses``]."""
    if p_value * (1 + _ROUNDING) >= 1:
        return 1.0
    barriers = np.asarray(binom.isf(p_value * (1 + _ROUNDING), guesses, q), dtype=np.int64) + 1
    law, crossed = np.ones(1), 0.0
    for more, barrier in zip(np.diff(guesses, prepend=0), barriers, strict=True):
        law = np.convolve(law, binom.pmf(np.arange(more + 1), more, q))
        crossed += float(law[barrier:].sum())
        law = law[:barrier]
    return crossed
