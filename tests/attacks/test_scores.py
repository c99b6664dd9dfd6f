"""Membership scores against twins that loop, on the contract they share, and at the edges."""

import math
import tracemalloc
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from scipy.special import expit, log_softmax

from attacks import (
    ATTACKS,
    Evidence,
    Population,
    Shadows,
    attack_p,
    attack_r,
    bavaria_offline,
    bavaria_online,
    global_loss,
    lira_offline,
    lira_online,
    quantile_regression,
    rescaled_logit,
    rmia_offline,
    rmia_online,
)
from attacks.membership.bavaria import fitted_prior
from attacks.membership.shadows import Moments, rescaled_logit_of_log_probabilities
from attacks.registry import MembershipScore
from privkd.errors import InputError

Floats = NDArray[np.float64]
SCORES: dict[str, MembershipScore] = {
    name: cast(MembershipScore, ATTACKS[name].score)
    for name in ATTACKS
    if ATTACKS[name].on == "model" and name != "quantile-regression"
}
"""That one reads features of the records, see below."""


def evidence_of(
    *, models: int = 16, samples: int = 60, size: int = 40, signal: float = 1.5, seed: int = 0
) -> tuple[Evidence, NDArray[np.bool_]]:
    """A target and its shadows on samples of differing difficulty and spread, and the target's members."""
    rng = np.random.default_rng(seed)
    difficulty, spread = 2 * rng.normal(size=samples), rng.gamma(4, 0.25, size=samples)
    member = np.argsort(rng.random((models + 1, samples)), axis=0) < (models + 1) // 2
    # Every sample needs two shadow models a side, whatever falls to the target.
    member[0] = rng.random(samples) < 0.5
    member[1:5] = np.array([[True], [True], [False], [False]])
    signals = difficulty + spread * rng.normal(size=member.shape) + signal * spread * member
    hardness = 2 * rng.normal(size=size)
    others = hardness + rng.normal(size=(models + 1, size))
    evidence = Evidence(signals[0], Shadows(signals[1:], member[1:]), Population(others[0], others[1:]))
    return evidence, member[0]


def area(scores: Floats, member: NDArray[np.bool_]) -> float:
    """Share of pairs in which the member scores higher."""
    wins = stats.mannwhitneyu(scores[member], scores[~member]).statistic
    return float(wins / (member.sum() * (~member).sum()))


# Rescaled logit


def test_rescaled_logit_equals_its_twin() -> None:
    rng = np.random.default_rng(0)
    logits, labels = 5 * rng.normal(size=(3, 7, 4)), rng.integers(0, 4, size=7)
    found = rescaled_logit(logits, labels)
    assert found.shape == (3, 7)
    for model in range(3):
        for sample in range(7):
            z, y = logits[model, sample], labels[sample]
            others = math.log(sum(math.exp(z[k]) for k in range(4) if k != y))
            assert found[model, sample] == pytest.approx(z[y] - others, abs=1e-12)


def test_rescaled_logit_is_the_log_odds_of_the_label() -> None:
    logits, labels = np.random.default_rng(1).normal(size=(9, 5)), np.arange(9) % 5
    own = np.exp(log_softmax(logits, axis=-1))[np.arange(9), labels]
    np.testing.assert_allclose(expit(rescaled_logit(logits, labels)), own, rtol=1e-12)


def test_rescaled_logit_is_exact_where_probabilities_round() -> None:
    assert rescaled_logit([900.0, 0.0, -50.0], 0) == pytest.approx(900.0)
    assert rescaled_logit([0.0, 900.0], 0) == -900.0
    assert rescaled_logit([1e6 + 2, 1e6], 0) == pytest.approx(2.0)
    assert rescaled_logit(np.array([40.0, 0.0], np.float32), 0).dtype == np.float64


def test_log_probabilities_of_zero_keep_a_finite_signal() -> None:
    sure, wrong = [0.0, -math.inf, -math.inf], [-math.inf, 0.0, -math.inf]
    found = rescaled_logit_of_log_probabilities([sure, wrong], [0, 0])
    assert found[0] == pytest.approx(103.28 - math.log(2), abs=0.01)
    assert found[1] == pytest.approx(-103.28, abs=0.01)
    logits = np.random.default_rng(0).normal(size=(6, 3))
    np.testing.assert_allclose(
        rescaled_logit_of_log_probabilities(log_softmax(logits, axis=-1), [0, 1, 2, 0, 1, 2]),
        rescaled_logit(logits, [0, 1, 2, 0, 1, 2]),
        atol=1e-12,
    )


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        ([[1.0]], [0]),
        ([[1.0, math.nan]], [0]),
        ([[1.0, math.inf]], [0]),
        ([[1.0, 2.0]], [2]),
        ([[1.0, 2.0]], [-1]),
        ([[1.0, 2.0]], [0.0]),
        ([[1.0, 2.0]], [0, 1]),
        (1.0, 0),
    ],
)
def test_rescaled_logit_refuses_what_it_cannot_score(logits: Any, labels: Any) -> None:
    with pytest.raises(InputError):
        rescaled_logit(logits, labels)


