"""A plan keeps its budgets over all rounds together, and depends on public constants alone."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_ndtr

from privkd.config import Config, load_config
from privkd.errors import BudgetError, ConfigError
from privkd.plan import PublicFacts, budgets, make_plan
from privkd.privacy.accounting import price
from privkd.privacy.events import DpSgd, NoPrivacy, Unit, ZCdp
from privkd.privacy.joint import Persons
from privkd.privacy.ledger import Charge, Ledger

FACTS = PublicFacts(devices=5, records_per_device=140, proxy=360, classes=10)


def config(**changes: Any) -> Config:
    given_as = {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(None, (), given_as)


def dp(epsilon: float, rounds: int, rate: float, **more: Any) -> Config:
    return config(
        privacy__epsilon=epsilon,
        rounds=rounds,
        student__dp__sampling_rate=rate,
        student__dp__steps=10,
        **more,
    )


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Balle and Wang 2018, Theorem 8, written anew: delta of mu-Gaussian differential privacy."""
    return math.exp(log_ndtr(-epsilon / mu + mu / 2)) - math.exp(epsilon + log_ndtr(-epsilon / mu - mu / 2))


class TestRecordBudget:
    @pytest.mark.parametrize("epsilon", [0.01, 0.5, 3.0, 100.0])
    @pytest.mark.parametrize("rounds", [1, 3, 10])
    @pytest.mark.parametrize("rate", [0.1, 1.0])
    def test_is_kept_over_all_rounds_and_used(self, epsilon: float, rounds: int, rate: float) -> None:
        plan = make_plan(dp(epsilon, rounds, rate), FACTS)
        assert plan.noise_multiplier > 0
        assert plan.training_event == DpSgd(plan.noise_multiplier, rate, 10)
        assert plan.training.high <= epsilon
        assert plan.training.high >= 0.98 * epsilon or plan.noise_multiplier <= 0.0101
        whole = price([plan.training_event] * rounds, plan.delta)
        assert plan.training == whole, "what is stated is the price of all rounds, not of one"

    @pytest.mark.parametrize("epsilon", [0.01, 1.0, 3.0, 100.0])
    @pytest.mark.parametrize("rounds", [1, 7])
    def test_by_the_closed_form_where_there_is_no_sampling(self, epsilon: float, rounds: int) -> None:
        """All steps are one Gaussian of mu = sqrt(steps) / noise multiplier: a second accountant."""
        plan = make_plan(dp(epsilon, rounds, 1.0), FACTS)
        mu = math.sqrt(10 * rounds) / plan.noise_multiplier
        assert gaussian_delta(epsilon, mu) <= 1e-5 * (1 + 1e-6)
        assert gaussian_delta(0.98 * epsilon, mu) > 1e-5, "no more noise than it takes"

    def test_noise_grows_with_the_rounds(self) -> None:
        multipliers = [make_plan(dp(3.0, rounds, 1.0), FACTS).noise_multiplier for rounds in (1, 2, 4, 9)]
        for rounds, multiplier in zip((1, 2, 4, 9), multipliers, strict=True):
            assert multiplier == pytest.approx(math.sqrt(rounds) * multipliers[0], rel=5e-3)

    def test_noise_shrinks_with_the_sampling_rate(self) -> None:
        multipliers = [make_plan(dp(3.0, 2, rate), FACTS).noise_multiplier for rate in (0.05, 0.3, 1.0)]
        assert multipliers == sorted(multipliers)

    @pytest.mark.parametrize("delta", [1e-12, 1e-5, 0.1])
    def test_delta(self, delta: float) -> None:
        plan = make_plan(dp(1.0, 3, 1.0, privacy__delta=delta, privacy__allow_large_delta=True), FACTS)
        assert plan.delta == delta
        assert plan.training.high <= 1.0

    def test_infinite_epsilon_is_no_dp_and_says_so(self) -> None:
        plan = make_plan(dp(math.inf, 3, 1.0), FACTS)
        assert plan.noise_multiplier == 0.0
        assert isinstance(plan.training_event, NoPrivacy)
        assert "epsilon was set to inf" in plan.training_event.reason
        assert plan.training.high == math.inf

    def test_a_hopeless_budget_is_refused(self) -> None:
        with pytest.raises(BudgetError, match="raise epsilon or take fewer steps"):
            make_plan(config(privacy__epsilon=1e-12, student__dp__steps=10**6, rounds=1000), FACTS)

    @given(
        epsilon=st.floats(0.01, 100), rounds=st.integers(1, 50), steps=st.integers(1, 200),
        delta=st.floats(1e-9, 1e-2),
    )  # fmt: skip
    @settings(max_examples=50)
    def test_the_ledger_lets_the_whole_plan_through_and_not_a_round_more(
        self, epsilon: float, rounds: int, steps: int, delta: float
    ) -> None:
        chosen = config(
            privacy__epsilon=epsilon, privacy__delta=delta, rounds=rounds, student__dp__steps=steps,
            student__dp__sampling_rate=1.0,
        )  # fmt: skip
        plan = make_plan(chosen, FACTS)
        ledger = Ledger(None, budgets(chosen))
        for round in range(rounds):
            ledger.debit(Unit.RECORD, "device-0000", plan.training_event, round=round)
        assert ledger.spent(Unit.RECORD).high == pytest.approx(plan.training.high)
        assert ledger.spent(Unit.RECORD).high <= epsilon
        if plan.noise_multiplier > 0.0101 and rounds < 20:
            with pytest.raises(BudgetError):
                ledger.debit(Unit.RECORD, "device-0000", plan.training_event, round=rounds)


