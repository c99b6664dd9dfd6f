"""Figure 1: accuracy against the record-level budget, a panel a channel."""

import math
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from audits.estimators.rates import Interval
from audits.evidence.facts import Accuracies
from audits.tradeoff.curve import Curve
from audits.tradeoff.points import Point, ceiling_of, seeds_note
from audits.tradeoff.style import INK, MUTED, STUDENT, TEACHER, bars, canvas, handle, heading, rendered

_BEYOND = 12.0
"""Percentage points that the axis reaches beyond the estimates at most: a wide bar runs out of the panel."""


def draw_utility(curve: Curve, points: Sequence[Point]) -> Mapping[str, bytes]:
    """The figure; ``points`` have accuracies."""
    channels = [c for c in curve.request.channels if any(point.channel == c for point in points)]
    figure, panels = canvas(1, len(channels), 3.4 * len(channels) + 0.6, 4.2)
    places = {epsilon: place for place, epsilon in enumerate(sorted(curve.request.epsilons))}
    ceiling = ceiling_of(points)
    for number, (panel, channel) in enumerate(zip(panels[0], channels, strict=True)):
        here = [point for point in points if point.channel == channel]
        _lines(panel, here, ceiling)
        _series(panel, here, _teacher, places, (TEACHER, "o", -0.06))
        _series(panel, here, _students, places, (STUDENT, "D", 0.06))
        heading(panel, f"{channel} channel")
        panel.set_xticks(list(places.values()), ["∞" if math.isinf(e) else f"{e:g}" for e in places])
        panel.set(xlim=(-0.4, len(places) - 0.6), ylim=_limits(points))
        panel.tick_params(labelleft=number == 0)
    panels[0][0].set_ylabel("accuracy on the global test set (%)")
    delta = next(row.facts.config.privacy.delta for row in curve.done if row.facts)
    words = f"record-level budget ε of the whole run, at δ = {delta:g} (∞: no DP; axis not to scale)"
    figure.supxlabel(f"{words}\n{seeds_note(points)}", fontsize=9)
    figure.legend(handles=_legend(ceiling), loc="outside upper center", ncols=4, frameon=False)
    return rendered(figure)


def _teacher(measured: Accuracies) -> Interval:
    return measured.teacher


def _students(measured: Accuracies) -> Interval | None:
    return measured.students


def _control(measured: Accuracies) -> Interval:
    return measured.control


def _legend(ceiling: Point | None) -> list[Line2D]:
    handles = [
        handle(TEACHER, "o", "teacher after the run"),
        handle(STUDENT, "D", "students, mean over devices"),
        Line2D([], [], color=INK, linestyle="--", linewidth=1.3, label="control: teacher, zero devices"),
    ]
    if ceiling:
        words = f"ceilings: no DP ({ceiling.channel} channel)"
        handles.append(Line2D([], [], color=MUTED, linestyle=":", linewidth=1.6, label=words))
    return handles


def _lines(panel: Axes, here: Sequence[Point], ceiling: Point | None) -> None:
    """Control and ceilings across the panel."""
    controls = [100 * one.estimate for point in here if (one := point.accuracy(_control))]
    panel.axhline(sum(controls) / len(controls), color=INK, linestyle="--", linewidth=1.3, zorder=1)
    for figure_of, colour in ((_teacher, TEACHER), (_students, STUDENT)):
        top = ceiling.accuracy(figure_of) if ceiling else None
        if top:
            panel.axhline(100 * top.estimate, color=colour, linestyle=":", linewidth=1.6, zorder=1)


def _series(
    panel: Axes,
    here: Sequence[Point],
    figure_of: Callable[[Accuracies], Interval | None],
    places: Mapping[float, int],
    style: tuple[str, str, float],
) -> None:
    colour, marker, shift = style
    found = [(places[point.epsilon] + shift, point.accuracy(figure_of)) for point in here]
    shown = [(place, one) for place, one in found if one]
    values = [one for _, one in shown]
    panel.errorbar(
        [place for place, _ in shown],
        [100 * one.estimate for one in values],
        yerr=bars(values, 100, 0, 100),
        color=colour,
        marker=marker,
        markersize=5.5,
        linewidth=1.6,
        elinewidth=1.1,
        capsize=3,
    )


def _limits(points: Sequence[Point]) -> tuple[float, float]:
    """Of the vertical axis, the same for all panels."""
    found = [one for point in points for of in (_teacher, _students, _control) if (one := point.accuracy(of))]
    low, high = (f(100 * one.estimate for one in found) for f in (min, max))
    down = min(100 * one.low for one in found)
    up = max(100 * one.high for one in found)
    return max(0.0, low - _BEYOND, down - 2), min(101.0, high + _BEYOND, up + 2)
