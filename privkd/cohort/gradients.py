"""How a chunk of students gets from its records to its gradients, and what memory that takes."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from privkd.cohort.batches import Records
from privkd.cohort.chunks import Cost, MemoryMeter
from privkd.cohort.formulations import BookKeeping, Formulation
from privkd.cohort.layers import Parameters
from privkd.cohort.objective import Batch, Objective
from privkd.cohort.weights import Weights

_UNBOUNDED = 1 << 62
_COPIES_OF_TRAINED = 10
"""Rows of the size of the trained parameters: weights, gradient, sums, two moments, average, a temporary, the
result, and two for noise in float64."""
_LARGEST_FEATURES = 4
"""Features are kept only if a record's take at most this many times the memory of its inputs."""


@dataclass(frozen=True)
class Gradients:
    """How a chunk's gradients are computed.

    Attributes:
        formulation: of the model, or of what follows ``frozen_part``.
        objective: the loss.
        clip_norm: of each record's gradient, or ``None`` without privacy.
        trained: names of the parameters in training.
        frozen_part: the model up to the first layer in training, whose outputs do not change from step to
            step and are computed once; ``None`` if there is no such part, or nothing to be gained.
        records_per_pass: how many records of each student go through at once.
    """

    formulation: Formulation
    objective: Objective
    clip_norm: float | None
    trained: frozenset[str]
    frozen_part: Formulation | None = None
    records_per_pass: int = _UNBOUNDED

    def with_frozen_part(self, model: nn.Module, input_shape: tuple[int, ...]) -> Self:
        """The same with the frozen part set apart, if the formulation can and it pays."""
        parts = (
            self.formulation.graph.cut(self.trained) if isinstance(self.formulation, BookKeeping) else None
        )
        if parts is None:
            return self
        before, after = (BookKeeping(part) for part in parts)
        state = {name: parameter.detach().unsqueeze(0) for name, parameter in model.named_parameters()}
        blank = next(model.parameters()).new_zeros((1, 1, *input_shape))
        if before.outputs(state, blank).numel() > _LARGEST_FEATURES * blank.numel():
            return self
        return replace(self, formulation=after, frozen_part=before)

    def write_to(
        self, totals: Parameters, weights: Weights, records: Records, index: Tensor, of: Tensor
    ) -> None:
        """Write the weighted sums of a batch's gradients into ``totals``, by parameter ``[student, *shape]``.

        ``index`` and ``of`` ``[student, record]`` say which records, and with which weight.
        """
        if index.shape[1] == 0:
            for total in totals.values():
                total.zero_()
        for start in range(0, index.shape[1], self.records_per_pass):
            part = slice(start, start + self.records_per_pass)
            sums = self._of_batch(weights, records.batch(index[:, part], of[:, part]))
            for name, total in totals.items():
                total.copy_(sums[name]) if start == 0 else total.add_(sums[name])

    def features(self, weights: Weights, records: Records) -> Records:
        """``records`` as the formulation takes them: after the frozen part, if there is one."""
        if self.frozen_part is None or not any(records.counts):
            return records
        index, present = records.poisson(torch.ones(sum(records.counts), dtype=torch.bool))
        parts = []
        for start in range(0, index.shape[1], self.records_per_pass):
            part = slice(start, start + self.records_per_pass)
            batch = records.batch(index[:, part], present[:, part])
            parts.append(self.frozen_part.outputs(weights.frozen_views, batch.inputs))
        return records.replaced(torch.cat(parts, dim=1)[present.bool().to(weights.frozen.device)])

    def footprint(self, weights: Weights, inputs: Tensor, classes: int) -> "Footprint":
        """Measured on made-up records.

        Args:
            weights: of one student.
            inputs: a few records of one student, ``[1, record, *shape]``.
            classes: number of classes.
        """
        size = inputs.shape[:2]
        batch = Batch(inputs, inputs.new_zeros((*size, classes)), inputs.new_ones(size))
        preparing = 0
        if self.frozen_part is not None:
            with MemoryMeter() as meter:
                batch = replace(batch, inputs=self.frozen_part.outputs(weights.frozen_views, inputs))
            preparing = meter.bytes
        with MemoryMeter() as meter:
            self._of_batch(weights, batch)
        held = inputs.nbytes + batch.targets.nbytes + (batch.inputs.nbytes if self.frozen_part else 0)
        passing = held + max(preparing, meter.bytes)
        rows = weights.frozen.nbytes + _COPIES_OF_TRAINED * weights.trained.nbytes
        return Footprint(rows, held // size[1], passing // size[1])

    def _of_batch(self, weights: Weights, batch: Batch) -> Parameters:
        trained, frozen = weights.trained_views, weights.frozen_views
        return self.formulation.gradients(trained, frozen, batch, self.objective, self.clip_norm)


@dataclass(frozen=True)
class Footprint:
    """Upper bounds on the memory that training takes, in bytes.

    Attributes:
        parameters: for each student, whatever its records.
        held: for each record of a student.
        passing: for each record of a batch.
    """

    parameters: int
    held: int
    passing: int

    def cost(self, records: int) -> Cost:
        """The cost of students with at most so many records."""
        return Cost(self.parameters + records * self.held, self.passing)
