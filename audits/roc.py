"""Log-log ROC curves, as SVG and PNG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from audits.tables import Scored
from privkd.runs.folder import RunFolder

_INCHES = 4.6
_DOTS = 150
_POINTS = 1000
"""Of a drawn curve at most, densest at the low rates: more would not be seen, and would bloat the SVG."""


@dataclass(frozen=True)
class Roc:
    """One attack's curve: false- and true-positive rates at every threshold, rising."""

    name: str
    false_positive: NDArray[np.float64]
    true_positive: NDArray[np.float64]


def roc(name: str, members: NDArray[np.float64], nonmembers: NDArray[np.float64]) -> Roc:
    """The curve of scores ``[member]`` and ``[nonmember]``, of which higher ones mean members.

    Samples that tie are called together, so that no order among them is made up.
    """
    thresholds = np.unique(np.concatenate([members, nonmembers]))[::-1]
    found = len(members) - np.searchsorted(np.sort(members), thresholds, side="left")
    alarms = len(nonmembers) - np.searchsorted(np.sort(nonmembers), thresholds, side="left")
    return Roc(name, alarms / len(nonmembers), found / len(members))


def draw(curves: Mapping[str, Sequence[Roc]], least_rate: float) -> dict[str, bytes]:
    """One panel a view, as ``{"svg": ..., "png": ...}``.

    Args:
        curves: by view; must not be empty.
        least_rate: the lowest rate that the axes show, such as one over the number of non-members.
    """
    figure = blank(_INCHES * len(curves), _INCHES + 0.9)
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (view, attacks) in zip(panels, curves.items(), strict=True):
        _panel(panel, view, attacks, least_rate)
    return {kind: rendered(figure, kind) for kind in ("svg", "png")}


def write_curves(folder: RunFolder, scored: Sequence[Scored]) -> tuple[str, ...]:
    """The ROC curves, if any, as ``audit/roc.svg`` and ``audit/roc.png``; returns these names."""
    if not scored:
        return ()
    drawn = draw_scored(scored)
    names = ("audit/roc.svg", "audit/roc.png")
    for name in names:
        folder.write_bytes(name, drawn[name.rsplit(".", 1)[1]])
    return names


def draw_scored(scored: Sequence[Scored]) -> dict[str, bytes]:
    """The curves of these scores, at least one, as `draw`."""
    curves: dict[str, list[Roc]] = {}
    for scores in scored:
        curves.setdefault(scores.view, []).append(roc(scores.attack, scores.members, scores.nonmembers))
    return draw(curves, 1 / min(len(scores.nonmembers) for scores in scored))


def _panel(panel: Axes, view: str, attacks: Sequence[Roc], least_rate: float) -> None:
    chance = np.geomspace(least_rate, 1, 50)
    panel.plot(chance, chance, color="0.6", linestyle=":", linewidth=1, label="chance")
    for number, attack in enumerate(attacks):
        kept = _thinned(len(attack.false_positive))
        rates = attack.false_positive[kept], attack.true_positive[kept]
        shown = [np.maximum(rate, least_rate) for rate in rates]
        style = ("-", "--", "-.")[number // 10 % 3] if len(attacks) > 10 else "-"
        panel.plot(*shown, linestyle=style, linewidth=1.4, color=f"C{number % 10}", label=attack.name)
    panel.set(
        xscale="log",
        yscale="log",
        xlim=(least_rate, 1),
        ylim=(least_rate, 1),
        xlabel="false-positive rate",
        ylabel="true-positive rate",
        title=view,
        aspect="equal",
    )
    panel.grid(which="major", color="0.9", linewidth=0.6)
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize=7, frameon=False)


def _thinned(points: int) -> NDArray[np.int64]:
    """Indices of the points that are drawn, the first and the last among them."""
    return np.unique(np.geomspace(1, points, min(points, _POINTS)).round().astype(np.int64)) - 1


def blank(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def rendered(figure: Figure, kind: str) -> bytes:
    """The figure as ``svg`` or ``png``."""
    buffer = BytesIO()
    # Without a date, equal curves are equal files.
    metadata = {"Date": None} if kind == "svg" else None
    figure.savefig(buffer, format=kind, dpi=_DOTS, metadata=metadata)
    return buffer.getvalue()
