"""Epsilon lower bounds from one threshold's counts: members called members, non-members called members.

The members and the non-members are independent samples, and the threshold does not depend on them. Counts at
a threshold that was chosen on these same samples give no bound: see ``audits.estimators.threshold``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import SupportsIndex

from scipy.special import betaincinv, ndtri

from audits.estimators.gaussian_dp import epsilon_of_mu
from audits.estimators.validation import checked_confidence, checked_delta, checked_share
from audits.estimators.wrapping import Estimator


@dataclass(frozen=True)
class ErrorRates:
    """Upper confidence bounds of both error rates of one threshold; they hold together."""

    false_positive: float
    false_negative: float


@lru_cache(maxsize=65536)
def upper_confidence_bound(successes: int, trials: int, *, error: float) -> float:
    """Clopper and Pearson's (1934) upper bound of a proportion, exceeded with probability <= ``error``."""
    if successes == trials:
        return 1.0
    return float(betaincinv(successes + 1, trials - successes, 1 - error))


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


@partial(ConfusionEstimator, zero_delta=True)
def clopper_pearson(rates: ErrorRates, delta: float) -> float:
    """Epsilon lower bound of any (epsilon, ``delta``)-DP mechanism, without further assumption.

    Clopper-Pearson bounds of both error rates, put into the region that differential privacy allows
    (Kairouz, Oh and Viswanath 2015; Jagielski, Ullman and Oprea 2020). ``delta`` may be 0.
    """
    fpr, fnr = rates.false_positive, rates.false_negative
    odds = max((1 - fnr - delta) / fpr, (1 - fpr - delta) / fnr)
    return max(0.0, math.log(odds)) if odds > 0 else 0.0


@partial(ConfusionEstimator, zero_delta=False)
def gaussian(rates: ErrorRates, delta: float) -> float:
    """Epsilon lower bound at ``delta`` of a mechanism whose trade-off curve is Gaussian (mu-GDP).

    The point of both error bounds lies on one curve, whose mu is converted (Nasr et al. 2023). It holds for
    the Gaussian mechanism and its compositions; a subsampled one is not Gaussian and needs its own curve.
    """
    if rates.false_positive >= 1 or rates.false_negative >= 1:
        return 0.0
    mu = -float(ndtri(rates.false_positive)) - float(ndtri(rates.false_negative))
    return epsilon_of_mu(max(0.0, mu), delta)
