"""An exported student, for people."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from privkd.export.artefact import TOLERANCE
from privkd.export.export import Exported


def print_exported(exported: Exported) -> None:
    """Where it lies, and how it compares with the student of the run."""
    artefact = exported.artefact
    table = Table(
        title=f"Student of {exported.device} after round {exported.round}, as {artefact.format}",
        title_justify="left",
    )
    table.add_column("what")
    table.add_column("value", justify="right")
    shape = ", ".join(map(str, artefact.input_shape))
    check = artefact.check
    rows = (
        ("input", f"raw float32 [record, {shape}]"),
        ("preprocessing inside", "none" if artefact.divisor == 1 else f"divided by {artefact.divisor:g}"),
        ("output", f"logits [record, {artefact.classes}]"),
        ("size", f"{artefact.size_bytes:,} bytes ({artefact.parameters:,} parameters)"),
        ("one answer, one CPU thread", f"{artefact.latency_ms:.3f} ms"),
        ("the original's", f"{artefact.original_ms:.3f} ms"),
        (f"largest difference on {check.records} records", f"{check.difference:.1e} (limit {TOLERANCE:g})"),
    )
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    console.print(table)
    console.print(f"written: {artefact.file}", highlight=False, markup=False, soft_wrap=True)
