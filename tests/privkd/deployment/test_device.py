"""A device's program: it answers as the simulation does, once, and refuses what its owner did not allow."""

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from on_device import NAME, SECONDS, Box, Clouds, box, clouds
from torch import nn

from privkd.channels.channel import NoisedChannel, contributions
from privkd.data import build_scenario
from privkd.data.scenario import LabelledSet
from privkd.deployment.agreement import agree, show
from privkd.deployment.device import DeviceProgram
from privkd.deployment.device_state import DeviceState, Trained, read_ledger
from privkd.deployment.device_views import change_budget, ledger, status
from privkd.deployment.own_records import own_records
from privkd.deployment.owner import RecordsConfig
from privkd.deployment.published import PublishedPlan
from privkd.deployment.wire import ANSWER_BYTES, Reason, substance, unpack_answer
from privkd.device import Draws
from privkd.device import answer as simulated_answer
from privkd.errors import BudgetError, ConfigError, DataError, RunError
from privkd.privacy.events import DpSgd, PostProcessing, Unit, ZCdp
from privkd.privacy.noise import NoiseRoot
from privkd.privacy.randomness import SystemRandomness


@pytest.fixture(scope="module")
def cloud() -> Clouds:
    return clouds()


@pytest.fixture
def device(tmp_path: Path, cloud: Clouds) -> Iterator[Box]:
    made = box(tmp_path / "box", cloud)
    yield made
    made.stop()


def refusal(found: tuple[Any, bytes]) -> Reason | None:
    head, given = found
    assert not (head.refused and given)
    return head.refused


