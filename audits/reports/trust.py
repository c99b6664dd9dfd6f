"""Who trusts whom in a run: the facts of the drawing. How it looks is ``templates/trust.svg``.

What is the channel's own part of it stands in `privkd.channels.registry`.
"""

import math
from dataclasses import dataclass

from audits.wording import epsilon_text
from privkd.channels.registry import known
from privkd.channels.trust import MOST_DRAWN, Box
from privkd.channels.trust import Trust as ChannelTrust
from privkd.config import Config


@dataclass(frozen=True)
class Trust:
    """Parties from the devices to the cloud, and what travels from each to the next.

    Attributes:
        channel: its name.
        boxes: two, or three with aggregators.
        arrows: one fewer than boxes; lines of text each.
        words: the same for those who do not see the drawing.
        unprotected: what the channel protects from nobody.
    """

    channel: str
    boxes: tuple[Box, ...]
    arrows: tuple[tuple[str, ...], ...]
    words: tuple[str, ...]
    unprotected: tuple[str, ...]


def trust_of(config: Config) -> Trust:
    """The trust model of a run."""
    budget, kind = config.privacy.device_epsilon, config.channel.kind
    noisy = budget is not None and math.isfinite(budget)
    noise = f"device-level ε ≤ {epsilon_text(budget)}" if noisy and budget is not None else ""
    said: ChannelTrust = known(kind).trust(config.channel, noise)
    boxes = (_devices(config, *said.device), *said.parties)
    return Trust(kind, boxes, said.arrows, said.words, said.unprotected)


def _devices(config: Config, *extra: str) -> Box:
    dp = math.isfinite(config.privacy.epsilon)
    lines = (
        "records stay here, a student learns",
        f"DP-SGD: record-level ε ≤ {epsilon_text(config.privacy.epsilon)}" if dp else "no DP in training",
        *extra,
    )
    devices = config.data.devices
    title = f"{devices:,} device{'s' * (devices != 1)}"
    return Box(title, lines, "none", "keeps its own records", MOST_DRAWN)
