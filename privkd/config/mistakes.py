"""One clear line for a typo or a bad value in the settings."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from privkd.options import OPTIONS

_LONGEST_SHOWN = 80


def in_words(refused: ValidationError, kind: type[BaseModel]) -> str:
    """The first mistake of a tree of ``kind``: the setting, its value, and what was expected."""
    return " ".join(_in_words(refused.errors()[0], kind).split())


def _in_words(error: Any, kind: type[BaseModel]) -> str:
    path = [str(step) for step in error["loc"]]
    name, value = ".".join(path), repr(error["input"])
    if len(value) > _LONGEST_SHOWN:
        value = f"{value[:_LONGEST_SHOWN]}..."
    if error["type"] == "extra_forbidden":
        known = _known_keys(path[:-1], kind)
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {known}"
        return f"{name}: unknown setting; {hint}"
    if error["type"] == "literal_error":
        expected = error["ctx"]["expected"].replace(" or ", ", ")
        return f"{name}={value}: expected one of [{expected}]"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if isinstance(error["input"], Mapping) and message.partition("=")[0].isidentifier():
        return f"{name}.{message}" if name else message  # Two settings of a group, which the message names.
    return f"{name}={value}: {message}" if name else message


def _known_keys(path: Sequence[str], model: Any) -> list[str]:
    for step in path:
        fields = getattr(model, "model_fields", {})
        if step in fields:
            model = fields[step].annotation
        if get_args(model):
            model = get_args(model)[0]
    return sorted({*getattr(model, "model_fields", {}), *(() if path else OPTIONS)})
