"""A report as plain values, in the order it is read; each form (HTML, Markdown) spells the same page."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from audits.dossier.drawing import Trust

Tone: TypeAlias = Literal["good", "warn", "bad"]


@dataclass(frozen=True)
class Column:
    """A table's column; numbers are set to the right."""

    name: str
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """A table of text; every row has a cell for each column."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Figure:
    """A picture: ``kind`` is ``svg`` or ``png``, ``alt`` says what it shows, ``name`` where it lies."""

    name: str
    kind: Literal["svg", "png"]
    data: bytes = field(repr=False)
    alt: str


@dataclass(frozen=True)
class Section:
    """A chapter; all of its parts may be empty."""

    key: str
    title: str
    paragraphs: tuple[str, ...] = ()
    drawings: tuple[Trust, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    points: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The first thing on the page: one word or two, and what they mean."""

    word: str
    tone: Tone
    sentences: tuple[str, ...]
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    verdict: Verdict
    sections: tuple[Section, ...]
    footer: str


def columns(*names: str) -> tuple[Column, ...]:
    """Columns by name; ``>`` in front sets numbers to the right."""
    return tuple(Column(name.removeprefix(">"), name.startswith(">")) for name in names)
