"""A reconstruction audit as JSON, and as a table for people."""

from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from audits.estimators import TprAtFpr
from audits.reconstruction.finding import ReconstructionFinding, ReconstructionReport
from audits.reconstruction.measures import FALSE_POSITIVE_RATE
from audits.report import REPLAY_NOTE, STYLES
from audits.verdict import Refused
from privkd.result import plain


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
    first = report.findings[0]
    remarks = [
        f"Picked: the share of the trials in which the secret was told from the other candidates (95 % "
        f"interval), over {first.success.trials:,} trials or as stated; chance is a guess without the release.",
        "Ceiling: the most that the ledger allows under the same prior (reconstruction robustness).",
        "Public: SSIM to the target of the public image that is nearest to the reconstruction.",
        REPLAY_NOTE,
        *report.notes,
    ]
    for remark in remarks:
        console.print(Text(remark, style="dim"), highlight=False)
    for name in report.grids:
        console.print(f"grid: {report.run}/{name}", highlight=False, markup=False, soft_wrap=True)


def _table(report: ReconstructionReport) -> Table:
    title = f"Reconstruction audit of {report.run}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("attack", no_wrap=True)
    for name in ("picked", "chance", "ceiling", f"TPR@{100 * FALSE_POSITIVE_RATE:g}%", "SSIM/public"):
        table.add_column(name, justify="right", overflow="fold")
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
    words = {"within bound": "within", "no bound claimed": "no bound", "ALARM": "ALARM"}
    return [
        finding.attack,
        f"{_percent(success.estimate)} [{100 * success.low:.0f},{100 * success.high:.0f}]",
        _percent(success.chance),
        f"{_percent(finding.ceiling)} ({finding.unit.value})" if finding.claimed else "-",
        _rate(finding.tpr_at_fpr),
        _likeness(finding),
        Text(words[finding.verdict], style=STYLES[finding.verdict]),
    ]


def _likeness(finding: ReconstructionFinding) -> str:
    """Images by their similarity, tabular records by their attributes."""
    if finding.likeness is not None:
        return f"{finding.likeness.reconstruction_ssim:.2f}/{finding.likeness.public_ssim:.2f}"
    if finding.attributes is not None:
        return f"{_percent(finding.attributes.right)}/{_percent(finding.attributes.constant)} attributes"
    return "-"


def _rate(rate: TprAtFpr | Refused | None) -> str:
    return _percent(rate.estimate) if isinstance(rate, TprAtFpr) else "-"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
