"""Log-log ROC curves, as SVG, PDF and PNG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from audits.style import COLOURS, DASHES, HAIR, MUTED, SETTINGS, blank, rendered
from audits.tables import Scored
from privkd.runs.folder import RunFolder

_INCHES = 4.6
_LABELS = 1.9
"""Inches beside a panel for the names of its curves."""
_DOTS = 150
_POINTS = 1000
"""Of a drawn curve at most, densest at the low rates: more would not be seen, and would bloat the SVG."""
_LINE = 0.052
"""Height of a name, as a share of a panel's."""


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
    """One panel a view, as ``{"svg": ..., "pdf": ..., "png": ...}``.

    Args:
        curves: by view; must not be empty.
        least_rate: the lowest rate that the axes show, such as one over the number of non-members.
    """
    with mpl.rc_context(SETTINGS):
        figure = blank((_INCHES + _LABELS) * len(curves), _INCHES)
        panels = figure.subplots(1, len(curves), squeeze=False)[0]
        for panel, (view, attacks) in zip(panels, curves.items(), strict=True):
            _panel(panel, view, attacks, least_rate)
    return rendered(figure, "svg", "pdf", "png", dots=_DOTS)


def write_curves(folder: RunFolder, scored: Sequence[Scored]) -> tuple[str, ...]:
    """The ROC curves, if any, as ``audit/roc`` with each ending of `draw`; returns these names."""
    if not scored:
        return ()
    drawn = draw_scored(scored)
    files = {f"audit/roc.{kind}": data for kind, data in drawn.items()}
    for name, data in files.items():
        folder.write_bytes(name, data)
    return tuple(files)


def draw_scored(scored: Sequence[Scored]) -> dict[str, bytes]:
    """The curves of these scores, at least one, as `draw`."""
    curves: dict[str, list[Roc]] = {}
    for scores in scored:
        curves.setdefault(scores.view, []).append(roc(scores.attack, scores.members, scores.nonmembers))
    return draw(curves, 1 / min(len(scores.nonmembers) for scores in scored))


def _panel(panel: Axes, view: str, attacks: Sequence[Roc], least_rate: float) -> None:
    chance = np.geomspace(least_rate, 1, 50)
    panel.plot(chance, chance, color=MUTED, linestyle=":", linewidth=1)
    starts = [("chance", 0.0, MUTED, ":")]
    for number, attack in enumerate(attacks):
        kept = _thinned(len(attack.false_positive))
        rates = [np.maximum(one[kept], least_rate) for one in (attack.false_positive, attack.true_positive)]
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        panel.plot(*rates, linestyle=dash, linewidth=1.4, color=colour)
        # Where the curve leaves the axis: what it finds at the lowest rate.
        first = float(rates[1][rates[0] <= least_rate].max(initial=least_rate))
        starts.append((attack.name, float(1 - np.log(first) / np.log(least_rate)), colour, dash))
    _name(panel, starts)
    panel.set(
        xscale="log",
        yscale="log",
        xlim=(least_rate, 1),
        ylim=(least_rate, 1),
        xlabel="false-positive rate",
        ylabel="true-positive rate",
        aspect="equal",
    )
    panel.set_title(view, fontweight="bold", fontsize=10.5)
    panel.yaxis.tick_right()
    panel.yaxis.set_label_position("right")
    panel.spines["right"].set_visible(True)
    panel.grid(which="major", color=HAIR, linewidth=0.6)


def _name(panel: Axes, starts: Sequence[tuple[str, float, str, str]]) -> None:
    """Each curve's name left of where it starts, none over another; a start is a height in 0 .. 1."""
    rising = sorted(starts, key=lambda start: start[1])
    heights = spread([start[1] for start in rising], _LINE)
    for (name, start, colour, dash), height in zip(rising, heights, strict=True):
        line = {"arrowstyle": "-", "color": colour, "linestyle": dash, "shrinkB": 0, "relpos": (1, 0.5)}
        panel.annotate(
            name,
            xy=(0, start),
            xytext=(-0.14, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            fontsize=8,
            horizontalalignment="right",
            verticalalignment="center",
            annotation_clip=False,
            arrowprops=line,
        )


def spread(rising: Sequence[float], gap: float) -> list[float]:
    """Heights near to the ``rising`` ones, with ``gap`` between neighbours; up to 1 where there is room."""
    heights: list[float] = []
    for wanted in rising:
        heights.append(wanted if not heights else max(wanted, heights[-1] + gap))
    highest = max(1.0, gap * (len(heights) - 1))
    for place in range(len(heights) - 1, -1, -1):
        heights[place] = min(heights[place], highest)
        highest = heights[place] - gap
    return heights


def _thinned(points: int) -> NDArray[np.int64]:
    """Indices of the points that are drawn, the first and the last among them."""
    return np.unique(np.geomspace(1, points, min(points, _POINTS)).round().astype(np.int64)) - 1
