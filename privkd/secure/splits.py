"""Who adds the noise of a secure sum, what that costs, and whom it trusts.

``aggregators`` (default): each adds a discrete Gaussian of variance ``sigma^2``. Price: exactly
``rho = C^2 / (2 sigma^2)`` per device, against the cloud and all other aggregators together. Trust: one
aggregator that keeps its noise key and its shares to itself. Cost: a standard deviation ``sqrt(K)`` as high.

``devices``: each adds one of variance ``sigma^2 / n_min``. The sum of discrete Gaussians is not quite one:
its price is that of Kairouz, Liu and Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated
Learning with Secure Aggregation", Proposition 14. Trust: ``n_min`` of the devices in the sum add their noise
and keep it to themselves, and one aggregator keeps its shares, as without it the others see each device's
answers under a ``n_min``-th of the noise only. Cost: where more than ``n_min`` devices contribute, more noise
than needed.

Neighbouring relation of both: zero out one device's whole contribution, the number of devices public.
"""

import math
from fractions import Fraction

from privkd.errors import ConfigError
from privkd.privacy.noise import MAX_SIGMA2

_MAX_ENTRIES = 1 << 26
_MARGIN = Fraction(1 + 2.0**-30)


def distributed_rho(sensitivity: float, variance: Fraction, summands: int, entries: int) -> float:
    """The rho of zCDP of a sum of ``summands`` discrete Gaussians of ``variance``, on ``entries`` integers.

    With ``s^2`` the variance, ``n`` the summands, ``d`` the entries, ``S = sqrt(n) s`` and
    ``tau = 10 sum_{k=1}^{n-1} exp(-2 pi^2 s^2 k / (k + 1))``, Proposition 14 bounds the Renyi divergence of
    order alpha by ``alpha`` times either of

        (D2^2 / S^2 + 2 D1 tau / S + tau^2 d) / 2      and      (D2 / S + sqrt(d) tau)^2 / 2

    whose smaller one is therefore rho. ``D1 <= D2^2``, as the entries are integers, and ``<= sqrt(d) D2``.

    Args:
        sensitivity: in L2, an integer bound on one device's block: ``D2``.
        variance: parameter of each summand.
        summands: honest ones; others only add.
        entries: of a block.
    """
    s2, d2 = float(variance), float(sensitivity)
    spread = math.sqrt(summands * s2)
    tau = _tau(s2, summands)
    d1 = min(d2 * d2, math.sqrt(entries) * d2)
    second = d2 * d2 / (spread * spread) + 2 * d1 * tau / spread + tau * tau * entries
    third = (d2 / spread + math.sqrt(entries) * tau) ** 2
    return min(second, third) / 2


def _tau(s2: float, summands: int) -> float:
    # The terms fall with k, so from the thousandth on they are bounded by its value.
    exact = min(summands - 1, 1000)
    terms = math.fsum(math.exp(-2 * math.pi**2 * s2 * k / (k + 1)) for k in range(1, exact + 1))
    rest = max(0, summands - 1 - exact) * math.exp(-2 * math.pi**2 * s2 * 1000 / 1001)
    return 10 * (terms + rest)


def distributed_variance(bound: int, rho: float, minimum: int) -> Fraction:
    """``sigma^2`` of which each device adds a ``minimum``-th, such that the sum is ``rho``-zCDP.

    Raises:
        ConfigError: the noise is out of the sampler's range, or each device's part of it so small that
            the sum is too far from a discrete Gaussian.
    """
    total = Fraction(bound * bound) / (2 * Fraction(rho)) * _MARGIN
    if total > MAX_SIGMA2:
        raise ConfigError(
            f"rho={rho:g}: too small, the noise would drown every answer; raise the device budget"
        )
    if distributed_rho(bound, total / minimum, minimum, _MAX_ENTRIES) > rho:
        raise ConfigError(
            f"rho={rho:g} over {minimum} devices: each would add too little noise for the sum to be priced; "
            "lower the device budget or the minimum, or let the aggregators add the noise"
        )
    return total
