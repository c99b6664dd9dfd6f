"""What a list of events costs: the only door to the accounting library.

Prices are for one unit and one party. Three methods, each named in the ``Bound`` it returns:

* Gaussian mechanisms without sampling: the exact curve of Balle and Wang 2018, Theorem 8.
* Poisson-sampled DP-SGD: privacy loss distributions, discretised pessimistically by "connect the dots"
  (Doroshenko et al. 2022) for ``high``, and rounded down for ``low``.
* rho-zCDP, and whatever privacy loss distributions cannot carry: Renyi differential privacy, converted
  by Proposition 12 of Canonne, Kamath and Steinke 2020.

The neighbouring relation of DP-SGD is add or remove one record; that of zCDP is the event's own. The same
events are priced for several such units, all of them added or all of them removed: a Gaussian moves by as
many clip norms, a sampled one by as many as are in the batch (mixture of Gaussians, Ganesh 2024,
arXiv:2401.10294), and rho grows with their square (Bun and Steinke 2016, Proposition 1.9).
"""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from itertools import count as count_from
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from privkd.errors import BudgetError, InputError
from privkd.privacy.events import DpSgd, NoPrivacy, PostProcessing, PrivacyEvent, ZCdp

# Large libraries are loaded when a price is asked for: whoever reads a statement needs none.
if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

MAX_NOISE = 1e6
"""More noise than this is priced as this much, and a lower rate than the least one as the least."""
_MIN_RATE = 1e-12


@dataclass(frozen=True)
class Composition:
    """What one party's events on one unit come to.

    Attributes:
        sampled: (noise multiplier, sampling rate, steps) of the Poisson-sampled Gaussians, each pair once,
            with 0 < rate < 1 and a positive noise multiplier.
        mu_squared: sum of steps / noise_multiplier^2 of the Gaussians without sampling.
        rho: sum of the zCDP events; infinite where an event has no guarantee.
        members: how many units are added or removed together; ``mu_squared`` and ``rho`` hold for them.
    """

    sampled: tuple[tuple[float, float, int], ...] = ()
    mu_squared: float = 0.0
    rho: float = 0.0
    members: int = 1

    @property
    def infinite(self) -> bool:
        """Whether nothing is guaranteed."""
        return math.isinf(self.mu_squared) or math.isinf(self.rho)

    @property
    def sampled_steps(self) -> int:
        """How many sampled steps there are in all."""
        return sum(steps for _, _, steps in self.sampled)

    @property
    def clamped(self) -> bool:
        """Whether ``sampled`` overstates an extreme event, so that it bounds the price from above alone."""
        return any(noise == MAX_NOISE or rate == _MIN_RATE for noise, rate, _ in self.sampled)

    @property
    def gaussian_mu_squared(self) -> float:
        """``mu_squared`` once each zCDP event is the Gaussian mechanism that attains its rho."""
        return self.mu_squared + 2 * self.rho

    def together(self, members: int) -> Self:
        """The same for ``members`` units together, of one unit's."""
        square = float(members) ** 2
        return replace(self, mu_squared=square * self.mu_squared, rho=square * self.rho, members=members)


def compose(events: Sequence[PrivacyEvent]) -> Composition:
    """Check every event, and merge the equal ones.

    Raises:
        InputError: an impossible parameter, or an unknown kind of event.
    """
    steps: defaultdict[tuple[float, float], int] = defaultdict(int)
    rhos: list[float] = []
    for event in events:
        match event:
            case DpSgd(noise, rate, count):
                _check_dp_sgd(event)
                steps[float(noise), float(rate)] += int(count)
            case ZCdp(rho):
                if not rho >= 0:
                    raise InputError(f"zCDP event with rho={rho}: expected a number of at least 0")
                rhos.append(rho)
            case NoPrivacy():
                rhos.append(math.inf)
            case PostProcessing():
                pass
            case _:
                raise InputError(f"cannot price {event!r}: unknown kind of privacy event")
    return _canonical(steps, rhos)


