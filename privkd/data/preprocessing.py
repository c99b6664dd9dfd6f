"""From raw features to a model's inputs: one module, which a run applies and an exported student carries."""

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
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


TRUTHS = (("false", "true"), ("no", "yes"), ("n", "y"))
"""Words, in any case, of which the first is 0 and the second 1."""
_MOST_WORDS = 1024


class Column(Record):
    """How one column of a table becomes inputs. Public.

    A number becomes one input: less ``mean``, divided by ``scale``. Text becomes an input for each word of
    the ``vocabulary``, 1 for its own and 0 for others, all of them 0 where it is none of these; one of
    `TRUTHS` becomes one input, 1 or 0. The raw feature of text is its place in the vocabulary, -1 for none.

    Attributes:
        name: of the column; ``feature N`` of an array.
        mean: in the column's unit.
        scale: likewise, above 0.
        fill: the raw feature that stands for one that is missing, which is NaN; ``None``: none may be.
        vocabulary: of text; empty for numbers.
    """

    name: str
    mean: _Finite = 0.0
    scale: Annotated[_Finite, Field(ge=_SMALLEST)] = 1.0
    fill: _Finite | None = None
    vocabulary: Annotated[tuple[str, ...], Field(max_length=_MOST_WORDS)] = ()

    @model_validator(mode="after")
    def _of_numbers_or_text(self) -> Self:
        words = len(self.vocabulary)
        if len(set(self.vocabulary)) < words or (words and not (self.mean == 0 and self.scale == 1)):
            raise ValueError("a vocabulary holds a word twice, or is of numbers")
        if words and self.fill is not None and self.fill not in range(words):
            raise ValueError("what stands for missing text is no place in the vocabulary")
        return self

    @property
    def flag(self) -> bool:
        """Whether it holds one of `TRUTHS`."""
        return self.vocabulary in TRUTHS

    @property
    def codes(self) -> tuple[float, ...]:
        """Of text, the raw features that its inputs are 1 for."""
        return (1.0,) if self.flag else tuple(map(float, range(len(self.vocabulary))))

    @property
    def width(self) -> int:
        """How many inputs it becomes."""
        return len(self.codes) or 1

    @property
    def as_it_came(self) -> bool:
        """Whether it is a number to which nothing is done."""
        return not self.vocabulary and self.mean == 0 and self.scale == 1 and self.fill is None


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


class Table(nn.Module):
    """The columns of a table, each by its own `Column`, within ``bound``."""

    mean: Tensor
    scale: Tensor
    fill: Tensor | None
    place: Tensor | None
    code: Tensor
    is_text: Tensor

    def __init__(self, columns: Sequence[Column], bound: float | None) -> None:
        super().__init__()
        self.bound = bound
        each = [(place, column) for place, column in enumerate(columns) for _ in range(column.width)]
        self.register_buffer("mean", torch.tensor([column.mean for _, column in each]))
        self.register_buffer("scale", torch.tensor([column.scale for _, column in each]))
        text, gone = any(column.vocabulary for column in columns), any(c.fill is not None for c in columns)
        fills = [math.nan if column.fill is None else column.fill for column in columns]
        codes = [code for column in columns for code in (column.codes or (math.nan,))]
        self.register_buffer("fill", torch.tensor(fills) if gone else None)
        self.register_buffer("place", torch.tensor([place for place, _ in each]) if text else None)
        self.register_buffer("code", torch.tensor(codes))
        self.register_buffer("is_text", torch.tensor([bool(column.vocabulary) for _, column in each]))

    def forward(self, records: Tensor) -> Tensor:
        """Raw float32 ``[record, column]`` to inputs ``[record, input]``."""
        if self.fill is not None:
            records = torch.where(records.isnan(), self.fill, records)
        if self.place is not None:
            records = records.index_select(1, self.place)
        inputs = (records - self.mean) / self.scale
        if self.bound is not None:
            inputs = inputs.clamp(-self.bound, self.bound)
        if self.place is not None:
            inputs = torch.where(self.is_text, (records == self.code).to(inputs.dtype), inputs)
        return inputs


def raw_columns(inputs: Tensor, columns: Sequence[Column]) -> Tensor:
    """Raw features ``[record, column]`` of which `Table` makes these ``inputs``, if none was clipped."""
    found, first = [], 0
    for column in columns:
        own = inputs[:, first : first + column.width]
        first += column.width
        if column.flag:
            found.append((own[:, 0] > 0.5).float())
        elif column.vocabulary:
            most, place = own.max(dim=1)
            found.append(torch.where(most > 0.5, place.float(), -1.0))
        else:
            found.append(own[:, 0] * column.scale + column.mean)
    return torch.stack(found, dim=1)


def standards(names: Sequence[str], parts: Iterable[Array]) -> tuple[Column, ...]:
    """The columns' means and standard deviations over public records.

    A column of 0/1 flags stays as it is, and so does the unit of a column that never varies.

    Args:
        names: of the columns.
        parts: the records' raw features, float32 ``[record, column]`` each; NaN is missing, and not counted.
    """
    kept = [part for part in parts if len(part)]
    columns: list[Column] = []
    for first in range(0, len(names), _TOGETHER):
        along = slice(first, first + _TOGETHER)
        values = np.concatenate([part[:, along] for part in kept]).astype(np.float64)
        there = ~np.isnan(values)
        flags = (~there | (values == 0) | (values == 1)).all(axis=0)
        held = np.maximum(there.sum(axis=0), 1)
        exact = np.where(there, values, 0).sum(axis=0) / held
        spread = np.sqrt(np.where(there, np.square(values - exact), 0).sum(axis=0) / held)
        means, scales = _float32(exact), _float32(spread)
        scales[(scales < _SMALLEST) | (np.fmin.reduce(values) == np.fmax.reduce(values))] = 1
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
