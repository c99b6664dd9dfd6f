"""What is known of one run: plain frozen values, read once and never changed."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from audits.evidence.intervals import Interval, difference
from audits.verdict import Finding
from privkd.config import RunConfig
from privkd.events import PrivacyEvent, Unit
from privkd.ledger import Statement

Standing: TypeAlias = Literal["ALARM", "within bound", "no protection claimed", "not audited", "unfinished"]
"""What the whole run comes to, worst first."""


@dataclass(frozen=True)
class RoundFacts:
    """What the journal says of one committed round: its number from 0, which is before the first, and the
    upper bounds on epsilon that were spent by its end."""

    number: int
    accepted: float
    epsilon_record: float
    epsilon_device: float


@dataclass(frozen=True)
class ChargeFacts:
    """One kind of event that the ledger booked for ``parties`` devices in a round (from 1)."""

    unit: Unit
    round: int
    parties: int
    event: PrivacyEvent


@dataclass(frozen=True)
class Accuracy:
    """One model's accuracy on the global test set, beside what it is compared with."""

    name: str
    meaning: str
    share: Interval


@dataclass(frozen=True)
class Accuracies:
    """All accuracies of a finished run, each a share of the test set with its interval.

    Attributes:
        digest: SHA-256 of the test set; runs with different ones are not compared.
        teacher: after the last round.
        before: the teacher before any device.
        control: the teacher self-distilled with zero devices.
        students: mean over the devices.
        public_only: likewise, after public distillation alone.
        direct: students trained directly, no DP; ``None`` was not computed.
        direct_private: students trained directly, same budget; likewise.
    """

    digest: str
    teacher: Interval
    before: Interval
    control: Interval
    students: Interval
    public_only: Interval
    direct: Interval | None
    direct_private: Interval | None

    @property
    def gain(self) -> Interval:
        """What the devices added: the teacher after the run against its zero-device control."""
        return difference(self.teacher, self.control)

    @property
    def student_gain(self) -> Interval:
        """What the private records added to the students."""
        return difference(self.students, self.public_only)


@dataclass(frozen=True)
class MembershipFacts:
    """The membership audit's findings, each beside the upper bound of the ledger as it is now."""

    target: str
    findings: tuple[Finding, ...]

    @property
    def views(self) -> tuple[str, ...]:
        """The audited views, in order."""
        return tuple(dict.fromkeys(finding.view for finding in self.findings))

    def of(self, view: str) -> tuple[Finding, ...]:
        """The findings on one view."""
        return tuple(finding for finding in self.findings if finding.view == view)

    def strongest(self, view: str) -> Finding:
        """The view's highest lower bound. As all lower bounds hold together, so does the highest."""
        return max(self.of(view), key=lambda finding: finding.epsilon_lower)


@dataclass(frozen=True)
class FileFacts:
    """A file of the run and its SHA-256."""

    name: str
    digest: str


@dataclass(frozen=True)
class RunFacts:
    """One run's folder.

    Attributes:
        path: the folder.
        config: the settings it was started with.
        command: that starts an equal run.
        rounds: committed ones; the first is before any device.
        statements: the ledger by unit, empty before the first charge.
        charges: the ledger by unit and round.
        accuracies: ``None`` for an unfinished run, or one older than the count of its test records.
        finished: whether all rounds were played and the result written.
        membership: ``None`` where no such audit was made.
        versions: of what computed the run, by name.
        files: what the report rests on.
        started: when the run was started, as the file system says, ``YYYY-MM-DD``.
    """

    path: Path
    config: RunConfig
    command: str
    rounds: tuple[RoundFacts, ...]
    statements: tuple[Statement, ...]
    charges: tuple[ChargeFacts, ...]
    accuracies: Accuracies | None
    finished: bool
    membership: MembershipFacts | None
    versions: tuple[tuple[str, str], ...]
    files: tuple[FileFacts, ...]
    started: str

    @property
    def played(self) -> int:
        """How many rounds were committed."""
        return max(0, len(self.rounds) - 1)

    def statement(self, unit: Unit) -> Statement | None:
        """The ledger's row of one unit."""
        return next((row for row in self.statements if row.unit is unit), None)

    def spent(self, unit: Unit) -> float:
        """The ledger's upper bound on one unit; infinite where nothing vouches for less."""
        row = self.statement(unit)
        return math.inf if row is None else row.epsilon.high

    @property
    def alarms(self) -> tuple[Finding, ...]:
        """Findings whose lower bound lies above the ledger's upper one."""
        found = self.membership.findings if self.membership else ()
        return tuple(finding for finding in found if finding.verdict == "ALARM")

    @property
    def standing(self) -> Standing:
        """What the run comes to, in the order of what an officer must know first."""
        if self.alarms:
            return "ALARM"
        if not self.finished:
            return "unfinished"
        if math.isinf(self.spent(Unit.RECORD)) and math.isinf(self.spent(Unit.DEVICE)):
            return "no protection claimed"
        return "within bound" if self.membership else "not audited"
