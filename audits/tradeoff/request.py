"""What a curve is asked for, and its cells. Light to import, so that a typo is answered at once."""

import hashlib
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import tomli_w

from privkd.config import Config, config_tree, load_config
from privkd.errors import ConfigError
from privkd.options import setting_of

CHANNELS = ("plain", "noised", "secure")
AUDITS = ("membership", "reconstruction")
_FORMAT = 1
"""Raised whenever an equal cell would be played otherwise."""
_MOST_CELLS = 10_000

# Small enough for a whole grid on two cores; any of them yields to --set.
_LIGHT: Mapping[str, Any] = {"teacher.model.name": "mlp", "student.models": "mlp", "controls": False}


@dataclass(frozen=True)
class CurveRequest:
    """A grid of runs.

    Attributes:
        epsilons: record-level budgets; ``inf`` is the non-private ceiling.
        channels: of ``CHANNELS``.
        seeds: runs at each point, seeds 0 to ``seeds - 1``; an interval needs two.
        audits: of ``AUDITS``, made on every run; none is allowed.
        device_epsilon: device-level budget of the ``noised`` channel.
        shadows: of the membership audit.
        targets: likewise.
        settings: of every run, by dotted name.
        overrides: likewise, as ``a.b=value``.
    """

    epsilons: tuple[float, ...] = (1.0, 3.0, math.inf)
    channels: tuple[str, ...] = CHANNELS
    seeds: int = 3
    audits: tuple[str, ...] = ("membership",)
    device_epsilon: float = 8.0
    shadows: int = 16
    targets: int = 8
    settings: tuple[tuple[str, str], ...] = ()
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, given, known in (("channels", self.channels, CHANNELS), ("audit", self.audits, AUDITS)):
            for word in given:
                if word not in known:
                    raise ConfigError(f"{name}={word!r}: expected one of {list(known)}")
            if len(set(given)) != len(given):
                raise ConfigError(f"{name}={','.join(given)}: each may be named once")
        if not self.channels or not self.epsilons:
            raise ConfigError("a curve needs at least one channel and one epsilon")
        for value in (*self.epsilons, self.device_epsilon):
            if not value > 0:
                raise ConfigError(f"epsilon={value:g}: expected a number above 0, or inf")
        if len(set(self.epsilons)) != len(self.epsilons):
            raise ConfigError(f"epsilons={','.join(map(spelt, self.epsilons))}: each may be named once")
        for name, count in (("seeds", self.seeds), ("targets", self.targets)):
            if count < 1:
                raise ConfigError(f"{name}={count}: expected at least 1")
        cells = self.seeds * len(self.channels) * len(self.epsilons)
        if cells > _MOST_CELLS:
            raise ConfigError(f"{cells:,} cells: expected at most {_MOST_CELLS:,}; take fewer seeds")
        if "membership" in self.audits and self.shadows < 8:
            raise ConfigError(f"shadows={self.shadows}: expected at least 8")

    @property
    def cells(self) -> tuple["Cell", ...]:
        """Every channel, epsilon and seed; the points of one seed come before the next seed."""
        return tuple(
            Cell(self, channel, epsilon, seed)
            for seed in range(self.seeds)
            for epsilon in self.epsilons
            for channel in self.channels
        )


@dataclass(frozen=True)
class Cell:
    """One run of the grid, and the audits that follow it."""

    request: CurveRequest
    channel: str
    epsilon: float
    seed: int

    @property
    def label(self) -> str:
        """The cell in words, short."""
        return f"{self.channel}, epsilon {spelt(self.epsilon)}, seed {self.seed}"

    def config(self) -> Config:
        """The run's settings.

        Raises:
            ConfigError: a setting is unknown or has a bad value.
        """
        varied = {
            "channel.kind": self.channel,
            "privacy.epsilon": self.epsilon,
            "privacy.device_epsilon": self.request.device_epsilon if self.channel == "noised" else None,
            "seed": self.seed,
        }
        given = dict(self.request.settings)
        clashes = [name for name in varied if name in given or self._overridden(name)]
        if clashes:
            raise ConfigError(f"--set {clashes[0]}: a curve varies it; use its own option")
        light = {
            name: value for name, value in _LIGHT.items() if name not in given and not self._overridden(name)
        }
        return load_config(None, self.request.overrides, light | given | varied)

    def _overridden(self, name: str) -> bool:
        """Whether an override speaks of the setting, or of the group that it is in."""
        typed = (override.partition("=") for override in self.request.overrides)
        keys = [setting_of(key.strip(), value) for key, _, value in typed]
        return any(name == key or name.startswith(f"{key}.") for key in keys)

    @property
    def folder(self) -> str:
        """The run's folder, named by all that determines the run."""
        text = tomli_w.dumps(config_tree(self.config()))
        return f"{self.channel}-{spelt(self.epsilon)}-seed{self.seed}-{_digest(text)[:10]}"

    @property
    def key(self) -> str:
        """Digest of all that determines the cell's outcome: the run, and how it is audited."""
        request = self.request
        audit = (_FORMAT, self.folder, request.audits, request.shadows, request.targets)
        return _digest(repr(audit))


def spelt(epsilon: float) -> str:
    """An epsilon as people write it."""
    return "inf" if math.isinf(epsilon) else f"{epsilon:g}"


def command_of(request: CurveRequest) -> str:
    """The command that makes an equal curve."""
    words = ["privkd", "curve", "--epsilons", ",".join(map(spelt, request.epsilons))]
    words += ["--channels", ",".join(request.channels), "--seeds", str(request.seeds)]
    words += [
        "--audit",
        ",".join(request.audits) or "none",
        "--device-epsilon",
        spelt(request.device_epsilon),
    ]
    words += ["--shadows", str(request.shadows), "--targets", str(request.targets)]
    for name, value in request.settings:
        words += ["--set", f"{name}={value}"]
    for override in request.overrides:
        words += ["--set", override]
    return shlex.join(words)


def request_tree(request: CurveRequest) -> dict[str, Any]:
    """The request as JSON values."""
    tree = asdict(request)
    tree["epsilons"] = [spelt(value) for value in request.epsilons]
    tree["device_epsilon"] = spelt(request.device_epsilon)
    return tree


def request_of(tree: Mapping[str, Any]) -> CurveRequest:
    """The request that ``request_tree`` gave.

    Raises:
        ConfigError: a bad value.
        ValueError, TypeError, KeyError: not such a tree.
    """
    if set(tree) != {field.name for field in fields(CurveRequest)}:
        raise ValueError("unknown or missing fields")
    return CurveRequest(
        epsilons=tuple(float(value) for value in tree["epsilons"]),
        channels=tuple(str(value) for value in tree["channels"]),
        seeds=int(tree["seeds"]),
        audits=tuple(str(value) for value in tree["audits"]),
        device_epsilon=float(tree["device_epsilon"]),
        shadows=int(tree["shadows"]),
        targets=int(tree["targets"]),
        settings=tuple((str(name), str(value)) for name, value in tree["settings"]),
        overrides=tuple(str(value) for value in tree["overrides"]),
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