class TestAnswers:
    def test_as_the_simulation_does_under_the_same_root(self, device: Box, cloud: Clouds) -> None:
        """Bit for bit: the block, and what the channel makes of it."""
        head, given = device(cloud.ask())
        assert head.refused is None
        root = NoiseRoot(device.state.root.subkey("run", cloud.published.digest))
        task = cloud.tasks[0]
        draws = Draws(SystemRandomness(root, NAME, 0, substance(cloud.ask())), torch.Generator())
        expected = simulated_answer(task, 0, cloud.shard, draws)
        block = contributions(expected.block[None], [NAME], 0)[0]
        trained = device.state.last(Trained, cloud.published.digest)
        assert trained is not None
        np.testing.assert_array_equal(device.state.kept_round(trained)["block"].numpy(), block)
        channel = NoisedChannel(cloud.prepared.plan.clip_norm, cloud.prepared.plan.rho, root)
        assert given == channel.encode(task.question, block, NAME).payload

    def test_charges_before_and_once(self, device: Box, cloud: Clouds) -> None:
        first = device.raw(cloud.ask())
        assert device.raw(cloud.ask()) == first
        device.start()
        assert device.raw(cloud.ask()) == first
        charges = ledger(device.owner).charges
        plan = cloud.prepared.plan
        events = [plan.training_event, PostProcessing("a DP-SGD student's answers"), plan.device_event]
        assert [charge.event for charge in charges] == [str(event) for event in events]
        assert {charge.run for charge in charges} == {cloud.published.digest}

    def test_a_run_of_all_rounds_costs_what_the_plan_says(self, device: Box, cloud: Clouds) -> None:
        witness = None
        for round in range(cloud.prepared.plan.rounds):
            head, _ = device(cloud.ask(round, witness=witness))
            assert head.refused is None
            witness = head.ledger
        spent = {each.unit: each.epsilon for each in status(device.owner).spent}
        assert spent[Unit.RECORD] == pytest.approx(cloud.published.epsilon_record)
        assert spent[Unit.DEVICE] == pytest.approx(cloud.published.epsilon_device)
        kept = sorted(path.name for path in (device.owner.state / "runs").rglob("round-*"))
        assert kept == ["round-000001-0.upload", "round-000001.safetensors"]

    def test_another_run_meets_other_noise_and_pays_anew(self, tmp_path: Path, cloud: Clouds) -> None:
        """Same round, label and records: the run's name alone tells them apart."""
        other = clouds("reverse.trust=1.9")
        budget = {"epsilon": 6.0}
        device = box(tmp_path, cloud, budget=budget)
        agree(device.owner, other.write(tmp_path / "other"), other.published.digest)
        answers = [device(each.ask())[1] for each in (cloud, other)]
        assert answers[0] != answers[1]
        records = [charge for charge in ledger(device.owner).charges if charge.event.startswith("DpSgd")]
        assert len(records) == 2
        device.stop()

    @pytest.mark.parametrize("start", ["own", "teacher"])
    def test_its_own_student_goes_on_where_the_plan_says_so(self, tmp_path: Path, start: str) -> None:
        cloud = clouds(f"student.start={start}")
        device = box(tmp_path, cloud)
        assert refusal(device(cloud.ask(0))) is None
        before = device.state.last(Trained, cloud.published.digest)
        assert before is not None
        student = device.state.kept_round(before)
        device.start()
        bare = {k: v for k, v in cloud.tensors(0).items() if not k.startswith("start.")}
        asked = cloud.ask(1, tensors=bare if start == "own" else cloud.tensors(1))
        assert refusal(device(asked)) is None
        after = device.state.last(Trained, cloud.published.digest)
        assert after is not None
        moved = device.state.kept_round(after)
        root = device.state.run_root(cloud.published.digest)
        draws = Draws(SystemRandomness(root, NAME, 1, substance(asked)), torch.Generator())
        model = cloud.prepared.cloud.untrained_students()[0]
        model.load_state_dict({k.removeprefix("student."): v for k, v in student.items() if k != "block"})
        first = replace(cloud.tasks[0], question=replace(cloud.tasks[0].question, round=1))
        task = first if start == "own" else cloud.tasks[1]
        expected = simulated_answer(task, 0, cloud.shard, draws, model if start == "own" else None)
        for name, weight in expected.student.state_dict().items():
            assert moved[f"student.{name}"].equal(weight)
        device.stop()

    def test_a_training_that_diverges_answers_zeros_and_says_nothing(
        self, device: Box, cloud: Clouds, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def diverged(start: nn.Module, *_: Any) -> nn.Module:
            weights = {name: torch.full_like(each, torch.nan) for name, each in start.state_dict().items()}
            student = copy.deepcopy(start)
            student.load_state_dict(weights)
            return student

        monkeypatch.setattr("privkd.device.train_private", diverged)
        head, given = device(cloud.ask())
        assert (head.refused, len(given)) == (None, 20 * 10 * 8)
        trained = device.state.last(Trained, cloud.published.digest)
        assert trained is not None
        kept = device.state.kept_round(trained)
        assert kept["student.head.bias"].isnan().all()
        assert not kept["block"].any()


class TestRefuses:
    @pytest.mark.parametrize(
        ("head", "reason"),
        [
            ({"protocol": 2}, Reason.PROTOCOL),
            ({"device": "device-0001"}, Reason.PROTOCOL),
            ({"run": "ab" * 32}, Reason.NOT_AGREED),
            ({"witness": "ab" * 32}, Reason.WITNESS),
        ],
    )
    def test_another_head(self, device: Box, cloud: Clouds, head: dict[str, Any], reason: Reason) -> None:
        assert refusal(device(cloud.ask(**head))) is reason
        assert ledger(device.owner).charges == ()

    def test_a_round_beyond_the_plan_or_behind_the_last(self, device: Box, cloud: Clouds) -> None:
        assert refusal(device(cloud.ask(3, tensors=cloud.tensors(1)))) is Reason.ROUND_OVER
        assert refusal(device(cloud.ask(1))) is None
        assert refusal(device(cloud.ask(0))) is Reason.ROUND_OVER

    def test_other_content_under_the_same_round(self, device: Box, cloud: Clouds) -> None:
        assert refusal(device(cloud.ask())) is None
        moved = cloud.tensors(0)
        moved["start.head.bias"] = moved["start.head.bias"] + 1e-6
        assert refusal(device(cloud.ask(tensors=moved))) is Reason.CHANGED
        device.start()
        assert refusal(device(cloud.ask(tensors=moved))) is Reason.CHANGED

    @pytest.mark.parametrize(
        "change",
        [
            {"queries": lambda t: t.flip(0)},
            {"queries": lambda t: t[:-1]},
            {"queries": lambda t: t + 1000},
            {"queries": lambda t: t.to(torch.int32)},
            {"queries": lambda t: t - 1000},
            {"prior": lambda t: t * 2},
            {"prior": lambda t: t.double()},
            {"prior": lambda t: t * torch.nan},
            {"prior": lambda t: -t},
            {"start.head.weight": lambda t: t * torch.inf},
            {"start.head.weight": lambda t: t[:-1]},
            {"start.head.weight": lambda t: t.double()},
            {"start.head.weight": None},
            {"teacher.head.weight": None},
            {"start.more": lambda _: torch.zeros(1)},
            {"inputs": lambda _: torch.zeros(1)},
            {"student.head.weight": lambda _: torch.zeros(1)},
        ],
    )
    def test_another_question_than_the_plan_allows(
        self, device: Box, cloud: Clouds, change: dict[str, Any]
    ) -> None:
        tensors = cloud.tensors(0)
        for name, turn in change.items():
            if turn is None:
                del tensors[name]
            else:
                tensors[name] = turn(tensors.get(name))
        assert refusal(device(cloud.ask(tensors=tensors))) is Reason.QUESTION
        assert ledger(device.owner).charges == ()
        assert refusal(device(cloud.ask())) is None

    def test_terms_where_the_channel_has_none(self, device: Box, cloud: Clouds) -> None:
        assert refusal(device(cloud.ask(invitation=b"terms"))) is Reason.TERMS

    def test_what_the_budget_for_good_forbids_and_says_no_more(self, tmp_path: Path, cloud: Clouds) -> None:
        device = box(tmp_path, cloud, budget={"epsilon": 3.0, "device_epsilon": 8.0})
        assert refusal(device(cloud.ask(0))) is None
        spent = device.state.ledger
        spent.debit(Unit.RECORD, NAME, DpSgd(4.0, 1.0, 3), round=0, label="another run")
        head, _ = device(cloud.ask(1))
        assert head.refused is Reason.BUDGET
        assert head.ledger is None
        assert "epsilon" in device.log[-1]["words"]
        device.stop()

    def test_what_a_run_may_cost_at_most(self, tmp_path: Path, cloud: Clouds) -> None:
        device = box(tmp_path, cloud)
        device.owner = device.owner.model_copy(
            update={"bounds": device.owner.bounds.model_copy(update={"max_epsilon_per_run": 2.5})}
        )
        assert refusal(device(cloud.ask(0))) is None
        assert refusal(device(cloud.ask(1))) is Reason.BUDGET
        device.stop()

    def test_outside_of_its_hours_and_charges_nothing(self, tmp_path: Path, cloud: Clouds) -> None:
        device = box(tmp_path, cloud, hours={"start": "00:00", "end": "00:01"})
        device.clock = 1_000_000.0 + 43_200
        assert refusal(device(cloud.ask())) is Reason.LATER
        assert ledger(device.owner).charges == ()
        device.stop()

    def test_in_words_of_its_own_where_records_are_gone(self, device: Box, cloud: Clouds) -> None:
        (device.folder / "records.npz").unlink()
        assert refusal(device(cloud.ask())) is Reason.LATER
        assert str(device.folder) not in device.log[-1]["words"]

    def test_whatever_fails_without_a_traceback(
        self, device: Box, cloud: Clouds, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*_: Any) -> None:
            raise ZeroDivisionError("a record's value")

        monkeypatch.setattr(DeviceProgram, "_train", fails)
        assert refusal(device(cloud.ask())) is Reason.LATER
        assert "a record's value" not in str(device.log)


class TestState:
    def test_a_restored_ledger_is_refused(self, device: Box, cloud: Clouds) -> None:
        device(cloud.ask(0))
        old = (device.owner.state / "ledger.jsonl").read_bytes()
        device(cloud.ask(1))
        device.stop()
        (device.owner.state / "ledger.jsonl").write_bytes(old)
        with pytest.raises(RunError, match="lost charges"):
            device.start()

    def test_a_restored_state_is_found_out_by_the_witness(self, device: Box, cloud: Clouds) -> None:
        first, _ = device(cloud.ask(0))
        device.stop()
        shutil.copytree(device.owner.state, device.folder / "copy")
        second, _ = device(cloud.ask(1, witness=first.ledger))
        device.stop()
        shutil.rmtree(device.owner.state)
        shutil.copytree(device.folder / "copy", device.owner.state)
        assert refusal(device(cloud.ask(1, witness=second.ledger))) is Reason.WITNESS
        assert "old copy" in str(status(device.owner).alarm)
        assert refusal(device(cloud.ask(1, witness=first.ledger))) is None

    def test_a_restored_state_meets_other_noise_on_other_content(self, device: Box, cloud: Clouds) -> None:
        """Even for a cloud that shows no witness: the noise of a training is of the question too."""
        device.start()
        device.stop()
        shutil.copytree(device.owner.state, device.folder / "copy")
        drawn = []
        for moved in (0.0, 1e-6):
            shutil.rmtree(device.owner.state)
            shutil.copytree(device.folder / "copy", device.owner.state)
            tensors = cloud.tensors(0)
            tensors["start.head.bias"] = tensors["start.head.bias"] + moved
            assert refusal(device(cloud.ask(tensors=tensors))) is None
            trained = device.state.last(Trained, cloud.published.digest)
            assert trained is not None
            drawn.append(device.state.kept_round(trained)["student.head.weight"])
            device.stop()
        assert (drawn[0] - drawn[1]).abs().max() > 1e-2

    def test_the_witness_tells_two_clouds_nothing_in_common(self, device: Box, cloud: Clouds) -> None:
        device(cloud.ask())
        state = device.state
        assert state.witness("ab" * 32) != state.witness("cd" * 32)
        assert state.ledger.digests[-1] not in (state.witness("ab" * 32), state.witness("cd" * 32))

    def test_two_processes_are_refused(self, device: Box) -> None:
        device.start()
        with pytest.raises(RunError, match="in use"):
            DeviceState.open(device.owner)

    def test_a_lost_key_is_refused(self, device: Box, cloud: Clouds) -> None:
        device(cloud.ask())
        device.stop()
        (device.owner.state / "secrets" / "root.key").unlink()
        with pytest.raises(RunError, match=r"root\.key"):
            device.start()

    def test_it_is_its_users_alone(self, device: Box, cloud: Clouds) -> None:
        device(cloud.ask())
        device.stop()
        assert (device.owner.state / "secrets" / "root.key").stat().st_mode & 0o077 == 0
        assert device.owner.state.stat().st_mode & 0o077 == 0
        for path in (device.owner.state / "runs").rglob("round-*"):
            assert path.stat().st_mode & 0o077 == 0
        device.owner.state.chmod(0o755)
        with pytest.raises(RunError, match="chmod 700"):
            device.start()

    def test_a_name_is_for_good(self, device: Box) -> None:
        device.start()
        device.stop()
        device.owner = device.owner.model_copy(update={"name": "device-0001"})
        with pytest.raises(RunError, match="for good"):
            device.start()

    def test_a_budget_changes_by_a_deliberate_act_alone(self, device: Box, cloud: Clouds) -> None:
        device(cloud.ask())
        device.stop()
        more = device.owner.budget.model_copy(update={"epsilon": 9.0})
        device.owner = device.owner.model_copy(update={"budget": more})
        with pytest.raises(RunError, match="privkd device budget"):
            device.start()
        found = change_budget(device.owner, "a second study, agreed by the board")
        assert len(found.charges) == 3
        assert {row.unit: row.budget for row in found.statements}[Unit.RECORD] == 9.0
        assert refusal(device(cloud.ask(1))) is None
        text = (device.owner.state / "ledger.jsonl").read_text()
        assert "agreed by the board" in text

    def test_a_header_edited_by_hand_is_refused(self, device: Box, cloud: Clouds) -> None:
        device(cloud.ask())
        device.stop()
        path = device.owner.state / "ledger.jsonl"
        path.write_text(path.read_text().replace('"epsilon":3.0', '"epsilon":9.0', 1))
        with pytest.raises(RunError, match="line 1"):
            device.start()


class TestSaysNothing:
    def test_of_how_many_records_there_are(self, tmp_path: Path, cloud: Clouds) -> None:
        """Sizes, moments and refusals are the same for few and for many."""
        found = []
        for name, times in (("few", 1), ("many", 7)):
            shard = cloud.shard
            many = LabelledSet(shard.inputs.repeat(times, 1, 1, 1)[: 10 if name == "few" else 200],
                               shard.labels.repeat(times)[: 10 if name == "few" else 200])  # fmt: skip
            device = box(tmp_path / name, cloud, shard=many)
            device.start()
            begun = device.clock
            answer = device.raw(cloud.ask())
            found.append((len(answer), device.clock - begun, unpack_answer(answer)[0].refused))
            device.stop()
        assert found[0] == found[1]
        assert found[0] == (ANSWER_BYTES + 20 * 10 * 8, SECONDS, None)

    def test_of_when_it_was_done(self, device: Box, cloud: Clouds, monkeypatch: pytest.MonkeyPatch) -> None:
        """A slow training ends at a later whole multiple, and so does a repeat, even after a restart."""
        train = DeviceProgram._train

        def slow(self: DeviceProgram, *more: Any) -> Any:
            device.clock += 1.7 * SECONDS
            return train(self, *more)

        monkeypatch.setattr(DeviceProgram, "_train", slow)
        begun = device.clock
        device(cloud.ask())
        assert device.clock == pytest.approx(begun + 2 * SECONDS)
        device.clock += 0.4 * SECONDS
        device.start()
        device(cloud.ask())
        assert device.clock == pytest.approx(begun + 3 * SECONDS)

    def test_a_refusal_after_the_charge_waits_likewise(
        self, device: Box, cloud: Clouds, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            device.clock += 0.3
            raise RunError("no space left")

        monkeypatch.setattr(DeviceState, "write_bytes", full)
        begun = device.clock
        assert refusal(device(cloud.ask())) is Reason.LATER
        assert device.clock == begun + SECONDS

    def test_no_record_leaves(self, device: Box, cloud: Clouds) -> None:
        answer = device.raw(cloud.ask())
        raw = (cloud.shard.inputs[0] * 16).to(torch.uint8).numpy().tobytes()
        assert raw not in answer
        assert raw not in str(device.log).encode()


class TestAgreeing:
    def test_says_what_a_plan_costs(self, tmp_path: Path, cloud: Clouds) -> None:
        device = box(tmp_path, cloud, agreed=False)
        found = show(device.owner, cloud.write(tmp_path / "plan"))
        record, whole = found.costs
        assert record.epsilon == pytest.approx(cloud.published.epsilon_record)
        assert whole.epsilon == pytest.approx(cloud.published.epsilon_device)
        assert (record.before, record.budget, found.refused) == (0.0, 3.0, None)
        assert not device.owner.state.exists()

    def test_says_what_other_runs_cost_before(self, device: Box, cloud: Clouds) -> None:
        device(cloud.ask())
        other = clouds("reverse.trust=1.9")
        found = show(device.owner, other.write(device.folder / "other"))
        assert found.costs[0].before == pytest.approx(2.03, abs=0.01)
        assert "for good" in str(found.refused)
        again = agree(device.owner, device.folder / "plan", cloud.published.digest)
        assert again.costs[0].before == 0.0, "its own rounds are not counted twice"

    @pytest.mark.parametrize(
        ("bounds", "named"),
        [
            ({}, "minimum_devices"),
            ({"minimum_devices": 1, "max_rho": 0.1}, "max_rho"),
            ({"minimum_devices": 1, "max_steps": 2}, "max_steps"),
            ({"minimum_devices": 1, "max_queries": 19}, "max_queries"),
            ({"minimum_devices": 1, "max_rounds": 1}, "max_rounds"),
        ],
    )
    def test_refuses_what_lies_beyond_a_bound(
        self, tmp_path: Path, cloud: Clouds, bounds: dict[str, Any], named: str
    ) -> None:
        device = box(tmp_path, cloud, agreed=False, bounds=bounds)
        plan = cloud.write(tmp_path / "plan")
        assert named in str(show(device.owner, plan).refused)
        with pytest.raises(ConfigError, match=named):
            agree(device.owner, plan, cloud.published.digest)

    @pytest.mark.parametrize("owner", [
        {"budget": {"epsilon": 2.0}},
        {"bounds": {"minimum_devices": 1, "max_epsilon_per_run": 2.0}},
        {"bounds": {"minimum_devices": 1, "max_device_epsilon_per_run": 7.0}},
    ])  # fmt: skip
    def test_refuses_what_costs_too_much(self, tmp_path: Path, cloud: Clouds, owner: dict[str, Any]) -> None:
        device = box(tmp_path, cloud, agreed=False, **owner)
        with pytest.raises(BudgetError):
            agree(device.owner, cloud.write(tmp_path / "plan"), cloud.published.digest)

    def test_refuses_another_plan_than_was_named(self, tmp_path: Path, cloud: Clouds) -> None:
        device = box(tmp_path, cloud, agreed=False)
        with pytest.raises(RunError, match="what you were shown"):
            agree(device.owner, cloud.write(tmp_path / "plan"), "ab" * 32)

    def test_refuses_a_plan_that_lies(self, tmp_path: Path, cloud: Clouds) -> None:
        device = box(tmp_path, cloud, agreed=False)
        lying = cloud.published.model_copy(update={"noise_multiplier": 0.1})
        lying = PublishedPlan.model_validate(lying.tree())
        plan = replace(cloud, published=lying).write(tmp_path / "plan")
        with pytest.raises(RunError, match="noise_multiplier"):
            agree(device.owner, plan, lying.digest)

    def test_runs_no_code_that_the_owner_did_not_list(self, tmp_path: Path, cloud: Clouds) -> None:
        device = box(tmp_path, cloud, agreed=False)
        tree = cloud.published.tree()
        tree["settings"]["student"]["models"] = ["os:abort"]
        hostile = PublishedPlan.model_validate(tree)
        plan = replace(cloud, published=hostile).write(tmp_path / "plan")
        with pytest.raises(ConfigError, match=r"bounds\.models"):
            agree(device.owner, plan, hostile.digest)

    def test_refuses_other_aggregators_than_the_pinned(self, tmp_path: Path) -> None:
        keys = ["ab" * 32, "cd" * 32]
        urls = ["https://a:1", "https://b:1"]
        cloud = clouds()
        tree = cloud.published.tree()
        tree["settings"]["channel"] = {"kind": "secure", "aggregator_urls": urls, "aggregator_keys": keys}
        named = PublishedPlan.model_validate(tree)
        for own, fits in (({"urls": urls, "keys": keys}, True), ({"urls": urls, "keys": keys[::-1]}, False),
                          ({"urls": urls[::-1], "keys": keys}, False), ({}, False)):  # fmt: skip
            device = box(tmp_path, cloud, agreed=False, aggregators=own)
            if fits:
                device.owner.check(named)
            else:
                with pytest.raises(ConfigError, match="aggregators"):
                    device.owner.check(named)

    def test_refuses_records_that_do_not_fit(self, tmp_path: Path, cloud: Clouds) -> None:
        device = box(tmp_path, cloud, agreed=False)
        np.savez(device.folder / "records.npz", x=np.zeros((4, 7)), y=np.zeros(4, int))
        with pytest.raises(DataError, match="shape"):
            agree(device.owner, cloud.write(tmp_path / "plan"), cloud.published.digest)


class TestRecords:
    def test_a_part_is_the_shard_of_a_simulation(self, cloud: Clouds) -> None:
        """So that processes can be put beside one."""
        from privkd.config import Config

        found = own_records(RecordsConfig(source="digits", part=(2, 5)), cloud.published)
        shard = build_scenario(Config().data, 0).devices[2].train
        assert found.inputs.equal(shard.inputs)
        assert found.labels.equal(shard.labels)

    def test_labels_of_no_class_are_left_out(self, tmp_path: Path, cloud: Clouds) -> None:
        labels = np.array(["3", "eleven", "7"])
        np.savez(tmp_path / "r.npz", x=np.zeros((3, 8, 8), np.uint8), y=labels)
        found = own_records(RecordsConfig(source=str(tmp_path / "r.npz")), cloud.published)
        assert found.labels.tolist() == [3, 7]


def test_price_of_a_release_is_the_plans(device: Box, cloud: Clouds) -> None:
    device(cloud.ask())
    kept = read_ledger(device.owner)
    assert kept is not None
    assert kept.events(Unit.DEVICE, NAME) == (ZCdp(cloud.published.rho or 0),)
