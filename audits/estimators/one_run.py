"""Epsilon lower bounds from one training run with many canaries.

Each canary is in or out by its own fair coin; the auditor guesses some of the coins, the highest scores in,
the lowest out, half each, and abstains on the rest. How many guesses to make is settled before the coins are
looked at, or several numbers are, and the error probability is divided among them or shared by all under
their joint law. Neighbouring relation: add or remove one canary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import betainc, betaincinv, gammaln, log_expit, logit, ndtr, ndtri
from scipy.stats import binomtest

from audits.estimators.gaussian_dp import epsilon_of_mu
from audits.estimators.guess_band import banded_one_run, numbers_of_guesses
from audits.estimators.threshold import ranks_without_ties
from audits.estimators.validation import (
    Floats,
    checked_confidence,
    checked_count,
    checked_delta,
    checked_scores,
    checked_share,
)
from audits.estimators.wrapping import Estimator
from privkd.errors import InputError

_MU_TOLERANCE = 1e-9


class OneRunEstimator(Estimator[Callable[[int, int, int, float, float], float]]):
    """An epsilon lower bound from the guesses of one run: ``one_run`` or ``f_dp_one_run``.

    It wraps what makes a bound of canaries, guesses, right guesses, ``delta`` and the error probability, and
    checks the counts.
    """

    def __call__(
        self,
        *,
        canaries: SupportsIndex,
        guesses: SupportsIndex,
        correct: SupportsIndex,
        delta: float,
        confidence: float = 0.95,
    ) -> float:
        """The epsilon lower bound.

        Raises:
            InputError: more right than guessed, more guessed than canaries, or a level outside its range.
        """
        made, total = checked_share("guesses", guesses, "canaries", canaries)
        right = checked_count("correct", correct)
        if right > made:
            raise InputError(f"correct={right} exceeds guesses={made}: only a guess can be right")
        delta = checked_delta(delta, zero_allowed=self._zero_delta)
        return self._bound(total, made, right, delta, 1 - checked_confidence(confidence))


@partial(OneRunEstimator, zero_delta=True)
def one_run(m: int, r: int, v: int, delta: float, alpha: float) -> float:
    """Epsilon lower bound of any (epsilon, ``delta``)-DP mechanism.

    Steinke, Nasr and Jagielski (2023), Theorem 5.2: the number of right guesses is close to dominated by
    Binomial(guesses, e^epsilon / (1 + e^epsilon)). ``delta`` may be 0.
    """
    return _one_run(m, r, v, delta, alpha)


@partial(OneRunEstimator, zero_delta=False)
def f_dp_one_run(m: int, r: int, v: int, delta: float, alpha: float) -> float:
    """Epsilon lower bound at ``delta`` of a mechanism whose trade-off curve is Gaussian (mu-GDP).

    Mahloujifar, Melis and Chaudhuri (2024), Algorithm 3: the largest mu whose curve could not have led to
    that many right guesses. The whole curve bounds them, so it finds more than ``one_run``.
    """
    return epsilon_of_mu(_largest_rejected_mu(m, r, v, alpha), delta)


@lru_cache(maxsize=4096)
def _one_run(m: int, r: int, v: int, delta: float, alpha: float) -> float:
    if v == 0:
        return 0.0
    # Without delta the answer is closed: there the p-value is the binomial tail alone. With delta the p-value
    # is larger, so the root lies below; up to there q < v / r and the p-value rises with epsilon.
    above = float(logit(betaincinv(v, r - v + 1, alpha)))
    if above <= 0 or delta == 0:
        return max(0.0, above)
    below_v = np.arange(v - 1, -1, -1, dtype=np.float64)
    log_choices = gammaln(r + 1) - gammaln(below_v + 1) - gammaln(r - below_v + 1)

    def excess(epsilon: float) -> float:
        tail = float(betainc(v, r - v + 1, 1 / (1 + math.exp(-epsilon))))
        near_miss = _heaviest_window(log_choices, below_v, r, epsilon)
        return tail + 2 * m * delta * near_miss - alpha

    if excess(0.0) >= 0:
        return 0.0
    if excess(above) <= 0:
        return above  # A delta below the rounding of the binomial tail.
    return float(brentq(excess, 0.0, above, xtol=1e-12))


def _heaviest_window(
    log_choices: NDArray[np.float64], below_v: NDArray[np.float64], r: int, epsilon: float
) -> float:
    """max over i of P[v > Binomial(r, q) >= v - i] / i, with q = e^epsilon / (1 + e^epsilon)."""
    log_masses = log_choices + below_v * log_expit(epsilon) + (r - below_v) * log_expit(-epsilon)
    return float((np.cumsum(np.exp(log_masses)) / np.arange(1, len(below_v) + 1)).max())


@lru_cache(maxsize=4096)
def _largest_rejected_mu(m: int, r: int, v: int, alpha: float) -> float:
    """Lower end of a bisection's bracket, for the bound may not exceed the largest mu that is rejected."""
    if v == 0 or not _gaussian_curve_rejected(0.0, m, r, v, alpha):
        return 0.0
    low, high = 0.0, 1.0
    while _gaussian_curve_rejected(high, m, r, v, alpha):
        low, high = high, 2 * high
    while high - low > _MU_TOLERANCE:
        middle = (low + high) / 2
        if _gaussian_curve_rejected(middle, m, r, v, alpha):
            low = middle
        else:
            high = middle
    return low


