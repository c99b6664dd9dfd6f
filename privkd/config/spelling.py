"""Settings as people write them: TOML, overrides, and one clear line for a typo or a bad value."""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import ValidationError

from privkd.config.schema import RunConfig, Settings
from privkd.errors import ConfigError

_LONGEST_SHOWN = 80


def load_config(
    path: Path | None = None, overrides: Sequence[str] = (), settings: Mapping[str, Any] | None = None
) -> RunConfig:
    """The settings of a TOML file (or the defaults), then ``overrides`` in order, then ``settings``.

    An override is ``a.b=value``; its value is read as TOML where it is TOML (``3``, ``true``, ``[1, 2]``),
    else as text. ``settings`` maps dotted names to values, or to text that spells them.

    Raises:
        ConfigError: the file is missing or not TOML, a key is unknown, or a value is bad.
    """
    tree = _read_toml(path) if path is not None else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {override!r}: expected name=value, such as channel.kind=plain")
        _put(tree, key.strip().split("."), _toml_value(text.strip()))
    for name, value in (settings or {}).items():
        _put(tree, name.split("."), value)
    return parse_config(tree)


def parse_config(tree: Mapping[str, Any]) -> RunConfig:
    """Validate a tree of settings; what it leaves out is as in ``RunConfig()``, group by group.

    Raises:
        ConfigError: one line that names the setting, its value and what was expected.
    """
    try:
        return RunConfig.model_validate(_over(config_tree(RunConfig()), tree))
    except ValidationError as error:
        raise ConfigError(" ".join(_in_words(error.errors()[0]).split())) from None


def config_tree(config: Settings) -> dict[str, Any]:
    """The settings as plain values that TOML can spell; ``None`` is left out."""
    return cast(dict[str, Any], plain_value(config.model_dump()))


def plain_value(value: Any) -> Any:
    """A setting's value, or a group dumped, as TOML can spell it; in a group ``None`` is left out."""
    if isinstance(value, Settings):
        return config_tree(value)
    if isinstance(value, Mapping):
        return {key: plain_value(item) for key, item in value.items() if item is not None}
    if isinstance(value, tuple):
        return [plain_value(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _over(defaults: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` over ``defaults``. A group's defaults may differ from those of its class, so a group that is
    given in part keeps the rest of its own."""
    merged = dict(defaults)
    for key, value in given.items():
        below = defaults.get(key)
        if isinstance(below, dict) and isinstance(value, str) and "name" in below:
            value = {"name": value.strip()}
        merged[key] = _over(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"configuration {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"configuration {path} is not TOML: {error}") from None


def _toml_value(text: str) -> Any:
    try:
        read = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return read["value"] if len(read) == 1 else text


def _put(tree: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        below = tree.setdefault(key, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{'.'.join(keys)}: {key!r} is a value, not a group of settings")
        tree = below
    tree[keys[-1]] = value


def _in_words(error: Any) -> str:
    path = [str(step) for step in error["loc"]]
    name, value = ".".join(path), repr(error["input"])
    if len(value) > _LONGEST_SHOWN:
        value = f"{value[:_LONGEST_SHOWN]}..."
    if error["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {known}"
        return f"{name}: unknown setting; {hint}"
    if error["type"] == "literal_error":
        expected = error["ctx"]["expected"].replace(" or ", ", ")
        return f"{name}={value}: expected one of [{expected}]"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    return f"{name}={value}: {message}" if name else message


def _known_keys(path: Sequence[str]) -> list[str]:
    model: Any = RunConfig
    for step in path:
        fields = getattr(model, "model_fields", {})
        if step in fields:
            model = fields[step].annotation
        if get_args(model):
            model = get_args(model)[0]
    return sorted(getattr(model, "model_fields", {}))
