"""Confident-GNMax: a noisy vote of which the cloud learns consensus labels alone, and what that costs.

Papernot, Song, Mironov, Raghunathan, Talwar and Erlingsson 2018, "Scalable Private Learning with PATE",
Algorithm 1. For each query let ``n_j`` be the devices that vote for class ``j``, and ``T`` a threshold::

    if max_j n_j + N(0, sigma_1^2) >= T:  release argmax_j (n_j + N(0, sigma_2^2))
    else:                                 release that there is no consensus

Here both Gaussians are discrete, and each aggregator draws its own, so that one honest aggregator suffices.

Neighbouring relation: zero out one device's whole contribution, which takes one vote off every query. The
maximum then moves by at most 1, and the counts by 1 in L2, so a query costs ``1/(2 sigma_1^2) +
1/(2 sigma_2^2)`` in zCDP whatever the votes are (Canonne, Kamath and Steinke 2020, Theorem 4). That is what
the ledger charges, before the release. (In the paper a device changes its vote, which costs more.)

A clear consensus costs less. ``data_dependent_rdp`` says how much, by the paper's Theorem 6; but it is a
function of the private votes, and so itself private: an analyst's figure, never to be released, and never
the ledger's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from privkd.errors import ConfigError

ORDERS: NDArray[np.float64] = np.concatenate(
    [1 + np.geomspace(0.02, 10, 80), np.arange(12, 65), 64 * 2.0 ** np.arange(0.25, 6.25, 0.25)]
)
"""Renyi orders at which the data-dependent price is taken."""

_TARGET = 0.2
_GRAIN = 1024
MAX_VOTE_SIGMA2 = Fraction(1 << 48)


@dataclass(frozen=True)
class VoteRule:
    """The public parameters of one release. ``None`` for a variance is no noise.

    Attributes:
        queries: asked at once.
        threshold: ``T``, in votes.
        threshold_sigma2: ``sigma_1^2`` of each aggregator.
        sigma2: ``sigma_2^2`` of each aggregator.
    """

    queries: int
    threshold: int
    threshold_sigma2: Fraction | None
    sigma2: Fraction | None

    @property
    def rho(self) -> Fraction | None:
        """Price of the release to each device; none without noise."""
        if self.sigma2 is None or self.threshold_sigma2 is None:
            return None
        return vote_rho(self.queries, self.threshold_sigma2, self.sigma2)


def vote_rho(queries: int, threshold_sigma2: Fraction, sigma2: Fraction) -> Fraction:
    """The price of a vote in zCDP, to each device and whatever the votes are; zero-out."""
    return queries * (1 / (2 * threshold_sigma2) + 1 / (2 * sigma2))


def vote_rule(
    *, devices: int, queries: int, rho: float | None, threshold: float, threshold_share: float
) -> VoteRule:
    """The rule whose price is at most ``rho``, and as near to it as floats allow. All inputs are public.

    Args:
        devices: how many may vote.
        queries: asked at once.
        rho: zCDP price of the release; ``None`` for no noise.
        threshold: share of the devices that make a consensus.
        threshold_share: part of ``rho`` that is spent on the comparison with the threshold.

    Raises:
        ConfigError: so little is left for a query that the noise could not be drawn.
    """
    fewest = math.ceil(threshold * devices - 1e-9)
    if rho is None:
        return VoteRule(queries, fewest, None, None)
    share = Fraction(threshold_share)
    each = Fraction(rho) / queries
    variances = [_rounded_up(1 / (2 * each * part)) for part in (share, 1 - share)]
    if max(variances) > MAX_VOTE_SIGMA2:
        raise ConfigError(
            f"rho={rho:g} over {queries} votes: too little; raise the device budget or ask less"
        )
    return VoteRule(queries, fewest, *variances)


def _rounded_up(variance: Fraction) -> Fraction:
    """A nearby fraction with a small denominator, never below: it has to travel."""
    return Fraction(math.ceil(variance * _GRAIN), _GRAIN)


def affordable_queries(*, devices: int, parties: int, rho: float, threshold_share: float) -> int:
    """The most queries, at least 1, whose votes are not drowned: a vote's noise, that of all ``parties``
    together, has a standard deviation of at most a fifth of the ``devices``."""
    sigma2 = (_TARGET * devices) ** 2 / parties
    return max(1, math.floor(2 * sigma2 * (1 - threshold_share) * rho))


def tally(votes: NDArray[np.int64], scores: NDArray[np.int64], threshold: int) -> NDArray[np.bool_]:
    """What a vote reveals, worked out in the open: the oracle of the secure one.

    Args:
        votes: noisy counts for the argmax ``[query, class]``; ties go to the lower class.
        scores: counts, each row with its one draw of the threshold's noise, ``[query, class]``.
        threshold: fewest that make a consensus.

    Returns:
        One-hot rows ``[query, class]``; a row without consensus is all false.
    """
    winners = np.zeros(votes.shape, np.bool_)
    winners[np.arange(len(votes)), votes.argmax(axis=1)] = True
    consensus: NDArray[np.bool_] = scores.max(axis=1) >= threshold
    return winners & consensus[:, None]


def data_dependent_rdp(
    counts: NDArray[np.integer], rule: VoteRule, parties: int
) -> NDArray[np.float64] | None:
    """Renyi differential privacy of one release to the cloud alone, given the votes: ``[order]``; see ORDERS.

    Private: the figure depends on the votes. It holds against a cloud with which none of the ``parties``
    pools, so that all their noise counts. ``None`` without noise.

    Each query is one mechanism with the outcomes "no consensus", 1, ..., C. Where its likeliest outcome fails
    to appear with probability at most ``q``, Theorem 6 of the paper bounds its price by two orders of its
    data-independent one. ``q`` comes from subgaussian tails, which discrete Gaussians have (Canonne, Kamath
    and Steinke 2020). The data-independent price is that of one aggregator's noise, as the ledger's.

    Args:
        counts: exact votes ``[query, class]``.
        rule: of the release.
        parties: aggregators, each with noise of its own.
    """
    if rule.rho is None or rule.sigma2 is None or rule.threshold_sigma2 is None:
        return None
    rho = float(rule.rho) / rule.queries
    log_q = _log_surprise(
        np.sort(counts.astype(np.float64), axis=1)[:, ::-1],
        rule.threshold,
        parties * float(rule.threshold_sigma2),
        parties * float(rule.sigma2),
    )
    total: NDArray[np.float64] = np.minimum(_theorem_6(log_q, rho), rho * ORDERS).sum(axis=0)
    return total


def _log_surprise(
    ordered: NDArray[np.float64], threshold: int, score_variance: float, variance: float
) -> NDArray[np.float64]:
    """Bound on the logarithm of the chance that the likeliest outcome fails to appear, ``[query]``.

    With ``t`` above its mean, a subgaussian sum of variance ``v`` lies with probability ``exp(-t^2 / (2 v))``
    at most. A class overtakes another where the difference of two sums, of variance ``2 v``, exceeds the gap.
    ``ordered``: counts ``[query, class]``, most first.
    """
    above = ordered[:, 0] - threshold
    # A draw is an integer: not reaching T from above takes a fall of one more than the distance.
    log_missed = -np.square(np.maximum(above + 1, 0)) / (2 * score_variance)
    log_reached = -np.square(np.maximum(-above, 0)) / (2 * score_variance)
    gaps = ordered[:, :1] - ordered[:, 1:]
    log_overtaken = np.logaddexp.reduce(-np.square(gaps) / (4 * variance), axis=1)
    bound: NDArray[np.float64] = np.where(above >= 0, np.logaddexp(log_missed, log_overtaken), log_reached)
    return bound


def _theorem_6(log_q: NDArray[np.float64], rho: float) -> NDArray[np.float64]:
    """Theorem 6 for a mechanism of ``(mu, rho mu)``-RDP for every order ``mu``: ``[query, order]``.

    With ``mu_2 = sqrt(log(1/q) / rho)`` and ``mu_1 = mu_2 + 1``, the choice of its Proposition 10, for orders
    ``lambda < mu_1``, where ``mu_2 > 1`` and ``q <= exp((mu_2 - 1) eps_2) / (mu_1 mu_2 / ((mu_1 - 1)
    (mu_2 - 1)))^mu_2``, with ``eps_i = rho mu_i``::

        eps(lambda) <= log((1 - q) A^(lambda - 1) + q B^(lambda - 1)) / (lambda - 1)
        A = (1 - q) / (1 - (q e^eps_2)^((mu_2 - 1) / mu_2)),   B = e^eps_1 / q^(1 / (mu_1 - 1))

    Infinite where it does not apply.
    """
    with np.errstate(all="ignore"):
        log_q = np.minimum(log_q, 0.0)[:, None]
        mu2 = np.sqrt(-log_q / rho)
        mu1 = mu2 + 1
        eps1, eps2 = rho * mu1, rho * mu2
        allowed = (mu2 - 1) * eps2 - mu2 * np.log(mu1 * mu2 / ((mu1 - 1) * (mu2 - 1)))
        log_not_q = np.log1p(-np.exp(log_q))
        shrunk = (log_q + eps2) * (mu2 - 1) / mu2
        log_a = log_not_q - np.log1p(-np.exp(shrunk))
        log_b = eps1 - log_q / (mu1 - 1)
        excess = ORDERS - 1
        bound = np.logaddexp(log_not_q + excess * log_a, log_q + excess * log_b) / excess
        fits = (mu2 > 1) & (log_q <= allowed) & (shrunk < 0) & (mu1 > ORDERS) & (log_q < 0)
    return np.where(fits & np.isfinite(bound), np.maximum(bound, 0.0), np.inf)


def rdp_epsilon(rdp: Sequence[float] | NDArray[np.float64], delta: float) -> float:
    """Epsilon at ``delta`` of divergences at ``ORDERS`` (Canonne, Kamath, Steinke 2020, Proposition 12)."""
    bounds = np.asarray(rdp) + np.log1p(-1 / ORDERS) - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1)
    return max(0.0, float(np.min(bounds)))
