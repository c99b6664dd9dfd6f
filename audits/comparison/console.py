"""A comparison as tables for people."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from audits.comparison.curves import CurveComparison
from audits.comparison.runs import Differing, Leaks, Ledgers, RunComparison
from audits.estimators.rates import CONFIDENCE
from audits.evidence.wording import epsilon_text, percent, points
from audits.sweeps.grid import spelt
from audits.verdict import Finding
from privkd.privacy.ledger import Statement

_MOST_SHOWN = 60


def print_runs(comparison: RunComparison) -> None:
    """Settings, data, code and versions, accuracies, ledgers, leaks."""
    console = Console()
    _legend(console, str(comparison.first.path), str(comparison.second.path))
    console.print(_settings(comparison.settings))
    console.print(_provenance(comparison.provenance))
    table = _table(
        f"Accuracy on the test set, {100 * CONFIDENCE:g} % intervals", "model", ">A", ">B", ">B - A"
    )
    for row in comparison.accuracies:
        table.add_row(row.name, percent(row.first), percent(row.second), points(row.change))
    gain = comparison.gain
    table.add_row(gain.name, points(gain.first), points(gain.second), points(gain.change))
    console.print(table)
    console.print(Text(_pairing(comparison), style="dim"))
    console.print(_ledger(comparison.ledgers))
    if comparison.leaks:
        console.print(_leaks(comparison.leaks))
    else:
        console.print(Text("Neither run was audited: privkd audit membership RUN.", style="yellow"))


def print_curves(comparison: CurveComparison) -> None:
    """Settings, and the change at each common point."""
    console = Console()
    _legend(console, str(comparison.first.path), str(comparison.second.path))
    console.print(_settings(comparison.settings))
    title = f"B - A, paired over common seeds, {100 * CONFIDENCE:g} % intervals"
    table = _table(title, "channel", ">epsilon", ">seeds", ">teacher", ">students", ">gain over zero devices")
    for point in comparison.points:
        students = points(point.students) if point.students else "-"
        changes = (points(point.teacher), students, points(point.gain))
        table.add_row(point.channel, spelt(point.epsilon), str(point.seeds), *changes)
    console.print(table)
    for point in comparison.points:
        console.print(
            Text(f"{point.channel}, epsilon {spelt(point.epsilon)}, seed {point.runs[0].first.config.seed}")
        )
        console.print(_ledger(point.runs[0].ledgers))


def _legend(console: Console, first: str, second: str) -> None:
    for name, path in (("A", first), ("B", second)):
        console.print(f"{name}: {path}", highlight=False, markup=False, soft_wrap=True)


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
    return _differing("Settings that differ" if rows else "No setting differs", "setting", rows, "not set")


def _provenance(rows: Sequence[Differing]) -> Table | Text:
    if not rows:
        return Text("No data, code or version differs.", style="dim")
    return _differing("Data, code and versions that differ", "what", rows, "not there")


def _differing(title: str, name: str, rows: Sequence[Differing], absent: str) -> Table:
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
    return f"{epsilon_text(row.epsilon.high)} of {epsilon_text(row.budget)} at delta {row.delta:g}"


def _leaks(leaks: Sequence[Leaks]) -> Table:
    title = "Epsilon per record, highest lower bound of each view (95 % confidence in each run)"
    table = _table(title, "view", ">A", ">B")
    for row in leaks:
        table.add_row(row.view, _lower(row.first), _lower(row.second))
    return table


def _lower(finding: Finding | None) -> str:
    return "not audited" if finding is None else f">= {finding.epsilon_lower:.2f} ({finding.attack})"
