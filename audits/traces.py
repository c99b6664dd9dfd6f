"""What the replays left behind, as arrays, kept in the run's folder so that no shadow is trained twice."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from audits.canaries import Pool
from audits.game import DeviceSide, Report, Role, draw_halves, flip_coins, shard_of
from audits.release import Floats
from privkd.data.scenario import LabelledSet
from privkd.errors import RunError
from privkd.store import RunFolder, versions

_FORMAT = 3
"""Raised whenever the same key would name other arrays."""


@dataclass(frozen=True)
class GameKey:
    """Everything that determines a replay, beside the run itself."""

    canaries: str
    device: int
    seed: int


@dataclass(frozen=True)
class Traces:
    """What models of one role did.

    Attributes:
        inside: bool ``[model, candidate]``, how the coins fell.
        answers: bounded, before the channel, float32 ``[model, round, query, class]``.
        candidates: the student's logits on the candidates ``[model, candidate, class]``.
        population: likewise on the population.
    """

    inside: NDArray[np.bool_]
    answers: Tensor
    candidates: Floats
    population: Floats


@dataclass(frozen=True)
class Cache:
    """Arrays by what determines them, under ``audit/`` in the run's folder."""

    folder: RunFolder
    key: GameKey

    def tensors(
        self, what: Mapping[str, str | int], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The tensors of ``what``, read back where they were computed before."""
        text = json.dumps(
            {**what, "game": vars(self.key), "format": _FORMAT, "run": self._run(), "with": versions()},
            sort_keys=True,
        )
        name = f"audit/{what['what']}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        digest = self.folder.path / f"{name}.sha256"
        try:
            return self.folder.load(f"{name}.safetensors", digest.read_text().strip())
        except (OSError, RunError):
            computed = compute()
            self.folder.write_text(f"{name}.sha256", self.folder.save(f"{name}.safetensors", computed) + "\n")
            return computed

    def _run(self) -> str:
        """The journal names the digests of the settings and of every file of the run."""
        rounds = [record for record in self.folder.journal if record.get("step") in ("started", "round")]
        return json.dumps(rounds, sort_keys=True)


def traces(side: DeviceSide, pool: Pool, cache: Cache, role: Role, models: int, report: Report) -> Traces:
    """Replay ``models`` devices on halves of the pool, or read them back."""
    seed = cache.key.seed
    draw = flip_coins if role == "target" else draw_halves
    inside = draw(seed, models, len(pool.candidates))

    def compute() -> dict[str, Tensor]:
        shards = [shard_of(pool, coins) for coins in inside]
        replayed = side.replay(shards, [cache.key.device] * models, seed, role, report)
        answer = side.answer
        return {
            "answers": replayed.answers,
            "candidates": answer(replayed.students, pool.candidates.inputs),
            "population": answer(replayed.students, pool.population.inputs),
        }

    records = _digest(pool.candidates, pool.always, pool.population)
    found = cache.tensors({"what": role, "models": models, "records": records}, compute)
    return Traces(inside, found["answers"], _floats(found["candidates"]), _floats(found["population"]))


def others_answers(side: DeviceSide, cache: Cache, report: Report) -> Tensor:
    """What the run's other devices send in a replay on their own records ``[other, round, query, class]``.

    Of those that fell silent in a round there is nothing in it: see `DeviceSide.beside`.
    """
    devices = side.game.scenario.devices
    chosen = [number for number in range(len(devices)) if number != cache.key.device]

    def compute() -> dict[str, Tensor]:
        shards = [devices[number].train for number in chosen]
        return {"answers": side.replay(shards, chosen, cache.key.seed, "other", report).answers}

    if not chosen:
        exchanges = side.transcript.exchanges
        query, classes = len(exchanges[0].queries), side.game.scenario.classes
        return torch.zeros((0, len(exchanges), query, classes))
    records = _digest(*(devices[number].train for number in chosen))
    answers = cache.tensors({"what": "others", "records": records}, compute)["answers"]
    return side.beside(chosen, answers)


def _digest(*sets: LabelledSet) -> str:
    """Of the records that are replayed: those under the run's settings may have changed since the run."""
    digest = hashlib.sha256()
    for tensor in (tensor for records in sets for tensor in (records.inputs, records.labels)):
        digest.update(str((tensor.shape, tensor.dtype)).encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _floats(values: Tensor) -> Floats:
    return np.asarray(values.to(torch.float64).numpy(), dtype=np.float64)
