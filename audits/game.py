"""The membership game on a finished run: who is in and who is out, and the device side replayed.

A finished run trained on all of its devices' records, so nobody was left out of it. The audited target is
therefore a **replay**: one device's student is trained again, under the run's own settings and noise scales,
from the teachers that the run published, on records that a seeded coin picked beforehand. The published
teachers are constants of the game, so the replay's only private input is what the coin decided, and its
privacy is what the ledger says of the run's mechanism: DP-SGD in every round, for the relation "add or
remove one record of one device".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from audits.canaries import Pool
from privkd.cohort import cohort_answers
from privkd.data.scenario import Device, LabelledSet
from privkd.federation import Game
from privkd.fitting import logits_of
from privkd.fleet import Fleet
from privkd.randomness import Randomness, SeededRandomness, derive_seed, seeded_generator
from privkd.reverse import bounded_answers
from privkd.transcript import Transcript

DEPLOYED = (
    "and is not audited: a replay trains on the devices' own records and writes their answers, which the "
    "ledger does not cover; audit a simulation of the same settings, or run "
    "`privkd audit mechanism`"
)
"""Why no audit replays a deployment."""

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
class DeviceSide:
    """A run's device side: all that is public about it, ready to be replayed.

    Attributes:
        game: the run's settings, data and plan.
        transcript: what crossed its wires: the published teachers and the queries.
        starts: the publicly distilled student of each round, ``[round][architecture]``.
    """

    game: Game
    transcript: Transcript
    starts: tuple[tuple[nn.Module, ...], ...]

    @classmethod
    def of(cls, game: Game, transcript: Transcript) -> "DeviceSide":
        """Distil each round's students from the teacher that was published in it, as the run did."""
        fresh_each_round = game.config.student.start == "teacher"
        rounds = transcript.exchanges if fresh_each_round else transcript.exchanges[:1]
        starts = tuple(tuple(game.public_students(each.teacher, round=each.round)) for each in rounds)
        return cls(game, transcript, starts)

    @property
    def rounds(self) -> int:
        """How many rounds the run finished."""
        return len(self.transcript.exchanges)

    def queries(self, round: int) -> Tensor:
        """The public inputs asked in one round ``[query, *shape]``."""
        proxy = self.game.scenario.proxy
        return proxy[self.transcript.exchanges[round].queries.to(proxy.device)]

    def baseline(self, round: int) -> Tensor:
        """The published teacher's probabilities on the round's queries ``[query, class]``."""
        return F.softmax(logits_of(self.transcript.exchanges[round].teacher, self.queries(round)), dim=-1)

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
        fleet = self._fleet(shards, range(len(shards)) if places is None else places)
        students: list[nn.Module] = []
        answers = []
        for round in range(self.rounds):
            if not students or self.game.config.student.start == "teacher":
                starts = self.starts[round]
                students = [starts[device % len(starts)] for device in devices]
            students = self._train(fleet, students, round, (seed, role), report)
            logits = fleet.answer(students, self.queries(round))
            kind = self.game.config.channel.sends
            answers.append(bounded_answers(logits, self.baseline(round), kind).cpu())
        return Replayed(tuple(students), torch.stack(answers, dim=1))

    def beside(self, others: Sequence[int], answers: Tensor) -> Tensor:
        """Of what the ``others`` would send, what reaches the channel beside the audited device.

        The audited device always answers, in the place of another where it was silent in the run. With it
        as many contribute to each round as to the run's smallest: the fewer, the less they hide it.

        Args:
            others: the numbers of all devices but the audited one.
            answers: theirs, ``[other, round, query, class]``.
        """
        names, exchanges = self.game.fleet.names, self.transcript.exchanges
        fewest = min(len(exchange.devices) for exchange in exchanges) - 1
        rounds = []
        for round, exchange in enumerate(exchanges):
            present = [row for row, number in enumerate(others) if names[number] in exchange.devices]
            rounds.append(answers[present[:fewest], round])
        return torch.stack(rounds, dim=1)

    @staticmethod
    def answer(students: Sequence[nn.Module], inputs: Tensor) -> Tensor:
        """Logits of students of one architecture on the CPU ``[student, record, class]``."""
        return cohort_answers(students, inputs).cpu()

    def _train(
        self,
        fleet: Fleet,
        students: Sequence[nn.Module],
        round: int,
        stream: tuple[int, str],
        report: Report,
    ) -> list[nn.Module]:
        seed, role = stream
        targets = fleet.teach(self.transcript.exchanges[round].teacher)
        count = len(fleet.devices)
        mechanism = self.game.mechanism

        def done(finished: int) -> None:
            report(round * count + finished, self.rounds * count)

        def randomness(name: str) -> Randomness:
            return SeededRandomness(seed, "audit", role, name, round)

        if mechanism is None:
            fit = self.game.config.student.private_fit
            return fleet.fit(students, targets, fit, derive_seed(seed, "audit", role, round), done)
        return fleet.train_private(students, targets, mechanism, randomness, done)

    def _fleet(self, shards: Sequence[LabelledSet], places: Sequence[int]) -> Fleet:
        devices = tuple(
            Device(f"replay-{place:04d}", shard, shard) for place, shard in zip(places, shards, strict=True)
        )
        return Fleet(devices, self.game.config.student)
