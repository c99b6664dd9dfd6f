"""Lower bounds on ideal canaries: independent scores of a Gaussian mechanism, by estimator and rule.

``python benchmarks/audit_bounds.py`` prints, as Markdown, the mean bound of each over simulated audits at
95 %, and in how many of them it lies above the truth.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# A script's own folder comes first on the path, where ``attacks.py`` would pass for the package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from audits.estimators import (  # noqa: E402
    BandGuesses,
    BandThreshold,
    BonferroniGuesses,
    MultiSplitThreshold,
    SplitThreshold,
    clopper_pearson,
    epsilon_lower_bound,
    epsilon_lower_bound_one_run,
    f_dp_one_run,
    gaussian,
    gaussian_pair,
    mu_of_epsilon,
    one_run,
)
from privkd.errors import InputError  # noqa: E402

DELTA = 1e-5
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def by_guesses(estimator: object, rule: object) -> Callable[[Floats, Bools, int], float]:
    def bound(scores: Floats, inside: Bools, seed: int) -> float:
        m = len(scores)
        counts = tuple(sorted({max(2, m // 100), max(2, m // 20), max(2, m // 4)}))
        chosen = rule or BonferroniGuesses(counts)
        return epsilon_lower_bound_one_run(scores, inside, rule=chosen, estimator=estimator, delta=DELTA)  # type: ignore[arg-type]

    return bound


def by_threshold(estimator: object, rule: Callable[[int], object]) -> Callable[[Floats, Bools, int], float]:
    def bound(scores: Floats, inside: Bools, seed: int) -> float:
        sides = scores[inside], scores[~inside]
        return epsilon_lower_bound(*sides, rule=rule(seed), estimator=estimator, delta=DELTA)  # type: ignore[arg-type]

    return bound


def by_pair(scores: Floats, inside: Bools, seed: int) -> float:
    try:
        return gaussian_pair(scores[inside], scores[~inside], delta=DELTA).epsilon
    except InputError:
        return 0.0


BOUNDS = {
    "one run, three numbers of guesses": by_guesses(one_run, None),
    "**one run, band of guesses**": by_guesses(one_run, BandGuesses()),
    "Clopper-Pearson, split of a tenth": by_threshold(clopper_pearson, SplitThreshold),
    "Clopper-Pearson, 25 splits in halves": by_threshold(
        clopper_pearson, lambda seed: MultiSplitThreshold(25, seed, 0.5)
    ),
    "Clopper-Pearson, band of thresholds": by_threshold(clopper_pearson, lambda seed: BandThreshold()),
    "f-DP in one run": by_guesses(f_dp_one_run, None),
    "Gaussian, split of a tenth": by_threshold(gaussian, SplitThreshold),
    "Gaussian, band of thresholds": by_threshold(gaussian, lambda seed: BandThreshold()),
    "**Gaussian pair**": by_pair,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--canaries", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--audits", type=int, default=200)
    asked = parser.parse_args()
    print("| canaries | estimator and rule |", *(f"epsilon {epsilon:g} |" for epsilon in asked.epsilons))
    print("| --- | --- |", "--- |" * len(asked.epsilons))
    for canaries in asked.canaries:
        for name, bound in BOUNDS.items():
            cells = []
            for epsilon in asked.epsilons:
                found = []
                for seed in range(asked.audits):
                    rng = np.random.default_rng(seed)
                    inside = rng.random(canaries) < 0.5
                    scores = rng.normal(size=canaries) + mu_of_epsilon(epsilon, DELTA) * inside
                    found.append(bound(scores, inside, seed))
                above = np.mean(np.array(found) > epsilon)
                cells.append(f"{np.mean(found):.2f} ({100 * above:.1f} %) |")
            print(f"| {canaries:,} | {name} |", *cells, flush=True)


if __name__ == "__main__":
    main()
