"""The audits' reports: all findings of one kind, as a record, a data frame and a table."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, InstanceOf, StrictBool, computed_field, model_validator
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attacks.registry import LABELS
from audits.estimators import TprAtFpr
from audits.findings import (
    RECONSTRUCTION_FPR,
    Finding,
    LabelFinding,
    ReconstructionFinding,
    Refused,
    Verdict,
    alarm_of,
)
from audits.wording import percent
from privkd.privacy.bounds import Check, failure
from privkd.records import FileRecord, Real, Value
from privkd.runs.result import epsilon_text

One = TypeVar("One", Finding, ReconstructionFinding)

_CELL = 11
_VERDICTS: Mapping[Verdict, tuple[str, str]] = {
    "within bound": ("within", "green"),
    "no bound claimed": ("no bound", "yellow"),
    "ALARM": ("ALARM", "bold red"),
}
REPLAY_NOTE = (
    "The audited target is a replay of the run's device side under the run's own mechanism and noise "
    "scales, on records that a seeded coin picked beforehand."
)


@dataclass(frozen=True)
class Scored:
    """One attack's scores, and which way the coins fell: float64 and bool ``[guess]``.

    Reports are equal where their findings are, which follow from these.
    """

    view: str
    attack: str
    values: NDArray[np.float64] = field(compare=False)
    inside: NDArray[np.bool_] = field(compare=False)

    @property
    def members(self) -> NDArray[np.float64]:
        """Scores of those that were in."""
        return self.values[self.inside]

    @property
    def nonmembers(self) -> NDArray[np.float64]:
        """Scores of those that were out."""
        return self.values[~self.inside]


class MembershipReport(FileRecord, Value):
    """What a run's views give away about who is in a device's records, and about a device's classes.

    Attributes:
        findings: each beside the upper bound of the ledger.
        labels: what the channel tells about devices' classes; empty where nobody asked.
        target: what was attacked, in words.
        scored: the scores behind the findings that rank; they are not written.
        curves: the ROC curves by their names in the run's folder, where they were drawn; likewise.
        written: files that were written elsewhere; likewise.
    """

    run: str
    channel: str
    target: str = REPLAY_NOTE
    findings: tuple[Finding, ...] = Field(alias="views")
    labels: tuple[LabelFinding, ...] = Field(default=(), alias="label_distributions")
    scored: tuple[InstanceOf[Scored], ...] = Field(default=(), exclude=True, repr=False)
    curves: tuple[str, ...] = Field(default=(), exclude=True)
    written: tuple[str, ...] = Field(default=(), exclude=True)

    @model_validator(mode="after")
    def _found_something(self) -> Self:
        if not self.findings and not self.labels:
            raise ValueError("no finding")
        return self

    @property
    def alarm(self) -> str | None:
        """The worst finding that the ledger rules out."""
        return alarm_of(self.findings)

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

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One row a finding."""
        return [finding.row() for finding in self.findings]

    def __rich__(self) -> RenderableType:
        """The findings, what they mean, and where the curves are."""
        shown: list[RenderableType] = []
        if self.findings:
            shown += [_findings_table(self.findings, f"Membership audit of {self.run}"), *_remarks(self)]
            shown += [*_beside(self.findings)]
        shown += [_labels(finding) for finding in self.labels]
        shown += [_path(f"curves: {self.run}/{name}") for name in self.curves]
        return Group(*shown, *(_path(file) for file in self.written))