def _canonical(steps: dict[tuple[float, float], int], rhos: list[float]) -> Composition:
    gaussian, sampled = [], []
    for (noise, rate), count in sorted(steps.items()):
        if count == 0 or rate == 0:
            continue
        if noise == 0 or rate == 1:
            inverse = 1 / noise if noise else math.inf
            gaussian.append(count * inverse * inverse)
        else:
            # Less noise and a higher rate cost more, so both limits err on the safe side.
            sampled.append((min(noise, MAX_NOISE), max(rate, _MIN_RATE), count))
    return Composition(tuple(_merged(sampled)), math.fsum(gaussian), math.fsum(sorted(rhos)))


def _merged(sampled: list[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """The limits may have made two pairs equal."""
    steps: defaultdict[tuple[float, float], int] = defaultdict(int)
    for noise, rate, count in sampled:
        steps[noise, rate] += count
    return [(noise, rate, count) for (noise, rate), count in sorted(steps.items())]


def _check_dp_sgd(event: DpSgd) -> None:
    whole = event.steps >= 0 and event.steps % 1 == 0
    if not (event.noise_multiplier >= 0 and 0 <= event.sampling_rate <= 1 and whole):
        raise InputError(
            f"impossible DP-SGD event {event}: expected a noise multiplier of at least 0, "
            "a sampling rate in [0, 1] and a whole number of steps"
        )


GAUSSIAN = "exact Gaussian"
PLD = "privacy loss distribution"
RDP = "Renyi"
ZCDP = "zCDP"
NONE = "no charge"
UNPROTECTED = "no guarantee"

_FINEST, _COARSEST = 1e-7, 1e-3
"""Limits of the grid of privacy losses: below them float rounding, above them discretisation shows."""
_STEP_POINTS_HIGH, _STEP_POINTS_LOW, _POINTS = 60_000, 200_000, 1_000_000
"""Most points of one step's privacy loss distribution (slow to make), and of the composed one."""
_MAX_STEPS = 100_000
_MAX_STEP_LOSS = 600.0
"""Beyond it the exponential of a privacy loss leaves the range of a float."""
_ROUNDING = 1e-9
_FOURIER_ROUNDING = (1e-11, 1e-15)
"""What the Fourier transforms may add to delta: once, and for every step."""
_RENYI_ROUNDING = 1e-14
_ORDERS = (
    [1 + x / 50 for x in range(1, 5)]
    + [1 + x / 10 for x in range(1, 100)]
    + list(range(11, 64))
    + [round(64 * 2 ** (x / 4)) for x in range(25)]
)
_MIN_NOISE = 1e-2
_MIN_RHO = 1e-30
_MOST_MEMBERS = 1_000
"""Groups of more sampled units take no grid."""
_GROUP_STEP_POINTS, _GROUP_COARSEST = 3_000, 1e-2
"""As of one unit's step; a mixture's points take a hundred times as long."""
_SHARES_OF_DELTA = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 20.0, 40.0, 80.0, 160.0)
"""Logarithms of the parts of delta that a step to a neighbour is tried with."""
_TIGHTNESS = 2e-3


@dataclass(frozen=True)
class Bound:
    """Epsilon, between a lower and an upper bound: ``low <= estimate <= high``.

    Attributes:
        low: no analysis of the same events can claim less. For a zCDP event, whose mechanism is not known,
            it is the price of the Gaussian mechanism of that rho. It is loose (0 at the extreme) where the
            events are many and of many kinds, or too strong for a grid.
        estimate: the accountant's own answer, before the margins for rounding.
        high: what is claimed; the true epsilon is never above it.
        method: how the events were composed.
    """

    low: float
    estimate: float
    high: float
    method: str = NONE

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.estimate <= self.high:
            raise ValueError(f"not a bound: {self.low} <= {self.estimate} <= {self.high}")


def price(events: Sequence[PrivacyEvent], delta: float) -> Bound:
    """The epsilon at ``delta`` of all ``events`` together, for one unit and one party.

    No events, and post-processing, cost 0; a release without privacy costs infinity.

    Raises:
        InputError: ``delta`` outside (0, 1), an impossible parameter, or an unknown kind of event.
    """
    return _price(compose(events), _checked_delta(delta))


def upper_bound(events: Sequence[PrivacyEvent], delta: float) -> float:
    """``price(events, delta).high`` alone, which is cheaper. Raises as ``price`` does."""
    return _high(compose(events), _checked_delta(delta))[0]


def group_upper_bound(events: Sequence[PrivacyEvent], delta: float, members: int) -> float:
    """What ``events`` cost ``members`` units of one owner together: all of them are added, or all removed.

    One member's is `upper_bound`. The curve of the mechanism where its units move together, or where that is
    not exact the bound that holds of any mechanism, if that is tighter.

    Raises:
        InputError: as `price`; or ``members`` is not at least 1.
    """
    if members < 1:
        raise InputError(f"members={members}: expected at least one")
    composed = compose(events)
    if members == 1:
        return _high(composed, _checked_delta(delta))[0]
    high, _, method = _high(composed.together(members), _checked_delta(delta))
    if method in (GAUSSIAN, PLD, NONE, UNPROTECTED):
        return high
    return min(high, _any_group(composed, delta, members))


def replaced_upper_bound(events: Sequence[PrivacyEvent], delta: float) -> float:
    """What ``events`` cost where one unit is neither added nor removed, but another takes its place.

    Without sampling the sum moves by two clip norms at most, so this is `group_upper_bound` of two; else it
    is what holds of any mechanism for one removed and one added. Raises as `price` does.
    """
    composed, delta = compose(events), _checked_delta(delta)
    if composed.sampled:
        return _any_group(composed, delta, 2)
    return group_upper_bound(events, delta, 2)


def _any_group(events: Composition, delta: float, members: int) -> float:
    """Epsilon of ``members`` steps to a neighbour, from one unit's ``events``.

    Each step of (e, d) costs ``(members e, d (1 + exp(e) + ... + exp((members - 1) e)))`` (Vadhan 2017, Lemma
    2.2). Every d whose sum is at most ``delta`` gives a valid bound.
    """
    least = math.inf
    for exponent in _SHARES_OF_DELTA:
        each = delta * math.exp(-exponent) / members
        epsilon = _high(events, each)[0] if each > 0 else math.inf
        if math.isfinite(epsilon) and _log_steps(epsilon, members) + math.log(each) <= math.log(delta):
            least = min(least, members * epsilon)
    return least


def _log_steps(epsilon: float, members: int) -> float:
    """log of ``1 + exp(epsilon) + ... + exp((members - 1) epsilon)``, rounded up."""
    return float(np.logaddexp.reduce(epsilon * np.arange(members))) + _ROUNDING


def delta_curve(events: Sequence[PrivacyEvent], epsilons: NDArray[np.float64]) -> NDArray[np.float64]:
    """Upper bounds on the delta at each of ``epsilons``, also negative ones, by privacy loss distributions.

    A delta is 1 where they cannot carry the events: without sampling, with zCDP, or too many or too strong.
    """
    composed = compose(events)
    priced = composed.sampled and not composed.infinite and not composed.rho
    distribution = _distribution(composed, pessimistic=True) if priced else None
    if distribution is None:
        return np.ones_like(epsilons)
    return np.minimum(np.asarray(distribution.get_delta_for_epsilon(epsilons)) + _slack(composed), 1.0)


def calibrate_noise_multiplier(*, epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The smallest noise multiplier whose ``steps`` DP-SGD steps cost at most ``epsilon`` at ``delta``.

    ``steps`` counts the steps of all rounds together. The answer is rounded up: its price is within 0.2 %
    below ``epsilon`` (unless the floor of 0.01 binds). An infinite ``epsilon`` needs no noise: 0.0.

    Raises:
        InputError: a parameter out of range.
        BudgetError: no noise multiplier up to a million is enough.
    """
    _check_epsilon(epsilon)
    _checked_delta(delta)
    if steps < 1 or not 0 < sampling_rate <= 1:
        raise InputError(
            f"cannot calibrate {steps} steps at sampling rate {sampling_rate}: "
            "expected at least one step and a rate in (0, 1]"
        )
    if math.isinf(epsilon):
        return 0.0

    def cost(noise_multiplier: float) -> float:
        return upper_bound([DpSgd(noise_multiplier, sampling_rate, steps)], delta)

    start = max(sampling_rate, 0.1) * math.sqrt(steps) / epsilon
    return _smallest(cost, epsilon, start, what=f"{steps} steps at sampling rate {sampling_rate}")


def calibrate_rho(*, epsilon: float, delta: float, releases: int) -> float:
    """The largest rho such that ``releases`` rho-zCDP releases cost at most ``epsilon`` at ``delta``.

    Rounded down. An infinite ``epsilon`` allows an infinite rho (no noise).

    Raises:
        InputError: a parameter out of range.
        BudgetError: no positive rho fits.
    """
    _check_epsilon(epsilon)
    _checked_delta(delta)
    if releases < 1:
        raise InputError(f"releases={releases}: expected at least one")
    if math.isinf(epsilon):
        return math.inf

    def cost(noise: float) -> float:
        return upper_bound([ZCdp(1 / noise**2)] * releases, delta)

    noise = _smallest(
        cost, epsilon, math.sqrt(releases) / epsilon, what=f"{releases} zCDP releases", least=0.0
    )
    return 1 / noise**2


def _smallest(
    cost: Callable[[float], float], epsilon: float, start: float, *, what: str, least: float = _MIN_NOISE
) -> float:
    """The smallest noise with ``cost(noise) <= epsilon``, by false position on the logarithms."""
    low = high = min(max(start, 2 * least), MAX_NOISE)
    while cost(high) > epsilon:
        if high >= MAX_NOISE:
            raise BudgetError(
                f"epsilon={epsilon:g} cannot be kept over {what}: raise epsilon or take fewer steps"
            )
        low, high = high, min(2 * high, MAX_NOISE)
    while low == high or cost(low) <= epsilon:
        if low <= least:
            return least
        low, high = max(low / 2, least), low
    for attempt in count_from(1):
        if cost(high) >= (1 - _TIGHTNESS) * epsilon or high / low < 1 + 1e-7:
            break
        # Where the price jumps (another method takes over) false position crawls, so bisect now and then.
        middle = math.sqrt(low * high) if attempt % 3 == 0 else _between(low, high, cost, epsilon)
        low, high = (low, middle) if cost(middle) <= epsilon else (middle, high)
    return high


def _between(low: float, high: float, cost: Callable[[float], float], epsilon: float) -> float:
    """Where a power law through both ends is just below ``epsilon``, kept away from the ends."""
    at_low, at_high = cost(low), cost(high)
    if math.isinf(at_low) or at_high <= 0:
        return math.sqrt(low * high)
    share = math.log(at_low / ((1 - _TIGHTNESS / 2) * epsilon)) / math.log(at_low / at_high)
    return low * (high / low) ** min(max(share, 0.02), 0.98)


def _check_epsilon(epsilon: float) -> None:
    if not epsilon > 0:
        raise InputError(f"epsilon={epsilon}: expected a positive number or inf")


def _checked_delta(delta: float) -> float:
    if not 0 < delta < 1:
        raise InputError(f"delta={delta}: expected a number strictly between 0 and 1")
    return float(delta)


@lru_cache(maxsize=4096)
def _price(events: Composition, delta: float) -> Bound:
    high, estimate, method = _high(events, delta)
    if events.infinite:
        return Bound(math.inf, math.inf, math.inf, method)
    low = min(_low(events, delta, high), high)
    return Bound(low, min(max(estimate, low), high), high, method)


@lru_cache(maxsize=4096)
def _high(events: Composition, delta: float) -> tuple[float, float, str]:
    """(upper bound, estimate, method)."""
    if events.infinite:
        return math.inf, math.inf, UNPROTECTED
    if not events.sampled:
        epsilon, method = _unsampled_epsilon(events, delta)
        return epsilon * (1 + _ROUNDING), epsilon, method
    slack = _slack(events)
    if not events.rho and delta > 50 * slack and events.members <= _MOST_MEMBERS:
        distribution = _distribution(events, pessimistic=True)
        high = _loss_quantile(distribution, delta - slack)
        if high is not None:
            return high * (1 + _ROUNDING), _loss_quantile(distribution, delta) or 0.0, PLD
    epsilon = _renyi_epsilon(events, delta)
    return epsilon, epsilon, RDP


def _low(events: Composition, delta: float, high: float) -> float:
    """A lower bound: the privacy loss of the Gaussian that attains rho, rounded down at every step."""
    gaussian = _gaussian_epsilon(events.gaussian_mu_squared, delta) * (1 - _ROUNDING) - _ROUNDING
    if events.clamped or not events.sampled or not high:
        return max(0.0, gaussian)
    distribution = _distribution(events, pessimistic=False, accuracy=0.01 * high)
    sampled = _loss_quantile(distribution, delta + _slack(events)) or 0.0
    return max(0.0, gaussian, sampled * (1 - _ROUNDING))


def _unsampled_epsilon(events: Composition, delta: float) -> tuple[float, str]:
    if events.rho:
        return _zcdp_epsilon(events.rho + events.mu_squared / 2, delta), ZCDP
    if events.mu_squared:
        return _gaussian_epsilon(events.mu_squared, delta), GAUSSIAN
    return 0.0, NONE


def _gaussian_epsilon(mu_squared: float, delta: float) -> float:
    """Epsilon of mu-Gaussian differential privacy (Balle and Wang 2018, Theorem 8)."""
    if not mu_squared:
        return 0.0
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

    with np.errstate(divide="ignore"):
        return float(get_epsilon_gaussian(1 / math.sqrt(max(mu_squared, _MIN_RHO)), delta, tol=1e-12))


def _zcdp_epsilon(rho: float, delta: float) -> float:
    """min over alpha > 1 of rho alpha + log(1 - 1/alpha) - log(delta alpha) / (alpha - 1).

    Canonne, Kamath and Steinke 2020, Proposition 12. Every alpha gives a valid bound, so an inexact
    minimum is still safe.
    """
    if math.isinf(rho):
        return math.inf
    from scipy.optimize import minimize_scalar

    rho = max(rho, _MIN_RHO)

    def bound(log_excess: float) -> float:
        x = math.exp(log_excess)  # alpha - 1
        return rho * (1 + x) + log_excess - math.log1p(x) - (math.log(delta) + math.log1p(x)) / x

    centre = math.log(math.sqrt(-math.log(delta) / rho))
    best = minimize_scalar(bound, bounds=(centre - 5, centre + 5), method="bounded", options={"xatol": 1e-9})
    return max(0.0, float(best.fun))


def _renyi_epsilon(events: Composition, delta: float) -> float:
    """The better of two bounds: the library's, and one that forgoes amplification but holds in all cases."""
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    rho, members = events.rho + events.mu_squared / 2, events.members
    accountant = RdpAccountant(_ORDERS)
    try:
        with _quiet():
            for noise, rate, steps in events.sampled:
                if members > 1:
                    # As if all of them were in the batch where one is, which only costs more.
                    noise, rate = noise / members, -math.expm1(members * math.log1p(-rate))
                step = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise))
                accountant.compose(dp_event.SelfComposedDpEvent(step, steps))
            # The library rounds a vanishing divergence below zero and then calls it free; xi keeps it above.
            xi = _RENYI_ROUNDING * events.sampled_steps
            accountant.compose(dp_event.ZCDpEvent(rho, xi))
            amplified = float(accountant.get_epsilon(delta))
    except (ArithmeticError, ValueError):
        amplified = math.inf
    gaussian = sum(n / 2 / noise / noise for noise, _, n in events.sampled) * float(members) ** 2
    unamplified = _zcdp_epsilon(rho + gaussian, delta)
    return min(unamplified, math.inf if math.isnan(amplified) else amplified) * (1 + _ROUNDING)


