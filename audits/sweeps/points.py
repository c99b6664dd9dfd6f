"""What the trials came to, and the points that they make: each channel and epsilon, over its seeds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from audits.estimators import TprAtFpr
from audits.estimators.rates import Interval, mean_of
from audits.sweeps.grid import Grid, Trial
from privkd.channels.registry import known
from privkd.privacy.events import Unit

if TYPE_CHECKING:
    from audits.evidence import Accuracies, RunRecord
    from audits.findings import Finding, ReconstructionFinding

_LEAK_FPR = 0.01
_LEAD = {"student": "lira-online", "teacher": "lira-online", "gradient": "canaries-many-trials"}
"""The attack whose rates stand for a view; elsewhere distillation LiRA. Fixed beforehand: the best of many
rates would need an interval of its own."""


@dataclass(frozen=True)
class Outcome:
    """What became of one trial: ``facts`` of its run where it is done, else why it is not."""

    trial: Trial
    facts: "RunRecord | None"
    reason: str

    def lead(self, view: str) -> "Finding | None":
        """The finding whose rates stand for ``view``, if it was audited."""
        membership = self.facts.membership if self.facts else None
        found = membership.of(view) if membership else ()
        named = _LEAD.get(view, "distillation-lira")
        return next((finding for finding in found if finding.attack == named), found[0] if found else None)

    def leak_rate(self, view: str) -> TprAtFpr | None:
        """TPR at 1 % FPR on ``view``; ``None`` where it was not measured or refused."""
        lead = self.lead(view)
        return lead.rate(_LEAK_FPR) if lead else None

    def rebuilt(self, view: str) -> "ReconstructionFinding | None":
        """The reconstruction attack on ``view``, the first if there are several."""
        found = self.facts.reconstruction.findings if self.facts and self.facts.reconstruction else ()
        return next((one for one in found if one.view == view), None)

    def lower(self, view: str) -> "Finding | None":
        """The finding with the highest lower bound on ``view``."""
        membership = self.facts.membership if self.facts else None
        return membership.strongest(view) if membership and view in membership.views else None


@dataclass(frozen=True)
class Point:
    """One channel and epsilon, over its finished seeds, at least one.

    Intervals are Student's over seeds. A single seed has that of its test set, or of its members.
    """

    channel: str
    epsilon: float
    outcomes: tuple[Outcome, ...]

    @property
    def seeds(self) -> int:
        """How many runs the point rests on."""
        return len(self.outcomes)

    @property
    def upper(self) -> float:
        """The largest upper bound on record epsilon among the runs."""
        return max(one.facts.spent(Unit.RECORD) for one in self.outcomes if one.facts)

    def accuracy(self, figure: "Callable[[Accuracies], Interval | None]") -> Interval | None:
        """Mean of one accuracy."""
        found = self._measured(figure)
        return found.within(0, 1) if found else None

    @property
    def gain(self) -> Interval | None:
        """Accuracy that the teacher gained over its zero-device control."""
        return self._measured(lambda measured: measured.gain)

    def _measured(self, figure: "Callable[[Accuracies], Interval | None]") -> Interval | None:
        """Mean of one figure; a difference is so paired over seeds."""
        measured = [one.facts.accuracies for one in self.outcomes if one.facts]
        return _over_seeds([interval for one in measured if one and (interval := figure(one))])

    def leak_rate(self, view: str) -> Interval | None:
        """TPR at 1 % FPR."""
        rates = [rate for one in self.outcomes if (rate := one.leak_rate(view))]
        found = _over_seeds([Interval(rate.estimate, rate.low, rate.high, rate.members) for rate in rates])
        return found.within(0, 1) if found else None

    def lower(self, view: str) -> Interval | None:
        """Mean of the lower bounds on record epsilon, never below zero."""
        bounds = [finding.epsilon_lower for one in self.outcomes if (finding := one.lower(view))]
        found = _over_seeds([Interval(bound, bound, bound, 1) for bound in bounds])
        return found.within(0, math.inf) if found else None


def points_of(grid: Grid, outcomes: Sequence[Outcome]) -> tuple[Point, ...]:
    """The points that have a finished run, channel by channel, epsilon rising."""
    done = [one for one in outcomes if one.facts]
    points = [
        Point(
            channel,
            epsilon,
            tuple(o for o in done if (o.trial.channel, o.trial.epsilon) == (channel, epsilon)),
        )
        for channel in grid.channels
        for epsilon in sorted(grid.epsilons)
    ]
    return tuple(point for point in points if point.outcomes)


def audited_views(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """Every view on which membership was guessed in some trial, in the order of their first trial."""
    found = (one.facts.membership for one in outcomes if one.facts)
    return tuple(dict.fromkeys(view for facts in found if facts for view in facts.views))


def rebuilt_views(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """Every view from which a reconstruction was tried, likewise."""
    found = (one.facts.reconstruction for one in outcomes if one.facts)
    return tuple(dict.fromkeys(one.view for facts in found if facts for one in facts.findings))


def cloud_view(channel: str) -> str:
    """What the cloud sees over a channel."""
    return known(channel).views[0]


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
