"""The three pictures of a curve: what it gains, what it leaks for that, and how theory holds."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from audits.evidence.facts import Accuracies
from audits.evidence.intervals import Interval
from audits.tradeoff.curve import Curve, cloud_view
from audits.tradeoff.points import Point, ceiling_of, pareto_front, points_of
from audits.tradeoff.request import spelt
from audits.tradeoff.style import (
    CHANNEL_COLOURS,
    CHANNEL_MARKERS,
    INK,
    MUTED,
    STUDENT,
    TEACHER,
    canvas,
    rendered,
)

FIGURES = {
    "utility": "Accuracy against the record-level budget",
    "leak": "Leak against accuracy gained",
    "bounds": "Theory against experiment",
}
_BARS: dict[str, Any] = {"capsize": 3, "elinewidth": 1.2, "capthick": 1.2}


def draw_figures(curve: Curve) -> Mapping[str, Mapping[str, bytes]]:
    """Each figure of ``FIGURES`` that the finished cells allow, as ``{"svg": ..., "png": ...}``."""
    points = [point for point in points_of(curve) if point.gain is not None]
    if not points:
        return {}
    found = {"utility": _utility(curve, points)}
    if curve.views:
        found |= {"leak": _leak(curve, points), "bounds": _bounds(curve)}
    return found


def seeds_note(points: Sequence[Point]) -> str:
    """What the bars are, in words."""
    counts = sorted({point.seeds for point in points})
    if counts == [1]:
        return "one seed; bars: 95 % interval of its own test set or members"
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"means over {many} seeds; bars: 95 % interval (Student's t)"


def _utility(curve: Curve, points: Sequence[Point]) -> Mapping[str, bytes]:
    channels = [c for c in curve.request.channels if any(point.channel == c for point in points)]
    figure, panels = canvas(1, len(channels), 3.6 * len(channels) + 0.6, 4.3)
    places = {epsilon: place for place, epsilon in enumerate(sorted(curve.request.epsilons))}
    ceiling = ceiling_of(points)
    for panel, channel in zip(panels[0], channels, strict=True):
        here = [point for point in points if point.channel == channel]
        _lines(panel, here, ceiling)
        for figure_of, colour, marker, shift in (
            (lambda a: a.teacher, TEACHER, "o", -0.06),
            (lambda a: a.students, STUDENT, "D", 0.06),
        ):
            _series(panel, here, figure_of, places, (colour, marker, shift))
        panel.set_title(f"{channel} channel", loc="left")
        _epsilon_axis(panel, places)
    panels[0][0].set_ylabel("accuracy on the global test set (%)")
    _share_y(panels[0])
    figure.supxlabel(_epsilon_label(curve), fontsize=9.5)
    handles = [
        _handle(TEACHER, "o", "teacher after the run"),
        _handle(STUDENT, "D", "students, mean over devices"),
        Line2D([], [], color=INK, linestyle="--", linewidth=1.3, label="control: zero devices"),
    ]
    if ceiling:
        words = f"ceiling: no DP ({ceiling.channel}, ε = ∞)"
        handles.append(Line2D([], [], color=MUTED, linestyle=":", linewidth=1.6, label=words))
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    panels[0][-1].annotate(
        seeds_note(points), (1, -0.2), xycoords="axes fraction", ha="right", va="top", fontsize=8, color=MUTED
    )
    return rendered(figure)


def _lines(panel: Axes, here: Sequence[Point], ceiling: Point | None) -> None:
    """Control and ceilings across the panel."""
    control = [point.accuracy(lambda a: a.control) for point in here]
    level = sum(one.estimate for one in control if one) / max(1, len(control))
    panel.axhline(100 * level, color=INK, linestyle="--", linewidth=1.3, zorder=1)
    if ceiling is None:
        return
    for figure_of, colour in ((lambda a: a.teacher, TEACHER), (lambda a: a.students, STUDENT)):
        top = ceiling.accuracy(figure_of)
        if top:
            panel.axhline(100 * top.estimate, color=colour, linestyle=":", linewidth=1.6, zorder=1)


def _series(
    panel: Axes,
    here: Sequence[Point],
    figure_of: Callable[[Accuracies], Interval],
    places: Mapping[float, int],
    style: tuple[str, str, float],
) -> None:
    colour, marker, shift = style
    found = [(places[point.epsilon] + shift, point.accuracy(figure_of)) for point in here]
    shown = [(place, one) for place, one in found if one]
    x = [place for place, _ in shown]
    values = [one for _, one in shown]
    panel.errorbar(
        x,
        [100 * one.estimate for one in values],
        yerr=_reach(values, 100, 0, 100),
        color=colour,
        marker=marker,
        markersize=5.5,
        linewidth=1.6,
        **_BARS,
    )


def _reach(values: Sequence[Interval], scale: float, least: float, most: float) -> list[list[float]]:
    """Lengths of the bars down and up, cut where no value can lie."""
    down = [scale * one.estimate - max(least, scale * one.low) for one in values]
    up = [min(most, scale * one.high) - scale * one.estimate for one in values]
    return [[max(0.0, x) for x in down], [max(0.0, x) for x in up]]


def _epsilon_axis(panel: Axes, places: Mapping[float, int]) -> None:
    panel.set_xticks(list(places.values()), ["∞" if math.isinf(e) else f"{e:g}" for e in places])
    panel.set_xlim(-0.4, len(places) - 0.6)


def _epsilon_label(curve: Curve) -> str:
    delta = next(row.facts.config.privacy.delta for row in curve.done if row.facts)
    return f"record-level budget ε of the whole run, at δ = {delta:g} (∞: no DP; axis not to scale)"


def _share_y(panels: Sequence[Axes]) -> None:
    low = min(panel.get_ylim()[0] for panel in panels)
    high = max(panel.get_ylim()[1] for panel in panels)
    for number, panel in enumerate(panels):
        panel.set_ylim(max(0, low), min(101, high))
        if number:
            panel.tick_params(labelleft=False)


def _handle(colour: str, marker: str, label: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, linewidth=1.6, markersize=5.5, label=label)


def _leak(curve: Curve, points: Sequence[Point]) -> Mapping[str, bytes]:
    """Rows: what leaks; columns: what the cloud sees, and a stolen student."""
    columns = [("what the cloud sees", cloud_view), ("whoever holds a student", lambda _: "student")]
    figure, panels = canvas(2, 2, 9.6, 7.6)
    for column, (title, view_of) in enumerate(columns):
        for row, measure in enumerate((Point.lower, Point.leak_rate)):
            panel = panels[row][column]
            _trade(panel, points, partial(_leak_of, measure, view_of), 100 if row else 1)
            if row == 0:
                panel.set_title(f"View: {title}", loc="left")
            else:
                panel.axhline(1, color=MUTED, linestyle=":", linewidth=1.2)
                panel.annotate(
                    "chance",
                    (1, 1),
                    xycoords=("axes fraction", "data"),
                    fontsize=8,
                    color=MUTED,
                    ha="right",
                    va="bottom",
                )
                panel.set_xlabel(
                    "accuracy gained by the teacher\nover the zero-device control (percentage points)"
                )
    panels[0][0].set_ylabel("leak: lower bound on\nrecord-level ε (95 % confidence)")
    panels[1][0].set_ylabel("leak: true-positive rate\nat 1 % false positives (%)")
    handles = [
        _handle(CHANNEL_COLOURS[c], CHANNEL_MARKERS[c], f"{c} channel") for c in curve.request.channels
    ]
    ring = Line2D(
        [],
        [],
        color=INK,
        marker="o",
        markersize=11,
        markerfacecolor="none",
        linewidth=1.0,
        linestyle="-",
        label="Pareto front: least leak for its gain",
    )
    figure.legend(handles=[*handles, ring], loc="outside upper center", ncols=4, frameon=False)
    note = f"Numbers at the marks: record-level budget ε. {seeds_note(points)}."
    figure.supxlabel(note, fontsize=8, color=MUTED)
    return rendered(figure)


def _leak_of(
    measure: Callable[[Point, str], Interval | None], view_of: Callable[[str], str], point: Point
) -> Interval | None:
    return measure(point, view_of(point.channel))


def _trade(
    panel: Axes, points: Sequence[Point], leak_of: Callable[[Point], Interval | None], scale: float
) -> None:
    """One panel: a line a channel, a mark a budget, and the front through the marks that no other beats."""
    shown = [(p, p.gain, leak_of(p)) for p in points]
    known = [(p, gain, leak) for p, gain, leak in shown if gain and leak]
    for channel in dict.fromkeys(p.channel for p, _, _ in known):
        here = [(p, gain, leak) for p, gain, leak in known if p.channel == channel]
        gains, leaks = [gain for _, gain, _ in here], [leak for _, _, leak in here]
        panel.errorbar(
            [100 * gain.estimate for gain in gains],
            [scale * leak.estimate for leak in leaks],
            xerr=_reach(gains, 100, -100, 100),
            yerr=_reach(leaks, scale, 0, 100 if scale == 100 else math.inf),
            color=CHANNEL_COLOURS[channel],
            marker=CHANNEL_MARKERS[channel],
            markersize=6,
            linewidth=1.4,
            alpha=0.9,
            elinewidth=0.8,
            capsize=2,
        )
        for p, gain, leak in here:
            panel.annotate(
                "∞" if math.isinf(p.epsilon) else spelt(p.epsilon),
                (100 * gain.estimate, scale * leak.estimate),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8.5,
                color=CHANNEL_COLOURS[channel],
            )
    front = pareto_front([gain.estimate for _, gain, _ in known], [leak.estimate for _, _, leak in known])
    x = [100 * known[one][1].estimate for one in front]
    y = [scale * known[one][2].estimate for one in front]
    panel.plot(x, y, color=INK, linewidth=1.0, marker="o", markersize=11, markerfacecolor="none", zorder=4)
    panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))


def _bounds(curve: Curve) -> Mapping[str, bytes]:
    """A panel a view: each mark is one run."""
    views = curve.views
    columns = min(3, len(views))
    rows = math.ceil(len(views) / columns)
    figure, panels = canvas(rows, columns, 3.3 * columns + 0.5, 3.2 * rows + 1.1)
    finite = [e for e in curve.request.epsilons if math.isfinite(e)]
    most = max(finite, default=1.0) * 1.08
    flat = [panel for line in panels for panel in line]
    for number, panel in enumerate(flat):
        if number >= len(views):
            panel.set_visible(False)
            continue
        _theory(panel, curve, views[number], most)
    for line in panels:
        line[0].set_ylabel("lower bound on record-level ε\n(95 % confidence)")
    figure.supxlabel("upper bound on record-level ε, from the ledger (∞: no DP)", fontsize=9.5)
    handles = [
        Line2D(
            [], [], color=CHANNEL_COLOURS[c], marker=CHANNEL_MARKERS[c], linestyle="", label=f"{c} channel"
        )
        for c in curve.request.channels
    ]
    handles.append(Line2D([], [], color=INK, linewidth=1.2, label="lower = upper: above it is an ALARM"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return rendered(figure)


def _theory(panel: Axes, curve: Curve, view: str, most: float) -> None:
    beyond = 1.14 * most
    panel.plot([0, most], [0, most], color=INK, linewidth=1.2)
    panel.fill_between([0, most], [0, most], [most, most], color="#D55E00", alpha=0.07, linewidth=0)
    highest = most
    for place, channel in enumerate(curve.request.channels):
        found = [(row.lower(view), row) for row in curve.done if row.cell.channel == channel]
        pairs = [(finding.epsilon_upper, finding.epsilon_lower) for finding, _ in found if finding]
        if pairs:
            shift = (place - (len(curve.request.channels) - 1) / 2) * 0.018 * most
            x = [min(upper, beyond) + shift for upper, _ in pairs]
            y = [lower for _, lower in pairs]
            highest = max([highest, *(1.05 * lower for lower in y)])
            panel.plot(
                x,
                y,
                linestyle="",
                marker=CHANNEL_MARKERS[channel],
                color=CHANNEL_COLOURS[channel],
                markersize=5.5,
                alpha=0.85,
                markeredgecolor="white",
                markeredgewidth=0.5,
            )
    panel.axvline((most + beyond) / 2, color=MUTED, linewidth=0.8, linestyle=":")
    finite = sorted(e for e in curve.request.epsilons if math.isfinite(e))
    panel.set_xticks([*finite, beyond], [*(f"{e:g}" for e in finite), "∞"])
    panel.set(xlim=(-0.03 * most, 1.06 * beyond), ylim=(-0.03 * most, highest))
    panel.set_title(view, loc="left")