@contextmanager
def _quiet() -> Iterator[None]:
    """The library warns of every order whose series does not converge; it then leaves that order out."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@lru_cache(maxsize=2)
def _distribution(
    events: Composition, *, pessimistic: bool, accuracy: float = math.inf
) -> "PrivacyLossDistribution | None":
    """The composed privacy loss distribution; rho enters as the Gaussian that attains it.

    ``None`` where the steps are too many, or their losses leave the range of a float. The optimistic one
    rounds every step's loss down, by at most ``accuracy`` over all steps where its size allows that.
    """
    mu_squared = events.gaussian_mu_squared
    if events.sampled_steps > _MAX_STEPS or min(noise for noise, _, _ in events.sampled) < _MIN_NOISE:
        return None
    members = events.members
    largest = max(_moments(noise, rate, members)[2] for noise, rate, _ in events.sampled)
    if max(largest, mu_squared) > _MAX_STEP_LOSS:
        return None
    interval = _interval(events, largest, pessimistic, accuracy)
    try:
        parts = [
            _step(noise, rate, members, interval, pessimistic).self_compose(n)
            for noise, rate, n in events.sampled
        ]
        if mu_squared > _MIN_RHO:
            parts.append(_step(1 / math.sqrt(mu_squared), 1.0, 1, interval, pessimistic))
    except (ArithmeticError, ValueError):
        return None
    return reduce(lambda whole, part: whole.compose(part, tail_mass_truncation=0), parts)


def _loss_quantile(distribution: "PrivacyLossDistribution | None", delta: float) -> float | None:
    if distribution is None:
        return None
    try:
        with np.errstate(over="ignore"):
            epsilon = float(distribution.get_epsilon_for_delta(delta))
    except (ArithmeticError, ValueError):
        return None
    return epsilon if math.isfinite(epsilon) else None


def _interval(events: Composition, largest: float, pessimistic: bool, accuracy: float) -> float:
    """The grid of the privacy loss: at most 1e-3, fine against one step's spread, and of a bounded size."""
    parts = [(*_moments(noise, rate, events.members), n) for noise, rate, n in events.sampled]
    mu_squared = events.gaussian_mu_squared
    mean = sum(n * m for m, _, _, n in parts)
    variance = sum(n * v for _, v, _, n in parts)
    span = 2 * mean + mu_squared + 20 * math.sqrt(variance + mu_squared) + 2 * largest
    alone = events.members == 1
    step_points = _STEP_POINTS_HIGH if pessimistic else _STEP_POINTS_LOW / len(parts)
    step_points, coarsest = (step_points, _COARSEST) if alone else (_GROUP_STEP_POINTS, _GROUP_COARSEST)
    fine = min(coarsest, math.sqrt(variance / events.sampled_steps) / 30, accuracy / events.sampled_steps)
    return max(fine, _FINEST, span / _POINTS, 2 * largest / step_points)


