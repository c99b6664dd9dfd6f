"""What a reconstruction audit is asked for. Light to import, so that a typo is answered at once."""

from collections.abc import Mapping
from dataclasses import dataclass

from audits.requests import check_view
from privkd.errors import ConfigError

PAIRED = "paired-logits"
TRAINING_BASED = "training-based"
PROTOTYPE = "class-prototype"
MATCHING = "prior-matching"
INFORMED = "informed-adversary"

DECODERS = (PAIRED, TRAINING_BASED)
"""They draw images, and nothing else."""
CLASS_ATTACKS = (*DECODERS, PROTOTYPE)
"""They draw the class that the public set lacks."""
_ON_MODELS: Mapping[str, tuple[str, ...]] = {
    "teacher": CLASS_ATTACKS,
    "student": (PAIRED, TRAINING_BASED, PROTOTYPE, MATCHING, INFORMED),
    "gradient": (MATCHING,),
}
_ON_CHANNELS = (*CLASS_ATTACKS, MATCHING)
_LEAST = {"trials": 10, "shadows": 2, "candidates": 2, "device": 0, "seed": 0}


def attacks_on(view: str) -> tuple[str, ...]:
    """The attacks that read ``view``."""
    return _ON_MODELS.get(view, _ON_CHANNELS)


@dataclass(frozen=True)
class ReconstructionRequest:
    """What to audit.

    Attributes:
        view: as of `MembershipRequest`; ``all`` is without ``teacher``, which learns once for each trial.
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
        check_view(self.view)
        known = {"all", *_ON_CHANNELS, *(attack for names in _ON_MODELS.values() for attack in names)}
        if self.attack not in known:
            raise ConfigError(f"attack={self.attack!r}: expected one of {sorted(known)}")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least {least}")
