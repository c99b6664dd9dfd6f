"""What an audit of membership leaves in a folder: report, tables, raw scores, ROC points and figures."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from audits.estimators import Auc, TprAtFpr
from audits.estimators.rates import Interval
from audits.evidence import write_whole
from audits.findings import Finding, Refused
from audits.roc import draw_scored, roc
from audits.tables import MembershipReport, ScoresReport
from audits.wording import epsilon_text

_ESCAPES = str.maketrans({"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#"})


def write_scores(report: ScoresReport, out: Path) -> ScoresReport:
    """Write ``scores.json`` and what is beside it to ``out``; returns the report with their paths.

    Raises:
        RunError: one cannot be written.
    """
    return report.model_copy(update={"written": _written(out, "scores", report)})


def write_membership(report: MembershipReport, out: Path) -> MembershipReport:
    """The same of a run's audit, with ``membership.json``.

    Raises:
        RunError: one cannot be written.
    """
    return report.model_copy(update={"written": _written(out, "membership", report)})


def _written(out: Path, name: str, report: ScoresReport | MembershipReport) -> tuple[str, ...]:
    names = []
    for file, data in _files(name, report):
        write_whole(out / file, data)
        names.append(str(out / file))
    return tuple(names)


def _files(name: str, report: ScoresReport | MembershipReport) -> Iterator[tuple[str, bytes]]:
    yield f"{name}.json", (json.dumps(report.tree(), indent=2, allow_nan=False) + "\n").encode()
    if not report.scored:
        return
    head, *rows = _table(report.findings)
    yield "table.md", as_markdown(head, rows).encode()
    yield "table.tex", as_latex(head, rows).encode()
    scored = (
        (one.view, one.attack, repr(float(score)), int(inside))
        for one in report.scored
        for score, inside in zip(one.values, one.inside, strict=True)
    )
    yield "scores.csv", _csv(("view", "attack", "score", "member"), scored)
    points = (
        (one.view, one.attack, repr(float(fpr)), repr(float(tpr)))
        for one in report.scored
        for curve in [roc(one.attack, one.members, one.nonmembers)]
        for fpr, tpr in zip(curve.false_positive, curve.true_positive, strict=True)
    )
    yield "roc.csv", _csv(("view", "attack", "false_positive_rate", "true_positive_rate"), points)
    for kind, drawn in draw_scored(report.scored).items():
        yield f"roc.{kind}", drawn


def as_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells ``[row, column]``."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def as_latex(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a ``tabular``, to be included."""
    lines = [" & ".join(cell.translate(_ESCAPES) for cell in cells) + r" \\" for cells in (head, *rows)]
    columns = "l" + "r" * (len(head) - 1)
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", lines[0], r"\hline", *lines[1:], r"\end{tabular}", ""]
    )


def _table(findings: Sequence[Finding]) -> Sequence[Sequence[str]]:
    """The head and a row an attack: percentages with intervals, epsilons; a dash is what there is not."""
    estimators = tuple(dict.fromkeys(bound.estimator for finding in findings for bound in finding.bounds))
    head = [
        *("view", "attack", "AUC", "balanced accuracy"),
        *(f"TPR at {100 * rate.fpr:g} % FPR" for rate in findings[0].tpr_at_fpr),
        *(f"epsilon, {estimator}" for estimator in estimators),
        *("epsilon, lower bound", "epsilon, upper bound"),
    ]
    return [head, *(_row(finding, estimators) for finding in findings)]


def _row(finding: Finding, estimators: Sequence[str]) -> Sequence[str]:
    found = {bound.estimator: bound.epsilon_lower for bound in finding.bounds}
    bounds = [found.get(estimator) for estimator in estimators]
    return [
        finding.view,
        finding.attack,
        _interval(finding.auc),
        _interval(finding.balanced_accuracy),
        *(_interval(None if isinstance(rate, Refused) else rate, 100, 1) for rate in finding.tpr_at_fpr),
        *("-" if epsilon is None else f"{epsilon:.2f}" for epsilon in bounds),
        f"{finding.epsilon_lower:.2f}",
        epsilon_text(finding.epsilon_upper),
    ]


def _interval(found: Auc | Interval | TprAtFpr | None, scale: float = 1.0, digits: int = 3) -> str:
    if found is None:
        return "-"
    estimate, low, high = (f"{scale * end:.{digits}f}" for end in (found.estimate, found.low, found.high))
    return f"{estimate} [{low}, {high}]"


def _csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return buffer.getvalue().encode()
