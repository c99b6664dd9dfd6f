"""``privkd compare``: two runs, or two curves, side by side. A change is always the second less the first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, PlainSerializer, computed_field
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from audits.estimators.rates import CONFIDENCE, Interval, difference, mean_of
from audits.evidence import Accuracies, RunRecord, read_run
from audits.findings import Finding
from audits.requests import RunLike, folder_of
from audits.sweeps.grid import is_sweep, spelt
from audits.sweeps.sweep import Sweep, read_sweep
from audits.wording import epsilon_text, percent, points, settings_of
from privkd.errors import InputError
from privkd.privacy.events import Unit
from privkd.privacy.ledger import Statement
from privkd.records import Count, FileRecord, Record, Value
from privkd.runs.binding import Binding

_NAMES = {
    "teacher": "teacher after the run",
    "before": "teacher before",
    "control": "control: teacher, zero devices",
    "students": "students, mean",
    "public_only": "students, public distillation only",
    "direct_private": "student trained directly, same budget",
    "direct": "student trained directly, no DP",
}

_PLAIN, _SHOWN = "sha256:", 12
_KEYED = "keyed by the run, so nobody can tell"
_UNKNOWN = "not noted, so nobody can tell"
_MOST_SHOWN = 60

Epsilon: TypeAlias = Annotated[float, BeforeValidator(float), PlainSerializer(spelt, when_used="json")]
"""As people write it."""


@dataclass(frozen=True)
class Differing:
    """A setting, or something that a run rests on, and its two values; ``None`` is not set, or not there."""

    name: str
    first: str | None
    second: str | None


@dataclass(frozen=True)
class Shares:
    """One accuracy of both, and ``second - first`` with its interval."""

    name: str
    first: Interval
    second: Interval
    change: Interval


class Ledgers(Record):
    """One unit's row in both ledgers; ``None`` where nothing was charged."""

    unit: Unit
    first: Statement | None
    second: Statement | None

    @computed_field
    @property
    def neighbouring_relation(self) -> str:
        """In words."""
        return self.unit.neighbouring_relation


@dataclass(frozen=True)
class Leaks:
    """The strongest finding on one view in both; ``None`` where it was not audited."""

    view: str
    first: Finding | None
    second: Finding | None


