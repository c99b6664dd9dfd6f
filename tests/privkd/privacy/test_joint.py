"""What several units of one owner get together: against closed forms and an oracle that shares no code."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binom, norm

from privkd.errors import InputError
from privkd.privacy.accounting import group_upper_bound, replaced_upper_bound, upper_bound
from privkd.privacy.events import DpSgd, NoPrivacy, PrivacyEvent, Unit, ZCdp
from privkd.privacy.joint import Joint, Spent

DELTA = 1e-5


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Of mu-Gaussian differential privacy (Balle and Wang 2018, Theorem 8)."""

    def excess(epsilon: float) -> float:
        second = math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))
        return float(norm.cdf(mu / 2 - epsilon / mu)) - second - delta

    return float(brentq(excess, 0.0, 50 * mu + mu**2, xtol=1e-12))


@pytest.mark.parametrize("members", [1, 2, 5, 10, 40])
@pytest.mark.parametrize(("noise", "steps"), [(4.4, 30), (20.0, 30), (1.3, 1)])
def test_full_batches_move_by_as_many_clip_norms(noise: float, steps: int, members: int) -> None:
    mu = members * math.sqrt(steps) / noise
    found = group_upper_bound([DpSgd(noise, 1.0, steps)], DELTA, members)
    assert found == pytest.approx(gaussian_epsilon(mu, DELTA), rel=1e-6)


@pytest.mark.parametrize("members", [2, 5])
def test_of_zcdp_rho_grows_with_the_square(members: int) -> None:
    together = group_upper_bound([ZCdp(0.01)], DELTA, members)
    assert together <= upper_bound([ZCdp(0.01 * members**2)], DELTA) * (1 + 1e-9)


def divergences(noise: float, rate: float, members: int, steps: int, epsilon: float) -> tuple[float, float]:
    """Between what the delta of the composed mixtures lies at ``epsilon``, all removed or all added.

    Each step's loss is put into bins, rounded down and up, and the steps are convolved.
    """
    chances = binom.pmf(np.arange(members + 1), members, rate)
    x = np.linspace(-12 * noise, members + 12 * noise, 400_001)
    mixed = sum(w * norm.pdf(x, i, noise) for i, w in enumerate(chances))
    plain = norm.pdf(x, 0, noise)
    found = []
    for top, below in ((mixed, plain), (plain, mixed)):
        mass = top * (x[1] - x[0])
        loss = np.log(np.maximum(top, 1e-300)) - np.log(np.maximum(below, 1e-300))
        found.append([_delta(loss, mass, steps, epsilon, round_) for round_ in (np.floor, np.ceil)])
    return max(low for low, _ in found), max(high for _, high in found)


def _delta(
    loss: NDArray[np.float64], mass: NDArray[np.float64], steps: int, epsilon: float, rounded: np.ufunc
) -> float:
    grid = 2e-4
    place = rounded(np.clip(loss, -15, 15) / grid).astype(np.int64)
    first = int(place.min())
    bins = np.bincount(place - first, weights=mass)
    size = 1 << int(np.ceil(np.log2(steps * len(bins))))
    whole = np.fft.irfft(np.fft.rfft(bins, size) ** steps, size)
    losses = (np.arange(size) + steps * first) * grid
    above = losses > epsilon
    return float((whole[above] * -np.expm1(epsilon - losses[above])).sum())


@pytest.mark.parametrize(
    ("noise", "rate", "members", "steps"), [(2.0, 0.3, 2, 1), (3.0, 0.1, 5, 4), (4.0, 0.2, 3, 6)]
)
def test_sampled_ones_move_by_those_in_the_batch(noise: float, rate: float, members: int, steps: int) -> None:
    delta = 1e-4
    found = group_upper_bound([DpSgd(noise, rate, steps)], delta, members)
    assert divergences(noise, rate, members, steps, found)[0] <= delta, "it claims too little"
    assert divergences(noise, rate, members, steps, 0.99 * found)[1] > delta, "it is loose"


noises, rates, step_counts = st.floats(0.8, 20), st.sampled_from([0.05, 0.3, 1.0]), st.integers(1, 60)


