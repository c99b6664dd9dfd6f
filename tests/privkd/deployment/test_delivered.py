"""After the last round: the last teacher comes to each device, and makes of its student another."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from on_device import SECONDS, Box, Clouds, box, clouds
from sites import NAMES, Picky, Site, real_devices, site
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from privkd.deployment.agreement import Agreement, show
from privkd.deployment.carriers import InProcessCarrier
from privkd.deployment.cloud_status import status
from privkd.deployment.device import kept_student
from privkd.deployment.device_state import Asked, Delivered, Trained, run_folder
from privkd.deployment.device_views import export, ledger
from privkd.deployment.owner import Owner
from privkd.deployment.wire import ANSWER_BYTES, Reason, unpack_question
from privkd.errors import ConfigError, InterruptError
from privkd.export.formats import format_named
from privkd.prepared import reopen
from privkd.runs.checkpoint import load_transcript
from privkd.runs.folder import RunFolder
from privkd.training.losses import divergence

STEPS = 25


def delivering(text: str) -> str:
    patient = text.replace("patience_seconds = 60", "patience_seconds = 0.3")
    return patient.replace('engine = "opacus"', f'engine = "opacus"\ndelivery_fit = {{ steps = {STEPS} }}')


@pytest.fixture
def found(tmp_path: Path) -> Site:
    return site(tmp_path, "noised", delivering)


@pytest.fixture
def devices(found: Site) -> Iterator[dict[str, Box]]:
    made = real_devices(found)
    yield made
    for each in made.values():
        each.stop()


def carried(devices: Mapping[str, Box], **away: Any) -> Picky:
    return Picky({name: each.raw for name, each in devices.items()}, **away or {"away": {}})


def student_of(device: Box, run: str, step: type[Trained | Delivered]) -> nn.Module:
    last = device.state.last(step, run)
    assert last is not None
    agreement = Agreement.read(run_folder(device.owner.state, run), device.owner.name)
    return kept_student(device.state.kept_round(last), agreement)


def flat(model: nn.Module) -> Tensor:
    return parameters_to_vector(model.parameters()).detach()


def last_models(found: Site) -> tuple[nn.Module, tuple[nn.Module, ...], Tensor]:
    """The last teacher, the students freshly distilled from it, and the proxy inputs."""
    with RunFolder.resume(found.folder) as folder:
        prepared = reopen(folder)
        teacher = load_transcript(folder, prepared.cloud.untrained_teacher()).final_teacher
    starts = prepared.cloud.public_students(teacher, round=prepared.plan.rounds)
    return teacher, starts, prepared.scenario.proxy


def naive(device: Box, number: int, found: Site) -> nn.Module:
    """The same distillation in plain torch, as `tests.privkd.test_delivery` does for a simulation."""
    run, (teacher, starts, inputs) = found.plan.digest, last_models(found)
    own, student = student_of(device, run, Trained), starts[number % len(starts)]
    with torch.no_grad():
        mean = 0.5 * F.softmax(own(inputs), -1) + 0.5 * F.softmax(teacher(inputs), -1)
    asked = device.state.last(Asked, run)
    assert asked is not None
    key = device.state.run_root(run).subkey("deliver", device.owner.name, asked.substance)
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    fit = found.plan.config.student.delivery_fit
    optimizer = torch.optim.AdamW(student.parameters(), lr=fit.learning_rate, weight_decay=fit.weight_decay)
    for step in range(STEPS):
        chosen = torch.randint(len(inputs), (fit.batch_size,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = fit.learning_rate * (1 - step / STEPS)
        optimizer.zero_grad()
        divergence(mean[chosen], student(inputs[chosen])).mean().backward()
        optimizer.step()
    return student


class TestInARun:
    def test_each_is_left_with_what_the_naive_computation_gives_and_pays_nothing(
        self, found: Site, devices: dict[str, Box]
    ) -> None:
        """Two architectures by the roster, each device with a student of its own."""
        found.run(carried(devices))
        run, (_, starts, _) = found.plan.digest, last_models(found)
        for number, device in enumerate(devices.values()):
            left = student_of(device, run, Delivered)
            torch.testing.assert_close(flat(left), flat(naive(device, number, found)), atol=1e-5, rtol=1e-4)
            for other in (student_of(device, run, Trained), starts[number % 2]):
                assert (flat(left) - flat(other)).abs().max() > 1e-3
            assert [each.round for each in ledger(device.owner).charges] == [0, 0, 1, 1, 0, 1]
            for path in (device.owner.state / "runs").rglob("round-*"):
                assert path.stat().st_mode & 0o077 == 0
        assert status(found.config).delivered == NAMES

    def test_who_missed_the_last_round_is_left_with_the_student_of_the_one_before(
        self, found: Site, devices: dict[str, Box]
    ) -> None:
        found.run(carried(devices, away={1: {"cy"}}))
        assert [release.devices for release in found.releases()] == [NAMES, ("ada", "bob")]
        trained = devices["cy"].state.last(Trained, found.plan.digest)
        assert trained is not None
        assert trained.round == 0
        left = student_of(devices["cy"], found.plan.digest, Delivered)
        expected = naive(devices["cy"], 2, found)
        torch.testing.assert_close(flat(left), flat(expected), atol=1e-5, rtol=1e-4)

    def test_who_answered_in_no_round_is_left_with_the_clouds_student(
        self, found: Site, devices: dict[str, Box]
    ) -> None:
        found.run(carried(devices, away={0: {"bob"}, 1: {"bob"}}))
        left = student_of(devices["bob"], found.plan.digest, Delivered)
        assert torch.equal(flat(left), flat(last_models(found)[1][1]))
        assert ledger(devices["bob"].owner).charges == ()

    def test_who_is_away_fails_nothing_and_is_brought_it_by_the_next_run(
        self, found: Site, devices: dict[str, Box]
    ) -> None:
        done = found.run(carried(devices, away={2: {"bob"}}))
        written = (found.folder / "result.json").read_bytes()
        assert (status(found.config).finished, status(found.config).delivered) == (True, ("ada", "cy"))
        before = export(devices["bob"].owner, None, "torch", found.folder / "before.pt2")
        assert (before.delivered, before.round) == (False, 2)
        asked: list[str] = []

        class Watching(InProcessCarrier):
            def ask(self, questions: Mapping[str, bytes], seconds: float) -> Mapping[str, bytes]:
                asked.extend(questions)
                return super().ask(questions, seconds)

        again = found.run(Watching({name: each.raw for name, each in devices.items()}))
        assert asked == ["bob"]
        assert status(found.config).delivered == NAMES
        assert (found.folder / "result.json").read_bytes() == written
        assert again.result.tree() == done.result.tree()
        after = export(devices["bob"].owner, None, "torch", found.folder / "after.pt2")
        assert (after.delivered, after.round) == (True, 2)
        proxy = last_models(found)[2]
        with torch.no_grad():
            expected = student_of(devices["bob"], found.plan.digest, Delivered)(proxy)
        answer = format_named("torch").load(found.folder / "after.pt2")
        torch.testing.assert_close(answer((proxy * 16).round()), expected, atol=1e-4, rtol=1e-4)
        found.run(Watching({}))
        assert asked == ["bob"], "nobody lacks it"

    def test_interrupted_in_it_the_run_is_finished_and_goes_on(
        self, found: Site, devices: dict[str, Box]
    ) -> None:
        class Broken(Picky):
            def ask(self, questions: Mapping[str, bytes], seconds: float) -> Mapping[str, bytes]:
                answers = super().ask(questions, seconds)
                if unpack_question(next(iter(questions.values())))[0].round == 2:
                    raise KeyboardInterrupt
                return answers

        with pytest.raises(InterruptError):
            found.run(Broken({name: each.raw for name, each in devices.items()}, {}))
        assert (status(found.config).finished, status(found.config).delivered) == (True, ())
        found.run(carried(devices))
        assert status(found.config).delivered == NAMES, "the same once more: devices answer it alike"

    def test_a_refusal_is_told_and_no_failure(self, found: Site) -> None:
        found.doubles["ada"].refusing = lambda round: Reason.NOT_AGREED if round == 2 else None
        found.run()
        assert status(found.config).delivered == ("bob", "cy")

    @pytest.mark.parametrize(("weight", "brought"), [(0, {"start"}), (0.5, {"start", "teacher"}), (1, None)])
    def test_it_brings_no_more_than_is_needed(
        self, tmp_path: Path, weight: float, brought: set[str] | None
    ) -> None:
        found = site(
            tmp_path,
            change=lambda text: text.replace("[run.student]", f"[run.student]\nown_weight = {weight}"),
        )
        found.run()
        told = [unpack_question(message) for message in found.doubles["bob"].delivered]
        assert [head.round for head, _, _ in told] == ([] if brought is None else [2])
        assert all({name.partition(".")[0] for name in tensors} == brought for _, tensors, _ in told)
        assert all(head.witness == "1:bob" for head, _, _ in told)


@pytest.fixture(scope="module")
def cloud() -> Clouds:
    return clouds(f"student.delivery_fit.steps={STEPS}")


@pytest.fixture
def device(tmp_path: Path, cloud: Clouds) -> Iterator[Box]:
    made = box(tmp_path / "box", cloud)
    yield made
    made.stop()


def refusal(device: Box, message: bytes) -> Reason | None:
    answer, given = device(message)
    assert given == b""
    return answer.refused


class TestADevice:
    def test_says_that_it_came_and_no_more_when_rounds_would_be_answered(
        self, device: Box, cloud: Clouds
    ) -> None:
        device(cloud.ask())
        begun = device.clock = device.clock + 3.0
        first = device.raw(cloud.delivery())
        assert (len(first), device.clock) == (ANSWER_BYTES, begun + SECONDS)
        device.clock += 0.25 * SECONDS
        device.start()
        assert device.raw(cloud.delivery()) == first
        assert device.clock == begun + 2 * SECONDS
        head, given = device(cloud.delivery())
        assert (head.refused, head.ledger, given) == (None, None, b"")
        assert len(ledger(device.owner).charges) == 3

    @pytest.mark.parametrize("group", ["teacher", "start"])
    def test_takes_no_other_afterwards(self, device: Box, cloud: Clouds, group: str) -> None:
        device(cloud.ask())
        assert refusal(device, cloud.delivery()) is None
        kept = device.state.last(Delivered, cloud.published.digest)
        name = f"{group}.head.bias"
        moved = cloud.delivered() | {name: cloud.delivered()[name] + 1e-6}
        for _ in range(2):
            assert refusal(device, cloud.delivery(tensors=moved)) is Reason.CHANGED
            assert device.state.last(Delivered, cloud.published.digest) == kept
            device.start()

    def test_answers_no_round_afterwards(self, device: Box, cloud: Clouds) -> None:
        device(cloud.ask())
        assert refusal(device, cloud.delivery()) is None
        assert [refusal(device, cloud.ask(round)) for round in (0, 1)] == [Reason.ROUND_OVER] * 2
        assert len(ledger(device.owner).charges) == 3

    @pytest.mark.parametrize(
        "change",
        [
            {"start.head.weight": lambda t: t * torch.inf},
            {"start.head.weight": lambda t: t[:-1]},
            {"teacher.head.weight": lambda t: t.double()},
            {"teacher.head.weight": lambda t: t * torch.nan},
            {"start.head.weight": None},
            {"teacher.head.weight": None},
            {"start.more": lambda _: torch.zeros(1)},
            {"queries": lambda _: torch.arange(20)},
            {"inputs": lambda _: torch.zeros(1)},
            {"student.head.weight": lambda _: torch.zeros(1)},
        ],
    )
    def test_takes_nothing_but_the_plans_models(
        self, device: Box, cloud: Clouds, change: dict[str, Callable[[Any], Tensor] | None]
    ) -> None:
        tensors = cloud.delivered()
        for name, turn in change.items():
            given = tensors.pop(name, None)
            if turn is not None:
                tensors[name] = turn(given)
        assert refusal(device, cloud.delivery(tensors=tensors)) is Reason.QUESTION
        assert refusal(device, cloud.delivery()) is None

    @pytest.mark.parametrize(
        ("head", "reason"),
        [
            ({"run": "ab" * 32}, Reason.NOT_AGREED),
            ({"witness": "ab" * 32}, Reason.WITNESS),
            ({"device": "device-0001"}, Reason.PROTOCOL),
            ({"invitation": b"terms"}, Reason.QUESTION),
        ],
    )
    def test_checks_the_rest_as_of_a_question(
        self, device: Box, cloud: Clouds, head: dict[str, Any], reason: Reason
    ) -> None:
        assert refusal(device, cloud.delivery(**head)) is reason
        assert device.state.last(Asked, cloud.published.digest) is None

    def test_learns_in_its_hours_alone(self, tmp_path: Path, cloud: Clouds) -> None:
        device = box(tmp_path, cloud, hours={"start": "00:00", "end": "00:01"})
        device.clock = 1_000_000.0 + 43_200
        assert refusal(device, cloud.delivery()) is Reason.LATER
        assert device.state.last(Delivered, cloud.published.digest) is None
        device.stop()

    def test_says_nothing_of_a_student_that_diverged(
        self, device: Box, cloud: Clouds, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def diverged(start: nn.Module, *_: Any) -> nn.Module:
            for parameter in start.parameters():
                parameter.data.fill_(torch.nan)
            return start

        with monkeypatch.context() as patch:
            patch.setattr("privkd.device.train_private", diverged)
            device(cloud.ask())
        begun = device.clock
        assert refusal(device, cloud.delivery()) is None
        assert device.clock == begun + SECONDS
        left = student_of(device, cloud.published.digest, Delivered)
        assert torch.equal(flat(left), flat(cloud.tasks[0].starts[0]))

    def test_of_a_plan_that_delivers_nothing_takes_nothing(self, tmp_path: Path) -> None:
        cloud = clouds("student.own_weight=1")
        device = box(tmp_path, cloud)
        device(cloud.ask())
        assert refusal(device, cloud.delivery()) is Reason.ROUND_OVER
        device.stop()

    def test_its_owner_is_told_before_and_lists_a_teacher_of_own_code(
        self, tmp_path: Path, cloud: Clouds
    ) -> None:
        device = box(tmp_path, cloud, agreed=False)
        shown = show(device.owner, cloud.write(tmp_path / "plan"))
        assert "its own weighs 0.5" in str(shown.asks["student left here in the end"])
        _check_own_code(device.owner, 0.5, refused=True)
        _check_own_code(device.owner, 1, refused=False)


def _check_own_code(owner: Owner, weight: float, *, refused: bool) -> None:
    """Where no student trains by it: a teacher runs on the device only to be merged with."""
    plan = clouds("student.alpha=0", f"student.own_weight={weight}").published
    tree = plan.tree()
    tree["settings"]["teacher"]["model"] = "os:abort"
    hostile = type(plan).model_validate(tree)
    if not refused:
        return owner.check(hostile)
    with pytest.raises(ConfigError, match=r"bounds\.models"):
        owner.check(hostile)
    return None