class RunComparison(FileRecord, Value):
    """Two finished runs.

    Attributes:
        first: the folder of one; ``second`` of the other.
        same_test: whether both were measured on the same records.
        provenance: data files, modules and versions that differ, or of which nobody can tell.
        accuracies: each accuracy of both; the last is the teacher's gain over zero devices.
    """

    kind: Literal["runs"] = "runs"
    first: str
    second: str
    same_test: bool = Field(alias="same_test_records")
    settings: tuple[Differing, ...]
    provenance: tuple[Differing, ...]
    accuracies: tuple[Shares, ...] = Field(alias="accuracy")
    ledgers: tuple[Ledgers, ...] = Field(alias="ledger")
    leaks: tuple[Leaks, ...]

    @property
    def gain(self) -> Shares:
        """The teacher's over zero devices."""
        return self.accuracies[-1]

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One row an accuracy."""
        return [
            {"name": row.name}
            | _ends("first", row.first)
            | _ends("second", row.second)
            | _ends("change", row.change)
            for row in self.accuracies
        ]

    def __rich__(self) -> RenderableType:
        """Settings, data, code and versions, accuracies, ledgers, leaks."""
        title = f"Accuracy on the test set, {100 * CONFIDENCE:g} % intervals"
        table = _table(title, "model", ">A", ">B", ">B - A")
        for row in self.accuracies[:-1]:
            table.add_row(row.name, percent(row.first), percent(row.second), points(row.change))
        gain = self.gain
        table.add_row(gain.name, points(gain.first), points(gain.second), points(gain.change))
        unaudited = Text("Neither run was audited: privkd audit membership RUN.", style="yellow")
        return Group(
            *_legend(self.first, self.second),
            _settings(self.settings),
            _provenance_table(self.provenance),
            table,
            Text(_pairing(self), style="dim"),
            _ledger(self.ledgers),
            _leaks_table(self.leaks) if self.leaks else unaudited,
        )


class PointComparison(Record):
    """One channel and epsilon.

    Attributes:
        seeds: common to both.
        teacher: ``second - first`` of the teacher's accuracy, paired over seeds; a single seed has the
            interval of its test set.
        students: likewise; ``None`` where it was not measured.
        gain: likewise, of what was gained over zero devices.
        runs: the pairs themselves.
    """

    channel: str
    epsilon: Epsilon
    seeds: Count
    teacher: Interval
    students: Interval | None
    gain: Interval
    runs: tuple[RunComparison, ...]


class CurveComparison(FileRecord, Value):
    """Two curves in the folders ``first`` and ``second``, at the points that both have."""

    kind: Literal["curves"] = "curves"
    first: str
    second: str
    settings: tuple[Differing, ...]
    points: tuple[PointComparison, ...]

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One row a point."""
        return [
            {"channel": point.channel, "epsilon": point.epsilon, "seeds": point.seeds}
            | _ends("teacher", point.teacher)
            | _ends("students", point.students)
            | _ends("gain", point.gain)
            for point in self.points
        ]

    def __rich__(self) -> RenderableType:
        """Settings, and the change at each common point."""
        title = f"B - A, paired over common seeds, {100 * CONFIDENCE:g} % intervals"
        table = _table(
            title, "channel", ">epsilon", ">seeds", ">teacher", ">students", ">gain over zero devices"
        )
        ledgers: list[RenderableType] = []
        for point in self.points:
            students = points(point.students) if point.students else "-"
            changes = (points(point.teacher), students, points(point.gain))
            table.add_row(point.channel, spelt(point.epsilon), str(point.seeds), *changes)
            ledgers.append(Text(f"{point.channel}, epsilon {spelt(point.epsilon)}, at the first common seed"))
            ledgers.append(_ledger(point.runs[0].ledgers))
        return Group(*_legend(self.first, self.second), _settings(self.settings), table, *ledgers)


def compare(first: RunLike, second: RunLike) -> RunComparison | CurveComparison:
    """Two runs, or two curves, side by side.

    Raises:
        InputError: they cannot be compared; the message says why.
        RunError: a folder is neither, or damaged.
    """
    one, other = (folder_of(run, "run", "curve") for run in (first, second))
    if is_sweep(one) != is_sweep(other):
        raise InputError(f"{one} and {other}: one is a curve and the other is not; compare two of a kind")
    if is_sweep(one):
        return compare_curves(read_sweep(one), read_sweep(other))
    return compare_runs(read_run(one), read_run(other))


def compare_runs(first: RunRecord, second: RunRecord) -> RunComparison:
    """Both runs side by side.

    Raises:
        InputError: they are one, unfinished, or were measured on different data.
    """
    if first.path.resolve() == second.path.resolve():
        raise InputError(f"both are {first.path}: name two runs")
    one, other = _measured(first), _measured(second)
    settings = _differing(first, second)
    _check_same_data(first, second, same_test=one.digest == other.digest)
    return RunComparison(
        first=str(first.path),
        second=str(second.path),
        same_test=one.digest == other.digest,
        settings=settings,
        provenance=_provenance(first, second),
        # Two differences: their intervals are joined as if independent, like those of shares.
        accuracies=(
            *_shares(one, other),
            Shares("gain over zero devices", one.gain, other.gain, difference(other.gain, one.gain)),
        ),
        ledgers=tuple(
            Ledgers(unit=unit, first=first.statement(unit), second=second.statement(unit))
            for unit in Unit
            if first.statement(unit) or second.statement(unit)
        ),
        leaks=tuple(_leaks(first, second)),
    )


def _measured(facts: RunRecord) -> Accuracies:
    if not facts.finished:
        raise InputError(
            f"{facts.path} is unfinished ({facts.played} of {facts.config.rounds} rounds): "
            f"privkd train --resume {facts.path}"
        )
    if facts.accuracies is None:
        raise InputError(
            f"{facts.path} does not say how many test records it was measured on, so nothing can be compared"
        )
    return facts.accuracies


