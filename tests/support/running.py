"""Small, fast runs of the whole loop, and what two of them have in common."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privkd.channels.channel import Channel, PlainChannel
from privkd.config import Config, load_config
from privkd.engines.simulation import Simulation
from privkd.federation import Federation
from privkd.fleet import SimulatedFleet
from privkd.messages import Question, Release
from privkd.plan import budgets
from privkd.prepared import Prepared
from privkd.privacy.ledger import Ledger
from privkd.progress import Silent
from privkd.run import train_in
from privkd.runs.fingerprints import UNKEPT
from privkd.runs.folder import RunFolder
from privkd.runs.result import Result

SMALL = (
    "channel.kind=plain",
    "controls=false",
    "data.devices=3",
    "data.records_per_device=30",
    "data.device_test_records=4",
    "data.proxy_records=40",
    "rounds=2",
    "teacher.model={name='mlp', width=8}",
    "teacher.fit.steps=30",
    "student.models=[{name='mlp', width=8}]",
    "student.public_fit.steps=10",
    "student.private_fit.steps=4",
    "student.dp.steps=3",
    "student.dp.part=all",
    "reverse.fit.steps=8",
    "reverse.tolerance=1.0",
)
"""Everything is accepted by the gate, so that every round leaves its mark on the teacher."""


def small(*overrides: str) -> Config:
    """Settings of a run of about a second."""
    return load_config(None, [*SMALL, *overrides])


def play(path: Path, *overrides: str, progress: Any = None) -> Result:
    """A new run in ``path``."""
    config = small(*overrides)
    with RunFolder.create(path, config) as folder:
        return train_in(config, folder, progress or Silent())


def resume(path: Path, progress: Any = None) -> Result:
    """The rest of the run in ``path``."""
    with RunFolder.resume(path) as folder:
        return train_in(folder.config, folder, progress or Silent(), resumed=True)


def weights(path: Path) -> dict[str, bytes]:
    """All weights and releases of a run, by file."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*.safetensors"))}


def _records(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return (json.loads(line)["record"] for line in lines)


def charges(path: Path) -> list[dict[str, Any]]:
    """Every charge in the ledger of a run, as it lies on the disk."""
    return [charge for record in _records(path / "ledger.jsonl") for charge in record.get("charges", ())]


def figures(path: Path) -> list[dict[str, Any]]:
    """The figures of every committed round."""
    return [record["figures"] for record in _records(path / "journal.jsonl") if record["step"] == "round"]


def outcome(path: Path) -> dict[str, Any]:
    """Whatever the seed decides: the result without its timings."""
    found = json.loads((path / "result.json").read_text())
    for name in ("run", "seconds"):
        del found[name]
    for party in ("teacher", "student"):
        del found[party]["latency_ms"]
    return found


def federation_of(prepared: Prepared, channel: Channel) -> Federation:
    """A run with a ledger that is on no disk."""
    ledger = Ledger(None, budgets(prepared.config))
    return Federation(prepared, ledger, channel, Silent(), fleet_of(prepared))


def fleet_of(prepared: Prepared) -> SimulatedFleet:
    """Its devices, of this process."""
    return SimulatedFleet(prepared, Silent(), UNKEPT)


class Watching:
    """A channel that notes what the ledger on the disk says at the moment of each release."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, list[dict[str, Any]]]] = []
        self.answers: list[Tensor] = []
        inner = PlainChannel.carry

        def carry(channel: PlainChannel, question: Question, answers: Tensor, devices: Any) -> Release:
            self.seen.append((question.round, charges(path)))
            self.answers.append(answers)
            return inner(channel, question, answers, devices)

        monkeypatch.setattr(PlainChannel, "carry", carry)


class Trained:
    """Notes every student that a run trains: ``rounds[round][device]`` are its weights by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rounds: list[list[dict[str, Tensor]]] = []
        inner = Simulation.train

        def train(simulation: Simulation, *arguments: Any) -> list[nn.Module]:
            students = inner(simulation, *arguments)
            self.rounds.append([copy.deepcopy(student.state_dict()) for student in students])
            return students

        monkeypatch.setattr(Simulation, "train", train)

    def values(self, round: int) -> Tensor:
        """All weights of all students after a round, in one row."""
        return torch.cat([tensor.flatten() for student in self.rounds[round] for tensor in student.values()])


class StopAt:
    """Interrupts a run where its stage number ``number`` begins; ``seen`` are the names of those before."""

    def __init__(self, number: int | None = None) -> None:
        self.number = number
        self.seen: list[str] = []

    def stage(self, name: str) -> None:
        if len(self.seen) == self.number:
            raise KeyboardInterrupt
        self.seen.append(name)

    def advance(self, done: int, total: int) -> None: ...

    def figures(self, **figures: float) -> None: ...


def same(one: Path, other: Path) -> bool:
    """Whether two runs are equal bit for bit in all that the seed decides."""
    return (
        weights(one) == weights(other)
        and charges(one) == charges(other)
        and figures(one) == figures(other)
        and outcome(one) == outcome(other)
    )
