"""Per-example clipping without per-example gradients: book-keeping (Bu et al. 2022, arXiv:2210.00038).

Each trained layer leaves a book: what gives the squared norms of its per-example gradients before the clip
factors are known, and the sum of the clipped gradients after. No gradient is formed twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_GHOST_PENALTY = 2
"""How many times slower a ghost norm's operations run than a product's, as measured on CPUs."""

_DOUBLES_AT_ONCE = 4 << 20
"""Bytes that are turned into double precision at a time."""

_DOUBTFUL = 0.03
_LOWEST = 1e-4
"""Ghost norms are trusted only above these shares of the norm without any cancellation among positions, see
`ghost_norms`."""


class Book(Protocol):
    """One layer's part in clipping. What it calls a record is a unit: a person's records stand for one."""

    def squared_norms(self) -> Tensor:
        """Squared L2 norms ``[student, record]`` of the layer's per-example gradients."""
        ...

    def weighted_sums(self, factors: Tensor) -> list[Tensor]:
        """Per parameter, ``sum_record factors[student, record] * gradient``, float64 ``[student, *shape]``.

        In float32 the sum over many records may move by more than the clip norm when one is added.
        """
        ...


@dataclass(frozen=True)
class PerExample:
    """Gradients ``[student, record, *shape]`` that were cheap to form, one per parameter."""

    gradients: tuple[Tensor, ...]

    def squared_norms(self) -> Tensor:
        """See `Book.squared_norms`."""
        norms = [
            torch.linalg.vector_norm(g.flatten(2), dim=2, dtype=torch.float64).square_()
            for g in self.gradients
        ]
        return torch.stack(norms).sum(0)

    def weighted_sums(self, factors: Tensor) -> list[Tensor]:
        """See `Book.weighted_sums`."""
        return [_weighted(factors, g.flatten(2)).view(len(g), *g.shape[2:]) for g in self.gradients]


@dataclass(frozen=True)
class Factors:
    """A dense layer's inputs ``[student, record, position, input]`` and output gradients
    ``[student, record, position, output]``: the weight's gradient is the sum over positions of their outer
    products."""

    inputs: Tensor
    outputs: Tensor
    bias: bool

    def squared_norms(self) -> Tensor:
        """See `Book.squared_norms`."""
        a, g = self.inputs, self.outputs
        students, records, positions, _ = a.shape
        if positions == 1:
            squared = torch.linalg.vector_norm(a, dim=3).square_() + (1.0 if self.bias else 0.0)
            return (squared * torch.linalg.vector_norm(g, dim=3).square_()).squeeze(2)
        return ghost_norms(a.flatten(0, 1), g.flatten(0, 1), bias=self.bias).view(students, records)

    def weighted_sums(self, factors: Tensor) -> list[Tensor]:
        """See `Book.weighted_sums`."""
        students, records, positions, width = self.inputs.shape
        outputs = self.outputs.shape[3]
        sums = [self.inputs.new_zeros((students, outputs, width), dtype=torch.float64)]
        sums += [sums[0].new_zeros((students, outputs))] * self.bias
        for part in record_blocks(records, 8 * students * positions * (width + outputs)):
            scaled = self.outputs[:, part].double() * factors[:, part, None, None].double()
            found = dense_sums(self.inputs[:, part].double(), scaled, bias=self.bias)
            sums = [total + more for total, more in zip(sums, found, strict=True)]
        return sums


def _weighted(factors: Tensor, gradients: Tensor) -> Tensor:
    """The weighted sum over the records of ``gradients`` ``[student, record, parameter]``, in float64."""
    students, records, size = gradients.shape
    total = gradients.new_zeros((students, 1, size), dtype=torch.float64)
    for part in record_blocks(records, 8 * students * size):
        total.baddbmm_(factors[:, None, part].double(), gradients[:, part].double())
    return total.squeeze(1)


