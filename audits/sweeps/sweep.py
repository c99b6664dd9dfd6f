"""A grid of runs, played or read back: the value that ``privkd curve`` prints, its table and its files."""

import csv
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict

from audits.estimators.rates import CONFIDENCE, Interval
from audits.evidence import write_whole
from audits.requests import RUNS, latest
from audits.sweeps.grid import Grid, Trial, is_done, is_sweep, read_record, spelt
from audits.sweeps.points import (
    Outcome,
    Point,
    audited_views,
    cloud_view,
    points_of,
    rebuilt_views,
    seeds_note,
)
from audits.sweeps.runner import Limits, folder_of, on_stderr, play, unfinished
from privkd.channels.registry import KINDS
from privkd.config import Config
from privkd.errors import ConfigError, PrivkdError, RunError
from privkd.plugins import load_plugins
from privkd.privacy.events import Unit
from privkd.records import Value
from privkd.secure.installed import check_channel

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

TABLE = "curve.csv"


@dataclass(frozen=True)
class Sweep(Value):
    """A grid of runs in ``path``, finished or half finished.

    Attributes:
        path: its folder.
        grid: what it was asked for.
        outcomes: of each trial of the grid, in its order.
        files: that were written last, by their names in the folder.
    """

    path: Path
    grid: Grid
    outcomes: tuple[Outcome, ...]
    files: tuple[str, ...] = ()

    @property
    def done(self) -> tuple[Outcome, ...]:
        """Of the trials that were trained and audited."""
        return tuple(one for one in self.outcomes if one.facts)

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """The rest."""
        return tuple(one for one in self.outcomes if not one.facts)

    @property
    def points(self) -> tuple[Point, ...]:
        """See `points_of`."""
        return points_of(self.grid, self.outcomes)

    @property
    def alarms(self) -> tuple[str, ...]:
        """What attacks achieved in some trial though its ledger rules it out, each in one sentence."""
        return tuple(words for one in self.outcomes if one.facts for words in one.facts.alarm_words)

    @property
    def alarm(self) -> str | None:
        """The first of the alarms, if there are any."""
        if not self.alarms:
            return None
        where = next(one.trial.label for one in self.outcomes if one.facts and one.facts.alarm_words)
        return f"{len(self.alarms)} alarms; in {where}, {self.alarms[0]}; do not release"

    @property
    def failure(self) -> str | None:
        """Which trials are not done, if any, and what to do: exit code 1."""
        if not self.failed:
            return None
        first = self.failed[0]
        return (
            f"{len(self.failed)} of {len(self.outcomes)} cells failed, such as {first.trial.label}: "
            f"{first.reason}; try them again with `privkd curve --resume --out {self.path}`"
        )

    def rows(self) -> list[dict[str, Any]]:
        """One mapping a trial, all with the same keys: see `TrialRow`."""
        return [row.model_dump() for row in trial_rows(self.outcomes)]

    def tree(self) -> dict[str, Any]:
        """The JSON form; infinity is ``"inf"``, what was not measured ``null``."""
        from privkd.records import plain

        return {
            "curve": str(self.path),
            "request": self.grid.model_dump(mode="json"),
            "done": len(self.done),
            "failed": len(self.failed),
            "cells": plain(self.rows()),
            "files": list(self.files),
        }

    def __rich__(self) -> "RenderableType":
        """One row a channel and epsilon, then what failed, then where the files are."""
        from rich.console import Group
        from rich.text import Text

        def line(words: str, style: str = "") -> Text:
            return Text(words, style, no_wrap=True, overflow="ignore")

        head: list[RenderableType] = [_table(self.points), Text(_note(self.points))] if self.points else []
        return Group(
            *head,
            *(line(f"failed: {one.trial.label}: {one.reason}", "red") for one in self.failed),
            *(line(f"{self.path}/{name}") for name in self.files),
        )


def _note(points: Sequence[Point]) -> str:
    return (
        f"Accuracies in %, gain in points over zero devices; {seeds_note(points, 'brackets')}. Epsilon per "
        "record: mean lower bound of attacks on what the cloud sees (95 % confidence in each run), and the "
        "ledger's upper bound."
    )


