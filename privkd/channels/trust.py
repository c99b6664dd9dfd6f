"""Who sees what over each kind of channel, and who must be trusted with it, in words. Light to import."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from privkd.config import ChannelConfig

Trusted: TypeAlias = Literal["none", "part", "full"]
MOST_DRAWN = 4
"""Icons of one kind of party."""


@dataclass(frozen=True)
class Box:
    """A party: what it does, line by line, and how far it must be trusted, in words."""

    title: str
    lines: tuple[str, ...]
    trusted: Trusted
    badge: str
    icons: int = 1


@dataclass(frozen=True)
class Trust:
    """A channel's part of who trusts whom.

    Attributes:
        parties: from behind the devices to the cloud, which is last.
        arrows: what travels to each of them, lines of text.
        words: the same in sentences.
        device: what a device does before anything leaves it, a line each.
        unprotected: what the channel protects from nobody.
    """

    parties: tuple[Box, ...]
    arrows: tuple[tuple[str, ...], ...]
    words: tuple[str, ...]
    device: tuple[str, ...] = ()
    unprotected: tuple[str, ...] = ()


def cloud(sees: str, learns: str, trusted: Trusted, badge: str) -> Box:
    """The cloud, which ``sees`` something and trains the teacher on it."""
    return Box("Cloud", (f"sees {sees}", f"trains the teacher on {learns}"), trusted, badge)


def plain(settings: "ChannelConfig", noise: str) -> Trust:
    """Of the plain channel, and of the noised one without a budget."""
    return Trust(
        (cloud("each device's answers", "them", "full", "must be trusted"),),
        (("each device's own answers", "to public questions, in the clear"),),
        (
            "The cloud sees every device's own answers, and must be trusted with them.",
            "Nothing is promised for a device as a whole.",
        ),
    )


def noised(settings: "ChannelConfig", noise: str) -> Trust:
    """Of the noised channel; ``noise`` is its device-level guarantee, empty without any."""
    if not noise:
        return plain(settings, noise)
    return Trust(
        (cloud("each device's noised answers", "them", "none", "need not be trusted"),),
        (("each device's own answers", "with noise on them"),),
        (
            "Each device adds noise before anything leaves it.",
            "Nobody but the device itself must be trusted, up to the device-level budget.",
        ),
        device=(f"adds its own noise: {noise}",),
    )


def secure(settings: "ChannelConfig", noise: str) -> Trust:
    """Of the secure channel; ``noise`` as of `noised`."""
    count, by_devices = settings.aggregators, settings.noise_from == "devices"
    shown = "the class that won" if settings.aggregation == "votes" else "the sum"
    middle = Box(
        f"{count} aggregators",
        (
            "each sees shares that look random",
            f"together they form {shown}",
            *((f"noise on it: {noise}",) if noise and not by_devices else ()),
        ),
        "part",
        "one must not pool with the rest",
        min(count, MOST_DRAWN),
    )
    promise = (
        f"What the cloud sees carries noise: {noise}."
        if noise
        else "It carries no noise: secure aggregation alone promises nothing for a device as a whole."
    )
    badge = "need not be trusted" if noise else "sees it unprotected"
    return Trust(
        (middle, cloud(f"{shown} alone", "it", "none" if noise else "part", badge)),
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
        device=(f"adds its part of the noise: {noise}",) if noise and by_devices else (),
        unprotected=(
            "answers from aggregators that all pool their shares, or that depart from the protocol",
        ),
    )


@dataclass(frozen=True)
class Said:
    """Of a user's own channel: its author's ``words``, a sentence each, and what the cloud ``sees``."""

    words: tuple[str, ...]
    sees: str

    def __call__(self, settings: "ChannelConfig", noise: str) -> Trust:
        """See `noised`."""
        promise = f"A release keeps its device-level budget: {noise}." if noise else "It carries no noise."
        return Trust(
            (cloud(self.sees, "it", "part", "trusted as is said below"),),
            (("what the channel makes", "of each device's answers"),),
            (*self.words, promise),
        )
