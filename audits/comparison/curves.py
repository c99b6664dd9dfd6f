"""Two curves: at each point that both have, the change paired over the seeds that both have."""

from dataclasses import dataclass

from audits.comparison.runs import Differing, RunComparison, compare_runs
from audits.estimators.rates import Interval, mean_of
from audits.sweeps.sweep import Sweep
from privkd.errors import InputError


@dataclass(frozen=True)
class PointComparison:
    """One channel and epsilon.

    Attributes:
        seeds: common to both.
        teacher: ``second - first`` of the teacher's accuracy, paired over seeds; a single seed has the
            interval of its test set.
        students: likewise; ``None`` where it was not measured.
        gain: likewise, of what was gained over zero devices.
        runs: the pairs themselves.
    """

    channel: str
    epsilon: float
    seeds: int
    teacher: Interval
    students: Interval | None
    gain: Interval
    runs: tuple[RunComparison, ...]


@dataclass(frozen=True)
class CurveComparison:
    """Two curves, at the points that both have."""

    first: Sweep
    second: Sweep
    settings: tuple[Differing, ...]
    points: tuple[PointComparison, ...]


def compare_curves(first: Sweep, second: Sweep) -> CurveComparison:
    """Both curves side by side.

    Raises:
        InputError: they are one, have no finished run in common, or were measured on different data.
    """
    if first.path.resolve() == second.path.resolve():
        raise InputError(f"both are {first.path}: name two curves")
    one, other = first.grid.model_dump(mode="json"), second.grid.model_dump(mode="json")
    settings = [Differing(name, str(one[name]), str(other[name])) for name in one if one[name] != other[name]]
    points = _points(first, second)
    if not points:
        raise InputError(
            f"{first.path} and {second.path} have no finished run of one channel, epsilon and seed"
        )
    return CurveComparison(first, second, tuple(settings), points)


def _points(first: Sweep, second: Sweep) -> tuple[PointComparison, ...]:
    theirs = {(row.trial.channel, row.trial.epsilon, row.trial.seed): row.facts for row in second.done}
    pairs: dict[tuple[str, float], list[RunComparison]] = {}
    for row in first.done:
        other = theirs.get((row.trial.channel, row.trial.epsilon, row.trial.seed))
        if row.facts and other:
            found = compare_runs(row.facts, other)
            if not found.same_test:
                raise InputError(
                    f"{first.path} and {second.path} were measured on different test records at seed "
                    f"{row.trial.seed}, so nothing can be paired: compare curves of equal data settings"
                )
            pairs.setdefault((row.trial.channel, row.trial.epsilon), []).append(found)
    return tuple(_point(channel, epsilon, runs) for (channel, epsilon), runs in pairs.items())


def _point(channel: str, epsilon: float, runs: list[RunComparison]) -> PointComparison:
    changes = [{shares.name: shares.change for shares in run.accuracies} for run in runs]
    return PointComparison(
        channel,
        epsilon,
        len(runs),
        teacher=_mean([one["teacher after the run"] for one in changes]),
        students=_paired([one["students, mean"] for one in changes if "students, mean" in one]),
        gain=_mean([run.gain.change for run in runs]),
        runs=tuple(runs),
    )


def _paired(changes: list[Interval]) -> Interval | None:
    return _mean(changes) if changes else None


def _mean(changes: list[Interval]) -> Interval:
    return changes[0] if len(changes) == 1 else mean_of([change.estimate for change in changes])
