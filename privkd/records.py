"""Records and values: what a file of a run or ``--json`` holds, read back by the class that wrote it.

In JSON infinity is ``"inf"``, and what was not computed is ``null``. A record that is a file of its own says
which version of its form it has; without, it has the first.
"""

import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from privkd.errors import InputError, RunError

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import RenderableType

Model = TypeVar("Model", bound=BaseModel)
WIDTH = 110
"""Columns of a table where no terminal has its own."""


def plain(value: Any) -> Any:
    """``value`` as JSON spells it: infinities as ``"inf"``, ``"-inf"``; NaN as ``null``, tuples as lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _number(value: Any) -> Any:
    """A float, or the infinity that JSON spells out; never what only looks like one."""
    if isinstance(value, str) and value in ("inf", "-inf"):
        return float(value)
    if isinstance(value, bool | str):
        raise ValueError(f"{value!r} is no number")
    return value


def _finite_or_not(value: Any) -> Any:
    number = _number(value)
    if isinstance(number, float) and math.isnan(number):
        raise ValueError("NaN is no figure")
    return number


def _measured(value: Any) -> Any:
    return math.nan if value is None or value == "nan" else _number(value)


_SPELT = PlainSerializer(plain, when_used="json")
Plain: TypeAlias = Annotated[Any, _SPELT]
"""Whatever JSON can hold."""
Real: TypeAlias = Annotated[float, BeforeValidator(_finite_or_not), _SPELT]
"""A number or an infinity, never NaN."""
Measured: TypeAlias = Annotated[float, BeforeValidator(_measured), _SPELT]
"""Likewise, or NaN where nothing was measured; the journals of version 0.1.0 spelt that ``"nan"``."""
Count: TypeAlias = Annotated[int, Field(strict=True, ge=0)]
"""How many."""


class Record(BaseModel):
    """A frozen value with a JSON form. Keys that follow from others are written, and never believed."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _without_what_follows(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        follows = {field.alias or name for name, field in cls.model_computed_fields.items()}
        return {key: value for key, value in given.items() if key not in follows}

    def tree(self) -> dict[str, Any]:
        """The JSON form."""
        return self.model_dump(mode="json", by_alias=True)


class FileRecord(Record):
    """A record that is a file, or all that a command prints: it has a version."""

    version: Literal[1] = 1

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record at ``path``.

        Raises:
            RunError: it is missing, damaged, or of a version that this one does not read.
        """
        return record_of(cls, read_json(path), path)


class Value(ABC):
    """What a public function gives: it knows its JSON form, its data frame, its table, and its alarm."""

    @abstractmethod
    def tree(self) -> dict[str, Any]:
        """The JSON form."""

    @abstractmethod
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The data frame's rows, all with the same keys."""

    @abstractmethod
    def __rich__(self) -> "RenderableType":
        """The table that the command prints."""

    @property
    def alarm(self) -> str | None:
        """What must stop a release, in words, if anything must: exit code 3."""
        return None

    @property
    def failure(self) -> str | None:
        """What failed of it, in words, while the rest stands: exit code 1."""
        return None

    def to_frame(self) -> "DataFrame":
        """One row for each of what the value is made of; NaN is a figure that there is not.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError:
            raise InputError(
                "a data frame needs pandas, which is not installed here: pip install 'privkd[notebook]'"
            ) from None
        # A column of ``None`` would be one of objects, which nothing can draw.
        return DataFrame([{k: math.nan if v is None else v for k, v in row.items()} for row in self.rows()])

    def _repr_html_(self) -> str:
        from rich.console import Console

        # In a kernel rich would show it by itself, beside what is returned.
        console = Console(record=True, file=io.StringIO(), width=WIDTH, force_jupyter=False)
        console.print(self, crop=False)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def read_json(path: Path) -> Any:
    """A JSON file's value.

    Raises:
        RunError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not JSON ({error}): restore it, or make it anew") from None


def record_of(kind: type[Model], tree: Any, path: Path) -> Model:
    """The record in a JSON value that ``path`` holds.

    Raises:
        RunError: it is of another form, or of another version.
    """
    try:
        return kind.model_validate(tree)
    except (ValidationError, InputError) as error:
        raise RunError(f"{path} {_damage(error)}") from None


def faults(error: Exception) -> str:
    """What is wrong with a record, in one line: the first fault, and where it is."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def _damage(error: Exception) -> str:
    if isinstance(error, ValidationError):
        version = next((fault["input"] for fault in error.errors() if fault["loc"] == ("version",)), None)
        if version is not None:
            return f"is of version {version!r}; this privkd reads version 1: take the one that wrote it"
    return f"is damaged or was changed ({faults(error)}): restore it, or make it anew"
