"""A run that is cut short anywhere ends as if it never was, and its ledger never says too little."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from running import StopAt, Trained, Watching, charges, play, resume, same, weights

from privkd.channels.channel import NoisedChannel, PlainChannel, Release
from privkd.errors import ChannelError, RunError
from privkd.privacy.events import Unit
from privkd.privacy.ledger import Ledger
from privkd.runs.folder import RunFolder

TESTS = Path(__file__).parents[2] / "support"


class Killed(BaseException):
    """As if the process ended here: nothing but files is left."""


@contextmanager
def killed_at(number: int | None) -> Iterator[list[None]]:
    """Kills the run just before its ``number``-th durable step; the list has one entry for each step."""
    steps: list[None] = []
    inner = os.fsync

    def fsync(descriptor: int) -> None:
        if len(steps) == number:
            raise Killed
        steps.append(None)
        inner(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield steps


def play_or_resume(path: Path, *overrides: str) -> None:
    """What a person does: resume the run if there is one, else start it again."""
    if (path / "journal.jsonl").exists():
        resume(path)
    else:
        play(path, *overrides)


def check_ledger_covers(path: Path, watching: Watching) -> None:
    """Every release that was begun is in the ledger on the disk, for every device and unit."""
    booked = {(c["unit"], c["round"], c["party"]) for c in charges(path)}
    for round, _ in watching.seen:
        for device in ("device-0000", "device-0001", "device-0002"):
            assert ("record", round, device) in booked
            assert ("device", round, device) in booked


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted."""
    path = tmp_path_factory.mktemp("whole") / "run"
    play(path, "controls=true")
    return path


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted, of one round."""
    path = tmp_path_factory.mktemp("short") / "run"
    play(path, "rounds=1")
    return path


AFTER_THE_RELEASE = "teacher: learning from the release"
STAGES = [
    "teacher: training on public data",
    *(
        f"round {round} of 2: {stage}"
        for round in (1, 2)
        for stage in (
            "distilling students on public data",
            "training students on their devices",
            "plain channel",
            AFTER_THE_RELEASE,
        )
    ),
    "control: students trained directly",
    "control: students trained directly with DP-SGD",
    "students: learning from the last teacher",
]


class TestStages:
    def test_are_these(self, tmp_path: Path) -> None:
        stages = StopAt()
        play(tmp_path / "run", "controls=true", progress=stages)
        assert stages.seen == STAGES

    @pytest.mark.parametrize("stage", range(len(STAGES)), ids=STAGES)
    def test_a_run_cut_short_at_each_ends_as_the_whole_one(
        self, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, stage: int
    ) -> None:
        watching = Watching(tmp_path / "run", monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            play(tmp_path / "run", "controls=true", progress=StopAt(stage))
        check_ledger_covers(tmp_path / "run", watching)
        resume(tmp_path / "run")
        assert same(tmp_path / "run", whole)

    def test_a_repeated_round_shows_an_adversary_nothing_new(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        watching = Watching(tmp_path / "run", monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            play(
                tmp_path / "run",
                progress=StopAt(STAGES.index("round 2 of 2: teacher: learning from the release")),
            )
        spent = charges(tmp_path / "run")
        resume(tmp_path / "run")
        assert [round for round, _ in watching.seen] == [0, 1, 1]
        assert torch.equal(watching.answers[1], watching.answers[2])
        assert charges(tmp_path / "run") == spent, "and costs nothing more"

    def test_again_and_again(self, tmp_path: Path, whole: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            play(tmp_path / "run", "controls=true", progress=StopAt(3))
        for stage in (0, 2, 3, 6, 1):
            with pytest.raises(KeyboardInterrupt):
                resume(tmp_path / "run", progress=StopAt(stage))
        resume(tmp_path / "run")
        assert same(tmp_path / "run", whole)


class TestOtherRuns:
    @pytest.mark.parametrize(
        "overrides",
        [
            ("student.start=own", "rounds=3"),
            ("channel.answers=residuals", "reverse.memory=1.0", "rounds=3"),
            ("student.models=[{name='mlp', width=8}, {name='cnn', width=4}]", "student.engine=opacus"),
            ("channel.kind=noised", "privacy.device_epsilon=8"),
            ("privacy.epsilon=inf",),
        ],
        ids=lambda overrides: overrides[0],
    )
    def test_whatever_a_round_hands_to_the_next(self, tmp_path: Path, overrides: tuple[str, ...]) -> None:
        play(tmp_path / "whole", *overrides)
        with pytest.raises(KeyboardInterrupt):
            play(tmp_path / "run", *overrides, progress=StopAt(7))
        resume(tmp_path / "run")
        assert same(tmp_path / "run", tmp_path / "whole")


class TestDurableSteps:
    """The walk: the run is killed before each of the calls that make something durable."""

    def walk(self, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
        step = 0
        while True:
            path = tmp_path / str(step)
            with monkeypatch.context() as patch:
                watching = Watching(path, patch)
                try:
                    with killed_at(step):
                        play(path, *overrides)
                except Killed:
                    check_ledger_covers(path, watching)
                    play_or_resume(path, *overrides)
                    assert same(path, whole), f"killed before durable step {step}"
                else:
                    return step
                for answers in watching.answers:
                    matching = [other for other in watching.answers if torch.equal(other, answers)]
                    assert len(matching) == len(watching.answers), "one round, so one release, repeated"
            step += 1

    def test_of_one_round(self, tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        steps = self.walk(tmp_path, short, monkeypatch, "rounds=1")
        with killed_at(None) as counted:
            play(tmp_path / "counted", "rounds=1")
        assert steps == len(counted) > 20

    @pytest.mark.parametrize("failing", ["link", "rename"])
    def test_a_crash_between_writing_and_naming(
        self, tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch, failing: str
    ) -> None:
        """The temporary file stays behind, as after a real kill, and harms nobody."""
        calls = 0

        def kill(*_: object, **__: object) -> None:
            nonlocal calls
            calls += 1
            if calls == (1 if failing == "link" else 4):
                raise Killed

        target = (os, "link") if failing == "link" else (Path, "replace")
        inner = getattr(*target)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            kill()
            return inner(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(*target, wrapped)
            patch.setattr(Path, "unlink", lambda *_, **__: None)
            with pytest.raises(Killed):
                play(tmp_path / "run", "rounds=1")
        play_or_resume(tmp_path / "run", "rounds=1")
        assert same(tmp_path / "run", short)


class TestRealKill:
    CODE = f"""
        import os, signal, sys
        sys.path.insert(0, {str(TESTS)!r})
        from pathlib import Path
        from running import StopAt, play
        class Kill(StopAt):
            def stage(self, name):
                if len(self.seen) == self.number:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.seen.append(name)
        step = int(sys.argv[3])
        if step >= 0:
            inner, calls = os.fsync, []
            def fsync(descriptor):
                if len(calls) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls.append(None)
                inner(descriptor)
            os.fsync = fsync
        play(Path(sys.argv[1]), "controls=true", progress=Kill(int(sys.argv[2])))
    """

    @pytest.mark.parametrize(
        ("stage", "step"), [(7, -1), pytest.param(-1, 24, marks=pytest.mark.slow)], ids=["stage", "write"]
    )
    def test_a_killed_process_leaves_a_run_that_can_be_resumed(
        self, tmp_path: Path, whole: Path, stage: int, step: int
    ) -> None:
        command = [sys.executable, "-c", textwrap.dedent(self.CODE), tmp_path / "run", str(stage), str(step)]
        # One thread here and there: a sum's last bit hangs on how it is divided among threads.
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=300
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        resume(tmp_path / "run")
        assert same(tmp_path / "run", whole)


class TestFinished:
    def test_resuming_it_repeats_the_result(self, tmp_path: Path, whole: Path) -> None:
        play(tmp_path / "run", "controls=true")
        before = weights(tmp_path / "run")
        resume(tmp_path / "run")
        assert weights(tmp_path / "run") == before
        assert same(tmp_path / "run", whole)

    def test_the_journal_knows_the_result_that_lies_there(self, tmp_path: Path) -> None:
        play(tmp_path / "run", "rounds=1")
        resume(tmp_path / "run")
        lines = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])["record"]
        assert last["step"] == "finished"
        assert last["result"] == hashlib.sha256((tmp_path / "run" / "result.json").read_bytes()).hexdigest()

    def test_no_channel_is_opened_for_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        play(tmp_path / "run", "rounds=1")
        monkeypatch.setattr("privkd.federation.open_channel", lambda *_, **__: pytest.fail("nothing to send"))
        resume(tmp_path / "run")

    def test_nor_in_a_deployment_whose_key_is_gone(self, tmp_path: Path) -> None:
        play(tmp_path / "run", "rounds=1", "privacy.noise=system")
        resume(tmp_path / "run")


class TestDamage:
    """The run is refused in one line, and what it spent is not forgotten."""

    def interrupted(self, path: Path, stage: int = 6, *overrides: str) -> None:
        with pytest.raises(KeyboardInterrupt):
            play(path, *overrides, progress=StopAt(stage))

    def test_a_ledger_that_is_gone(self, tmp_path: Path) -> None:
        self.interrupted(tmp_path / "run")
        (tmp_path / "run" / "ledger.jsonl").unlink()
        with pytest.raises(RunError, match="is missing"):
            resume(tmp_path / "run")
        assert not (tmp_path / "run" / "ledger.jsonl").exists(), "no fresh budget was opened"

    @pytest.mark.parametrize("lines", [1, 2, 3])
    def test_a_ledger_that_lost_charges(self, tmp_path: Path, lines: int) -> None:
        self.interrupted(tmp_path / "run")
        ledger = tmp_path / "run" / "ledger.jsonl"
        kept = ledger.read_bytes().splitlines(keepends=True)
        ledger.write_bytes(b"".join(kept[:lines]))
        with pytest.raises(RunError, match="lost charges that were booked"):
            resume(tmp_path / "run")

    def test_a_ledger_of_another_budget(self, tmp_path: Path) -> None:
        self.interrupted(tmp_path / "run")
        play(tmp_path / "rich", "privacy.epsilon=100", "rounds=1")
        (tmp_path / "run" / "ledger.jsonl").write_bytes((tmp_path / "rich" / "ledger.jsonl").read_bytes())
        with pytest.raises(RunError, match=r"ledger\.jsonl"):
            resume(tmp_path / "run")

    @pytest.mark.parametrize("name", ["cloud", "wire"])
    @pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
    def test_a_checkpoint(self, tmp_path: Path, name: str, damage: str) -> None:
        self.interrupted(tmp_path / "run")
        path = tmp_path / "run" / "rounds" / "001" / f"{name}.safetensors"
        data = path.read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(data[:-8] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
        before = charges(tmp_path / "run")
        with pytest.raises(RunError, match=rf"{name}\.safetensors"):
            resume(tmp_path / "run")
        assert charges(tmp_path / "run") == before
        path.write_bytes(data)
        resume(tmp_path / "run")

    def test_settings_that_were_changed(self, tmp_path: Path) -> None:
        """A larger budget, slipped in between, is found out."""
        self.interrupted(tmp_path / "run")
        config = tmp_path / "run" / "config.toml"
        config.write_text(config.read_text().replace("epsilon = 3.0", "epsilon = 30.0"))
        with pytest.raises(RunError, match=r"config\.toml was changed since the run was started"):
            resume(tmp_path / "run")

    def test_a_noise_key_that_is_gone(self, tmp_path: Path) -> None:
        """A fresh one would release the same round under other noise, for one charge."""
        self.interrupted(tmp_path / "run", 4, "privacy.noise=system")
        (tmp_path / "run" / "secrets" / "noise.key").unlink()
        with pytest.raises(RunError, match=r"noise\.key.*without it the run cannot go on"):
            resume(tmp_path / "run")

    def test_a_run_in_use(self, tmp_path: Path) -> None:
        self.interrupted(tmp_path / "run")
        with RunFolder.resume(tmp_path / "run"), pytest.raises(RunError, match="in use by another process"):
            resume(tmp_path / "run")
        resume(tmp_path / "run")


class TestDeployment:
    """Without a seed the key in the folder decides: the same draws, or none."""

    NOISED = ("privacy.noise=system", "channel.kind=noised", "privacy.device_epsilon=8")

    def test_a_repeated_release_repeats_its_noise(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        released: list[Release] = []
        inner = NoisedChannel.carry

        def carry(channel: NoisedChannel, question: Any, answers: Any, devices: Any) -> Release:
            if devices[0].startswith("audit-"):
                return inner(channel, question, answers, devices)
            released.append(inner(channel, question, answers, devices))
            return released[-1]

        monkeypatch.setattr(NoisedChannel, "carry", carry)
        with pytest.raises(KeyboardInterrupt):
            play(tmp_path / "run", *self.NOISED, progress=StopAt(4))
        resume(tmp_path / "run")
        assert len(released) == 3
        assert torch.equal(released[0].answers, released[1].answers), "round one, twice"
        assert not torch.equal(released[1].answers, released[2].answers)

    def test_a_repeated_dp_sgd_repeats_its_noise(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trained = Trained(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            play(tmp_path / "run", "privacy.noise=system", progress=StopAt(3))
        resume(tmp_path / "run")
        assert torch.equal(trained.values(0), trained.values(1))


class TestChannelFailure:
    def test_is_tried_again_by_a_resumed_run(
        self, tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A release that failed spent nothing that the ledger does not know of."""

        def fail(*_: object, **__: object) -> None:
            raise ChannelError("aggregator-1 was killed; nothing was released")

        with monkeypatch.context() as patch:
            patch.setattr(PlainChannel, "carry", fail)
            with pytest.raises(ChannelError):
                play(tmp_path / "run", "rounds=1")
        assert Ledger.load(tmp_path / "run" / "ledger.jsonl").spent(Unit.RECORD).high > 0
        resume(tmp_path / "run")
        assert same(tmp_path / "run", short)
