"""What ``privkd settings`` does, between the command line's parsing and the schema."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from privkd.config.reference import Setting, settings_reference
from privkd.stdout import print_json


def settings_command(name: str | None, *, as_json: bool) -> None:
    """Print the reference of all settings, or of those that ``name`` is or is a group of.

    Raises:
        ConfigError: there is none of that name.
    """
    found = settings_reference(name)
    if as_json:
        print_json({"settings": [asdict(one) | {"default": _json(one.default)} for one in found]})
    else:
        _print(found)


def _json(value: Any) -> Any:
    return "inf" if value == float("inf") else value


def _print(found: Sequence[Setting]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for group, members in groupby(found, lambda one: one.group):
        table = Table(
            title=Text(group or "top level", "bold"),
            title_justify="left",
            box=box.SIMPLE,
            show_lines=True,
            expand=True,
        )
        table.add_column("setting", no_wrap=True)
        table.add_column("default", max_width=18, overflow="fold")
        table.add_column("takes", ratio=2)
        table.add_column("meaning", ratio=5)
        for one in members:
            short = one.name.rpartition(".")[2]
            table.add_row(*map(Text, (short, _spelt(one.default), one.takes, one.meaning)))
        console.print(table)
    console.print(
        "Set one with `--set group.setting=value`, or in a TOML file given with `--config`. "
        "What is none by default is left out.",
        highlight=False,
        markup=False,
    )


def _spelt(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
