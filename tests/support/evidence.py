"""Audits made up for tests: what a report, a curve or a comparison reads back from a run's folder."""

import json
from pathlib import Path
from typing import Any

from audits.estimators import Auc, TprAtFpr
from audits.findings import Finding, LabelFinding, ReconstructionFinding, Refused, Success
from audits.tables import MembershipReport, ReconstructionReport
from privkd.privacy.events import Unit

PNG = b"\x89PNG\r\n\x1a\nmade up"


def finding(view: str = "student", attack: str = "lira-online", lower: float = 0.2, **other: Any) -> Finding:
    """One finding; its upper bound is what the ledger will say when it is read."""
    rate = TprAtFpr(0.02, 0.014, 0.028, 0.01, 0.5, 22, 1100, 11, 1100, 0.95)
    fields: dict[str, Any] = {
        "view": view,
        "attack": attack,
        "unit": Unit.RECORD,
        "auc": Auc(0.55, 0.53, 0.57, 1100, 1100, 0.95),
        "tpr_at_fpr": (rate, Refused(0.001, "too few")),
        "epsilon_lower": lower,
        "epsilon_upper": 3.0,
        "delta": 1e-5,
        "confidence": 0.95,
        "members": 1100,
        "nonmembers": 1100,
        "estimator": "one_run",
    }
    return Finding(**fields | other)


def audited(path: Path, *findings: Finding, labels: bool = False) -> None:
    """Leave a membership audit in the run's folder, with a look at a device's classes where asked."""
    told = LabelFinding(
        view="secure_sum",
        divergence=0.6,
        blind=0.9,
        gain=0.3,
        low=0.2,
        high=0.4,
        confidence=0.95,
        devices=16,
        epsilon_upper=8.0,
    )
    report = MembershipReport(
        run=str(path), channel="secure", findings=findings, labels=(told,) if labels else ()
    )
    _write(path / "audit" / "membership.json", report.tree())


def rebuilt(path: Path, **other: Any) -> None:
    """Leave a reconstruction audit with one finding and one picture in the run's folder."""
    found = ReconstructionFinding(
        view="secure_sum",
        attack="prior-matching",
        target="one record",
        unit=Unit.RECORD,
        prior="uniform among 10 records",
        success=Success(0.12, 0.05, 0.24, chance=0.1, trials=50, confidence=0.95),
        ceiling=0.8,
        alarm_low=0.04,
    )
    grid = other.pop("grid", "audit/grid.png")
    (path / "audit").mkdir(exist_ok=True)
    (path / "audit" / "grid.png").write_bytes(PNG)
    report = ReconstructionReport(
        run=str(path), channel="secure", findings=(found,), grids=(grid,), notes=("a note",)
    )
    tree = report.tree()
    tree["views"][0] |= other
    _write(path / "audit" / "reconstruction.json", tree)


def _write(path: Path, tree: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(tree))
