"""A reconstruction audit as JSON, and as a table for people."""

from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from audits.estimators import TprAtFpr
from audits.reconstructions.finding import ReconstructionFinding, ReconstructionReport
from audits.reconstructions.measures import FALSE_POSITIVE_RATE
from audits.report import REPLAY_NOTE
from audits.verdict import Refused
from privkd.result import plain

_VERDICTS = {
    "within bound": ("within", "green"),
    "no bound claimed": ("no bound", "yellow"),
    "ALARM": ("ALARM", "bold red"),
}


def finding_tree(finding: ReconstructionFinding) -> dict[str, Any]:
    """One finding as JSON values; what does not apply is ``null``."""

    def tree(value: Any) -> dict[str, Any] | None:
        return None if value is None else asdict(value)

    images = finding.images
    return {
        "view": finding.view,
        "attack": finding.attack,
        "target": finding.target,
        "unit": finding.unit.value,
        "neighbouring_relation": finding.unit.neighbouring_relation,
        "prior": finding.prior,
        "reidentification": tree(finding.success),
        "ceiling": finding.ceiling if finding.claimed else None,
        "ssim": images and images.ssim,
        "psnr": images and images.psnr,
        "mse": images and images.mse,
        "attributes": tree(finding.attributes),
        "tpr_at_fpr": tree(finding.tpr_at_fpr),
        "public_already_looks_like_this": tree(finding.likeness),
        "verdict": finding.verdict,
    }


def reconstruction_tree(report: ReconstructionReport) -> dict[str, Any]:
    """What ``privkd audit reconstruction --json`` prints, and ``audit/reconstruction.json`` holds."""
    tree = {
        "run": report.run,
        "channel": report.channel,
        "views": [finding_tree(finding) for finding in report.findings],
        "grids": list(report.grids),
        "notes": list(report.notes),
    }
    return {key: plain(value) for key, value in tree.items()}


def print_reconstruction(report: ReconstructionReport) -> None:
    """The table, what it means, and where the grids are."""
    console = Console()
    console.print(_table(report))
    remarks = [
        "Picked: the share of the trials in which the secret was told from all others, with its 95 % "
        f"interval ({_trials(report)}); chance is a guess without the release.",
        "Ceiling: the most that the ledger allows under the same prior (reconstruction robustness).",
        _likeness_remark(report),
        REPLAY_NOTE,
        *report.notes,
    ]
    for remark in remarks:
        console.print(Text(remark, style="dim"), highlight=False)
    for reason in _refusals(report):
        console.print(Text(f"refused: {reason}", style="yellow"), highlight=False)
    for name in report.grids:
        console.print(f"grid: {report.run}/{name}", highlight=False, markup=False, soft_wrap=True)


def _likeness_remark(report: ReconstructionReport) -> str:
    if any(finding.attributes is not None for finding in report.findings):
        return (
            "Like: attributes that were rebuilt right; public: those that the best constant guess from the "
            "public records has right."
        )
    return "Like: SSIM to the target; public: that of the public image nearest to the reconstruction."


def _refusals(report: ReconstructionReport) -> tuple[str, ...]:
    rates = [finding.tpr_at_fpr for finding in report.findings]
    return tuple(dict.fromkeys(rate.reason for rate in rates if isinstance(rate, Refused)))


def _trials(report: ReconstructionReport) -> str:
    counts = sorted({finding.success.trials for finding in report.findings})
    return " or ".join(f"{count:,}" for count in counts) + " trials"


def _table(report: ReconstructionReport) -> Table:
    title = f"Reconstruction audit of {report.run}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("attack", no_wrap=True)
    for name in ("picked", "chance", "ceiling", f"TPR@{100 * FALSE_POSITIVE_RATE:g}%"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("like/public", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True, min_width=len("no bound"))
    view = ""
    for finding in report.findings:
        if finding.view != view:
            view = finding.view
            table.add_section()
            table.add_row(Text(view, style="bold"))
        table.add_row(*_row(finding))
    return table


def _row(finding: ReconstructionFinding) -> list[str | Text]:
    success = finding.success
    return [
        finding.attack,
        f"{_percent(success.estimate)} [{100 * success.low:.0f},{100 * success.high:.0f}]",
        _percent(success.chance),
        f"{_percent(finding.ceiling)} ({finding.unit.value})" if finding.claimed else "-",
        _rate(finding.tpr_at_fpr),
        _likeness(finding),
        Text(*_VERDICTS[finding.verdict]),
    ]


def _likeness(finding: ReconstructionFinding) -> str:
    """Images by their similarity, tabular records by their attributes."""
    if finding.likeness is not None:
        return f"{finding.likeness.reconstruction_ssim:.2f}/{finding.likeness.public_ssim:.2f}"
    if finding.attributes is not None:
        return f"{100 * finding.attributes.right:.1f}/{_percent(finding.attributes.constant)}"
    return "-"


def _rate(rate: TprAtFpr | Refused | None) -> str:
    return _percent(rate.estimate) if isinstance(rate, TprAtFpr) else "-"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
