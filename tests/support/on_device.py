"""A published plan, the questions of its cloud, and devices that answer them in this process."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from running import small
from torch import Tensor

from privkd.data.scenario import LabelledSet
from privkd.deployment.agreement import agree
from privkd.deployment.device import DeviceProgram
from privkd.deployment.device_state import DeviceState
from privkd.deployment.owner import Owner
from privkd.deployment.published import PublishedPlan
from privkd.deployment.wire import Answer, Question, pack_question, unpack_answer
from privkd.messages import Task
from privkd.prepared import Prepared, prepare

NAME = "device-0000"
SECONDS = 10.0


@dataclass(frozen=True)
class Clouds:
    """The cloud's side of a small run.

    ``tasks`` are those of its rounds, all by the first teacher.
    """

    prepared: Prepared
    published: PublishedPlan
    tasks: tuple[Task, ...]

    @property
    def shard(self) -> LabelledSet:
        """The simulation's records of the first device."""
        return self.prepared.simulation.shards[0]

    def tensors(self, round: int) -> dict[str, Tensor]:
        """What a question of the round carries."""
        task = self.tasks[round]
        found = {"queries": task.question.queries, "prior": task.question.prior}
        for group, model in (("start", task.starts[0]), ("teacher", task.teacher)):
            found |= {f"{group}.{name}": weight for name, weight in model.state_dict().items()}
        return found

    def ask(
        self,
        round: int = 0,
        *,
        witness: str | None = None,
        invitation: bytes = b"",
        tensors: Mapping[str, Tensor] | None = None,
        **head: Any,
    ) -> bytes:
        """A question, with parts of it changed."""
        fields = {"run": self.published.digest, "device": NAME, "round": round, "witness": witness, **head}
        return pack_question(
            Question(**fields), self.tensors(round) if tensors is None else tensors, invitation
        )

    def delivered(self) -> dict[str, Tensor]:
        """What is delivered after the last round."""
        return {name: each for name, each in self.tensors(0).items() if "." in name}

    def delivery(self, **more: Any) -> bytes:
        """That as a question."""
        return self.ask(self.prepared.plan.rounds, **{"tensors": self.delivered()} | more)

    def write(self, folder: Path) -> Path:
        """The published plan in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.published.write(folder, self.prepared.scenario.proxy)
        return folder


@cache
def clouds(*overrides: str) -> Clouds:
    """That of small settings over the noised channel, with ``overrides``."""
    noised = ("channel.kind=noised", "privacy.device_epsilon=8", "reverse.queries=20")
    config = small(*noised, "student.engine=opacus", *overrides)
    prepared = prepare(config)
    names = prepared.simulation.names
    published = PublishedPlan.of(config, prepared.scenario, prepared.plan, names, SECONDS)
    cloud = prepared.cloud
    teacher = cloud.trained_teacher()
    tasks = tuple(cloud.publish(teacher, round) for round in range(config.rounds))
    return Clouds(prepared, published, tasks)


@dataclass
class Box:
    """A device in ``folder``: its owner, and its program as of the last start.

    ``clock`` is its Unix time, which passes while it sleeps alone.
    """

    folder: Path
    owner: Owner
    clock: float = 1_000_000.0
    log: list[dict[str, Any]] = field(default_factory=list)
    _state: DeviceState | None = None
    _program: DeviceProgram | None = None

    def start(self) -> None:
        """Open the state anew, as after a crash."""
        self.stop()
        self._state = DeviceState.open(self.owner)
        self._program = DeviceProgram(
            self.owner,
            self._state,
            lambda what: self.log.append(dict(what)),
            now=lambda: self.clock,
            sleep=self._sleep,
        )

    def stop(self) -> None:
        """Let the state go."""
        if self._state is not None:
            self._state.close()
        self._state = self._program = None

    @property
    def state(self) -> DeviceState:
        if self._state is None:
            self.start()
        assert self._state is not None
        return self._state

    def raw(self, message: bytes) -> bytes:
        """The answer's bytes."""
        _ = self.state
        assert self._program is not None
        return self._program.handle(message)

    def __call__(self, message: bytes) -> tuple[Answer, bytes]:
        """The answer's head, and what the channel gives the cloud."""
        return unpack_answer(self.raw(message))

    def _sleep(self, seconds: float) -> None:
        self.clock += seconds


def write_records(path: Path, shard: LabelledSet, divisor: float = 16.0) -> Path:
    """A shard as the file that an owner has: whole numbers, and labels by name."""
    raw = (shard.inputs * divisor).round().to(torch.uint8).numpy()
    np.savez(path, x=raw, y=shard.labels.numpy())
    return path


def box(
    folder: Path, cloud: Clouds, *, shard: LabelledSet | None = None, agreed: bool = True, **owner: Any
) -> Box:
    """A device with the simulation's records of the first device, or ``shard``."""
    folder.mkdir(parents=True, exist_ok=True)
    records = write_records(folder / "records.npz", cloud.shard if shard is None else shard)
    fields = {
        "name": NAME,
        "state": folder / "state",
        "socket": folder / "device.sock",
        "records": {"source": str(records)},
        "bounds": {"minimum_devices": 1},
    }
    made = Box(folder, Owner.model_validate(fields | owner))
    if agreed:
        agree(made.owner, cloud.write(folder / "plan"), cloud.published.digest)
    return made