def test_log_probabilities_above_zero_are_refused() -> None:
    for wrong in ([[0.5, -1.0]], [[math.nan, 0.0]]):
        with pytest.raises(InputError, match="log_probabilities"):
            rescaled_logit_of_log_probabilities(wrong, [0])


# Twins


def sides(evidence: Evidence, sample: int) -> tuple[Floats, Floats]:
    signals, member = evidence.shadows.signals[:, sample], evidence.shadows.member[:, sample]
    return signals[member], signals[~member]


def naive_lira(evidence: Evidence, pooled: bool, online: bool) -> Floats:
    samples = len(evidence.target)
    pairs = [sides(evidence, i) for i in range(samples)]
    shared = [
        math.sqrt(
            sum(((p[side] - p[side].mean()) ** 2).sum() for p in pairs) / sum(len(p[side]) - 1 for p in pairs)
        )
        for side in (0, 1)
    ]
    scores = []
    for phi, pair in zip(evidence.target, pairs, strict=True):
        laws = [
            stats.norm(s.mean(), std if pooled else s.std(ddof=1))
            for s, std in zip(pair, shared, strict=True)
        ]
        ratio = laws[0].logpdf(phi) - laws[1].logpdf(phi)
        scores.append(ratio if online else (phi - laws[1].mean()) / laws[1].std())
    return np.array(scores)


@pytest.mark.parametrize("variance", ["sample", "pooled"])
def test_lira_equals_its_twin(variance: Any) -> None:
    evidence, _ = evidence_of()
    pooled = variance == "pooled"
    online = lira_online(evidence.target, evidence.shadows, variance=variance)
    offline = lira_offline(evidence.target, evidence.shadows, variance=variance)
    np.testing.assert_allclose(online, naive_lira(evidence, pooled, online=True), atol=1e-9)
    np.testing.assert_allclose(offline, naive_lira(evidence, pooled, online=False), atol=1e-9)


def test_lira_pools_below_64_models_and_not_from_there() -> None:
    for models, variance in ((63, "pooled"), (64, "sample")):
        evidence, _ = evidence_of(models=models)
        np.testing.assert_array_equal(
            lira_online(evidence.target, evidence.shadows),
            lira_online(evidence.target, evidence.shadows, variance=variance),  # type: ignore[arg-type]
        )


def naive_rmia(evidence: Evidence, gamma: float, a: float | None) -> Floats:
    """Every pair (x, z), one at a time."""
    scores = []
    for i, phi in enumerate(evidence.target):
        inside, outside = (expit(s).mean() for s in sides(evidence, i))
        marginal = (inside + outside) / 2 if a is None else ((1 + a) * outside + (1 - a)) / 2
        dominated = 0
        for z in range(len(evidence.population.target)):
            reference = expit(evidence.population.references[:, z]).mean()
            ratio = (expit(phi) / marginal) / (expit(evidence.population.target[z]) / reference)
            dominated += ratio >= gamma
        scores.append(dominated / len(evidence.population.target))
    return np.array(scores)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_rmia_equals_its_pairwise_twin(gamma: float) -> None:
    evidence, _ = evidence_of()
    e = evidence
    online = rmia_online(e.target, e.shadows, e.population, gamma=gamma)
    np.testing.assert_array_equal(online, naive_rmia(e, gamma, None))
    offline = rmia_offline(e.target, e.shadows, e.population, gamma=gamma, a=0.4)
    np.testing.assert_array_equal(offline, naive_rmia(e, gamma, 0.4))


def test_rmia_counts_a_population_sample_that_ties() -> None:
    shadows = Shadows(np.array([[0.0], [0.0]]), np.array([[True], [False]]))
    population = Population(np.array([0.0, 1.0, -1.0]), np.zeros((2, 3)))
    assert rmia_online([0.0], shadows, population) == pytest.approx([2 / 3])


