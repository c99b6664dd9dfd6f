"""Fixed features in front of a student: computed once for each record, however long it is trained."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

_BLOCK = 128


class FrontEnd(nn.Module):
    """Fixed features of a record, as the first child of a student that is an `nn.Sequential`.

    A front end has no parameters and no buffers, draws nothing and treats each record by itself. Made of
    public constants alone it costs no privacy: DP-SGD clips and noises what follows it. `student`,
    `cohort` and the public distillation compute its outputs once for each record, not in every step.
    """


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
        children = list(student.named_children())
        if type(student) is not nn.Sequential or len(children) < 2:
            return cls(None, student)
        (name, front), *others = children
        holds = any(True for _ in front.parameters()) or any(True for _ in front.buffers())
        if not isinstance(front, FrontEnd) or holds:
            return cls(None, student)
        rest = nn.Sequential(OrderedDict(others)).train(student.training)
        return cls(front, rest, name)

    @torch.no_grad()
    def features(self, inputs: Tensor) -> Tensor:
        """What ``rest`` takes ``[record, *features]`` for the student's ``inputs`` ``[record, *shape]``."""
        if self.front is None:
            return inputs
        # Small blocks stay in the processor's cache.
        blocks = inputs.split(_BLOCK) if len(inputs) else [inputs]
        return torch.cat([self.front(block) for block in blocks])

    def rejoined(self, rest: nn.Module) -> nn.Module:
        """The front end before another ``rest``, such as this one after training."""
        if self.front is None:
            return rest
        whole = nn.Sequential(OrderedDict([(self._name, self.front), *rest.named_children()]))
        whole.training = rest.training
        return whole