@settings(max_examples=12, deadline=None)
@given(noises, rates, step_counts)
def test_more_members_get_less_and_one_gets_what_a_unit_gets(noise: float, rate: float, steps: int) -> None:
    events = [DpSgd(noise, rate, steps)]
    costs = [group_upper_bound(events, DELTA, members) for members in (1, 2, 3, 6)]
    assert costs[0] == upper_bound(events, DELTA)
    assert all(fewer < more for fewer, more in pairwise(costs))
    assert costs[1] > 2 * costs[0] * (1 - 1e-3), "at one delta two units cost more than twice"


def test_a_group_never_costs_more_than_a_step_for_each_member() -> None:
    """Against the bound that holds of any mechanism, by hand for three members."""
    for event in (DpSgd(4.0, 0.1, 40), DpSgd(8.0, 1.0, 20), ZCdp(0.02)):
        each = [DELTA / 3 * math.exp(-shift) for shift in (1.0, 3.0, 6.0, 9.0)]
        epsilons = [upper_bound([event], delta) for delta in each]
        valid = [
            3 * e
            for e, d in zip(epsilons, each, strict=True)
            if d * (1 + math.exp(e) + math.exp(2 * e)) <= DELTA
        ]
        assert valid
        assert group_upper_bound([event], DELTA, 3) <= min(valid)


def test_a_unit_replaced_moves_by_two_clip_norms() -> None:
    full = [DpSgd(6.0, 1.0, 30)]
    assert replaced_upper_bound(full, DELTA) == group_upper_bound(full, DELTA, 2)
    sampled = [DpSgd(6.0, 0.2, 30)]
    assert replaced_upper_bound(sampled, DELTA) >= group_upper_bound(sampled, DELTA, 2)


def test_nobody_is_no_group() -> None:
    with pytest.raises(InputError, match="at least one"):
        group_upper_bound([ZCdp(0.1)], DELTA, 0)


class TestWhatIsSaid:
    TRAINING: tuple[PrivacyEvent, ...] = (DpSgd(10.0, 1.0, 10),) * 3
    RELEASES: tuple[PrivacyEvent, ...] = (ZCdp(0.05),) * 3

    def of(self, unit: Unit, most: int | None) -> tuple[Joint, ...]:
        return Spent(unit, self.TRAINING, self.RELEASES, DELTA, most).joints

    def test_of_records(self) -> None:
        found = {(j.unit, j.count, j.devices): j.epsilon for j in self.of(Unit.RECORD, None)}
        mu = math.sqrt(30) / 10
        for count in (2, 5, 10):
            expected = gaussian_epsilon(count * mu, DELTA)
            assert found.pop((Unit.RECORD, count, 1)) == pytest.approx(expected, rel=1e-6)
        on_two = gaussian_epsilon(math.sqrt(2) * mu, DELTA)
        assert found.pop((Unit.RECORD, 1, 2)) == pytest.approx(on_two, rel=1e-6)
        assert found.pop((Unit.DEVICE, 1, 2)) <= upper_bound([ZCdp(4 * 0.15)], DELTA) * (1 + 1e-9)
        assert not found

    @pytest.mark.parametrize(("most", "counts"), [(1, []), (2, [2]), (7, [2, 5, 7]), (30, [2, 5, 10, 30])])
    def test_a_known_bound_is_the_last_and_nobody_has_more(self, most: int, counts: list[int]) -> None:
        on_one = [j for j in self.of(Unit.RECORD, most) if j.unit is Unit.RECORD and j.devices == 1]
        assert [joint.count for joint in on_one] == counts

    def test_of_persons(self) -> None:
        record, two_devices, _ = self.of(Unit.PERSON, 7)
        assert record.words == "one record of a person whose others stay"
        assert record.epsilon == group_upper_bound(self.TRAINING, DELTA, 2)
        assert two_devices.words == "somebody with records on each of 2 devices"
        assert [joint.unit for joint in self.of(Unit.PERSON, 1)] == [Unit.PERSON, Unit.DEVICE]

    def test_what_has_no_guarantee_is_not_spoken_of(self) -> None:
        nothing = (NoPrivacy("none"),)
        assert Spent(Unit.RECORD, nothing, nothing, DELTA, None).joints == ()