class ScoresReport(FileRecord, Value):
    """What scores of members and non-members prove, beside what is claimed of the mechanism behind them.

    Attributes:
        source: where they come from.
        target: what was attacked, in words.
        epsilon_upper: the claim; infinite where there is none.
        delta: of both bounds.
        confidence: with which all bounds that count hold together.
        independent: whether the scores were said to be independent of each other.
        gaussian: whether the mechanism was said to be Gaussian.
        findings: one for each attack.
        refused: attacks that the scores do not carry, and why.
        scored: the scores behind the findings; they are not written.
        written: files that were written; likewise.
    """

    kind: Literal["scores"] = "scores"
    source: str
    target: str
    epsilon_upper: Real
    delta: Real
    confidence: Real
    independent: StrictBool
    gaussian: StrictBool
    findings: tuple[Finding, ...] = Field(min_length=1)
    refused: tuple[str, ...] = ()
    scored: tuple[InstanceOf[Scored], ...] = Field(default=(), exclude=True, repr=False)
    written: tuple[str, ...] = Field(default=(), exclude=True)

    @computed_field
    @property
    def epsilon_lower(self) -> Real:
        """The highest lower bound that counts; as all of them hold together, so does it."""
        return self.best.epsilon_lower

    @property
    def best(self) -> Finding:
        """The finding with the highest lower bound."""
        return max(self.findings, key=lambda finding: finding.epsilon_lower)

    @property
    def alarm(self) -> str | None:
        """A lower bound above the claim."""
        best = self.best
        if best.verdict != "ALARM":
            return None
        return (
            f"{self.source}: epsilon is at least {best.epsilon_lower:.4g} per record (attack {best.attack}, "
            f"{best.estimator}, confidence {100 * self.confidence:.4g} %), but at most "
            f"{self.epsilon_upper:g} is claimed at delta {self.delta:g}; do not release, the mechanism or "
            "its accounting is broken"
        )

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One row a finding and estimator."""
        return [
            {
                **finding.row(),
                "balanced_accuracy": finding.balanced_accuracy and finding.balanced_accuracy.estimate,
                "bound_estimator": bound.estimator,
                "bound_epsilon": bound.epsilon_lower,
                "bound_counts": bound.counts,
            }
            for finding in self.findings
            for bound in finding.bounds
        ]

    def __rich__(self) -> RenderableType:
        """The attacks, the bounds by estimator, and what they mean."""
        first = self.findings[0]
        words = (
            f"delta {self.delta:g}. All bounds that count hold together with confidence "
            f"{100 * self.confidence:g} %; intervals are 95 % each."
        )
        return Group(
            _findings_table(self.findings, f"Audit of the scores in {self.source}"),
            _bounds_table(self.findings),
            Text(f"{first.members:,} in, {first.nonmembers:,} out; unit: add or remove one record; {words}"),
            Text(self.target, style="dim"),
            *_assumptions(self.findings),
            Text(_assumed(self.independent, self.gaussian), style="dim"),
            *_refusals(rate for finding in self.findings for rate in finding.tpr_at_fpr),
            *(Text(f"refused: {reason}", style="yellow") for reason in self.refused),
            *(_path(file) for file in self.written),
        )


class ReconstructionReport(FileRecord, Value):
    """What could be rebuilt of a run's records, and the picture grids by their names in the run's folder."""

    run: str
    channel: str
    findings: tuple[ReconstructionFinding, ...] = Field(alias="views")
    grids: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def alarm(self) -> str | None:
        """The worst finding that the ledger rules out."""
        return alarm_of(self.findings)

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One row a finding."""
        return [finding.row() for finding in self.findings]

    def __rich__(self) -> RenderableType:
        """The table, what it means, and where the grids are."""
        trials = sorted({finding.success.trials for finding in self.findings})
        counts = " or ".join(f"{count:,}" for count in trials)
        remarks = [
            "Picked: the share of the trials in which the secret was told from all others, with its 95 % "
            f"interval ({counts} trials); chance is a guess without the release.",
            "Ceiling: the most that the ledger allows under the same prior (reconstruction robustness).",
            _likeness_remark(self.findings),
            REPLAY_NOTE,
            *self.notes,
        ]
        return Group(
            _rebuilt_table(self),
            *(Text(remark, style="dim") for remark in remarks),
            *_refusals(finding.tpr_at_fpr for finding in self.findings),
            *(_path(f"grid: {self.run}/{name}") for name in self.grids),
        )


