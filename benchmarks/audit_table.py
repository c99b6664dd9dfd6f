"""The audit's table of channels and budgets: ``python benchmarks/audit_table.py``.

Trains a small run for each channel and epsilon, audits it, and prints one row a view. Runs, shadows and
surrogates are kept in ``--out``, so a second call reads them back; what all attacks found in a cell is in its
``audit/membership.json``.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

# A script's own folder comes first on the path, where ``attacks.py`` would pass for the package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from audits.findings import Finding, Refused  # noqa: E402
from audits.membership_audit import audit_membership, keep_membership  # noqa: E402
from audits.requests import MembershipRequest  # noqa: E402
from audits.tables import MembershipReport  # noqa: E402
from privkd.config import Config, load_config  # noqa: E402
from privkd.progress import Silent  # noqa: E402
from privkd.run import train_in  # noqa: E402
from privkd.runs.folder import RunFolder  # noqa: E402

_CHANNELS = {"plain": None, "noised": 8.0, "secure": None}
"""Each channel's device-level budget; the secure one adds no noise: only the sum protects."""
_BEST_KNOWN = {"student": "lira-online", "gradient": "canaries-many-trials"}
"""The attack whose rates a row shows; elsewhere it is distillation LiRA. Chosen after small runs."""


def config_of(args: argparse.Namespace, channel: str, epsilon: str) -> Config:
    """The settings of one run."""
    settings = {
        "data.source": args.data,
        "channel.kind": channel,
        "privacy.epsilon": epsilon,
        "privacy.device_epsilon": _CHANNELS[channel],
        "rounds": 2,
        "controls": False,
        "teacher.model.name": "mlp",
        "data.data_dir": args.data_dir,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    return load_config(None, args.set or [], given)


def audited(args: argparse.Namespace, channel: str, epsilon: str) -> MembershipReport:
    """Train the run unless it is there, and audit it."""
    path = Path(args.out) / f"{channel}-{epsilon}"
    if not (path / "result.json").exists():
        with RunFolder.create(path, config_of(args, channel, epsilon)) as folder:
            train_in(folder.config, folder, Silent())
    with RunFolder.resume(path) as folder:
        report = audit_membership(folder, MembershipRequest(targets=args.targets), Silent())
        return keep_membership(folder, report)


def rows(channel: str, epsilon: str, report: MembershipReport) -> list[str]:
    """One Markdown row for each view."""
    found: dict[str, list[Finding]] = {}
    for finding in report.findings:
        found.setdefault(finding.view, []).append(finding)
    return [_row(channel, epsilon, view, findings) for view, findings in found.items()]


def _row(channel: str, epsilon: str, view: str, findings: Sequence[Finding]) -> str:
    shown = _BEST_KNOWN.get(view, "distillation-lira")
    finding = next(f for f in findings if f.attack == shown)
    rate = finding.tpr_at_fpr[0]
    tpr = (
        "refused"
        if isinstance(rate, Refused)
        else f"{100 * rate.estimate:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
    )
    area = finding.auc
    auc = "-" if area is None else f"{area.estimate:.3f} [{area.low:.3f}, {area.high:.3f}]"
    lower, upper = max(f.epsilon_lower for f in findings), finding.epsilon_upper
    cells = (
        channel,
        epsilon,
        view,
        shown,
        auc,
        tpr,
        f"{lower:.2f}",
        "inf" if math.isinf(upper) else f"{upper:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/audit-table")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--channels", default="plain,noised,secure")
    parser.add_argument("--epsilons", default="inf,8,3,1")
    parser.add_argument("--targets", type=int, default=16)
    parser.add_argument("--set", action="append", help="any setting of the run, as a.b=value")
    args = parser.parse_args()
    print("| channel | epsilon | view | attack | AUC | TPR @ 1 % FPR, in % | eps >= | eps <= |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for channel in args.channels.split(","):
        for epsilon in args.epsilons.split(","):
            print("\n".join(rows(channel, epsilon, audited(args, channel, epsilon))), flush=True)


if __name__ == "__main__":
    main()
