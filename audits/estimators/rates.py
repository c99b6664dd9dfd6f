"""How well scores tell members from non-members, and intervals of shares, their differences and means."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit, ndtri, stdtrit
from scipy.stats import rankdata

from audits.estimators.threshold import upper_confidence_bound
from audits.estimators.validation import checked_confidence, checked_scores
from privkd.errors import InputError
from privkd.records import Count, Measured, Real

_LEAST_FALSE_POSITIVES = 10
"""A lower rate would be measured on fewer non-members than tell it from twice or half its value."""


@dataclass(frozen=True)
class TprAtFpr:
    """The share of members found while at most ``fpr`` of the non-members are called members.

    Attributes:
        estimate: the share found.
        low: lower end of its Clopper-Pearson interval; so is ``high`` the upper end. Both take the threshold
            as given: they speak of the sampling of members.
        fpr: the false-positive rate asked for; ``false_positives`` may stay below it where scores tie.
        threshold: samples that score above it are called members.
        true_positives: members above the threshold, of ``members``.
        false_positives: non-members above it, of ``nonmembers``.
        confidence: of the interval.
    """

    estimate: Real
    low: Real
    high: Real
    fpr: Real
    threshold: Real
    true_positives: Count
    members: Count
    false_positives: Count
    nonmembers: Count
    confidence: Real


@dataclass(frozen=True)
class Auc:
    """Probability that a member outscores a non-member, ties counted half, with its two-sided interval."""

    estimate: Real
    low: Real
    high: Real
    members: Count
    nonmembers: Count
    confidence: Real


def tpr_at_fpr(
    scores_members: ArrayLike, scores_nonmembers: ArrayLike, fpr: float, confidence: float = 0.95
) -> TprAtFpr:
    """True-positive rate at a fixed false-positive rate.

    The threshold is the lowest that lets at most ``fpr`` of the non-members pass. Both arguments are vectors
    of scores, one a sample; higher means more likely a member.

    Raises:
        InputError: fewer than 10 false positives would carry the rate (10,000 non-members for an ``fpr`` of
            0.1 %), a score is NaN, fewer than 2 samples a side, or ``fpr`` or ``confidence`` outside (0, 1).
    """
    members = checked_scores("scores_members", scores_members)
    nonmembers = checked_scores("scores_nonmembers", scores_nonmembers)
    level = checked_confidence(confidence)
    if not 0 < fpr < 1:
        raise InputError(f"fpr={fpr!r}: give a rate between 0 and 1, such as 0.01")
    # The rounding lets 0.1 % of 10,000 be 10, whatever its last binary digit.
    allowed = math.floor(fpr * len(nonmembers) + 1e-9)
    if allowed < _LEAST_FALSE_POSITIVES:
        least = math.ceil(_LEAST_FALSE_POSITIVES / fpr - 1e-9)
        raise InputError(
            f"TPR at FPR {100 * fpr:g} % needs at least {least:,} non-members, got {len(nonmembers):,}: "
            f"fewer than {_LEAST_FALSE_POSITIVES} false positives would carry it; add some or raise the FPR"
        )
    place = len(nonmembers) - 1 - allowed
    threshold = float(np.partition(nonmembers, place)[place])
    found = int((members > threshold).sum())
    error = (1 - level) / 2
    return TprAtFpr(
        estimate=found / len(members),
        low=1 - upper_confidence_bound(len(members) - found, len(members), error=error),
        high=upper_confidence_bound(found, len(members), error=error),
        fpr=float(fpr),
        threshold=threshold,
        true_positives=found,
        members=len(members),
        false_positives=int((nonmembers > threshold).sum()),
        nonmembers=len(nonmembers),
        confidence=level,
    )


def auc(scores_members: ArrayLike, scores_nonmembers: ArrayLike, confidence: float = 0.95) -> Auc:
    """Area under the ROC curve in O(n log n).

    The interval is the hull of DeLong's (DeLong et al. 1988, from midranks; on the logit scale) and of
    Newcombe's score interval (2006, method 5): the first needs no model of the scores, the second keeps its
    width where the scores separate perfectly and DeLong's variance is zero.

    Raises:
        InputError: a score is NaN, fewer than 2 samples a side, or ``confidence`` outside (0, 1).
    """
    members = checked_scores("scores_members", scores_members)
    nonmembers = checked_scores("scores_nonmembers", scores_nonmembers)
    level = checked_confidence(confidence)
    beaten, unbeaten = _placements(members, nonmembers)
    estimate = min(1.0, max(0.0, float(beaten.mean())))  # rounding may leave the unit interval
    z = float(ndtri((1 + level) / 2))
    low = _score_bound(estimate, len(members), len(nonmembers), z)
    high = 1 - _score_bound(1 - estimate, len(members), len(nonmembers), z)
    if 0 < estimate < 1:
        variance = float(beaten.var(ddof=1) / len(members) + unbeaten.var(ddof=1) / len(nonmembers))
        reach = z * math.sqrt(variance) / (estimate * (1 - estimate))
        low = min(low, float(expit(logit(estimate) - reach)))
        high = max(high, float(expit(logit(estimate) + reach)))
    return Auc(estimate, low, high, len(members), len(nonmembers), level)


def balanced_accuracy(
    scores_members: ArrayLike, scores_nonmembers: ArrayLike, confidence: float = 0.95
) -> "Interval":
    """Mean of the true-positive and the true-negative rate at the best threshold.

    The estimate is the best on these scores, and so too high; the interval holds for the best threshold of
    their laws, whatever these are: both distribution functions lie within Massart's (1990) band.

    Raises:
        InputError: a score is NaN, fewer than 2 samples a side, or ``confidence`` outside (0, 1).
    """
    members = np.sort(checked_scores("scores_members", scores_members))
    nonmembers = np.sort(checked_scores("scores_nonmembers", scores_nonmembers))
    level = checked_confidence(confidence)
    thresholds = np.concatenate([members, nonmembers])
    below = [np.searchsorted(side, thresholds) / len(side) for side in (nonmembers, members)]
    estimate = (1 + max(0.0, float((below[0] - below[1]).max()))) / 2
    reach = sum(math.sqrt(math.log(4 / (1 - level)) / (8 * len(side))) for side in (members, nonmembers))
    found = Interval(estimate, estimate - reach, estimate + reach, len(members) + len(nonmembers), level)
    return found.within(0.5, 1.0)


def _placements(
    members: NDArray[np.float64], nonmembers: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each member's share of non-members below it; each non-member's share of members above it."""
    ranks = rankdata(np.concatenate([members, nonmembers]))
    beaten = (ranks[: len(members)] - rankdata(members)) / len(nonmembers)
    unbeaten = 1 - (ranks[len(members) :] - rankdata(nonmembers)) / len(members)
    return beaten, unbeaten


