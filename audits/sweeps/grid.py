"""What a sweep plays: a grid of trials, and what of it lies in files.

Light to import, so that a typo is answered at once.
"""

import hashlib
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError, model_validator

from privkd.channels.registry import KINDS, OURS, known
from privkd.config import Config, config_tree, load_config
from privkd.errors import ConfigError, RunError
from privkd.options import setting_of
from privkd.plugins import nearest_first

AUDITS = ("membership", "reconstruction")
RECORD, TRIALS, DONE = "curve.json", "cells", "cell.json"
"""Of a sweep's folder: its `Record`, the folder of its runs, and the `Done` of each."""
_FORMAT = 1
"""Raised whenever an equal trial would be played otherwise."""
_MOST_TRIALS = 10_000

# Small enough for a whole grid on two cores; any of them yields to a setting that is given.
_LIGHT: Mapping[str, Any] = {"teacher.model.name": "mlp", "student.models": "mlp", "controls": False}
_VARIED = ("channel.kind", "privacy.epsilon", "privacy.device_epsilon", "seed")


def spelt(epsilon: float) -> str:
    """An epsilon as people write it; it reads back as the same number."""
    short = f"{epsilon:g}"
    return short if float(short) == epsilon else repr(epsilon)


def _words(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return () if value == "none" else tuple(word.strip() for word in value.split(",") if word.strip())


Epsilon: TypeAlias = Annotated[float, PlainSerializer(spelt, return_type=str)]
Epsilons: TypeAlias = Annotated[tuple[Epsilon, ...], BeforeValidator(_words)]
Words: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_words)]


