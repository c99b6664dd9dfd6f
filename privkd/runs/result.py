"""A finished run as plain figures: the final table, ``--json``, and ``result.json`` in the run's folder."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from privkd.journal import Head
from privkd.privacy.bounds import Audited, Check, LowerBound, failure
from privkd.privacy.events import PartyId, Unit
from privkd.privacy.joint import Joint, Persons
from privkd.privacy.ledger import Statement, Statements
from privkd.records import Count, FileRecord, Measured, Record, Value
from privkd.runs.elsewhere import Elsewhere

_MOST_SHOWN = 20
NO_RECORD_DP = Text("No differential privacy: epsilon is inf, records are not protected.", style="bold red")


@dataclass(frozen=True)
class RoundFigures:
    """How things stand after a round. Accuracies are on the global test set unless named otherwise.

    Attributes:
        teacher: accuracy of the teacher after the round.
        self_distilled: accuracy of the teacher that learned its own answers, with zero devices.
        labels_only: accuracy of the teacher that learned the public labels alone, with zero devices.
        students: mean accuracy of the devices' students, of 20 of them at most.
        accepted: share of the proposed update that the gate let through; 0 is a rollback.
        epsilon_record: upper bound spent so far, worst device; NaN where training protects persons.
        epsilon_device: likewise, per device.
        personal: mean accuracy of the students, each on its device's own test set.
        devices: how many contributed to the round's release; 0 before the first.
        epsilon_person: as ``epsilon_record``, per person; NaN where training protects records.

    No budget of a device covers ``students`` and ``personal``: a deployment measures neither once private
    records are involved, and no run where there is nothing to measure them on. They are NaN then.
    """

    teacher: Measured
    self_distilled: Measured
    labels_only: Measured
    students: Measured
    accepted: Measured
    epsilon_record: Measured
    epsilon_device: Measured
    personal: Measured
    devices: Count
    epsilon_person: Measured = math.nan

    def epsilon(self, unit: Unit) -> float:
        """Upper bound spent so far on ``unit``."""
        return {
            Unit.RECORD: self.epsilon_record,
            Unit.PERSON: self.epsilon_person,
            Unit.DEVICE: self.epsilon_device,
        }[unit]

    @property
    def control(self) -> float:
        """The better of the two teachers that learned with zero devices: what devices must beat."""
        return max(self.self_distilled, self.labels_only)


class RoundRecord(Record):
    """What the journal says of a committed round.

    Attributes:
        number: from 0, which is before the first.
        files: SHA-256 of what was kept of it, by name.
        devices: that contributed.
        measured: its figures by name, but the number of devices.
        ledger: how far the ledger had come.
    """

    step: Literal["round"] = "round"
    number: Count = Field(alias="round")
    files: dict[str, str]
    devices: tuple[PartyId, ...] = ()
    measured: dict[str, Measured] = Field(alias="figures")
    ledger: Head | None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        kept = {"cloud", "wire"} if self.number else {"cloud"}
        named = {field.name: field.default is MISSING for field in fields(RoundFigures)}
        needed = {name for name, always in named.items() if always} - {"devices"}
        if not kept <= set(self.files) or not needed <= set(self.measured) <= set(named) - {"devices"}:
            raise ValueError("files or figures are missing or unknown")
        return self

    @property
    def figures(self) -> RoundFigures:
        """How things stood after it."""
        return RoundFigures(**self.measured, devices=len(self.devices))


@dataclass(frozen=True)
class TeacherResult:
    """Accuracies on the global test set, and the time to answer one record on one CPU thread.

    ``control`` is the better of the two that learned with zero devices: ``self_distilled``, ``labels_only``.
    """

    before: Measured
    after: Measured
    control: Measured
    self_distilled: Measured
    labels_only: Measured
    latency_ms: Measured
    parameters: Count


@dataclass(frozen=True)
class StudentResult:
    """Mean accuracies over the devices, 20 of them at most, on the global test set; ``personal`` on each
    device's own.

    ``mean`` and ``personal`` are of the students that the devices are left with, ``trained`` of those that
    answered in the last round. ``direct``, ``direct_private`` and ``public_only`` are the controls; ``None``,
    or NaN, was not computed.
    """

    mean: Measured
    personal: Measured
    trained: Measured
    direct: Measured | None
    direct_private: Measured | None
    public_only: Measured
    latency_ms: Measured
    parameters: Count


@dataclass(frozen=True)
class ClassResult:
    """The teacher's accuracy on the ``records`` of one class in the global test set.

    ``before`` is that before the first round, ``after`` that after the last: NaN without such records.
    """

    name: str
    records: Count
    before: Measured
    after: Measured


@dataclass(frozen=True)
class TestSet:
    """The global test set: how many ``records``, and the SHA-256 of their inputs and labels."""

    records: Count
    digest: str


class Result(FileRecord, Value):
    """What ``privkd train`` reports. ``ledger`` has one statement for each unit, never a sum.

    The ledger's epsilons are upper bounds, each beside its lower bound where the unit was audited; ``checks``
    were asked of its mechanisms beside them. ``warnings``, ``taken``, ``persons`` and ``joints`` are the
    plan's. ``ran`` is where the devices were; ``None`` where the run's own process played them. ``classes``
    are in the order of their numbers; a run of version 0.1.0 names none.
    """

    run: str
    seed: int
    channel: str
    test: TestSet
    teacher: TeacherResult
    student: StudentResult
    ledger: Statements
    checks: tuple[Check, ...]
    rounds: tuple[RoundFigures, ...]
    noise: str
    warnings: tuple[str, ...]
    taken: dict[str, str]
    seconds: float
    ran: Elsewhere | None = None
    classes: tuple[ClassResult, ...] = ()
    persons: Persons | None = None
    joints: tuple[Joint, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes by name, in the order of their numbers."""
        return tuple(row.name for row in self.classes)

    @property
    def lower_bounds(self) -> tuple[LowerBound, ...]:
        """One for each unit that was audited."""
        return tuple(row.lower_bound for row in self.ledger if row.lower_bound)

    @property
    def audited(self) -> Audited:
        """What the audit at the end of the run came to."""
        return Audited(self.lower_bounds, self.checks)

    def statement(self, unit: Unit) -> Statement:
        """The ledger's row of one unit."""
        return next(row for row in self.ledger if row.unit is unit)

    @property
    def alarm(self) -> str | None:
        """A lower bound above the ledger's upper bound, or a check that failed."""
        failed = failure(self.checks)
        crossed = next((row.alarm for row in self.ledger if row.alarm), None)
        if failed or crossed is None:
            return failed
        return f"{crossed}; do not release {self.run}, the mechanism or its accounting is broken"

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One row a round; the first is before any."""
        return [{"round": number, **asdict(figures)} for number, figures in enumerate(self.rounds)]

    def __rich__(self) -> RenderableType:
        folder = Text(f"run folder: {self.run}   ({self.seconds:.1f} s)", no_wrap=True, overflow="ignore")
        named = [_by_class(self.classes)] if _names_say_something(self.class_names) else []
        return Group(_accuracies(self), *named, ledger_table(self), *_remarks(self), folder)


def taken_lines(taken: Mapping[str, str]) -> list[Text]:
    """What was taken for what in the data."""
    return [Text(f"data, {name}: {words}", style="dim") for name, words in taken.items()]


def warned(warnings: Sequence[str]) -> list[Text]:
    """What a plan or a result says that its epsilons and delta are not worth."""
    return [Text(f"Warning: {words}.", style="bold red") for words in warnings]


def _accuracies(result: Result) -> Table:
    teacher, student = result.teacher, result.student
    table = Table(title="Accuracy on the global test set", title_justify="left")
    for name in ("model", "result", "control", "what the control is"):
        table.add_column(name, justify="left" if name in ("model", "what the control is") else "right")
    table.add_row("teacher", percent_text(teacher.after), percent_text(teacher.before), "the teacher before")
    table.add_row("", "", percent_text(teacher.self_distilled), "self-distilled with zero devices")
    table.add_row("", "", percent_text(teacher.labels_only), "public labels alone, zero devices")
    table.add_row(
        "students, mean",
        percent_text(student.mean),
        percent_text(student.public_only),
        "public distillation only",
    )
    table.add_row("", "", percent_text(student.trained), "as they answered in the last round")
    table.add_row("", "", percent_text(student.direct_private), "trained directly, same budget")
    table.add_row("", "", percent_text(student.direct), "trained directly, no DP")
    table.add_row(
        "students, own data", percent_text(student.personal), "", "each on its device's own test set"
    )
    size = f"{teacher.parameters:,} parameters" if teacher.parameters else ""
    table.add_row(
        "one answer", f"{student.latency_ms:.2f} ms", f"{teacher.latency_ms:.2f} ms", f"the teacher ({size})"
    )
    return table


def _names_say_something(names: Sequence[str]) -> bool:
    """Whether they are more than the classes' numbers, and few enough to be read in a terminal."""
    return len(names) <= _MOST_SHOWN and list(names) != list(map(str, range(len(names))))


