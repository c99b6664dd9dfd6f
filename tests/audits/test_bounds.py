"""Bounds over all thresholds and all numbers of guesses at once, the Gaussian pair, and what describes only.

The known answers are facts about the methods, as JAX-Privacy's tests of its auditing state them
(google-deepmind/jax_privacy, tests/auditing_test.py); the tests are our own.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from audits.estimators import (
    BandGuesses,
    BandThreshold,
    BonferroniGuesses,
    BonferroniThreshold,
    FixedThreshold,
    MultiSplitThreshold,
    SplitThreshold,
    auc,
    balanced_accuracy,
    bootstrap,
    clopper_pearson,
    epsilon_lower_bound,
    epsilon_lower_bound_one_run,
    epsilon_of_counts,
    epsilon_of_mu,
    f_dp_one_run,
    gaussian,
    gaussian_pair,
    mu_of_epsilon,
    one_run,
    seen_epsilon,
    tpr_at_fpr,
)
from audits.estimators.band import exceedance, spread_ranks, upper_band
from audits.estimators.gaussian_pair import LEVEL
from audits.estimators.guess_band import banded_one_run, numbers_of_guesses
from audits.estimators.resampling import _hull
from audits.estimators.threshold import upper_confidence_bound
from privkd.errors import InputError

DELTA = 1e-5
Floats = NDArray[np.float64]


def quantiles(mean: float, size: int) -> Floats:
    """The middle of each of ``size`` equal parts of a normal law."""
    return mean + stats.norm.ppf((np.arange(size) + 0.5) / size)


def circular(size: int) -> Floats:
    """Scores of members whose ROC curve, against even ones of non-members, is an arc of a circle."""
    return np.sqrt(1 - np.linspace(0, 1, size) ** 2)


def canaries(size: int, mu: float, rng: np.random.Generator) -> tuple[Floats, NDArray[np.bool_]]:
    """Independent Gaussian canaries and their fair coins."""
    inside = rng.random(size) < 0.5
    return rng.normal(size=size) + mu * inside, inside


# The band of one rate


@pytest.mark.parametrize("trials", [1, 2, 7, 60, 200, 1_000])
def test_the_exceedance_is_that_of_uniform_numbers(trials: int) -> None:
    """20,000 draws; 4.5 standard errors: false alarm under 1 in 10^5 each."""
    band = upper_band(trials, 0.05)
    drawn = np.sort(np.random.default_rng(trials).random((20_000, trials)))[:, band.ranks - 1]
    above = float((drawn > band.bounds).any(axis=1).mean())
    exact = exceedance(band.bounds, band.ranks, trials)
    assert exact == pytest.approx(0.05, rel=2e-3)
    assert abs(above - exact) < 4.5 * math.sqrt(exact / 20_000)


def test_the_exceedance_equals_its_twin_by_integration() -> None:
    """Two numbers: P[smaller <= a, larger <= b] is 2 a b - a^2."""
    for a, b in ((0.3, 0.9), (0.05, 0.06), (0.7, 0.7)):
        found = exceedance(np.array([a, b]), np.array([1, 2]), 2)
        assert found == pytest.approx(1 - (2 * a * b - a * a), abs=1e-12)


@given(st.integers(1, 300), st.data())
def test_a_band_lies_between_the_bound_of_one_count_and_bonferronis(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    band = upper_band(trials, 0.025)
    found = float(np.append(band.bounds, 1.0)[np.searchsorted(band.ranks, successes + 1)])
    assert found >= upper_confidence_bound(successes, trials, error=0.025) - 1e-12
    if trials <= 200:
        assert found <= upper_confidence_bound(successes, trials, error=0.025 / trials) + 1e-12


# Coverage and power


def share_above(epsilon: float, bound: Callable[[np.random.Generator], float], audits: int) -> float:
    rng = np.random.default_rng(0)
    return float(np.mean([bound(rng) > epsilon for _ in range(audits)]))


def by_threshold(rule: object, estimator: object, side: int, epsilon: float) -> Callable[..., float]:
    mu = mu_of_epsilon(epsilon, DELTA) if epsilon else 0.0

    def bound(rng: np.random.Generator) -> float:
        members, nonmembers = mu + rng.normal(size=side), rng.normal(size=side)
        return epsilon_lower_bound(
            members,
            nonmembers,
            rule=rule,
            estimator=estimator,
            delta=DELTA,  # type: ignore[arg-type]
        )

    return bound


def response(epsilon: float, size: int, rng: np.random.Generator) -> tuple[Floats, NDArray[np.bool_]]:
    """Randomised response, which is (epsilon, 0)-DP and no less: its scores are its answers, tied."""
    inside = rng.random(size) < 0.5
    right = rng.random(size) < 1 / (1 + math.exp(-epsilon))
    return np.where(inside == right, 1.0, 0.0), inside


def banded(scores: Floats, inside: NDArray[np.bool_], delta: float = DELTA) -> float:
    return epsilon_lower_bound_one_run(scores, inside, rule=BandGuesses(), estimator=one_run, delta=delta)


def uncorrected(scores: Floats, inside: NDArray[np.bool_]) -> float:
    """The broken twin: the best number of guesses, unpaid."""
    counts = numbers_of_guesses(len(scores), DELTA, 0.05).tolist()
    rules = [BonferroniGuesses((count,)) for count in counts]
    return max(
        epsilon_lower_bound_one_run(scores, inside, rule=rule, estimator=one_run, delta=DELTA)
        for rule in rules
    )


def test_a_few_audits_of_nothing_find_little() -> None:
    """200 audits at 95 %: over 24 false ones come with a probability of 2 in 10^5; the twin's are 35."""
    rng = np.random.default_rng(1)
    drawn = [canaries(100, 0.0, rng) for _ in range(200)]
    assert sum(banded(*one) > 0 for one in drawn) <= 24
    assert sum(uncorrected(*one) > 0 for one in drawn) > 30
    assert share_above(0.0, by_threshold(BandThreshold(), clopper_pearson, 50, 0.0), 200) <= 0.12
    assert share_above(1.0, by_threshold(BandThreshold(), gaussian, 50, 1.0), 200) <= 0.12


