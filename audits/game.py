"""The membership game on a finished run: who is in and who is out, and the device side replayed.

A finished run trained on all of its devices' records, so nobody was left out of it. The audited target is
therefore a **replay**: one device's student is trained again, under the run's own settings and noise scales,
from the teachers that the run published, on records that a seeded coin picked beforehand: natural ones,
mislabelled ones, or crafted worst cases. The published teachers are constants of the run, so the replay's
only private input is what the coin decided, and its privacy is what the ledger says of the run's mechanism:
DP-SGD in every round, for the relation "add or remove one record of one device". What replays leave behind is
kept in the run's folder, so that no shadow is trained twice.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from audits.estimators.validation import Floats
from audits.requests import CanaryKind
from privkd.data.scenario import Device, LabelledSet, Scenario
from privkd.engines.simulation import Draws, Simulation
from privkd.errors import ConfigError, DataError, RunError
from privkd.messages import Question, Task
from privkd.prepared import Prepared, reopen_simulation
from privkd.privacy.events import Unit
from privkd.privacy.randomness import Randomness, SeededRandomness, derive_seed, seeded_generator
from privkd.runs.checkpoint import Transcript
from privkd.runs.folder import RunFolder, versions
from privkd.training.vectorised import cohort_answers

_LEAST_CANDIDATES = 8
_FAR = 3.0
"""Scale of an outlier: well outside the range of the records."""


@dataclass(frozen=True)
class Pool:
    """The records of one device's game.

    Attributes:
        candidates: each is in or out of a training set by its own fair coin.
        always: in every training set.
        population: in none, and never guessed: what non-members look like.
    """

    candidates: LabelledSet
    always: LabelledSet
    population: LabelledSet


def draw_pool(scenario: Scenario, device: int, kind: str, seed: int) -> Pool:
    """The game's records for the device of this number.

    ``natural``: the device's own records and as many held-out ones. As a coin decides about each alike, a
    difference between the two kinds tells an attack nothing. ``mislabelled`` and ``crafted``: half of the
    device's records are always in, and as many canaries as it has records are candidates, so that a training
    set has about the size of the device's own.

    Raises:
        ConfigError: no such device or kind.
        DataError: too few records to play with.
    """
    if not 0 <= device < len(scenario.devices):
        raise ConfigError(f"device={device}: expected 0 to {len(scenario.devices) - 1}")
    if kind not in get_args(CanaryKind):
        raise ConfigError(f"canaries={kind!r}: expected one of {sorted(get_args(CanaryKind))}")
    generator = seeded_generator(seed, "audit", "pool", device)
    own = scenario.devices[device].train
    held_out = _shuffled(_joined(scenario.test, scenario.devices[device].test), generator)
    count = min(len(own), len(held_out) // 2)
    if count < _LEAST_CANDIDATES:
        raise DataError(
            f"device {device} has {len(own)} records and the source {len(held_out)} held-out ones: the "
            f"game needs at least {_LEAST_CANDIDATES} of the first and twice as many of the second"
        )
    drawn, population = _part(held_out, slice(0, count)), _part(held_out, slice(count, None))
    if kind == "natural":
        return Pool(_joined(own, drawn), _part(own, slice(0, 0)), population)
    always = _part(_shuffled(own, generator), slice(0, len(own) // 2))
    wrong = _other_labels(drawn.labels, scenario.classes, generator)
    inputs = drawn.inputs if kind == "mislabelled" else _crafted(drawn.inputs, generator)
    return Pool(LabelledSet(inputs, wrong), always, population)


def _crafted(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform noise, blank inputs of distinct levels, and negatives far out of range, a third each.

    Of token ids: ids drawn from the records', one id over and over, and records made of others' halves.
    """
    if not inputs.is_floating_point():
        return _crafted_tokens(inputs, generator)
    crafted = torch.rand(inputs.shape, generator=generator).to(inputs)
    crafted[1::3] = torch.linspace(-1, 2, len(crafted[1::3])).view(-1, *[1] * (inputs.ndim - 1)).to(inputs)
    crafted[2::3] = _FAR * (1 - 2 * inputs[2::3])
    return crafted


