"""What a run's folder proves, read as it lies there: nothing is trained, locked or written."""

import hashlib
import math
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from pydantic import Field, computed_field

from audits.estimators.rates import Interval, difference, share
from audits.findings import Finding, ReconstructionFinding
from audits.tables import MembershipReport, ReconstructionReport
from audits.wording import command_of
from privkd.config import Config, load_config
from privkd.errors import RunError
from privkd.export.record import Exported
from privkd.journal import Journal
from privkd.privacy.bounds import Audited
from privkd.privacy.events import Batch, PrivacyEvent, TaggedEvent, Unit
from privkd.privacy.joint import Joint, Persons
from privkd.privacy.ledger import Ledger, Statement
from privkd.privacy.robustness import reconstruction_ceiling
from privkd.records import Count, Record, read_json, record_of
from privkd.runs.binding import Binding, binding_of
from privkd.runs.elsewhere import Elsewhere, elsewhere_of
from privkd.runs.result import ClassResult, Result, RoundRecord

MEMBERSHIP = "audit/membership.json"
RECONSTRUCTION = "audit/reconstruction.json"
_RECORDS = ("config.toml", "journal.jsonl", "ledger.jsonl", "result.json", "versions.json")
_EVIDENCE = (*_RECORDS, MEMBERSHIP, RECONSTRUCTION)
_PNG = b"\x89PNG\r\n\x1a\n"

Standing: TypeAlias = Literal["ALARM", "within bound", "no protection claimed", "not audited", "unfinished"]
"""What the whole run comes to, worst first."""


Report = TypeVar("Report", MembershipReport, ReconstructionReport)


class Accuracies(Record):
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

    digest: str = Field(alias="test_set_sha256")
    teacher: Interval
    before: Interval
    control: Interval
    students: Interval | None
    public_only: Interval | None
    direct: Interval | None
    direct_private: Interval | None

    @computed_field(alias="teacher_gain")
    @property
    def gain(self) -> Interval:
        """What the devices added: the teacher after the run against its zero-device control."""
        return difference(self.teacher, self.control)

    @computed_field(alias="students_gain")
    @property
    def student_gain(self) -> Interval | None:
        """What the private records added to the students."""
        if self.students is None or self.public_only is None:
            return None
        return difference(self.students, self.public_only)

    @classmethod
    def of(cls, result: Result) -> "Accuracies | None":
        """Those of a result; ``None`` where it was measured on no record."""
        records, teacher, student = result.test.records, result.teacher, result.student
        if not records:
            return None

        def measured(value: float | None) -> Interval | None:
            return None if value is None or math.isnan(value) else share(value, records)

        return cls(
            digest=result.test.digest,
            teacher=share(teacher.after, records),
            before=share(teacher.before, records),
            control=share(teacher.control, records),
            students=measured(student.mean),
            public_only=measured(student.public_only),
            direct=measured(student.direct),
            direct_private=measured(student.direct_private),
        )


class BookedRecord(Record):
    """One kind of event that the ledger booked for ``devices`` in a round (from 1)."""

    unit: Unit
    round: Count
    devices: Count
    event: TaggedEvent


@dataclass(frozen=True)
class FileDigest:
    """A file of the run and its SHA-256."""

    name: str
    digest: str