class Grid(BaseModel):
    """What a sweep is asked for. Tuples may be given as text with commas, as on the command line.

    Attributes:
        epsilons: record-level budgets; ``inf`` is the non-private ceiling.
        channels: kinds of channel; those of plug-ins are known once these are loaded.
        seeds: runs at each point, seeds 0 to ``seeds - 1``; an interval needs two.
        audits: of ``AUDITS``, made on every run; none is allowed.
        device_epsilon: device-level budget of the channels that are ``budgeted``: of the ``noised`` one.
        shadows: of the membership audit.
        targets: likewise.
        settings: of every run, by dotted name.
        overrides: likewise, as ``a.b=value``.

    Raises:
        ConfigError: a value that no sweep can have.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epsilons: Epsilons = (1.0, 3.0, math.inf)
    channels: Words = OURS
    seeds: int = 3
    audits: Words = ("membership",)
    device_epsilon: Epsilon = 8.0
    shadows: int = 16
    targets: int = 8
    settings: tuple[tuple[str, str], ...] = ()
    overrides: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for word in self.audits:
            if word not in AUDITS:
                raise ConfigError(f"audit={word!r}: expected one of {list(AUDITS)}")
        if not any(name.startswith("plugins") for name in (*dict(self.settings), *self.overrides)):
            for word in self.channels:
                if word not in KINDS:
                    raise ConfigError(f"channels={word!r}: expected one of {nearest_first(word, KINDS)}")
        if not self.channels or not self.epsilons:
            raise ConfigError("a curve needs at least one channel and one epsilon")
        for value in (*self.epsilons, self.device_epsilon):
            if not value > 0:
                raise ConfigError(f"epsilon={value:g}: expected a number above 0, or inf")
        budgets = tuple(map(spelt, self.epsilons))
        for name, words in (("channels", self.channels), ("audit", self.audits), ("epsilons", budgets)):
            if len(set(words)) != len(words):
                raise ConfigError(f"{name}={','.join(words)}: each may be named once")
        for name, count in (("seeds", self.seeds), ("targets", self.targets)):
            if count < 1:
                raise ConfigError(f"{name}={count}: expected at least 1")
        if "privacy.unit=person" in (*self.overrides, *map("=".join, self.settings)):
            raise ConfigError(
                "privacy.unit=person: a curve attacks single records, so it is drawn of runs of unit record"
            )
        trials = self.seeds * len(self.channels) * len(self.epsilons)
        if trials > _MOST_TRIALS:
            raise ConfigError(f"{trials:,} cells: expected at most {_MOST_TRIALS:,}; take fewer seeds")
        if "membership" in self.audits and self.shadows < 8:
            raise ConfigError(f"shadows={self.shadows}: expected at least 8")
        return self

    def changed(self, **given: Any) -> "Grid":
        """The same but for what is given and not ``None``.

        Raises:
            ConfigError: a value that no sweep can have.
        """
        try:
            return Grid(**dict(self) | {name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            wrong = error.errors()[0]
            name = str(wrong["loc"][0]).replace("_", "-")
            raise ConfigError(f"--{name} {wrong['input']!r}: expected a number, or inf") from None

    def on(self, config: Config) -> "Grid":
        """The same over the settings of ``config``, of which a sweep varies channel, epsilon and seed."""
        light = _leaves(config_tree(load_config(None, (), _LIGHT)))
        overrides = tuple(
            f"{name}={value}"
            for name, value in _leaves(config_tree(config)).items()
            if name not in _VARIED and light.get(name) != value
        )
        return self.changed(settings=(), overrides=overrides, device_epsilon=config.privacy.device_epsilon)

    @property
    def trials(self) -> tuple["Trial", ...]:
        """Every channel, epsilon and seed; the points of one seed come before the next seed."""
        return tuple(
            Trial(self, channel, epsilon, seed)
            for seed in range(self.seeds)
            for epsilon in self.epsilons
            for channel in self.channels
        )

    @property
    def command(self) -> str:
        """The command that makes an equal curve."""
        words = ["privkd", "curve", "--epsilons", ",".join(map(spelt, self.epsilons))]
        words += ["--channels", ",".join(self.channels), "--seeds", f"{self.seeds}"]
        words += ["--audit", ",".join(self.audits) or "none", "--device-epsilon", spelt(self.device_epsilon)]
        words += ["--shadows", f"{self.shadows}", "--targets", f"{self.targets}"]
        for setting in (*(f"{name}={value}" for name, value in self.settings), *self.overrides):
            words += ["--set", setting]
        return shlex.join(words)


@dataclass(frozen=True)
class Trial:
    """One run of the grid, and the audits that follow it."""

    grid: Grid
    channel: str
    epsilon: float
    seed: int

    @property
    def label(self) -> str:
        """The trial in words, short."""
        return f"{self.channel}, epsilon {spelt(self.epsilon)}, seed {self.seed}"

    def config(self) -> Config:
        """The run's settings.

        Raises:
            ConfigError: a setting is unknown or has a bad value.
        """
        device = self.grid.device_epsilon if known(self.channel).budgeted else None
        varied = dict(zip(_VARIED, (self.channel, self.epsilon, device, self.seed), strict=True))
        given = dict(self.grid.settings)
        clashes = [name for name in varied if name in given or self._overridden(name)]
        if clashes:
            raise ConfigError(f"--set {clashes[0]}: a curve varies it; use its own option")
        light = {
            name: value for name, value in _LIGHT.items() if name not in given and not self._overridden(name)
        }
        return load_config(None, self.grid.overrides, light | given | varied)

    def _overridden(self, name: str) -> bool:
        """Whether an override speaks of the setting, or of the group that it is in."""
        typed = (override.partition("=") for override in self.grid.overrides)
        keys = [setting_of(key.strip(), value) for key, _, value in typed]
        return any(name == key or name.startswith(f"{key}.") for key in keys)

    @property
    def folder(self) -> str:
        """The run's folder, named by all that determines the run."""
        return f"{self.channel}-{spelt(self.epsilon)}-seed{self.seed}-{digest_of(self.config())[:10]}"

    @property
    def key(self) -> str:
        """Digest of all that determines the trial's outcome: the run, and how it is audited."""
        audit = (_FORMAT, self.folder, self.grid.audits, self.grid.shadows, self.grid.targets)
        return _digest(repr(audit))


class Done(BaseModel):
    """What is written last into a trial's folder: the key of its finished audits."""

    key: str


class Record(BaseModel):
    """What a sweep was asked for, and why each trial that failed did, by its folder."""

    format: Literal[1] = 1
    request: Grid
    failed: dict[str, str] = {}


def is_sweep(path: Path) -> bool:
    """Whether ``path`` is the folder of a sweep."""
    return (path / RECORD).is_file()


def read_record(path: Path) -> Record:
    """The record of the sweep in ``path``.

    Raises:
        RunError: not a sweep, or damaged.
    """
    try:
        return Record.model_validate_json((path / RECORD).read_bytes())
    except OSError as error:
        raise RunError(f"{path / RECORD}: {error.strerror or error}") from None
    except (ValueError, ConfigError) as error:
        words = " ".join(str(error).split())
        raise RunError(f"{path / RECORD} is damaged or was changed ({words}): restore it") from None


def is_done(trial: Trial, path: Path) -> bool:
    """Whether the trial in ``path`` was finished, audits and all, as it would be again."""
    try:
        return Done.model_validate_json((path / DONE).read_bytes()).key == trial.key
    except (OSError, ValueError):
        return False


def digest_of(config: Config) -> str:
    """Equal for equal settings, as hexadecimal SHA-256."""
    return _digest(tomli_w.dumps(config_tree(config)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The settings by their dotted names, as TOML on one line."""
    found: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = " ".join(tomli_w.dumps({"_": value}).partition("=")[2].split())
    return found
