"""What ``export/*.json`` says of the students that were exported from a run."""

from pathlib import Path

from audits.evidence.facts import ExportFacts
from audits.evidence.parsing import count, number, read_json, well_formed


def export_files(path: Path) -> tuple[Path, ...]:
    """The records of all exports of the run in ``path``."""
    return tuple(sorted((path / "export").glob("*.json")))


def read_exports(path: Path) -> tuple[ExportFacts, ...]:
    """The exports of the run in ``path``, by device and format.

    Raises:
        RunError: one is not of an export's form.
    """
    return tuple(_export(file) for file in export_files(path))


def _export(path: Path) -> ExportFacts:
    row = read_json(path)
    with well_formed(path):
        return ExportFacts(
            device=str(row["device"]),
            format=str(row["format"]),
            size_bytes=count(row["size_bytes"]),
            parameters=count(row["parameters"]),
            difference=number(row["check"]["difference"]),
            records=count(row["check"]["records"]),
            latency_ms=number(row["latency_ms"]),
            original_ms=number(row["original_ms"]),
        )
