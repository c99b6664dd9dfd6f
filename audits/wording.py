"""How a run is told to people: figures with their unit or interval, and the command that repeats it."""

import math
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import tomli_w

from audits.estimators.rates import Interval, TprAtFpr
from audits.findings import Success
from privkd.config import Config, config_tree
from privkd.options import OPTIONS
from privkd.privacy.events import DpSgd, NoPrivacy, PostProcessing, PrivacyEvent, ZCdp
from privkd.runs.result import epsilon_text

__all__ = ["command_of", "counted", "epsilon_text", "event_text", "percent", "points", "settings_of"]

_FLAGS = {option.setting: option.flag for option in OPTIONS.values()}


def counted(number: int, thing: str) -> str:
    """A number of things: ``1 round``, ``1,000 devices``."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def percent(interval: Interval | Success | TprAtFpr) -> str:
    """A share with its interval."""
    low, high = 100 * interval.low, 100 * interval.high
    return f"{100 * interval.estimate:.1f} % [{_end(low)}, {_end(high)}]"


def points(interval: Interval) -> str:
    """A difference of two shares with its interval."""
    low, high = 100 * interval.low, 100 * interval.high
    return f"{100 * interval.estimate:+.1f} points [{_end(low, '+')}, {_end(high, '+')}]"


def event_text(event: PrivacyEvent) -> str:
    """What was done, with its public parameters."""
    match event:
        case DpSgd(noise, rate, steps):
            return f"DP-SGD: {steps} steps, noise multiplier {noise:.4g}, sampling rate {rate:g}"
        case ZCdp(rho):
            return f"noised release, {rho:.4g}-zCDP"
        case PostProcessing(of):
            return f"free: post-processing of {of}"
        case NoPrivacy(reason):
            return f"no guarantee: {reason}"


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


def _end(value: float, sign: str = "") -> str:
    if math.isinf(value):
        return "-inf" if value < 0 else "inf"
    return f"{value:{sign}.1f}"