def _by_class(classes: Sequence[ClassResult]) -> Table:
    table = Table(title="The teacher by class, on the global test set", title_justify="left")
    table.add_column("class")
    for name in ("records", "before", "after"):
        table.add_column(name, justify="right")
    for row in classes:
        figures = (f"{row.records:,}", percent_text(row.before), percent_text(row.after))
        table.add_row(Text(row.name), *figures)
    return table


def ledger_table(result: Result) -> Table:
    """What was spent on each unit, beside what was allowed and what an audit found."""
    table = Table(title="Epsilon spent, all rounds (units are never added)", title_justify="left")
    for name in ("unit", "at least", "at most", "budget", "delta"):
        table.add_column(name, justify="left" if name == "unit" else "right")
    table.add_column("neighbouring relation")
    for row in result.ledger:
        bound = row.lower_bound
        table.add_row(
            row.unit.value,
            Text(f"{bound.epsilon:.2f}" if bound else "-", style="bold red" if row.alarm else ""),
            Text(epsilon_text(row.high), style="red" if math.isinf(row.high) else ""),
            epsilon_text(row.budget),
            f"{row.delta:g}",
            row.neighbouring_relation,
        )
    return table


def joint_lines(persons: Persons | None, joints: Sequence[Joint]) -> list[Text]:
    """What persons get who are more than one unit, and what is known of them."""
    said = []
    if persons is not None:
        said.append(
            f"Persons: {persons.per_device:,} on a device nominally, each with at most "
            f"{persons.most_records:,} records there."
        )
    if joints:
        each = "; ".join(f"{joint.words} {epsilon_text(joint.epsilon)}" for joint in joints)
        said.append(f"Epsilon at most, whole run, of {each}.")
    return [Text(words, style="dim") for words in said]