def _score_bound(estimate: float, members: int, nonmembers: int, z: float) -> float:
    """The lowest area whose own Hanley-McNeil standard error, ``z`` times, reaches up to the estimate."""
    half_sample = (members + nonmembers) / 2 - 1

    def shortfall(area: float) -> float:
        spread = 1 + half_sample * (1 - area) / (2 - area) + half_sample * area / (1 + area)
        return area + z * math.sqrt(area * (1 - area) * spread / (members * nonmembers)) - estimate

    if estimate == 0:
        return 0.0
    # An area of exactly 1 has no error and solves the equation for an estimate of 1, but is not its lowest
    # root.
    return float(brentq(shortfall, 0.0, min(estimate, 1 - 1e-12)))


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and its two-sided interval at ``confidence``; ``n`` is what it rests on."""

    estimate: Measured
    low: Measured
    high: Measured
    n: Count
    confidence: Real = CONFIDENCE

    def within(self, least: float, most: float) -> "Interval":
        """The part in ``[least, most]``, outside of which the quantity cannot lie.

        Student's interval does not know that a share lies from 0 to 1; what is cut off costs no coverage.
        """
        # In this order NaN stays NaN.
        return replace(self, low=max(self.low, least), high=min(self.high, most))


def share(estimate: float, n: int) -> Interval:
    """Wilson's (1927) score interval of a share of ``n`` independent records.

    ``estimate`` may be a mean of several models' shares on the same records: a record's mean correctness
    varies at most as much as one coin, so the interval is then too wide rather than too narrow.

    Raises:
        InputError: ``estimate`` is no share, or ``n`` is not positive.
    """
    if not 0 <= estimate <= 1 or n < 1:
        raise InputError(f"share {estimate!r} of {n!r} records: expected a number of 0 to 1 of at least one")
    z = float(ndtri((1 + CONFIDENCE) / 2))
    centre = (estimate + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(estimate * (1 - estimate) / n + z * z / (4 * n * n))
    # Rounding must not part the interval from its estimate at 0 and 1.
    return Interval(estimate, min(estimate, max(0.0, centre - reach)), max(estimate, centre + reach), n)


def difference(first: Interval, second: Interval) -> Interval:
    """``first - second`` of two shares, by Newcombe's (1998) method 10 from their Wilson intervals.

    It takes the two samples as independent. Shares on the same records are correlated, nearly always
    positively; the interval is then wider than it need be.
    """
    apart = first.estimate - second.estimate
    down = math.hypot(first.estimate - first.low, second.high - second.estimate)
    up = math.hypot(first.high - first.estimate, second.estimate - second.low)
    return Interval(apart, apart - down, apart + up, min(first.n, second.n), first.confidence)


def mean_of(values: Sequence[float] | NDArray[np.float64]) -> Interval:
    """Student's t interval of the mean of ``[sample]``, normal errors assumed.

    It is unbounded for a single value, which tells nothing of others; one that is NaN makes all of it NaN.

    Raises:
        InputError: no value.
    """
    if not len(values):
        raise InputError("no value: there is no mean")
    sample = np.asarray(values, dtype=np.float64)
    mean, n = float(sample.mean()), len(sample)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, n)
    reach = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * float(sample.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - reach, mean + reach, n)
