"""A cohort as arrays: students as rows of matrices, ragged shards as padded batches, the loss."""

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privkd.models.architecture import PLAIN
from privkd.training.losses import soft_targets
from privkd.training.units import Units

_TABLES = frozenset({dict, OrderedDict, set})
_OWN_WAYS = (
    "__deepcopy__",
    "__getstate__",
    "__setstate__",
    "__reduce__",
    "__reduce_ex__",
    "__slots__",
    "train",
    "eval",
)


@dataclass(frozen=True)
class Slot:
    """One parameter's place in a row: its name and shape."""

    name: str
    shape: torch.Size


@dataclass(frozen=True)
class Weights:
    """The parameters of many students of one architecture.

    Attributes:
        trained: those in training ``[student, parameter]``, in the model's order.
        frozen: the others, likewise.
        trained_slots: what the columns of ``trained`` are.
        frozen_slots: what the columns of ``frozen`` are.
    """

    trained: Tensor
    frozen: Tensor
    trained_slots: tuple[Slot, ...]
    frozen_slots: tuple[Slot, ...]

    @staticmethod
    def stack(models: Sequence[nn.Module], trained: frozenset[str]) -> "Weights":
        """Copy the models' parameters; ``trained`` names those in training."""
        slots = [Slot(name, parameter.shape) for name, parameter in models[0].named_parameters()]
        inside = tuple(slot for slot in slots if slot.name in trained)
        outside = tuple(slot for slot in slots if slot.name not in trained)
        return Weights(_rows(models, inside), _rows(models, outside), inside, outside)

    @cached_property
    def trained_views(self) -> dict[str, Tensor]:
        """Views into ``trained`` by name, ``[student, *shape]``."""
        return views(self.trained, self.trained_slots)

    @cached_property
    def frozen_views(self) -> dict[str, Tensor]:
        """Views into ``frozen`` by name, ``[student, *shape]``."""
        return views(self.frozen, self.frozen_slots)

    @torch.no_grad()
    def models(self, templates: Sequence[nn.Module]) -> list[nn.Module]:
        """Copies of ``templates`` in evaluation mode, holding these parameters."""
        columns = self.trained_views
        copies = []
        for student, template in enumerate(templates):
            values = {name: column[student] for name, column in columns.items()}
            copies.append(_trained_copy(template, values))
        return copies


def views(matrix: Tensor, slots: Sequence[Slot]) -> dict[str, Tensor]:
    """The columns of ``matrix`` as the parameters of ``slots``, ``[student, *shape]``, sharing memory."""
    columns = matrix.split([slot.shape.numel() for slot in slots], dim=1)
    return {slot.name: c.view(-1, *slot.shape) for slot, c in zip(slots, columns, strict=True)}


