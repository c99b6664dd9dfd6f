"""Settings as people write them: in TOML, and as overrides."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from privkd.config.schema import Config, Settings
from privkd.errors import ConfigError
from privkd.options import put, setting_of


def load_config(
    path: Path | None = None, overrides: Sequence[str] = (), settings: Mapping[str, Any] | None = None
) -> Config:
    """The settings of a TOML file (or the defaults), then ``overrides`` in order, then ``settings``.

    An override is ``a.b=value``; its value is read as TOML where it is TOML (``3``, ``true``, ``[1, 2]``),
    else as text. ``settings`` maps dotted names to values, or to text that spells them. A short name may
    stand for a dotted one.

    Raises:
        ConfigError: the file is missing or not TOML, a key is unknown, or a value is bad.
    """
    tree = Config.tree_of(_read_toml(path)) if path is not None else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {override!r}: expected name=value, such as channel.kind=plain")
        value = _toml_value(text.strip())
        tree = put(tree, setting_of(key.strip(), value), value)
    for name, value in (settings or {}).items():
        tree = put(tree, setting_of(name, value), value)
    return parse_config(tree)


def parse_config(tree: Mapping[str, Any]) -> Config:
    """Validate a tree of settings; what it leaves out is as in ``Config()``, group by group.

    Raises:
        ConfigError: one line that names the setting, its value and what was expected.
    """
    return Config.model_validate(tree)


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