def _check_same_data(first: RunRecord, second: RunRecord, *, same_test: bool) -> None:
    """Raise unless accuracies of both mean the same."""
    one, other = first.config.data, second.config.data
    if one.source != other.source:
        raise InputError(
            f"{first.path} is on {one.source!r} and {second.path} on {other.source!r}: accuracies on "
            "different data sets cannot be compared"
        )
    if same_test:
        return
    same_draw = first.config.seed == second.config.seed and one == other
    if same_draw or one.data_dir != other.data_dir:
        raise InputError(
            f"{first.path} and {second.path} name {one.source!r}, but their test records differ: the data "
            "were changed in between, and accuracies on different data cannot be compared"
        )


def _differing(first: RunRecord, second: RunRecord) -> tuple[Differing, ...]:
    one, other = settings_of(first.config), settings_of(second.config)
    return tuple(
        Differing(name, one.get(name), other.get(name))
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
    )


def _provenance(first: RunRecord, second: RunRecord) -> tuple[Differing, ...]:
    one, other = dict(first.versions), dict(second.versions)
    versions = [
        Differing(f"version of {name}", one.get(name), other.get(name))
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
    ]
    if first.binding is None or second.binding is None:
        noted = [_UNKNOWN if facts.binding is None else "noted" for facts in (first, second)]
        return (Differing("data and code", *noted), *versions)
    mine, theirs = _digests(first.binding), _digests(second.binding)
    rows = [Differing(name, mine.get(name), theirs.get(name)) for name in dict.fromkeys([*mine, *theirs])]
    records = _records(first, first.binding), _records(second, second.binding)
    if records[0] != records[1] and first.config.seed == second.config.seed:
        rows.append(Differing("data, records as split", *records))
    return (*(row for row in rows if row.first != row.second or row.first == _KEYED), *versions)


def _records(facts: RunRecord, binding: Binding) -> str:
    """The digest of a simulation's records is keyed by its seed, so runs of one seed can be compared."""
    if facts.config.privacy.noise != "seeded":
        return _KEYED
    return binding.records.rpartition(":")[2][:_SHOWN]


def _digests(binding: Binding) -> dict[str, str]:
    """Digests by what they are of, shortened. A keyed one says nothing beside another run's."""
    named = {f"data, {name}": digest for name, digest in binding.data.items()}
    named |= {"classes": binding.classes}
    named |= {f"code, {name}": digest for name, digest in binding.code.items()}
    return {
        name: digest[: _SHOWN + len(_PLAIN)] if digest.startswith(_PLAIN) else _KEYED
        for name, digest in named.items()
    }


def _shares(one: Accuracies, other: Accuracies) -> list[Shares]:
    found = []
    for field, name in _NAMES.items():
        mine, theirs = getattr(one, field), getattr(other, field)
        if isinstance(mine, Interval) and isinstance(theirs, Interval):
            found.append(Shares(name, mine, theirs, difference(theirs, mine)))
    return found


def _leaks(first: RunRecord, second: RunRecord) -> list[Leaks]:
    audits = first.membership, second.membership
    views = dict.fromkeys(view for audit in audits if audit for view in audit.views)
    found = []
    for view in views:
        mine, theirs = (audit.strongest(view) if audit and view in audit.views else None for audit in audits)
        found.append(Leaks(view, mine, theirs))
    return found


def compare_curves(first: Sweep, second: Sweep) -> CurveComparison:
    """Both curves side by side.

    Raises:
        InputError: they are one, have no finished run in common, or were measured on different data.
    """
    if first.path.resolve() == second.path.resolve():
        raise InputError(f"both are {first.path}: name two curves")
    one, other = (each.grid.model_dump(mode="json") for each in (first, second))
    settings = [Differing(name, str(one[name]), str(other[name])) for name in one if one[name] != other[name]]
    common = _points(first, second)
    if not common:
        raise InputError(
            f"{first.path} and {second.path} have no finished run of one channel, epsilon and seed"
        )
    return CurveComparison(
        first=str(first.path), second=str(second.path), settings=tuple(settings), points=common
    )


