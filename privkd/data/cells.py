"""The cells of a table as they were written: which are numbers, which are text, and which are missing.

What a column of text means is not settled here: its public values tell (`data.encoding`).
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from privkd.config import DataConfig
from privkd.config.labels import is_missing, is_number
from privkd.data.dataset import Array, RawSet, Words
from privkd.errors import ConfigError, DataError

_SHOWN = 40


@dataclass
class Cells:
    """One column, cell by cell: all numbers, or all text.

    Attributes:
        name: of the column.
        text: whether its cells are text whatever they spell; ``None``: as the first tell that are there.
        decimal: what stands before a number's fraction, ``point`` or ``comma``.
    """

    name: str
    text: bool | None
    decimal: str = "point"
    _numbers: list[Array] = field(default_factory=list)
    _codes: list[NDArray[np.int32]] = field(default_factory=list)
    _words: dict[str, int] = field(default_factory=dict)

    def add(self, cells: Sequence[str], places: Sequence[str]) -> None:
        """Take more cells in.

        Args:
            cells: without the space around them.
            places: where each is, for messages.

        Raises:
            DataError: numbers and text stand in one column.
        """
        numbers = None if self.text else self._numbers_of(cells, places)
        if numbers is None:
            new = [
                -1 if is_missing(cell) else self._words.setdefault(cell, len(self._words)) for cell in cells
            ]
            self._codes.append(np.array(new, dtype=np.int32))
            return
        if self.text is None and not np.isnan(numbers).all():
            self.text = False
        self._numbers.append(numbers)

    def _numbers_of(self, cells: Sequence[str], places: Sequence[str]) -> Array | None:
        """Numbers of ``cells``, NaN of those that are missing; ``None`` where they are text."""
        with suppress(ValueError):
            return np.array([pointed(cell, self.decimal) for cell in cells], dtype=np.float64)
        known = {cell: self._kind(cell) for cell in set(cells)}
        texts = [row for row, cell in enumerate(cells) if known[cell] == "text"]
        if texts and (self.text is False or "number" in known.values()):
            raise DataError(
                f"{places[texts[0]]}, {self.name!r}: {_shown(cells[texts[0]])} is not a number, as others of "
                "its column are; mend it, leave the column out with --drop, take it for the label with "
                f"--label, or say that its values are names with --set data.categorical={self.name}"
            )
        if texts:
            self.text = True
            self._codes.append(np.full(sum(map(len, self._numbers)), -1, dtype=np.int32))
            self._numbers.clear()
            return None
        numbers = {cell: float(pointed(cell, self.decimal)) for cell in known if known[cell] == "number"}
        return np.array([numbers.get(cell, np.nan) for cell in cells])

    def _kind(self, cell: str) -> str:
        if is_missing(cell):
            return "missing"
        return "number" if is_number(pointed(cell, self.decimal)) else "text"

    @property
    def values(self) -> Array:
        """Numbers float64 ``[record]``; NaN where one is missing, and everywhere of text."""
        if self.text:
            return np.full(sum(map(len, self._codes)), np.nan)
        return np.concatenate(self._numbers)

    @property
    def words(self) -> Words | None:
        """The cells of text."""
        return Words(tuple(self._words), np.concatenate(self._codes)) if self.text else None


def pointed(cell: str, decimal: str) -> str:
    """A number as Python spells it; where a comma stands before its fraction, one with a point is none."""
    if decimal == "point":
        return cell
    return "" if "." in cell else cell.replace(",", ".")


def _shown(cell: str) -> str:
    return repr(cell if len(cell) <= _SHOWN else f"{cell[:_SHOWN]}...")


def table_of(records: RawSet, names: Sequence[str], config: DataConfig, origin: str) -> RawSet:
    """The records of a table with what is to be done about cells that are missing.

    Args:
        records: with `Words`; a number that is missing is NaN.
        names: of the features.
        config: ``missing``.
        origin: what messages call the table.

    Raises:
        DataError: a value is missing where that is refused, or in every record.
    """
    absent = {number: gone for number in range(len(names)) if (gone := _absent(records, number)).any()}
    if absent and config.missing == "refuse":
        raise DataError(f"{origin}: {_counted(absent, names)}; {_CURE}")
    if config.missing != "drop":
        return records
    kept = np.flatnonzero(~np.any([np.zeros(len(records.labels), np.bool_), *absent.values()], axis=0))
    if not kept.size:
        raise DataError(f"{origin}: a value is missing in every record: {_counted(absent, names)}")
    return replace(records.at(kept), rows=kept)


_MOST_NAMED = 4
_CURE = (
    "give them, leave the column out with --drop, or say what to do with --missing mean, most-frequent (both "
    "by the public records) or drop (those records)"
)


def _absent(records: RawSet, number: int) -> NDArray[np.bool_]:
    words = (records.words or {}).get(number)
    return np.isnan(records.inputs[:, number]) if words is None else words.codes < 0


def _counted(absent: Mapping[int, NDArray[np.bool_]], names: Sequence[str]) -> str:
    """How many values are missing in which columns."""
    told = [
        f"{names[number]!r} ({gone.sum()}, first in record {int(np.argmax(gone))})"
        for number, gone in list(absent.items())[:_MOST_NAMED]
    ]
    more = f" and {len(absent) - len(told)} more columns" if len(absent) > len(told) else ""
    return f"values are missing in {', '.join(told)}{more}"


def said_of_missing(config: DataConfig) -> dict[str, str]:
    """What is done about missing values, in words; nothing where they are refused."""
    words = {
        "drop": "records with a missing value are left out",
        "mean": "filled with the mean of the public records, of text with their most frequent value",
        "most-frequent": "filled with the most frequent value of the public records",
    }
    return {"missing values": words[config.missing]} if config.missing in words else {}


def categorical(names: Sequence[str], features: Sequence[str], config: DataConfig, origin: str) -> set[str]:
    """The features that are text whatever they spell.

    Raises:
        ConfigError: ``data.categorical`` names another.
    """
    for name in config.categorical:
        if name not in features:
            known = "is the label, or left out" if name in names else "is none of its columns"
            raise ConfigError(f"data.categorical: {name!r} {known} in {origin}")
    return set(config.categorical)
