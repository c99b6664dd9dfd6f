"""What a membership audit is asked for. Light to import, so that a typo is answered at once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from attacks.membership.registry import SCORES
from privkd.errors import ConfigError

CanaryKind: TypeAlias = Literal["natural", "mislabelled", "crafted"]

CHANNEL_ATTACKS = ("matched-filter", "whitened-filter", "distillation-lira")
QUANTILE = "quantile-regression"
MODEL_ATTACKS = (*SCORES, QUANTILE)
LABELS = "label-distribution"
"""Of the channel's views: it guesses a device's class histogram, not who is in its records."""
ONE_RUN = "canaries-one-run"
GRADIENT_ATTACKS = (ONE_RUN, "canaries-many-trials")
VIEWS = ("per_client_logits", "secure_sum", "secure_sum_colluding", "teacher", "student", "gradient")
WIRES = VIEWS[:3]
"""The views of the channel."""
ATTACKS_OF: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(WIRES, CHANNEL_ATTACKS),
    **dict.fromkeys(VIEWS[3:5], MODEL_ATTACKS),
    "gradient": GRADIENT_ATTACKS,
}
"""The attacks on membership."""
_LEAST_SHADOWS = 8


@dataclass(frozen=True)
class MembershipRequest:
    """What to audit.

    Attributes:
        view: one of ``VIEWS``, or ``all`` that the run has but ``teacher``, which learns once for each model.
        attack: one name, or ``all`` of the view.
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
        known = ("all", LABELS, *dict.fromkeys(attack for names in ATTACKS_OF.values() for attack in names))
        for name, value, choices in (
            ("view", self.view, ("all", *VIEWS)),
            ("attack", self.attack, known),
            ("canaries", self.canaries, get_args(CanaryKind)),
        ):
            if value not in choices:
                raise ConfigError(f"{name}={value!r}: expected one of {sorted(choices)}")
        for name, count, least in (("shadows", self.shadows, _LEAST_SHADOWS), ("targets", self.targets, 1)):
            if count < least:
                raise ConfigError(f"{name}={count}: expected at least {least}")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: expected 0 or more")
