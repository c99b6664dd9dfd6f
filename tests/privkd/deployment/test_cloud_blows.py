"""`privkd cloud run` and its devices under blows: kills at durable steps, stragglers, restored states."""

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from signal import SIGCONT, SIGSTOP, SIGTERM
from typing import Any

import pytest
import tally
from faults import NOTHING, Answer, Commands, Kind, Strike
from owners import Home, awake, settle
from running import charges, weights
from sites import NAMES, Site, same_releases, site

from privkd.deployment.cloud_status import status
from privkd.deployment.device import DeviceProgram
from privkd.deployment.device_state import DeviceState, read_ledger
from privkd.deployment.sockets import Door
from privkd.deployment.wire import Reason
from privkd.privacy.events import Unit

KINDS: tuple[Kind, ...] = ("before", "within", "after")


@dataclass(frozen=True)
class Place:
    """A published site and its devices, not begun or somewhere on the way."""

    site: Site
    homes: dict[str, Home]

    def moved(self, folder: Path) -> "Place":
        """A copy, with devices under the same root keys."""
        base = self.site.config.parent
        shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.sock"))
        homes = {name: replace(each, folder=folder / name) for name, each in self.homes.items()}
        return Place(replace(self.site, config=folder / self.site.config.name), homes)

    def run(self, commands: Commands, *more: object, strike: Strike = NOTHING) -> Answer:
        """`privkd cloud run`."""
        return commands.run("cloud", "run", "--config", self.site.config, *more, strike=strike)

    @contextmanager
    def answered(self) -> Iterator[None]:
        """Its devices' own programs behind their sockets, in this process, without waiting for moments."""
        with ExitStack() as stack:
            for each in self.homes.values():
                owner = each.owner
                state = stack.enter_context(DeviceState.open(owner))
                program = DeviceProgram(owner, state, lambda what: None, sleep=lambda seconds: None)
                stack.callback(Door(owner.socket, program.handle).close)
            yield

    def booked(self) -> dict[str, list[Any]]:
        """Every charge of every device's own ledger."""
        found = {name: read_ledger(each.owner) for name, each in self.homes.items()}
        return {
            name: [each for unit in Unit for each in ledger.charges(unit, name)]
            for name, ledger in found.items()
            if ledger is not None
        }


def place(commands: Commands, folder: Path, patience: float = 60) -> Place:
    def change(text: str) -> str:
        return text.replace("patience_seconds = 60", f"patience_seconds = {patience}")

    found = site(folder, "noised", change)
    return Place(found, settle(commands, found))


@dataclass(frozen=True)
class Whole:
    """A run that nothing struck: as it was before, as it ended, and the points it passed."""

    template: Place
    ended: Place
    points: tuple[str, ...]


@pytest.fixture(scope="module")
def whole(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    base = tmp_path_factory.mktemp("whole")
    template = place(commands, base / "t")
    ended = template.moved(base / "e")
    with ended.answered():
        answer = ended.run(commands)
    assert answer.code == 0, answer.err
    assert {len(each) for each in ended.booked().values()} == {6}, "three charges a round, each once"
    return Whole(template, ended, answer.points)


def strike(commands: Commands, whole: Whole, folder: Path, hit: Strike) -> None:
    """Kill a cloud there, run it again by the same command, and compare all that it came to."""
    struck, ended = whole.template.moved(folder), whole.ended
    with struck.answered():
        assert struck.run(commands, strike=hit).code == -9
        again = struck.run(commands)
    assert again.code == 0, again.err
    assert same_releases(struck.site, ended.site)
    assert weights(struck.site.folder) == weights(ended.site.folder)
    assert charges(struck.site.folder) == charges(ended.site.folder)
    assert struck.booked() == ended.booked(), "devices are charged once"
    assert status(struck.site.config).witnesses == status(ended.site.config).witnesses
    assert not list(folder.rglob("*.part")), "nothing half-written is left"
    tally.note("kills of a cloud", "equal to the uninterrupted run")


def test_a_kill_at_telling_steps_of_the_cloud_changes_nothing(
    tmp_path: Path, commands: Commands, whole: Whole
) -> None:
    """Charged and not asked; witnesses noted and not released; a commit in half; the last one made."""
    name = whole.ended.site.folder.name
    ledger, journal = (
        [number for number, point in enumerate(whole.points) if point == f"write {name}/{file}"]
        for file in ("ledger.jsonl", "journal.jsonl")
    )
    hits = [Strike("after", ledger[0]), Strike("within", journal[-3]), Strike("after", journal[-2])]
    for number, hit in enumerate(hits):
        strike(commands, whole, tmp_path / str(number), hit)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_at_every_step_of_the_cloud_changes_nothing(
    tmp_path: Path, commands: Commands, whole: Whole, kind: Kind
) -> None:
    for number, point in enumerate(whole.points):
        if kind != "within" or point.startswith("write"):
            strike(commands, whole, tmp_path / str(number), Strike(kind, number))


def test_a_device_that_stands_still_is_left_out_and_back_in_the_next_round(
    tmp_path: Path, commands: Commands
) -> None:
    """SIGSTOP past the patience: what it answers when it goes on reaches nobody, and is paid for once."""
    found = place(commands, tmp_path / "s", patience=6)
    with awake([*found.homes.values()]):
        bob = found.homes["bob"].process
        bob.signal(SIGSTOP)
        first = found.run(commands, "--rounds", 1)
        bob.signal(SIGCONT)
        assert first.code == 0, first.err
        assert status(found.site.config).missing == ("bob",)
        second = found.run(commands)
        assert second.code == 0, second.err
    assert [release.devices for release in found.site.releases()] == [("ada", "cy"), NAMES]
    booked = [(each.unit, each.round, each.label) for each in found.booked()["bob"]]
    assert len(booked) == len(set(booked)) == 6


def test_a_restored_state_is_refused_for_its_witness_and_its_owner_is_told_loudly(
    tmp_path: Path, commands: Commands
) -> None:
    """A copy from before the first round is put back after it: no charge, no answer, exit code 3."""
    found = place(commands, tmp_path / "s")
    ada = found.homes["ada"]
    shutil.copytree(ada.owner.state, tmp_path / "copy")
    with awake([*found.homes.values()]):
        assert found.run(commands, "--rounds", 1).code == 0
        ada.stop()
        shutil.rmtree(ada.owner.state)
        shutil.copytree(tmp_path / "copy", ada.owner.state)
        assert ada.start()
        done = found.run(commands)
        assert done.code == 0, done.err
    assert status(found.site.config).refused == {"ada": Reason.WITNESS}
    assert [release.devices for release in found.site.releases()] == [NAMES, ("bob", "cy")]
    assert found.booked()["ada"] == []
    code, shown, said = ada.status()
    # In its round, and when the last teacher was to be delivered.
    assert (code, shown["refusals"]) == (3, {"witness": 2})
    assert "old copy" in said


def test_a_second_cloud_on_a_folder_is_refused_in_one_line(tmp_path: Path, commands: Commands) -> None:
    """The first has nobody to answer it, and is not disturbed."""
    found = site(tmp_path, "noised")
    words = ("cloud", "run", "--config", found.config)
    first = commands.start(*words)
    while "asking" not in first.said:
        assert not first.ended, first.said
        time.sleep(0.05)
    second = commands.run(*words)
    assert second.code == 2
    assert "is in use by another process" in second.err
    assert second.err.count("\n") == 1
    assert not first.ended
    first.signal(SIGTERM)
    assert commands.wait(first).code == 130
