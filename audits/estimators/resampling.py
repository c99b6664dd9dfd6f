"""Figures that describe scores and bound nothing: epsilon as it was seen, and how it would vary.

A bootstrap interval says where a figure would fall again on such samples. Epsilon as it was seen is biased,
and its best threshold was chosen on the same scores: neither is a lower bound on what a mechanism spends.
"""

from collections.abc import Callable
from typing import SupportsIndex

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri

from audits.estimators.rates import Interval
from audits.estimators.validation import (
    Floats,
    checked_confidence,
    checked_count,
    checked_delta,
    checked_scores,
    checked_share,
)


def epsilon_of_counts(
    *,
    true_positives: SupportsIndex,
    members: SupportsIndex,
    false_positives: SupportsIndex,
    nonmembers: SupportsIndex,
    delta: float,
) -> float:
    """Epsilon as one threshold's counts show it: the larger log of ``(TPR - delta) / FPR`` and its mirror.

    It is infinite where one side of the threshold holds scores of one kind alone, such as at a false-positive
    rate of 0; ``clopper_pearson`` bounds the same counts by a finite number.

    Raises:
        InputError: a count is impossible, or ``delta`` lies outside [0, 1).
    """
    delta = checked_delta(delta, zero_allowed=True)
    hits, inside = checked_share("true_positives", true_positives, "members", members)
    alarms, outside = checked_share("false_positives", false_positives, "nonmembers", nonmembers)
    rates = np.array([hits / inside, 1 - alarms / outside]), np.array([alarms / outside, 1 - hits / inside])
    return _best_log_ratio(*rates, delta)


def seen_epsilon(
    scores_members: ArrayLike, scores_nonmembers: ArrayLike, *, delta: float, least: int = 50
) -> float:
    """Epsilon as the best threshold shows it that lets at least ``least`` non-members pass.

    Between thresholds the curve is a straight line, which an attacker gets by tossing a coin. ``least`` false
    positives are also looked at where no threshold has as many exactly.

    Raises:
        InputError: a NaN score, fewer than 2 samples a side, ``least`` below 1, or ``delta`` outside [0, 1).
    """
    delta, least = checked_delta(delta, zero_allowed=True), checked_count("least", least, least=1)
    members = checked_scores("scores_members", scores_members)
    nonmembers = checked_scores("scores_nonmembers", scores_nonmembers)
    if least >= len(nonmembers):
        return 0.0
    thresholds = np.unique(np.concatenate([members, nonmembers]))[::-1]
    found = len(members) - np.searchsorted(np.sort(members), thresholds)
    alarms = len(nonmembers) - np.searchsorted(np.sort(nonmembers), thresholds)
    tpr, fpr = _hull(np.append(0.0, alarms / len(nonmembers)), np.append(0.0, found / len(members)))
    at_least = least / len(nonmembers)
    kept = np.append(fpr[fpr >= at_least], at_least)
    return _best_log_ratio(np.interp(kept, fpr, tpr), kept, delta)


def bootstrap(
    figure: Callable[[Floats, Floats], float],
    scores_members: ArrayLike,
    scores_nonmembers: ArrayLike,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Where ``figure``, of members' and non-members' scores, would fall again on samples like these.

    Both sides are drawn anew with replacement; the interval is corrected for the median's bias (Efron 1987,
    without acceleration). It is the figure's, and no bound on epsilon.

    Raises:
        InputError: as of `seen_epsilon`; fewer than 2 ``resamples``; ``confidence`` outside (0, 1).
    """
    members = checked_scores("scores_members", scores_members)
    nonmembers = checked_scores("scores_nonmembers", scores_nonmembers)
    level, count = checked_confidence(confidence), checked_count("resamples", resamples, least=2)
    rng, seen = np.random.default_rng(seed), figure(members, nonmembers)
    again = np.array(
        [
            figure(rng.choice(members, len(members)), rng.choice(nonmembers, len(nonmembers)))
            for _ in range(count)
        ]
    )
    # Smoothed, so that a figure at the end of all does not shift the interval out of reach.
    shift = float(ndtri((np.sum(again < seen) + 1) / (count + 2)))
    ends = ndtr(2 * shift + ndtri(np.array([(1 - level) / 2, (1 + level) / 2])))
    low, high = np.quantile(again, ends)
    return Interval(seen, float(low), float(high), len(members) + len(nonmembers), level)


def _best_log_ratio(above: Floats, below: Floats, delta: float) -> float:
    """The largest log of ``(above - delta) / below``, 0 at least."""
    told = above > delta
    with np.errstate(divide="ignore"):
        return float(np.max(np.log(above[told] - delta) - np.log(below[told]), initial=0.0))


def _hull(fpr: Floats, tpr: Floats) -> tuple[Floats, Floats]:
    """The vertices of the concave curve over the points, as true- and false-positive rates, both rising."""
    while len(fpr) > 2:
        run, rise = np.diff(fpr), np.diff(tpr)
        under = rise[:-1] * run[1:] <= rise[1:] * run[:-1]
        if not under.any():
            break
        kept = np.concatenate([[True], ~under, [True]])
        fpr, tpr = fpr[kept], tpr[kept]
    return tpr, fpr
