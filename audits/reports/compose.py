"""Reports from facts, of a run and of a curve: the page, the record, and the files that hold both."""

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field
from rich.console import Group, RenderableType
from rich.text import Text

from audits.evidence import Accuracies, BookedRecord, FileDigest, RunRecord, Standing, read_run, write_whole
from audits.findings import Finding, LabelFinding, ReconstructionFinding
from audits.reports import reading
from audits.reports import run as chapters
from audits.reports.page import Page, Verdict, as_html, as_markdown
from audits.reports.registry import as_yaml
from audits.reports.sign_off import About, Signature, about, digest_of, signature, signed_files
from audits.reports.sign_off import sign as record
from audits.reports.sweep import curve_sections
from audits.reports.trust import Trust, trust_of
from audits.reports.verdicts import verdict_on_curve, verdicts_on_run
from audits.requests import RunLike, folder_of
from audits.sweeps.grid import is_sweep
from audits.sweeps.sweep import Sweep, read_sweep
from audits.wording import counted, epsilon_text
from privkd.errors import ConfigError
from privkd.export.record import Exported
from privkd.privacy.ledger import Statements
from privkd.records import FileRecord, Plain, Record, Value
from privkd.runs.result import ClassResult

One = TypeVar("One", "RunReport", "CurveReport")

_FOOTER = (
    "Written by privkd. Lower bounds come from attacks, upper bounds from the ledger. A bound that no attack "
    "reaches is not thereby proven; a bound that one passes is broken."
)


@dataclass(frozen=True)
class Party:
    """What a party does, and how far it must be trusted, in words."""

    party: str
    does: tuple[str, ...]
    trust: str


@dataclass(frozen=True)
class TrustRecord:
    """Who trusts whom over a channel."""

    channel: str
    parties: tuple[Party, ...]
    words: tuple[str, ...]


class LedgerRecord(Record):
    """What was spent by unit, and what was booked in each round."""

    units: Statements
    rounds: tuple[BookedRecord, ...]


class MembershipRecord(Record):
    """The membership audit's findings, beside the ledger as it is now."""

    target: str
    findings: tuple[Finding, ...]
    label_distributions: tuple[LabelFinding, ...]


class ReconstructionRecord(Record):
    """The reconstruction audit's findings, its remarks, and its picture grids by name."""

    findings: tuple[ReconstructionFinding, ...]
    notes: tuple[str, ...]
    grids: tuple[str, ...]


class _Report(FileRecord, Value):
    """A written report: its verdicts, and the files that were ``written``."""

    verdicts: tuple[Verdict, ...]
    command: str
    alarm_words: tuple[str, ...] = Field(default=(), exclude=True)
    written: tuple[str, ...] = Field(default=(), exclude=True)

    def __rich__(self) -> RenderableType:
        """The verdicts, and where the files are."""
        return Group(
            *(
                line
                for verdict in self.verdicts
                for line in (
                    Text(f"{verdict.question} {verdict.word}", style="bold"),
                    *map(Text, verdict.sentences),
                )
            ),
            *(Text(file, no_wrap=True, overflow="ignore") for file in self.written),
        )

    @property
    def alarm(self) -> str | None:
        """The first alarm in it."""
        return f"{self._place}: {self.alarm_words[0]}; do not release" if self.alarm_words else None

    @property
    @abstractmethod
    def _place(self) -> str:
        """The folder that it speaks of."""


class RunReport(_Report):
    """The facts of one run: ``report.json``.

    Attributes:
        trust: who trusts whom.
        about: what people state of it.
        signature: of it as it is, or as it was.
        digest: of what is signed.
        classes: by name, and how well the teacher knows each.
        taken: what in the data was taken for what.
        files: SHA-256 of what the report rests on, by name.
        command: that starts an equal run.
    """

    kind: Literal["run"] = "run"
    run: str
    standing: Standing
    warnings: tuple[str, ...]
    trust: TrustRecord
    about: About
    signature: Signature | None
    digest: str
    ledger: LedgerRecord
    membership: MembershipRecord | None
    reconstruction: ReconstructionRecord | None
    accuracy: Accuracies | None
    exports: tuple[Exported, ...]
    classes: tuple[ClassResult, ...] = ()
    taken: dict[str, str]
    versions: dict[str, str]
    files: dict[str, str]

    @property
    def _place(self) -> str:
        return self.run

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One row a unit of the ledger."""
        return [row.model_dump(exclude={"reasons", "party"}) for row in self.ledger.units]


class CurveReport(_Report):
    """The facts of a curve: its request, its table, and the command that makes an equal one."""

    kind: Literal["curve"] = "curve"
    curve: str
    request: Plain
    cells: Plain

    @property
    def _place(self) -> str:
        return self.curve

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One row a cell."""
        return list(self.cells)


