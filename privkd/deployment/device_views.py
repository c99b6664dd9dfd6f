"""What an owner looks at: the status of the device, its ledger, and its student as a file.

All of it reads the state beside a running device, and changes nothing; but for the budget, which changes for
a reason while the device stands still.
"""

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privkd.deployment.device_state import (
    LEDGER_FILE,
    STATUS_FILE,
    Delivered,
    DeviceState,
    Seen,
    Trained,
    agreed_runs,
    read_ledger,
    round_file,
    run_folder,
)
from privkd.deployment.owner import Owner
from privkd.deployment.wire import Reason
from privkd.errors import RunError
from privkd.folder import HeldFolder, read_tensors
from privkd.journal import Head, Journal
from privkd.privacy.events import Budget, Charge, PartyId, Unit
from privkd.privacy.ledger import Ledger, Statement
from privkd.records import Count, Real, Record, Value

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from torch import Tensor

    from privkd.export.record import Exported

_SOON = 30.0
"""Days before its end at which a certificate is called out."""
_STUDENTS: Mapping[str, type[Trained | Delivered]] = {"trained": Trained, "delivered": Delivered}
"""Steps of the journal that leave a student."""


class Spent(Record):
    """What was spent for good on ``unit`` (a Statement's epsilon), of what, and what is left."""

    unit: Unit
    epsilon: Real
    budget: Real
    left: Real


class Status(Record, Value):
    """A device as its owner sees it.

    Attributes:
        device: its name.
        runs: those to which the owner agreed.
        last_question: Unix time; ``None`` before the first.
        run: of that question.
        round: likewise.
        refusals: how many there were for each reason.
        words: why that question was refused; ``None`` where it was answered.
        spent: for each unit, over all runs; none before the first start.
        clock: Unix time of this machine.
        free_bytes: on the disk of the state.
        certificate_days: until the device's certificate ends; ``None`` where it has none.
        warnings: what the owner should look after.
    """

    device: PartyId
    runs: tuple[str, ...]
    last_question: Real | None
    run: str | None
    round: Count | None
    refusals: Mapping[Reason, Count]
    words: str | None
    spent: tuple[Spent, ...]
    clock: Real
    free_bytes: Count
    certificate_days: Real | None
    warnings: tuple[str, ...]

    @property
    def alarm(self) -> str | None:
        """See `Value.alarm`: a cloud saw more charges than the ledger holds."""
        if not self.refusals.get(Reason.WITNESS):
            return None
        return (
            "a cloud was told of charges that this device's ledger lacks: the state was restored from an old "
            "copy, or the cloud is wrong. Restore the newest state; if there is none, retire this device"
        )

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One for each unit."""
        return [{"device": self.device, **each.model_dump()} for each in self.spent]

    def __rich__(self) -> "RenderableType":
        from rich.console import Group
        from rich.markup import escape
        from rich.text import Text

        table = _table(f"Device {self.device}", "what", "value")
        for each in self.spent:
            limit = f"of {each.budget:g}, {each.left:.4g} left"
            without = "without a limit"
            table.add_row(
                f"epsilon per {each.unit}",
                f"{each.epsilon:.4g} {without if math.isinf(each.budget) else limit}",
            )
        refused = ", ".join(f"{count} {reason}" for reason, count in self.refusals.items() if count)
        days = self.certificate_days
        rows = {
            "runs agreed to": str(len(self.runs)),
            "last question": "none" if self.last_question is None else _moment(self.last_question),
            "of run and round": "-" if self.run is None else f"{self.run[:12]}, {self.round}",
            "refused, as": escape(self.words or "-"),
            "refusals": refused or "none",
            "clock": _moment(self.clock),
            "free on the disk": f"{self.free_bytes / 1e9:.1f} GB",
            "certificate": "none" if days is None else f"{days:.0f} days left",
        }
        for name, value in rows.items():
            table.add_row(name, value)
        return Group(table, *(Text(warning, style="yellow") for warning in self.warnings))


def status(owner: Owner) -> Status:
    """How the device fares. Raises `RunError` where its state is damaged, `ConfigError` its certificate."""
    kept = owner.state / STATUS_FILE
    seen = Seen.read(kept) if kept.exists() else Seen()
    ledger, now = read_ledger(owner), time.time()
    days = _days_left(owner.aggregators.certificate)
    return Status(
        device=owner.name,
        runs=agreed_runs(owner),
        last_question=seen.last_question,
        run=seen.run,
        round=seen.round,
        refusals=seen.refusals,
        words=seen.words,
        spent=() if ledger is None else tuple(_spent(owner, ledger, each) for each in ledger.budgets),
        clock=now,
        free_bytes=shutil.disk_usage(owner.state if owner.state.exists() else owner.state.parent).free,
        certificate_days=days,
        warnings=tuple(_warnings(seen, now, days)),
    )


def _spent(owner: Owner, ledger: Ledger, budget: Budget) -> Spent:
    epsilon = ledger.epsilon(budget.unit, owner.name).high
    left = 0.0 if math.isinf(epsilon) else max(0.0, budget.epsilon - epsilon)
    return Spent(unit=budget.unit, epsilon=epsilon, budget=budget.epsilon, left=left)


def _warnings(seen: Seen, now: float, days: float | None) -> list[str]:
    found = []
    if seen.last_question is not None and seen.last_question > now:
        found.append("The clock lies before the last question: set it, or rounds seem to expire.")
    if days is not None and days < _SOON:
        found.append(f"The device's certificate ends in {days:.0f} days: have it renewed.")
    return found


def _days_left(certificate: Path | None) -> float | None:
    if certificate is None:
        return None
    from privkd.secure.certificates import days_left, load_certificate

    return days_left(load_certificate(certificate))


class BookedCharge(Record):
    """One charge: its ``unit``, ``run``, ``round``, and ``event`` in words."""

    unit: Unit
    run: str
    round: Count
    event: str

    @classmethod
    def of(cls, charge: Charge) -> "BookedCharge":
        """That of a ledger's charge, whose label begins with its run."""
        run = charge.label.partition(":")[0]
        return cls(unit=charge.unit, run=run, round=charge.round, event=str(charge.event))


