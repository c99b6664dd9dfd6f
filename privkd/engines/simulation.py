"""A simulation: all devices of a run in this process, one by one or as one vectorised program.

One by one is `device.train` and `device.responses` for each device; vectorised is the same for equal
architectures at once, and computes the same. Students stay here as they stay on devices: of what they know
only uploads reach a channel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from privkd.config import FitConfig, StudentConfig
from privkd.data.scenario import Device, LabelledSet
from privkd.device import Draws as DeviceDraws
from privkd.device import between_both, responses, unlabelled
from privkd.messages import Question, Task
from privkd.models.architecture import group_by_architecture
from privkd.privacy.events import PartyId
from privkd.privacy.randomness import Randomness, seeded_generator
from privkd.training.dpsgd import Mechanism, fastest_mode, train_private, train_unprotected
from privkd.training.fit import check_finite, logits_of, logits_of_each
from privkd.training.vectorised import cohort_answers, fit_cohort, is_vectorised, train_cohort

RandomnessOf = Callable[[PartyId], Randomness]
"""The randomness of one device in one round."""

Report = Callable[[int], None]
"""Told how many devices are done."""

_COPIED = 256 << 20
"""Bytes of public inputs that a cohort may hold, which has a copy for each of its devices."""


@dataclass(frozen=True)
class Draws:
    """What the devices draw in one round: ``private`` under DP-SGD, else batches from ``seed`` and their
    names."""

    private: RandomnessOf
    seed: int

    def of(self, name: PartyId) -> DeviceDraws:
        """Those of one device."""
        return DeviceDraws(self.private(name), seeded_generator(self.seed, "fit", name))


@dataclass(frozen=True)
class Simulation:
    """The devices, and how their students are trained.

    ``config.engine`` is ``opacus`` for the reference path, one device after the other, or ``cohort`` for
    equal architectures as one program. Where ``names_diverged``, a student whose weights are not finite after
    DP-SGD ends the training by its device's name. Else it answers what a channel takes for zeros: a device
    budget knows no other way for a device to fail.
    """

    devices: tuple[Device, ...]
    config: StudentConfig
    names_diverged: bool = True

    @property
    def names(self) -> tuple[PartyId, ...]:
        """Who takes part, in order."""
        return tuple(device.name for device in self.devices)

    @property
    def shards(self) -> list[LabelledSet]:
        """The private training records, device by device."""
        return [device.train for device in self.devices]

    def part(self, numbers: Sequence[int]) -> "Simulation":
        """The devices of ``numbers`` alone."""
        return replace(self, devices=tuple(self.devices[number] for number in numbers))

    def present(self, silent: int, generator: torch.Generator) -> list[int]:
        """The devices that answer, by number: all but ``silent`` that ``generator`` draws."""
        order = torch.randperm(len(self.devices), generator=generator)
        return sorted(order[silent:].tolist())

    def goes_one_by_one(self, students: Sequence[nn.Module], mechanism: Mechanism) -> bool:
        """Whether some student can only be trained by plain autograd, one record after the other."""
        shard = max(self.shards, key=len)
        return any(
            not (self.config.engine == "cohort" and is_vectorised(student, shard, mechanism))
            and fastest_mode(student, shard.inputs, mechanism) == "autograd"
            for student in {id(student): student for student in students}.values()
        )

    def train(self, task: Task, starts: Sequence[nn.Module], draws: Draws, report: Report) -> list[nn.Module]:
        """Each device's student after its own training in the round: see `device.train`.

        Raises:
            TrainingError: a student's weights are not finite, and ``names_diverged`` or there is no DP-SGD.
        """
        targets = self.taught(task.teacher)
        if task.mechanism is None:
            return self.fit(starts, targets, self.config.private_fit, draws.seed, report)
        return self.train_private(starts, targets, task.mechanism, draws.private, report)

    def taught(self, teacher: nn.Module) -> list[Tensor] | None:
        """The published teacher's logits on each device's own records, computed on the device; ``None`` where
        ``alpha`` is 0, so that no student learns from them."""
        if not self.config.alpha:
            return None
        return logits_of_each(teacher, [shard.inputs for shard in self.shards])

    def respond(self, students: Sequence[nn.Module], question: Question) -> Tensor:
        """What each of ``students`` answers, bounded: ``[device, query, class]``. See `device.responses`."""
        if self.config.engine == "cohort":
            logits = cohort_answers(students, question.inputs)
        else:
            logits = torch.stack([logits_of(student, question.inputs) for student in students])
        return responses(logits, question)

    def train_private(
        self,
        students: Sequence[nn.Module],
        teacher_logits: Sequence[Tensor] | None,
        mechanism: Mechanism,
        randomness: RandomnessOf,
        report: Report,
    ) -> list[nn.Module]:
        """Each device's student after DP-SGD on its private records; see `student.train_private`.

        Raises:
            TrainingError: a student's weights are not finite, and ``names_diverged``.
        """
        sources = [randomness(name) for name in self.names]
        rate = mechanism.recipe.learning_rate
        if self.config.engine == "cohort":
            return self._in_groups(
                students,
                lambda chosen, done: train_cohort(
                    [students[i] for i in chosen],
                    [self.shards[i] for i in chosen],
                    None if teacher_logits is None else [teacher_logits[i] for i in chosen],
                    mechanism,
                    [sources[i] for i in chosen],
                    progress=lambda count: report(done + count),
                ),
                rate,
            )
        trained = []
        for i, (student, shard) in enumerate(zip(students, self.shards, strict=True)):
            targets = None if teacher_logits is None else teacher_logits[i]
            trained.append(train_private(student, shard, targets, mechanism, sources[i]))
            report(i + 1)
        return self._finite(trained, rate)

    def fit(
        self,
        students: Sequence[nn.Module],
        teacher_logits: Sequence[Tensor] | None,
        config: FitConfig,
        seed: int,
        report: Report,
    ) -> list[nn.Module]:
        """Each device's student after ordinary training on its records, without any protection.

        Raises:
            TrainingError: a student's weights are not finite.
        """
        generators = [seeded_generator(seed, "fit", name) for name in self.names]
        alpha, temperature = self.config.alpha, self.config.temperature
        if self.config.engine == "cohort":
            return self._in_groups(
                students,
                lambda chosen, done: fit_cohort(
                    [students[i] for i in chosen],
                    [self.shards[i] for i in chosen],
                    None if teacher_logits is None else [teacher_logits[i] for i in chosen],
                    config,
                    [generators[i] for i in chosen],
                    alpha=alpha,
                    temperature=temperature,
                    progress=lambda count: report(done + count),
                ),
                config.learning_rate,
            )
        trained = []
        for i, (student, shard) in enumerate(zip(students, self.shards, strict=True)):
            targets = None if teacher_logits is None else teacher_logits[i]
            trained.append(
                train_unprotected(
                    student, shard, targets, config, generators[i], alpha=alpha, temperature=temperature
                )
            )
            report(i + 1)
        return self._finite(trained, config.learning_rate)

    def merge(
        self,
        students: Sequence[nn.Module],
        teacher: nn.Module,
        starts: Sequence[nn.Module],
        inputs: Tensor,
        seed: int,
        report: Report,
    ) -> list[nn.Module]:
        """Each device's student and ``teacher`` in one student: see `device.merge`.

        Args:
            students: one for each device, with ``own_weight`` in the mean.
            teacher: the published one, with the rest.
            starts: the weights that each device starts from.
            inputs: public.
            seed: of the batches.
            report: see `Report`.

        Raises:
            TrainingError: a student's weights are not finite.
        """
        known, weight = logits_of(teacher, inputs), self.config.own_weight
        public = Simulation(
            tuple(replace(device, train=unlabelled(inputs)) for device in self.devices),
            self.config.model_copy(update={"alpha": 1.0, "temperature": 1.0}),
        )
        merged: list[nn.Module] = []
        for some in _runs_of(len(students), max(1, _COPIED // max(1, inputs.nbytes))):
            targets = [between_both(logits_of(students[i], inputs), known, weight) for i in some]
            merged += public.part(some).fit(
                [starts[i] for i in some],
                targets,
                self.config.delivery_fit,
                seed,
                _continued(report, some.start),
            )
        return merged

    def _in_groups(
        self,
        students: Sequence[nn.Module],
        train: Callable[[Sequence[int], int], list[nn.Module]],
        learning_rate: float,
    ) -> list[nn.Module]:
        trained: dict[int, nn.Module] = {}
        for chosen in group_by_architecture(students):
            trained.update(zip(chosen, train(chosen, len(trained)), strict=True))
        return self._finite([trained[i] for i in range(len(students))], learning_rate)

    def _finite(self, students: list[nn.Module], learning_rate: float) -> list[nn.Module]:
        for name, student in zip(self.names, students, strict=True) if self.names_diverged else ():
            check_finite(student, f"the student of {name}", learning_rate)
        return students


def _runs_of(count: int, length: int) -> list[range]:
    """The numbers below ``count``, ``length`` at a time."""
    return [range(start, min(start + length, count)) for start in range(0, count, length)]


def _continued(report: Report, before: int) -> Report:
    """``report`` for devices of which ``before`` are done already."""
    return lambda done: report(before + done)
