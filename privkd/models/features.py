"""Fixed features in front of a student: computed once for each record, however long it is trained."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_BLOCK = 16
_MOST_KEPT = 2 << 30


class FrontEnd(nn.Module):
    """Fixed features of a record, as the first child of a student that is an `nn.Sequential`.

    A front end has no parameters and no buffers, draws nothing and treats each record by itself. Made of
    public constants alone it costs no privacy: DP-SGD clips and noises what follows it. `student`,
    `cohort` and the public distillation compute its outputs once for each record, not in every step.
    """

    def same_as(self, other: "FrontEnd") -> bool:
        """Whether both give the same features; those of one are then kept for the other."""
        return self is other


@dataclass(frozen=True)
class _Kept:
    """Features that ``front`` made of records, which have been written to ``version`` times."""

    front: FrontEnd
    version: int
    features: Tensor


_kept = WeakTensorKeyDictionary()
"""By the tensor of records, for as long as it lives."""


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

        Kept for the next time while the same tensor lives, up to 2 GiB in all: not to be written to.
        """
        if self.front is None or not len(inputs):
            return inputs
        known = _kept.get(inputs)
        if known is not None and known.version == inputs._version and self.front.same_as(known.front):
            return known.features
        # Small blocks stay in the processor's cache.
        features = torch.cat([self.front(block) for block in inputs.split(_BLOCK)])
        if features.nbytes + sum(kept.features.nbytes for kept in list(_kept.values())) <= _MOST_KEPT:
            _kept[inputs] = _Kept(self.front, inputs._version, features)
        return features

    def rejoined(self, rest: nn.Module) -> nn.Module:
        """The front end before another ``rest``, such as this one after training."""
        if self.front is None:
            return rest
        others = ((name, module) for name, module in rest._modules.items() if module is not None)
        whole = nn.Sequential(OrderedDict([(self._name, self.front), *others]))
        whole.training = rest.training
        return whole
