"""What a membership audit is asked for. Light to import, so that a typo is answered at once."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from attacks.registry import ATTACKS, GRADIENT_ATTACKS, LABELS, MODEL_VIEWS
from privkd.errors import ConfigError
from privkd.plugins import nearest_first

CanaryKind: TypeAlias = Literal["natural", "mislabelled", "crafted"]

WIRES = ("per_client_logits", "secure_sum", "secure_sum_colluding")
"""The views of the channel."""
VIEWS = (*WIRES, *MODEL_VIEWS, "gradient")
_LEAST_SHADOWS = 8


def attacks_of(view: str) -> tuple[str, ...]:
    """The attacks on membership that read ``view``, those of plug-ins included."""
    if view == "gradient":
        return GRADIENT_ATTACKS
    return tuple(name for name in ATTACKS if ATTACKS[name].reads(view))


@dataclass(frozen=True)
class MembershipRequest:
    """What to audit.

    Attributes:
        view: one of ``VIEWS``, or ``all`` that the run has but ``teacher``, which learns once for each model.
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
        for name, value, choices in (
            ("view", self.view, ("all", *VIEWS)),
            ("canaries", self.canaries, get_args(CanaryKind)),
        ):
            if value not in choices:
                raise ConfigError(f"{name}={value!r}: expected one of {sorted(choices)}")
        own = ("all", LABELS, *GRADIENT_ATTACKS)
        if self.attack not in own and self.attack not in ATTACKS:
            known = nearest_first(self.attack, (*own, *ATTACKS))
            raise ConfigError(f"attack={self.attack!r}: expected one of {known}; --plugin adds more")
        for name, count, least in (("shadows", self.shadows, _LEAST_SHADOWS), ("targets", self.targets, 1)):
            if count < least:
                raise ConfigError(f"{name}={count}: expected at least {least}")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: expected 0 or more")
