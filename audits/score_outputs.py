"""What an audit of scores leaves in a folder: report, tables, raw scores, ROC points and figures."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from audits.evidence import write_whole
from audits.findings import Finding, Refused
from audits.roc import draw_scored, roc
from audits.tables import ScoresReport
from audits.wording import epsilon_text

_ESCAPES = str.maketrans({"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#"})


def write_scores(report: ScoresReport, out: Path) -> ScoresReport:
    """Write the files to ``out``; returns the report with their paths.

    Raises:
        RunError: one cannot be written.
    """
    names = []
    for name, data in _files(report):
        write_whole(out / name, data)
        names.append(str(out / name))
    return report.model_copy(update={"written": tuple(names)})


def _files(report: ScoresReport) -> Iterator[tuple[str, bytes]]:
    yield "scores.json", (json.dumps(report.tree(), indent=2, allow_nan=False) + "\n").encode()
    head, rows = _head(report.findings), [_row(finding) for finding in report.findings]
    yield "table.md", as_markdown(head, rows).encode()
    yield "table.tex", as_latex(head, rows).encode()
    scored = (
        (one.attack, repr(float(score)), int(inside))
        for one in report.scored
        for score, inside in zip(one.values, one.inside, strict=True)
    )
    yield "scores.csv", _csv(("attack", "score", "member"), scored)
    curves = [roc(one.attack, one.members, one.nonmembers) for one in report.scored]
    points = (
        (curve.name, repr(float(fpr)), repr(float(tpr)))
        for curve in curves
        for fpr, tpr in zip(curve.false_positive, curve.true_positive, strict=True)
    )
    yield "roc.csv", _csv(("attack", "false_positive_rate", "true_positive_rate"), points)
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


def _head(findings: Sequence[Finding]) -> Sequence[str]:
    first = findings[0]
    rates = [f"TPR at {100 * rate.fpr:g} % FPR" for rate in first.tpr_at_fpr]
    bounds = [f"epsilon, {bound.estimator}" for bound in first.bounds]
    return ["attack", "AUC", "balanced accuracy", *rates, *bounds, "epsilon, lower bound", "epsilon, claimed"]


def _row(finding: Finding) -> Sequence[str]:
    """The figures of one attack; a dash is what is refused."""
    area, accuracy = finding.auc, finding.balanced_accuracy
    rates = [
        "-"
        if isinstance(rate, Refused)
        else f"{100 * rate.estimate:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
        for rate in finding.tpr_at_fpr
    ]
    bounds = [bound.epsilon_lower for bound in finding.bounds]
    return [
        finding.attack,
        "-" if area is None else f"{area.estimate:.3f} [{area.low:.3f}, {area.high:.3f}]",
        "-" if accuracy is None else f"{accuracy.estimate:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]",
        *rates,
        *("-" if epsilon is None else f"{epsilon:.2f}" for epsilon in bounds),
        f"{finding.epsilon_lower:.2f}",
        epsilon_text(finding.epsilon_upper),
    ]


def _csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return buffer.getvalue().encode()