@dataclass(frozen=True)
class RunRecord:
    """One run's folder.

    Attributes:
        path: the folder.
        config: the settings it was started with.
        rounds: committed ones; the first is before any device.
        statements: the ledger by unit, empty before the first charge.
        events: what each unit's statement is of, by unit: all that its worst party was charged with.
        charges: the ledger by unit and round.
        result: ``None`` before all rounds were played and the result was written.
        membership: ``None`` where no such audit was made; its bounds stand beside the ledger as it is now.
        roc: its curves as PNG, if they were drawn.
        reconstruction: ``None`` where no such audit was made.
        grids: its picture grids as PNG by name.
        exports: the students that were exported, by device and format.
        versions: of what computed the run, by name.
        binding: the data and code that it was started with; ``None`` where it noted none.
        files: what the record rests on.
        started: when the run was started, as the file system says, ``YYYY-MM-DD``.
        elsewhere: where its devices were; ``None`` where its own process played them.
    """

    path: Path
    config: Config
    rounds: tuple[RoundRecord, ...]
    statements: tuple[Statement, ...]
    events: Mapping[Unit, tuple[PrivacyEvent, ...]]
    charges: tuple[BookedRecord, ...]
    result: Result | None
    membership: MembershipReport | None
    roc: bytes | None
    reconstruction: ReconstructionReport | None
    grids: tuple[tuple[str, bytes], ...]
    exports: tuple[Exported, ...]
    versions: tuple[tuple[str, str], ...]
    binding: Binding | None
    files: tuple[FileDigest, ...]
    started: str
    elsewhere: Elsewhere | None = None

    @property
    def command(self) -> str:
        """The command that starts an equal run."""
        return command_of(self.config) if self.elsewhere is None else "privkd cloud run"

    @property
    def played(self) -> int:
        """How many rounds were committed."""
        return max(0, len(self.rounds) - 1)

    @property
    def finished(self) -> bool:
        """Whether all rounds were played and the result written."""
        return self.result is not None

    @property
    def accuracies(self) -> Accuracies | None:
        """``None`` for an unfinished run, or one that was measured on no record."""
        return Accuracies.of(self.result) if self.result else None

    @property
    def closing(self) -> Audited:
        """Lower bounds and checks from the audit that the run ended with."""
        return self.result.audited if self.result else Audited()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What its result says that its epsilons and delta are not worth."""
        return self.result.warnings if self.result else ()

    @property
    def taken(self) -> Mapping[str, str]:
        """What in the data was taken for what, in words by its name."""
        return self.result.taken if self.result else {}

    @property
    def classes(self) -> tuple[ClassResult, ...]:
        """The classes by name, and how well the teacher knows them; none of a run that names none."""
        return self.result.classes if self.result else ()

    @property
    def unit(self) -> Unit:
        """What training protects."""
        return Unit(self.config.privacy.unit)

    @property
    def persons(self) -> Persons | None:
        """Public constants about whose the records are, where that is known."""
        return self.result.persons if self.result else None

    @property
    def joints(self) -> tuple[Joint, ...]:
        """What several units of one owner get together."""
        return self.result.joints if self.result else ()

    def statement(self, unit: Unit) -> Statement | None:
        """The ledger's row of one unit."""
        return next((row for row in self.statements if row.unit is unit), None)

    def spent(self, unit: Unit) -> float:
        """The ledger's upper bound on one unit; infinite where nothing vouches for less."""
        row = self.statement(unit)
        return math.inf if row is None else row.high

    def ceiling(self, unit: Unit, kappa: float) -> float:
        """The most that anybody who guesses right with probability ``kappa`` without the run can do with it.

        Of a test it is the most true positives at that rate of false ones: see `reconstruction_ceiling`.
        """
        events = self.events.get(unit)
        return 1.0 if not events else reconstruction_ceiling(events, kappa)

    @property
    def alarms(self) -> tuple[Finding | ReconstructionFinding, ...]:
        """Attacks' findings that the ledger rules out."""
        guessed = self.membership.findings if self.membership else ()
        rebuilt = self.reconstruction.findings if self.reconstruction else ()
        both: tuple[Finding | ReconstructionFinding, ...] = (*guessed, *rebuilt)
        return tuple(finding for finding in both if finding.verdict == "ALARM")

    @property
    def audited(self) -> bool:
        """Whether any attack was made on what the run shows of a device."""
        return self.membership is not None or self.reconstruction is not None

    @property
    def alarm_words(self) -> tuple[str, ...]:
        """Each alarm in one sentence."""
        crossed = [row.alarm for row in self.statements]
        failed = [f"{check.name}: {check.seen}" for check in self.closing.checks if not check.passed]
        return (
            *filter(None, crossed),
            *(f"the audit of the run's own mechanism refutes that {words}" for words in failed),
            *(alarm.alarm_words for alarm in self.alarms),
        )

    @property
    def standing(self) -> Standing:
        """What the run comes to, in the order of what an officer must know first."""
        if self.alarm_words:
            return "ALARM"
        if not self.finished:
            return "unfinished"
        if math.isinf(self.spent(self.unit)) and math.isinf(self.spent(Unit.DEVICE)):
            return "no protection claimed"
        return "within bound" if self.audited else "not audited"


def is_run(path: Path) -> bool:
    """Whether ``path`` is the folder of a run."""
    return (path / "journal.jsonl").is_file() and (path / "config.toml").is_file()


def read_run(path: Path) -> RunRecord:
    """All that the run in ``path`` says of itself.

    Raises:
        RunError: not a run, or a file of it is damaged or was changed; the message names the file.
    """
    if not is_run(path):
        raise RunError(f"{path} is not the folder of a run: expected its config.toml and journal.jsonl")
    journal = tuple(Journal(path / "journal.jsonl"))
    _check_settings(path, journal)
    config = load_config(path / "config.toml")
    rows = (row for row in journal if row.get("step") == "round")
    rounds = tuple(record_of(RoundRecord, row, path / "journal.jsonl") for row in rows)
    ledger, result = _ledger(path / "ledger.jsonl", rounds), _result(path, journal)
    statements = _beside(ledger.statement() if ledger else (), result)
    rebuilt = _optional(ReconstructionReport, path / RECONSTRUCTION)
    exports = _exports(path)
    return RunRecord(
        path=path,
        config=config,
        rounds=rounds,
        statements=statements,
        events={row.unit: ledger.events(row.unit, row.party) for row in statements if ledger and row.party},
        charges=_charges(path / "ledger.jsonl"),
        result=result,
        membership=_membership(path / MEMBERSHIP, statements),
        roc=_picture(path, "audit/roc.png") if (path / "audit/roc.png").exists() else None,
        reconstruction=rebuilt,
        grids=tuple((name, _picture(path, name)) for name in rebuilt.grids) if rebuilt else (),
        exports=tuple(Exported.read(file) for file in exports),
        versions=_versions(path / "versions.json"),
        binding=binding_of(journal, path / "journal.jsonl"),
        files=tuple(digest_in(path, name) for name in _evidence(path, exports)),
        started=datetime.fromtimestamp((path / "config.toml").stat().st_mtime).strftime("%Y-%m-%d"),
        elsewhere=elsewhere_of(journal, path / "journal.jsonl"),
    )


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside runs whole or not at all, and its folder where that is missing.

    Raises:
        RunError: it cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
        # A temporary file is its owner's alone; this one is as readable as any.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
        raise RunError(f"{path}: {error.strerror or error}; name another folder with --out") from None