class MechanismReport(FileRecord, Value):
    """All mechanisms; sound ones together fail one of the checks with probability ``false_alarm`` at most.

    A check's name begins with its mechanism's, see `of`.
    """

    findings: tuple[Finding, ...] = Field(alias="mechanisms")
    checks: tuple[Check, ...]
    false_alarm: Real

    @property
    def alarm(self) -> str | None:
        """The worst finding that the accountant rules out, or the first check that failed."""
        return alarm_of(self.findings) or failure(self.checks)

    def of(self, finding: Finding) -> tuple[Check, ...]:
        """The checks that a mechanism was put to."""
        return tuple(check for check in self.checks if check.name.startswith(check_name(finding, "")))

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One row a mechanism."""
        return [
            {
                "mechanism": finding.view,
                "game": finding.attack,
                "unit": finding.unit.value,
                "runs": finding.members,
                "epsilon_lower": finding.epsilon_lower,
                "epsilon_upper": finding.epsilon_upper,
                "delta": finding.delta,
                "confidence": finding.confidence,
                "verdict": finding.verdict,
                "checks": len(self.of(finding)),
                "checks_failed": sum(not check.passed for check in self.of(finding)),
            }
            for finding in self.findings
        ]

    def __rich__(self) -> RenderableType:
        """One row for each mechanism and game, then the checks that failed."""
        table = _table("Mechanism audit: worst-case inputs through the product's own path")
        for name in ("mechanism", "game", "unit"):
            table.add_column(name, no_wrap=True)
        for name in ("runs", "eps >=", "eps <="):
            table.add_column(name, justify="right", no_wrap=True)
        for name in ("verdict", "checks"):
            table.add_column(name, no_wrap=True)
        for finding in self.findings:
            table.add_row(
                finding.view,
                finding.attack,
                finding.unit.value,
                f"2 x {finding.members:,}",
                f"{finding.epsilon_lower:.4g}",
                epsilon_text(finding.epsilon_upper),
                Text(*_VERDICTS[finding.verdict]),
                _checks(self.of(finding)),
            )
        first = self.findings[0]
        words = (
            f"All lower bounds hold together with confidence {100 * first.confidence:g} %; delta "
            f"{first.delta:g}. Sound mechanisms fail a check in {100 * self.false_alarm:.1g} % of seeds."
        )
        failed = [check for check in self.checks if not check.passed]
        fails = [Text(f"FAILS: {check.name} ({check.seen})", style="bold red") for check in failed]
        return Group(table, Text(words), *fails)


def check_name(finding: Finding, name: str) -> str:
    """A check's name under its mechanism's."""
    return f"{finding.view}, {finding.attack}: {name}"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _path(text: str) -> Text:
    """A line that is never wrapped, so that it can be copied."""
    return Text(text, no_wrap=True, overflow="ignore")


def _findings_table(findings: Sequence[Finding], title: str) -> Table:
    """One row a finding, one section a view."""
    table = _table(title)
    table.add_column("attack", no_wrap=True)
    for name in ("AUC", "TPR@1%", "TPR@0.1%"):
        table.add_column(name, justify="right", overflow="fold", min_width=_CELL)
    table.add_column("eps >=/<=", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True, min_width=len("no bound"))
    for finding in _by_view(findings, table):
        table.add_row(
            finding.attack,
            _auc(finding),
            *(_rate(rate) for rate in finding.tpr_at_fpr),
            f"{finding.epsilon_lower:.2f}/{epsilon_text(finding.epsilon_upper)}",
            Text(*_VERDICTS[finding.verdict]),
        )
    return table


def _bounds_table(findings: Sequence[Finding]) -> Table:
    """One row an attack, one column an estimator; marked are those whose bounds count."""
    table = _table("Lower bounds of epsilon by estimator (* counts against the claim)")
    table.add_column("attack", no_wrap=True)
    table.add_column("balanced accuracy", justify="right", no_wrap=True)
    for bound in findings[0].bounds:
        table.add_column(f"{bound.estimator}{'*' * bound.counts}", justify="right", no_wrap=True)
    for finding in findings:
        accuracy = finding.balanced_accuracy
        found = [
            "-" if bound.epsilon_lower is None else f"{bound.epsilon_lower:.2f}" for bound in finding.bounds
        ]
        table.add_row(finding.attack, "-" if accuracy is None else percent(accuracy), *found)
    return table


def _assumptions(findings: Sequence[Finding]) -> list[Text]:
    """What each estimator takes for given, and what its own tests found of the strongest attack's scores."""
    strongest = max(findings, key=lambda finding: finding.epsilon_lower)
    return [
        Text(
            f"{bound.estimator}: if {bound.assumes}" + (f" ({bound.reason})" if bound.reason else ""),
            style="dim",
        )
        for bound in strongest.bounds
    ]


def _assumed(independent: bool, gaussian: bool) -> str:
    """What was said of the scores, and what would make more bounds count."""
    said = [
        "independent scores" if independent else "scores that may depend on each other (say --independent)",
        "a Gaussian mechanism" if gaussian else "any mechanism (say --gaussian where it is)",
    ]
    return f"Held against the claim: bounds for {' of '.join(said)}."


def _beside(findings: Sequence[Finding]) -> list[Text]:
    """Bounds under an assumption of their own."""
    return [
        Text(
            f"{finding.view}, {finding.attack}: {bound.estimator} eps >= "
            f"{'-' if bound.epsilon_lower is None else f'{bound.epsilon_lower:.2f}'} if {bound.assumes}"
            f"{f' ({bound.reason})' if bound.reason else ''}; stands against nothing.",
            style="dim",
        )
        for finding in findings
        for bound in finding.bounds
    ]


