"""Figure 2, the central picture: what leaks against what is gained, a curve a channel."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from audits.estimators.rates import Interval
from audits.tradeoff.curve import Curve, cloud_view
from audits.tradeoff.points import Point, pareto_front, seeds_note
from audits.tradeoff.request import spelt
from audits.tradeoff.style import (
    CHANNEL_COLOURS,
    CHANNEL_MARKERS,
    INK,
    MUTED,
    bars,
    canvas,
    handle,
    heading,
    rendered,
)

_LABELS = {"plain": (6, 6), "noised": (6, -12), "secure": (-13, 6)}
"""Where a budget is written beside its mark, in points: apart for channels whose marks coincide."""
_WIDER = 0.35
"""Share of the estimates' range that an axis reaches beyond them at most; wide bars run out of the panel."""


@dataclass(frozen=True)
class _Mark:
    point: Point
    gain: Interval
    leak: Interval


def draw_leak(curve: Curve, points: Sequence[Point]) -> Mapping[str, bytes]:
    """Rows: what leaks; columns: to the cloud, and to whoever holds a student."""
    views = [("what the cloud sees", cloud_view), ("whoever holds a student", _student)]
    figure, panels = canvas(2, 2, 9.4, 7.4)
    for column, (title, view_of) in enumerate(views):
        for row, (measure, scale) in enumerate(((Point.lower, 1.0), (Point.leak_rate, 100.0))):
            _panel(panels[row][column], _marks(points, measure, view_of), scale)
        heading(panels[0][column], f"View: {title}")
        _chance(panels[1][column])
        panels[1][column].set_xlabel(
            "accuracy that the teacher gained\nover zero devices (percentage points)"
        )
    panels[0][0].set_ylabel("leak: lower bound on\nrecord-level ε (95 % confidence)")
    panels[1][0].set_ylabel("leak: true-positive rate\nat 1 % false positives (%)")
    channels = dict.fromkeys(point.channel for point in points)
    handles = [handle(CHANNEL_COLOURS[c], CHANNEL_MARKERS[c], f"{c} channel") for c in channels]
    ring = Line2D([], [], color=INK, marker="o", markersize=11, markerfacecolor="none", linewidth=1.0)
    ring.set_label("Pareto front: least leak for its gain")
    figure.legend(handles=[*handles, ring], loc="outside upper center", ncols=4, frameon=False)
    figure.supxlabel(f"beside each mark: record-level budget ε; {seeds_note(points)}", fontsize=9)
    return rendered(figure)


def _student(_: str) -> str:
    return "student"


def _marks(
    points: Sequence[Point],
    measure: Callable[[Point, str], Interval | None],
    view_of: Callable[[str], str],
) -> list[_Mark]:
    found = [(point, point.gain, measure(point, view_of(point.channel))) for point in points]
    return [_Mark(point, gain, leak) for point, gain, leak in found if gain and leak]


def _chance(panel: Axes) -> None:
    """Whoever guesses at random finds 1 % of the members at 1 % false positives."""
    panel.axhline(1, color=MUTED, linestyle=":", linewidth=1.2)
    where = ("axes fraction", "data")
    panel.annotate("chance", (0.995, 1), xycoords=where, fontsize=8, color=MUTED, ha="right", va="bottom")


def _panel(panel: Axes, marks: Sequence[_Mark], scale: float) -> None:
    """A line a channel, a mark a budget, and the front through the marks that no other beats."""
    if not marks:
        panel.annotate("not measured", (0.5, 0.5), xycoords="axes fraction", ha="center", color=MUTED)
        return
    for channel in dict.fromkeys(mark.point.channel for mark in marks):
        _channel(panel, channel, [mark for mark in marks if mark.point.channel == channel], scale)
    front = pareto_front([mark.gain.estimate for mark in marks], [mark.leak.estimate for mark in marks])
    x = [100 * marks[one].gain.estimate for one in front]
    y = [scale * marks[one].leak.estimate for one in front]
    panel.plot(x, y, color=INK, linewidth=1.0, marker="o", markersize=11, markerfacecolor="none", zorder=5)
    panel.set_xlim(*_limits([mark.gain for mark in marks], 100, -math.inf, 2.0))
    panel.set_ylim(*_limits([mark.leak for mark in marks], scale, 0, 0.05 if scale == 1 else 1.5))


def _channel(panel: Axes, channel: str, marks: Sequence[_Mark], scale: float) -> None:
    colour = CHANNEL_COLOURS[channel]
    gains, leaks = [mark.gain for mark in marks], [mark.leak for mark in marks]
    x = [100 * gain.estimate for gain in gains]
    y = [scale * leak.estimate for leak in leaks]
    most = 100 if scale == 100 else math.inf
    across, along = bars(gains, 100, -100, 100), bars(leaks, scale, 0, most)
    panel.errorbar(x, y, xerr=across, yerr=along, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.55)
    panel.plot(x, y, color=colour, marker=CHANNEL_MARKERS[channel], markersize=6.5, linewidth=1.5, zorder=4)
    for mark, place in zip(marks, zip(x, y, strict=True), strict=True):
        panel.annotate(
            "∞" if math.isinf(mark.point.epsilon) else spelt(mark.point.epsilon),
            place,
            xytext=_LABELS[channel],
            textcoords="offset points",
            fontsize=9,
            color=colour,
            zorder=6,
        )


def _limits(intervals: Sequence[Interval], scale: float, least: float, margin: float) -> tuple[float, float]:
    """Of an axis: all estimates, and their bars as far as these do not dwarf them."""
    low, high = (f(scale * one.estimate for one in intervals) for f in (min, max))
    reach = max(_WIDER * (high - low), margin)
    down = max(low - reach, min(scale * one.low for one in intervals), least)
    up = min(high + reach, max(scale * one.high for one in intervals))
    edge = 0.06 * max(up - down, margin)
    return down - edge, up + 1.6 * edge
