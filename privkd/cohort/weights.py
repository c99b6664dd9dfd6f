"""Many students' parameters as flat matrices, one row a student."""

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from privkd.architecture import PLAIN

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
