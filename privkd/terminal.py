"""What a person sees in a terminal: progress on stderr; tables and plans on stdout."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from privkd.errors import AuditAlarm
from privkd.progress import Progress
from privkd.records import WIDTH, Value
from privkd.result import NO_RECORD_DP, epsilon_text, warned
from privkd.stdout import print_json

if TYPE_CHECKING:
    from privkd.prepared import Forecast


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


def print_folder(path: Path) -> None:
    """Where a run lies, said on stderr as it starts: whoever stops it must know what to resume."""
    Console(stderr=True).print(f"run folder: {path}", highlight=False, markup=False, soft_wrap=True)


def print_taken(taken: Mapping[str, str]) -> None:
    """What was taken for what in the data, said on stderr before anything is spent on it."""
    console = Console(stderr=True)
    for line in _taken(taken):
        console.print(line, soft_wrap=True)


def _taken(taken: Mapping[str, str]) -> list[Text]:
    return [Text(f"data, {name}: {words}", style="dim") for name, words in taken.items()]


def show(value: Value, *, as_json: bool) -> None:
    """Print what a command came to: its JSON form, or its table.

    Raises:
        AuditAlarm: it is one; it was printed first.
    """
    if as_json:
        print_json(value.tree())
    else:
        wide_console().print(value, crop=False)
    if value.alarm:
        raise AuditAlarm(value.alarm)


def wide_console() -> Console:
    """A terminal's own width; a pipe or a file has none, and gets enough for every column."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, WIDTH))


def print_forecast(forecast: "Forecast") -> None:
    """What ``--dry-run`` says."""
    plan = forecast.plan
    table = Table(title="Plan (nothing was trained, nothing was spent)", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    rows = [
        ("rounds x devices", f"{plan.rounds} x {plan.devices}"),
        ("devices that fall silent in each round", f"{plan.silent_devices}"),
        ("DP-SGD steps a round", str(plan.steps)),
        ("sampling rate", f"{plan.sampling_rate:g}"),
        ("noise multiplier", f"{plan.noise_multiplier:.4f}"),
        ("expected batch size", f"{plan.expected_batch_size:g}"),
        (f"epsilon per record, whole run (delta {plan.delta:g})", epsilon_text(plan.record.high)),
        (f"epsilon per device, whole run (delta {plan.delta:g})", epsilon_text(plan.device.high)),
        ("channel noise (rho per release)", "none" if plan.rho is None else f"{plan.rho:.4g}"),
        ("queries a round", str(plan.queries)),
        ("clip norm of a device's answers", f"{plan.clip_norm:.4g}"),
        ("upload per device and round", f"{plan.upload_bytes:,} bytes"),
        ("student parameters", f"{forecast.parameters:,}"),
        ("private training, one device after the other", f"about {forecast.seconds:.1f} s"),
    ]
    for row in rows + _vote_rows(forecast):
        table.add_row(*row)
    console = Console()
    console.print(table)
    for line in _taken(plan.taken):
        console.print(line, soft_wrap=True)
    if math.isinf(plan.record.high):
        console.print(NO_RECORD_DP)
    if plan.inferred:
        console.print(_inferred(plan.inferred))
    for line in warned(plan.warnings):
        console.print(line)


def _inferred(constants: tuple[str, ...]) -> Text:
    said = f"Simulation: read from all records, private ones too: {', '.join(constants)}."
    return Text(f"{said} A deployment must be given them as settings under data.", style="yellow")


def _vote_rows(forecast: "Forecast") -> list[tuple[str, str]]:
    votes = forecast.plan.votes
    if votes is None:
        return []
    noise = "none"
    if votes.sigma2 is not None and votes.threshold_sigma2 is not None:
        noise = f"{math.sqrt(votes.threshold_sigma2):.3g} / {math.sqrt(votes.sigma2):.3g}"
    return [
        ("votes for one class that make a consensus", f"{votes.threshold} of {forecast.plan.devices}"),
        ("each aggregator's noise, threshold / count (std, in votes)", noise),
    ]


def _figures(figures: dict[str, float]) -> str:
    names = {
        "epsilon_record": "epsilon/record",
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
