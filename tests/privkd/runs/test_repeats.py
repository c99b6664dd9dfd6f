"""A release that was interrupted is repeated with the same bytes, or not at all."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from running import StopAt, Watching, charges, play, resume, same
from torch import Tensor

import privkd.engines.simulation
import privkd.federation
import privkd.fleet
from privkd.channels.channel import Channel
from privkd.device import responses
from privkd.errors import RunError
from privkd.messages import Question, Release, Upload
from privkd.privacy.events import NoPrivacy, PrivacyEvent, ZCdp
from privkd.privacy.noise import NoiseRoot
from privkd.runs.fingerprints import UNKEPT, check_repeats

TESTS = Path(__file__).parents[2] / "support"
AFTER_THE_RELEASE, IN_ROUND_TWO = 4, 6
"""Stages of a run: the first release was made and not committed; students train again."""
REFUSED = r"the answers of round 1 differ from those of the interrupted release.*OMP_NUM_THREADS=\d+"


def notes(path: Path) -> list[dict[str, Any]]:
    """What the journal on the disk says of answers."""
    lines = (path / "journal.jsonl").read_text().splitlines()
    records = [json.loads(line)["record"] for line in lines]
    return [record for record in records if record["step"].startswith("answers")]


def nudged(patch: pytest.MonkeyPatch) -> None:
    """One entry of one device's answers comes out by its last bit otherwise; a vote goes to another class."""

    def answers(logits: Tensor, question: Question) -> Tensor:
        found = responses(logits, question).clone()
        if question.kind == "votes":
            found[0, 0] = found[0, 0].roll(1)
        else:
            found[0, 0, 0] = torch.nextafter(found[0, 0, 0], torch.tensor(2.0))
        return found

    patch.setattr(privkd.engines.simulation, "responses", answers)


class Counted(Channel):
    """Stands for any channel: it counts the releases that are begun, and never finishes one."""

    begun: int = 0

    @property
    def event(self) -> PrivacyEvent:
        return NoPrivacy("a test") if self.rho is None else ZCdp(self.rho)

    def carry(self, question: Question, answers: Tensor, devices: Sequence[str]) -> Release:
        type(self).begun += 1
        raise KeyboardInterrupt

    def encode(self, question: Question, block: NDArray[np.float64], device: str) -> Upload:
        raise AssertionError("nothing is carried")

    def collect(self, question: Question, uploads: Sequence[Upload]) -> Release:
        raise AssertionError("nothing is carried")


def opened(*_: Any, clip_norm: float, rho: float | None, **__: Any) -> Counted:
    return Counted(clip_norm, rho)


