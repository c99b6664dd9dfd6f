"""Every setting, with what it takes, its default and what it means, read off the schema."""

import difflib
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from privkd.config.schema import Config, Settings
from privkd.config.spelling import plain_value
from privkd.errors import ConfigError
from privkd.records import Value, plain

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_ENTRY = re.compile(r"^    (\w+): (.*(?:\n {8,}.*)*)", re.MULTILINE)
_WORDS = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}
_LARGEST_TOLD = 10**9
"""From here on a limit only keeps nonsense out."""


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: dotted, as ``--set`` and the tables of a TOML file spell it.
        takes: the values that it can have, in words.
        default: as a plain value; ``None`` where it is left out.
        meaning: what it does.
    """

    name: str
    takes: str
    default: Any
    meaning: str

    @property
    def group(self) -> str:
        """What stands before the name's last dot; empty at the top."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Reference(Value):
    """Settings, with all that is to be said of each."""

    settings: tuple[Setting, ...]

    def tree(self) -> dict[str, Any]:
        """The JSON form."""
        return {"settings": [asdict(one) | {"default": plain(one.default)} for one in self.settings]}

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One row a setting."""
        return [asdict(one) for one in self.settings]

    def __rich__(self) -> "RenderableType":
        from rich.console import Group
        from rich.text import Text

        groups = groupby(self.settings, lambda one: one.group)
        last = Text(
            "Set one with `--set group.setting=value`, or in a TOML file given with `--config`. "
            "What is none by default is left out."
        )
        return Group(*(_table(group, members) for group, members in groups), last)


def _table(group: str, members: Iterable[Setting]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = Text(group or "top level", "bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_lines=True, expand=True)
    table.add_column("setting", no_wrap=True)
    table.add_column("default", max_width=18, overflow="fold")
    table.add_column("takes", ratio=2)
    table.add_column("meaning", ratio=5)
    for one in members:
        default = "none" if one.default is None else json.dumps(one.default, ensure_ascii=False)
        table.add_row(*map(Text, (one.name.rpartition(".")[2], default, one.takes, one.meaning)))
    return table


def settings_reference(name: str | None = None) -> Reference:
    """All settings, or those that ``name`` is or is a group of, in the schema's order.

    Raises:
        ConfigError: there is none.
    """
    every = list(_settings(Config(), ""))
    if name is None:
        return Reference(tuple(every))
    found = [one for one in every if one.name == name or one.name.startswith(f"{name}.")]
    if not found:
        known = dict.fromkeys(word for one in every for word in (one.name, one.group) if word)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`privkd settings` lists them all"
        raise ConfigError(f"{name}: unknown setting; {hint}")
    return Reference(tuple(found))


def _settings(group: Settings, prefix: str) -> Iterator[Setting]:
    kind = type(group)
    meanings = documented(kind)
    schema = kind.model_json_schema()
    # Groups stand below single settings, as TOML wants it.
    fields = sorted(kind.model_fields, key=lambda field: isinstance(getattr(group, field), Settings))
    for field in fields:
        value, name = getattr(group, field), f"{prefix}{field}"
        if isinstance(value, Settings):
            yield from _settings(value, f"{name}.")
        else:
            takes = _takes(schema["properties"][field], schema.get("$defs", {}))
            yield Setting(name, takes, plain_value(value), meanings[field])


def documented(kind: type[Settings]) -> dict[str, str]:
    """What the docstring of ``kind`` says of each field under its ``Attributes:``, each in one line."""
    _, _, attributes = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    return {name: " ".join(text.replace("``", "").split()) for name, text in _ENTRY.findall(attributes)}


def _takes(schema: Mapping[str, Any], groups: Mapping[str, Any]) -> str:
    """A field's JSON schema in words."""
    if "anyOf" in schema:
        words = [_takes(one, groups) for one in schema["anyOf"] if one.get("type") != "null"]
        return f"{' or '.join(words)}, or none"
    if "examples" in schema:
        return f"{', '.join(schema['examples'])}, or a plug-in's"
    if "enum" in schema:
        return " | ".join(schema["enum"])
    if "$ref" in schema:
        return f"{{{', '.join(groups[schema['$ref'].rpartition('/')[2]]['properties'])}}}"
    if schema["type"] == "array":
        return f"list of {_takes(schema['items'], groups)}"
    word = "path" if schema.get("format") == "path" else _WORDS[schema["type"]]
    return " ".join([word, *_limits(schema)])


def _limits(schema: Mapping[str, Any]) -> Iterator[str]:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if low is not None:
        yield f"from {low:g}"
    if above is not None:
        yield f"above {above:g}"
    if high is not None and high < _LARGEST_TOLD:
        yield f"to {high:g}" if high < 10**5 else f"to {high:,}"
    if below is not None and below < _LARGEST_TOLD:
        yield f"below {below:g}"
