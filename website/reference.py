"""The reference: commands as the app declares them, settings as the schema does, Python as docstrings say."""

import inspect
import json
import re
from collections.abc import Iterable, Iterator
from itertools import groupby

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from cli import app
from privkd.config.reference import Setting, settings_reference

FRONTS = ("privkd", "audits", "attacks")
"""The packages that people import from."""


def front_page(package: str) -> str:
    """The public names of ``package``, for mkdocstrings to fill in from their docstrings."""
    return f"# {package}\n\n::: {package}\n    options:\n      show_root_heading: false\n"


def settings_page() -> str:
    """Every setting by group, with what ``privkd settings`` says of it; its name is its anchor."""
    intro = (
        "What `privkd settings` prints, and `privkd settings --json` gives to programs. Set one with "
        "`--set group.setting=value`, in a TOML file given with `--config`, or in Python as "
        '`privkd.Config(student={"dp": {"steps": 20}})`. What is none by default is left out.'
    )
    groups = groupby(settings_reference().settings, lambda setting: setting.group)
    sections = (f"## {group or 'Top level'}\n\n{_entries(members)}" for group, members in groups)
    return "\n\n".join(["# Settings", intro, *sections]) + "\n"


def _entries(settings: Iterable[Setting]) -> str:
    return "\n\n".join(
        f"`{one.name}`{{#{one.name}}}\n:   {_plain(one.meaning)}\n\n"
        f"    *Takes* {_plain(one.takes)}. *Default* {_default(one)}."
        for one in settings
    )


def _default(setting: Setting) -> str:
    return "none" if setting.default is None else f"`{json.dumps(setting.default, ensure_ascii=False)}`"


def command_line_page() -> str:
    """The help of every command, from the app itself."""
    intro = (
        "What `privkd COMMAND -h` says, for every command. Exit codes: 0; 1 for a failure; 2 for bad input; "
        "3 where a lower bound exceeds the ledger's upper bound."
    )
    root = get_command(app)
    parts = ["# Command line", intro, *_commands(root, typer.Context(root, info_name="privkd"), depth=0)]
    return "\n\n".join(parts) + "\n"


def _commands(command: TyperCommand | TyperGroup, context: typer.Context, depth: int) -> Iterator[str]:
    yield f"{'##' if depth < 2 else '###'} {context.command_path}"
    yield from _help(inspect.cleandoc(command.help or ""))
    yield f"```text\n{' '.join([context.command_path, *command.collect_usage_pieces(context)])}\n```"
    records = [record for one in command.get_params(context) if (record := one.get_help_record(context))]
    yield _table(("option", "meaning"), [(f"`{name}`", _plain(said)) for name, said in records])
    if isinstance(command, TyperGroup):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            if found is not None and not found.hidden:
                yield from _commands(found, typer.Context(found, info_name=name, parent=context), depth + 1)


def _help(text: str) -> Iterator[str]:
    """Paragraphs; what click leaves as it is, since it is marked so, is a block."""
    for paragraph in re.split(r"\n\n+", text):
        kept = paragraph.removeprefix("\b\n")
        yield f"```text\n{kept}\n```" if kept != paragraph else _plain(paragraph)


def _plain(text: str) -> str:
    """``text`` for Markdown, which is to read no mark-up into it but code."""
    spans = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(
        span.replace("|", r"\|")
        if span.startswith("`")
        else re.sub(r"([\\*_\[\]#|{}])", r"\\\1", span.replace("&", "&amp;").replace("<", "&lt;"))
        for span in spans
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
