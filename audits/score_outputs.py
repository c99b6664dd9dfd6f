"""What an audit of scores leaves in a folder: its report and its ROC curves."""

import json
from collections.abc import Iterator
from pathlib import Path

from audits.evidence import write_whole
from audits.roc import draw_scored
from audits.tables import ScoresReport


def write_scores(report: ScoresReport, out: Path) -> ScoresReport:
    """Write the report and its figures to ``out``; returns it with their paths.

    Raises:
        RunError: a file cannot be written.
    """
    names = []
    for name, data in _files(report):
        write_whole(out / name, data)
        names.append(str(out / name))
    return report.model_copy(update={"written": tuple(names)})


def _files(report: ScoresReport) -> Iterator[tuple[str, bytes]]:
    yield "scores.json", (json.dumps(report.tree(), indent=2, allow_nan=False) + "\n").encode()
    for kind, drawn in draw_scored(report.scored).items():
        yield f"roc.{kind}", drawn
