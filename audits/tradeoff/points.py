"""The curve's points: each channel and epsilon, over its seeds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from audits.estimators.rates import Interval, mean_of
from audits.evidence.facts import Accuracies
from audits.tradeoff.curve import Curve, Row
from privkd.privacy.events import Unit


@dataclass(frozen=True)
class Point:
    """One channel and epsilon; ``rows`` are its finished seeds, at least one.

    Intervals are Student's over seeds. A single seed has that of its test set, or of its members.
    """

    channel: str
    epsilon: float
    rows: tuple[Row, ...]

    @property
    def seeds(self) -> int:
        """How many runs the point rests on."""
        return len(self.rows)

    @property
    def upper(self) -> float:
        """The largest upper bound on record epsilon among the runs."""
        return max(row.facts.spent(Unit.RECORD) for row in self.rows if row.facts)

    def accuracy(self, figure: Callable[[Accuracies], Interval | None]) -> Interval | None:
        """Mean of one accuracy."""
        found = self._measured(figure)
        return found.within(0, 1) if found else None

    @property
    def gain(self) -> Interval | None:
        """Accuracy that the teacher gained over its zero-device control."""
        return self._measured(lambda measured: measured.gain)

    def _measured(self, figure: Callable[[Accuracies], Interval | None]) -> Interval | None:
        """Mean of one figure; a difference is so paired over seeds."""
        measured = [row.facts.accuracies for row in self.rows if row.facts]
        found = [figure(one) for one in measured if one]
        return _over_seeds([interval for interval in found if interval])

    def leak_rate(self, view: str) -> Interval | None:
        """TPR at 1 % FPR."""
        rates = [row.leak_rate(view) for row in self.rows]
        found = _over_seeds([Interval(r.estimate, r.low, r.high, r.members) for r in rates if r])
        return found.within(0, 1) if found else None

    def lower(self, view: str) -> Interval | None:
        """Mean of the lower bounds on record epsilon, never below zero."""
        found = [row.lower(view) for row in self.rows]
        values = [finding.epsilon_lower for finding in found if finding]
        if not values:
            return None
        if len(values) == 1:
            return Interval(values[0], values[0], values[0], 1)
        return mean_of(values).within(0, math.inf)


def points_of(curve: Curve) -> tuple[Point, ...]:
    """The points that have a finished run, channel by channel, epsilon rising."""
    found = []
    for channel in curve.request.channels:
        for epsilon in sorted(curve.request.epsilons):
            here = (channel, epsilon)
            rows = tuple(row for row in curve.done if (row.cell.channel, row.cell.epsilon) == here)
            if rows:
                found.append(Point(channel, epsilon, rows))
    return tuple(found)


def ceiling_of(points: Sequence[Point]) -> Point | None:
    """The point without DP: over the plain channel if there is one, as the others may still add noise."""
    open_ones = [point for point in points if math.isinf(point.epsilon)]
    plain = [point for point in open_ones if point.channel == "plain"]
    return next(iter([*plain, *open_ones]), None)


def pareto_front(gains: Sequence[float], leaks: Sequence[float]) -> list[int]:
    """Indices of the points that no other beats: none has more gain at no more leak, or less leak at no less.

    In rising order of gain.
    """
    order = sorted(range(len(gains)), key=lambda one: (-gains[one], leaks[one]))
    front: list[int] = []
    least = math.inf
    for one in order:
        if leaks[one] < least:
            front.append(one)
            least = leaks[one]
    return front[::-1]


def seeds_note(points: Sequence[Point], mark: str = "bars") -> str:
    """What a figure rests on, and what its ``mark`` (bars, or brackets) is."""
    counts = sorted({point.seeds for point in points})
    if counts == [1]:
        return f"one seed; {mark}: 95 % interval of its own test set or members"
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"means over {many} seeds; {mark}: 95 % interval over seeds (Student's t)"


def _over_seeds(intervals: Sequence[Interval]) -> Interval | None:
    if not intervals:
        return None
    return intervals[0] if len(intervals) == 1 else mean_of([one.estimate for one in intervals])
