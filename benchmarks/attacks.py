"""Membership scores against per-sample loops, side by side: ``python benchmarks/attacks.py``.

Every row is the median of several runs of both, on the same inputs, whose results are checked to agree. The
loops are those that the papers' algorithms describe: one candidate after another, vectorised over models and
population.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# A script's own folder comes first on the path, where this file would pass for the package ``attacks``.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from attacks.membership.lira import lira_online  # noqa: E402
from attacks.membership.rmia import dominated_share, probability, rmia_online  # noqa: E402
from attacks.membership.shadows import Population, Shadows  # noqa: E402

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """One line of the table: median seconds of the loop and of the product, and the ratio wanted, if any."""

    name: str
    loop: float
    product: float
    goal: float | None

    def __str__(self) -> str:
        ratio = self.loop / self.product
        times = f"{1e3 * self.loop:12.1f} {1e3 * self.product:12.3f}"
        line = f"{self.name:<58}{times} {ratio:8.0f}x"
        if self.goal is None:
            return line
        return f"{line} {self.goal:6.0f}x  {'met' if ratio >= self.goal else 'MISSED'}"


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of ``repeats`` runs, after one that warms the caches."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def shadows_of(models: int, samples: int, rng: np.random.Generator) -> tuple[Floats, Shadows]:
    """Signals of a target and of shadow models, each trained on half of the samples."""
    member = np.argsort(rng.random((models, samples)), axis=0) < models // 2
    return rng.normal(size=samples), Shadows(rng.normal(size=(models, samples)) + member, member)


def lira_loop(target: Floats, shadows: Shadows) -> Floats:
    """LiRA, one sample after another."""
    scores = np.empty(len(target))
    for i, phi in enumerate(target):
        inside = shadows.signals[shadows.member[:, i], i]
        outside = shadows.signals[~shadows.member[:, i], i]
        mean_in, var_in = inside.mean(), inside.var(ddof=1)
        mean_out, var_out = outside.mean(), outside.var(ddof=1)
        scores[i] = -0.5 * (np.log(var_in) + (phi - mean_in) ** 2 / var_in) + 0.5 * (
            np.log(var_out) + (phi - mean_out) ** 2 / var_out
        )
    return scores


def rmia_loop(target: Floats, shadows: Shadows, population: Population) -> Floats:
    """RMIA's Algorithm 1, one sample after another; the population's ratios inside, as it is written."""
    scores = np.empty(len(target))
    for i, phi in enumerate(target):
        given = probability(shadows.signals[:, i])
        inside, outside = given[shadows.member[:, i]], given[~shadows.member[:, i]]
        ratio = probability(phi) / ((inside.mean() + outside.mean()) / 2)
        others = probability(population.target) / probability(population.references).mean(axis=0)
        scores[i] = (ratio / others >= 1).mean()
    return scores


def dominated_loop(ratios: Floats, population_ratios: Floats) -> Floats:
    """RMIA's comparison alone, one sample after another."""
    return np.array([(ratio / population_ratios >= 1).mean() for ratio in ratios])


def lira_row(samples: int, models: int, repeats: int) -> Row:
    """LiRA of a matrix models x samples."""
    target, shadows = shadows_of(models, samples, np.random.default_rng(0))
    np.testing.assert_allclose(
        lira_loop(target, shadows), lira_online(target, shadows, variance="sample"), atol=1e-8
    )
    return Row(
        f"LiRA online, {samples:,} samples x {models} models",
        median_seconds(lambda: lira_loop(target, shadows), repeats),
        median_seconds(lambda: lira_online(target, shadows, variance="sample"), 10 * repeats),
        goal=50,
    )


def rmia_rows(samples: int, size: int, models: int, repeats: int) -> list[Row]:
    """RMIA of samples x population: whole, and the comparison of given ratios alone."""
    rng = np.random.default_rng(1)
    target, shadows = shadows_of(models, samples, rng)
    population = Population(rng.normal(size=size), rng.normal(size=(models, size)))
    few = slice(0, max(1, samples // 20))
    part = Shadows(shadows.signals[:, few], shadows.member[:, few])
    np.testing.assert_array_equal(
        rmia_loop(target[few], part, population), rmia_online(target, shadows, population)[few]
    )
    # A twentieth of the samples is looped over: their cost does not depend on one another.
    scale = samples / len(target[few])
    ratios, others = rng.gamma(3, size=samples), rng.gamma(3, size=size)
    np.testing.assert_allclose(dominated_loop(ratios, others), dominated_share(ratios, others, 1.0))
    label = f"{samples:,} samples x {size:,} population"
    return [
        Row(
            f"RMIA online, {label}, {models} models",
            scale * median_seconds(lambda: rmia_loop(target[few], part, population), repeats),
            median_seconds(lambda: rmia_online(target, shadows, population), 10 * repeats),
            goal=500,
        ),
        Row(
            f"  its comparison alone, {label}",
            median_seconds(lambda: dominated_loop(ratios, others), repeats),
            median_seconds(lambda: dominated_share(ratios, others, 1.0), 10 * repeats),
            goal=None,
        ),
    ]


def rmia_peak_bytes(samples: int, size: int, models: int) -> int:
    """Peak resident memory of this process after RMIA of ``samples`` x ``size``, imports and inputs
    included."""
    rng = np.random.default_rng(2)
    target, shadows = shadows_of(models, samples, rng)
    population = Population(rng.normal(size=size), rng.normal(size=(models, size)))
    rmia_online(target, shadows, population)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    # First, for the peak is that of the whole process so far.
    peak = rmia_peak_bytes(50_000, 50_000, models=64)
    rows = [lira_row(10_000, 64, repeats), *rmia_rows(10_000, 25_000, 4, repeats)]
    print(f"{'':<58}{'loop ms':>12} {'ours ms':>12} {'ratio':>9} {'goal':>7}")
    for row in rows:
        print(row)
    verdict = "met" if peak < 1e9 else "MISSED"
    size = f"{peak / 1e6:,.0f} MB"
    print(f"RMIA, 50,000 x 50,000, 64 models: peak of the whole process {size}, goal 1,000 MB  {verdict}")


if __name__ == "__main__":
    main()
