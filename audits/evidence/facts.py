"""What is known of one run: plain frozen values, read once and never changed."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from audits.estimators.rates import Interval, difference
from audits.verdict import Finding, Verdict
from privkd.config import Config
from privkd.privacy.bounds import Audited, LowerBound
from privkd.privacy.events import PrivacyEvent, Unit
from privkd.privacy.ledger import Statement
from privkd.runs.binding import Binding

Standing: TypeAlias = Literal["ALARM", "within bound", "no protection claimed", "not audited", "unfinished"]
"""What the whole run comes to, worst first."""


@dataclass(frozen=True)
class RoundFacts:
    """What the journal says of one committed round: its number from 0, which is before the first, how many
    ``devices`` contributed, and the upper bounds on epsilon that were spent by its end."""

    number: int
    devices: int
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
        control: the better of the teachers that learned with zero devices, by self-distillation or from the
            public labels alone.
        students: mean over the devices; ``None`` was not computed, as is right in a deployment.
        public_only: likewise, after public distillation alone.
        direct: students trained directly, no DP; likewise.
        direct_private: students trained directly, same budget; likewise.
    """

    digest: str
    teacher: Interval
    before: Interval
    control: Interval
    students: Interval | None
    public_only: Interval | None
    direct: Interval | None
    direct_private: Interval | None

    @property
    def gain(self) -> Interval:
        """What the devices added: the teacher after the run against its zero-device control."""
        return difference(self.teacher, self.control)

    @property
    def student_gain(self) -> Interval | None:
        """What the private records added to the students."""
        if self.students is None or self.public_only is None:
            return None
        return difference(self.students, self.public_only)


@dataclass(frozen=True)
class LabelFacts:
    """What one view tells of devices' class histograms: a matter of the device, not of a record.

    Attributes:
        view: what the adversary sees.
        gain: what the answers save of the divergence KL(true || guess), in nats; its ``n`` are the devices.
        blind: divergence of the best guess without any answer, in nats.
    """

    view: str
    gain: Interval
    blind: float

    @property
    def reveals(self) -> bool:
        """Whether the interval of the gain lies above zero."""
        return self.gain.low > 0


@dataclass(frozen=True)
class MembershipFacts:
    """The membership audit's findings.

    Attributes:
        target: what was attacked, in words.
        findings: each beside the upper bound of the ledger as it is now.
        labels: about devices' classes; empty where nobody asked.
        curves: the ROC curves as PNG, if they were drawn.
    """

    target: str
    findings: tuple[Finding, ...]
    labels: tuple[LabelFacts, ...]
    curves: bytes | None = field(repr=False)

    @property
    def views(self) -> tuple[str, ...]:
        """The audited views, in order."""
        return tuple(dict.fromkeys(finding.view for finding in self.findings))

    def of(self, view: str) -> tuple[Finding, ...]:
        """The findings on one view."""
        return tuple(finding for finding in self.findings if finding.view == view)

    @property
    def best(self) -> Finding | None:
        """The highest lower bound of all views, if membership was guessed at all."""
        return max(self.findings, key=lambda finding: finding.epsilon_lower, default=None)

    def strongest(self, view: str) -> Finding:
        """The view's highest lower bound. As all lower bounds hold together, so does the highest."""
        return max(self.of(view), key=lambda finding: finding.epsilon_lower)


@dataclass(frozen=True)
class RebuiltFacts:
    """One reconstruction attack on one view.

    Attributes:
        view: what the adversary sees.
        attack: its name.
        unit: of privacy, of the ceiling.
        target: what is rebuilt, in words.
        prior: of the adversary, in words.
        success: share of the trials in which the true candidate was picked; its ``n`` are the trials.
        chance: of an attack that sees nothing, under the same prior.
        ceiling: most success that the ledger allows; ``None`` where it claims nothing.
        verdict: as the audit gave it.
    """

    view: str
    attack: str
    unit: Unit
    target: str
    prior: str
    success: Interval
    chance: float
    ceiling: float | None
    verdict: Verdict


