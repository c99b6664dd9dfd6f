"""What a reconstruction audit is asked for. Light to import, so that a typo is answered at once."""

from collections.abc import Mapping
from dataclasses import dataclass

from privkd.errors import ConfigError

PAIRED = "paired-logits"
TRAINING_BASED = "training-based"
PROTOTYPE = "class-prototype"
MATCHING = "prior-matching"
INFORMED = "informed-adversary"

CHANNEL_VIEWS = ("per_client_logits", "secure_sum", "secure_sum_colluding")
VIEWS = (*CHANNEL_VIEWS, "teacher", "student", "gradient")
DECODERS = (PAIRED, TRAINING_BASED)
"""They draw images, and nothing else."""
CLASS_ATTACKS = (*DECODERS, PROTOTYPE)
"""They draw the class that the public set lacks."""
ATTACKS_OF: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(CHANNEL_VIEWS, (*CLASS_ATTACKS, MATCHING)),
    "teacher": CLASS_ATTACKS,
    "student": (PAIRED, TRAINING_BASED, PROTOTYPE, MATCHING, INFORMED),
    "gradient": (MATCHING,),
}
_LEAST = {"trials": 10, "shadows": 2, "candidates": 2, "device": 0, "seed": 0}


@dataclass(frozen=True)
class ReconstructionRequest:
    """What to audit.

    Attributes:
        view: one of ``VIEWS``, or ``all`` that the run has but ``teacher``, which learns once for each trial.
        attack: one name, or ``all`` of the view.
        trials: audited replays of each game, each with a secret of its own.
        shadows: replays of each candidate that prior-aware matching learns from.
        candidates: records among which the secret one is drawn, uniformly: the prior.
        device: number of the audited device.
        seed: of the secrets and of the replays.
        confidence: with which no alarm of the report is false.
    """

    view: str = "all"
    attack: str = "all"
    trials: int = 50
    shadows: int = 4
    candidates: int = 10
    device: int = 0
    seed: int = 0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        known = ("all", *dict.fromkeys(attack for names in ATTACKS_OF.values() for attack in names))
        for name, value, choices in (
            ("view", self.view, ("all", *VIEWS)),
            ("attack", self.attack, known),
        ):
            if value not in choices:
                raise ConfigError(f"{name}={value!r}: expected one of {sorted(choices)}")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least {least}")