@pytest.mark.slow
class TestCalibration:
    """Each of at least 1,000 simulated audits at 95 %: a bound above the truth in at most 7.2 %.

    That is 3.2 standard errors over 5 %: false alarm under 7 in 10^4 each.
    """

    @pytest.mark.parametrize("side", [50, 500])
    @pytest.mark.parametrize("epsilon", [0.0, 1.0, 4.0])
    @pytest.mark.parametrize("estimator", [clopper_pearson, gaussian])
    def test_bands_of_thresholds(self, side: int, epsilon: float, estimator: object) -> None:
        rule = BandThreshold()
        assert share_above(epsilon, by_threshold(rule, estimator, side, epsilon), 1_000) <= 0.072

    @pytest.mark.parametrize("size", [100, 1_000])
    def test_bands_of_guesses_where_nothing_leaks(self, size: int) -> None:
        rng = np.random.default_rng(2)
        assert np.mean([banded(*canaries(size, 0.0, rng)) > 0 for _ in range(4_000)]) <= 0.061

    @pytest.mark.parametrize("epsilon", [0.5, 2.0])
    def test_bands_of_guesses_of_randomised_response(self, epsilon: float) -> None:
        """The walk itself: the share is near 5 %, and far from it under the twin."""
        rng = np.random.default_rng(3)
        assert np.mean([banded(*response(epsilon, 100, rng)) > epsilon for _ in range(1_000)]) <= 0.072

    def test_splits_in_several_ways(self) -> None:
        rule = MultiSplitThreshold(9, share=0.5)
        assert share_above(0.0, by_threshold(rule, gaussian, 50, 0.0), 1_000) <= 0.072

    @pytest.mark.parametrize(("size", "epsilon"), [(100, 0.0), (100, 4.0), (1_000, 4.0), (10_000, 1.0)])
    def test_the_gaussian_pair(self, size: int, epsilon: float) -> None:
        """At 95 % exactly: refusals, which take at most `LEVEL` of audits, count as no bound."""
        mu, rng, above, refused = (mu_of_epsilon(epsilon, DELTA) if epsilon else 0.0), None, 0, 0
        rng = np.random.default_rng(4)
        for _ in range(2_000):
            scores, inside = canaries(size, mu, rng)
            try:
                above += gaussian_pair(scores[inside], scores[~inside], delta=DELTA).mu > mu
            except InputError:
                refused += 1
        assert 0.034 <= above / 2_000 <= 0.066
        assert refused / 2_000 <= LEVEL + 0.0075

    def test_small_samples_are_bounded_tighter_than_before(self) -> None:
        """100 canaries, epsilon 8: the mean of 60 audits by each rule."""
        rng, mu = np.random.default_rng(5), mu_of_epsilon(8.0, DELTA)
        found: dict[str, list[float]] = {}
        for seed in range(60):
            scores, inside = canaries(100, mu, rng)
            sides = scores[inside], scores[~inside]
            for name, rule in (("split", SplitThreshold(seed)), ("eight", BonferroniThreshold(8))):
                bound = epsilon_lower_bound(*sides, rule=rule, estimator=clopper_pearson, delta=DELTA)
                found.setdefault(name, []).append(bound)
            found.setdefault("guesses", []).append(banded(scores, inside))
        means = {name: float(np.mean(bounds)) for name, bounds in found.items()}
        assert means["guesses"] > 1.7 * max(means["split"], means["eight"])


