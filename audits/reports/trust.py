"""Who trusts whom in a run: the facts of the drawing. How it looks is ``templates/trust.svg``.

What is the channel's own part of it stands in `privkd.channels.registry`.
"""

import math
from dataclasses import dataclass, replace

from audits.wording import epsilon_text
from privkd.channels.registry import known
from privkd.channels.trust import MOST_DRAWN, Box
from privkd.channels.trust import Trust as ChannelTrust
from privkd.config import Config
from privkd.runs.elsewhere import Elsewhere


@dataclass(frozen=True)
class Trust:
    """Parties from the devices to the cloud, and what travels from each to the next.

    Attributes:
        channel: its name.
        boxes: two, or three with aggregators.
        arrows: one fewer than boxes; lines of text each.
        words: the same for those who do not see the drawing.
        unprotected: what the channel protects from nobody.
        played: who played all of them, where the drawing is of parties that did not run apart; else empty.
    """

    channel: str
    boxes: tuple[Box, ...]
    arrows: tuple[tuple[str, ...], ...]
    words: tuple[str, ...]
    unprotected: tuple[str, ...]
    played: str = ""


def trust_of(config: Config, elsewhere: Elsewhere | None = None) -> Trust:
    """The trust model of a run, whose devices may be ``elsewhere``."""
    budget, kind = config.privacy.device_epsilon, config.channel.kind
    noisy = budget is not None and math.isfinite(budget)
    noise = f"device-level ε ≤ {epsilon_text(budget)}" if noisy and budget is not None else ""
    said: ChannelTrust = known(kind).trust(config.channel, noise)
    devices = _devices(config, *said.device)
    if elsewhere is None:
        played = "devices and cloud" if config.channel.aggregator_urls else "all parties"
        words = (
            f"One process of one owner played {played}, who saw every record: the drawing shows whom "
            "devices would "
            "have to trust if each party ran apart.",
            *said.words,
        )
        boxes = (replace(devices, badge="would keep its own records"), *said.parties)
        return Trust(
            kind, boxes, said.arrows, words, said.unprotected, f"simulated: one owner played {played}"
        )
    ran = (
        f"Who ran where: {elsewhere.words}. What carries questions is trusted with delivery alone.",
        "What each device did is known to it alone: the charges here are what the plan prices.",
    )
    apart = replace(devices, title=f"{devices.title}, elsewhere")
    return Trust(kind, (apart, *said.parties), said.arrows, (*ran, *said.words), said.unprotected)


def _devices(config: Config, *extra: str) -> Box:
    dp = math.isfinite(config.privacy.epsilon)
    lines = (
        "records stay here, a student learns",
        f"DP-SGD: {config.privacy.unit}-level ε ≤ {epsilon_text(config.privacy.epsilon)}"
        if dp
        else "no DP in training",
        *extra,
    )
    devices = config.data.devices
    title = f"{devices:,} device{'s' * (devices != 1)}"
    return Box(title, lines, "none", "keeps its own records", MOST_DRAWN)
