"""What a person sees in a terminal: progress on stderr; tables and plans on stdout."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from privkd.prepared import Forecast
from privkd.privacy.events import Unit
from privkd.progress import Progress
from privkd.result import Result


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


def print_result(result: Result) -> None:
    """The final table: every result beside its controls, then the ledger by unit."""
    console = Console()
    console.print(_accuracies(result))
    console.print(_ledger(result))
    for line in _remarks(result):
        console.print(line)
    folder = f"run folder: {result.run}   ({result.seconds:.1f} s)"
    console.print(folder, highlight=False, markup=False, soft_wrap=True)


def print_forecast(forecast: Forecast) -> None:
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
        (f"epsilon per record, whole run (delta {plan.delta:g})", _epsilon(plan.record.high)),
        (f"epsilon per device, whole run (delta {plan.delta:g})", _epsilon(plan.device.high)),
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
        console.print(_NO_RECORD_DP)
    if plan.inferred:
        console.print(_inferred(plan.inferred))
    for line in _warnings(plan.warnings):
        console.print(line)


def _inferred(constants: tuple[str, ...]) -> Text:
    said = f"Simulation: read from all records, private ones too: {', '.join(constants)}."
    return Text(f"{said} A deployment must be given them as settings under data.", style="yellow")


def _warnings(warnings: Sequence[str]) -> list[Text]:
    return [Text(f"Warning: {words}.", style="bold red") for words in warnings]


def _vote_rows(forecast: Forecast) -> list[tuple[str, str]]:
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


_NO_RECORD_DP = Text("No differential privacy: epsilon is inf, records are not protected.", style="bold red")


def _accuracies(result: Result) -> Table:
    teacher, student = result.teacher, result.student
    table = Table(title="Accuracy on the global test set", title_justify="left")
    for name in ("model", "result", "control", "what the control is"):
        table.add_column(name, justify="left" if name in ("model", "what the control is") else "right")
    table.add_row("teacher", _percent(teacher.after), _percent(teacher.before), "the teacher before")
    table.add_row("", "", _percent(teacher.self_distilled), "self-distilled with zero devices")
    table.add_row("", "", _percent(teacher.labels_only), "public labels alone, zero devices")
    table.add_row(
        "students, mean", _percent(student.mean), _percent(student.public_only), "public distillation only"
    )
    table.add_row("", "", _percent(student.trained), "as they answered in the last round")
    table.add_row("", "", _percent(student.direct_private), "trained directly, same budget")
    table.add_row("", "", _percent(student.direct), "trained directly, no DP")
    table.add_row("students, own data", _percent(student.personal), "", "each on its device's own test set")
    size = f"{teacher.parameters:,} parameters" if teacher.parameters else ""
    table.add_row(
        "one answer", f"{student.latency_ms:.2f} ms", f"{teacher.latency_ms:.2f} ms", f"the teacher ({size})"
    )
    return table


def _ledger(result: Result) -> Table:
    table = Table(title="Epsilon spent, all rounds (units are never added)", title_justify="left")
    for name in ("unit", "at least", "at most", "budget", "delta"):
        table.add_column(name, justify="left" if name == "unit" else "right")
    table.add_column("neighbouring relation")
    for row in result.ledger:
        bound = result.lower_bound(row.unit)
        crossed = bound is not None and bound.alarm(row.epsilon.high, row.delta)
        table.add_row(
            row.unit.value,
            Text(f"{bound.epsilon:.2f}" if bound else "-", style="bold red" if crossed else ""),
            Text(_epsilon(row.epsilon.high), style="red" if math.isinf(row.epsilon.high) else ""),
            _epsilon(row.budget),
            f"{row.delta:g}",
            row.neighbouring_relation,
        )
    return table


def _remarks(result: Result) -> list[Text]:
    remarks = _lower_bounds(result) + _warnings(result.warnings)
    for row in result.ledger:
        if row.unit is Unit.RECORD and math.isinf(row.epsilon.high):
            remarks.append(_NO_RECORD_DP)
        if row.unit is Unit.DEVICE:
            remarks += [
                Text(f"epsilon per device is inf: {reason}", style="yellow") for reason in row.reasons
            ]
    if result.noise == "seeded":
        remarks.append(
            Text("Simulation: noise is drawn from the seed; --set privacy.noise=system deploys.", style="dim")
        )
    if result.student.direct is not None:
        remarks.append(Text("Controls trained on device records are not covered by the ledger.", style="dim"))
    return remarks


def _lower_bounds(result: Result) -> list[Text]:
    """What the column ``at least`` rests on."""
    if not result.lower_bounds:
        return []
    trials = " and ".join(f"{bound.canaries:,} per {bound.unit}" for bound in result.lower_bounds)
    confidence = f"{100 * result.lower_bounds[0].confidence:.4g} %"
    words = f"At least: canaries through the run's own mechanisms, {trials}; confidence {confidence} each."
    paths = "; ".join(f"per {bound.unit} {bound.path}" for bound in result.lower_bounds)
    passed = sum(check.passed for check in result.checks)
    checks = f"{passed} of {len(result.checks)} checks of them passed."
    failed = [f"Check failed: {c.name} ({c.seen})" for c in result.checks if not c.passed]
    return [
        Text(words, style="dim"),
        Text(f"Their path: {paths}. {checks}", style="dim"),
        *(Text(line, style="bold red") for line in failed),
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
    return _epsilon(value) if name.startswith("epsilon") else f"{value:.3f}"


def _epsilon(value: float) -> str:
    return "inf" if math.isinf(value) else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f} %"