def test_rmia_needs_no_memory_for_pairs() -> None:
    """50,000 x 50,000 pairs would take 20 GB as a matrix."""
    rng = np.random.default_rng(0)
    member = np.zeros((2, 50_000), bool)
    member[0] = True
    shadows = Shadows(rng.normal(size=member.shape), member)
    population = Population(rng.normal(size=50_000), rng.normal(size=(2, 50_000)))
    target = rng.normal(size=50_000)
    tracemalloc.start()
    rmia_online(target, shadows, population)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def naive_predictive(values: Floats, prior: Any) -> Any:
    """The law of the next value after updating a normal-inverse-gamma prior one value at a time."""
    mean, kappa = prior.mean, prior.mean_strength
    alpha, beta = prior.variance_strength / 2, prior.variance_strength * prior.variance / 2
    for value in values:
        beta += kappa * (value - mean) ** 2 / (2 * (kappa + 1))
        mean = (kappa * mean + value) / (kappa + 1)
        kappa += 1
        alpha += 0.5
    return stats.t(2 * alpha, loc=mean, scale=math.sqrt(beta * (kappa + 1) / (alpha * kappa)))


def test_bavaria_equals_its_sequential_twin() -> None:
    evidence, _ = evidence_of(models=6)
    priors = [fitted_prior(evidence.shadows.moments(side)) for side in ("in", "out")]
    online, offline = [], []
    for i, phi in enumerate(evidence.target):
        laws = [
            naive_predictive(values, prior) for values, prior in zip(sides(evidence, i), priors, strict=True)
        ]
        online.append(laws[0].logpdf(phi) - laws[1].logpdf(phi))
        offline.append(-laws[1].logsf(phi))
    np.testing.assert_allclose(bavaria_online(evidence.target, evidence.shadows), online, atol=1e-7)
    np.testing.assert_allclose(bavaria_offline(evidence.target, evidence.shadows), offline, rtol=1e-7)


def test_attack_p_and_r_equal_their_twins() -> None:
    evidence, _ = evidence_of()
    reference = evidence.population.target
    expected_p = [sum(z <= phi for z in reference) / len(reference) for phi in evidence.target]
    np.testing.assert_array_equal(attack_p(evidence.target, reference), expected_p)
    expected_r = [(sides(evidence, i)[1] <= phi).mean() for i, phi in enumerate(evidence.target)]
    np.testing.assert_array_equal(attack_r(evidence.target, evidence.shadows), expected_r)


def test_global_loss_is_minus_the_cross_entropy() -> None:
    logits, labels = np.random.default_rng(0).normal(size=(8, 3)), np.arange(8) % 3
    expected = log_softmax(logits, axis=-1)[np.arange(8), labels]
    np.testing.assert_allclose(global_loss(rescaled_logit(logits, labels)), expected, atol=1e-12)
    assert np.isfinite(global_loss([-1e4, 1e4])).all()


# The contract of every score

CONTRACT = pytest.mark.parametrize("name", sorted(SCORES))


@CONTRACT
def test_members_score_higher(name: str) -> None:
    """A signal of 3 deviations; the weakest score found 0.78 or more in each of 50 seeds."""
    evidence, member = evidence_of(samples=2_000, size=500, signal=3.0)
    assert area(SCORES[name](evidence), member) > 0.75


@CONTRACT
def test_without_signal_the_score_is_chance(name: str) -> None:
    """False alarm of a fresh seed: beyond 4 standard errors, under 1 in 10^4."""
    evidence, member = evidence_of(samples=4_000, signal=0.0)
    standard_error = math.sqrt(4_001 / (12 * member.sum() * (~member).sum()))
    assert abs(area(SCORES[name](evidence), member) - 0.5) < 4 * standard_error


@CONTRACT
def test_a_score_is_one_finite_number_a_sample_and_leaves_its_evidence_alone(name: str) -> None:
    evidence, _ = evidence_of()
    before = evidence.target.copy(), evidence.shadows.signals.copy(), evidence.population.target.copy()
    scores = SCORES[name](evidence)
    assert scores.shape == evidence.target.shape
    assert scores.dtype == np.float64
    assert np.isfinite(scores).all()
    for was, now in zip(
        before, (evidence.target, evidence.shadows.signals, evidence.population.target), strict=True
    ):
        np.testing.assert_array_equal(was, now)


@CONTRACT
def test_the_order_of_models_and_samples_is_irrelevant(name: str) -> None:
    evidence, _ = evidence_of()
    rng = np.random.default_rng(5)
    models, samples = rng.permutation(evidence.shadows.models), rng.permutation(len(evidence.target))
    shuffled = Evidence(
        evidence.target[samples],
        Shadows(evidence.shadows.signals[models][:, samples], evidence.shadows.member[models][:, samples]),
        Population(evidence.population.target, evidence.population.references[models]),
    )
    np.testing.assert_allclose(SCORES[name](shuffled), SCORES[name](evidence)[samples], atol=1e-9)


