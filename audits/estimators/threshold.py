"""Epsilon lower bounds from the scores of two samples, by one threshold that is chosen honestly.

The members and the non-members are independent samples. A bound at the best of many thresholds is no bound:
without any signal it exceeds zero far too often. So the rule is an argument, and each pays for its choice:
fixed beforehand, chosen on samples that are then set aside, once or in several splits, or several thresholds
at once, with the error probability divided among them or shared by all under their joint law.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv, ndtri

from audits.estimators.band import MOST_RANKS, spread_ranks, upper_band
from audits.estimators.gaussian_dp import epsilon_of_mu
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


@dataclass(frozen=True)
class ErrorRates:
    """Upper confidence bounds of both error rates of one threshold, or of each of several ``[threshold]``.

    All of them hold together.
    """

    false_positive: float | Floats
    false_negative: float | Floats


@lru_cache(maxsize=65536)
def upper_confidence_bound(successes: int, trials: int, *, error: float) -> float:
    """Clopper and Pearson's (1934) upper bound of a proportion, exceeded with probability <= ``error``."""
    if successes == trials:
        return 1.0
    return float(betaincinv(successes + 1, trials - successes, 1 - error))


def upper_confidence_bounds(successes: NDArray[np.int64], trials: int, *, error: float) -> Floats:
    """The same of each of ``successes`` ``[threshold]``."""
    missing = np.maximum(trials - successes, 1)
    return np.where(successes < trials, betaincinv(successes + 1, missing, 1 - error), 1.0)


class ConfusionEstimator(Estimator[Callable[[ErrorRates, float], float]]):
    """An epsilon lower bound from the counts at one threshold: ``clopper_pearson`` or ``gaussian``.

    It wraps what makes a bound of the error rates and ``delta``, and checks the counts.
    """

    def __call__(
        self,
        *,
        true_positives: SupportsIndex,
        members: SupportsIndex,
        false_positives: SupportsIndex,
        nonmembers: SupportsIndex,
        delta: float,
        confidence: float = 0.95,
    ) -> float:
        """The epsilon lower bound.

        Raises:
            InputError: a count is impossible, or ``delta`` or ``confidence`` lies outside its range.
        """
        delta = checked_delta(delta, zero_allowed=self._zero_delta)
        hits, inside = checked_share("true_positives", true_positives, "members", members)
        alarms, outside = checked_share("false_positives", false_positives, "nonmembers", nonmembers)
        error = (1 - checked_confidence(confidence)) / 2
        rates = ErrorRates(
            false_positive=upper_confidence_bound(alarms, outside, error=error),
            false_negative=upper_confidence_bound(inside - hits, inside, error=error),
        )
        return self._bound(rates, delta)

    def of_rates(self, rates: ErrorRates, delta: float) -> float:
        """The epsilon lower bound of error rates that are bounded already: the best of all thresholds.

        Raises:
            InputError: ``delta`` lies outside its range.
        """
        return self._bound(rates, checked_delta(delta, zero_allowed=self._zero_delta))


@partial(ConfusionEstimator, zero_delta=True)
def clopper_pearson(rates: ErrorRates, delta: float) -> float:
    """Epsilon lower bound of any (epsilon, ``delta``)-DP mechanism, without further assumption.

    Clopper-Pearson bounds of both error rates, put into the region that differential privacy allows
    (Kairouz, Oh and Viswanath 2015; Jagielski, Ullman and Oprea 2020). ``delta`` may be 0.
    """
    fpr, fnr = rates.false_positive, rates.false_negative
    odds = float(np.max(np.maximum((1 - fnr - delta) / fpr, (1 - fpr - delta) / fnr)))
    return max(0.0, math.log(odds)) if odds > 0 else 0.0


@partial(ConfusionEstimator, zero_delta=False)
def gaussian(rates: ErrorRates, delta: float) -> float:
    """Epsilon lower bound at ``delta`` of a mechanism whose trade-off curve is Gaussian (mu-GDP).

    The point of both error bounds lies on one curve, whose mu is converted (Nasr et al. 2023). It holds for
    the Gaussian mechanism and its compositions; a subsampled one is not Gaussian and needs its own curve.
    """
    fpr, fnr = np.asarray(rates.false_positive), np.asarray(rates.false_negative)
    told = (fpr < 1) & (fnr < 1)
    mu = np.max(-ndtri(fpr[told]) - ndtri(fnr[told]), initial=0.0)
    return epsilon_of_mu(float(mu), delta)


_SPLIT_CANDIDATES = 64


