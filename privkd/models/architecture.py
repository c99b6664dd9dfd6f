"""Which models differ in their weights alone: what is found out about one then holds for the others."""

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

PLAIN = frozenset({int, float, complex, bool, str, bytes, type(None)})
"""Types of settings that cannot change."""

_INTERNAL = frozenset(vars(nn.Module())) | {"training"}


@dataclass(frozen=True)
class Architecture:
    """All of a model but the values of its parameters.

    Attributes:
        parts: what two models of the same architecture share.
        by_value: whether ``parts`` tells all. If not, a setting is known by its identity alone, and may have
            changed since by its owner's doing.
    """

    parts: Hashable
    by_value: bool

    @staticmethod
    def of(model: nn.Module) -> "Architecture":
        """Names, types and settings of the modules; names, shapes, types, devices and ties of the tensors."""
        seen: dict[int, int] = {}
        unclear: list[object] = []
        parts = []
        for name, module in model.named_modules(remove_duplicate=False):
            held = vars(module)
            settings = [(key, _setting(held[key], unclear)) for key in held if key not in _INTERNAL]
            tensors = [
                (key, tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, _number(tensor, seen))
                for table in (held["_parameters"], held["_buffers"])
                for key, tensor in table.items()
                if tensor is not None
            ]
            parts.append((name, type(module), tuple(settings), tuple(tensors)))
        return Architecture(tuple(parts), not unclear)


@dataclass(frozen=True)
class Example:
    """A model as a key: all models of the same architecture and the same weights are equal.

    Attributes:
        architecture: of the model.
        weights: digest of its parameters and buffers.
        model: one of them.
    """

    architecture: Architecture
    weights: bytes
    model: nn.Module = field(compare=False)

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """``model`` as a key, for as long as nobody writes to it."""
        digest = hashlib.sha256()
        for tensor in (*model.parameters(), *model.buffers()):
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return cls(Architecture.of(model), digest.digest(), model)


def same_architecture(models: Sequence[nn.Module]) -> bool:
    """Whether the models differ in nothing but the values of their parameters."""
    return len(group_by_architecture(models)) <= 1


def group_by_architecture(models: Sequence[nn.Module]) -> list[list[int]]:
    """Indices of the models of each architecture, in the order of first appearance.

    Two models share an architecture if their modules have the same names, types and settings, and their
    parameters the same shapes, types, devices and ties. Settings that cannot be compared count as different.
    """
    groups: dict[Architecture, list[int]] = {}
    found: dict[int, Architecture] = {}  # the same model is often given many times
    for index, model in enumerate(models):
        if id(model) not in found:
            found[id(model)] = Architecture.of(model)
        groups.setdefault(found[id(model)], []).append(index)
    return list(groups.values())


def _number(tensor: Tensor, seen: dict[int, int]) -> int:
    """The same for tied parameters."""
    return seen.setdefault(id(tensor), len(seen))


def _setting(value: Any, unclear: list[object]) -> Hashable:
    kind = type(value)
    if kind in PLAIN:
        return kind, value
    if kind is tuple or kind is list:
        return kind, tuple(_setting(item, unclear) for item in value)
    compares = getattr(kind, "__eq__") is not getattr(object, "__eq__")  # noqa: B009
    if compares and isinstance(value, Hashable) and not isinstance(value, Tensor):
        return kind, value
    unclear.append(value)
    return id(value)