@lru_cache(maxsize=8)
def _step(
    noise: float, rate: float, members: int, interval: float, pessimistic: bool
) -> "PrivacyLossDistribution":
    from dp_accounting.pld import privacy_loss_distribution as pld

    if members > 1:
        return pld.from_mixture_gaussian_mechanism(
            noise,
            np.arange(members + 1.0),
            _batches(members, rate),
            value_discretization_interval=interval,
            pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic,
        )
    return pld.from_gaussian_mechanism(
        noise,
        sampling_prob=rate,
        value_discretization_interval=interval,
        pessimistic_estimate=pessimistic,
        use_connect_dots=pessimistic,
    )


def _slack(events: Composition) -> float:
    """How far the Fourier transforms' rounding may shift delta."""
    once, each = _FOURIER_ROUNDING
    return once + each * events.sampled_steps


@lru_cache(maxsize=256)
def _moments(noise: float, rate: float, members: int) -> tuple[float, float, float]:
    """Mean, variance and practical maximum of one step's privacy loss, when all ``members`` are removed."""
    z = np.linspace(-10, 10, 2001)
    weight = np.exp(-(z**2) / 2)
    weight /= weight.sum()
    there, ways = _ways(members)
    x = z + there[:, None] / noise
    first, *others = (
        math.log(way) + (members - i) * math.log1p(-rate) + i * math.log(rate) + x * i / noise
        - i / noise * i / noise / 2
        for i, way in zip(there, ways, strict=True)
    )  # fmt: skip
    loss = reduce(np.logaddexp, others, first)
    density = _batches(members, rate)[:, None] * weight
    mean = float((density * loss).sum())
    variance = float((density * (loss - mean) ** 2).sum())
    return max(mean, 0.0), max(variance, 1e-30), float(np.abs(loss).max())


def _batches(members: int, rate: float) -> NDArray[np.float64]:
    """How likely 0, 1, ... ``members`` of them are in the batch."""
    there, ways = _ways(members)
    return ways * rate**there * (1 - rate) ** (members - there)


def _ways(members: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """0, 1, ... ``members``, and in how many ways so many of them can be chosen."""
    from scipy.special import comb

    there = np.arange(members + 1.0)
    return there, np.asarray(comb(members, there))
