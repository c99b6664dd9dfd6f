"""The command that starts a run equal to the one that certain settings describe."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import tomli_w

from privkd.config import Config, config_tree
from privkd.options import OPTIONS

_FLAGS = {option.setting: option.flag for option in OPTIONS.values()}


def command_of(config: Config) -> str:
    """``privkd train`` with all that differs from its defaults; budget, channel and seed in any case."""
    given, usual = dict(_leaves(config_tree(config))), dict(_leaves(config_tree(Config())))
    stated = ("privacy.epsilon", "channel.kind", "seed")
    words = ["privkd", "train"]
    for name, value in given.items():
        if value != usual.get(name) or name in stated:
            flagged = name in _FLAGS and not isinstance(value, list)
            words += [_FLAGS[name], _bare(value)] if flagged else ["--set", f"{name}={_toml(value)}"]
    return shlex.join(words)


def settings_of(config: Config) -> dict[str, str]:
    """Every setting by its dotted name, as text."""
    return {name: _bare(value) for name, value in _leaves(config_tree(config))}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _bare(value: Any) -> str:
    return value if isinstance(value, str) else _toml(value)


def _toml(value: Any) -> str:
    text = tomli_w.dumps({"value": value}).partition("=")[2]
    return " ".join(text.split())