def _trained_copy(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy in evaluation mode with other ``values`` of the parameters named, and without gradients.

    `copy.deepcopy` takes several times as long: a module is mostly empty tables of hooks.
    """
    parameters, modules = dict(model.named_parameters()), list(model.modules())
    plain = all(type(parameter) is nn.Parameter for parameter in parameters.values())
    if not plain or not all(_is_ordinary(kind) for kind in {type(module) for module in modules}):
        twin = copy.deepcopy(model)
        for name, parameter in twin.named_parameters():
            parameter.grad = None
            parameter.copy_(values.get(name, parameter))
        return twin.eval()
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(values.get(name, parameter).clone(), parameter.requires_grad)
        for name, parameter in parameters.items()
    }
    memo |= {id(module): type(module).__new__(type(module)) for module in modules}
    for module in modules:
        held = vars(memo[id(module)])
        for key, value in vars(module).items():
            held[key] = value if type(value) in PLAIN else _copied_setting(value, memo)
        held["training"] = False
    return cast(nn.Module, memo[id(model)])


def _copied_setting(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _TABLES:
        if not value:
            return kind()
        if kind is dict and all(id(item) in memo for item in value.values()):
            return {key: memo[id(item)] for key, item in value.items()}
    return copy.deepcopy(value, memo)


def _is_ordinary(kind: type[nn.Module]) -> bool:
    """Whether the class leaves it to `torch.nn.Module` how it is copied and put in evaluation mode.

    torch's own layers may say how an old pickle is read, which no copy is.
    """
    ways = set(_OWN_WAYS) - ({"__setstate__"} if kind.__module__.startswith("torch.nn.") else set())
    return all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in ways)


def _rows(models: Sequence[nn.Module], slots: Sequence[Slot]) -> Tensor:
    first = next(models[0].parameters())
    rows = first.new_empty(len(models), sum(slot.shape.numel() for slot in slots))
    if not slots:
        return rows
    with torch.no_grad():
        for row, model in zip(rows, models, strict=True):
            parameters = dict(model.named_parameters())
            torch.cat([parameters[slot.name].flatten() for slot in slots], out=row)
    return rows


@dataclass(frozen=True)
class Batch:
    """One step's records of every student, padded to the longest batch.

    Units are records; or persons, each of equally many slots, one behind the other.

    Attributes:
        inputs: ``[student, record, *shape]``.
        targets: see `Objective.targets`, ``[student, record, class]``.
        weights: of each unit in its student's sum ``[student, unit]``; zero where padded.
        held: which slots hold a record of their person, 1 or 0 ``[student, record]``; ``None`` where each
            record is a unit.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    held: Tensor | None = None

    @property
    def slots(self) -> int:
        """Of each unit."""
        return 1 if self.held is None else self.held.shape[1] // self.weights.shape[1]

    def without(self, units: Tensor) -> Self:
        """The batch with the ``units``, bool ``[student, unit]``, made padding."""
        records = units.repeat_interleave(self.slots, dim=1)
        held = None if self.held is None else _blank(self.held, records)
        inputs, targets = _blank(self.inputs, records), _blank(self.targets, records)
        return type(self)(inputs, targets, _blank(self.weights, units), held)


@dataclass(frozen=True)
class Objective:
    """`distill.forward_loss` by its gradient with respect to the logits ``z``, which is

        (1 - alpha) (softmax(z) - onehot) + alpha T (softmax(z / T) - softmax(teacher / T)).

    What does not depend on ``z`` is computed once a record, not once a step.
    """

    alpha: float
    temperature: float

    @staticmethod
    def of(alpha: float, temperature: float, teacher_logits: object | None) -> "Objective":
        """The objective with these constants; without a teacher, on the labels alone."""
        return Objective(0.0 if teacher_logits is None else alpha, temperature)

    def targets(
        self, labels: Tensor, teacher_logits: Tensor | None, classes: int, dtype: torch.dtype
    ) -> Tensor:
        """``(1 - alpha) onehot + alpha T softmax(teacher / T)`` of each record ``[record, class]``."""
        onehot = F.one_hot(labels, classes).to(dtype)
        if teacher_logits is None:
            return onehot
        soft = soft_targets(teacher_logits, self.temperature)
        return (1 - self.alpha) * onehot + self.alpha * self.temperature * soft

    def output_gradients(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The gradient of each record's loss with respect to its logits ``[student, record, class]``.

        Takes the student's logits and the targets; holds no graph.
        """
        # A softmax over a short last axis is about ten times slower than one over the first.
        z = logits.detach().flatten(0, -2).t().contiguous()
        push = []
        if self.alpha < 1.0:
            push.append(F.softmax(z, 0).mul_(1 - self.alpha))
        if self.alpha > 0.0:
            push.append(F.softmax(z / self.temperature, 0).mul_(self.alpha * self.temperature))
        total = push[0] if len(push) == 1 else push[0].add_(push[1])
        return torch.sub(total.t().view(logits.shape), targets)


def _blank(values: Tensor, records: Tensor) -> Tensor:
    return values.masked_fill(records.view(*records.shape, *[1] * (values.dim() - 2)), 0)


@dataclass(frozen=True)
class Owners:
    """The persons of several students, one after another.

    Attributes:
        records: of each, by number, int64 ``[person, slot]``; a last person owns the record of zeros.
        held: which slots hold one, 1 or 0 likewise.
        counts: number of persons of each student.
    """

    records: Tensor
    held: Tensor
    counts: tuple[int, ...]

    @staticmethod
    def of(units: Sequence[Units], counts: Sequence[int]) -> "Owners":
        """Those of students with these ``units``, persons, and ``counts`` of records."""
        tables = [unit.table for unit in units]
        slots = max(held.shape[1] for _, held in tables)
        records = torch.full((1 + sum(unit.count for unit in units), slots), sum(counts))
        held, place = torch.zeros(records.shape), 0
        for (own, of_one), before in zip(tables, accumulate(counts, initial=0), strict=False):
            rows, width = slice(place, place + len(own)), own.shape[1]
            records[rows] = own[:, :1] + before
            records[rows, :width] = own + before
            held[rows, :width] = of_one.to(held)
            place += len(own)
        return Owners(records, held, tuple(unit.count for unit in units))


@dataclass(frozen=True)
class Records:
    """The records of several students, one after another; a last record of zeros fills short batches.

    Attributes:
        inputs: ``[record, *shape]``.
        targets: see `Objective.targets`, ``[record, class]``.
        counts: number of records of each student.
        owners: whose they are, where persons are the units.
    """

    inputs: Tensor
    targets: Tensor
    counts: tuple[int, ...]
    owners: Owners | None = None

    @staticmethod
    def of(inputs: Tensor, targets: Tensor, counts: Sequence[int], owners: Owners | None = None) -> "Records":
        """The records, student after student, given without the last of zeros."""
        # A single student's batch of records is never padded, so its shard need not be copied.
        padded = len(counts) > 1 or owners is not None
        return Records(_filled(inputs, padded), _filled(targets, padded), tuple(counts), owners)

    def replaced(self, inputs: Tensor) -> Self:
        """The same records with other ``inputs`` ``[record, *shape]``, given without the last of zeros."""
        return replace(self, inputs=_filled(inputs, len(self.targets) > sum(self.counts)))

    @property
    def slots(self) -> int:
        """Records of a unit in a batch."""
        return 1 if self.owners is None else self.owners.records.shape[1]

    @property
    def singly(self) -> Self:
        """The same with each record as a unit."""
        return replace(self, owners=None)

    @property
    def units(self) -> tuple[int, ...]:
        """Number of units of each student."""
        return self.counts if self.owners is None else self.owners.counts

    @cached_property
    def _bounds(self) -> Tensor:
        """Where each student's units begin, and where the last one's end."""
        return torch.tensor([0, *accumulate(self.units)])

    def poisson(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Index and weights for `batch` of a ``sample`` of all students' units, bool ``[unit]``.

        The student with the most units in it sets the length.
        """
        chosen, bounds = sample.cpu().nonzero().squeeze(1), self._bounds
        sizes = torch.searchsorted(chosen, bounds).diff()
        present = torch.arange(int(sizes.max())) < sizes.unsqueeze(1)
        index = torch.full(present.shape, int(bounds[-1])).masked_scatter_(present, chosen)
        return index, present.to(self.targets.dtype)

    def index(self, draws: Sequence[Tensor]) -> Tensor:
        """Each student's own units by number ``[unit]``, equally many, as an index for `batch`."""
        return torch.stack(list(draws)) + self._bounds[:-1].unsqueeze(1)

    def batch(self, index: Tensor, weights: Tensor) -> Batch:
        """The units at ``index`` ``[student, unit]`` with these ``weights``."""
        held = None
        if self.owners is not None:
            held = self.owners.held[index].flatten(1).to(self.targets)
            index = self.owners.records[index].flatten(1)
        flat = index.flatten().to(self.inputs.device)

        def pick(source: Tensor) -> Tensor:
            return source.index_select(0, flat).view(*index.shape, *source.shape[1:])

        return Batch(pick(self.inputs), pick(self.targets), weights.to(self.targets), held)


def _filled(rows: Tensor, padded: bool) -> Tensor:
    return torch.cat([rows, rows.new_zeros((1, *rows.shape[1:]))]) if padded else rows


def joined(parts: Sequence[Tensor]) -> Tensor:
    """``torch.cat`` that passes over parts without records, whose shape may be lost."""
    held = [part for part in parts if len(part)] or parts[:1]
    return held[0] if len(held) == 1 else torch.cat(list(held))
