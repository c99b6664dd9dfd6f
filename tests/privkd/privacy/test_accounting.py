import math
from itertools import pairwise

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant

from privkd.errors import BudgetError, InputError
from privkd.privacy.accounting import Bound, calibrate_noise_multiplier, calibrate_rho, price, upper_bound
from privkd.privacy.events import DpSgd, NoPrivacy, PostProcessing, PrivacyEvent, ZCdp

DELTA = 1e-5
SECOND_ERROR = 0.01
"""What the second accountant states of itself: its epsilon is off by at most this, and so is its estimate."""

noises = st.floats(0.4, 20)
rates = st.floats(1e-3, 1)
step_counts = st.integers(1, 2000)
runs = st.builds(DpSgd, noises, rates, step_counts)


@pytest.mark.parametrize(
    ("noise", "epsilon"), [(1.0, 4.3772), (2.0, 1.9931), (0.5, 9.9973)], ids=["mu=1", "mu=1/2", "mu=2"]
)
def test_one_gaussian_costs_what_is_known(noise: float, epsilon: float) -> None:
    bound = price([DpSgd(noise, 1.0, 1)], DELTA)
    assert bound.high == pytest.approx(epsilon, abs=1e-4)
    assert bound.high - bound.low < 1e-6


def test_zcdp_costs_what_is_known() -> None:
    assert price([ZCdp(0.5)], 1e-6).high == pytest.approx(5.2215, abs=1e-4)


@pytest.mark.parametrize(("epsilon", "ratio"), [(1, 4.53), (2, 2.38), (4, 1.27), (8, 0.69)])
def test_calibrated_rho_meets_the_known_noise(epsilon: float, ratio: float) -> None:
    rho = calibrate_rho(epsilon=epsilon, delta=1e-6, releases=1)
    assert math.sqrt(1 / (2 * rho)) == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize("rho", [1e-9, 1e-3, 0.5, 30, 1e4])
@pytest.mark.parametrize("delta", [0.5, 1e-3, 1e-6, 1e-12, 1e-100])
def test_zcdp_conversion_finds_the_best_order(rho: float, delta: float) -> None:
    x = np.logspace(-12, 12, 200_001)
    every_order = rho * (1 + x) + np.log(x) - np.log1p(x) - (math.log(delta) + np.log1p(x)) / x
    assert price([ZCdp(rho)], delta).high == pytest.approx(max(0.0, every_order.min()), rel=1e-6, abs=1e-9)


def exact_single_step(noise: float, rate: float, delta: float) -> float:
    """Removing a record from one step: H_eps(step) = q H_e(Gaussian) with exp(e) = 1 + (exp(eps) - 1) / q."""
    with mpmath.workdps(50):
        s, q = mpmath.mpf(noise), mpmath.mpf(rate)

        def divergence(epsilon: mpmath.mpf) -> mpmath.mpf:
            e = mpmath.log1p(mpmath.expm1(epsilon) / q)
            return q * (mpmath.ncdf(1 / (2 * s) - e * s) - mpmath.exp(e) * mpmath.ncdf(-1 / (2 * s) - e * s))

        low, high = mpmath.mpf(0), mpmath.mpf(500)
        if divergence(low) <= delta:
            return 0.0
        for _ in range(70):
            middle = (low + high) / 2
            low, high = (middle, high) if divergence(middle) > delta else (low, middle)
        return float(high)


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-12])
@pytest.mark.parametrize("noise", [0.1, 1.0, 300.0])
@pytest.mark.parametrize("rate", [1e-9, 0.01, 0.9, 1 - 1e-12])
def test_one_sampled_step_is_bounded_on_both_sides(noise: float, rate: float, delta: float) -> None:
    exact = exact_single_step(noise, rate, delta)
    bound = price([DpSgd(noise, rate, 1)], delta)
    assert bound.low <= exact * (1 + 1e-9)
    assert bound.high >= exact * (1 - 1e-12)


@pytest.mark.parametrize(("noise", "steps"), [(100.0, 10_000), (10.0, 100), (1.0, 5), (1000.0, 10_000)])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
def test_many_sampled_steps_meet_the_gaussian_at_rate_one(noise: float, steps: int, delta: float) -> None:
    exact = price([DpSgd(noise, 1.0, steps)], delta)
    nearly = price([DpSgd(noise, 1 - 1e-7, steps)], delta)
    assert nearly.method != exact.method
    assert nearly.low < exact.high
    assert exact.high * (1 - 1e-6) <= nearly.high <= exact.high * 1.001


