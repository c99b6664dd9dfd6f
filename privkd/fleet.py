"""Who takes part in a run, however they are reached: a task goes to them, and a release comes back.

`SimulatedFleet` plays all of them in this process. Devices elsewhere are `privkd.deployment.remote`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from privkd.channels.channel import Channel
from privkd.engines.simulation import Simulation
from privkd.messages import Question, Release, Task
from privkd.prepared import Prepared
from privkd.privacy.events import PartyId
from privkd.privacy.randomness import seeded_generator
from privkd.privacy.votes import VoteRule, data_dependent_rdp, rdp_epsilon
from privkd.progress import Progress
from privkd.runs.checkpoint import State
from privkd.runs.fingerprints import Notes, check_repeats

_SLOWLY = ", one record at a time: no faster computation gives this student's own gradients"


class Fleet(Protocol):
    """The devices of a run. Whatever they are asked for was charged before; without the channel they release
    nothing."""

    @property
    def names(self) -> tuple[PartyId, ...]:
        """Who may take part, in order: a device's number is its place."""
        ...

    def release(
        self, task: Task, students: Sequence[nn.Module], channel: Channel
    ) -> tuple[Release, tuple[nn.Module, ...]]:
        """Have the devices do ``task`` and answer over ``channel``.

        Args:
            task: of the round.
            students: those of the round before, as far as they are here.
            channel: the run's.

        Returns:
            What the cloud sees, and the students after the round, as far as they are here.

        Raises:
            ChannelError: the release failed; nothing was released, and the round may be asked for again.
            TrainingError: a student's weights are not finite.
        """
        ...

    def again(self, state: State, teachers: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
        """The students with which devices go on after an interruption, as far as they are here.

        Args:
            state: the last that was committed.
            teachers: those published in its rounds.

        Raises:
            RunError: they would answer otherwise than in their last round; nothing was released.
        """
        ...


@dataclass(frozen=True)
class SimulatedFleet:
    """All devices of a run, played by this process.

    Attributes:
        prepared: the run.
        progress: told of each step.
        notes: of the run's folder, by which a repeated round is known again.
    """

    prepared: Prepared
    progress: Progress
    notes: Notes

    @property
    def names(self) -> tuple[PartyId, ...]:
        """See `Fleet.names`."""
        return self._devices.names

    def release(
        self, task: Task, students: Sequence[nn.Module], channel: Channel
    ) -> tuple[Release, tuple[nn.Module, ...]]:
        """See `Fleet.release`. Raises `RunError` where a repeated round comes out otherwise."""
        round = task.question.round
        trained = self._train(task, students)
        self._stage(round, f"{self.prepared.config.channel.kind} channel")
        names, blocks = self._answers(task.question, trained)
        check_repeats(self.notes, self.prepared.root, round, names, blocks)
        release = channel.carry(task.question, blocks, names)
        if self.prepared.plan.votes is not None:
            voted = torch.tensor([name in release.devices for name in names])
            self._report_votes(blocks[voted.to(blocks.device)], release, self.prepared.plan.votes)
        return release, tuple(trained)

    def again(self, state: State, teachers: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
        """See `Fleet.again`: trained again.

        They repeat their last round's noise, so other ones would show what the noise had hidden.
        """
        students = self.prepared.students_after(teachers)
        if state.releases:
            release, last = state.releases[-1], state.round - 1
            proxy = self.prepared.cloud.data.proxy
            queries = release.queries.to(proxy.device)
            prior, kind = release.baseline.to(proxy.device), self.prepared.config.channel.sends
            question = Question(last, queries, proxy[queries], prior, kind)
            check_repeats(self.notes, self.prepared.root, last, *self._answers(question, students))
        return students

    def _train(self, task: Task, before: Sequence[nn.Module]) -> list[nn.Module]:
        devices, round = self._devices, task.question.round
        total = len(devices.devices)
        starts = task.dealt(range(total), before)
        slow = task.mechanism is not None and devices.goes_one_by_one(starts, task.mechanism)
        self._stage(round, f"training students on their devices{_SLOWLY if slow else ''}")
        return devices.train(
            task, starts, self.prepared.draws(round), lambda done: self.progress.advance(done, total)
        )

    def _answers(
        self, question: Question, students: Sequence[nn.Module]
    ) -> tuple[tuple[PartyId, ...], Tensor]:
        """Who answers, and what: bounded, ``[device, query, class]``, before the channel."""
        config, devices = self.prepared.config, self._devices
        silence = seeded_generator(config.seed, "silence", question.round)
        present = devices.present(config.silent_devices, silence)
        blocks = devices.respond([students[number] for number in present], question)
        return tuple(devices.names[number] for number in present), blocks

    def _report_votes(self, votes: Tensor, release: Release, rule: VoteRule) -> None:
        """Say how many queries were answered, and in a simulation what that cost given the votes: private."""
        answered = {"answered": float(release.answers.any(-1).sum())}
        if self.prepared.simulated:
            counts = votes.cpu().sum(0).to(torch.int64).numpy()
            rdp = data_dependent_rdp(counts, rule, self.prepared.config.channel.aggregators)
            if rdp is not None:
                answered["epsilon_votes"] = rdp_epsilon(rdp, self.prepared.plan.delta)
        self.progress.figures(**answered)

    @property
    def _devices(self) -> Simulation:
        return self.prepared.simulation

    def _stage(self, round: int, what: str) -> None:
        self.progress.stage(f"round {round + 1} of {self.prepared.plan.rounds}: {what}")