def _check_settings(path: Path, journal: Sequence[Mapping[str, Any]]) -> None:
    noted = journal[0].get("config") if journal else None
    if noted != _digest(path / "config.toml"):
        raise RunError(f"{path / 'config.toml'} was changed since the run was started: restore it")


def _ledger(path: Path, rounds: Sequence[RoundRecord]) -> Ledger | None:
    """The ledger, with all that the journal saw of it; ``None`` before it was begun."""
    seen = next((row.ledger for row in reversed(rounds) if row.ledger), None)
    if not path.exists():
        if seen is None:
            return None
        raise RunError(f"{path} is missing, so what the run spent is unknown: restore it")
    return Ledger.load(path, at_least=seen)


def _result(path: Path, journal: Sequence[Mapping[str, Any]]) -> Result | None:
    """The finished run's ``result.json``, which the journal vouches for."""
    noted = [row.get("result") for row in journal if row.get("step") == "finished"]
    if not noted:
        return None
    if noted[-1] != _digest(path / "result.json"):
        raise RunError(f"{path / 'result.json'} was changed since the run finished: resume the run")
    return Result.read(path / "result.json")


def _beside(statements: Sequence[Statement], result: Result | None) -> tuple[Statement, ...]:
    """The ledger's statements as they are now, each beside the lower bound that the run ended with."""
    bounds = {bound.unit: bound for bound in result.lower_bounds} if result else {}
    return tuple(row.model_copy(update={"lower_bound": bounds.get(row.unit)}) for row in statements)


def _charges(path: Path) -> tuple[BookedRecord, ...]:
    """The ledger's events by unit and round, devices with equal ones together."""
    if not path.exists():
        return ()
    _, *batches = Journal(path)
    charges = [charge for row in batches for charge in Batch.model_validate(row).charges]
    devices = Counter((charge.unit, charge.round, charge.event) for charge in charges)
    rows = [
        BookedRecord(unit=unit, round=round + 1, devices=count, event=event)
        for (unit, round, event), count in devices.items()
    ]
    return tuple(sorted(rows, key=lambda row: (row.unit is Unit.DEVICE, row.round)))


def _membership(path: Path, statements: Sequence[Statement]) -> MembershipReport | None:
    """The audit, beside the upper bounds of the ledger as it is now."""
    report = _optional(MembershipReport, path)
    if report is None:
        return None
    upper = {row.unit: row.high for row in statements}
    findings = tuple(one.against(upper.get(one.unit, math.inf)) for one in report.findings)
    return report.model_copy(update={"findings": findings})


def _optional(kind: type[Report], path: Path) -> Report | None:
    return kind.read(path) if path.exists() else None


def _exports(path: Path) -> tuple[Path, ...]:
    """The records of all exports of the run in ``path``."""
    return tuple(sorted((path / "export").glob("*.json")))


def _versions(path: Path) -> tuple[tuple[str, str], ...]:
    if not path.exists():
        return ()
    tree = read_json(path)
    if not isinstance(tree, dict):
        raise RunError(f"{path} is damaged or was changed (not a table of versions): restore it")
    return tuple((str(name), str(version)) for name, version in tree.items())


def _evidence(path: Path, exports: Sequence[Path]) -> list[str]:
    names = (*_EVIDENCE, *(str(file.relative_to(path)) for file in exports))
    return [name for name in names if (path / name).is_file()]


def digest_in(path: Path, name: str) -> FileDigest:
    """The file called ``name`` in the folder ``path``.

    Raises:
        RunError: it cannot be read.
    """
    return FileDigest(name, _digest(path / name))


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from None


def _picture(path: Path, name: str) -> bytes:
    """A PNG in the run's folder; a name that leads out of it is refused, for a report is passed on.

    Raises:
        RunError: it cannot be read, lies elsewhere, or is no PNG.
    """
    try:
        file = (path / name).resolve()
        if not file.is_relative_to(path.resolve()):
            raise RunError(f"{path}: picture {name!r} lies outside of the run: make the audit anew")
        data = file.read_bytes()
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: picture {name!r}: {error}; make the audit anew") from None
    if not data.startswith(_PNG):
        raise RunError(f"{path}: picture {name!r} is no PNG: make the audit anew")
    return data
