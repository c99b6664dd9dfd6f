"""What a membership audit is asked for. Light to import, so that a typo is answered at once."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from attacks.registry import ATTACKS, GRADIENT_ATTACKS, LABELS, MODEL_VIEWS
from privkd.channels.registry import OUR_VIEWS, channel_views
from privkd.errors import ConfigError
from privkd.plugins import nearest_first

CanaryKind: TypeAlias = Literal["natural", "mislabelled", "crafted"]

WIRES = OUR_VIEWS
"""The views of our own channels; those of plug-ins' come beside them."""
VIEWS = (*WIRES, *MODEL_VIEWS, "gradient")
_LEAST_SHADOWS = 8


def is_wire(view: str) -> bool:
    """Whether ``view``, of a run, is one of its channel's."""
    return view not in MODEL_VIEWS and view != "gradient"


def check_view(view: str) -> None:
    """Do nothing where ``view`` is ``all``, one of ``VIEWS``, or one of a plug-in's channel.

    Raises:
        ConfigError: it is none of them.
    """
    if view not in ("all", *VIEWS) and view not in channel_views():
        raise ConfigError(f"view={view!r}: expected one of {sorted({'all', *VIEWS, *channel_views()})}")


def attacks_of(view: str) -> tuple[str, ...]:
    """The attacks on membership that read ``view``, those of plug-ins included."""
    if view == "gradient":
        return GRADIENT_ATTACKS
    return tuple(name for name in ATTACKS if ATTACKS[name].reads(view))


@dataclass(frozen=True)
class MembershipRequest:
    """What to audit.

    Attributes:
        view: one of ``VIEWS`` or of a plug-in's channel, or ``all`` that the run has but ``teacher``, which
            learns once for each model.
        attack: one name, or ``all`` of the view; a plug-in that adds it must be loaded.
        shadows: models that the attacks learn from.
        targets: audited replays, each with coins of its own.
        canaries: one of ``CanaryKind``; see ``audits.game.draw_pool``.
        device: number of the audited device.
        seed: of the coins and of the replays.
        confidence: with which all lower bounds of the report hold together.
    """

    view: str = "all"
    attack: str = "all"
    shadows: int = 64
    targets: int = 16
    canaries: str = "natural"
    device: int = 0
    seed: int = 0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        check_view(self.view)
        if self.canaries not in get_args(CanaryKind):
            raise ConfigError(f"canaries={self.canaries!r}: expected one of {sorted(get_args(CanaryKind))}")
        own = ("all", LABELS, *GRADIENT_ATTACKS)
        if self.attack not in own and self.attack not in ATTACKS:
            known = nearest_first(self.attack, (*own, *ATTACKS))
            raise ConfigError(f"attack={self.attack!r}: expected one of {known}; --plugin adds more")
        for name, count, least in (("shadows", self.shadows, _LEAST_SHADOWS), ("targets", self.targets, 1)):
            if count < least:
                raise ConfigError(f"{name}={count}: expected at least {least}")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: expected 0 or more")