def _other_labels(labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """A wrong label for each record, uniformly."""
    step = torch.randint(1, classes, labels.shape, generator=generator).to(labels.device)
    return (labels + step) % classes


def _crafted_tokens(ids: Tensor, generator: torch.Generator) -> Tensor:
    known = ids.unique().cpu()
    crafted = known[torch.randint(len(known), ids.shape, generator=generator)].to(ids)
    repeated = known[torch.randperm(len(known), generator=generator)].to(ids)
    thirds = [len(crafted[start::3]) for start in range(3)]
    crafted[1::3] = repeated[torch.arange(thirds[1]) % len(known)].view(-1, *[1] * (ids.ndim - 1))
    half = ids.shape[1] // 2
    crafted[2::3, :half] = ids[2::3, :half].flip(0)
    crafted[2::3, half:] = ids[2::3, half:]
    return crafted


def _joined(first: LabelledSet, second: LabelledSet) -> LabelledSet:
    return LabelledSet(torch.cat([first.inputs, second.inputs]), torch.cat([first.labels, second.labels]))


def _part(records: LabelledSet, chosen: slice | Tensor) -> LabelledSet:
    return LabelledSet(records.inputs[chosen], records.labels[chosen])


def _shuffled(records: LabelledSet, generator: torch.Generator) -> LabelledSet:
    order = torch.randperm(len(records), generator=generator).to(records.labels.device)
    return _part(records, order)


_DEPLOYED = (
    "and is not audited: a replay trains on the devices' own records and writes their answers, which the "
    "ledger does not cover; audit a simulation of the same settings, or run "
    "`privkd audit mechanism`"
)
"""Why no audit replays a deployment."""

_PERSONS = (
    "privacy.unit='person', and this audit guesses single records, of which the run promises something else: "
    "rest on the audit of persons that ended it, or audit a run of unit record"
)

Role: TypeAlias = Literal["target", "shadow"]
Report: TypeAlias = Callable[[int, int], None]
"""Told how many steps are done, of how many."""


def flip_coins(seed: int, models: int, candidates: int) -> NDArray[np.bool_]:
    """Who is in a target, bool ``[model, candidate]``: independent fair coins.

    A model's coins do not depend on how many models there are.
    """
    flips = [
        torch.rand(candidates, generator=seeded_generator(seed, "audit", "coin", model)) < 0.5
        for model in range(models)
    ]
    return np.asarray(torch.stack(flips).numpy(), dtype=np.bool_)


def draw_halves(seed: int, models: int, candidates: int) -> NDArray[np.bool_]:
    """Who is in a shadow, bool ``[model, candidate]``: each candidate in a random half of the models.

    Shadows are the attacker's own, so their coins need not be independent, and halves leave no candidate
    without models on a side.
    """
    draws = torch.rand((models, candidates), generator=seeded_generator(seed, "audit", "halves"))
    ranks = draws.argsort(dim=0).argsort(dim=0)
    return np.asarray((ranks < models // 2).numpy(), dtype=np.bool_)


def shard_of(pool: Pool, inside: NDArray[np.bool_]) -> LabelledSet:
    """The training records of one model, given its coins ``[candidate]``."""
    chosen = torch.from_numpy(inside).to(pool.candidates.labels.device)
    return LabelledSet(
        torch.cat([pool.always.inputs, pool.candidates.inputs[chosen]]),
        torch.cat([pool.always.labels, pool.candidates.labels[chosen]]),
    )


def reopen_run(folder: RunFolder) -> Prepared:
    """The run in ``folder``, for an audit that replays it and guesses records.

    Raises:
        RunError: as `reopen_simulation`; or it protects persons.
    """
    run = reopen_simulation(folder, _DEPLOYED)
    if run.plan.unit is Unit.PERSON:
        raise RunError(f"{folder.path}: {_PERSONS}")
    return run


@dataclass(frozen=True)
class Replayed:
    """What replayed devices did.

    Attributes:
        students: after the last round.
        answers: bounded, before the channel: float32 ``[model, round, query, class]``.
    """

    students: tuple[nn.Module, ...]
    answers: Tensor


@dataclass(frozen=True)
class ReplayContext:
    """A run's device side: all that is public about it, ready to be replayed.

    Attributes:
        run: its settings, data and plan.
        transcript: what crossed its wires: the published teachers, the queries and the releases.
        tasks: what was published in each round.
    """

    run: Prepared
    transcript: Transcript
    tasks: tuple[Task, ...]

    @classmethod
    def of(cls, run: Prepared, transcript: Transcript) -> "ReplayContext":
        """Distil each round's students from the teacher that was published in it, as the run did."""
        tasks = tuple(run.cloud.publish(each.teacher, each.round) for each in transcript.exchanges)
        return cls(run, transcript, tasks)

    @property
    def rounds(self) -> int:
        """How many rounds the run finished."""
        return len(self.tasks)

    @property
    def last_starts(self) -> tuple[nn.Module, ...]:
        """The students of each architecture that were last distilled from a teacher on public data alone."""
        return next(task.starts for task in reversed(self.tasks) if task.starts)

    def question(self, round: int) -> Question:
        """What was asked in one round."""
        return self.tasks[round].question

    def replay(
        self,
        shards: Sequence[LabelledSet],
        devices: Sequence[int],
        seed: int,
        role: str,
        report: Report,
        places: Sequence[int] | None = None,
    ) -> Replayed:
        """Play all rounds for one device a shard, as one vectorised program.

        Args:
            shards: the training records of each.
            devices: the number of the run's device that each stands for, which decides its architecture.
            seed: of the replays' own noise and samples.
            role: names the replays' random streams, with their ``places``.
            report: see `Report`.
            places: equal ones share one random stream. ``None``: their place in ``shards``.
        """
        replayed = _devices(shards, range(len(shards)) if places is None else places)
        simulation = Simulation(replayed, self.run.config.student)
        students: list[nn.Module] = []
        answers = []
        for round, task in enumerate(self.tasks):
            starts = task.dealt(devices, students)
            done = partial(self._done, round, len(shards), report)
            students = simulation.train(task, starts, _draws(seed, role, round), done)
            answers.append(simulation.respond(students, task.question).cpu())
        return Replayed(tuple(students), torch.stack(answers, dim=1))

    def _done(self, round: int, devices: int, report: Report, finished: int) -> None:
        report(round * devices + finished, self.rounds * devices)

    def beside(self, others: Sequence[int], answers: Tensor) -> Tensor:
        """Of what the ``others`` would send, what reaches the channel beside the audited device.

        The audited device always answers, in the place of another where it was silent in the run. With it
        as many contribute to each round as to the run's smallest: the fewer, the less they hide it.

        Args:
            others: the numbers of all devices but the audited one.
            answers: theirs, ``[other, round, query, class]``.
        """
        names = self.run.simulation.names
        contributors = [exchange.release.devices for exchange in self.transcript.exchanges]
        fewest = min(len(devices) for devices in contributors) - 1
        rounds = []
        for round, devices in enumerate(contributors):
            present = [row for row, number in enumerate(others) if names[number] in devices]
            rounds.append(answers[present[:fewest], round])
        return torch.stack(rounds, dim=1)

    @staticmethod
    def answer(students: Sequence[nn.Module], inputs: Tensor) -> Tensor:
        """Logits of students of one architecture on the CPU ``[student, record, class]``."""
        return cohort_answers(students, inputs).cpu()


def _devices(shards: Sequence[LabelledSet], places: Sequence[int]) -> tuple[Device, ...]:
    return tuple(
        Device(f"replay-{place:04d}", shard, shard) for place, shard in zip(places, shards, strict=True)
    )


def _draws(seed: int, role: str, round: int) -> Draws:
    """What replays of one ``role`` draw in one round."""

    def randomness(name: str) -> Randomness:
        return SeededRandomness(seed, "audit", role, name, round)

    return Draws(randomness, derive_seed(seed, "audit", role, round))


_FORMAT = 4
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


def traces(side: ReplayContext, pool: Pool, cache: Cache, role: Role, models: int, report: Report) -> Traces:
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


def others_answers(side: ReplayContext, cache: Cache, report: Report) -> Tensor:
    """What the run's other devices send in a replay on their own records ``[other, round, query, class]``.

    Of those that fell silent in a round there is nothing in it: see `ReplayContext.beside`.
    """
    devices = side.run.scenario.devices
    chosen = [number for number in range(len(devices)) if number != cache.key.device]

    def compute() -> dict[str, Tensor]:
        shards = [devices[number].train for number in chosen]
        return {"answers": side.replay(shards, chosen, cache.key.seed, "other", report).answers}

    if not chosen:
        return torch.zeros((0, side.rounds, *side.question(0).prior.shape))
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
