"""The whole loop: what the seed decides, what the ledger says, and what each setting leads to."""

import copy
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Trained, Watching, charges, figures, outcome, play, same, small, weights
from safetensors.torch import load_file

from privkd.channels.channel import NoisedChannel
from privkd.cloud import distil_public
from privkd.data import build_scenario
from privkd.errors import BudgetError, ConfigError, DataError, ModelError, TrainingError
from privkd.plan import facts_of, make_plan
from privkd.prepared import forecast, prepare
from privkd.privacy.events import DpSgd, NoPrivacy, PostProcessing, Unit, ZCdp
from privkd.privacy.ledger import Ledger


def plan_of(*overrides: str) -> Any:
    config = small(*overrides)
    return make_plan(config, facts_of(build_scenario(config.data, config.seed)))


class TestSeed:
    def test_equal_seeds_are_equal_bit_for_bit(self, tmp_path: Path) -> None:
        torch.manual_seed(1)
        play(tmp_path / "one", "controls=true")
        torch.manual_seed(2)
        play(tmp_path / "two", "controls=true")
        assert len(weights(tmp_path / "one")) == 3 + 2
        assert same(tmp_path / "one", tmp_path / "two")

    def test_and_other_seeds_are_not(self, tmp_path: Path) -> None:
        play(tmp_path / "one")
        play(tmp_path / "two", "seed=1")
        assert not same(tmp_path / "one", tmp_path / "two")

    def test_the_global_generator_is_left_alone(self, tmp_path: Path) -> None:
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        play(tmp_path / "run", "controls=true")
        assert torch.equal(torch.rand(4), expected)

    @pytest.mark.parametrize("epsilon", ["3", "inf"])
    def test_both_engines_compute_the_same(self, tmp_path: Path, epsilon: str) -> None:
        for engine in ("opacus", "cohort"):
            chosen = (f"student.engine={engine}", f"privacy.epsilon={epsilon}")
            play(tmp_path / engine, *chosen, "data.partition=dirichlet")
        for file in sorted((tmp_path / "opacus").rglob("*.safetensors")):
            one = load_file(file)
            other = load_file(tmp_path / "cohort" / file.relative_to(tmp_path / "opacus"))
            for name, tensor in one.items():
                torch.testing.assert_close(other[name], tensor, atol=1e-4, rtol=1e-4, msg=f"{file}: {name}")
        assert charges(tmp_path / "opacus") == charges(tmp_path / "cohort")

    def test_nobody_dreams_with_dropout(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A layer that draws from the global generator is seeded as well."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        (tmp_path / "dropping.py").write_text(
            "from torch import nn\n"
            "def factory(shape, classes):\n"
            "    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, classes))\n"
        )
        student = "student.models=['dropping:factory']"
        play(tmp_path / "one", student, "student.engine=opacus")
        play(tmp_path / "two", student, "student.engine=opacus")
        assert same(tmp_path / "one", tmp_path / "two")

    def test_the_first_round_takes_up_the_students_there_are(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Public distillation is the longest stage: once before the first round is enough."""
        calls = []

        def counted(*arguments: Any) -> torch.nn.Module:
            calls.append(arguments)
            return distil_public(*arguments)

        monkeypatch.setattr("privkd.cloud.distil_public", counted)
        play(tmp_path / "run", "rounds=2")
        assert len(calls) == 3, "one for each round, and the last to be delivered"


class TestLedger:
    def test_totals_are_the_plans_and_charges_one_for_each_device_and_round(self, tmp_path: Path) -> None:
        result = play(tmp_path / "run")
        plan = plan_of()
        assert result.statement(Unit.RECORD).high == plan.training.high <= 3.0
        assert result.statement(Unit.DEVICE).high == plan.device.high == math.inf
        ledger = Ledger.load(tmp_path / "run" / "ledger.jsonl")
        assert ledger.parties(Unit.RECORD) == ("device-0000", "device-0001", "device-0002")
        for device in ledger.parties(Unit.RECORD):
            events = ledger.events(Unit.RECORD, device)
            dp_sgd = [event for event in events if isinstance(event, DpSgd)]
            assert dp_sgd == [DpSgd(plan.noise_multiplier, 1.0, 3)] * 2
            assert sum(isinstance(event, PostProcessing) for event in events) == 2
            assert len(events) == 4
        kinds = Counter((c["unit"], c["event"]["kind"], c["round"]) for c in charges(tmp_path / "run"))
        assert set(kinds.values()) == {3}

    def test_every_debit_is_on_the_disk_before_its_release(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        watching = Watching(tmp_path / "run", monkeypatch)
        play(tmp_path / "run")
        assert [round for round, _ in watching.seen] == [0, 1]
        for round, booked in watching.seen:
            for unit, kind in (("record", "dp_sgd"), ("device", "no_privacy")):
                devices = [
                    c["party"] for c in booked
                    if (c["unit"], c["round"], c["event"]["kind"]) == (unit, round, kind)
                ]  # fmt: skip
                assert devices == ["device-0000", "device-0001", "device-0002"]

    def test_figures_tell_what_was_spent_so_far(self, tmp_path: Path) -> None:
        play(tmp_path / "run", "rounds=3")
        spent = [float(row["epsilon_record"]) for row in figures(tmp_path / "run")]
        assert spent[0] == 0.0
        assert spent == sorted(spent)
        assert len(set(spent)) == 4
        assert spent[-1] == plan_of("rounds=3").training.high

    def test_a_budget_that_would_be_overspent_stops_before_the_release(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Should the plan ever be wrong, the ledger still stands between it and the release."""
        watching = Watching(tmp_path / "run", monkeypatch)
        too_little = plan_of().noise_multiplier / 1.3
        monkeypatch.setattr("privkd.plan.calibrate_noise_multiplier", lambda **_: too_little)
        with pytest.raises(BudgetError, match=r"would spend epsilon .* of 3 on unit record"):
            play(tmp_path / "run")
        assert len(watching.seen) == 1, "the first round was still within the budget"

    def test_the_channel_says_what_it_costs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A channel that forgot its noise is booked as having none, whatever the plan had wished."""
        monkeypatch.setattr(NoisedChannel, "event", property(lambda self: NoPrivacy("forgot")))
        with pytest.raises(BudgetError, match=r"would spend epsilon inf of 8 on unit device"):
            play(tmp_path / "run", "channel.kind=noised", "privacy.device_epsilon=8")


class TestDeviceBudget:
    def test_noised(self, tmp_path: Path) -> None:
        noised = ("channel.kind=noised", "privacy.device_epsilon=8", "reverse.queries=10")
        result, plan = play(tmp_path / "run", *noised), plan_of(*noised)
        assert result.statement(Unit.DEVICE).high == plan.device.high <= 8.0
        assert result.statement(Unit.RECORD).high == plan.training.high, (
            "channel noise buys the records nothing"
        )
        ledger = Ledger.load(tmp_path / "run" / "ledger.jsonl")
        assert ledger.events(Unit.DEVICE, "device-0001") == (ZCdp(plan.rho), ZCdp(plan.rho))
        wire = load_file(tmp_path / "run" / "rounds" / "001" / "wire.safetensors")
        assert wire["answers"].shape == (3, 10, 10)
        sigma = plan.clip_norm / math.sqrt(2 * plan.rho)
        assert float(wire["noise_std"]) == pytest.approx(sigma, rel=1e-4)
        # 300 draws: their deviation is off by 4 % (one sigma), and 2/3 or 3/2 of it would be seen.
        spread = float((wire["answers"] - 0.1).std())
        assert sigma * 0.8 < spread < sigma * 1.25

    @pytest.mark.parametrize(("kind", "reason"), [("plain", "sees each device"), ("noised", "adds no noise")])
    def test_none_is_infinite_and_says_why(self, tmp_path: Path, kind: str, reason: str) -> None:
        result = play(tmp_path / "run", f"channel.kind={kind}", "rounds=1")
        (device,) = [row for row in result.ledger if row.unit is Unit.DEVICE]
        assert device.epsilon.high == math.inf
        assert reason in device.reasons[0]


def silent_in(path: Path) -> list[set[str]]:
    """Who of five devices contributed to no release, by round."""
    names = {f"device-{number:04d}" for number in range(5)}
    lines = [json.loads(line)["record"] for line in (path / "journal.jsonl").read_text().splitlines()]
    return [names - set(line["devices"]) for line in lines if line.get("round")]


class TestDropouts:
    CHOSEN = ("data.devices=5", "rounds=6", "student.engine=cohort")

    @pytest.mark.parametrize("kind", ["plain", "noised"])
    def test_the_seed_silences_the_same_number_in_each_round(self, tmp_path: Path, kind: str) -> None:
        chosen = (*self.CHOSEN, "channel.dropout=0.4", f"channel.kind={kind}")
        result = play(tmp_path / "run", *chosen)
        silent = silent_in(tmp_path / "run")
        assert [len(devices) for devices in silent] == [2] * 6
        assert len(set().union(*silent)) > 2, "others in other rounds"
        assert [figures.devices for figures in result.rounds] == [0] + [3] * 6
        for round in range(1, 7):
            wire = load_file(tmp_path / "run" / f"rounds/{round:03d}/wire.safetensors")
            assert len(wire["answers"]) == 3
        play(tmp_path / "again", *chosen)
        assert same(tmp_path / "run", tmp_path / "again")
        play(tmp_path / "other", *chosen, "seed=1")
        assert silent_in(tmp_path / "other") != silent

    def test_who_falls_silent_is_charged_too(self, tmp_path: Path) -> None:
        play(tmp_path / "run", *self.CHOSEN, "channel.dropout=0.4", "channel.kind=noised",
             "privacy.device_epsilon=8")  # fmt: skip
        booked = Counter((c["unit"], c["party"], c["round"]) for c in charges(tmp_path / "run"))
        assert sum(unit == "device" for unit, _, _ in booked) == 5 * 6

    def test_silence_does_not_depend_on_the_records(self, tmp_path: Path) -> None:
        play(tmp_path / "one", *self.CHOSEN, "channel.dropout=0.4")
        play(tmp_path / "two", *self.CHOSEN, "channel.dropout=0.4", "data.partition=dirichlet")
        assert silent_in(tmp_path / "one") == silent_in(tmp_path / "two")

    def test_the_devices_that_stay_answer_as_they_would(self, tmp_path: Path) -> None:
        """One round, so that the silence of others has changed nothing before."""
        for name, share in (("all", 0), ("few", 0.4)):
            play(tmp_path / name, *self.CHOSEN, "rounds=1", f"channel.dropout={share}")
        silent = silent_in(tmp_path / "few")[0]
        stay = [number for number in range(5) if f"device-{number:04d}" not in silent]
        everyone, few = (
            load_file(tmp_path / name / "rounds/001/wire.safetensors")["answers"] for name in ("all", "few")
        )
        torch.testing.assert_close(few, everyone[stay], atol=1e-6, rtol=1e-5)

    @pytest.mark.slow
    def test_over_the_secure_channel_the_sum_is_over_those_who_stay(self, tmp_path: Path) -> None:
        chosen = (*self.CHOSEN, "rounds=1", "channel.dropout=0.4")
        play(tmp_path / "plain", *chosen)
        result = play(tmp_path / "secure", *chosen, "channel.kind=secure", "channel.minimum_devices=2")
        assert result.rounds[-1].devices == 3
        assert silent_in(tmp_path / "secure") == silent_in(tmp_path / "plain")
        each, mean = (
            load_file(tmp_path / kind / "rounds/001/wire.safetensors")["answers"]
            for kind in ("plain", "secure")
        )
        torch.testing.assert_close(mean, each.mean(0), atol=1e-4, rtol=0)

    def test_too_many_leave_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"set channel\.minimum_devices=3, or lower channel\.dropout"):
            play(tmp_path / "run", *self.CHOSEN, "channel.kind=secure", "channel.dropout=0.4")
        assert not (tmp_path / "run").exists()


class TestSettings:
    @pytest.mark.parametrize("answers", ["votes", "residuals", "probabilities"])
    def test_answers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: str) -> None:
        watching = Watching(tmp_path / "run", monkeypatch)
        play(tmp_path / "run", f"channel.answers={answers}", "rounds=1")
        (sent,) = watching.answers
        wire = load_file(tmp_path / "run" / "rounds" / "001" / "wire.safetensors")
        baseline = wire["baseline"]
        if answers == "votes":
            assert set(sent.unique().tolist()) == {0.0, 1.0}
        if answers == "residuals":
            torch.testing.assert_close(sent.sum(-1), torch.zeros(sent.shape[:2]), atol=1e-5, rtol=0)
            torch.testing.assert_close(baseline.sum(-1), torch.ones(len(baseline)))
        else:
            assert float(baseline.abs().sum()) == 0
        mean = wire["answers"].mean(0) + baseline
        torch.testing.assert_close(mean.sum(-1), torch.ones(len(mean)), atol=1e-4, rtol=0)

    def test_no_dp(self, tmp_path: Path) -> None:
        result = play(tmp_path / "run", "privacy.epsilon=inf", "controls=true")
        assert result.statement(Unit.RECORD).high == math.inf
        (record,) = [row for row in result.ledger if row.unit is Unit.RECORD]
        assert "without DP" in record.reasons[0]
        assert result.student.direct is not None
        assert result.student.direct_private is None
        assert outcome(tmp_path / "run")["ledger"]["record"]["epsilon"] == "inf"

    @pytest.mark.parametrize("epsilon", ["0.01", "100"])
    def test_extreme_budgets(self, tmp_path: Path, epsilon: str) -> None:
        result = play(tmp_path / "run", f"privacy.epsilon={epsilon}", "student.dp.learning_rate=0.1")
        assert 0.98 * float(epsilon) <= result.statement(Unit.RECORD).high <= float(epsilon)

    def test_different_students_on_different_devices(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        models = "student.models=[{name='mlp', width=8}, {name='cnn', width=4}]"
        trained = Trained(monkeypatch)
        for engine in ("cohort", "opacus"):
            play(tmp_path / engine, models, "rounds=1", f"student.engine={engine}")
        assert ["block3.1.weight" in student for student in trained.rounds[0]] == [False, True, False]
        torch.testing.assert_close(trained.values(0), trained.values(1), atol=1e-4, rtol=1e-4)

    def test_more_architectures_than_devices(self, tmp_path: Path) -> None:
        models = "student.models=[{name='mlp', width=8}, 'resnet']"
        play(tmp_path / "run", "data.devices=1", models, "rounds=1")

    def test_own_students_go_on_where_they_stopped(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With a vanishing learning rate nothing moves, so round two must start from round one's end."""
        still = ("student.dp.learning_rate=1e-12", "student.dp.momentum=0", "rounds=3")
        trained = Trained(monkeypatch)
        play(tmp_path / "own", "student.start=own", *still)
        play(tmp_path / "teacher", "student.start=teacher", *still)
        torch.testing.assert_close(trained.values(2), trained.values(0), atol=1e-6, rtol=0)
        assert float((trained.values(5) - trained.values(3)).abs().max()) > 1e-4

    def test_part_of_the_student(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Trained in the head alone, all devices share the body bit for bit."""
        trained = Trained(monkeypatch)
        play(tmp_path / "run", "student.dp.part=head", "rounds=1")
        one, two, _ = trained.rounds[0]
        for name in ("block1.1.weight", "block2.0.weight"):
            assert torch.equal(one[name], two[name])
        assert not torch.equal(one["head.weight"], two["head.weight"])

    def test_one_device_with_one_record(self, tmp_path: Path) -> None:
        tiny = ("data.devices=1", "data.records_per_device=1", "data.device_test_records=0")
        play(tmp_path / "run", *tiny, "controls=true")
        assert outcome(tmp_path / "run")["student"]["personal"] is None

    @pytest.mark.parametrize("engine", ["opacus", "cohort"])
    @pytest.mark.parametrize("epsilon", ["3", "inf"])
    def test_empty_shards(self, tmp_path: Path, engine: str, epsilon: str) -> None:
        """A device without records takes part like the others, and is charged like them."""
        uneven = (
            "data.partition=dirichlet", "data.dirichlet_alpha=0.001", "data.devices=15",
            "data.records_per_device=10",
        )  # fmt: skip
        config = small(*uneven)
        sizes = [len(device.train) for device in build_scenario(config.data, config.seed).devices]
        assert 0 in sizes
        play(tmp_path / "run", *uneven, f"student.engine={engine}", f"privacy.epsilon={epsilon}",
             "rounds=1", "controls=true")  # fmt: skip
        parties = Counter(c["party"] for c in charges(tmp_path / "run") if c["unit"] == "record")
        assert len(parties) == 15
        assert len(set(parties.values())) == 1

    @pytest.mark.parametrize("gap", ["withheld", "style", "none"])
    def test_gaps(self, tmp_path: Path, gap: str) -> None:
        play(tmp_path / "run", f"data.gap={gap}", "rounds=1")

    def test_one_class_a_device(self, tmp_path: Path) -> None:
        apart = ("data.partition=classes", "data.classes_per_device=1", "data.records_per_device=20")
        play(tmp_path / "run", *apart, "rounds=1")

    def test_random_queries_are_the_seeds(self, tmp_path: Path) -> None:
        random = ("reverse.selection=random", "reverse.queries=7")
        play(tmp_path / "run", *random)
        wires = [tmp_path / "run" / "rounds" / f"00{round}" / "wire.safetensors" for round in (1, 2)]
        asked = [load_file(wire)["queries"] for wire in wires]
        assert all(len(queries) == 7 for queries in asked)
        assert asked[0].tolist() != asked[1].tolist()

    def test_direct_training_takes_the_steps_of_all_rounds(self, tmp_path: Path) -> None:
        """A student of three rounds is compared with one that was trained directly for as long."""

        def direct(rounds: int, steps: int) -> float | None:
            settings = (f"rounds={rounds}", f"student.private_fit.steps={steps}", "controls=true")
            return play(tmp_path / f"{rounds}-{steps}", *settings).student.direct

        assert direct(3, 4) == direct(1, 12) != direct(1, 4)

    def test_without_controls(self, tmp_path: Path) -> None:
        result = play(tmp_path / "run")
        assert result.student.direct is None
        assert result.student.direct_private is None
        assert not math.isnan(result.teacher.control), "the control of the teacher belongs to the loop"


class TestRefusals:
    """Before anything is trained or spent."""

    @pytest.mark.parametrize(
        ("override", "kind", "expected"),
        [
            ("data.proxy_records=0", ConfigError, "proxy set is empty"),
            ("data.devices=100000", DataError, "too few"),
            ("data.source=nowhere.npz", DataError, "nowhere.npz"),
            ("student.models=['mpl']", ConfigError, "expected one of auto, cnn, linear, mlp, resnet"),
            ("student.models=['no_such_module:f']", ModelError, "cannot be imported"),
            ("teacher.model=no_such_module:f", ModelError, "cannot be imported"),
            ("teacher.model=nonsense", ConfigError, "expected one of auto, cnn, linear, mlp, resnet"),
            ("data.classes_per_device=11", ConfigError, "classes_per_device=11"),
        ],
    )
    def test_bad_settings(self, override: str, kind: type[Exception], expected: str) -> None:
        more = ["data.partition=classes"] if "classes" in override else []
        with pytest.raises(kind, match=expected):
            prepare(small(override, *more))

    def test_no_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ConfigError, match="has no CUDA device; take cpu or auto"):
            prepare(small("device=cuda"))

    @pytest.mark.parametrize("place", ["teacher.fit", "student.public_fit", "reverse.fit"])
    def test_public_training_that_diverges(self, tmp_path: Path, place: str) -> None:
        """Adam steps by its learning rate, so it takes weight decay to leave float32."""
        with pytest.raises(TrainingError, match="diverged in training at learning rate 1e"):
            play(tmp_path / "run", f"{place}.learning_rate=1e9", f"{place}.weight_decay=1e9")

    @pytest.mark.parametrize("engine", ["opacus", "cohort"])
    @pytest.mark.parametrize("epsilon", ["3", "inf"])
    def test_private_training_that_diverges(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, epsilon: str
    ) -> None:
        """A student whose weights are not finite is named, before it answers anything."""

        def spoilt(models: Any, *_: Any, **__: Any) -> Any:
            each = [copy.deepcopy(model) for model in (models if isinstance(models, list) else [models])]
            torch.nn.init.constant_(each[-1].head.weight, math.nan)
            return each if isinstance(models, list) else each[0]

        for name in ("train_private", "train_cohort", "train_unprotected", "fit_cohort"):
            monkeypatch.setattr(f"privkd.engines.simulation.{name}", spoilt)
        watching = Watching(tmp_path / "run", monkeypatch)
        with pytest.raises(TrainingError, match=r"the student of device-000\d diverged in training at"):
            play(tmp_path / "run", f"student.engine={engine}", f"privacy.epsilon={epsilon}")
        assert watching.seen == []

    @pytest.mark.parametrize("engine", ["opacus", "cohort"])
    def test_under_a_device_budget_nobody_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
    ) -> None:
        """The neighbouring run, without that device's contribution, would go on: so must this one."""

        def spoilt(models: Any, *_: Any, **__: Any) -> Any:
            each = [copy.deepcopy(model) for model in (models if isinstance(models, list) else [models])]
            torch.nn.init.constant_(each[-1].head.weight, math.nan)
            return each if isinstance(models, list) else each[0]

        for name in ("train_private", "train_cohort"):
            monkeypatch.setattr(f"privkd.engines.simulation.{name}", spoilt)
        budget = ("channel.kind=noised", "privacy.device_epsilon=8", "privacy.noise=system")
        play(tmp_path / "run", f"student.engine={engine}", *budget)
        answers = load_file(tmp_path / "run" / "rounds" / "001" / "wire.safetensors")["answers"]
        assert bool(answers.isfinite().all())
        assert len(answers) == 3

    def test_a_forecast_touches_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        found = forecast(small())
        assert found.plan == plan_of()
        assert found.seconds > 0
        assert found.parameters == 64 * 8 + 8 + 8 * 4 + 4 + 4 * 10 + 10
        assert list(tmp_path.iterdir()) == []