# Guesses


def test_the_band_of_one_number_of_guesses_is_the_bound_of_that_number() -> None:
    for right, guesses in ((9, 10), (60, 100), (100, 100)):
        found = banded_one_run(np.array([right]), np.array([guesses]), 0.0, 0.05)
        exact = one_run(canaries=guesses, guesses=guesses, correct=right, delta=0.0)
        assert found == pytest.approx(exact, abs=1e-5)


def test_delta_costs_a_band_of_guesses_and_bounds_their_number() -> None:
    scores, inside = canaries(400, 2.0, np.random.default_rng(0))
    right, guesses = np.array([9, 17, 30]), np.array([10, 20, 40])
    bounds = [banded_one_run(right, guesses, delta, 0.05) for delta in (0.0, 1e-5, 1e-4, 1e-2)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[2] > bounds[3] == 0.0
    assert numbers_of_guesses(100_000, 1e-5, 0.05)[-1] == 1_000
    assert numbers_of_guesses(100_000, 0.0, 0.05)[-1] == 100_000
    assert banded(scores, inside, 0.9) == 0.0


def test_a_perfect_attack_keeps_a_finite_band() -> None:
    inside = np.arange(100) < 50
    assert 2.5 < banded(inside.astype(np.float64), inside) < math.log(100 / 0.05)
    assert banded(1.0 - inside, inside) == 0.0


def test_a_band_of_guesses_is_for_the_general_estimator_alone() -> None:
    scores, inside = canaries(50, 1.0, np.random.default_rng(0))
    with pytest.raises(InputError, match="one_run alone"):
        epsilon_lower_bound_one_run(scores, inside, rule=BandGuesses(), estimator=f_dp_one_run, delta=DELTA)


# The Gaussian pair


def test_a_pair_of_many_gaussians_meets_its_epsilon() -> None:
    """10,000 canaries at epsilon 4: near 3.83, where guesses under the same curve reach 2.44."""
    bounds = []
    for seed in range(20):
        scores, inside = canaries(10_000, mu_of_epsilon(4.0, DELTA), np.random.default_rng(seed))
        bounds.append(gaussian_pair(scores[inside], scores[~inside], delta=DELTA).epsilon)
    assert np.mean(bounds) == pytest.approx(3.83, abs=0.05)


def test_the_pairs_bound_is_students_exact_one() -> None:
    found = gaussian_pair(quantiles(1.5, 40), quantiles(0.0, 60), delta=DELTA)
    scale, freedom = math.sqrt(40 * 60 / 100), 98
    assert stats.nct.cdf(found.mu_estimate * scale, freedom, found.mu * scale) == pytest.approx(
        0.95, abs=1e-6
    )
    assert found.epsilon == pytest.approx(epsilon_of_mu(found.mu, DELTA))
    assert gaussian_pair(quantiles(0.0, 40), quantiles(1.0, 60), delta=DELTA).epsilon == 0.0


@pytest.mark.parametrize(
    ("members", "nonmembers", "why"),
    [
        (quantiles(1.0, 500) ** 3, quantiles(0.0, 500), "normal"),
        (np.append(quantiles(0.0, 480), np.full(20, 8.0)), quantiles(0.0, 500), "normal"),
        (2 * quantiles(1.0, 500), quantiles(0.0, 500), "of one variance"),
        (np.ones(500), quantiles(0.0, 500), "alike"),
        (np.append(quantiles(0.0, 499), math.inf), quantiles(0.0, 500), "finite"),
        (quantiles(0.0, 19), quantiles(0.0, 500), "at least 20"),
    ],
)
def test_what_is_no_pair_of_gaussians_is_refused(members: Floats, nonmembers: Floats, why: str) -> None:
    with pytest.raises(InputError, match=why):
        gaussian_pair(members, nonmembers, delta=DELTA)


# Facts of JAX-Privacy's tests


@pytest.mark.parametrize(
    ("shift", "general", "curved"),
    [(0, 0.0, 0.0), (1, 1.13346, 2.164749), (2, 2.311945, 4.7218075), (4, 4.395568, 9.133752)],
)
def test_one_run_of_ideal_scores(shift: float, general: float, curved: float) -> None:
    """10,000 a side at delta 1e-6; guesses above each vertex of the hull share 5 % of error among them."""
    outside, inside = quantiles(0.0, 10_000), quantiles(shift, 10_000)
    thresholds = np.append(np.unique(np.concatenate([outside, inside])), math.inf)
    # The concave hull of non-members below a threshold over members below it.
    passed, missed = _hull(*(np.searchsorted(side, thresholds) for side in (inside, outside)))
    found = (10_000 - missed).tolist(), (10_000 - passed).tolist()
    for estimator, answer in ((one_run, general), (f_dp_one_run, curved)):
        best = max(
            estimator(
                canaries=20_000,
                guesses=hits + alarms,
                correct=hits,
                delta=1e-6,
                confidence=1 - 0.05 / len(missed),
            )
            for hits, alarms in zip(*found, strict=True)
            if hits > alarms
        ) if shift else 0.0  # fmt: skip
        assert best == pytest.approx(answer, rel=1e-4)


@pytest.mark.parametrize("nonmembers", [250, 500, 750])
def test_an_explicit_threshold(nonmembers: int) -> None:
    inside, outside = quantiles(1.0, 500), quantiles(0.0, nonmembers)
    found = epsilon_lower_bound(
        inside, outside, rule=FixedThreshold(0.5), estimator=clopper_pearson, delta=0.0, confidence=0.9
    )
    missed, alarms = int((inside < 0.5).sum()), int((outside >= 0.5).sum())
    rates = [
        upper_confidence_bound(count, total, error=0.05)
        for count, total in ((missed, 500), (alarms, nonmembers))
    ]
    assert found == pytest.approx(
        max(0.0, math.log((1 - rates[0]) / rates[1]), math.log((1 - rates[1]) / rates[0]))
    )


@pytest.mark.parametrize("rule", [BandThreshold(), SplitThreshold(0, 0.5)])
@pytest.mark.parametrize("mu", [0.3, 1.0, 1.5])
def test_a_bound_of_many_samples_is_within_a_fifth_of_the_truth(rule: object, mu: float) -> None:
    truth = epsilon_of_mu(mu, 0.1)
    found = epsilon_lower_bound(
        quantiles(mu, 2_000_000), quantiles(0.0, 2_000_000), rule=rule, estimator=clopper_pearson,  # type: ignore[arg-type]
        delta=0.1, confidence=0.8,
    )  # fmt: skip
    assert 0.8 * truth <= found < truth


@pytest.mark.parametrize("mu", [0.1, 0.3, 1.0, 3.0])
def test_a_gaussian_bound_of_many_samples_is_within_a_fifteenth(mu: float) -> None:
    rng = np.random.default_rng(0)
    found = epsilon_lower_bound(
        rng.normal(mu, 1, 500_000), rng.normal(size=500_000), rule=BandThreshold(), estimator=gaussian,
        delta=0.05, confidence=0.9,
    )  # fmt: skip
    assert found == pytest.approx(epsilon_of_mu(mu, 0.05), rel=1 / 15)


@pytest.mark.parametrize("mu", [0.0, -1.0, -3.0])
def test_a_gaussian_bound_without_a_shift_is_zero(mu: float) -> None:
    rng = np.random.default_rng(0)
    found = epsilon_lower_bound(
        rng.normal(mu, 1, 5_000),
        rng.normal(size=5_000),
        rule=BandThreshold(),
        estimator=gaussian,
        delta=DELTA,
    )
    assert found == 0.0


@pytest.mark.parametrize(
    ("least", "delta", "odds"),
    [
        (1, 0, 3),
        (1, 1 / 8, 2),
        (2, 0, 2),
        (2, 1 / 8, 3 / 2),
        (1, 1 / 4, 1),
        (2, 3 / 8, 3 / 4),
        (1, 1 / 2, 1 / 2),
    ],
)
def test_epsilon_as_it_was_seen(least: int, delta: float, odds: float) -> None:
    """Counts (true, false) at three thresholds: (2, 0), (6, 4), (8, 8)."""
    members, nonmembers = np.repeat([3.0, 2.0, 1.0], [2, 4, 2]), np.repeat([2.0, 1.0], [4, 4])
    found = seen_epsilon(members, nonmembers, delta=delta, least=least)
    assert found == pytest.approx(max(0.0, math.log(odds)))


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize(("members", "nonmembers"), [(9, 10), (12, 13)])
def test_a_perfect_classifier_is_seen_at_the_least_rate(least: int, members: int, nonmembers: int) -> None:
    found = seen_epsilon(np.ones(members), np.zeros(nonmembers), delta=0.0, least=least)
    assert found == pytest.approx(math.log(nonmembers / least))
    assert seen_epsilon(np.ones(members), np.zeros(nonmembers), delta=0.0, least=nonmembers) == 0.0


def test_a_circular_curve() -> None:
    inside, outside = circular(10_000), np.linspace(0, 1, 10_000)
    assert auc(inside, outside).estimate == pytest.approx(math.pi / 4, abs=1e-3)
    assert balanced_accuracy(inside, outside).estimate == pytest.approx(math.sqrt(0.5), abs=1e-3)
    for fpr in (0.1, 1 / 3, 0.7):
        assert tpr_at_fpr(inside, outside, fpr).estimate == pytest.approx(
            math.sqrt(fpr * (2 - fpr)), abs=1e-3
        )


def test_bootstrap_of_a_mean_is_that_of_the_central_limit() -> None:
    members, nonmembers = math.e + math.pi * quantiles(0.0, 1_500), np.linspace(0, 1, 1_500)
    pooled = np.concatenate([members, nonmembers])
    found = bootstrap(lambda a, b: float(np.concatenate([a, b]).mean()), members, nonmembers)
    reach = 1.96 * math.hypot(members.std(), nonmembers.std()) / math.sqrt(1_500) / 2
    assert found.estimate == pytest.approx(pooled.mean())
    assert found.high - found.estimate == pytest.approx(reach, rel=0.1)
    assert found.estimate - found.low == pytest.approx(reach, rel=0.1)


@pytest.mark.parametrize("mu", [0.0, 1.0, 10.0])
def test_bootstraps_hold_their_own_figure(mu: float) -> None:
    rng = np.random.default_rng(0)
    members, nonmembers = rng.normal(mu, size=356), rng.normal(size=432)
    for figure in (
        lambda a, b: seen_epsilon(a, b, delta=0.0),
        lambda a, b: tpr_at_fpr(a, b, 0.1).estimate,
        lambda a, b: auc(a, b).estimate,
    ):
        found = bootstrap(figure, members, nonmembers, resamples=200)
        assert found.low <= found.estimate <= found.high


# Raw counts


def test_counts_at_the_ends_of_the_curve() -> None:
    assert (
        epsilon_of_counts(true_positives=3, members=10, false_positives=0, nonmembers=10, delta=0.1)
        == math.inf
    )
    assert (
        epsilon_of_counts(true_positives=10, members=10, false_positives=4, nonmembers=10, delta=0.1)
        == math.inf
    )
    for all_or_none in (0, 10):
        assert (
            epsilon_of_counts(
                true_positives=all_or_none,
                members=10,
                false_positives=all_or_none,
                nonmembers=10,
                delta=0.0,
            )
            == 0.0
        )
    seen = epsilon_of_counts(true_positives=60, members=100, false_positives=3, nonmembers=100, delta=0.0)
    assert seen == pytest.approx(math.log(20))
    with pytest.raises(InputError, match="true_positives"):
        epsilon_of_counts(true_positives=11, members=10, false_positives=0, nonmembers=10, delta=0.0)


def test_the_best_balanced_accuracy_has_an_interval_without_a_model() -> None:
    rng = np.random.default_rng(0)
    truth = stats.norm.cdf(0.5)
    found = balanced_accuracy(rng.normal(1, 1, 2_000), rng.normal(size=2_000))
    assert found.low <= truth <= found.high
    assert found.high - found.low < 0.07
    nothing = balanced_accuracy(np.zeros(50), np.ones(50))
    assert (nothing.estimate, nothing.low) == (0.5, 0.5)


def test_spread_ranks_reach_both_ends() -> None:
    for size in (1, 5, 200, 10_000):
        ranks = spread_ranks(size, 32)
        assert (ranks[0], ranks[-1]) == (1, size)
        assert (np.diff(ranks) > 0).all()
