"""Upper confidence bounds of a rate at every threshold at once.

Scores of one sample, put in order, are order statistics: under the threshold between the k-th highest and the
next one the true rate is at most the k-th of as many uniform numbers. Clopper and Pearson's bound for each
count, with one local error probability for all of them, is broken by one of these order statistics with a
probability that has an exact law. The local error is the largest for which that stays within what was asked
(an equal-local-levels band; Aldor-Noiman et al. 2013). As neighbouring order statistics move together, it is
far above the share that Bonferroni would leave.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.signal import fftconvolve
from scipy.special import betaincinv, expit, gammaln, logit, xlogy

from audits.estimators.validation import Floats

MOST_RANKS = 200
"""Larger samples are bounded at so many counts, spread over all."""
_NEGLIGIBLE = 1e-18
_SMALL = 512
_HALVINGS = 14


@dataclass(frozen=True)
class Band:
    """Bounds of the rate for ``ranks`` - 1 successes, each ``[rank]`` and rising; they hold together."""

    ranks: NDArray[np.int64]
    bounds: Floats


@lru_cache(maxsize=256)
def upper_band(trials: int, error: float) -> Band:
    """The band of ``trials`` independent scores that one of the true rates exceeds with at most ``error``."""
    ranks = np.arange(1, trials + 1) if trials <= MOST_RANKS else spread_ranks(trials, MOST_RANKS)
    low, high = np.log(error / len(ranks)), np.log(error)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if exceedance(_bounds(ranks, trials, np.exp(middle)), ranks, trials) <= error:
            low = middle
        else:
            high = middle
    return Band(ranks, _bounds(ranks, trials, np.exp(low)))


def spread_ranks(size: int, count: int) -> NDArray[np.int64]:
    """At most ``count`` distinct ranks in 1 .. ``size``, evenly spread in the logit of their quantile."""
    if count == 1:
        return np.array([(size + 1) // 2])
    end = logit(1 / (size + 1))
    quantiles = expit(np.linspace(end, -end, count))
    return np.unique(np.clip(np.rint(quantiles * (size + 1)), 1, size).astype(np.int64))


def exceedance(bounds: Floats, ranks: NDArray[np.int64], trials: int) -> float:
    """P[the ``ranks``-th smallest of ``trials`` uniform numbers is above its bound, for any of them].

    The numbers up to each bound are counted as a Poisson process that has ``trials`` points in the end. Both
    arguments are rising, ``[rank]``.
    """
    law, first = np.ones(1), 0
    steps = np.diff(bounds, prepend=0.0) * trials
    for rank, step in zip(ranks, steps, strict=True):
        law = _convolved(law, step)
        law[: max(0, rank - first)] = 0.0
        kept = np.flatnonzero(law > _NEGLIGIBLE)
        if not len(kept):
            return 1.0
        law, first = law[kept[0] : kept[-1] + 1], first + int(kept[0])
    left = trials - first - np.arange(len(law))
    possible = left >= 0
    ends = _log_poisson(left[possible], (1 - bounds[-1]) * trials) - _log_poisson(np.array(trials), trials)
    return max(0.0, 1 - float(law[possible] @ np.exp(ends)))


def _bounds(ranks: NDArray[np.int64], trials: int, error: float) -> Floats:
    return np.asarray(betaincinv(ranks, trials - ranks + 1, 1 - error), dtype=np.float64)


def _convolved(law: Floats, mean: float) -> Floats:
    """The law of a count plus a Poisson number."""
    reach = 10 * np.sqrt(mean) + 30
    counts = np.arange(max(0, int(mean - reach)), int(mean + reach) + 1)
    more = np.exp(_log_poisson(counts, mean))
    found = np.convolve(law, more) if len(law) < _SMALL else np.maximum(fftconvolve(law, more), 0.0)
    return np.concatenate([np.zeros(counts[0]), found])


def _log_poisson(counts: NDArray[np.int64], mean: float) -> Floats:
    return np.asarray(xlogy(counts, mean) - mean - gammaln(counts + 1), dtype=np.float64)
