"""What is kept of an exported student: ``export/*.json`` in the run's folder, and ``--json``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import model_validator
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from privkd.records import Count, FileRecord, Plain, Real, Record, Value

_SHOWN = 10
TOLERANCE = 1e-5
"""Of a logit between the artefact and the student."""


@dataclass(frozen=True)
class Check:
    """How far the artefact's logits are from the student's on ``records`` public records.

    ``difference`` is the largest, absolute where a logit is below 1 and relative above.
    """

    records: Count
    difference: Real


class Artefact(Record):
    """What was written.

    Attributes:
        format: see `formats`.
        file: where it lies.
        size_bytes: its size.
        parameters: of the student.
        input_shape: of one raw record, float32, to which the artefact does its preprocessing itself; or int64
            of token ids.
        preprocessing: that, in words.
        columns: of a table, each a `preprocessing.Column`, in the order in which the artefact takes them.
        vocabulary: ids are below it; ``None``: raw records are numbers.
        tokenizer: where the one lies that makes ids of text.
        classes: number of logits.
        class_names: of the logits, in their order; none in records of version 0.1.0.
        check: how the artefact was found equal to the student.
        latency_ms: of the artefact for one record, on one CPU thread, median.
        original_ms: of the student as torch runs it.
    """

    format: str
    file: str
    size_bytes: Count
    parameters: Count
    input_shape: tuple[Count, ...]
    preprocessing: str
    columns: tuple[Mapping[str, Plain], ...] = ()
    vocabulary: Count | None = None
    tokenizer: str | None = None
    classes: Count
    class_names: tuple[str, ...] = ()
    check: Check
    latency_ms: Real
    original_ms: Real

    @model_validator(mode="before")
    @classmethod
    def _of_a_divisor(cls, given: Any) -> Any:
        """Version 0.1.0 knew no preprocessing but a division."""
        if not isinstance(given, dict) or "divisor" not in given:
            return given
        words = "none" if given["divisor"] == 1 else f"divided by {given['divisor']}"
        return {name: value for name, value in given.items() if name != "divisor"} | {"preprocessing": words}


class Exported(Artefact, FileRecord, Value):
    """The artefact of the student that ``device`` is left with by ``run`` after ``round`` rounds.

    ``delivered`` says whether it learned from the last teacher in the end; else it is the one that the device
    trained.
    """

    run: str
    device: str
    round: Count
    delivered: bool = True

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The one artefact."""
        tree = self.model_dump(exclude={"version", "check", "input_shape", "columns", "class_names"})
        return [tree | {"difference": self.check.difference, "records": self.check.records}]

    def __rich__(self) -> RenderableType:
        """Where it lies, and how it compares with the student of the run."""
        table = Table(
            title=f"Student of {self.device} after round {self.round}, as {self.format}",
            title_justify="left",
        )
        table.add_column("what")
        table.add_column("value", justify="right")
        shape = ", ".join(map(str, self.input_shape))
        check = self.check
        rows = (
            (
                "which",
                "as delivered" if self.delivered else "as the device trained it, nothing was delivered",
            ),
            ("input", f"{'raw float32' if self.vocabulary is None else 'token ids int64'} [record, {shape}]"),
            ("preprocessing inside", self.preprocessing),
            ("output", f"logits [record, {self.classes}]{_named(self.class_names)}"),
            ("size", f"{self.size_bytes:,} bytes ({self.parameters:,} parameters)"),
            ("one answer, one CPU thread", f"{self.latency_ms:.3f} ms"),
            ("the original's", f"{self.original_ms:.3f} ms"),
            (
                f"largest difference on {check.records} records",
                f"{check.difference:.1e} (limit {TOLERANCE:g})",
            ),
        )
        for row in rows:
            table.add_row(*map(Text, row))
        return Group(table, Text(f"written: {self.file}", no_wrap=True, overflow="ignore"))


def _named(classes: Sequence[str]) -> str:
    """The classes by name, as far as a table's cell shows them."""
    if not classes:
        return ""
    more = f" and {len(classes) - _SHOWN} more" if len(classes) > _SHOWN else ""
    return f": {', '.join(classes[:_SHOWN])}{more}"
