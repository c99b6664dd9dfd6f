"""Epsilon lower bound from scores that are two normal laws of one spread: members' and non-members'.

Guesses throw away how sure they are. Where scores of canaries are normal, independent and of one variance, as
those of orthogonal canaries under full-batch DP-SGD are, the distance of both means in standard deviations is
mu itself, and Student's two-sample statistic has an exact law: the non-central t. That one run's scores are
such a pair is the idea of "Let's Ask Gauss" (arXiv 2606.12733), as its abstract tells it; the confidence
bound is the textbook's, and figures of it are no reproduction of theirs.

The assumption is put to the scores first: each side is tested for skewness and kurtosis (D'Agostino and
Pearson 1973), both for equal variance (the F test), together at `LEVEL`. Tests find what many scores show;
that they are independent no test of them tells.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import nctdtr
from scipy.stats import f as f_law
from scipy.stats import normaltest

from audits.estimators.gaussian_dp import epsilon_of_mu
from audits.estimators.validation import Floats, checked_confidence, checked_delta, checked_scores
from privkd.errors import InputError
from privkd.records import Real

LEVEL = 0.01
"""Scores that are such a pair are refused with at most this probability."""
_TESTS = 3
_LEAST = 20
"""Scores a side: of fewer the tests know nothing."""


@dataclass(frozen=True)
class GaussianPair:
    """What a pair of normal laws tells.

    Attributes:
        epsilon: the lower bound at delta, if the assumption holds.
        mu: lower bound of the distance of both means, in standard deviations.
        mu_estimate: that distance as it was seen.
        normal: the smaller p-value of both sides' tests for normality.
        equal_spread: p-value of the test for equal variances.
    """

    epsilon: Real
    mu: Real
    mu_estimate: Real
    normal: Real
    equal_spread: Real


def gaussian_pair(
    scores_members: ArrayLike, scores_nonmembers: ArrayLike, *, delta: float, confidence: float = 0.95
) -> GaussianPair:
    """The bound of independent scores, one a sample, ``[member]`` and ``[nonmember]``.

    Raises:
        InputError: the scores are no such pair, at `LEVEL`; fewer than 20 a side; a score that is not finite;
            ``delta`` or ``confidence`` outside (0, 1).
    """
    delta, level = checked_delta(delta, zero_allowed=False), checked_confidence(confidence)
    members = _finite("scores_members", scores_members)
    nonmembers = _finite("scores_nonmembers", scores_nonmembers)
    normal = min(_normality(members), _normality(nonmembers))
    equal = _equal_spread(members, nonmembers)
    for p_value, lack in ((normal, "normal"), (equal, "of one variance")):
        if p_value < LEVEL / _TESTS:
            raise InputError(f"the scores are not {lack} (p = {p_value:.1g}): no pair of Gaussians")
    n, m = len(members), len(nonmembers)
    freedom = n + m - 2
    spread = math.sqrt(((n - 1) * members.var(ddof=1) + (m - 1) * nonmembers.var(ddof=1)) / freedom)
    seen = float(members.mean() - nonmembers.mean()) / spread
    mu = _least_distance(seen, math.sqrt(n * m / (n + m)), freedom, level)
    return GaussianPair(epsilon_of_mu(mu, delta), mu, seen, normal, equal)


def _finite(name: str, scores: ArrayLike) -> Floats:
    vector = checked_scores(name, scores, least=_LEAST)
    if not np.isfinite(vector).all():
        raise InputError(f"{name} are not all finite: no pair of Gaussians")
    if np.ptp(vector) == 0:
        raise InputError(f"{name} are all alike: no pair of Gaussians")
    return vector


def _normality(scores: Floats) -> float:
    return float(normaltest(scores).pvalue)


def _equal_spread(members: Floats, nonmembers: Floats) -> float:
    ratio = float(members.var(ddof=1) / nonmembers.var(ddof=1))
    law = f_law(len(members) - 1, len(nonmembers) - 1)
    return float(2 * min(law.cdf(ratio), law.sf(ratio)))


def _least_distance(seen: float, scale: float, freedom: int, confidence: float) -> float:
    """The distance under which Student's statistic is at most what was seen with ``confidence``; 0 at least.

    ``scale`` makes a distance the statistic's shift.
    """
    statistic = seen * scale

    def excess(distance: float) -> float:
        return float(nctdtr(freedom, distance * scale, statistic)) - confidence

    if excess(0.0) <= 0:
        return 0.0
    return float(brentq(excess, 0.0, seen, xtol=1e-10))
