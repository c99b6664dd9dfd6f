"""A cohort of students, how their gradients are computed, and their training in chunks."""

import copy
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from privkd.cohort.architecture import same_architecture
from privkd.cohort.batches import Records, joined
from privkd.cohort.chunks import (
    Cost,
    Progress,
    chunk_students,
    records_per_pass,
    run_chunks,
    worker_count,
)
from privkd.cohort.formulations import choose
from privkd.cohort.gradients import Gradients
from privkd.cohort.objective import Objective
from privkd.cohort.weights import Weights
from privkd.data.scenario import LabelledSet
from privkd.errors import DataError, ModelError
from privkd.frontend import Parted

_PROBE_RECORDS = 2


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

    def records(self, objective: Objective) -> Records:
        """The shards on the models' device, as the models take them."""
        inputs = joined([self.parted.features(shard.inputs) for shard in self.shards]).to(self.device)
        labels = joined([shard.labels for shard in self.shards]).to(self.device)
        logits = None if self.teacher_logits is None else joined(self.teacher_logits).to(self.device)
        targets = objective.targets(labels, logits, self.classes, inputs.dtype)
        return Records.of(inputs, targets, [len(shard) for shard in self.shards])

    @cached_property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input of the models; from the largest shard, since an empty one may have lost it."""
        inputs = max(self.shards, key=len).inputs
        return tuple(self.parted.features(inputs.new_zeros((1, *inputs.shape[1:]))).shape[1:])

    @cached_property
    def classes(self) -> int:
        """Number of classes that the models tell apart."""
        model = copy.deepcopy(self.models[0]).eval()
        with torch.no_grad():
            return int(model(next(model.parameters()).new_zeros((1, *self.input_shape))).shape[-1])

    def gradients(
        self,
        objective: Objective,
        clip_norm: float | None,
        trained: Callable[[nn.Module], Sequence[nn.Parameter]],
    ) -> Gradients | None:
        """The fastest way to compute the students' gradients; ``None`` if none fits the architecture."""
        if not self.models:
            return None
        model = self.models[0]
        kept = {id(parameter) for parameter in trained(model)}
        names = frozenset(name for name, p in model.named_parameters() if id(p) in kept)
        formulation = choose(model, self.input_shape, training=True, trained=names) if names else None
        if formulation is None:
            return None
        gradients = Gradients(formulation, objective, clip_norm, names)
        return gradients.with_frozen_part(model, self.input_shape)

    def cost(self, gradients: Gradients) -> Cost:
        """The memory that training takes, see `Gradients.cost`."""
        weights = self.part([0]).weights(gradients.trained)
        blank = weights.trained.new_zeros((1, _PROBE_RECORDS, *self.input_shape))
        return gradients.cost(weights, blank, self.classes, max(len(shard) for shard in self.shards))


def in_chunks(
    train: Callable[[list[int], Gradients], list[nn.Module]],
    students: Students,
    gradients: Gradients,
    expected: Mapping[int, float],
    memory_budget: int,
    report: Progress,
) -> dict[int, nn.Module]:
    """``train`` students chunk by chunk within ``memory_budget`` bytes.

    ``expected`` says which students, by number, and the expected batch of each.
    """
    cost = students.cost(gradients)
    workers = worker_count(students.device, len(expected))
    chunks = chunk_students(expected, cost, budget=memory_budget, workers=workers)

    def train_chunk(chosen: list[int]) -> list[nn.Module]:
        fitting = records_per_pass(len(chosen), cost, budget=memory_budget, workers=workers)
        return train(chosen, gradients.for_thread(fitting))

    done = zip(chunks, run_chunks(train_chunk, chunks, workers, report), strict=True)
    return {i: model for chosen, models in done for i, model in zip(chosen, models, strict=True)}
