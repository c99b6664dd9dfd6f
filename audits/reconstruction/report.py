"""A reconstruction audit as JSON."""

from dataclasses import asdict
from typing import Any

from audits.reconstruction.finding import ReconstructionFinding, ReconstructionReport
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