class TestARepeat:
    def test_with_the_same_answers_goes_on(self, tmp_path: Path) -> None:
        play(tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            play(tmp_path / "run", progress=StopAt(AFTER_THE_RELEASE))
        resume(tmp_path / "run")
        assert same(tmp_path / "run", tmp_path / "whole")
        assert [note["step"] for note in notes(tmp_path / "run")] == ["answers 0", "answers 1"]

    def test_with_other_answers_is_refused_and_shows_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        watching = Watching(tmp_path / "run", monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            play(tmp_path / "run", progress=StopAt(AFTER_THE_RELEASE))
        spent, shown = charges(tmp_path / "run"), len(watching.seen)
        with monkeypatch.context() as patch:
            nudged(patch)
            with pytest.raises(RunError, match=REFUSED) as refused:
                resume(tmp_path / "run")
        assert refused.value.exit_code == 2
        assert f"OMP_NUM_THREADS={torch.get_num_threads()}" in str(refused.value)
        assert len(watching.seen) == shown
        assert charges(tmp_path / "run") == spent
        resume(tmp_path / "run")

    @pytest.mark.parametrize(
        "settings",
        [
            ("channel.kind=plain",),
            ("channel.kind=noised", "privacy.device_epsilon=8", "privacy.noise=system"),
            ("channel.kind=secure",),
            ("channel.kind=secure", "channel.parties=services"),
            ("channel.kind=secure", "channel.aggregation=votes"),
            ("channel.kind=plain", "channel.answers=residuals", "channel.dropout=0.3"),
        ],
        ids=["plain", "noised deployment", "secure", "services", "votes", "residuals, one silent"],
    )
    def test_over_every_channel(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
    ) -> None:
        monkeypatch.setattr(Counted, "begun", 0)
        monkeypatch.setattr(privkd.federation, "open_channel", opened)
        with pytest.raises(KeyboardInterrupt):
            play(tmp_path / "run", *settings)
        with monkeypatch.context() as patch:
            nudged(patch)
            with pytest.raises(RunError, match=REFUSED):
                resume(tmp_path / "run")
        assert Counted.begun == 1
        with pytest.raises(KeyboardInterrupt):
            resume(tmp_path / "run")
        assert Counted.begun == 2, "the same answers go on"

    def test_unchecked_would_show_a_second_release(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The broken twin: what is refused above is then seen twice, and charged for once."""
        monkeypatch.setattr(privkd.fleet, "check_repeats", lambda *_: None)
        watching = Watching(tmp_path / "run", monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            play(tmp_path / "run", progress=StopAt(AFTER_THE_RELEASE))
        spent = charges(tmp_path / "run")
        nudged(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            resume(tmp_path / "run", progress=StopAt(AFTER_THE_RELEASE - 1))
        assert not torch.equal(watching.answers[0], watching.answers[1])
        assert charges(tmp_path / "run") == spent

    def test_of_students_that_are_trained_again_is_compared_with_their_last_round(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They repeat the noise of a round that was committed long ago."""
        own = ("student.start=own", "channel.answers=residuals")
        play(tmp_path / "whole", *own)
        with pytest.raises(KeyboardInterrupt):
            play(tmp_path / "run", *own, progress=StopAt(IN_ROUND_TWO))
        with monkeypatch.context() as patch:
            nudged(patch)
            with pytest.raises(RunError, match=REFUSED):
                resume(tmp_path / "run")
        resume(tmp_path / "run")
        assert same(tmp_path / "run", tmp_path / "whole")


class TestTheNote:
    def test_is_on_the_disk_before_the_release(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[int] = []

        def carry(channel: Counted, *_: Any) -> Release:
            seen.append(len(notes(tmp_path / "run")))
            raise KeyboardInterrupt

        monkeypatch.setattr(Counted, "carry", carry)
        monkeypatch.setattr(privkd.federation, "open_channel", opened)
        with pytest.raises(KeyboardInterrupt):
            play(tmp_path / "run")
        assert seen == [1]

    def test_knows_devices_rounds_shapes_and_keys(self) -> None:
        answers = torch.rand(2, 3, 4)

        class Kept:
            def note(self, step: str, **facts: Any) -> dict[str, Any]:
                kept.append(facts["hmac"])
                return facts

        kept: list[str] = []
        root, other = NoiseRoot.from_seed(0), NoiseRoot.from_seed(1)
        for key, round, names, shown in (
            (root, 0, ("a", "b"), answers),
            (other, 0, ("a", "b"), answers),
            (root, 1, ("a", "b"), answers),
            (root, 0, ("b", "a"), answers),
            (root, 0, ("a", "b"), answers.reshape(2, 4, 3)),
        ):
            check_repeats(Kept(), key, round, names, shown)
        assert len(set(kept)) == len(kept)
        check_repeats(UNKEPT, root, 0, ("a", "b"), answers)


class TestRealKill:
    """Between release and commit, and resumed with another number of threads."""

    CODE = f"""
        import hashlib, os, signal, sys
        sys.path.insert(0, {str(TESTS)!r})
        from pathlib import Path
        import torch
        torch.set_num_threads(int(sys.argv[3]))
        from privkd.channels.channel import NoisedChannel
        from privkd.errors import RunError
        from running import StopAt, play, resume
        inner = NoisedChannel.carry
        def carry(channel, *arguments):
            found = inner(channel, *arguments)
            print(hashlib.sha256(found.answers.numpy().tobytes()).hexdigest(), flush=True)
            if sys.argv[1] == "play":
                os.kill(os.getpid(), signal.SIGKILL)
            return found
        NoisedChannel.carry = carry
        settings = ("channel.kind=noised", "privacy.device_epsilon=8", "privacy.noise=system", "rounds=1",
                    "student.models=['cnn']", "student.public_fit.steps=40")
        try:
            play(Path(sys.argv[2]), *settings) if sys.argv[1] == "play" else resume(Path(sys.argv[2]))
        except RunError as error:
            print(error, file=sys.stderr)
            sys.exit(error.exit_code)
    """

    def run(self, what: str, path: Path, threads: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", textwrap.dedent(self.CODE), what, path, str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=300
        )

    @pytest.mark.slow
    def test_shows_the_same_release_or_none(self, tmp_path: Path) -> None:
        killed = self.run("play", tmp_path / "run", 1)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        first = killed.stdout.split()
        assert len(first) == 1
        other = self.run("resume", tmp_path / "run", 2)
        if other.returncode == 0:
            assert other.stdout.split() == first, "two threads add up as one does on this machine"
            return
        assert other.returncode == 2, other.stderr
        assert other.stdout == ""
        assert "OMP_NUM_THREADS=1; now 2" in other.stderr
        again = self.run("resume", tmp_path / "run", 1)
        assert again.returncode == 0, again.stderr
        assert again.stdout.split() == first