def report(
    run: RunLike = None, out: Path | str | None = None, sign: str | None = None
) -> RunReport | CurveReport:
    """Write the report of a run or curve, the latest by default, to ``out`` or its own folder.

    Args:
        run: see `folder_of`.
        out: where the report goes, beside its ``about.toml`` and ``signature.toml``.
        sign: who signs today for what the report says.

    Raises:
        ConfigError: a curve was to be signed.
        RunError: neither a run nor a curve, or damaged; or what lies beside the report is.
    """
    path = folder_of(run, "run", "curve")
    folder = Path(out or path)
    if is_sweep(path):
        if sign is not None:
            raise ConfigError(
                "sign: a curve compares simulations and is not for release; name the folder of a run"
            )
        curve = read_sweep(path)
        return _written(report_on_curve(curve), curve_page(curve), "", folder)
    facts = read_run(path)
    stated = about(folder)
    files = signed_files(facts, folder)
    signed = signature(folder) if sign is None else record(folder, sign, digest_of(files))
    words = Words(stated, signed, files)
    return _written(report_on_run(facts, words), run_page(facts, words), as_yaml(facts, stated), folder)


def _written(value: One, page: Page, registry: str, folder: Path) -> One:
    files = {
        "report.html": as_html(page),
        "report.md": as_markdown(page),
        "report.json": json.dumps(value.tree(), indent=2, allow_nan=False) + "\n",
    }
    if registry:
        files["registry.yaml"] = registry
    for name, text in files.items():
        write_whole(folder / name, text.encode(errors="replace"))
    return value.model_copy(update={"written": tuple(str(folder / name) for name in files)})


@dataclass(frozen=True)
class Words:
    """What people add to a run's facts: what they state, who signed, and the ``files`` that one signs for."""

    about: About
    signed: Signature | None
    files: tuple[FileDigest, ...]


def report_on_run(facts: RunRecord, words: Words) -> RunReport:
    """The facts of one run."""
    found, rebuilt = facts.membership, facts.reconstruction
    return RunReport(
        run=str(facts.path),
        verdicts=verdicts_on_run(facts, words.about),
        standing=facts.standing,
        warnings=facts.warnings,
        trust=_trust(trust_of(facts.config, facts.elsewhere)),
        about=words.about,
        signature=words.signed,
        digest=digest_of(words.files),
        ledger=LedgerRecord(units=facts.statements, rounds=facts.charges),
        membership=found
        and MembershipRecord(target=found.target, findings=found.findings, label_distributions=found.labels),
        reconstruction=rebuilt
        and ReconstructionRecord(findings=rebuilt.findings, notes=rebuilt.notes, grids=rebuilt.grids),
        accuracy=facts.accuracies,
        exports=facts.exports,
        classes=facts.classes,
        taken=dict(facts.taken),
        versions=dict(facts.versions),
        files={file.name: file.digest for file in facts.files},
        command=facts.command,
        alarm_words=facts.alarm_words,
    )


def report_on_curve(curve: Sweep) -> CurveReport:
    """The facts of a curve."""
    return CurveReport(
        curve=str(curve.path),
        verdicts=(verdict_on_curve(curve),),
        request=curve.grid.model_dump(mode="json"),
        cells=tuple(curve.rows()),
        command=curve.grid.command,
        alarm_words=curve.alarms,
    )


def _trust(trust: Trust) -> TrustRecord:
    parties = tuple(Party(box.title, box.lines, box.badge) for box in trust.boxes)
    return TrustRecord(trust.channel, parties, trust.words)


def run_page(facts: RunRecord, words: Words) -> Page:
    """The report of one run."""
    config = facts.config
    subtitle = (
        f"{config.data.source}, {counted(config.data.devices, 'device')}, {counted(config.rounds, 'round')}, "
        f"{config.channel.kind} channel, {config.privacy.unit}-level budget epsilon "
        f"{epsilon_text(config.privacy.epsilon)}; started {facts.started}"
    )
    return Page(
        title=f"Privacy report: {facts.path.name or facts.path}",
        subtitle=subtitle,
        verdicts=verdicts_on_run(facts, words.about),
        sections=(
            reading.stated(words.about),
            chapters.trust(facts),
            chapters.ledger(facts),
            reading.meaning(facts),
            chapters.membership(facts),
            chapters.reconstruction(facts),
            chapters.gain(facts),
            *([chapters.exports(facts)] if facts.exports else []),
            chapters.unprotected(facts),
            chapters.provenance(facts),
            reading.signing(words.files, words.signed),
            reading.glossary(),
        ),
        footer=_FOOTER,
    )


def curve_page(curve: Sweep) -> Page:
    """The report of a curve."""
    request = curve.grid
    budgets = ", ".join(epsilon_text(value) for value in request.epsilons)
    subtitle = (
        f"{len(curve.done)} of {len(curve.outcomes)} runs: record-level budgets epsilon {budgets}; channels "
        f"{', '.join(request.channels)}; {request.seeds} seeds"
    )
    return Page(
        title=f"Privacy-utility curve: {curve.path.name or curve.path}",
        subtitle=subtitle,
        verdicts=(verdict_on_curve(curve),),
        sections=(*curve_sections(curve), reading.glossary()),
        footer=_FOOTER,
    )