SECOND_TABLE = [
    [DpSgd(1.2, 0.1, 60)],
    [DpSgd(1.0, 0.01, 1000)],
    [DpSgd(1.0, 0.01, 10_000)],
    [DpSgd(0.6, 0.001, 2000)],
    [DpSgd(3.3, 0.25, 80)],
    [DpSgd(6.0, 0.9, 100)],
    [DpSgd(20.0, 0.05, 5000)],
    [DpSgd(0.8, 0.02, 200)],
    [DpSgd(1.2, 0.1, 20), DpSgd(2.0, 0.2, 40)],
    [DpSgd(1.0, 0.01, 500), DpSgd(1.5, 0.02, 500), DpSgd(4.0, 0.5, 10)],
]


@pytest.mark.parametrize("events", SECOND_TABLE, ids=str)
def test_a_second_accountant_agrees(events: list[DpSgd]) -> None:
    second = PRVAccountant()
    second.history = [(e.noise_multiplier, e.sampling_rate, e.steps) for e in events]
    upper = second.get_epsilon(DELTA, eps_error=SECOND_ERROR)
    bound = price(events, DELTA)
    # The second accountant's upper bound lies at most twice its error above the truth.
    assert upper - 2 * SECOND_ERROR <= bound.high <= upper
    assert bound.high == pytest.approx(upper, rel=0.02, abs=2 * SECOND_ERROR)
    assert bound.low <= upper


@pytest.mark.parametrize("steps", [1, 60, 10_000])
@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("epsilon", [0.01, 3, 100])
def test_calibration_is_safe_and_tight(epsilon: float, rate: float, steps: int) -> None:
    noise = calibrate_noise_multiplier(epsilon=epsilon, delta=DELTA, sampling_rate=rate, steps=steps)
    assert 0.99 * epsilon <= upper_bound([DpSgd(noise, rate, steps)], DELTA) <= epsilon


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(epsilon=st.floats(0.2, 20), delta=st.sampled_from([1e-3, 1e-6, 1e-10]), rate=rates, steps=step_counts)
def test_calibration_holds_anywhere(epsilon: float, delta: float, rate: float, steps: int) -> None:
    noise = calibrate_noise_multiplier(epsilon=epsilon, delta=delta, sampling_rate=rate, steps=steps)
    cost = upper_bound([DpSgd(noise, rate, steps)], delta)
    assert cost <= epsilon
    # A jump between two methods may leave a gap, but then less noise is too little.
    assert cost >= 0.99 * epsilon or upper_bound([DpSgd(noise * 0.99, rate, steps)], delta) > epsilon


@given(epsilon=st.floats(0.01, 100), delta=st.floats(1e-12, 0.1), releases=st.integers(1, 50))
def test_calibrated_rho_is_safe_and_tight(epsilon: float, delta: float, releases: int) -> None:
    rho = calibrate_rho(epsilon=epsilon, delta=delta, releases=releases)
    assert 0.99 * epsilon <= price([ZCdp(rho)] * releases, delta).high <= epsilon


def test_rounds_cost_what_was_calibrated() -> None:
    noise = calibrate_noise_multiplier(epsilon=3, delta=DELTA, sampling_rate=0.1, steps=60)
    rounds = [DpSgd(noise, 0.1, 20)] * 3
    assert price(rounds, DELTA) == price([DpSgd(noise, 0.1, 60)], DELTA)


def test_no_limit_needs_no_noise() -> None:
    assert calibrate_noise_multiplier(epsilon=math.inf, delta=DELTA, sampling_rate=0.1, steps=10) == 0.0
    assert calibrate_rho(epsilon=math.inf, delta=DELTA, releases=3) == math.inf


def test_an_unreachable_budget_is_refused() -> None:
    with pytest.raises(BudgetError, match="raise epsilon or take fewer steps"):
        calibrate_noise_multiplier(epsilon=1e-9, delta=1e-12, sampling_rate=1.0, steps=10_000)