class TestDeviceBudget:
    @pytest.mark.parametrize("kind", ["noised", "secure"])
    @pytest.mark.parametrize("epsilon", [0.01, 1.0, 8.0, 100.0])
    @pytest.mark.parametrize("rounds", [1, 5])
    def test_is_kept_over_all_rounds_and_used(self, kind: str, epsilon: float, rounds: int) -> None:
        plan = make_plan(config(channel__kind=kind, privacy__device_epsilon=epsilon, rounds=rounds), FACTS)
        assert plan.rho is not None
        assert plan.device_event == ZCdp(plan.rho)
        assert plan.device == price([plan.device_event] * rounds, plan.delta)
        assert 0.98 * epsilon <= plan.device.high <= epsilon

    @pytest.mark.parametrize("kind", ["plain", "noised", "secure"])
    @pytest.mark.parametrize("epsilon", [None, math.inf])
    def test_none_is_infinite_with_the_reason(self, kind: str, epsilon: float | None) -> None:
        changes = {} if epsilon is None else {"privacy__device_epsilon": epsilon}
        plan = make_plan(config(channel__kind=kind, **changes), FACTS)
        assert plan.rho is None
        assert plan.device.high == math.inf
        assert isinstance(plan.device_event, NoPrivacy)
        assert "nois" in plan.device_event.reason

    def test_units_are_apart(self) -> None:
        """Noise on the channel leaves the record's price as it was, and the other way round."""
        alone = make_plan(config(privacy__epsilon=3.0), FACTS)
        noised = make_plan(config(privacy__epsilon=3.0, privacy__device_epsilon=1.0), FACTS)
        assert noised.training == alone.training
        assert noised.noise_multiplier == alone.noise_multiplier
        free = make_plan(config(privacy__epsilon=math.inf, privacy__device_epsilon=1.0), FACTS)
        assert free.device == noised.device

    def test_budgets_of_the_ledger(self) -> None:
        record, device = budgets(config(privacy__epsilon=2.0, privacy__delta=1e-6))
        assert (record.unit, record.epsilon, record.delta) == (Unit.RECORD, 2.0, 1e-6)
        assert (device.unit, device.epsilon, device.delta) == (Unit.DEVICE, math.inf, 1e-6)
        assert budgets(config(privacy__device_epsilon=4.0))[1].epsilon == 4.0

    def test_the_ledger_refuses_a_round_more(self) -> None:
        chosen = config(privacy__device_epsilon=1.0, rounds=3)
        plan, ledger = make_plan(chosen, FACTS), Ledger(None, budgets(chosen))
        for round in range(3):
            ledger.debit_all([Charge(Unit.DEVICE, "device-0000", plan.device_event, round)])
        with pytest.raises(BudgetError, match="unit device"):
            ledger.debit_all([Charge(Unit.DEVICE, "device-0000", plan.device_event, 3)])


