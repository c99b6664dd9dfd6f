"""An audit's findings as JSON, as a table for people, and as curves in the run's folder."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attacks.registry import LABELS
from audits.curves import Roc, draw, roc
from audits.estimators import TprAtFpr
from audits.mechanisms.audit import Examined, MechanismReport
from audits.membership_inference import MembershipReport, Scored
from audits.verdict import Finding, Refused
from audits.views import LabelFinding
from privkd.privacy.events import Unit
from privkd.result import plain
from privkd.runs.folder import RunFolder

_CELL = 11
_STYLES = {"ALARM": "bold red", "within bound": "green", "no bound claimed": "yellow"}
REPLAY_NOTE = (
    "The audited target is a replay of the run's device side under the run's own mechanism and noise "
    "scales, on records that a seeded coin picked beforehand."
)
_PIPE_WIDTH = 110


def finding_tree(finding: Finding) -> dict[str, Any]:
    """One finding as JSON values; infinity is ``"inf"``."""
    return {
        "view": finding.view,
        "attack": finding.attack,
        "unit": finding.unit.value,
        "neighbouring_relation": finding.unit.neighbouring_relation,
        "auc": None if finding.auc is None else asdict(finding.auc),
        "tpr_at_fpr": [asdict(rate) for rate in finding.tpr_at_fpr],
        "epsilon_lower": finding.epsilon_lower,
        "epsilon_upper": finding.epsilon_upper,
        "delta": finding.delta,
        "confidence": finding.confidence,
        "members": finding.members,
        "nonmembers": finding.nonmembers,
        "estimator": finding.estimator,
        "verdict": finding.verdict,
    }


def label_tree(finding: LabelFinding) -> dict[str, Any]:
    """One label-distribution finding as JSON values; divergences in nats."""
    return {"attack": LABELS, "unit": Unit.DEVICE.value, "reveals": finding.reveals, **asdict(finding)}


def report_tree(report: MembershipReport) -> dict[str, Any]:
    """What ``privkd audit membership --json`` prints."""
    tree = {
        "run": report.run,
        "channel": report.channel,
        "target": REPLAY_NOTE,
        "views": [finding_tree(finding) for finding in report.findings],
        "label_distributions": [label_tree(finding) for finding in report.labels],
    }
    return {key: plain(value) for key, value in tree.items()}


def write_curves(folder: RunFolder, scored: Sequence[Scored]) -> tuple[str, ...]:
    """The ROC curves, if any, as ``audit/roc.svg`` and ``audit/roc.png``; returns these names."""
    if not scored:
        return ()
    curves: dict[str, list[Roc]] = {}
    for scores in scored:
        inside = scores.inside
        curves.setdefault(scores.view, []).append(
            roc(scores.attack, scores.values[inside], scores.values[~inside])
        )
    fewest = min(int((~scores.inside).sum()) for scores in scored)
    drawn = draw(curves, 1 / fewest)
    names = ("audit/roc.svg", "audit/roc.png")
    for name in names:
        folder.write_bytes(name, drawn[name.rsplit(".", 1)[1]])
    return names


def wide_console() -> Console:
    """A terminal's own width; a pipe or a file has none, and gets enough for every column."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, _PIPE_WIDTH))


def print_report(report: MembershipReport, curves: Sequence[str]) -> None:
    """The table, what it means, and where the curves are."""
    console = wide_console()
    if report.findings:
        console.print(findings_table(report.findings, f"Membership audit of {report.run}"))
        for line in _remarks(report.findings):
            console.print(line, highlight=False)
    for finding in report.labels:
        console.print(_labels(finding), highlight=False)
    for name in curves:
        console.print(f"curves: {report.run}/{name}", highlight=False, markup=False, soft_wrap=True)