def _by_view(findings: Sequence[One], table: Table) -> Iterator[One]:
    """The findings, each view's under its name."""
    view = ""
    for finding in findings:
        if finding.view != view:
            view = finding.view
            table.add_section()
            table.add_row(Text(view, style="bold"))
        yield finding


def _remarks(report: MembershipReport) -> list[Text]:
    first = report.findings[0]
    counts = dict.fromkeys(f"{f.view} {f.members:,} in, {f.nonmembers:,} out" for f in report.findings)
    return [
        Text(f"Guesses: {'; '.join(counts)}."),
        Text(
            f"Unit: {first.unit.neighbouring_relation}; delta {first.delta:g}. All lower bounds hold "
            f"together with confidence {100 * first.confidence:g} %; intervals are 95 % each."
        ),
        Text(report.target, style="dim"),
        *_refusals(rate for finding in report.findings for rate in finding.tpr_at_fpr),
    ]


def _refusals(rates: Iterable[TprAtFpr | Refused | None]) -> list[Text]:
    reasons = dict.fromkeys(rate.reason for rate in rates if isinstance(rate, Refused))
    return [Text(f"refused: {reason}", style="yellow") for reason in reasons]


def _labels(finding: LabelFinding) -> Text:
    """Devices' class histograms are no matter of records: their bound is the ledger's of a device."""
    ends = _interval(finding.low, finding.high, 3)
    return Text(
        f"{LABELS} ({finding.view}): KL(true || guess) {finding.divergence:.3f} nats over {finding.devices} "
        f"devices, {finding.blind:.3f} blind; gain {finding.gain:.3f} {ends}, "
        f"{'the classes show' if finding.reveals else 'nothing shown'}; device epsilon <= "
        f"{epsilon_text(finding.epsilon_upper)}",
        style="yellow" if finding.reveals else "",
    )


def _auc(finding: Finding) -> str:
    value = finding.auc
    return "-" if value is None else f"{value.estimate:.3f} {_interval(value.low, value.high, 2)}"


def _rate(rate: TprAtFpr | Refused) -> str:
    if isinstance(rate, Refused):
        return "-"
    return f"{100 * rate.estimate:.1f}% {_interval(100 * rate.low, 100 * rate.high, 1)}"


def _interval(low: float, high: float, digits: int) -> str:
    return f"[{low:.{digits}f},{high:.{digits}f}]"


def _checks(checks: Sequence[Check]) -> Text:
    """How many there were, and how many failed."""
    failed = sum(not check.passed for check in checks)
    if failed:
        return Text(f"{failed} of {len(checks)} FAIL", style="bold red")
    return Text(f"{len(checks)} hold" if checks else "-", style="green")


def _likeness_remark(findings: Sequence[ReconstructionFinding]) -> str:
    if any(finding.attributes is not None for finding in findings):
        return (
            "Like: attributes that were rebuilt right; public: those that the best constant guess from the "
            "public records has right."
        )
    return "Like: SSIM to the target; public: that of the public image nearest to the reconstruction."


def _rebuilt_table(report: ReconstructionReport) -> Table:
    table = _table(f"Reconstruction audit of {report.run}")
    table.add_column("attack", no_wrap=True)
    for name in ("picked", "chance", "ceiling", f"TPR@{100 * RECONSTRUCTION_FPR:g}%"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("like/public", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True, min_width=len("no bound"))
    for finding in _by_view(report.findings, table):
        success, rate = finding.success, finding.tpr_at_fpr
        table.add_row(
            finding.attack,
            f"{_percent(success.estimate)} [{100 * success.low:.0f},{100 * success.high:.0f}]",
            _percent(success.chance),
            "-" if finding.ceiling is None else f"{_percent(finding.ceiling)} ({finding.unit.value})",
            _percent(rate.estimate) if isinstance(rate, TprAtFpr) else "-",
            _likeness(finding),
            Text(*_VERDICTS[finding.verdict]),
        )
    return table


def _likeness(finding: ReconstructionFinding) -> str:
    """Images by their similarity, tabular records by their attributes."""
    if finding.likeness is not None:
        return f"{finding.likeness.reconstruction_ssim:.2f}/{finding.likeness.public_ssim:.2f}"
    if finding.attributes is not None:
        return f"{100 * finding.attributes.right:.1f}/{_percent(finding.attributes.constant)}"
    return "-"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