@dataclass(frozen=True)
class FixedThreshold:
    """Call a sample a member if it scores at least ``value``, which was fixed without sight of the scores."""

    value: float


@dataclass(frozen=True)
class SplitThreshold:
    """Choose the threshold on a random ``share`` of both samples; bound epsilon on the rest.

    ``seed`` draws the split and must not depend on the scores.
    """

    seed: int
    share: float = 0.1

    def __post_init__(self) -> None:
        checked_count("seed", self.seed)
        if not 0 < self.share < 1:
            raise InputError(f"share={self.share!r}: give the share of samples to choose on, between 0 and 1")


@dataclass(frozen=True)
class BonferroniThreshold:
    """Try ``count`` thresholds, each with the ``count``-th part of the error probability; keep the best
    bound.

    The thresholds stand at ranks of the non-members which their number alone determines, so each one's
    false-positive rate has the distribution that the Clopper-Pearson bound assumes. Ties are broken at random
    by ``seed``, which must not depend on the scores.
    """

    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        checked_count("count", self.count, least=1)
        checked_count("seed", self.seed)


@dataclass(frozen=True)
class BandThreshold:
    """Try every threshold, under upper bounds of both error rates that hold at all of them at once.

    Nothing is drawn, and ties need no order: see `audits.estimators.band`.
    """


@dataclass(frozen=True)
class MultiSplitThreshold:
    """The median of the bounds of ``count`` splits, each with half of the error probability.

    Twice the median of any p-values is one, however they depend on each other (Meinshausen, Meier and
    Buehlmann 2009, Theorem 3.1). ``share`` and ``seed`` are those of `SplitThreshold`.
    """

    count: int = 25
    seed: int = 0
    share: float = 0.1

    def __post_init__(self) -> None:
        checked_count("count", self.count, least=1)
        SplitThreshold(self.seed, self.share)


ThresholdRule: TypeAlias = (
    FixedThreshold | SplitThreshold | BonferroniThreshold | BandThreshold | MultiSplitThreshold
)


@dataclass(frozen=True)
class Confusion:
    """Counts at one threshold."""

    true_positives: int
    members: int
    false_positives: int
    nonmembers: int

    def bound(self, estimator: ConfusionEstimator, delta: float, confidence: float) -> float:
        """The epsilon lower bound that ``estimator`` finds in these counts."""
        return estimator(
            true_positives=self.true_positives,
            members=self.members,
            false_positives=self.false_positives,
            nonmembers=self.nonmembers,
            delta=delta,
            confidence=confidence,
        )


def epsilon_lower_bound(
    scores_members: ArrayLike,
    scores_nonmembers: ArrayLike,
    *,
    rule: ThresholdRule,
    estimator: ConfusionEstimator,
    delta: float,
    confidence: float = 0.95,
) -> float:
    """Epsilon lower bound from the scores of independent members and non-members.

    Args:
        scores_members: ``[member]``, higher means more likely a member.
        scores_nonmembers: ``[nonmember]``.
        rule: how the threshold is chosen; there is no rule that takes the best one without paying for it.
        estimator: ``clopper_pearson`` or ``gaussian``.
        delta: of the (epsilon, delta) pair.
        confidence: probability with which the bound is at most the true epsilon.

    Raises:
        InputError: an unknown rule, a NaN score, too few samples, or a level outside its range.
    """
    members = checked_scores("scores_members", scores_members)
    nonmembers = checked_scores("scores_nonmembers", scores_nonmembers)
    level = checked_confidence(confidence)
    match rule:
        case FixedThreshold(value):
            return _confusion(members, nonmembers, value).bound(estimator, delta, level)
        case SplitThreshold():
            return _split_bound(members, nonmembers, rule, estimator, delta, level)
        case BonferroniThreshold(count, seed):
            each = 1 - (1 - level) / count
            tries = _confusions_at_ranks(members, nonmembers, count, np.random.default_rng(seed))
            return max(confusion.bound(estimator, delta, each) for confusion in tries)
        case BandThreshold():
            return estimator.of_rates(_banded(members, nonmembers, 1 - level), delta)
        case MultiSplitThreshold():
            return _multi_split_bound(members, nonmembers, rule, estimator, delta, level)
        case _:
            raise InputError(f"rule={rule!r}: give a rule of audits.estimators, such as BandThreshold()")


