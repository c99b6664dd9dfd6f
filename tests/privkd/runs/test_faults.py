"""The command is struck at its durable steps; the run ends as if nothing had been, and its ledger never says
too little.

By default a few telling steps are struck, all of them where slow tests run.
"""

import hashlib
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tally
from faults import Answer, Commands, Kind, Strike
from running import SMALL, charges, outcome, same, weights

from privkd.journal import Journal

TINY = (
    *SMALL,
    "data.devices=2",
    "data.records_per_device=10",
    "teacher.fit.steps=5",
    "student.public_fit.steps=3",
    "student.dp.steps=2",
    "reverse.fit.steps=3",
)
KINDS: tuple[Kind, ...] = ("before", "after")
DEVICES = ("device-0000", "device-0001")
DEPLOYED = ("privacy.noise=system", "channel.kind=noised", "privacy.device_epsilon=8", "rounds=1")


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with Commands(tmp_path_factory.mktemp("commands")) as server:
        yield server


@dataclass(frozen=True)
class Whole:
    """A run that nothing struck, and the points it passed."""

    path: Path
    answer: Answer
    settings: tuple[str, ...]

    @property
    def points(self) -> tuple[str, ...]:
        return tuple(point for point in self.answer.points if not point.startswith("released"))

    def strikes(self) -> list[Strike]:
        """One before, one after and, where something is written, one within each point."""
        found = []
        for number, point in enumerate(self.points):
            kinds: tuple[Kind, ...] = ("before", "within", "after")
            found += [Strike(kind, number) for kind in kinds if kind != "within" or point.startswith("write")]
        return found

    def at(self, point: str, occurrence: int = 0) -> int:
        """The number of a point by its name; from the end where ``occurrence`` is negative."""
        return [number for number, name in enumerate(self.points) if name == point][occurrence]


def words(settings: tuple[str, ...]) -> list[str]:
    return [word for setting in (*TINY, *settings) for word in ("--set", setting)]


def whole_run(commands: Commands, folder: Path, *settings: str) -> Whole:
    answer = commands.run("train", *words(settings), "--out", folder / "run")
    assert answer.code == 0, answer.err
    return Whole(folder / "run", answer, settings)


