"""The curve as a tidy table: one row a cell and seed, every figure with its unit, view and interval."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from audits.estimators.rates import CONFIDENCE, Interval
from audits.evidence.facts import Accuracies
from audits.tradeoff.curve import Curve, Row
from privkd.privacy.events import Unit

Value: TypeAlias = str | int | float | None
_ACCURACIES = ("teacher", "before", "control", "students", "public_only", "direct", "direct_private")


def rows_of(curve: Curve) -> list[Mapping[str, Value]]:
    """One mapping a cell, all with the same keys; ``None`` is what was not measured.

    Accuracies and rates are shares from 0 to 1, gains are in percentage points.
    """
    return [
        {
            **_cell(row),
            **_bounds(row),
            **_utility(row),
            **_leaks(row, curve.views),
            **_rebuilt(row, curve.rebuilt_views),
        }
        for row in curve.rows
    ]


def as_csv(rows: Sequence[Mapping[str, Value]]) -> str:
    """The table as CSV (RFC 4180); infinity is ``inf``, what was not measured is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell_text(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _cell_text(value: Value) -> str:
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)


def _cell(row: Row) -> Mapping[str, Value]:
    facts, cell = row.facts, row.cell
    return {
        "cell": cell.folder,
        "status": "done" if facts else "failed",
        "reason": row.reason or None,
        "verdict": facts.standing if facts else None,
        "channel": cell.channel,
        "seed": cell.seed,
        "data": facts.config.data.source if facts else None,
        "devices": facts.config.data.devices if facts else None,
        "rounds": facts.config.rounds if facts else None,
        "delta": facts.config.privacy.delta if facts else None,
    }


def _bounds(row: Row) -> Mapping[str, Value]:
    facts = row.facts
    asked = {Unit.RECORD: row.cell.epsilon, Unit.DEVICE: math.inf}
    if facts and facts.config.privacy.device_epsilon is not None:
        asked[Unit.DEVICE] = facts.config.privacy.device_epsilon
    found: dict[str, Value] = {}
    for unit in Unit:
        statement = facts.statement(unit) if facts else None
        found[f"{unit}_epsilon_asked"] = asked[unit]
        found[f"{unit}_epsilon_upper"] = statement.epsilon.high if statement else None
        found[f"{unit}_method"] = statement.method if statement else None
        found[f"{unit}_neighbouring_relation"] = unit.neighbouring_relation
    return found


def _utility(row: Row) -> Mapping[str, Value]:
    facts = row.facts
    measured = facts.accuracies if facts else None
    found: dict[str, Value] = {
        "test_records": measured.teacher.n if measured else None,
        "interval_confidence": CONFIDENCE,
    }
    for name in _ACCURACIES:
        found |= _spread(f"accuracy_{name}", _accuracy(measured, name))
    for name, interval in (
        ("teacher_gain_points", measured.gain if measured else None),
        ("students_gain_points", measured.student_gain if measured else None),
    ):
        found |= _spread(name, interval, scale=100)
    return found


def _accuracy(measured: Accuracies | None, name: str) -> Interval | None:
    found = getattr(measured, name) if measured else None
    return found if isinstance(found, Interval) else None


def _spread(name: str, interval: Interval | None, scale: float = 1) -> Mapping[str, Value]:
    if interval is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    values = interval.estimate, interval.low, interval.high
    return dict(zip((name, f"{name}_low", f"{name}_high"), (scale * value for value in values), strict=True))


def _rebuilt(row: Row, views: Sequence[str]) -> Mapping[str, Value]:
    """For each view: how often the secret record was picked, beside chance and the ledger's ceiling."""
    found: dict[str, Value] = {}
    for view in views:
        one = row.rebuilt(view)
        found[f"{view}_picked_attack"] = one.attack if one else None
        found[f"{view}_picked_unit"] = one.unit.value if one else None
        found |= _spread(f"{view}_picked", one.success if one else None)
        found[f"{view}_picked_confidence"] = one.success.confidence if one else None
        found[f"{view}_picked_trials"] = one.success.n if one else None
        found[f"{view}_picked_chance"] = one.chance if one else None
        found[f"{view}_picked_ceiling"] = one.ceiling if one else None
    return found


def _leaks(row: Row, views: Sequence[str]) -> Mapping[str, Value]:
    """For each view: the highest lower bound, and the lead attack's rates."""
    found: dict[str, Value] = {}
    for view in views:
        lower, lead, rate = row.lower(view), row.lead(view), row.leak_rate(view)
        area = lead.auc if lead else None
        found[f"{view}_epsilon_lower"] = lower.epsilon_lower if lower else None
        found[f"{view}_epsilon_lower_unit"] = lower.unit.value if lower else None
        found[f"{view}_epsilon_lower_attack"] = lower.attack if lower else None
        found[f"{view}_epsilon_lower_confidence"] = lower.confidence if lower else None
        found[f"{view}_rates_attack"] = lead.attack if lead else None
        found[f"{view}_members"] = lead.members if lead else None
        found[f"{view}_nonmembers"] = lead.nonmembers if lead else None
        for name, one in (("auc", area), ("tpr_at_fpr_0.01", rate)):
            found[f"{view}_{name}"] = one.estimate if one else None
            found[f"{view}_{name}_low"] = one.low if one else None
            found[f"{view}_{name}_high"] = one.high if one else None
    return found
