"""A page as Markdown, for a repository or a ticket."""

import re
from collections.abc import Iterator

from audits.dossier.page import Page, Section, Table

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!])")


def as_markdown(page: Page) -> str:
    """The page; whatever a run's files say is text in it, never markup."""
    lines = [f"# {_text(page.title)}", _text(page.subtitle), f"## {_text(page.verdict.word)}"]
    lines += [_text(sentence) for sentence in page.verdict.sentences]
    lines += ["What is left to do:"] * bool(page.verdict.commands)
    lines += [_code(command) for command in page.verdict.commands]
    for section in page.sections:
        lines += _section(section)
    return "\n\n".join([*lines, _text(page.footer)]) + "\n"


def _section(section: Section) -> Iterator[str]:
    yield f"## {_text(section.title)}"
    yield from (_text(paragraph) for paragraph in section.paragraphs)
    if section.points:
        yield "\n".join(f"- {_text(point)}" for point in section.points)
    yield from (_table(table) for table in section.tables)
    yield from (f"![{_text(figure.alt)}](<{_target(figure.name)}>)" for figure in section.figures)
    yield from (_code(command) for command in section.commands)


def _table(table: Table) -> str:
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
