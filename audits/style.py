"""One look for all figures: colours that the colour-blind tell apart, and text that stays text."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

INK, MUTED, HAIR = "#222222", "#5a5a5a", "#d9d9d9"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
"""Of Okabe and Ito, without the yellow, which white paper swallows."""
DASHES = ("-", "--", "-.")
SETTINGS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
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
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}
_UNDATED: Mapping[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


def blank(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def rendered(figure: Figure, *kinds: str, dots: int) -> dict[str, bytes]:
    """The figure as each of ``svg``, ``pdf`` and ``png``; equal figures are equal files."""
    files = {}
    for kind in kinds:
        buffer = BytesIO()
        with mpl.rc_context(SETTINGS):
            figure.savefig(buffer, format=kind, dpi=dots, metadata=_UNDATED.get(kind))
        files[kind] = buffer.getvalue()
    return files
