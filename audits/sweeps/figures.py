"""The three pictures of a sweep: what it gains, what it leaks for that, and how theory holds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from audits.estimators.rates import Interval
from audits.evidence import Accuracies
from audits.requests import VIEWS
from audits.style import HAIR, INK, MUTED, SETTINGS, rendered
from audits.sweeps.grid import Grid, spelt
from audits.sweeps.points import Outcome, Point, audited_views, cloud_view, points_of, seeds_note
from privkd.channels.registry import known

FIGURES = {
    "utility": "Accuracy of teacher and students against the record-level budget, beside control and ceiling",
    "leak": "What attacks find against the accuracy that the teacher gains, by channel and budget",
    "theory": "Lower bounds from attacks against the ledger's upper bound, by view; one mark is one run",
}

FORBIDDEN = "#fbe9df"
TEACHER, STUDENT = "#0072B2", "#E69F00"
_DOTS = 110
_BEYOND = 12.0
"""Percentage points that the accuracies' axis reaches beyond the estimates at most: wide bars run out."""
_WIDER = 0.35
"""Likewise of the leak's axes, as a share of the estimates' range."""
_NO_BOUND = 1.14
"""Where runs without a bound stand, relative to the largest finite one."""
_LEAST_GAP = 0.05
_SHOWN_DECIMALS = 1
"""Of a gain in percentage points: less than that is no more gain."""
_APART, _FAR_RIGHT = 0.05, 0.85
"""Shares of a panel: marks nearer than the first have one label, which is to their left beyond the second."""


def draw_figures(grid: Grid, outcomes: Sequence[Outcome]) -> Mapping[str, Mapping[str, bytes]]:
    """Each figure of ``FIGURES`` that the finished trials allow, as ``{"svg": ..., "png": ...}``."""
    points = [point for point in points_of(grid, outcomes) if point.gain is not None]
    if not points:
        return {}
    found = {"utility": _utility(grid, points)}
    if views := sorted(audited_views(outcomes), key=_place):
        found |= {"leak": _leak(points), "theory": _theory(grid, outcomes, views)}
    return {name: rendered(figure, "svg", "png", dots=_DOTS) for name, figure in found.items()}


def _place(view: str) -> int:
    """In the order of figures: a channel of a plug-in's comes first."""
    return VIEWS.index(view) if view in VIEWS else -1