@dataclass(frozen=True)
class ReconstructionFacts:
    """The reconstruction audit's findings, its remarks, and its picture grids as PNG by name."""

    findings: tuple[RebuiltFacts, ...]
    notes: tuple[str, ...]
    grids: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class ExportFacts:
    """One device's student as a file of its own.

    Attributes:
        device: whose student it is.
        format: of the file.
        size_bytes: of the file.
        parameters: of the student.
        difference: the largest between the file's logits and the student's, on ``records`` public records;
            relative where a logit exceeds 1.
        records: how many.
        latency_ms: of one answer on one CPU thread.
        original_ms: likewise, of the student that was exported.
    """

    device: str
    format: str
    size_bytes: int
    parameters: int
    difference: float
    records: int
    latency_ms: float
    original_ms: float


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
        closing: lower bounds and checks from the audit that the run ended with.
        warnings: what its result says that its epsilons and delta are not worth.
        taken: what in the data was taken for what, in words by its name; empty where its result says nothing.
        membership: ``None`` where no such audit was made; so is ``reconstruction``.
        exports: the students that were exported.
        versions: of what computed the run, by name.
        binding: the data and code that it was started with; ``None`` where it noted none.
        files: what the report rests on.
        started: when the run was started, as the file system says, ``YYYY-MM-DD``.
    """

    path: Path
    config: Config
    command: str
    rounds: tuple[RoundFacts, ...]
    statements: tuple[Statement, ...]
    charges: tuple[ChargeFacts, ...]
    accuracies: Accuracies | None
    finished: bool
    closing: Audited
    warnings: tuple[str, ...]
    taken: tuple[tuple[str, str], ...]
    membership: MembershipFacts | None
    reconstruction: ReconstructionFacts | None
    exports: tuple[ExportFacts, ...]
    versions: tuple[tuple[str, str], ...]
    binding: Binding | None
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

    def lower_bound(self, unit: Unit) -> LowerBound | None:
        """What the closing audit proves of one unit."""
        return next((bound for bound in self.closing.bounds if bound.unit is unit), None)

    @property
    def alarms(self) -> tuple[Finding | RebuiltFacts, ...]:
        """Attacks' findings that the ledger rules out."""
        guessed = self.membership.findings if self.membership else ()
        rebuilt = self.reconstruction.findings if self.reconstruction else ()
        both: tuple[Finding | RebuiltFacts, ...] = (*guessed, *rebuilt)
        return tuple(finding for finding in both if finding.verdict == "ALARM")

    @property
    def audited(self) -> bool:
        """Whether any attack was made on what the run shows of a device."""
        return self.membership is not None or self.reconstruction is not None

    @property
    def alarm_words(self) -> tuple[str, ...]:
        """Each alarm in one sentence."""
        bounds = [(self.lower_bound(row.unit), row) for row in self.statements]
        crossed = [bound.alarm(row.epsilon.high, row.delta) for bound, row in bounds if bound]
        failed = [f"{check.name}: {check.seen}" for check in self.closing.checks if not check.passed]
        return (
            *filter(None, crossed),
            *(f"the audit of the run's own mechanism refutes that {words}" for words in failed),
            *(_in_words(alarm) for alarm in self.alarms),
        )

    @property
    def standing(self) -> Standing:
        """What the run comes to, in the order of what an officer must know first."""
        if self.alarm_words:
            return "ALARM"
        if not self.finished:
            return "unfinished"
        if math.isinf(self.spent(Unit.RECORD)) and math.isinf(self.spent(Unit.DEVICE)):
            return "no protection claimed"
        return "within bound" if self.audited else "not audited"


def _in_words(alarm: Finding | RebuiltFacts) -> str:
    if isinstance(alarm, Finding):
        return alarm.alarm_words
    return (
        f"view {alarm.view}, attack {alarm.attack}: the secret was picked in "
        f"{100 * alarm.success.estimate:.3g} % of {alarm.success.n:,} trials, more than the ledger allows "
        f"per {alarm.unit}"
    )