def _banded(members: Floats, nonmembers: Floats, error: float) -> ErrorRates:
    """Bounds of both rates where members score more than one of the non-members does.

    The thresholds are independent of the members, who take a band of their own where there are few, and share
    the error among the thresholds where there are many.
    """
    outside = upper_band(len(nonmembers), error / 2)
    thresholds = np.sort(nonmembers)[len(nonmembers) - outside.ranks]
    missed = np.searchsorted(np.sort(members), thresholds, side="right")
    if len(members) <= MOST_RANKS:
        inside = np.append(upper_band(len(members), error / 2).bounds, 1.0)[missed]
    else:
        inside = upper_confidence_bounds(missed, len(members), error=error / 2 / len(thresholds))
    return ErrorRates(outside.bounds, inside)


def _multi_split_bound(
    members: Floats,
    nonmembers: Floats,
    rule: MultiSplitThreshold,
    estimator: ConfusionEstimator,
    delta: float,
    confidence: float,
) -> float:
    seeds = np.random.default_rng(rule.seed).integers(2**63, size=rule.count)
    splits = [SplitThreshold(int(seed), rule.share) for seed in seeds]
    level = (1 + confidence) / 2
    bounds = [_split_bound(members, nonmembers, split, estimator, delta, level) for split in splits]
    # Of an even number the lower one of both in the middle.
    return float(np.quantile(bounds, 0.5, method="lower"))


def _confusion(members: NDArray[np.float64], nonmembers: NDArray[np.float64], threshold: float) -> Confusion:
    if np.isnan(threshold):
        raise InputError("threshold is NaN: give a number")
    return Confusion(
        int((members >= threshold).sum()), len(members), int((nonmembers >= threshold).sum()), len(nonmembers)
    )


def _split_bound(
    members: NDArray[np.float64],
    nonmembers: NDArray[np.float64],
    rule: SplitThreshold,
    estimator: ConfusionEstimator,
    delta: float,
    confidence: float,
) -> float:
    rng = np.random.default_rng(rule.seed)
    members_chosen_on, members_left = _split(members, rule.share, rng)
    nonmembers_chosen_on, nonmembers_left = _split(nonmembers, rule.share, rng)
    threshold = _best_threshold(members_chosen_on, nonmembers_chosen_on, estimator, delta, confidence)
    return _confusion(members_left, nonmembers_left, threshold).bound(estimator, delta, confidence)


def _split(
    scores: NDArray[np.float64], share: float, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A random ``share`` of the scores and the rest, at least one each."""
    chosen = min(max(1, round(share * len(scores))), len(scores) - 1)
    shuffled = rng.permutation(scores)
    return shuffled[:chosen], shuffled[chosen:]


def _best_threshold(
    members: NDArray[np.float64],
    nonmembers: NDArray[np.float64],
    estimator: ConfusionEstimator,
    delta: float,
    confidence: float,
) -> float:
    """The threshold with the highest bound on these samples, among quantiles dense at both ends."""
    pooled = np.sort(np.concatenate([members, nonmembers]))
    candidates = pooled[spread_ranks(len(pooled), _SPLIT_CANDIDATES) - 1]

    def merit(threshold: float) -> tuple[float, float]:
        counts = _confusion(members, nonmembers, threshold)
        # Where no threshold shows a bound on these few samples, the widest gap between the rates decides.
        gap = counts.true_positives / counts.members - counts.false_positives / counts.nonmembers
        return counts.bound(estimator, delta, confidence), gap

    return max((float(threshold) for threshold in candidates), key=merit)


def _confusions_at_ranks(
    members: NDArray[np.float64], nonmembers: NDArray[np.float64], count: int, rng: np.random.Generator
) -> Iterator[Confusion]:
    """Counts above the k-th highest non-member, for ``count`` numbers k fixed by the sample size.

    With distinct scores exactly k - 1 non-members lie above it, and its false-positive rate is
    Beta(k, nonmembers - k + 1): Clopper and Pearson's bound for k - 1 false positives is that law's quantile,
    so the bound is exact though the threshold is an order statistic. Members are independent of it.
    """
    ranks = ranks_without_ties(np.concatenate([members, nonmembers]), rng)
    member_ranks, nonmember_ranks = np.sort(ranks[: len(members)]), np.sort(ranks[len(members) :])
    for above in spread_ranks(len(nonmembers), count):
        threshold = nonmember_ranks[len(nonmembers) - above]
        found = len(members) - int(np.searchsorted(member_ranks, threshold, side="right"))
        yield Confusion(found, len(members), int(above) - 1, len(nonmembers))


def ranks_without_ties(scores: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Ranks 0 .. n-1, lowest score first; equal scores in random order, so that position reveals nothing."""
    order = np.lexsort((rng.permutation(len(scores)), scores))
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[order] = np.arange(len(scores))
    return ranks
