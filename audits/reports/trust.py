"""Who trusts whom, channel by channel: the facts of the drawing. How it looks is ``templates/trust.svg``."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from audits.wording import epsilon_text, settings_of
from privkd.config import Config

Trusted: TypeAlias = Literal["none", "part", "full"]
_MOST_DRAWN = 4


@dataclass(frozen=True)
class Box:
    """A party: what it does, line by line, and how far it must be trusted, in words."""

    title: str
    lines: tuple[str, ...]
    trusted: Trusted
    badge: str
    icons: int


@dataclass(frozen=True)
class Trust:
    """Parties from the devices to the cloud, and what travels from each to the next.

    Attributes:
        channel: its name.
        boxes: two, or three with aggregators.
        arrows: one fewer than boxes; lines of text each.
        words: the same for those who do not see the drawing.
    """

    channel: str
    boxes: tuple[Box, ...]
    arrows: tuple[tuple[str, ...], ...]
    words: tuple[str, ...]


def trust_of(config: Config) -> Trust:
    """The trust model of a run's channel."""
    budget = config.privacy.device_epsilon
    noisy = budget is not None and math.isfinite(budget)
    noise = f"device-level ε ≤ {epsilon_text(budget)}" if noisy and budget is not None else ""
    kind = config.channel.kind
    if kind == "secure":
        return _secure(config, noise)
    return _plain(config) if not noisy else _noised(config, noise)


def _devices(config: Config, *extra: str) -> Box:
    dp = math.isfinite(config.privacy.epsilon)
    lines = (
        "records stay here, a student learns",
        f"DP-SGD: record-level ε ≤ {epsilon_text(config.privacy.epsilon)}" if dp else "no DP in training",
        *extra,
    )
    devices = config.data.devices
    return Box(
        f"{devices:,} device{'s' * (devices != 1)}", lines, "none", "keeps its own records", _MOST_DRAWN
    )


def _plain(config: Config) -> Trust:
    cloud = Box(
        "Cloud", ("sees each device's answers", "trains the teacher on them"), "full", "must be trusted", 1
    )
    return Trust(
        config.channel.kind,
        (_devices(config), cloud),
        (("each device's own answers", "to public questions, in the clear"),),
        (
            "The cloud sees every device's own answers, and must be trusted with them.",
            "Nothing is promised for a device as a whole.",
        ),
    )


def _noised(config: Config, noise: str) -> Trust:
    cloud = Box(
        "Cloud",
        ("sees each device's noised answers", "trains the teacher on them"),
        "none",
        "need not be trusted",
        1,
    )
    return Trust(
        config.channel.kind,
        (_devices(config, f"adds its own noise: {noise}"), cloud),
        (("each device's own answers", "with noise on them"),),
        (
            "Each device adds noise before anything leaves it.",
            "Nobody but the device itself must be trusted, up to the device-level budget.",
        ),
    )


def _secure(config: Config, noise: str) -> Trust:
    count = config.channel.aggregators
    shown = _shown(config)
    by_devices = config.channel.noise_from == "devices"
    adds = (f"noise on it: {noise}",) if noise and not by_devices else ()
    middle = Box(
        f"{count} aggregators",
        ("each sees shares that look random", f"together they form {shown}", *adds),
        "part",
        "one must not pool with the rest",
        min(count, _MOST_DRAWN),
    )
    cloud = Box(
        "Cloud",
        (f"sees {shown} alone", "trains the teacher on it"),
        "none" if noise else "part",
        "need not be trusted" if noise else "sees it unprotected",
        1,
    )
    own = (f"adds its part of the noise: {noise}",) if noise and by_devices else ()
    promise = (
        f"What the cloud sees carries noise: {noise}."
        if noise
        else "It carries no noise: secure aggregation alone promises nothing for a device as a whole."
    )
    return Trust(
        config.channel.kind,
        (_devices(config, *own), middle, cloud),
        (
            ("one random-looking share", "of the answers to each aggregator"),
            (f"{shown}, over all devices", "and nothing else"),
        ),
        (
            f"The cloud sees {shown} over devices alone, as long as one of the {count} aggregators does not "
            "pool its shares with the others.",
            promise,
            "All parties are taken to follow the protocol.",
        ),
    )


def _shown(config: Config) -> str:
    """What the aggregators make of the answers."""
    votes = settings_of(config).get("channel.aggregation") == "votes"
    return "the class that won" if votes else "the sum"
