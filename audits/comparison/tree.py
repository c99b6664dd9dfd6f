"""A comparison as JSON; a change is always the second less the first."""

from dataclasses import asdict
from typing import Any

from audits.comparison.curves import CurveComparison, PointComparison
from audits.comparison.runs import Leaks, Ledgers, RunComparison
from audits.report import finding_tree
from audits.sweeps.grid import spelt
from privkd.privacy.ledger import Statement
from privkd.result import plain


def runs_tree(comparison: RunComparison) -> dict[str, Any]:
    """Two runs."""
    tree = {
        "kind": "runs",
        "first": str(comparison.first.path),
        "second": str(comparison.second.path),
        "same_test_records": comparison.same_test,
        "settings": [asdict(row) for row in comparison.settings],
        "provenance": [asdict(row) for row in comparison.provenance],
        "accuracy": [asdict(row) for row in (*comparison.accuracies, comparison.gain)],
        "ledger": [_ledgers(row) for row in comparison.ledgers],
        "leaks": [_leaks(row) for row in comparison.leaks],
    }
    return {key: plain(value) for key, value in tree.items()}


def curves_tree(comparison: CurveComparison) -> dict[str, Any]:
    """Two curves."""
    tree = {
        "kind": "curves",
        "first": str(comparison.first.path),
        "second": str(comparison.second.path),
        "settings": [asdict(row) for row in comparison.settings],
        "points": [_point(point) for point in comparison.points],
    }
    return {key: plain(value) for key, value in tree.items()}


def _point(point: PointComparison) -> dict[str, Any]:
    return {
        "channel": point.channel,
        "epsilon": spelt(point.epsilon),
        "seeds": point.seeds,
        "teacher": asdict(point.teacher),
        "students": point.students and asdict(point.students),
        "gain": asdict(point.gain),
        "runs": [runs_tree(run) for run in point.runs],
    }


def _ledgers(row: Ledgers) -> dict[str, Any]:
    return {
        "unit": row.unit.value,
        "neighbouring_relation": row.unit.neighbouring_relation,
        "first": _statement(row.first),
        "second": _statement(row.second),
    }


def _statement(row: Statement | None) -> dict[str, Any] | None:
    if row is None:
        return None
    bracket = [row.epsilon.low, row.epsilon.high]
    return {
        "epsilon_upper": row.epsilon.high,
        "epsilon_bracket": bracket,
        "delta": row.delta,
        "budget": row.budget,
    }


def _leaks(row: Leaks) -> dict[str, Any]:
    found = {"first": row.first, "second": row.second}
    return {"view": row.view} | {name: one and finding_tree(one) for name, one in found.items()}