def _points(first: Sweep, second: Sweep) -> tuple[PointComparison, ...]:
    theirs = {(row.trial.channel, row.trial.epsilon, row.trial.seed): row.facts for row in second.done}
    pairs: dict[tuple[str, float], list[RunComparison]] = {}
    for row in first.done:
        other = theirs.get((row.trial.channel, row.trial.epsilon, row.trial.seed))
        if row.facts and other:
            found = compare_runs(row.facts, other)
            if not found.same_test:
                raise InputError(
                    f"{first.path} and {second.path} were measured on different test records at seed "
                    f"{row.trial.seed}, so nothing can be paired: compare curves of equal data settings"
                )
            pairs.setdefault((row.trial.channel, row.trial.epsilon), []).append(found)
    return tuple(_point(channel, epsilon, runs) for (channel, epsilon), runs in pairs.items())


def _point(channel: str, epsilon: float, runs: list[RunComparison]) -> PointComparison:
    changes = [{shares.name: shares.change for shares in run.accuracies} for run in runs]
    return PointComparison(
        channel=channel,
        epsilon=epsilon,
        seeds=len(runs),
        teacher=_mean([one["teacher after the run"] for one in changes]),
        students=_paired([one["students, mean"] for one in changes if "students, mean" in one]),
        gain=_mean([run.gain.change for run in runs]),
        runs=tuple(runs),
    )


def _paired(changes: list[Interval]) -> Interval | None:
    return _mean(changes) if changes else None


def _mean(changes: list[Interval]) -> Interval:
    return changes[0] if len(changes) == 1 else mean_of([change.estimate for change in changes])


def _ends(name: str, interval: Interval | None) -> dict[str, Any]:
    values = (interval.estimate, interval.low, interval.high) if interval else (None, None, None)
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def _legend(first: str, second: str) -> list[Text]:
    return [
        Text(f"{name}: {path}", no_wrap=True, overflow="ignore")
        for name, path in (("A", first), ("B", second))
    ]


def _pairing(comparison: RunComparison) -> str:
    if comparison.same_test:
        return "Same test records; the intervals take the runs as independent, which makes them wider."
    return "Different test records of one source (another seed or split): two independent samples."


def _table(title: str, *names: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
    return table


def _settings(rows: Sequence[Differing]) -> Table:
    return _differing_table(
        "Settings that differ" if rows else "No setting differs", "setting", rows, "not set"
    )


def _provenance_table(rows: Sequence[Differing]) -> Table | Text:
    if not rows:
        return Text("No data, code or version differs.", style="dim")
    return _differing_table("Data, code and versions that differ", "what", rows, "not there")


def _differing_table(title: str, name: str, rows: Sequence[Differing], absent: str) -> Table:
    table = _table(title, name, "A", "B")
    for row in rows:
        table.add_row(*(Text(_short(text or absent)) for text in (row.name, row.first, row.second)))
    return table


def _short(value: str) -> str:
    return value if len(value) <= _MOST_SHOWN else f"{value[:_MOST_SHOWN]}..."


def _ledger(ledgers: Sequence[Ledgers]) -> Table:
    table = _table(
        "Privacy spent, upper bounds (units are never added)", "unit", ">A", ">B", "neighbouring relation"
    )
    for row in ledgers:
        table.add_row(row.unit.value, _upper(row.first), _upper(row.second), row.unit.neighbouring_relation)
    return table


def _upper(row: Statement | None) -> str:
    if row is None:
        return "not charged"
    return f"{epsilon_text(row.high)} of {epsilon_text(row.budget)} at delta {row.delta:g}"


def _leaks_table(leaks: Sequence[Leaks]) -> Table:
    title = "Epsilon per record, highest lower bound of each view (95 % confidence in each run)"
    table = _table(title, "view", ">A", ">B")
    for row in leaks:
        table.add_row(row.view, _lower(row.first), _lower(row.second))
    return table


def _lower(finding: Finding | None) -> str:
    return "not audited" if finding is None else f">= {finding.epsilon_lower:.2f} ({finding.attack})"
