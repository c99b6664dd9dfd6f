"""A run between two rounds, and its way to the disk and back."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from privkd.controls import NoDeviceTeachers
from privkd.errors import RunError
from privkd.journal import Head
from privkd.messages import Release
from privkd.privacy.events import PartyId
from privkd.records import record_of
from privkd.runs.folder import RunFolder, prefixed, restore
from privkd.runs.result import RoundFigures, RoundRecord


@dataclass(frozen=True)
class State:
    """A run after ``len(figures) - 1`` rounds; ``figures[0]`` is before the first.

    Attributes:
        teacher: the cloud's model.
        no_devices: the same without any device.
        releases: all so far, oldest first.
        figures: see `RoundFigures`.
    """

    teacher: nn.Module
    no_devices: NoDeviceTeachers
    releases: tuple[Release, ...]
    figures: tuple[RoundFigures, ...]

    @property
    def round(self) -> int:
        """The next round's number, from 0."""
        return len(self.figures) - 1


@dataclass(frozen=True)
class Exchange:
    """One round on the wire.

    Attributes:
        round: its number, from 0.
        teacher: the model that the cloud published to the devices.
        release: what it received.
    """

    round: int
    teacher: nn.Module
    release: Release


@dataclass(frozen=True)
class Transcript:
    """Every exchange of a run, in order, and the teacher that came of them."""

    exchanges: tuple[Exchange, ...]
    final_teacher: nn.Module


def commit(folder: RunFolder, state: State, ledger: Head | None) -> None:
    """Make ``state`` what a resumed run continues from. Durable on return.

    All that is written is what the cloud holds. From a student's weights a reader of the folder could compute
    what its device answered, whatever the channel hid.
    """
    place = f"rounds/{state.round:03d}"
    files = {
        "cloud": folder.save(
            f"{place}/cloud.safetensors",
            {
                **prefixed("teacher", state.teacher),
                **prefixed("self_distilled", state.no_devices.self_distilled),
                **prefixed("labels_only", state.no_devices.labels_only),
            },
        ),
    }
    devices: tuple[PartyId, ...] = ()
    if state.releases:
        release = state.releases[-1]
        tensors = {"queries": release.queries, "answers": release.answers, "baseline": release.baseline}
        tensors["noise_std"] = torch.tensor(release.noise_std, dtype=torch.float64)
        files["wire"] = folder.save(f"{place}/wire.safetensors", tensors)
        devices = release.devices
    measured = asdict(state.figures[-1])
    del measured["devices"]  # by name, in the record
    record = RoundRecord(number=state.round, files=files, devices=devices, measured=measured, ledger=ledger)
    folder.journal.append(record.tree())


@dataclass(frozen=True)
class Saved:
    """What the journal says of a run."""

    rounds: tuple[RoundRecord, ...]

    @property
    def ledger(self) -> Head | None:
        """How far the ledger must reach at least."""
        return self.rounds[-1].ledger if self.rounds else None


def saved(folder: RunFolder) -> Saved:
    """What was committed to ``folder``.

    Raises:
        RunError: a record is damaged.
    """
    journal = folder.journal
    rows = [record for record in journal if record.get("step") == "round"]
    rounds = tuple(record_of(RoundRecord, row, journal.path) for row in rows)
    if any(round.number != number for number, round in enumerate(rounds)):
        raise RunError(f"{journal.path}: rounds are missing; restore it from a copy")
    return Saved(rounds)


@contextmanager
def _of_this_form(path: Path) -> Iterator[None]:
    """Turn what a record of another form leads to into one line."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"{path} is not of this version's form ({error!r}): restore it from a copy") from None


def load_state(folder: RunFolder, record: Saved, teacher: nn.Module) -> State:
    """The last committed state. ``teacher`` is a model of its architecture.

    Raises:
        RunError: a file is missing, damaged, or of other models.
    """
    last = record.rounds[-1]
    cloud = _load(folder, last, "cloud")
    kept = partial(_kept, teacher, cloud)
    return State(
        teacher=kept("teacher"),
        no_devices=NoDeviceTeachers(kept("self_distilled"), kept("labels_only")),
        releases=tuple(_release(folder, round) for round in record.rounds[1:]),
        figures=tuple(round.figures for round in record.rounds),
    )


def load_teachers(folder: RunFolder, record: Saved, teacher: nn.Module) -> list[nn.Module]:
    """The teacher after each committed round, so the one published in the next.

    Raises:
        RunError: a file is missing, damaged, or of another model.
    """
    return [_kept(teacher, _load(folder, round, "cloud"), "teacher") for round in record.rounds]


def load_transcript(folder: RunFolder, teacher: nn.Module) -> Transcript:
    """All that crossed the wire in a run, for attacks. ``teacher`` is a model of its architecture.

    Raises:
        RunError: a file is missing or damaged.
    """
    record = saved(folder)
    teachers = load_teachers(folder, record, teacher)
    if not teachers:
        raise RunError(f"{folder.path}: no round was finished; resume it with --resume {folder.path}")
    releases = [_release(folder, round) for round in record.rounds[1:]]
    exchanges = map(Exchange, range(len(releases)), teachers, releases)
    return Transcript(tuple(exchanges), teachers[-1])


def _kept(like: nn.Module, cloud: Mapping[str, Tensor], name: str) -> nn.Module:
    return restore(copy.deepcopy(like), cloud, name)


def _load(folder: RunFolder, round: RoundRecord, name: str) -> dict[str, Tensor]:
    return folder.load(f"rounds/{round.number:03d}/{name}.safetensors", round.files[name])


def _release(folder: RunFolder, round: RoundRecord) -> Release:
    tensors = _load(folder, round, "wire")
    with _of_this_form(folder.path / f"rounds/{round.number:03d}/wire.safetensors"):
        return Release(
            tensors["queries"],
            tensors["answers"],
            tensors["baseline"],
            float(tensors["noise_std"]),
            round.devices,
        )
