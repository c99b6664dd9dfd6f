"""A run's folder, read as it lies there: nothing is trained, locked or written."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from audits.estimators import Auc, TprAtFpr
from audits.estimators.rates import Interval, share
from audits.evidence.command import command_of
from audits.evidence.exports import export_files, read_exports
from audits.evidence.facts import (
    Accuracies,
    ChargeFacts,
    FileFacts,
    LabelFacts,
    MembershipFacts,
    RoundFacts,
    RunFacts,
)
from audits.evidence.parsing import count, number, read_json, well_formed
from audits.evidence.rebuilt import RECONSTRUCTION, read_picture, read_reconstruction
from audits.verdict import Finding, Refused
from privkd.config import load_config
from privkd.errors import RunError
from privkd.journal import Head, Journal
from privkd.privacy.bounds import Audited, Check, LowerBound
from privkd.privacy.charges import decode_charge
from privkd.privacy.events import PrivacyEvent, Unit
from privkd.privacy.ledger import Ledger, Statement
from privkd.runs.binding import binding_of

MEMBERSHIP = "audit/membership.json"
_RECORDS = ("config.toml", "journal.jsonl", "ledger.jsonl", "result.json", "versions.json")
_EVIDENCE = (*_RECORDS, MEMBERSHIP, RECONSTRUCTION)

Value = TypeVar("Value")


def is_run(path: Path) -> bool:
    """Whether ``path`` is the folder of a run."""
    return (path / "journal.jsonl").is_file() and (path / "config.toml").is_file()


def read_run(path: Path) -> RunFacts:
    """All that the run in ``path`` says of itself.

    Raises:
        RunError: not a run, or a file of it is damaged or was changed; the message names the file.
    """
    if not is_run(path):
        raise RunError(f"{path} is not the folder of a run: expected its config.toml and journal.jsonl")
    journal = tuple(Journal(path / "journal.jsonl"))
    _check_settings(path, journal)
    config = load_config(path / "config.toml")
    with well_formed(path / "journal.jsonl"):
        rounds = tuple(_round(row) for row in journal if row.get("step") == "round")
    ledger = _ledger(path / "ledger.jsonl", journal)
    finished = any(row.get("step") == "finished" for row in journal)
    statements = ledger.statement() if ledger else ()
    result = _result(path, journal) if finished else {}
    return RunFacts(
        path=path,
        config=config,
        command=command_of(config),
        rounds=rounds,
        statements=statements,
        charges=_charges(path / "ledger.jsonl"),
        accuracies=_accuracies(path, result),
        finished=finished,
        closing=_closing(path, result),
        warnings=_warnings(path, result),
        taken=_taken(path, result),
        membership=_membership(path / MEMBERSHIP, statements),
        reconstruction=read_reconstruction(path, _optional(path / RECONSTRUCTION, dict)),
        exports=read_exports(path),
        versions=_versions(path / "versions.json"),
        binding=binding_of(journal, path / "journal.jsonl"),
        files=tuple(_file(path, name) for name in _evidence(path)),
        started=datetime.fromtimestamp((path / "config.toml").stat().st_mtime).strftime("%Y-%m-%d"),
    )


def _ledger(path: Path, journal: tuple[Mapping[str, Any], ...]) -> Ledger | None:
    """The ledger, with all that the journal saw of it; ``None`` before it was begun."""
    with well_formed(path.parent / "journal.jsonl"):
        heads = [row["ledger"] for row in journal if row.get("step") == "round" and row["ledger"]]
        seen = Head(int(heads[-1]["lines"]), str(heads[-1]["digest"])) if heads else None
    if not path.exists():
        if seen is None:
            return None
        raise RunError(f"{path} is missing, so what the run spent is unknown: restore it")
    return Ledger.load(path, at_least=seen)


def _check_settings(path: Path, journal: tuple[Mapping[str, Any], ...]) -> None:
    noted = journal[0].get("config") if journal else None
    if noted != _digest(path / "config.toml"):
        raise RunError(f"{path / 'config.toml'} was changed since the run was started: restore it")


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from None


def _evidence(path: Path) -> list[str]:
    exports = (str(file.relative_to(path)) for file in export_files(path))
    return [name for name in (*_EVIDENCE, *exports) if (path / name).is_file()]


def _file(path: Path, name: str) -> FileFacts:
    return FileFacts(name, _digest(path / name))


def _round(row: Mapping[str, Any]) -> RoundFacts:
    found = {name: number(row["figures"][name]) for name in ("accepted", "epsilon_record", "epsilon_device")}
    return RoundFacts(number=int(row["round"]), devices=len(row.get("devices", ())), **found)


def _charges(path: Path) -> tuple[ChargeFacts, ...]:
    """The ledger's events by unit and round, devices with equal ones together."""
    if not path.exists():
        return ()
    parties: defaultdict[tuple[Unit, int, PrivacyEvent], int] = defaultdict(int)
    with well_formed(path):
        for batch in Journal(path):
            for row in batch.get("charges", ()):
                charge = decode_charge(row)
                parties[charge.unit, charge.round, charge.event] += 1
    rows = [ChargeFacts(unit, round + 1, count, event) for (unit, round, event), count in parties.items()]
    return tuple(sorted(rows, key=lambda row: (row.unit is Unit.DEVICE, row.round)))