@pytest.mark.parametrize("name", sorted(set(SCORES) - {"lira-online", "bavaria-online"}))
def test_a_surer_target_never_scores_lower(name: str) -> None:
    """Not so with two laws of different width: far beyond both, the wider one explains the signal."""
    evidence, _ = evidence_of()
    surer = Evidence(evidence.target + 0.3, evidence.shadows, evidence.population)
    assert (SCORES[name](surer) >= SCORES[name](evidence)).all()


@CONTRACT
def test_constant_and_extreme_signals_still_score(name: str) -> None:
    """Shadow models that agree to the last digit, and models sure beyond what a float32 holds."""
    member = np.tile([[True], [False]], (3, 4))
    for value in (0.0, 1_000.0, -1_000.0):
        signals = np.full(member.shape, value)
        target = np.array([value, value + 1, value - 1, 0.0])
        evidence = Evidence(target, Shadows(signals, member), Population(np.zeros(3), np.zeros((6, 3))))
        assert np.isfinite(SCORES[name](evidence)).all()


@CONTRACT
def test_a_target_of_another_length_is_refused(name: str) -> None:
    evidence, _ = evidence_of()
    wrong = [evidence.target[:0], np.append(evidence.target[1:], math.nan)]
    if name not in ("attack-p", "global-loss"):
        wrong.append(evidence.target[1:])
    for target in wrong:
        with pytest.raises(InputError, match="target"):
            SCORES[name](Evidence(target, evidence.shadows, evidence.population))


@pytest.mark.parametrize("name", [name for name in sorted(SCORES) if "online" in name])
def test_online_scores_need_models_trained_on_every_sample(name: str) -> None:
    evidence, _ = evidence_of()
    unseen = Shadows(evidence.shadows.signals, np.zeros_like(evidence.shadows.member))
    with pytest.raises(InputError, match="use an offline score"):
        SCORES[name](Evidence(evidence.target, unseen, evidence.population))


@pytest.mark.parametrize("name", ["lira-offline", "rmia-offline", "bavaria-offline", "attack-r"])
def test_offline_scores_need_no_model_trained_on_a_sample_and_do_not_look_at_one(name: str) -> None:
    evidence, _ = evidence_of()
    without = np.zeros_like(evidence.shadows.member)
    assert np.isfinite(
        SCORES[name](
            Evidence(evidence.target, Shadows(evidence.shadows.signals, without), evidence.population)
        )
    ).all()
    changed = np.where(evidence.shadows.member, 99.0, evidence.shadows.signals)
    other = Evidence(evidence.target, Shadows(changed, evidence.shadows.member), evidence.population)
    np.testing.assert_array_equal(SCORES[name](other), SCORES[name](evidence))
    with pytest.raises(InputError, match="trained without"):
        SCORES[name](Evidence(evidence.target, Shadows(changed, np.ones_like(without)), evidence.population))


# Power


def test_lira_reaches_the_best_possible_area_on_normal_signals() -> None:
    """With 256 models the area is Phi(mu / sqrt 2) less the estimates' cost; 0.02 is 4 standard errors."""
    evidence, member = evidence_of(models=256, samples=6_000, signal=1.5)
    best = stats.norm.cdf(1.5 / math.sqrt(2))
    assert area(lira_online(evidence.target, evidence.shadows), member) == pytest.approx(best, abs=0.02)


def test_few_models_favour_shrinkage_over_a_variance_per_sample_and_many_do_not_matter() -> None:
    evidence, member = evidence_of(models=8, samples=6_000, signal=2.0)
    own = lira_online(evidence.target, evidence.shadows, variance="sample")
    assert area(bavaria_online(evidence.target, evidence.shadows), member) > area(own, member) + 0.01
    evidence, _ = evidence_of(models=512, samples=300, signal=2.0)
    own = lira_online(evidence.target, evidence.shadows, variance="sample")
    assert stats.spearmanr(bavaria_online(evidence.target, evidence.shadows), own).statistic > 0.995


def test_the_prior_is_recovered_from_samples_drawn_from_it() -> None:
    """2,000 samples; each tolerance is above 5 standard errors."""
    rng = np.random.default_rng(0)
    strength, variance, mean_strength = 8.0, 0.5, 0.25
    variances = strength * variance / rng.chisquare(strength, size=2_000)
    means = 1.0 + np.sqrt(variances / mean_strength) * rng.normal(size=2_000)
    values = means + np.sqrt(variances) * rng.normal(size=(10, 2_000))
    moments = Shadows(values, np.zeros(values.shape, bool)).moments("out")
    prior = fitted_prior(moments)
    assert prior.variance_strength == pytest.approx(strength, rel=0.2)
    assert prior.variance == pytest.approx(variance, rel=0.1)
    assert prior.mean == pytest.approx(1.0, abs=0.2)
    assert prior.mean_strength == pytest.approx(mean_strength, rel=0.3)


