"""Published beside ours, for people."""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from papers.reproduce import Answer, Reproduction
from papers.study import Study

_SHARES = ("%", "points")


def print_reproduction(found: Reproduction) -> None:
    """One row for each claim."""
    console = Console()
    table = Table(title=f"{found.study.title}, scale {found.scale.name}", title_justify="left")
    table.add_column("claim")
    table.add_column("published", justify="right")
    table.add_column("ours", justify="right")
    for answer in found.answers:
        table.add_row(answer.claim.text, answer.claim.published, shown(answer))
    console.print(table)
    console.print(f"Ours: {found.scale.about}.", highlight=False, markup=False, soft_wrap=True)
    if any(math.isnan(answer.ours.estimate) for answer in found.answers):
        console.print("-: undefined, or refused, at this scale.", highlight=False)
    seeds = found.answers[0].ours.n
    console.print(
        "One seed: no interval."
        if seeds < 2
        else f"Means over {seeds} seeds with 95 % t-intervals; differences and ratios seed by seed.",
        highlight=False,
        soft_wrap=True,
    )


def print_studies(studies: Sequence[Study]) -> None:
    """One line for each study, and how to run it."""
    console = Console()
    table = Table(title="privkd papers run NAME", title_justify="left")
    for name in ("name", "paper", "scales"):
        table.add_column(name)
    for study in studies:
        table.add_row(study.name, study.title, ", ".join(scale.name for scale in study.scales))
    console.print(table)


def shown(answer: Answer) -> str:
    """Our estimate as the table spells it."""
    unit, ours = answer.claim.unit, answer.ours
    mean = _number(ours.estimate, unit, signed=unit == "points")
    if ours.n < 2 or math.isnan(ours.estimate):
        return mean
    low, high = (_number(value, unit, bare=True) for value in (ours.low, ours.high))
    return f"{mean} [{low}, {high}]"


def _number(value: float, unit: str, *, signed: bool = False, bare: bool = False) -> str:
    if math.isnan(value):
        return "-"
    if unit not in _SHARES:
        return f"{value:.3f}"
    text = f"{100 * value:+.2f}" if signed else f"{100 * value:.2f}"
    return text if bare else f"{text} {unit}"
