"""What a person sees of a curve in a terminal: progress on stderr, the table on stdout."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from audits.estimators.rates import Interval
from audits.tradeoff.curve import Curve, cloud_view
from audits.tradeoff.points import Point, points_of, seeds_note
from audits.tradeoff.request import Cell, spelt


class CellsInTerminal:
    """A bar for all cells, and a line for each that runs."""

    def __init__(self, bars: Progress, total: int) -> None:
        self._bars = bars
        self._all = bars.add_task("cells", total=total)
        self._tasks: dict[Cell, TaskID] = {}

    def started(self, cell: Cell) -> None:
        """See `audits.tradeoff.runner.Watcher.started`."""
        self._tasks[cell] = self._bars.add_task(f"  {cell.label}: starting", total=None)

    def stage(self, cell: Cell, name: str) -> None:
        """See `audits.tradeoff.runner.Watcher.stage`."""
        self._bars.update(self._tasks[cell], description=f"  {cell.label}: {name}")

    def ended(self, cell: Cell, reason: str | None) -> None:
        """See `audits.tradeoff.runner.Watcher.ended`."""
        self._bars.remove_task(self._tasks.pop(cell))
        self._bars.advance(self._all)
        if reason is not None:
            self._bars.console.print(Text(f"failed: {cell.label}: {reason}", style="red"), soft_wrap=True)


class CellsInLines:
    """A line for each cell that ends, where stderr is no terminal."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._ended = 0

    def started(self, cell: Cell) -> None:
        """See `audits.tradeoff.runner.Watcher.started`."""

    def stage(self, cell: Cell, name: str) -> None:
        """See `audits.tradeoff.runner.Watcher.stage`."""

    def ended(self, cell: Cell, reason: str | None) -> None:
        """See `audits.tradeoff.runner.Watcher.ended`."""
        self._ended += 1
        outcome = "done" if reason is None else f"failed: {reason}"
        line = f"{self._ended} of {self._total}: {cell.label}: {outcome}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress_of(path: Path, left: int) -> Iterator[CellsInTerminal | CellsInLines]:
    """Progress of ``left`` cells, as the terminal allows."""
    console = Console(stderr=True)
    console.print(f"curve folder: {path}", highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        yield CellsInLines(console, left)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        yield CellsInTerminal(bars, left)


def print_curve(curve: Curve, files: tuple[str, ...]) -> None:
    """One row a channel and epsilon, then what failed, then where the files are."""
    console, points = Console(), points_of(curve)
    if points:
        console.print(_table(points))
        console.print(
            f"Accuracies in %, gain in points over zero devices; {seeds_note(points, 'brackets')}. "
            "Epsilon per record: mean lower bound of attacks on what the cloud sees (95 % confidence in each "
            "run), and the ledger's upper bound.",
            highlight=False,
        )
    for row in curve.failed:
        console.print(Text(f"failed: {row.cell.label}: {row.reason}", style="red"), soft_wrap=True)
    for name in files:
        console.print(f"{curve.path}/{name}", highlight=False, markup=False, soft_wrap=True)


def _table(points: tuple[Point, ...]) -> Table:
    table = Table(
        title="Privacy against utility", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for name in ("channel", "asked", "eps >=/<=", "teacher", "gain", "students", "TPR@1%"):
        table.add_column(name, justify="left" if name == "channel" else "right", overflow="fold")
    for point in points:
        view = cloud_view(point.channel)
        table.add_row(
            point.channel,
            spelt(point.epsilon),
            f"{_bound(point.lower(view))}/{point.upper:.3g}",
            _percent(point.accuracy(lambda a: a.teacher)),
            _percent(point.gain),
            _percent(point.accuracy(lambda a: a.students)),
            _percent(point.leak_rate(view)),
        )
    return table


def _percent(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    return f"{100 * interval.estimate:.1f}\n[{100 * interval.low:.1f},{100 * interval.high:.1f}]"


def _bound(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.estimate:.2f}"