class DeviceLedger(Record, Value):
    """All that was ever spent: the ``statements`` of each unit, and every charge."""

    device: PartyId
    statements: tuple[Statement, ...]
    charges: tuple[BookedCharge, ...]

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One for each charge."""
        return [charge.model_dump() for charge in self.charges]

    def __rich__(self) -> "RenderableType":
        from rich.console import Group

        title = f"Ledger of {self.device}, over all runs"
        totals = _table(title, "unit", "epsilon", "budget", "delta", "charges")
        for row in self.statements:
            figures = (f"{row.high:.4g}", f"{row.budget:g}", f"{row.delta:g}", str(row.charges))
            totals.add_row(row.unit, *figures)
        each = _table("Charges", "unit", "run", "round", "event")
        for charge in self.charges:
            each.add_row(charge.unit, charge.run[:12], str(charge.round), charge.event)
        return Group(totals, each)


def ledger(owner: Owner) -> DeviceLedger:
    """What was spent over all runs. Raises `RunError` where the ledger is missing or damaged."""
    found = _ledger(owner)
    charges = [BookedCharge.of(each) for unit in Unit for each in found.charges(unit, owner.name)]
    return DeviceLedger(device=owner.name, statements=found.statement(), charges=tuple(charges))


def change_budget(owner: Owner, reason: str) -> DeviceLedger:
    """Make the ``[budget]`` of ``device.toml`` the one for good; all charges stay booked.

    Raises:
        RunError: the device runs, or its ledger is missing or damaged.
        InputError: there is no reason.
    """
    _ledger(owner)
    with _Standing(owner.state) as held:
        heads = [record["ledger"] for record in held.journal if "ledger" in record]
        at_least = Head(**heads[-1]) if heads else None
        Ledger.load(owner.state / LEDGER_FILE, at_least=at_least).change(owner.budget.budgets, reason)
    return ledger(owner)


class _Standing(HeldFolder):
    """The state of a device that does not run."""

    subject = DeviceState.subject
    when_kept = DeviceState.when_kept


def export(owner: Owner, run: str | None, form: str, out: Path | None) -> "Exported":
    """Write the student that the device is left with by ``run``, or by its last run, as a file.

    Before the cloud has delivered it, that is the one of the last round that the device trained in.

    Raises:
        RunError: there is none, it was changed, or ``out`` cannot be written.
        ConfigError: an unknown format, or one whose packages are missing.
        ModelError: the student cannot be exported.
    """
    from privkd.deployment.agreement import Agreement
    from privkd.deployment.device import kept_student
    from privkd.export.export import export_model
    from privkd.export.formats import suffix_of
    from privkd.export.record import Exported

    last = _last_student(owner, run)
    agreement = Agreement.read(run_folder(owner.state, last.run), owner.name, owner.encoders)
    kept = _read(owner.state / round_file(last.run, last.round), last.file)
    path = out or Path(f"{owner.name}{suffix_of(form)}")
    plan, student = agreement.published, kept_student(kept, agreement)
    artefact = export_model(student, agreement.proxy, plan.constants, plan.classes, form, path)
    delivered = isinstance(last, Delivered)
    return Exported(
        run=last.run,
        device=owner.name,
        round=last.round + (not delivered),
        delivered=delivered,
        **dict(artefact),
    )


def _read(path: Path, digest: str) -> dict[str, "Tensor"]:
    try:
        return read_tensors(path, digest)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from None


def _last_student(owner: Owner, run: str | None) -> Trained | Delivered:
    for record in reversed(tuple(Journal(owner.state / "journal.jsonl"))):
        kind = _STUDENTS.get(record.get("step", ""))
        if kind is not None and (run is None or record["run"].startswith(run)):
            return kind.model_validate(record)
    raise RunError(f"{owner.name} has trained no student{f' in run {run}' if run else ''} yet")


def _ledger(owner: Owner) -> Ledger:
    found = read_ledger(owner)
    if found is None:
        raise RunError(f"{owner.state} has no ledger yet: `privkd device run` begins it")
    return found


def _moment(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def _table(title: str, *columns: str) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    return table