def test_equal_variances_and_means_are_pooled_outright() -> None:
    prior = fitted_prior(Moments(np.full(400, 30.0), np.zeros(400), np.full(400, 29.0)))
    assert prior.mean_strength == prior.variance_strength == 1e6


def quantile_task(seed: int) -> tuple[Callable[[], Floats], NDArray[np.bool_], Floats]:
    rng = np.random.default_rng(seed)
    features = rng.uniform(-1, 1, size=(5_000, 2))
    member = np.arange(5_000) >= 4_000
    signals = 5 * features[:, 0] + rng.normal(size=5_000) + 2.0 * member
    asked, known = slice(3_000, None), slice(0, 3_000)

    def scores() -> Floats:
        return quantile_regression(
            signals[asked],
            features[asked],
            nonmember_target=signals[known],
            nonmember_features=features[known],
            false_positive_rate=0.1,
        )

    return scores, member[asked], signals[asked]


def test_quantile_regression_keeps_its_false_positive_rate_and_beats_one_threshold_for_all() -> None:
    """10 % asked; 5 to 16 % is 5 standard errors of 1,000 non-members plus what the trees overfit."""
    scores, member, signals = quantile_task(0)
    found = scores()
    assert 0.05 < (found[~member] > 0).mean() < 0.16
    assert (found[member] > 0).mean() > 0.5
    assert area(found, member) > area(signals, member) + 0.1
    np.testing.assert_array_equal(found, scores())


def test_quantile_regression_refuses_what_does_not_fit() -> None:
    good: dict[str, Any] = {
        "target": np.zeros(3),
        "features": np.zeros((3, 2)),
        "nonmember_target": np.zeros(30),
        "nonmember_features": np.zeros((30, 2)),
    }
    for wrong in (
        {"features": np.zeros((3, 1))},
        {"features": np.zeros((2, 2))},
        {"nonmember_target": np.zeros(29)},
        {"nonmember_features": np.full((30, 2), math.nan)},
        {"false_positive_rate": 0.0},
        {"false_positive_rate": 1.0},
    ):
        with pytest.raises(InputError):
            quantile_regression(**(good | wrong))


# Edges of the evidence


def test_evidence_that_does_not_fit_is_refused() -> None:
    ok = np.zeros((2, 3))
    for signals, member in (
        (ok, np.zeros((3, 2), bool)),
        (ok, np.zeros((2, 3))),
        (np.full((2, 3), math.nan), np.zeros((2, 3), bool)),
        (np.full((2, 3), math.inf), np.zeros((2, 3), bool)),
        (np.zeros(3), np.zeros(3, bool)),
        (np.zeros((0, 3)), np.zeros((0, 3), bool)),
    ):
        with pytest.raises(InputError):
            Shadows(signals, member)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="target"):
        Population(np.zeros(2), np.zeros((4, 3)))


def test_a_variance_needs_two_models() -> None:
    shadows = Shadows(np.zeros((2, 3)), np.array([[True] * 3, [False] * 3]))
    for variance in ("sample", "pooled"):
        with pytest.raises(InputError, match="2 shadow models"):
            lira_online(np.zeros(3), shadows, variance=variance)
    with pytest.raises(InputError, match="2 shadow models"):
        bavaria_online(np.zeros(3), shadows)


def test_one_model_for_some_samples_is_enough_to_pool() -> None:
    member = np.array([[True, True], [True, False], [False, False], [False, False]])
    shadows = Shadows(np.random.default_rng(0).normal(size=(4, 2)), member)
    for score in (lira_online, bavaria_online):
        assert np.isfinite(score(np.zeros(2), shadows)).all()
    with pytest.raises(InputError, match="pool the variance"):
        lira_online(np.zeros(2), shadows, variance="sample")


def test_bad_parameters_are_refused() -> None:
    evidence, _ = evidence_of()
    e = evidence
    unknown: Any = "own"
    with pytest.raises(InputError, match="variance='own'"):
        lira_online(e.target, e.shadows, variance=unknown)
    for gamma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="gamma"):
            rmia_online(e.target, e.shadows, e.population, gamma=gamma)
    for a in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="a="):
            rmia_offline(e.target, e.shadows, e.population, a=a)
