"""A report as plain values, in the order it is read, and the page's two forms: HTML and Markdown.

The only importer of jinja2.
"""

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from audits.reports.trust import Trust

_MIME = {"svg": "image/svg+xml", "png": "image/png"}
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!])")

Tone: TypeAlias = Literal["good", "plain", "warn", "bad"]


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
    """A chapter; all of its parts may be empty. ``commands`` follow the paragraphs, which lead up to them."""

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
    """The answer to a ``question``, at the head of the page: one word or two, and what they mean."""

    question: str
    word: str
    tone: Tone
    sentences: tuple[str, ...]
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    verdicts: tuple[Verdict, ...]
    sections: tuple[Section, ...]
    footer: str


def columns(*names: str) -> tuple[Column, ...]:
    """Columns by name; ``>`` in front sets numbers to the right."""
    return tuple(Column(name.removeprefix(">"), name.startswith(">")) for name in names)


def as_html(page: Page) -> str:
    """The page; whatever a run's files say is text in it, never markup."""
    environment = Environment(
        loader=PackageLoader("audits.reports"),
        autoescape=select_autoescape(enabled_extensions=("html", "svg"), default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["embedded"] = _embedded
    return environment.get_template("report.html").render(page=page)


def _embedded(figure: Figure) -> str:
    return f"data:{_MIME[figure.kind]};base64,{base64.b64encode(figure.data).decode()}"


def as_markdown(page: Page) -> str:
    """The page; whatever a run's files say is text in it, never markup."""
    lines = [f"# {_text(page.title)}", _text(page.subtitle)]
    for verdict in page.verdicts:
        lines += [f"## {_text(verdict.question)} {_text(verdict.word)}"]
        lines += [_text(sentence) for sentence in verdict.sentences]
        lines += ["What is left to do:"] * bool(verdict.commands)
        lines += [_code(command) for command in verdict.commands]
    for section in page.sections:
        lines += _markdown(section)
    return "\n\n".join([*lines, _text(page.footer)]) + "\n"


def _markdown(section: Section) -> Iterator[str]:
    yield f"## {_text(section.title)}"
    yield from (_text(paragraph) for paragraph in section.paragraphs)
    yield from (_code(command) for command in section.commands)
    if section.points:
        yield "\n".join(f"- {_text(point)}" for point in section.points)
    yield from (_markdown_table(table) for table in section.tables)
    yield from (f"![{_text(figure.alt)}](<{_target(figure.name)}>)" for figure in section.figures)


def _markdown_table(table: Table) -> str:
    rules = ("---:" if column.numeric else "---" for column in table.columns)
    rows = [[column.name for column in table.columns], list(rules), *(list(row) for row in table.rows)]
    spelt = [" | ".join(row if number == 1 else map(_text, row)) for number, row in enumerate(rows)]
    return f"{_text(table.caption)}:\n\n" + "\n".join(f"| {row} |" for row in spelt)


def _text(text: str) -> str:
    """Plain text in one line, with all that Markdown would read as markup escaped."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _code(command: str) -> str:
    """A code block; its fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", command)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{' '.join(command.split())}\n{fence}"


def _target(name: str) -> str:
    return name.replace("<", "%3C").replace(">", "%3E").replace("\n", " ")
