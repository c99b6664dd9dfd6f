"""A cohort of students, how their gradients are computed, and their training in chunks."""

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from privkd.architecture import same_architecture
from privkd.cohort.batches import Records, joined
from privkd.cohort.chunks import chunk_students, flushed_denormals, records_per_pass
from privkd.cohort.objective import Objective
from privkd.cohort.planning import Plan, plan_of
from privkd.cohort.weights import Weights
from privkd.data.scenario import LabelledSet
from privkd.errors import DataError, ModelError
from privkd.frontend import Parted
from privkd.proof import Probe


@dataclass(frozen=True)
class Students:
    """Models of one architecture, the shard of each, and the teacher's answers on it.

    ``models`` are what follows the students' front end, if they have one; ``parted`` is the first student
    as its two parts.
    """

    parted: Parted
    models: tuple[nn.Module, ...]
    shards: tuple[LabelledSet, ...]
    teacher_logits: tuple[Tensor, ...] | None

    @staticmethod
    def of(
        models: Sequence[nn.Module],
        shards: Sequence[LabelledSet],
        teacher_logits: Sequence[Tensor] | None,
        sources: Sized,
    ) -> "Students":
        """Check that the sequences fit each other.

        Raises:
            DataError: they differ in length.
            ModelError: the models differ in architecture.
        """
        targets = models if teacher_logits is None else teacher_logits
        for name, given in (("shards", shards), ("teacher logits", targets), ("sources", sources)):
            if len(given) != len(models):
                raise DataError(f"{len(models)} students, but {len(given)} {name}: give one for each student")
        if not same_architecture(models):
            raise ModelError("the students differ in architecture: train each architecture by itself")
        return Students(
            Parted.of(models[0]) if models else Parted(None, nn.Identity()),
            tuple(Parted.of(model).rest for model in models),
            tuple(shards),
            None if teacher_logits is None else tuple(teacher_logits),
        )

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.models[0].parameters()).device

    def targets(self, student: int) -> Tensor | None:
        """The teacher's logits on one student's shard."""
        return None if self.teacher_logits is None else self.teacher_logits[student]

    def part(self, chosen: Sequence[int]) -> "Students":
        """Some of the students."""
        logits = self.teacher_logits
        return replace(
            self,
            models=tuple(self.models[i] for i in chosen),
            shards=tuple(self.shards[i] for i in chosen),
            teacher_logits=None if logits is None else tuple(logits[i] for i in chosen),
        )

    def weights(self, trained: frozenset[str]) -> Weights:
        """A copy of the parameters; ``trained`` names those in training."""
        return Weights.stack(self.models, trained)

    def records(self, plan: Plan) -> Records:
        """The shards on the models' device, as the models take them."""
        inputs = joined([self.parted.features(shard.inputs) for shard in self.shards]).to(self.device)
        labels = joined([shard.labels for shard in self.shards]).to(self.device)
        logits = None if self.teacher_logits is None else joined(self.teacher_logits).to(self.device)
        targets = plan.gradients.objective.targets(labels, logits, plan.classes, inputs.dtype)
        return Records.of(inputs, targets, [len(shard) for shard in self.shards])

    @cached_property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input of the models; from the largest shard, since an empty one may have lost it."""
        inputs = max(self.shards, key=len).inputs
        return tuple(self.parted.features(inputs.new_zeros((1, *inputs.shape[1:]))).shape[1:])

    def plan(
        self,
        objective: Objective,
        clip_norm: float | None,
        trained: Callable[[nn.Module], Sequence[nn.Parameter]],
        probe: Probe | None = None,
    ) -> Plan | None:
        """How to train the students as one program; ``None`` if their architecture allows none.

        ``probe``: records for the proof, as the whole students take them.
        """
        if not self.models or not _same_buffers(self.models):
            return None
        model = self.models[0]
        if probe is not None and self.parted.front is not None:
            probe = probe.through(self.parted.features)
        kept = {id(parameter) for parameter in trained(model)}
        names = frozenset(name for name, p in model.named_parameters() if id(p) in kept)
        return plan_of(model, self.input_shape, names, objective, clip_norm, probe)


def _same_buffers(models: Sequence[nn.Module]) -> bool:
    """Whether one model's buffers can stand for all: a cohort has parameters of each student alone."""
    first = list(models[0].buffers())
    return not first or all(
        torch.equal(kept, other)
        for model in models[1:]
        for kept, other in zip(first, model.buffers(), strict=True)
    )


def in_chunks(
    train: Callable[[list[int], Plan], list[nn.Module]],
    students: Students,
    plan: Plan,
    expected: Mapping[int, float],
    memory_budget: int,
) -> dict[int, nn.Module]:
    """``train`` students chunk by chunk within ``memory_budget`` bytes.

    ``expected`` says which students, by number, and the expected batch of each.
    """
    cost = plan.footprint.cost(max(len(shard) for shard in students.shards))
    trained: dict[int, nn.Module] = {}
    with flushed_denormals():
        for chosen in chunk_students(expected, cost, budget=memory_budget):
            fitting = records_per_pass(len(chosen), cost, budget=memory_budget)
            trained |= zip(chosen, train(chosen, plan.in_passes(fitting)), strict=True)
    return trained