def findings_table(findings: Sequence[Finding], title: str) -> Table:
    """One row a finding, one section a view."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("attack", no_wrap=True)
    for name in ("AUC", "TPR@1%", "TPR@0.1%"):
        table.add_column(name, justify="right", overflow="fold", min_width=_CELL)
    table.add_column("eps >=/<=", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True, min_width=len("no bound"))
    view = ""
    for finding in findings:
        if finding.view != view:
            view = finding.view
            table.add_section()
            table.add_row(Text(view, style="bold"))
        table.add_row(
            finding.attack,
            _auc(finding),
            *(_rate(rate) for rate in finding.tpr_at_fpr),
            f"{finding.epsilon_lower:.2f}/{_epsilon(finding.epsilon_upper)}",
            _verdict(finding),
        )
    return table


def _remarks(findings: Sequence[Finding]) -> list[Text]:
    first = findings[0]
    remarks = [
        Text(
            f"Unit: {first.unit.neighbouring_relation}; delta {first.delta:g}. All lower bounds hold "
            f"together with confidence {100 * first.confidence:g} %; intervals are 95 % each."
        ),
        Text(REPLAY_NOTE, style="dim"),
    ]
    reasons = dict.fromkeys(
        rate.reason for finding in findings for rate in finding.tpr_at_fpr if isinstance(rate, Refused)
    )
    counts = dict.fromkeys(f"{f.view} {f.members:,} in, {f.nonmembers:,} out" for f in findings)
    return [
        Text(f"Guesses: {'; '.join(counts)}."),
        *remarks,
        *(Text(f"refused: {reason}", style="yellow") for reason in reasons),
    ]


def _labels(finding: LabelFinding) -> Text:
    """Devices' class histograms are no matter of records: their bound is the ledger's of a device."""
    ends = _interval(finding.low, finding.high, 3)
    return Text(
        f"{LABELS} ({finding.view}): KL(true || guess) {finding.divergence:.3f} nats over {finding.devices} "
        f"devices, {finding.blind:.3f} blind; gain {finding.gain:.3f} {ends}, "
        f"{'the classes show' if finding.reveals else 'nothing shown'}; device epsilon <= "
        f"{_epsilon(finding.epsilon_upper)}",
        style="yellow" if finding.reveals else "",
    )


def _auc(finding: Finding) -> str:
    value = finding.auc
    return "-" if value is None else f"{value.estimate:.3f} {_interval(value.low, value.high, 2)}"


def _rate(rate: TprAtFpr | Refused) -> str:
    if isinstance(rate, Refused):
        return "-"
    return f"{100 * rate.estimate:.1f}% {_interval(100 * rate.low, 100 * rate.high, 1)}"


def _interval(low: float, high: float, digits: int) -> str:
    return f"[{low:.{digits}f},{high:.{digits}f}]"


def _epsilon(value: float) -> str:
    return "inf" if math.isinf(value) else f"{value:.4g}"


def _verdict(finding: Finding) -> Text:
    words = {"within bound": "within", "no bound claimed": "no bound", "ALARM": "ALARM"}
    return Text(words[finding.verdict], style=_STYLES[finding.verdict])


def mechanism_tree(report: MechanismReport) -> dict[str, Any]:
    """What ``privkd audit mechanism --json`` prints."""
    return {
        "mechanisms": [plain(finding_tree(finding)) for finding in report.findings],
        "checks": [asdict(check) for check in report.checks],
        "false_alarm": report.false_alarm,
    }


def print_mechanisms(report: MechanismReport) -> None:
    """One row for each mechanism and game, then the checks that failed."""
    title = "Mechanism audit: worst-case inputs through the product's own path"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("mechanism", "game", "unit"):
        table.add_column(name, no_wrap=True)
    for name in ("runs", "eps >=", "eps <="):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("verdict", "checks"):
        table.add_column(name, no_wrap=True)
    for examined in report.examined:
        finding = examined.finding
        table.add_row(
            finding.view,
            finding.attack,
            finding.unit.value,
            f"2 x {finding.members:,}",
            f"{finding.epsilon_lower:.4g}",
            _epsilon(finding.epsilon_upper),
            _verdict(finding),
            _checks(examined),
        )
    console = wide_console()
    console.print(table)
    first = report.findings[0]
    console.print(
        f"All lower bounds hold together with confidence {100 * first.confidence:g} %; "
        f"delta {first.delta:g}. Sound mechanisms fail a check in {100 * report.false_alarm:.1g} % of seeds.",
        highlight=False,
    )
    for check in report.checks:
        if not check.passed:
            console.print(Text(f"FAILS: {check.name} ({check.seen})", style="bold red"), highlight=False)


def _checks(examined: Examined) -> Text:
    """How many there were, and how many failed."""
    failed = sum(not check.passed for check in examined.checks)
    if failed:
        return Text(f"{failed} of {len(examined.checks)} FAIL", style=_STYLES["ALARM"])
    return Text(f"{len(examined.checks)} hold" if examined.checks else "-", style=_STYLES["within bound"])
