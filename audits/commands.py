"""What ``privkd audit`` does, between the command line's parsing and the audits."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from audits.latest import RUNS, latest
from audits.reconstructions.request import ReconstructionRequest
from audits.requests import MembershipRequest
from privkd.errors import RunError
from privkd.runs.plugged import load_plugins_for
from privkd.stdout import print_json

if TYPE_CHECKING:
    from privkd.federation import Federation
    from privkd.privacy.bounds import Audited
    from privkd.progress import Progress
    from privkd.runs.checkpoint import State

__all__ = [
    "MembershipRequest",
    "ReconstructionRequest",
    "closing_audit",
    "load_plugins_of",
    "mechanism_command",
    "membership_command",
    "reconstruction_command",
]


def closing_audit(federation: "Federation", state: "State", progress: "Progress") -> "Audited":
    """See `audits.mechanisms.audit`, which is loaded when it is called."""
    from audits.mechanisms.audit import closing_audit as audit

    return audit(federation, state, progress)


def load_plugins_of(run: Path | None, plugins: Iterable[str]) -> None:
    """Load ``plugins`` and those of the run in ``run``, of the latest by default.

    Raises:
        InputError: as `load_plugins_for`.
    """
    with suppress(RunError):
        run = run or latest(RUNS, "run")
    load_plugins_for(run, plugins)


def membership_command(run: Path | None, request: MembershipRequest, *, as_json: bool) -> None:
    """Audit the run in ``run``, the latest one by default, and print.

    Raises:
        AuditAlarm: a lower bound lies above the ledger's upper bound; it was printed first.
        PrivkdError: see its tree; the message is for people.
    """
    from audits.membership_inference import audit_membership
    from audits.report import print_report, report_tree, write_curves
    from audits.verdict import raise_alarm
    from privkd.console import progress_on_stderr
    from privkd.runs.folder import RunFolder

    with RunFolder.resume(run or latest(RUNS, "run")) as folder:
        with progress_on_stderr() as progress:
            report = audit_membership(folder, request, progress)
        curves = write_curves(folder, report.scored)
        tree = report_tree(report)
        folder.write_json("audit/membership.json", tree)
    if as_json:
        print_json(tree)
    else:
        print_report(report, curves)
    raise_alarm(report.findings)


def reconstruction_command(run: Path | None, request: ReconstructionRequest, *, as_json: bool) -> None:
    """Try to rebuild what the devices of ``run`` held, the latest by default, and print.

    Raises:
        AuditAlarm: a success rate lies above what the ledger allows; it was printed first.
        PrivkdError: see its tree; the message is for people.
    """
    from audits.reconstructions.audit import audit_reconstruction
    from audits.reconstructions.finding import raise_reconstruction_alarm
    from audits.reconstructions.report import print_reconstruction, reconstruction_tree
    from privkd.console import progress_on_stderr
    from privkd.runs.folder import RunFolder

    with RunFolder.resume(run or latest(RUNS, "run")) as folder:
        with progress_on_stderr() as progress:
            report = audit_reconstruction(folder, request, progress)
        tree = reconstruction_tree(report)
        folder.write_json("audit/reconstruction.json", tree)
    if as_json:
        print_json(tree)
    else:
        print_reconstruction(report)
    raise_reconstruction_alarm(report.findings)


def mechanism_command(*, seed: int, as_json: bool) -> None:
    """Audit the channel and the DP-SGD step as they are installed, and print. Raises as above."""
    from audits.mechanisms.audit import audit_mechanisms
    from audits.report import mechanism_tree, print_mechanisms
    from audits.verdict import raise_alarm
    from privkd.console import progress_on_stderr
    from privkd.privacy.bounds import raise_failed

    with progress_on_stderr() as progress:
        report = audit_mechanisms(seed, progress)
    if as_json:
        print_json(mechanism_tree(report))
    else:
        print_mechanisms(report)
    raise_alarm(report.findings)
    raise_failed(report.checks)
