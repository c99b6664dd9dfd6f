"""How the curve's figures look, and how they become files."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from audits.estimators.rates import Interval

INK, MUTED, HAIR = "#222222", "#5a5a5a", "#d9d9d9"
# Okabe and Ito's colours, which stay apart for colour-blind eyes; markers tell them apart in grey.
CHANNEL_COLOURS = {"plain": "#D55E00", "noised": "#0072B2", "secure": "#009E73"}
CHANNEL_MARKERS = {"plain": "o", "noised": "s", "secure": "^"}
FORBIDDEN = "#fbe9df"
TEACHER, STUDENT = "#0072B2", "#E69F00"
_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.fontsize": 9,
    "svg.hashsalt": "privkd",
}
_DOTS = 110


def canvas(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """A white figure with a grid of quiet axes, sizes in inches."""
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.grid(color=HAIR, linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, [list(row) for row in panels]


def heading(panel: Axes, text: str) -> None:
    """A panel's title."""
    panel.set_title(text, loc="left", fontsize=10.5, fontweight="bold")


def handle(colour: str, marker: str, label: str) -> Line2D:
    """A line with marks, for a legend."""
    return Line2D([], [], color=colour, marker=marker, linewidth=1.6, markersize=5.5, label=label)


def bars(values: Sequence[Interval], scale: float, least: float, most: float) -> list[list[float]]:
    """Lengths of error bars down and up, cut where no value can lie."""
    down = [scale * one.estimate - max(least, scale * one.low) for one in values]
    up = [min(most, scale * one.high) - scale * one.estimate for one in values]
    return [[max(0.0, length) for length in side] for side in (down, up)]


def rendered(figure: Figure) -> Mapping[str, bytes]:
    """The figure as ``{"svg": ..., "png": ...}``; equal figures are equal files."""
    files = {}
    for kind in ("svg", "png"):
        buffer = BytesIO()
        with mpl.rc_context(_SETTINGS):
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(buffer, format=kind, dpi=_DOTS, metadata=metadata)
        files[kind] = buffer.getvalue()
    return files
