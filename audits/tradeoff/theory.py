"""Figure 3: lower bounds from attacks against upper bounds from the ledger, a panel a view."""

import math
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from audits.requests import VIEWS
from audits.tradeoff.curve import Curve
from audits.tradeoff.style import (
    CHANNEL_COLOURS,
    CHANNEL_MARKERS,
    FORBIDDEN,
    INK,
    MUTED,
    canvas,
    heading,
    rendered,
)

_NO_BOUND = 1.14
"""Where runs without a bound stand, relative to the largest finite one."""
_LEAST_GAP = 0.05


def draw_theory(curve: Curve) -> Mapping[str, bytes]:
    """Each mark is one run, each panel a view; a mark above the diagonal is an alarm."""
    views = sorted(curve.views, key=VIEWS.index)
    columns = min(3, len(views))
    rows = math.ceil(len(views) / columns)
    figure, panels = canvas(rows, columns, 3.1 * columns + 0.6, 2.9 * rows + 1.1)
    flat = [panel for line in panels for panel in line]
    widest = 1.08 * max([e for e in curve.request.epsilons if math.isfinite(e)], default=1.0)
    highest = max([widest, *(1.06 * lower for view in views for _, _, lower in _bounds(curve, view))])
    for number, panel in enumerate(flat):
        panel.set_visible(number < len(views))
        if number < len(views):
            _panel(panel, curve, views[number], widest, highest)
    for line in panels:
        line[0].set_ylabel("lower bound on record-level ε\n(95 % confidence)")
    figure.supxlabel(
        "upper bound on record-level ε, from the ledger (∞: none claimed); a mark is a run", fontsize=9
    )
    figure.legend(handles=_legend(curve), loc="outside upper center", ncols=5, frameon=False)
    return rendered(figure)


def _legend(curve: Curve) -> list[Line2D | Patch]:
    handles: list[Line2D | Patch] = []
    for channel in curve.request.channels:
        marker, colour = CHANNEL_MARKERS[channel], CHANNEL_COLOURS[channel]
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=f"{channel} channel"))
    handles.append(Line2D([], [], color=INK, linewidth=1.2, label="lower = upper"))
    handles.append(Patch(color=FORBIDDEN, linewidth=0, label="ALARM"))
    return handles


def _bounds(curve: Curve, view: str) -> list[tuple[str, float, float]]:
    """Channel, upper and lower bound of each run that has the view."""
    found = [(row.cell.channel, row.lower(view)) for row in curve.done]
    return [(channel, one.epsilon_upper, one.epsilon_lower) for channel, one in found if one]


def _panel(panel: Axes, curve: Curve, view: str, widest: float, highest: float) -> None:
    beyond = _NO_BOUND * widest
    panel.plot([0, widest], [0, widest], color=INK, linewidth=1.2)
    panel.fill_between([0, widest], [0, widest], highest, color=FORBIDDEN, linewidth=0, zorder=0)
    channels = curve.request.channels
    for place, channel in enumerate(channels):
        here = [(upper, lower) for name, upper, lower in _bounds(curve, view) if name == channel]
        shift = (place - (len(channels) - 1) / 2) * 0.022 * widest
        panel.plot(
            [min(upper, beyond) + shift for upper, _ in here],
            [lower for _, lower in here],
            linestyle="",
            marker=CHANNEL_MARKERS[channel],
            color=CHANNEL_COLOURS[channel],
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.6,
        )
    panel.axvline((widest + beyond) / 2, color=MUTED, linewidth=0.8, linestyle=":")
    ticks = _ticks(curve.request.epsilons, widest)
    panel.set_xticks([*ticks, beyond], [*(f"{e:g}" for e in ticks), "∞"])
    panel.set(xlim=(-0.03 * widest, 1.06 * beyond), ylim=(-0.03 * highest, highest))
    heading(panel, view)


def _ticks(epsilons: tuple[float, ...], widest: float) -> list[float]:
    """The finite budgets, as far as their labels stand apart; the largest always."""
    kept: list[float] = []
    for epsilon in sorted((e for e in epsilons if math.isfinite(e)), reverse=True):
        if not kept or kept[-1] - epsilon >= _LEAST_GAP * widest:
            kept.append(epsilon)
    return kept