def _result(path: Path, journal: tuple[Mapping[str, Any], ...]) -> Mapping[str, Any]:
    """The finished run's ``result.json``, which the journal vouches for."""
    noted = [row.get("result") for row in journal if row.get("step") == "finished"]
    if noted[-1] != _digest(path / "result.json"):
        raise RunError(f"{path / 'result.json'} was changed since the run finished: resume the run")
    with well_formed(path / "result.json"):
        return dict(read_json(path / "result.json"))


def _closing(path: Path, tree: Mapping[str, Any]) -> Audited:
    with well_formed(path / "result.json"):
        units = {Unit(name): row.get("lower_bound") for name, row in tree.get("ledger", {}).items()}
        bounds = tuple(
            LowerBound(
                unit,
                number(row["epsilon"]),
                number(row["confidence"]),
                count(row["canaries"]),
                str(row.get("path", "a stand-in of the run's mechanisms")),
            )
            for unit, row in units.items()
            if row
        )
        checks = tuple(
            Check(str(row["name"]), row["passed"] is True, str(row["seen"])) for row in tree.get("checks", ())
        )
        return Audited(bounds, checks)


def _warnings(path: Path, tree: Mapping[str, Any]) -> tuple[str, ...]:
    with well_formed(path / "result.json"):
        return tuple(str(words) for words in tree.get("warnings", ()))


def _taken(path: Path, tree: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    with well_formed(path / "result.json"):
        return tuple((str(name), str(words)) for name, words in dict(tree.get("taken", {})).items())


def _accuracies(path: Path, tree: Mapping[str, Any]) -> Accuracies | None:
    with well_formed(path / "result.json"):
        if "test" not in tree:
            return None
        records = count(tree["test"]["records"])
        if records == 0:
            return None

        def measured(model: str, figure: str) -> Interval:
            return share(number(tree[model][figure]), records)

        def student(figure: str) -> Interval | None:
            return None if tree["student"][figure] is None else measured("student", figure)

        return Accuracies(
            digest=str(tree["test"]["digest"]),
            teacher=measured("teacher", "after"),
            before=measured("teacher", "before"),
            control=measured("teacher", "control"),
            students=student("mean"),
            public_only=student("public_only"),
            direct=student("direct"),
            direct_private=student("direct_private"),
        )


def _membership(path: Path, statements: tuple[Statement, ...]) -> MembershipFacts | None:
    tree = _optional(path, dict)
    if tree is None:
        return None
    upper = {row.unit: row.epsilon.high for row in statements}
    with well_formed(path):
        findings = tuple(
            finding.against(upper.get(finding.unit, math.inf)) for finding in map(_finding, tree["views"])
        )
        labels = tuple(_label(row) for row in tree.get("label_distributions", ()))
        if not findings and not labels:
            raise ValueError("no finding")
        curves = path.parent / "roc.png"
        drawn = read_picture(path.parent, curves.name) if curves.exists() else None
        return MembershipFacts(str(tree["target"]), findings, labels, drawn)


def _finding(row: Mapping[str, Any]) -> Finding:
    area = row["auc"]
    return Finding(
        view=str(row["view"]),
        attack=str(row["attack"]),
        unit=Unit(row["unit"]),
        auc=None
        if area is None
        else Auc(
            estimate=number(area["estimate"]),
            low=number(area["low"]),
            high=number(area["high"]),
            members=count(area["members"]),
            nonmembers=count(area["nonmembers"]),
            confidence=number(area["confidence"]),
        ),
        tpr_at_fpr=tuple(_rate(rate) for rate in row["tpr_at_fpr"]),
        epsilon_lower=number(row["epsilon_lower"]),
        epsilon_upper=number(row["epsilon_upper"]),
        delta=number(row["delta"]),
        confidence=number(row["confidence"]),
        members=count(row["members"]),
        nonmembers=count(row["nonmembers"]),
        estimator=str(row["estimator"]),
    )


def _label(row: Mapping[str, Any]) -> LabelFacts:
    ends = {name: number(row[name]) for name in ("low", "high", "confidence")}
    gain = Interval(estimate=number(row["gain"]), n=count(row["devices"]), **ends)
    return LabelFacts(str(row["view"]), gain, number(row["blind"]))


def _rate(row: Mapping[str, Any]) -> TprAtFpr | Refused:
    if "reason" in row:
        return Refused(number(row["fpr"]), str(row["reason"]))
    return TprAtFpr(
        estimate=number(row["estimate"]),
        low=number(row["low"]),
        high=number(row["high"]),
        fpr=number(row["fpr"]),
        threshold=number(row["threshold"]),
        true_positives=count(row["true_positives"]),
        members=count(row["members"]),
        false_positives=count(row["false_positives"]),
        nonmembers=count(row["nonmembers"]),
        confidence=number(row["confidence"]),
    )


def _versions(path: Path) -> tuple[tuple[str, str], ...]:
    tree = _optional(path, dict)
    return tuple((str(name), str(version)) for name, version in (tree or {}).items())


def _optional(path: Path, kind: type[Value]) -> Value | None:
    """The value of a file that need not be there."""
    if not path.exists():
        return None
    tree = read_json(path)
    if not isinstance(tree, kind):
        raise RunError(f"{path} is damaged or was changed (not a {kind.__name__}): restore it")
    return tree