def _table(points: Sequence[Point]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title="Privacy against utility", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for name in ("channel", "asked", "eps >=/<=", "teacher", "gain", "students", "TPR@1%"):
        table.add_column(name, justify="left" if name == "channel" else "right", overflow="fold")
    for point in points:
        view = cloud_view(point.channel)
        lower = point.lower(view)
        table.add_row(
            point.channel,
            spelt(point.epsilon),
            f"{f'{lower.estimate:.2f}' if lower else '-'}/{point.upper:.3g}",
            _percent(point.accuracy(lambda a: a.teacher)),
            _percent(point.gain),
            _percent(point.accuracy(lambda a: a.students)),
            _percent(point.leak_rate(view)),
        )
    return table


def _percent(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    return f"{100 * interval.estimate:.1f}\n[{100 * interval.low:.1f},{100 * interval.high:.1f}]"


def sweep(
    config: Config | None = None,
    *,
    epsilons: Sequence[float] | str | None = None,
    channels: Sequence[str] | str | None = None,
    seeds: int | None = None,
    audits: Sequence[str] | str | None = None,
    device_epsilon: float | str | None = None,
    shadows: int | None = None,
    targets: int | None = None,
    settings: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    memory: float | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Sweep:
    """Train and audit a grid of runs, and write its table and its figures.

    What is ``None`` is as in `Grid`, or as it was where a sweep is resumed. Trials that failed are outcomes
    like others: see `Sweep.failure`.

    Args:
        config: of every run, but for what the grid varies. Without it a sweep starts from small models.
        epsilons: see `Grid`, and likewise up to ``targets``; text is read as on the command line.
        settings: of every run, by dotted name, over those of ``config``.
        overrides: likewise, as ``a.b=value``.
        jobs: trials at once, as many as there are cores by default.
        memory: GiB for all trials together, what is free by default.
        out: the sweep's folder, a new one under ``runs/`` by default.
        resume: whether to go on with the sweep in ``out``, by default the latest: nothing is played twice.
        progress: whether to tell on stderr how the trials get on.

    Raises:
        ConfigError: a bad value, in any trial, before the first is started.
        RunError: the folder holds something else, is in use, or its data or code changed since.
    """
    limits = Limits.given(jobs, memory)
    path = Path(out) if out is not None else latest(RUNS, "curve") if resume else None
    grid = read_record(path).request if resume and path else Grid()
    grid = grid if config is None else grid.on(config)
    grid = grid.changed(
        epsilons=epsilons, channels=channels, seeds=seeds, audits=audits, device_epsilon=device_epsilon,
        shadows=shadows, targets=targets, overrides=(*grid.overrides, *overrides),
        settings=tuple(sorted({**dict(grid.settings), **(settings or {})}.items())),
    )  # fmt: skip
    if resume:
        _check_trusted(grid, settings or {})
    for trial in grid.trials:
        check_channel(trial.config().channel)
    load_plugins(grid.trials[0].config().plugins)
    for channel in grid.channels:
        KINDS.check(channel)
    if path and not resume:
        _check_unused(path)
    path = path or RUNS / datetime.now().astimezone().strftime("curve-%Y%m%d-%H%M%S")
    # What draws the figures in the end is loaded first, so that nothing is played where it is not installed.
    from audits.sweeps import figures as _  # noqa: F401

    with on_stderr(path, len(unfinished(path, grid)), quiet=not progress) as watcher:
        play(path, grid, limits, watcher)
    found = read_sweep(path)
    return replace(found, files=write_files(found))


def _check_trusted(grid: Grid, given: Mapping[str, str]) -> None:
    """Whoever made the sweep's folder chose its plug-ins: only what is named again now is run."""
    kept = grid.trials[0].config().plugins
    if kept and "plugins" not in given:
        again = " ".join(f"--plugin {name}" for name in kept)
        raise ConfigError(f"the curve has plug-ins: go on with {again}, if you trust them")


def _check_unused(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        hint = f"go on with it: --resume --out {path}" if is_sweep(path) else "name another --out"
        raise RunError(f"{path} is not empty: {hint}")


def read_sweep(path: Path) -> Sweep:
    """All that lies in the folder of a sweep.

    Raises:
        RunError: not a sweep, or its record is damaged. A trial that is damaged has failed.
    """
    record = read_record(path)
    return Sweep(
        path, record.request, tuple(_outcome(path, one, record.failed) for one in record.request.trials)
    )


def _outcome(path: Path, trial: Trial, reasons: Mapping[str, str]) -> Outcome:
    from audits.evidence import is_run, read_run

    folder = folder_of(path, trial)
    if is_done(trial, folder):
        try:
            return Outcome(trial, read_run(folder), "")
        except PrivkdError as error:
            # The other trials are worth no less for it.
            return Outcome(trial, None, " ".join(str(error).split()))
    started = "was interrupted: go on with --resume" if is_run(folder) else "was not started"
    return Outcome(trial, None, reasons.get(trial.folder, started))


def write_files(found: Sweep) -> tuple[str, ...]:
    """Write ``curve.csv`` (RFC 4180) and ``figures/`` into the sweep's folder; returns the files' names."""
    from audits.sweeps.figures import draw_figures

    text, rows = io.StringIO(), found.rows()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files = {TABLE: text.getvalue().encode()}
    for name, kinds in draw_figures(found.grid, found.outcomes).items():
        files |= {f"figures/{name}.{kind}": data for kind, data in kinds.items()}
    for name, data in files.items():
        write_whole(found.path / name, data)
    return tuple(files)


def _known(value: Any) -> Any:
    return None if value == "" else value


def _read(value: Any) -> Any:
    """What CSV made text of."""
    for kind in (int, float) if isinstance(value, str) else ():
        with suppress(ValueError):
            return kind(value)
    return _known(value)


T = TypeVar("T")
Known: TypeAlias = Annotated[T | None, BeforeValidator(_known)]
Figure: TypeAlias = Annotated[str | int | float | None, BeforeValidator(_read)]


class TrialRow(BaseModel):
    """One row of ``curve.csv``: a trial, then columns for every figure with its unit, view and interval.

    Accuracies and rates are shares from 0 to 1, gains are in percentage points, infinity is ``inf``. What was
    not measured is ``None``, and empty in the file. All rows of a sweep have the same columns.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Figure]

    cell: str
    status: Literal["done", "failed"]
    reason: Known[str]
    verdict: Known[str]
    channel: str
    seed: int
    data: Known[str]
    devices: Known[int]
    rounds: Known[int]
    delta: Known[float]


_RUN = {
    "verdict": "standing",
    "data": "config.data.source",
    "devices": "config.data.devices",
    "rounds": "config.rounds",
    "delta": "config.privacy.delta",
}
_SPREAD = {"": "estimate", "_low": "low", "_high": "high"}
_ACCURACIES = ("teacher", "before", "control", "students", "public_only", "direct", "direct_private")
_LOWER = {
    "_epsilon_lower": "epsilon_lower",
    "_epsilon_lower_unit": "unit.value",
    "_epsilon_lower_attack": "attack",
    "_epsilon_lower_confidence": "confidence",
}
_LEAD = {"_rates_attack": "attack", "_members": "members", "_nonmembers": "nonmembers"}
_PICKED = {
    "_picked_attack": "attack",
    "_picked_unit": "unit.value",
    **{f"_picked{end}": f"success.{attribute}" for end, attribute in _SPREAD.items()},
    "_picked_confidence": "success.confidence",
    "_picked_trials": "success.trials",
    "_picked_chance": "success.chance",
    "_picked_ceiling": "ceiling",
}
"""What follows a view in a column's name, and where that stands in the value it is taken from."""


def _columns(name: str, source: object, attributes: Mapping[str, str]) -> dict[str, Any]:
    return {
        f"{name}{end}": None if source is None else attrgetter(attribute)(source)
        for end, attribute in attributes.items()
    }


def trial_rows(outcomes: Sequence[Outcome]) -> list[TrialRow]:
    """One row a trial, in order."""
    views, rebuilt = audited_views(outcomes), rebuilt_views(outcomes)
    found = []
    for one in outcomes:
        columns = _bounds(one) | _utility(one)
        for view in views:
            lead = one.lead(view)
            columns |= _columns(view, one.lower(view), _LOWER) | _columns(view, lead, _LEAD)
            columns |= _columns(f"{view}_auc", lead and lead.auc, _SPREAD)
            columns |= _columns(f"{view}_tpr_at_fpr_0.01", one.leak_rate(view), _SPREAD)
        for view in rebuilt:
            columns |= _columns(view, one.rebuilt(view), _PICKED)
        found.append(
            TrialRow(
                cell=one.trial.folder,
                status="done" if one.facts else "failed",
                reason=one.reason,
                channel=one.trial.channel,
                seed=one.trial.seed,
                **_columns("", one.facts, _RUN),
                **columns,
            )
        )
    return found


def _bounds(one: Outcome) -> dict[str, Any]:
    asked = {Unit.RECORD: one.trial.epsilon, Unit.DEVICE: float("inf")}
    if one.facts and one.facts.config.privacy.device_epsilon is not None:
        asked[Unit.DEVICE] = one.facts.config.privacy.device_epsilon
    found: dict[str, Any] = {}
    for unit in asked:
        statement = one.facts.statement(unit) if one.facts else None
        found[f"{unit}_epsilon_asked"] = asked[unit]
        found |= _columns(unit, statement, {"_epsilon_upper": "epsilon.high", "_method": "method"})
        found[f"{unit}_neighbouring_relation"] = unit.neighbouring_relation
    return found


def _utility(one: Outcome) -> dict[str, Any]:
    measured = one.facts.accuracies if one.facts else None
    found = _columns("test_records", measured, {"": "teacher.n"}) | {"interval_confidence": CONFIDENCE}
    for name in _ACCURACIES:
        found |= _columns(f"accuracy_{name}", measured and getattr(measured, name), _SPREAD)
    for name in ("gain", "student_gain"):
        share = measured and getattr(measured, name)
        points = _columns(f"{'teacher' if name == 'gain' else 'students'}_gain_points", share, _SPREAD)
        found |= {column: value if value is None else 100 * value for column, value in points.items()}
    return found
