"""Fixed features in front of a student: computed once for each record, however long it is trained."""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_BLOCK = 16
_MOST_KEPT = 2 << 30
_MOST_FRONTS = 8


class FrontEnd(nn.Module):
    """Fixed features of a record, as the first child of a student that is an `nn.Sequential`.

    A front end has no parameters and no buffers, draws nothing and treats each record by itself. Made of
    public constants alone it costs no privacy: DP-SGD clips and noises what follows it. Private training
    and public distillation compute its outputs once for each record, not in every step.
    """

    @property
    def key(self) -> Hashable:
        """Front ends of equal keys give the same features; those of one are then kept for the other."""
        return self

    def opened(self) -> nn.Module:
        """The same with the constants that it shares as its own tensors, for whoever looks inside it.

        Itself, where it shares no layers.
        """
        return self


@dataclass(frozen=True)
class _Kept:
    """Features of records, which have been written to ``version`` times."""

    version: int
    features: Tensor


_kept = WeakTensorKeyDictionary()
"""By the tensor of records, for as long as it lives, and by the key of the front end."""


class _Rows:
    """Features by the contents of their record: shadows, audits and devices hold many records in common."""

    def __init__(self) -> None:
        self._places: dict[bytes, int] = {}
        self._table = torch.empty(0)

    @property
    def nbytes(self) -> int:
        """Of what is kept."""
        return self._table.nbytes

    def features(self, front: FrontEnd, inputs: Tensor, room: int) -> Tensor:
        """See `Parted.features`; where all kept would take more than ``room`` bytes, no more are."""
        digests = [hashlib.sha256(row.tobytes()).digest() for row in inputs.cpu().flatten(1).numpy()]
        fresh = {digest: n for n, digest in enumerate(digests) if digest not in self._places}
        if fresh:
            # In blocks of one size a record's features are the same bits whatever stands beside it.
            filled = [*fresh.values(), *[0] * (-len(fresh) % _BLOCK)]
            made = _in_blocks(front, inputs[filled])[: len(fresh)]
            if not self._keep(fresh, made, room):
                return _in_blocks(front, inputs)
        return self._table[[self._places[digest] for digest in digests]]

    def _keep(self, digests: Iterable[bytes], made: Tensor, room: int) -> bool:
        count, needed = len(self._places), len(self._places) + len(made)
        if needed > len(self._table):
            size = max(needed, 2 * len(self._table))
            if size * made[0].nbytes > room:
                return False
            grown = made.new_empty((size, *made.shape[1:]))
            if count:
                grown[:count] = self._table[:count]
            self._table = grown
        self._table[count:needed] = made
        self._places |= zip(digests, range(count, needed), strict=True)
        return True


_rows: OrderedDict[Hashable, _Rows] = OrderedDict()
"""By the key of the front end and the kind of the records, the one that was used last at the end."""


def _in_blocks(front: FrontEnd, inputs: Tensor) -> Tensor:
    """Small blocks stay in the processor's cache."""
    return torch.cat([front(block) for block in inputs.split(_BLOCK)])


@dataclass(frozen=True)
class Parted:
    """A student as its front end and the ``rest``, which holds all that is trained.

    ``front`` is ``None`` for a student without one; ``rest`` is then the student itself.
    """

    front: FrontEnd | None
    rest: nn.Module
    _name: str = ""

    @classmethod
    def of(cls, student: nn.Module) -> Self:
        """``student`` parted, its modules shared. A front end that holds tensors is left where it is."""
        if type(student) is not nn.Sequential or len(student) < 2 or not isinstance(student[0], FrontEnd):
            return cls(None, student)
        front, rest = student[0], student[1:]
        if any(True for _ in front.parameters()) or any(True for _ in front.buffers()):
            return cls(None, student)
        rest.training = student.training
        return cls(front, rest, next(iter(student._modules)))

    @torch.no_grad()
    def features(self, inputs: Tensor) -> Tensor:
        """What ``rest`` takes ``[record, *features]`` for the student's ``inputs`` ``[record, *shape]``.

        Kept for the next time, up to 2 GiB of them, and as much again by the records' contents: not to be
        written to.
        """
        if self.front is None or not len(inputs):
            return inputs
        kept: dict[Hashable, _Kept] = _kept.setdefault(inputs, {})
        known = kept.get(self.front.key)
        if known is not None and known.version == inputs._version:
            return known.features
        features = self._features(self.front, inputs)
        held = sum(each.features.nbytes for others in list(_kept.values()) for each in others.values())
        if features.nbytes + held <= _MOST_KEPT:
            kept[self.front.key] = _Kept(inputs._version, features)
        return features

    @staticmethod
    def _features(front: FrontEnd, inputs: Tensor) -> Tensor:
        if front.key is front:
            return _in_blocks(front, inputs)
        key = (front.key, inputs.device, inputs.dtype, inputs.shape[1:])
        rows = _rows.setdefault(key, _Rows())
        _rows.move_to_end(key)
        while len(_rows) > _MOST_FRONTS:
            _rows.popitem(last=False)
        others = sum(each.nbytes for each in _rows.values() if each is not rows)
        return rows.features(front, inputs, _MOST_KEPT - others)

    def rejoined(self, rest: nn.Module) -> nn.Module:
        """The front end before another ``rest``, such as this one after training."""
        return rest if self.front is None else self._joined(self.front, rest)

    def opened(self) -> nn.Module:
        """The whole student, its front end's constants among its tensors: see `FrontEnd.opened`."""
        return self.rest if self.front is None else self._joined(self.front.opened(), self.rest)

    def _joined(self, front: nn.Module, rest: nn.Module) -> nn.Module:
        others = ((name, module) for name, module in rest._modules.items() if module is not None)
        whole = nn.Sequential(OrderedDict([(self._name, front), *others]))
        whole.training = rest.training
        return whole