def _gaussian_curve_rejected(mu: float, m: int, r: int, v: int, alpha: float) -> bool:
    """Whether ``v`` right of ``r`` guesses is too many for mu-GDP, where f^-1(x) = Phi(Phi^-1(x) - mu)."""
    wrong_mass, right_mass = alpha * (r - v) / m, alpha * v / m
    for right in range(v - 1, -1, -1):
        if wrong_mass + right_mass > r / m:
            return True
        least = float(ndtr(ndtri(right_mass) - mu))
        if least <= wrong_mass:
            return False  # A fixed point: neither mass moves in the steps that remain.
        right_mass += right / (r - right) * (least - wrong_mass)
        wrong_mass = least
    return wrong_mass + right_mass > r / m


_UNFAIR_COIN = 1e-9
"""A share of members that a fair coin shows more rarely than this was not drawn by one."""


@dataclass(frozen=True)
class FixedGuesses:
    """Guess ``count`` canaries, fixed without sight of the scores.

    Of an odd number the odd one is guessed in. Ties are broken at random by ``seed``, which must not depend
    on the scores.
    """

    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        checked_count("count", self.count)
        checked_count("seed", self.seed)


@dataclass(frozen=True)
class BonferroniGuesses:
    """Try each number in ``counts``, each with its part of the error probability; keep the best bound."""

    counts: tuple[int, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.counts:
            raise InputError("counts is empty: give at least one number of guesses")
        for count in self.counts:
            checked_count("counts", count)
        checked_count("seed", self.seed)


@dataclass(frozen=True)
class BandGuesses:
    """Try all numbers of guesses at once, for the price of their joint law; of ``one_run`` alone.

    See `audits.estimators.guess_band`. ``seed`` breaks ties.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        checked_count("seed", self.seed)


GuessRule: TypeAlias = FixedGuesses | BonferroniGuesses | BandGuesses


def epsilon_lower_bound_one_run(
    scores: ArrayLike,
    member: ArrayLike,
    *,
    rule: GuessRule,
    estimator: OneRunEstimator,
    delta: float,
    confidence: float = 0.95,
) -> float:
    """Epsilon lower bound from one run in which each canary was in or out by its own fair coin.

    Args:
        scores: ``[canary]``, higher means more likely in.
        member: ``[canary]`` bool, which way each coin fell.
        rule: how many guesses are made; there is no rule that takes the best number without paying for it.
        estimator: ``one_run`` or ``f_dp_one_run``.
        delta: of the (epsilon, delta) pair.
        confidence: probability with which the bound is at most the true epsilon.

    Raises:
        InputError: an unknown rule, a band of another estimator than ``one_run``, a NaN score, too few
            canaries, more guesses than canaries, membership that no fair coin draws, or a level outside its
            range.
    """
    values = checked_scores("scores", scores)
    inside = _checked_member(member, len(values))
    level = checked_confidence(confidence)
    match rule:
        case FixedGuesses(count, seed):
            counts: tuple[int, ...] = (count,)
        case BonferroniGuesses(counts, seed):
            pass
        case BandGuesses(seed):
            return _banded(_ascending(values, inside, seed), estimator, delta, 1 - level)
        case _:
            raise InputError(f"rule={rule!r}: give a FixedGuesses, a BonferroniGuesses or a BandGuesses")
    ascending = _ascending(values, inside, seed)
    each = 1 - (1 - level) / len(counts)
    return max(
        estimator(
            canaries=len(values),
            guesses=count,
            correct=_correct(ascending, count),
            delta=delta,
            confidence=each,
        )
        for count in counts
    )


def _ascending(values: Floats, inside: NDArray[np.bool_], seed: int) -> NDArray[np.bool_]:
    """Membership in ascending order of score."""
    return inside[np.argsort(ranks_without_ties(values, np.random.default_rng(seed)))]


def _banded(ascending: NDArray[np.bool_], estimator: OneRunEstimator, delta: float, alpha: float) -> float:
    if estimator is not one_run:
        raise InputError(f"estimator={estimator.__name__}: a BandGuesses is for one_run alone")
    guesses = numbers_of_guesses(len(ascending), checked_delta(delta, zero_allowed=True), alpha)
    right = np.array([_correct(ascending, int(count)) for count in guesses])
    return banded_one_run(right, guesses, delta, alpha)


def _checked_member(member: ArrayLike, canaries: int) -> NDArray[np.bool_]:
    inside = np.asarray(member)
    if inside.dtype != np.bool_ or inside.shape != (canaries,):
        raise InputError(
            f"member has dtype {inside.dtype} and shape {inside.shape}: give bool of shape ({canaries},)"
        )
    if binomtest(int(inside.sum()), canaries).pvalue < _UNFAIR_COIN:
        raise InputError(
            f"member: {int(inside.sum())} of {canaries} canaries are in; decide each by its own fair coin"
        )
    return inside


def _correct(ascending: NDArray[np.bool_], guesses: int) -> int:
    """How many of the ``guesses`` are right, given membership in ascending order of score."""
    if guesses > len(ascending):
        raise InputError(f"guesses={guesses} exceeds canaries={len(ascending)}: guess at most each one once")
    guessed_out = guesses // 2
    guessed_in = guesses - guessed_out
    return int((~ascending[:guessed_out]).sum() + ascending[len(ascending) - guessed_in :].sum())
