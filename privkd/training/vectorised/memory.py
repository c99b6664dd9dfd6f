"""How a cohort is cut to fit a memory budget and the machine's caches."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

R = TypeVar("R")

DEFAULT_MEMORY_BUDGET = 1 << 30
"""Bytes of memory for a cohort's training, if the caller names no other: 1 GiB."""

_CACHE_FRIENDLY = 128 << 20
"""Bytes that a chunk should take in a step, counted as though none were freed: larger ones fall out of the
caches of a CPU, and smaller ones leave its cores waiting for the next kernel."""
_DENORMAL = 1e-40


class Progress:
    """Counts steps and reports them in students."""

    def __init__(self, callback: Callable[[int], None] | None, *, steps: int) -> None:
        self._callback = callback
        self._steps = steps
        self._taken = 0

    def advance(self, students: int) -> None:
        """So many students took one step."""
        before = self._taken // self._steps
        self._taken += students
        if self._callback is not None and self._taken // self._steps > before:
            self._callback(self._taken // self._steps)

    def after(self, result: R) -> R:
        """Report one student with all its steps done, and pass on ``result``."""
        self.advance(self._steps)
        return result


@dataclass(frozen=True)
class Cost:
    """Bytes that training takes: ``student`` for each student, and ``record`` for each record of a batch."""

    student: int
    record: int


class MemoryMeter(TorchDispatchMode):
    """Adds up the bytes of every tensor made inside it, as though none were freed: a bound on the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._held: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count the new storages among its results."""
        for tensor in _tensors((args, kwargs)):
            self._held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._held:
                self._held[storage.data_ptr()] = tensor
                self.bytes += storage.nbytes()
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def chunk_students(expected: Mapping[int, float], cost: Cost, *, budget: int) -> list[list[int]]:
    """Cut students into chunks, as equal as can be, each of which fits ``budget``.

    ``expected`` is the expected batch by student. Students of like batches share a chunk, so that
    little is padded. A chunk holds at least one student.
    """
    ordered = sorted(expected, key=lambda student: expected[student])
    step = max(1.0, max(expected.values(), default=0.0) * cost.record)
    size = max(1, int(min(budget / (cost.student + step), _CACHE_FRIENDLY / step)))
    count = -(-len(ordered) // size)
    cuts = [round(i * len(ordered) / count) for i in range(count + 1)]
    return [ordered[a:b] for a, b in pairwise(cuts)]


def records_per_pass(students: int, cost: Cost, *, budget: int) -> int:
    """How many records of each student fit one pass of a chunk; at least one."""
    left = budget - students * cost.student
    return max(1, int(left / (students * max(cost.record, 1))))


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Make denormals, which saturated activations produce and CPUs are slow on, zero."""
    before = bool(torch.tensor(_DENORMAL).mul(1.0) == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