@pytest.fixture(scope="module")
def plain(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return whole_run(commands, tmp_path_factory.mktemp("plain"), "rounds=1")


@pytest.fixture(scope="module")
def deployed(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return whole_run(commands, tmp_path_factory.mktemp("deployed"), *DEPLOYED)


def booked(path: Path) -> set[tuple[str, int, str]]:
    """What the ledger on the disk says was spent."""
    ledger = path / "ledger.jsonl"
    records = Journal(ledger) if ledger.exists() else ()
    return {
        (charge["unit"], charge["round"], charge["party"])
        for record in records
        for charge in record.get("charges", ())
    }


def go_on(commands: Commands, path: Path, settings: tuple[str, ...]) -> Answer:
    """What a person does: resume the run if there is one, else start it again."""
    if (path / "journal.jsonl").exists():
        return commands.run("train", "--resume", path)
    return commands.run("train", *words(settings), "--out", path)


def strike(commands: Commands, folder: Path, whole: Whole, hit: Strike) -> tuple[Answer, Answer]:
    """Strike a run like ``whole``, check what its ledger says then, and go on with it."""
    path = folder / f"{hit.kind}-{hit.at}" / "run"
    struck = commands.run("train", *words(whole.settings), "--out", path, strike=hit)
    spent = booked(path)
    for round in struck.begun:
        for device in DEVICES:
            assert {("record", round, device), ("device", round, device)} <= spent
    resumed = go_on(commands, path, whole.settings)
    assert resumed.code == 0, resumed.err
    for round, shown in struck.releases.items():
        assert resumed.releases.get(round, shown) == shown, "a repeated release shows nothing new"
    assert charges(path) == charges(whole.path)
    assert not list(path.rglob("*.part")), "nothing half-written is left"
    return struck, resumed


def spent_in(path: Path) -> dict[str, Any]:
    """What the result says was spent, without what the audit found: its noise is the system's, drawn anew."""
    ledger = outcome(path)["ledger"]
    return {unit: {k: v for k, v in row.items() if k != "lower_bound"} for unit, row in ledger.items()}


def kill(commands: Commands, folder: Path, whole: Whole, hit: Strike) -> None:
    struck, _ = strike(commands, folder, whole, hit)
    assert struck.code == -signal.SIGKILL, struck.err
    path = folder / f"{hit.kind}-{hit.at}" / "run"
    if "privacy.noise=system" in whole.settings:
        assert not (path / "secrets").exists(), "no key outlives the run"
        assert spent_in(path) == spent_in(whole.path)
    else:
        assert same(path, whole.path), f"{hit} at {whole.points[hit.at]}"
    tally.note("SIGKILL at a durable step or a release", "survived")


class TestKilled:
    def test_a_run_passes_debits_checkpoints_releases_and_reports(
        self, plain: Whole, deployed: Whole
    ) -> None:
        order = [
            plain.at("fsync ledger.jsonl", 1),
            plain.at("release 0"),
            plain.at("replace rounds/001/cloud.safetensors"),
            plain.at("replace rounds/001/wire.safetensors"),
            plain.at("fsync journal.jsonl", -2),
            plain.at("replace result.json"),
        ]
        assert order == sorted(order)
        assert deployed.at("replace secrets/noise.key") < deployed.at("release 0")
        assert deployed.at("release 0") < deployed.at("unlink secrets/noise.key")

    @pytest.mark.parametrize(
        ("kind", "point", "occurrence"),
        [
            ("within", "write ledger.jsonl", 1),
            ("after", "fsync ledger.jsonl", 1),
            ("before", "release 0", 0),
            ("after", "release 0", 0),
            ("before", "replace rounds/001/cloud.safetensors", 0),
            ("within", "write journal.jsonl", -2),
            ("after", "replace result.json", 0),
        ],
    )
    def test_at_telling_steps(
        self, commands: Commands, tmp_path: Path, plain: Whole, kind: Kind, point: str, occurrence: int
    ) -> None:
        kill(commands, tmp_path, plain, Strike(kind, plain.at(point, occurrence)))

    @pytest.mark.parametrize("point", ["replace secrets/noise.key", "unlink secrets/noise.key"])
    def test_where_the_key_is_written_and_forgotten(
        self, commands: Commands, tmp_path: Path, deployed: Whole, point: str
    ) -> None:
        kill(commands, tmp_path, deployed, Strike("after", deployed.at(point)))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "settings",
        [
            ("rounds=2", "controls=true"),
            ("rounds=2", "student.start=own"),
            DEPLOYED,
            ("rounds=1", "channel.kind=noised", "privacy.device_epsilon=8"),
        ],
        ids=["plain", "own-students", "deployed", "noised"],
    )
    def test_at_every_step(self, commands: Commands, tmp_path: Path, settings: tuple[str, ...]) -> None:
        whole = whole_run(commands, tmp_path / "whole", *settings)
        for hit in whole.strikes():
            kill(commands, tmp_path, whole, hit)

    @pytest.mark.slow
    def test_over_the_secure_channel(self, commands: Commands, tmp_path: Path) -> None:
        whole = whole_run(commands, tmp_path / "whole", "rounds=1", "channel.kind=secure")
        points = [("fsync ledger.jsonl", 1), ("fsync ledger.jsonl", 2), ("release 0", 0),
                  ("replace rounds/001/wire.safetensors", 0), ("replace result.json", 0)]  # fmt: skip
        for point, occurrence in points:
            for kind in KINDS:
                kill(commands, tmp_path, whole, Strike(kind, whole.at(point, occurrence)))


def fail(commands: Commands, folder: Path, whole: Whole, hit: Strike) -> None:
    """The disk fails under a run: one line, and the run goes on once there is room again."""
    struck, _ = strike(commands, folder, whole, hit)
    assert struck.code == 2, struck.err
    assert "Traceback" not in struck.err
    assert struck.err.splitlines()[-1].startswith("privkd: ")
    path = folder / f"{hit.kind}-{hit.at}" / "run"
    assert "privacy.noise=system" in whole.settings or same(path, whole.path)
    tally.note(f"disk {hit.kind} from a durable step on", "survived")


class TestDisk:
    @pytest.mark.parametrize(
        ("kind", "point", "occurrence"),
        [
            ("full", "write ledger.jsonl", 1),
            ("full", "fsync rounds/001/wire.safetensors", 0),
            ("read-only", "fsync config.toml", 0),
            ("read-only", "write journal.jsonl", -2),
        ],
    )
    def test_fails_at_telling_steps(
        self, commands: Commands, tmp_path: Path, plain: Whole, kind: Kind, point: str, occurrence: int
    ) -> None:
        fail(commands, tmp_path, plain, Strike(kind, plain.at(point, occurrence)))

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["full", "read-only"])
    @pytest.mark.parametrize("deployment", [False, True])
    def test_fails_at_every_step(
        self, commands: Commands, tmp_path: Path, plain: Whole, deployed: Whole, kind: Kind, deployment: bool
    ) -> None:
        whole = deployed if deployment else plain
        for number, point in enumerate(whole.points):
            if not point.startswith(("unlink", "release") if kind == "full" else "release"):
                fail(commands, tmp_path, whole, Strike(kind, number))


