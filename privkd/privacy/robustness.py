"""Reconstruction robustness: the most that priced events let anyone rebuild of what they touched.

An adversary whose prior gives a blind guess the success ``kappa`` rebuilds its target with probability of
at most ``sup {P(E) : Q(E) <= kappa}``, where ``P`` is the law of the release with the target and ``Q``
without it (Balle, Cherubin and Hayes 2022; Hayes, Mahloujifar and Balle 2023, Theorem 2). That is ``1 -
f(kappa)`` for the trade-off curve ``f``, it is concave in ``kappa``, and so it also holds on average over a
prior. Neighbouring
relation: that of the events, with and without the target.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import ndtr, ndtri

from privkd.errors import InputError
from privkd.privacy.accounting import Composition, compose, delta_curve, upper_bound
from privkd.privacy.events import PrivacyEvent

_LEAST_DELTA = 1e-15
_ROUNDING = 1e-9
_LEAST_EPSILON, _POINTS = -20.0, 2000
_LARGEST_EXPONENT = 700.0


def reconstruction_ceiling(events: Sequence[PrivacyEvent], kappa: float) -> float:
    """Upper bound on the probability of a successful reconstruction, in ``[kappa, 1]``.

    Exact for Gaussian mechanisms without sampling: ``Phi(Phi^-1(kappa) + mu)``. For all others, the least of
    ``e^epsilon kappa + delta`` over the pairs that the accountant proves, and for zCDP also of
    ``exp(-(sqrt(log 1/kappa) - sqrt(rho))^2)``, which a Renyi divergence of ``alpha rho`` at every order
    allows. No events leave ``kappa``, a release without privacy 1.

    Args:
        events: all that was released of one party's unit.
        kappa: success of the best guess without the release, such as 1/10 for ten equally likely candidates.

    Raises:
        InputError: ``kappa`` outside (0, 1), an impossible parameter, or an unknown kind of event.
    """
    if not 0 < kappa < 1:
        raise InputError(f"kappa={kappa!r}: expected a probability strictly between 0 and 1")
    composed = compose(events)
    if composed.infinite:
        return 1.0
    if not composed.sampled and not composed.rho:
        return float(ndtr(ndtri(kappa) + math.sqrt(composed.mu_squared)))
    ceiling = _from_curve(events, kappa)
    if ceiling >= 1:
        ceiling = min(_from_pairs(events, kappa), _from_renyi(composed, kappa))
    return min(1.0, max(kappa, ceiling * (1 + _ROUNDING)))


def _from_curve(events: Sequence[PrivacyEvent], kappa: float) -> float:
    """min over epsilon of e^epsilon kappa + delta(epsilon); any epsilon, even below 0, gives a bound."""
    epsilons = np.linspace(_LEAST_EPSILON, -math.log(kappa), _POINTS)
    return float((np.exp(epsilons) * kappa + delta_curve(events, epsilons)).min())


def _from_pairs(events: Sequence[PrivacyEvent], kappa: float) -> float:
    """The same over the epsilons that the accountant proves at each delta."""

    def bound(log_delta: float) -> float:
        delta = math.exp(log_delta)
        return math.exp(min(upper_bound(events, delta) + math.log(kappa), _LARGEST_EXPONENT)) + delta

    limits = (math.log(_LEAST_DELTA), math.log1p(-kappa))
    best = minimize_scalar(bound, bounds=limits, method="bounded", options={"xatol": 1e-2})
    return float(best.fun)


def _from_renyi(composed: Composition, kappa: float) -> float:
    rho, surprise = composed.rho + composed.mu_squared / 2, -math.log(kappa)
    if composed.sampled or rho >= surprise:
        return 1.0
    return math.exp(-((math.sqrt(surprise) - math.sqrt(rho)) ** 2))
