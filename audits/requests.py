"""What the audits of a run are asked for. Light to import, so that a typo is answered at once."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, get_args

from attacks.registry import ATTACKS, GRADIENT_ATTACKS, LABELS, MODEL_VIEWS
from privkd.channels.registry import OUR_VIEWS, channel_views
from privkd.errors import ConfigError, RunError
from privkd.plugins import nearest_first
from privkd.runs.plugged import load_plugins_for

CanaryKind: TypeAlias = Literal["natural", "mislabelled", "crafted"]

WIRES = OUR_VIEWS
"""The views of our own channels; those of plug-ins' come beside them."""
VIEWS = (*WIRES, *MODEL_VIEWS, "gradient")
PAIRED = "paired-logits"
TRAINING_BASED = "training-based"
PROTOTYPE = "class-prototype"
MATCHING = "prior-matching"
INFORMED = "informed-adversary"
DECODERS = (PAIRED, TRAINING_BASED)
"""They draw images, and nothing else."""
CLASS_ATTACKS = (*DECODERS, PROTOTYPE)
"""They draw the class that the public set lacks."""
_ON_CHANNELS = (*CLASS_ATTACKS, MATCHING)
_ON_MODELS: Mapping[str, tuple[str, ...]] = {
    "teacher": CLASS_ATTACKS,
    "student": (PAIRED, TRAINING_BASED, PROTOTYPE, MATCHING, INFORMED),
    "gradient": (MATCHING,),
}
"""By view."""
_RECONSTRUCTIONS = dict.fromkeys((*_ON_CHANNELS, *(name for names in _ON_MODELS.values() for name in names)))
_LEAST_SHADOWS = 8
_LEAST = {"trials": 10, "shadows": 2, "candidates": 2, "device": 0, "seed": 0}

RUNS = Path("runs")
"""Where commands put what has no ``--out``."""
Kind: TypeAlias = Literal["run", "curve"]
_MARKS: dict[Kind, str] = {"run": "journal.jsonl", "curve": "curve.json"}


class HasPath(Protocol):
    """Anything that lies in a folder, such as a run."""

    @property
    def path(self) -> Path:
        """The folder."""
        ...


RunLike: TypeAlias = str | Path | HasPath | None
"""A run, its folder, or ``None`` for the latest."""


def folder_of(run: RunLike, *kinds: Kind) -> Path:
    """The folder of a run; for ``None`` the latest of ``kinds`` under ``runs/``.

    Raises:
        RunError: there is none.
    """
    if run is None:
        return latest(RUNS, *kinds)
    return Path(run) if isinstance(run, str | Path) else run.path


def latest(root: Path, *kinds: Kind) -> Path:
    """The folder under ``root`` of one of ``kinds`` whose record was written last.

    Raises:
        RunError: there is none.
    """
    found = [record for kind in kinds for record in root.glob(f"*/{_MARKS[kind]}")] if root.is_dir() else []
    if not found:
        start = "privkd train" if "run" in kinds else "privkd curve"
        raise RunError(f"no {' or '.join(kinds)} under {root}/: name its folder, or start one with `{start}`")
    return max(found, key=lambda record: record.stat().st_mtime).parent


def load_plugins_of(run: RunLike, plugins: Iterable[str]) -> None:
    """Load ``plugins`` and those of ``run``, of the latest by default.

    Raises:
        InputError: as `load_plugins_for`.
    """
    folder = None
    with suppress(RunError):
        folder = folder_of(run, "run")
    load_plugins_for(folder, plugins)


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


def reconstruction_attacks_of(view: str) -> tuple[str, ...]:
    """The reconstruction attacks that read ``view``."""
    return _ON_MODELS.get(view, _ON_CHANNELS)


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


@dataclass(frozen=True)
class ReconstructionRequest:
    """What to audit.

    Attributes:
        view: as of `MembershipRequest`, where it learns once for each trial.
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
        if self.attack not in ("all", *_RECONSTRUCTIONS):
            raise ConfigError(f"attack={self.attack!r}: expected one of {sorted({'all', *_RECONSTRUCTIONS})}")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least {least}")
