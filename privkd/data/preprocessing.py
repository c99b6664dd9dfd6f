"""From raw features to a model's inputs: one module, which a run applies and an exported student carries."""

from collections.abc import Iterable, Sequence
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from privkd.data.dataset import Array
from privkd.records import Record

BOUND = 5.0
"""No standardised feature lies further from 0, so that one far value moves no student more than another."""

# ITU-R 601 in 16-bit fixed point, as Pillow turns colour into grey; a grey pixel stays what it is.
_LUMA, _HALF, _UNIT = (19595, 38470, 7471), 1 << 15, 1 << 16
_TOGETHER = 256
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

_Finite = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST, allow_inf_nan=False, strict=True)]


class Column(Record):
    """How one column of a table becomes an input: less ``mean``, divided by ``scale``. Public.

    Attributes:
        name: of the column; ``feature N`` of an array.
        mean: in the column's unit.
        scale: likewise, above 0.
    """

    name: str
    mean: _Finite = 0.0
    scale: Annotated[_Finite, Field(ge=_SMALLEST)] = 1.0

    @property
    def as_it_came(self) -> bool:
        """Whether nothing is done to it."""
        return self.mean == 0 and self.scale == 1


class Pixels(nn.Module):
    """Images, and whatever is no table of columns: channels, range and divisor of `Constants`."""

    def __init__(self, divisor: float, largest: float | None, channels: int | None) -> None:
        super().__init__()
        self.divisor, self.largest, self.channels = divisor, largest, channels

    def forward(self, records: Tensor) -> Tensor:
        """Raw float32 ``[record, *shape]`` to inputs."""
        if self.channels == 1 and records.shape[1] == 3:
            records = grey(records)
        elif self.channels == 3 and records.shape[1] == 1:
            records = records.repeat(1, 3, 1, 1)
        if self.largest is not None:
            records = records.clamp(0, self.largest)
        return records if self.divisor == 1 else records / self.divisor


def grey(images: Tensor) -> Tensor:
    """Bytes as float32 ``[image, 3, height, width]`` as ``[image, 1, height, width]``, as Pillow's
    ``convert("L")`` makes them: no sum reaches 2**24, so that all of it is exact."""
    red, green, blue = (images[:, channel : channel + 1] * part for channel, part in enumerate(_LUMA))
    return ((red + green + blue + _HALF) / _UNIT).floor()


class Standardised(nn.Module):
    """The columns of a table, each by its own `Column`, within ``bound``."""

    mean: Tensor
    scale: Tensor

    def __init__(self, columns: Sequence[Column], bound: float | None) -> None:
        super().__init__()
        self.bound = bound
        self.register_buffer("mean", torch.tensor([column.mean for column in columns]))
        self.register_buffer("scale", torch.tensor([column.scale for column in columns]))

    def forward(self, records: Tensor) -> Tensor:
        """Raw float32 ``[record, column]`` to inputs ``[record, column]``."""
        inputs = (records - self.mean) / self.scale
        return inputs if self.bound is None else inputs.clamp(-self.bound, self.bound)


def standards(names: Sequence[str], parts: Iterable[Array]) -> tuple[Column, ...]:
    """The columns' means and standard deviations over public records.

    A column of 0/1 flags stays as it is, and so does the unit of a column that never varies.

    Args:
        names: of the columns.
        parts: the records' raw features, float32 ``[record, column]`` each.
    """
    kept = [part for part in parts if len(part)]
    columns: list[Column] = []
    for first in range(0, len(names), _TOGETHER):
        along = slice(first, first + _TOGETHER)
        values = np.concatenate([part[:, along] for part in kept]).astype(np.float64)
        flags = ((values == 0) | (values == 1)).all(axis=0)
        means, scales = _float32(values.mean(axis=0)), _float32(values.std(axis=0))
        scales[(scales < _SMALLEST) | (values == values[0]).all(axis=0)] = 1
        columns += [
            Column(name=name) if flag else Column(name=name, mean=mean, scale=scale)
            for name, flag, mean, scale in zip(
                names[along], flags.tolist(), means.tolist(), scales.tolist(), strict=True
            )
        ]
    return tuple(columns)


def _float32(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Numbers that a model in float32 has exactly."""
    return values.astype(np.float32).astype(np.float64)