def _remarks(result: Result) -> list[Text]:
    remarks = _lower_bounds(result) + joint_lines(result.persons, result.joints) + warned(result.warnings)
    for row in result.ledger:
        if row.unit is not Unit.DEVICE and math.isinf(row.high):
            remarks.append(NO_RECORD_DP)
        if row.unit is Unit.DEVICE:
            remarks += [
                Text(f"epsilon per device is inf: {reason}", style="yellow") for reason in row.reasons
            ]
    if result.noise == "seeded":
        remarks.append(
            Text("Simulation: noise is drawn from the seed, for study and not for release.", style="dim")
        )
    if result.ran is not None:
        words = f"Who ran where: {result.ran.words}. Not audited here: the devices' records are elsewhere."
        remarks.append(Text(words, style="dim"))
    if result.student.direct is not None:
        remarks.append(Text("Controls trained on device records are not covered by the ledger.", style="dim"))
    return remarks


def _lower_bounds(result: Result) -> list[Text]:
    """What the column ``at least`` rests on."""
    if not result.lower_bounds:
        return []
    trials = " and ".join(f"{bound.canaries:,} per {bound.unit}" for bound in result.lower_bounds)
    confidence = f"{100 * result.lower_bounds[0].confidence:.4g} %"
    words = f"At least: canaries through the run's own mechanisms, {trials}; confidence {confidence} each."
    paths = "; ".join(f"per {bound.unit} {bound.path}" for bound in result.lower_bounds)
    passed = sum(check.passed for check in result.checks)
    checks = f"{passed} of {len(result.checks)} checks of them passed."
    failed = [f"Check failed: {c.name} ({c.seen})" for c in result.checks if not c.passed]
    return [
        Text(words, style="dim"),
        Text(f"Their path: {paths}. {checks}", style="dim"),
        *(Text(line, style="bold red") for line in failed),
    ]


def epsilon_text(value: float) -> str:
    """An epsilon, to four digits."""
    return "inf" if math.isinf(value) else f"{value:.4g}"


def percent_text(value: float | None) -> str:
    """A share; ``-`` where it was not measured."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f} %"