class TestTwoProcesses:
    def test_the_second_is_refused_and_the_first_goes_on(
        self, commands: Commands, tmp_path: Path, plain: Whole
    ) -> None:
        path, at = tmp_path / "run", plain.at("release 0")
        first = commands.start("train", *words(plain.settings), "--out", path, strike=Strike("pause", at))
        until = time.monotonic() + 60
        while first.passed <= at and time.monotonic() < until:
            time.sleep(0.05)
        before = charges(path)
        for arguments in (("train", "--resume", path), ("audit", "membership", path)):
            second = commands.run(*arguments)
            assert second.code == 2
            assert len(second.err.splitlines()) == 1
            assert "is in use by another process" in second.err
        assert charges(path) == before
        first.go_on()
        assert commands.wait(first).code == 0
        assert same(path, plain.path)
        tally.note("a second process on a run folder", "refused")


class TestElsewhere:
    def test_a_run_goes_on_from_another_working_directory(self, commands: Commands, tmp_path: Path) -> None:
        """Relative names in its settings are those of the folder in which it was started."""
        here, there = tmp_path / "here", tmp_path / "there"
        for folder in (here / "data", there):
            folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        np.savez(here / "data" / "mine.npz", x=rng.random((200, 5)), y=rng.integers(0, 3, 200))
        for name in ("--data", "--data-dir"):
            given = {"--data": ("data/mine.npz",), "--data-dir": ("mine.npz", "--data-dir", "data")}[name]
            out = tmp_path / name / "run"
            settings = [*words(("rounds=1",)), "--data", *given, "--out", out]
            struck = commands.run("train", *settings, strike=Strike("before", 30), cwd=here)
            assert struck.code == -signal.SIGKILL, struck.err
            resumed = commands.run("train", "--resume", out, cwd=there)
            assert resumed.code == 0, resumed.err
            assert str(here / "data") in (out / "config.toml").read_text()


AUDIT = ("--shadows", "8", "--targets", "2", "--view", "student", "--attack", "lira-online", "--json")


class TestAudit:
    """A killed audit leaves no half of a trace, and the run as it was."""

    def audited(self, commands: Commands, folder: Path) -> tuple[Path, Answer]:
        more = ("rounds=1", "data.records_per_device=40")
        run = whole_run(commands, folder, *more).path
        return run, commands.run("audit", "membership", run, *AUDIT)

    def hit(self, commands: Commands, folder: Path, strikes: Any) -> None:
        run, whole = self.audited(commands, folder)
        assert whole.code == 0, whole.err
        before, found = weights(run), json.loads(whole.out)
        for number in strikes(whole.points):
            for path in (run / "audit").iterdir():
                path.unlink()
            struck = commands.run("audit", "membership", run, *AUDIT, strike=Strike("after", number))
            assert struck.code == -signal.SIGKILL, struck.err
            for trace in (run / "audit").glob("*.safetensors"):
                digest = trace.with_suffix(".sha256")
                if digest.exists():
                    assert digest.read_text().strip() == hashlib.sha256(trace.read_bytes()).hexdigest()
            again = commands.run("audit", "membership", run, *AUDIT)
            assert (again.code, json.loads(again.out)) == (0, found)
            assert not list(run.rglob("*.part"))
            tally.note("SIGKILL during an audit", "survived")
        assert {name: data for name, data in weights(run).items() if not name.startswith("audit")} == {
            name: data for name, data in before.items() if not name.startswith("audit")
        }

    def test_at_a_trace(self, commands: Commands, tmp_path: Path) -> None:
        def first_trace(points: tuple[str, ...]) -> list[int]:
            return [n for n, point in enumerate(points) if "safetensors" in point and "fsync" in point][:1]

        self.hit(commands, tmp_path, first_trace)

    @pytest.mark.slow
    def test_at_every_step(self, commands: Commands, tmp_path: Path) -> None:
        self.hit(commands, tmp_path, lambda points: range(len(points)))
