"""A report as JSON: the figures themselves, infinity as ``"inf"``, what is not known as ``null``."""

from dataclasses import asdict
from typing import Any

from audits.dossier.drawing import Trust, trust_of
from audits.dossier.page import Verdict
from audits.dossier.verdicts import verdict_on_curve, verdict_on_run
from audits.evidence.facts import Accuracies, RunFacts
from audits.report import finding_tree
from audits.sweeps.sweep import Sweep
from privkd.privacy.bounds import LowerBound
from privkd.privacy.charges import Charge, encode_charge
from privkd.privacy.ledger import Statement
from privkd.result import plain


def run_tree(facts: RunFacts) -> dict[str, Any]:
    """The facts of one run."""
    tree = {
        "kind": "run",
        "run": str(facts.path),
        "verdict": _verdict(verdict_on_run(facts)),
        "standing": facts.standing,
        "warnings": list(facts.warnings),
        "trust": _trust(trust_of(facts.config)),
        "ledger": {
            "units": [_statement(row, facts.lower_bound(row.unit)) for row in facts.statements],
            "rounds": [
                encode_charge(Charge(row.unit, "each device", row.event, row.round))
                | {"devices": row.parties}
                for row in facts.charges
            ],
        },
        "membership": None
        if facts.membership is None
        else {
            "target": facts.membership.target,
            "findings": [finding_tree(finding) for finding in facts.membership.findings],
            "label_distributions": [asdict(row) for row in facts.membership.labels],
        },
        "reconstruction": None
        if facts.reconstruction is None
        else {
            "findings": [asdict(row) for row in facts.reconstruction.findings],
            "notes": list(facts.reconstruction.notes),
            "grids": [name for name, _ in facts.reconstruction.grids],
        },
        "accuracy": None if facts.accuracies is None else _accuracies(facts.accuracies),
        "exports": [asdict(row) for row in facts.exports],
        "taken": dict(facts.taken),
        "versions": dict(facts.versions),
        "files": {file.name: file.digest for file in facts.files},
        "command": facts.command,
    }
    return {key: plain(value) for key, value in tree.items()}


def curve_report_tree(curve: Sweep) -> dict[str, Any]:
    """The facts of a curve: its table, and the verdict on it."""
    tree = {
        "kind": "curve",
        "curve": str(curve.path),
        "verdict": _verdict(verdict_on_curve(curve)),
        "request": curve.grid.model_dump(mode="json"),
        "cells": curve.rows(),
        "command": curve.grid.command,
    }
    return {key: plain(value) for key, value in tree.items()}


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {"word": verdict.word, "sentences": list(verdict.sentences), "commands": list(verdict.commands)}


def _trust(trust: Trust) -> dict[str, Any]:
    parties = [{"party": box.title, "does": list(box.lines), "trust": box.badge} for box in trust.boxes]
    return {"channel": trust.channel, "parties": parties, "words": list(trust.words)}


def _statement(row: Statement, lower: LowerBound | None) -> dict[str, Any]:
    return {
        "unit": row.unit.value,
        "neighbouring_relation": row.neighbouring_relation,
        "epsilon_upper": row.epsilon.high,
        "epsilon_bracket": [row.epsilon.low, row.epsilon.high],
        "lower_bound": lower and {key: value for key, value in asdict(lower).items() if key != "unit"},
        "budget": row.budget,
        "delta": row.delta,
        "composition": row.method,
        "devices": row.parties,
        "events": row.charges,
        "reasons": list(row.reasons),
    }


def _accuracies(measured: Accuracies) -> dict[str, Any]:
    tree = {name: value for name, value in asdict(measured).items() if name != "digest"}
    students = measured.student_gain
    gains = {"teacher_gain": asdict(measured.gain), "students_gain": students and asdict(students)}
    return {"test_set_sha256": measured.digest, **tree, **gains}