def _canvas(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """A white figure with a grid of quiet axes, sizes in inches."""
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.grid(color=HAIR, linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, [list(row) for row in panels]


def _heading(panel: Axes, text: str) -> None:
    panel.set_title(text, loc="left", fontsize=10.5, fontweight="bold")


def _key(label: str, colour: str, marker: str = "", **style: Any) -> Line2D:
    """A line with marks, for a legend."""
    look: dict[str, Any] = {"linewidth": 1.6} | style
    return Line2D([], [], label=label, color=colour, marker=marker, **look)


def _legend(figure: Figure, keys: Sequence[Line2D | Patch], columns: int, note: str) -> Figure:
    """The figure with its legend above and a note below."""
    figure.legend(handles=keys, loc="outside upper center", ncols=columns, frameon=False)
    figure.supxlabel(note, fontsize=9)
    return figure


def _bars(values: Sequence[Interval], scale: float, least: float, most: float) -> list[list[float]]:
    """Lengths of error bars down and up, cut where no value can lie."""
    down = [scale * one.estimate - max(least, scale * one.low) for one in values]
    up = [min(most, scale * one.high) - scale * one.estimate for one in values]
    return [[max(0.0, length) for length in side] for side in (down, up)]


def _utility(grid: Grid, points: Sequence[Point]) -> Figure:
    """Accuracy against the record-level budget, a panel a channel."""
    channels = [c for c in grid.channels if any(point.channel == c for point in points)]
    figure, panels = _canvas(1, len(channels), 3.4 * len(channels) + 0.6, 4.2)
    places = {epsilon: place for place, epsilon in enumerate(sorted(grid.epsilons))}
    ceiling = ceiling_of(points)
    for number, (panel, channel) in enumerate(zip(panels[0], channels, strict=True)):
        here = [point for point in points if point.channel == channel]
        _lines(panel, here, ceiling)
        _series(panel, here, _teacher, places, (TEACHER, "o", -0.06))
        _series(panel, here, _students, places, (STUDENT, "D", 0.06))
        _heading(panel, f"{channel} channel")
        panel.set_xticks(list(places.values()), ["∞" if math.isinf(e) else f"{e:g}" for e in places])
        panel.set(xlim=(-0.4, len(places) - 0.6), ylim=_accuracy_limits(points))
        panel.tick_params(labelleft=number == 0)
    panels[0][0].set_ylabel("accuracy on the global test set (%)")
    keys = [
        _key("teacher after the run", TEACHER, "o", markersize=5.5),
        _key("students, mean over devices", STUDENT, "D", markersize=5.5),
        _key("control: teacher, zero devices", INK, linestyle="--", linewidth=1.3),
    ]
    if ceiling:
        keys.append(_key(f"ceilings: no DP ({ceiling.channel} channel)", MUTED, linestyle=":"))
    delta = next(one.facts.config.privacy.delta for one in points[0].outcomes if one.facts)
    words = f"record-level budget ε of the whole run, at δ = {delta:g} (∞: no DP; axis not to scale)"
    return _legend(figure, keys, 4, f"{words}\n{seeds_note(points)}")


def ceiling_of(points: Sequence[Point]) -> Point | None:
    """The point without DP: over a channel that adds no noise if there is one, as others may still do."""
    open_ones = [point for point in points if math.isinf(point.epsilon)]
    return min(open_ones, key=lambda point: known(point.channel).adds_noise, default=None)


def _teacher(measured: Accuracies) -> Interval:
    return measured.teacher


def _students(measured: Accuracies) -> Interval | None:
    return measured.students


def _control(measured: Accuracies) -> Interval:
    return measured.control


def _lines(panel: Axes, here: Sequence[Point], ceiling: Point | None) -> None:
    """Control and ceilings across the panel."""
    controls = [100 * one.estimate for point in here if (one := point.accuracy(_control))]
    panel.axhline(sum(controls) / len(controls), color=INK, linestyle="--", linewidth=1.3, zorder=1)
    for figure_of, colour in ((_teacher, TEACHER), (_students, STUDENT)):
        if top := ceiling.accuracy(figure_of) if ceiling else None:
            panel.axhline(100 * top.estimate, color=colour, linestyle=":", linewidth=1.6, zorder=1)


def _series(
    panel: Axes,
    here: Sequence[Point],
    figure_of: Callable[[Accuracies], Interval | None],
    places: Mapping[float, int],
    style: tuple[str, str, float],
) -> None:
    colour, marker, shift = style
    shown = [(places[point.epsilon] + shift, one) for point in here if (one := point.accuracy(figure_of))]
    values = [one for _, one in shown]
    panel.errorbar(
        [place for place, _ in shown],
        [100 * one.estimate for one in values],
        yerr=_bars(values, 100, 0, 100),
        color=colour,
        marker=marker,
        markersize=5.5,
        linewidth=1.6,
        elinewidth=1.1,
        capsize=3,
    )


def _accuracy_limits(points: Sequence[Point]) -> tuple[float, float]:
    """Of the vertical axis, the same for all panels."""
    found = [one for point in points for of in (_teacher, _students, _control) if (one := point.accuracy(of))]
    low, high = (f(100 * one.estimate for one in found) for f in (min, max))
    down, up = min(100 * one.low for one in found), max(100 * one.high for one in found)
    return max(0.0, low - _BEYOND, down - 2), min(101.0, high + _BEYOND, up + 2)


@dataclass(frozen=True)
class _Mark:
    point: Point
    gain: Interval
    leak: Interval


def _leak(points: Sequence[Point]) -> Figure:
    """What leaks against what is gained, a line a channel: the central picture.

    Rows: what leaks; columns: to the cloud, and to whoever holds a student.
    """
    figure, panels = _canvas(2, 2, 9.4, 7.4)
    for column, title in enumerate(("what the cloud sees", "whoever holds a student")):
        for row, (measure, scale) in enumerate(((Point.lower, 1.0), (Point.leak_rate, 100.0))):
            views = ["student" if column else cloud_view(point.channel) for point in points]
            found = [
                (point, point.gain, measure(point, view)) for point, view in zip(points, views, strict=True)
            ]
            _front_panel(
                panels[row][column], [_Mark(p, gain, leak) for p, gain, leak in found if gain and leak], scale
            )
        _heading(panels[0][column], f"View: {title}")
        _chance(panels[1][column])
        panels[1][column].set_xlabel(
            "accuracy that the teacher gained\nover zero devices (percentage points)"
        )
    panels[0][0].set_ylabel("leak: lower bound on\nrecord-level ε (95 % confidence)")
    panels[1][0].set_ylabel("leak: true-positive rate\nat 1 % false positives (%)")
    keys = [
        _key(f"{c} channel", known(c).colour, known(c).marker, markersize=5.5)
        for c in dict.fromkeys(point.channel for point in points)
    ]
    ring: dict[str, Any] = {"markersize": 11, "markerfacecolor": "none", "linewidth": 1.0}
    keys.append(_key("Pareto front: least leak for its gain", INK, "o", **ring))
    return _legend(figure, keys, 4, f"beside each mark: record-level budget ε; {seeds_note(points)}")


def _chance(panel: Axes) -> None:
    """Whoever guesses at random finds 1 % of the members at 1 % false positives."""
    panel.axhline(1, color=MUTED, linestyle=":", linewidth=1.2)
    where = ("axes fraction", "data")
    panel.annotate("chance", (0.995, 1), xycoords=where, fontsize=8, color=MUTED, ha="right", va="bottom")


def _front_panel(panel: Axes, marks: Sequence[_Mark], scale: float) -> None:
    """A line a channel, a mark a budget, and the front through the marks that no other beats."""
    if not marks:
        panel.set_axis_off()
        panel.annotate("not measured", (0.5, 0.5), xycoords="axes fraction", ha="center", color=MUTED)
        return
    for channel in dict.fromkeys(mark.point.channel for mark in marks):
        _channel(panel, channel, [mark for mark in marks if mark.point.channel == channel], scale)
    gains = [round(100 * mark.gain.estimate, _SHOWN_DECIMALS) for mark in marks]
    front = pareto_front(gains, [mark.leak.estimate for mark in marks])
    x = [100 * marks[one].gain.estimate for one in front]
    y = [scale * marks[one].leak.estimate for one in front]
    panel.plot(x, y, color=INK, linewidth=1.0, marker="o", markersize=11, markerfacecolor="none", zorder=5)
    panel.set_xlim(*_leak_limits([mark.gain for mark in marks], 100, -math.inf, 2.0))
    panel.set_ylim(*_leak_limits([mark.leak for mark in marks], scale, 0, 0.05 if scale == 1 else 1.5))
    _budgets(panel, marks, scale)


def pareto_front(gains: Sequence[float], leaks: Sequence[float]) -> list[int]:
    """Indices of the points that no other beats: none has more gain at no more leak, or less leak at no less.

    In rising order of gain.
    """
    order = sorted(range(len(gains)), key=lambda one: (-gains[one], leaks[one]))
    front: list[int] = []
    for one in order:
        if not front or leaks[one] < leaks[front[-1]]:
            front.append(one)
    return front[::-1]


def _channel(panel: Axes, channel: str, marks: Sequence[_Mark], scale: float) -> None:
    kind = known(channel)
    colour = kind.colour
    gains, leaks = [mark.gain for mark in marks], [mark.leak for mark in marks]
    x = [100 * gain.estimate for gain in gains]
    y = [scale * leak.estimate for leak in leaks]
    most = 100 if scale == 100 else math.inf
    across, along = _bars(gains, 100, -100, 100), _bars(leaks, scale, 0, most)
    panel.errorbar(x, y, xerr=across, yerr=along, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.55)
    panel.plot(x, y, color=colour, marker=kind.marker, markersize=6.5, linewidth=1.5, zorder=4)


def _budgets(panel: Axes, marks: Sequence[_Mark], scale: float) -> None:
    """The budgets beside their marks: one label for marks that lie together, a line a channel."""
    (left, right), (low, high) = panel.get_xlim(), panel.get_ylim()
    places = [(100 * mark.gain.estimate, scale * mark.leak.estimate) for mark in marks]
    shares = [((x - left) / (right - left), (y - low) / (high - low)) for x, y in places]
    for cluster in clusters(shares, _APART):
        channels = dict.fromkeys(marks[one].point.channel for one in cluster)
        x, y = (max(places[one][axis] for one in cluster) for axis in (0, 1))
        inward = shares[cluster[0]][0] > _FAR_RIGHT
        for line, channel in enumerate(channels):
            budgets = sorted(
                marks[one].point.epsilon for one in cluster if marks[one].point.channel == channel
            )
            panel.annotate(
                ", ".join("∞" if math.isinf(epsilon) else spelt(epsilon) for epsilon in budgets),
                (x, y),
                xytext=(-9 if inward else 9, 5 + 10 * line),
                textcoords="offset points",
                ha="right" if inward else "left",
                fontsize=8.5,
                zorder=6,
                color=known(channel).colour,
            )


def clusters(places: Sequence[tuple[float, float]], apart: float) -> list[list[int]]:
    """Indices of ``places`` by group: those that steps shorter than ``apart`` join are one."""
    left, found = list(range(len(places))), []
    while left:
        group = [left.pop(0)]
        for one in group:
            near = [other for other in left if math.dist(places[one], places[other]) < apart]
            group += near
            left = [other for other in left if other not in near]
        found.append(sorted(group))
    return found


def _leak_limits(
    intervals: Sequence[Interval], scale: float, least: float, margin: float
) -> tuple[float, float]:
    """Of an axis: all estimates, and their bars as far as these do not dwarf them."""
    low, high = (f(scale * one.estimate for one in intervals) for f in (min, max))
    reach = max(_WIDER * (high - low), margin)
    down = max(low - reach, min(scale * one.low for one in intervals), least)
    up = min(high + reach, max(scale * one.high for one in intervals))
    edge = 0.06 * max(up - down, margin)
    return down - edge, up + 1.6 * edge


def _theory(grid: Grid, outcomes: Sequence[Outcome], views: Sequence[str]) -> Figure:
    """Lower bounds from attacks against upper bounds from the ledger.

    Each mark is one run, each panel a view; a mark above the diagonal is an alarm.
    """
    columns = min(3, len(views))
    rows = math.ceil(len(views) / columns)
    figure, panels = _canvas(rows, columns, 3.1 * columns + 0.6, 2.9 * rows + 1.1)
    bounds = {view: _bounds(outcomes, view) for view in views}
    widest = 1.08 * max([e for e in grid.epsilons if math.isfinite(e)], default=1.0)
    highest = max([widest, *(1.06 * lower for found in bounds.values() for _, _, lower in found)])
    for number, panel in enumerate(panel for line in panels for panel in line):
        panel.set_visible(number < len(views))
        if number < len(views):
            _bounds_panel(panel, grid, bounds[views[number]], widest, highest)
            _heading(panel, views[number])
    for line in panels:
        line[0].set_ylabel("lower bound on record-level ε\n(95 % confidence)")
    keys: list[Line2D | Patch] = [
        _key(f"{c} channel", known(c).colour, known(c).marker, linestyle="") for c in grid.channels
    ]
    keys += [_key("lower = upper", INK, linewidth=1.2), Patch(color=FORBIDDEN, linewidth=0, label="ALARM")]
    words = "upper bound on record-level ε, from the ledger (∞: none claimed); a mark is a run"
    return _legend(figure, keys, 5, words)


def _bounds(outcomes: Sequence[Outcome], view: str) -> list[tuple[str, float, float]]:
    """Channel, upper and lower bound of each run that has the view."""
    found = [(one.trial.channel, finding) for one in outcomes if (finding := one.lower(view))]
    return [(channel, finding.epsilon_upper, finding.epsilon_lower) for channel, finding in found]


def _bounds_panel(
    panel: Axes, grid: Grid, bounds: Sequence[tuple[str, float, float]], widest: float, highest: float
) -> None:
    beyond = _NO_BOUND * widest
    panel.plot([0, widest], [0, widest], color=INK, linewidth=1.2)
    panel.fill_between([0, widest], [0, widest], highest, color=FORBIDDEN, linewidth=0, zorder=0)
    for place, channel in enumerate(grid.channels):
        here = [(upper, lower) for name, upper, lower in bounds if name == channel]
        shift = (place - (len(grid.channels) - 1) / 2) * 0.022 * widest
        panel.plot(
            [min(upper, beyond) + shift for upper, _ in here],
            [lower for _, lower in here],
            linestyle="",
            marker=known(channel).marker,
            color=known(channel).colour,
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.6,
        )
    panel.axvline((widest + beyond) / 2, color=MUTED, linewidth=0.8, linestyle=":")
    ticks = _ticks(grid.epsilons, widest)
    panel.set_xticks([*ticks, beyond], [*(f"{e:g}" for e in ticks), "∞"])
    panel.set(xlim=(-0.03 * widest, 1.06 * beyond), ylim=(-0.03 * highest, highest))


def _ticks(epsilons: Sequence[float], widest: float) -> list[float]:
    """The finite budgets, as far as their labels stand apart; the largest always."""
    kept: list[float] = []
    for epsilon in sorted((e for e in epsilons if math.isfinite(e)), reverse=True):
        if not kept or kept[-1] - epsilon >= _LEAST_GAP * widest:
            kept.append(epsilon)
    return kept