def record_blocks(records: int, bytes_each: int) -> Iterator[slice]:
    """The records in blocks whose doubles, ``bytes_each`` a record, stay in a cache."""
    size = max(1, _DOUBLES_AT_ONCE // max(1, bytes_each))
    return (slice(start, start + size) for start in range(0, records, size))


def ghost_norms(inputs: Tensor, outputs: Tensor, *, bias: bool) -> Tensor:
    """Squared norms ``[example]`` of a dense layer's gradients as ``<A A^T, G G^T>`` (ghost norm).

    Takes inputs ``[example, position, input]`` and output gradients ``[example, position, output]``.

    Where positions cancel, the float32 sum of squares keeps little but rounding, and a norm that is too small
    would let its record through unclipped. So what lies below ``_DOUBTFUL`` of ``sum_l |a_l| |g_l|``, the
    norm without cancellation, is computed again in double precision, and no norm is taken below ``_LOWEST``
    of it: the clipped sum rounds at that scale too. The second only ever clips such a record more.
    """
    squares = _gram_products(inputs, outputs, bias=bias).clamp_(min=0.0)
    lengths = torch.linalg.vector_norm(inputs, dim=2).square_()
    uncancelled = (lengths + 1.0 if bias else lengths).sqrt_() * torch.linalg.vector_norm(outputs, dim=2)
    limits = uncancelled.sum(1).square_()
    doubtful = squares < _DOUBTFUL**2 * limits
    if doubtful.any():
        again = _gram_products(inputs[doubtful].double(), outputs[doubtful].double(), bias=bias)
        squares[doubtful] = again.clamp_(min=0.0).to(squares.dtype)
    return torch.maximum(squares, _LOWEST**2 * limits)


def _gram_products(inputs: Tensor, outputs: Tensor, *, bias: bool) -> Tensor:
    gram = torch.bmm(inputs, inputs.transpose(1, 2))
    if bias:
        gram += 1.0
    return gram.mul_(torch.bmm(outputs, outputs.transpose(1, 2))).sum((1, 2))


def dense_sums(inputs: Tensor, outputs: Tensor, *, bias: bool) -> list[Tensor]:
    """Summed gradients ``[student, output, input]`` and, with a ``bias``, ``[student, output]``.

    Takes inputs and output gradients as `Factors` does.
    """
    a, g = inputs.flatten(1, 2), outputs.flatten(1, 2)
    weight = torch.bmm(g.transpose(1, 2), a)
    return [weight, g.sum(1)] if bias else [weight]


def ghost_is_cheaper(*, positions: int, inputs: int, outputs: int) -> bool:
    """Whether the norms of a dense layer's gradients cost less by ghost norm than by forming them."""
    return positions == 1 or _GHOST_PENALTY * positions * (inputs + outputs) < inputs * outputs


def owned(values: Tensor, slots: int) -> Tensor:
    """What is added up over positions, ``[student, record, position, ...]``, as that of units of ``slots``
    records: ``[student, unit, slot * position, ...]``."""
    return values if slots == 1 else values.unflatten(1, (-1, slots)).flatten(2, 3)


def by_unit(gradients: Tensor, slots: int) -> Tensor:
    """Gradients ``[student, record, *shape]`` added up for units of ``slots`` records."""
    return gradients if slots == 1 else gradients.unflatten(1, (-1, slots)).sum(2)


def dense_book(inputs: Tensor, outputs: Tensor, *, bias: bool) -> Book:
    """The cheaper book of a dense layer; see `Factors` for the shapes."""
    students, records, positions, width = inputs.shape
    if ghost_is_cheaper(positions=positions, inputs=width, outputs=outputs.shape[3]):
        return Factors(inputs, outputs, bias)
    products = torch.bmm(outputs.flatten(0, 1).transpose(1, 2), inputs.flatten(0, 1))
    weight = products.view(students, records, *products.shape[1:])
    return PerExample((weight, outputs.sum(2)) if bias else (weight,))


def gradient_norms(books: Sequence[Book]) -> Tensor:
    """L2 norms ``[student, record]`` of the per-example gradients over all layers."""
    return torch.stack([book.squared_norms().double() for book in books]).sum(0).sqrt_()


def clip_factors(norms: Tensor, clip_norm: float) -> Tensor:
    """``min(1, clip_norm / (norm + 1e-6))`` ``[student, record]``, as Opacus has it."""
    return (clip_norm / (norms + 1e-6)).clamp_(max=1.0)


def beyond_clipping(norms: Tensor, weights: Tensor) -> Tensor:
    """Which records ``[student, record]`` count for nothing: their gradient has no finite norm, and would
    turn the sum into NaN and so betray itself."""
    return ~norms.isfinite() & (weights != 0)