@pytest.mark.parametrize("delta", [0, 1, -1, 2, math.nan])
def test_an_impossible_delta_is_refused(delta: float) -> None:
    with pytest.raises(InputError, match="delta"):
        price([ZCdp(1.0)], delta)
    with pytest.raises(InputError, match="delta"):
        calibrate_rho(epsilon=1, delta=delta, releases=1)
    with pytest.raises(InputError, match="delta"):
        calibrate_noise_multiplier(epsilon=1, delta=delta, sampling_rate=0.1, steps=1)


@pytest.mark.parametrize("epsilon", [0, -1, math.nan, -math.inf])
def test_an_impossible_epsilon_is_refused(epsilon: float) -> None:
    with pytest.raises(InputError, match="epsilon"):
        calibrate_rho(epsilon=epsilon, delta=DELTA, releases=1)
    with pytest.raises(InputError, match="epsilon"):
        calibrate_noise_multiplier(epsilon=epsilon, delta=DELTA, sampling_rate=0.1, steps=1)


@pytest.mark.parametrize(("rate", "steps"), [(0, 1), (1.5, 1), (math.nan, 1), (0.1, 0), (0.1, -3)])
def test_an_impossible_training_is_not_calibrated(rate: float, steps: int) -> None:
    with pytest.raises(InputError, match="cannot calibrate"):
        calibrate_noise_multiplier(epsilon=1, delta=DELTA, sampling_rate=rate, steps=steps)


def test_no_releases_are_not_calibrated() -> None:
    with pytest.raises(InputError, match="releases=0"):
        calibrate_rho(epsilon=1, delta=DELTA, releases=0)


@pytest.mark.parametrize(
    "event",
    [
        DpSgd(-1.0, 0.1, 1),
        DpSgd(math.nan, 0.1, 1),
        DpSgd(1.0, 1.1, 1),
        DpSgd(1.0, -0.1, 1),
        DpSgd(1.0, math.nan, 1),
        DpSgd(1.0, 0.1, -1),
        DpSgd(1.0, 0.1, 2.5),  # type: ignore[arg-type]
        ZCdp(-1.0),
        ZCdp(math.nan),
        "free lunch",
        None,
    ],
    ids=str,
)
def test_an_impossible_event_is_refused(event: PrivacyEvent) -> None:
    with pytest.raises(InputError):
        price([event], DELTA)


@pytest.mark.parametrize(
    "events",
    [
        [],
        [PostProcessing("answers")],
        [DpSgd(1.0, 0.0, 100)],
        [DpSgd(1.0, 0.5, 0)],
        [DpSgd(math.inf, 1.0, 5)],
        [ZCdp(0.0)],
    ],
    ids=str,
)
def test_what_touches_nothing_is_free(events: list[PrivacyEvent]) -> None:
    bound = price(events, DELTA)
    assert (bound.low, bound.estimate, bound.high) == (0, 0, 0)


@pytest.mark.parametrize(
    "event", [NoPrivacy("no noise"), ZCdp(math.inf), DpSgd(0.0, 0.1, 1), DpSgd(0.0, 1.0, 1)], ids=str
)
def test_no_guarantee_is_infinite_whatever_else_happened(event: PrivacyEvent) -> None:
    bound = price([DpSgd(1.0, 0.1, 10), event, ZCdp(0.1)], DELTA)
    assert bound.low == bound.estimate == bound.high == math.inf


def test_post_processing_adds_nothing() -> None:
    event = DpSgd(1.2, 0.1, 60)
    assert price([event, PostProcessing("answers")], DELTA) == price([event], DELTA)


def test_mixed_events_cost_more_than_each_and_no_more_than_their_sum() -> None:
    sgd, release = DpSgd(1.2, 0.1, 60), ZCdp(3 / 128)
    mixed = price([sgd, release], DELTA)
    apart = [price([event], DELTA).high for event in (sgd, release)]
    assert max(apart) < mixed.high
    # Basic composition, with delta split evenly, is sound and looser.
    assert mixed.high < sum(price([event], DELTA / 2).high for event in (sgd, release))
    assert mixed.method == "Renyi"
    assert mixed.low == pytest.approx(4.07, abs=0.02)  # the same with Gaussian releases of 8 sigma


def test_gaussians_beside_sampled_steps_use_the_tight_method() -> None:
    bound = price([DpSgd(1.2, 0.1, 60), DpSgd(8.0, 1.0, 3)], DELTA)
    assert bound.estimate == pytest.approx(4.09, abs=0.01)
    assert bound.method == "privacy loss distribution"