class TestQueries:
    def test_all_of_the_proxy_set_where_they_are_free(self) -> None:
        plan = make_plan(config(), FACTS)
        assert plan.queries == 360

    def test_few_where_each_costs_noise(self) -> None:
        plan = make_plan(config(privacy__device_epsilon=3.0), FACTS)
        assert plan.queries < 360
        small = PublicFacts(devices=5, records_per_device=140, proxy=7, classes=10)
        assert make_plan(config(privacy__device_epsilon=3.0), small).queries == 7

    @pytest.mark.parametrize(
        ("channel", "std_of_one"),
        [
            ({"kind": "secure"}, math.sqrt(2) / 1000),
            ({"kind": "secure", "aggregators": 5, "row_clip": 0.5}, math.sqrt(5) / 2 / 1000),
            ({"kind": "secure", "dropout": 0.3, "minimum_devices": 700}, math.sqrt(2) / 700),
            ({"kind": "secure", "dropout": 0.2, "minimum_devices": 700}, math.sqrt(2) / 700),
            ({"kind": "secure", "dropout": 0.3, "minimum_devices": 700, "noise_from": "devices"}, 1 / 700),
            ({"kind": "noised", "dropout": 0.3}, 1 / math.sqrt(700)),
        ],
    )
    def test_as_many_as_leave_a_mean_clear_at_the_worst(
        self, channel: dict[str, Any], std_of_one: float
    ) -> None:
        """``std_of_one``: the noise on one query's mean over the fewest devices, per unit of sigma."""
        many = PublicFacts(devices=1000, records_per_device=50, proxy=10**6, classes=10)
        chosen = {f"channel__{name}": value for name, value in channel.items()}
        local = channel["kind"] == "noised"
        budget = 50.0 if local else 1.5
        plan = make_plan(config(privacy__device_epsilon=budget, data__devices=1000, **chosen), many)
        assert plan.rho is not None
        sigma = std_of_one / math.sqrt(2 * plan.rho)
        assert 100 < plan.queries < 1000
        assert sigma * math.sqrt(plan.queries) <= 0.17 < sigma * math.sqrt(plan.queries + 1)

    @pytest.mark.parametrize(("epsilon", "found"), [(0.01, 100), (1000.0, 1000)])
    def test_never_too_few_to_learn_from_nor_more_than_help(self, epsilon: float, found: int) -> None:
        many = PublicFacts(devices=250, records_per_device=50, proxy=10**6, classes=10)
        assert make_plan(config(privacy__device_epsilon=epsilon, data__devices=250), many).queries == found

    @pytest.mark.parametrize(("wish", "found"), [(1, 1), (50, 50), (360, 360), (10**9, 360)])
    def test_as_set_but_never_more_than_there_are(self, wish: int, found: int) -> None:
        for more in ({}, {"privacy__device_epsilon": 3.0}):
            plan = make_plan(config(reverse__queries=wish, **more), FACTS)
            assert plan.queries == found
            assert plan.upload_bytes == found * 10 * 4
            assert plan.clip_norm == pytest.approx(config().channel.row_clip * math.sqrt(found))

    def test_a_consensus_is_of_the_fewest_devices_that_a_release_takes(self) -> None:
        chosen = {"channel__aggregation": "votes", "data__devices": 10, "privacy__device_epsilon": 8.0}
        for more, found in (
            ({}, 6),
            ({"channel__minimum_devices": 8}, 5),
            ({"channel__minimum_devices": 5, "channel__dropout": 0.4}, 3),
        ):
            votes = make_plan(config(**chosen, **more), replace(FACTS, devices=10)).votes
            assert votes is not None
            assert votes.threshold == found

    def test_false_alarms_of_the_norm_check_stay_far_below_delta(self) -> None:
        """2^-40 a round: 10 rounds take a delta of 1000 times 9.1e-12 or more."""
        checked = {"channel__norm_projections": 64, "privacy__device_epsilon": 8.0, "rounds": 10}
        assert make_plan(config(privacy__delta=1e-8, **checked), FACTS).rho is not None
        with pytest.raises(ConfigError, match=r"privacy\.delta=9e-09: in 10 rounds.* 9\.1e-12.*raise delta"):
            make_plan(config(privacy__delta=9e-9, **checked), FACTS)
        for free in ({"channel__norm_projections": 0}, {"privacy__device_epsilon": None}):
            make_plan(config(privacy__delta=9e-9, **(checked | free)), FACTS)

    def test_an_empty_proxy_set_is_refused(self) -> None:
        empty = PublicFacts(devices=5, records_per_device=140, proxy=0, classes=10)
        with pytest.raises(ConfigError, match=r"proxy set is empty.*data\.proxy_records"):
            make_plan(config(), empty)


class TestPublicConstants:
    @pytest.mark.parametrize("rate", [0.05, 1.0])
    def test_the_normaliser_is_rate_times_the_nominal_shard(self, rate: float) -> None:
        plan = make_plan(config(student__dp__sampling_rate=rate), FACTS)
        assert plan.expected_batch_size == pytest.approx(rate * 140)

    def test_a_plan_sees_no_records(self) -> None:
        """Its arguments are settings, public sizes and words: no tensor can reach it."""
        assert set(inspect.signature(make_plan).parameters) == {"config", "facts"}
        assert {f.type for f in PublicFacts.__dataclass_fields__.values()} <= {
            int,
            tuple[str, ...],
            Mapping[str, str],
            Persons | None,
        }, "sizes and words"
        assert {f.type for f in fields(Persons)} == {int}
