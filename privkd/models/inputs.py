"""What kind of inputs a model takes: numbers, or token ids, which are whole numbers and stay so."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_IDS_OF_ANY = 2
"""Ids below it are of any vocabulary: 0, which pads, and one token."""


@dataclass(frozen=True)
class InputType:
    """Of one input without the record axis: its ``shape`` and ``dtype``; int64 is of token ids."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, inputs: Tensor) -> Self:
        """That of ``inputs`` ``[record, *shape]``."""
        return cls(tuple(inputs.shape[1:]), inputs.dtype)

    def zeros(self, *size: int, device: torch.device | None = None) -> Tensor:
        """``[*size, *shape]``."""
        return torch.zeros((*size, *self.shape), dtype=self.dtype, device=device)

    def made_up(self, *size: int, generator: torch.Generator) -> Tensor:
        """Records that any model of such inputs takes, ``[*size, *shape]``: numbers in [0, 1), or ids."""
        if self.dtype.is_floating_point:
            return torch.rand((*size, *self.shape), generator=generator).to(self.dtype)
        return torch.randint(_IDS_OF_ANY, (*size, *self.shape), generator=generator, dtype=self.dtype)
