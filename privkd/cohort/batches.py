"""Ragged shards of many students as padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from privkd.cohort.objective import Batch


@dataclass(frozen=True)
class Records:
    """The records of several students, one after another; a last record of zeros fills short batches.

    Attributes:
        inputs: ``[record, *shape]``.
        targets: see `Objective.targets`, ``[record, class]``.
        counts: number of records of each student.
    """

    inputs: Tensor
    targets: Tensor
    counts: tuple[int, ...]

    @staticmethod
    def of(inputs: Tensor, targets: Tensor, counts: Sequence[int]) -> "Records":
        """The records, student after student, given without the last of zeros."""
        students = len(counts)
        return Records(_filled(inputs, students), _filled(targets, students), tuple(counts))

    def replaced(self, inputs: Tensor) -> Self:
        """The same records with other ``inputs`` ``[record, *shape]``, given without the last of zeros."""
        return replace(self, inputs=_filled(inputs, len(self.counts)))

    @cached_property
    def _bounds(self) -> Tensor:
        """Where each student's records begin, and where the last one's end."""
        return torch.tensor([0, *accumulate(self.counts)])

    def poisson(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Index and weights for `batch` of a ``sample`` of all students' records, bool ``[record]``.

        The student with the most records in it sets the length.
        """
        chosen, bounds = sample.cpu().nonzero().squeeze(1), self._bounds
        sizes = torch.searchsorted(chosen, bounds).diff()
        present = torch.arange(int(sizes.max())) < sizes.unsqueeze(1)
        index = torch.full(present.shape, int(bounds[-1])).masked_scatter_(present, chosen)
        return index, present.to(self.inputs.dtype)

    def index(self, draws: Sequence[Tensor]) -> Tensor:
        """Each student's own record numbers ``[record]``, equally many, as an index for `batch`."""
        return torch.stack(list(draws)) + self._bounds[:-1].unsqueeze(1)

    def batch(self, index: Tensor, weights: Tensor) -> Batch:
        """The records at ``index`` ``[student, record]`` with these ``weights``."""
        flat = index.flatten().to(self.inputs.device)

        def pick(source: Tensor) -> Tensor:
            return source.index_select(0, flat).view(*index.shape, *source.shape[1:])

        return Batch(pick(self.inputs), pick(self.targets), weights.to(self.inputs))


def _filled(rows: Tensor, students: int) -> Tensor:
    # A single student is never padded, so its shard need not be copied.
    return rows if students == 1 else torch.cat([rows, rows.new_zeros((1, *rows.shape[1:]))])


def joined(parts: Sequence[Tensor]) -> Tensor:
    """``torch.cat`` that passes over parts without records, whose shape may be lost."""
    held = [part for part in parts if len(part)] or parts[:1]
    return held[0] if len(held) == 1 else torch.cat(list(held))
