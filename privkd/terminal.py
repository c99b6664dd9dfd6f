"""What a person sees in a terminal: progress on stderr; tables and plans on stdout."""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from privkd.errors import AuditAlarm, PrivkdError
from privkd.progress import Progress
from privkd.records import WIDTH, Value
from privkd.runs.result import epsilon_text, taken_lines

if TYPE_CHECKING:
    from privkd.prepared import Prepared


def print_json(value: Any) -> None:
    """Write ``value`` as one line of strict JSON.

    Raises:
        ValueError: a number is infinite or not one; commands spell those as text or ``null`` beforehand.
    """
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")


class LiveProgress:
    """A moving line in a terminal, and a lasting one for each set of figures."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task: TaskID = bars.add_task("starting", total=None)

    def stage(self, name: str) -> None:
        """See `Progress.stage`."""
        # A fresh task, as rich would keep the last stage's total where the next has none.
        self._bars.remove_task(self._task)
        self._task = self._bars.add_task(name, total=None)

    def advance(self, done: int, total: int) -> None:
        """See `Progress.advance`."""
        self._bars.update(self._task, completed=done, total=total)

    def figures(self, **figures: float) -> None:
        """See `Progress.figures`."""
        self._bars.console.print(f"  {_figures(figures)}", highlight=False, soft_wrap=True)


class PlainProgress:
    """A line for each stage and each set of figures, where stderr is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def stage(self, name: str) -> None:
        """See `Progress.stage`."""
        self._console.print(name, highlight=False)

    def advance(self, done: int, total: int) -> None:
        """See `Progress.advance`."""

    def figures(self, **figures: float) -> None:
        """See `Progress.figures`."""
        self._console.print(f"  {_figures(figures)}", highlight=False, soft_wrap=True)


@contextmanager
def progress_on_stderr() -> Iterator[Progress]:
    """Progress for a person, as the terminal allows."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield PlainProgress(console)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        yield LiveProgress(bars)


def announce(path: Path, prepared: "Prepared") -> None:
    """Say on stderr where a run goes, and what in the user's data was taken for what, before it is used."""
    from privkd.data.constants import PUBLIC_SOURCES

    console = Console(stderr=True)
    console.print(f"run folder: {path}", highlight=False, markup=False, soft_wrap=True)
    data = prepared.config.data
    if data.source in PUBLIC_SOURCES and not data.own_files:
        return
    for line in taken_lines(prepared.plan.taken):
        console.print(line, soft_wrap=True)


def show(value: Value, *, as_json: bool) -> None:
    """Print what a command came to: its JSON form, or its table.

    Raises:
        AuditAlarm: it is one; it was printed first.
        PrivkdError: part of it failed; likewise.
    """
    if as_json:
        print_json(value.tree())
    else:
        wide_console().print(value, crop=False)
    if value.alarm:
        raise AuditAlarm(value.alarm)
    if value.failure:
        raise PrivkdError(value.failure)


def wide_console() -> Console:
    """A terminal's own width; a pipe or a file has none, and gets enough for every column."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, WIDTH))


def _figures(figures: dict[str, float]) -> str:
    names = {
        "epsilon_record": "epsilon/record",
        "epsilon_person": "epsilon/person",
        "epsilon_device": "epsilon/device",
        "accepted": "gate",
        "devices": "devices in the release",
        "answered": "queries with a consensus",
        "epsilon_votes": "(private, not to be released) data-dependent epsilon/device of the round",
    }
    return "  ".join(
        f"{names.get(name, name)} {_short(name, value)}"
        for name, value in figures.items()
        if not math.isnan(value)
    )


def _short(name: str, value: float) -> str:
    if name in ("answered", "devices"):
        return f"{value:.0f}"
    return epsilon_text(value) if name.startswith("epsilon") else f"{value:.3f}"