@pytest.mark.parametrize("noise", [1e-300, 1e-6, 0.01, 0.2, 1e200])
@pytest.mark.parametrize("rate", [1e-300, 0.3, 1 - 2**-53, 1.0])
def test_extreme_events_are_priced(noise: float, rate: float) -> None:
    bound = price([DpSgd(noise, rate, 10)], DELTA)
    assert 0 <= bound.low <= bound.estimate <= bound.high
    assert bound.low <= price([DpSgd(noise, 1.0, 10)], DELTA).high


def test_strong_events_stay_finite_and_ordered() -> None:
    costs = [upper_bound([DpSgd(noise, 0.01, 1000)], DELTA) for noise in (0.2, 0.1, 0.05, 0.02, 0.005)]
    assert all(math.isfinite(cost) for cost in costs)
    assert all(less < more for less, more in pairwise(costs))


def test_twenty_kinds_of_steps_compose() -> None:
    cost = upper_bound([DpSgd(1 + i / 10, 0.01, 50) for i in range(20)], DELTA)
    assert upper_bound([DpSgd(2.9, 0.01, 1000)], DELTA) < cost < upper_bound([DpSgd(1.0, 0.01, 1000)], DELTA)


def test_steps_without_number_are_priced() -> None:
    weak, strong = (price([DpSgd(noise, 0.3, 10**9)], DELTA) for noise in (1e4, 1.0))
    assert weak.high < strong.high < math.inf


@settings(max_examples=8, deadline=None)
@given(run=runs, more=st.floats(1.01, 3))
def test_price_is_monotone(run: DpSgd, more: float) -> None:
    cost = upper_bound([run], DELTA)
    grid = 1 + 1e-3  # two prices may use two grids

    def costs_more(other: DpSgd) -> bool:
        return cost <= upper_bound([other], DELTA) * grid

    assert costs_more(DpSgd(run.noise_multiplier / more, run.sampling_rate, run.steps))
    assert costs_more(DpSgd(run.noise_multiplier, min(1.0, run.sampling_rate * more), run.steps))
    assert costs_more(DpSgd(run.noise_multiplier, run.sampling_rate, math.ceil(run.steps * more)))
    assert cost <= upper_bound([run], DELTA / more) * grid


@settings(max_examples=8, deadline=None)
@given(
    events=st.lists(st.one_of(runs, st.builds(ZCdp, st.floats(0, 1)), st.builds(PostProcessing, st.text()))),
    data=st.data(),
)
def test_order_and_grouping_do_not_matter(events: list[PrivacyEvent], data: st.DataObject) -> None:
    events = events[:3]
    shuffled = data.draw(st.permutations(events))
    split = [part for event in shuffled for part in split_steps(event)]
    assert price(events, DELTA) == price(split, DELTA)


def split_steps(event: PrivacyEvent) -> list[PrivacyEvent]:
    if not isinstance(event, DpSgd) or event.steps < 2:
        return [event]
    half = event.steps // 2
    return [DpSgd(event.noise_multiplier, event.sampling_rate, n) for n in (half, event.steps - half)]


@settings(max_examples=6, deadline=None)
@given(events=st.lists(runs, min_size=1, max_size=2), rho=st.floats(1e-4, 1))
def test_adding_a_charge_never_lowers_the_price(events: list[DpSgd], rho: float) -> None:
    more: list[PrivacyEvent] = [*events, ZCdp(rho)]
    assert upper_bound(events, DELTA) <= upper_bound(more, DELTA) * (1 + 1e-3)


def test_a_bound_is_ordered() -> None:
    with pytest.raises(ValueError, match="not a bound"):
        Bound(2.0, 1.0, 3.0)


def test_a_limit_never_prices_below_the_truth() -> None:
    weak = price([DpSgd(1e7, 0.5, 3), DpSgd(1e8, 0.5, 4)], DELTA)
    assert weak == price([DpSgd(1e8, 0.5, 4), DpSgd(1e7, 0.5, 3)], DELTA)
    assert weak.low == 0 < price([DpSgd(1e7, 0.5, 7)], 1e-9).high


def test_the_library_does_not_chatter(capfd: pytest.CaptureFixture[str]) -> None:
    price([DpSgd(0.31, 0.051, 100), ZCdp(0.1)], DELTA)
    assert capfd.readouterr().err == ""
