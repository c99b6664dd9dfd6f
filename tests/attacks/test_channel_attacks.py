"""The matched filter and label-distribution inference on channels whose best attack is known."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from attacks.release import (
    ReleaseStatistics,
    _Span,
    label_distribution,
    label_divergence,
    matched_filter,
    matched_filter_log_ratio,
    matched_filter_mu,
    whitened_filter,
)
from privkd.errors import InputError

Floats = NDArray[np.float64]

ANSWERS = (6, 4, 3)
"""Queries, classes, rounds."""


def statistics_of(candidates: int = 5, shift: float = 0.3, seed: int = 0) -> ReleaseStatistics:
    rng = np.random.default_rng(seed)
    mean_out = rng.normal(size=(candidates, *ANSWERS))
    mean_in = mean_out + shift * rng.normal(size=mean_out.shape)
    return ReleaseStatistics(mean_in, mean_out, rng.gamma(4, 0.1, size=mean_out.shape))


def area(inside: Floats, outside: Floats) -> float:
    return float(stats.mannwhitneyu(inside, outside).statistic / (len(inside) * len(outside)))


# Matched filter


def test_matched_filter_equals_its_twin() -> None:
    statistics, released = statistics_of(), np.random.default_rng(1).normal(size=ANSWERS)
    found = matched_filter(released, statistics, noise_std=0.7)
    mu = matched_filter_mu(statistics, noise_std=0.7)
    for candidate in range(5):
        filtered = squared = 0.0
        for entry in np.ndindex(ANSWERS):
            out, inside = statistics.mean_out[candidate][entry], statistics.mean_in[candidate][entry]
            variance = statistics.variance[candidate][entry] + 0.7**2
            filtered += (released[entry] - out) * (inside - out) / variance
            squared += (inside - out) ** 2 / variance
        assert found[candidate] == pytest.approx(filtered, abs=1e-10)
        assert mu[candidate] == pytest.approx(math.sqrt(squared), abs=1e-12)


def test_log_ratio_equals_the_ratio_of_normal_densities() -> None:
    s, released = statistics_of(), np.random.default_rng(1).normal(size=ANSWERS)
    std = np.sqrt(s.variance + 0.5**2)
    densities = [
        stats.norm(mean, std).logpdf(released).sum(axis=(1, 2, 3)) for mean in (s.mean_in, s.mean_out)
    ]
    np.testing.assert_allclose(
        matched_filter_log_ratio(released, s, noise_std=0.5), densities[0] - densities[1], atol=1e-9
    )


def naive_moments(releases: Floats, member: NDArray[np.bool_]) -> tuple[Floats, Floats, Floats]:
    means_in, means_out, variances = [], [], []
    for candidate in range(member.shape[1]):
        inside, outside = releases[member[:, candidate]], releases[~member[:, candidate]]
        squares = ((inside - inside.mean(0)) ** 2).sum(0) + ((outside - outside.mean(0)) ** 2).sum(0)
        means_in.append(inside.mean(0))
        means_out.append(outside.mean(0))
        variances.append(squares / (len(releases) - 2))
    return np.array(means_in), np.array(means_out), np.array(variances)


def test_statistics_of_runs_equal_their_twin() -> None:
    rng = np.random.default_rng(2)
    member = np.argsort(rng.random((12, 7)), axis=0) < 5
    releases = 100 + rng.normal(size=(12, *ANSWERS))
    found = ReleaseStatistics.from_runs(releases, member)
    for ours, twin in zip(
        (found.mean_in, found.mean_out, found.variance), naive_moments(releases, member), strict=True
    ):
        np.testing.assert_allclose(ours, twin, atol=1e-9)


@pytest.mark.parametrize("noise_std", [0.0, 2.0])
def test_on_the_ideal_gaussian_channel_the_filter_has_the_power_that_theory_gives(noise_std: float) -> None:
    """4,000 releases a side; each tolerance is 4 standard errors: false alarm of a fresh seed under 10^-3.

    The filter that ignores the entries' differing variances fails the same check by ten standard errors.
    """
    statistics = statistics_of(candidates=1, shift=0.35, seed=3)
    # One loud entry in two: an even weighting would drown in it.
    loud = np.where(np.arange(ANSWERS[0])[:, np.newaxis, np.newaxis] % 2 == 0, 100.0, 1.0)
    statistics = ReleaseStatistics(statistics.mean_in, statistics.mean_out, statistics.variance * loud)
    mu = float(matched_filter_mu(statistics, noise_std=noise_std)[0])
    rng = np.random.default_rng(4)
    std = np.sqrt(statistics.variance + noise_std**2)
    draws = std * rng.normal(size=(2, 4_000, *ANSWERS))
    inside, outside = draws[0] + statistics.mean_in, draws[1] + statistics.mean_out
    scores = [
        np.array([matched_filter(one, statistics, noise_std=noise_std)[0] for one in side])
        for side in (inside, outside)
    ]
    reach = 4 / math.sqrt(4_000)
    assert scores[0].mean() == pytest.approx(mu**2, abs=mu * reach)
    assert scores[1].mean() == pytest.approx(0.0, abs=mu * reach)
    assert scores[1].std() == pytest.approx(mu, rel=reach / math.sqrt(2))
    best = stats.norm.cdf(mu / math.sqrt(2))
    error = math.sqrt(1 / (6 * 4_000))
    assert area(*scores) == pytest.approx(best, abs=4 * error)
    even = statistics.mean_in - statistics.mean_out
    blunt = [(side * even).sum(axis=(1, 2, 3)) for side in (inside, outside)]
    if noise_std == 0:
        assert area(*blunt) < best - 10 * error


def test_the_filter_learned_from_runs_finds_the_members() -> None:
    """200 shadow runs, 40 candidates in or out of each and of 20 targets: 0.92 on average (s.e. 0.01)."""
    rng = np.random.default_rng(5)
    influence = 0.25 * rng.normal(size=(40, *ANSWERS))
    member = rng.random((201, 40)) < 0.5
    releases = np.tensordot(member.astype(float), influence, 1) + 0.3 * rng.normal(size=(201, *ANSWERS))
    statistics = ReleaseStatistics.from_runs(releases[1:], member[1:])
    areas = []
    for _ in range(20):
        inside = rng.random(40) < 0.5
        released = np.tensordot(inside.astype(float), influence, 1) + 0.3 * rng.normal(size=ANSWERS)
        scores = matched_filter_log_ratio(released, statistics, noise_std=0.0)
        areas.append(area(scores[inside], scores[~inside]))
    assert np.mean(areas) > 0.88


def test_a_candidate_is_scored_alike_alone_and_among_others() -> None:
    s, released = statistics_of(), np.random.default_rng(1).normal(size=ANSWERS)
    together = matched_filter(released, s, noise_std=1.0)
    for c in range(5):
        alone = ReleaseStatistics(s.mean_in[[c]], s.mean_out[[c]], s.variance[[c]])
        assert matched_filter(released, alone, noise_std=1.0)[0] == pytest.approx(together[c])


def test_more_channel_noise_never_helps() -> None:
    s = statistics_of()
    mus = [matched_filter_mu(s, noise_std=std) for std in (0.0, 0.5, 5.0, 1e6)]
    assert all((quieter > louder).all() for quieter, louder in pairwise(mus))
    assert (mus[-1] < 1e-4).all()


def test_a_release_without_any_spread_still_scores() -> None:
    s = ReleaseStatistics(np.ones((1, 2)), np.array([[1.0, 0.0]]), np.zeros(2))
    assert (
        matched_filter([1.0, 1.0], s, noise_std=0.0)[0] > matched_filter([1.0, 0.0], s, noise_std=0.0)[0] == 0
    )


def test_releases_that_do_not_fit_are_refused() -> None:
    s, ok = statistics_of(), np.zeros((5, *ANSWERS))
    for wrong in (
        (ok, ok[1:], ok),
        (ok, ok, ok - 1),
        (ok, ok, np.zeros(5)),
        (ok * math.nan, ok, ok),
        (np.zeros(3), np.zeros(3), np.zeros(3)),
    ):
        with pytest.raises(InputError):
            ReleaseStatistics(*wrong)
    for released in (np.zeros((6, 4)), np.zeros((1, 4, 3)), 0.5):
        with pytest.raises(InputError, match="released"):
            matched_filter(released, s, noise_std=1.0)
    for std in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="noise_std"):
            matched_filter(np.zeros(ANSWERS), s, noise_std=std)
    releases = np.zeros((4, *ANSWERS))
    for member in (np.ones((4, 2), bool), np.zeros((4, 2), bool), np.zeros((3, 2), bool), np.zeros((4, 2))):
        with pytest.raises(InputError):
            ReleaseStatistics.from_runs(releases, member)


# Whitened filter


def left_out_by_refitting(x: Floats, wanted: Floats, shrinkage: float) -> Floats:
    """Each run's output, less the constant, under the ridge regression of all other runs."""
    n = len(x)
    ridge = shrinkage * ((x - x.mean(axis=0)) ** 2).sum() / n
    outputs = np.empty_like(wanted)
    for run in range(n):
        rest = np.arange(n) != run
        centre, mean = x[rest].mean(axis=0), wanted[rest].mean(axis=0)
        away = x[rest] - centre
        inverse = np.linalg.inv(away.T @ away + ridge * np.eye(x.shape[1]))
        outputs[run] = (x[run] - centre) @ inverse @ away.T @ (wanted[rest] - mean)
    return outputs


@pytest.mark.parametrize("shrinkage", [0.01, 1.0])
def test_left_out_outputs_equal_those_of_refitting(shrinkage: float) -> None:
    rng = np.random.default_rng(0)
    x, wanted = rng.normal(size=(14, 30)) * 3 + 5, (rng.random((14, 4)) < 0.5).astype(float)
    found = _Span.of(x).fit(wanted, shrinkage).left_out
    np.testing.assert_allclose(found, left_out_by_refitting(x, wanted, shrinkage), atol=1e-9)


def test_whitening_finds_members_where_entries_move_together() -> None:
    """Two loud common directions hide 20 candidates' influence from a filter that takes entries one by one.

    160 shadow runs, 25 targets: 500 guesses, a standard error of 0.025 at most; 0.9 against 0.6 are 12 apart.
    """
    rng = np.random.default_rng(1)
    influence, common = 0.5 * rng.normal(size=(20, 60)), 8 * rng.normal(size=(2, 60))

    def runs(count: int) -> tuple[Floats, NDArray[np.bool_]]:
        member = rng.random((count, 20)) < 0.5
        noise = rng.normal(size=(count, 2)) @ common + 0.8 * rng.normal(size=(count, 60))
        return member @ influence + noise, member

    (released, inside), (shadows, member) = runs(25), runs(160)
    found = whitened_filter(released, shadows, member)
    statistics = ReleaseStatistics.from_runs(shadows, member)
    blunt = np.stack([matched_filter_log_ratio(one, statistics, noise_std=0.0) for one in released])
    assert area(found[inside], found[~inside]) > 0.85
    assert area(blunt[inside], blunt[~inside]) < 0.65


def test_halves_do_not_mislead_the_whitened_filter() -> None:
    """With every candidate in exactly half of the runs, a left-out run's own side shows in the others' mean.

    On these draws 0.89; with that mean left in, 0.83.
    """
    rng = np.random.default_rng(3)
    influence = 0.15 * rng.normal(size=(40, 300))
    member = rng.random((32, 40)).argsort(axis=0).argsort(axis=0) < 16
    inside = rng.random((16, 40)) < 0.5
    shadows, released = (
        coins @ influence + 0.5 * rng.normal(size=(len(coins), 300)) for coins in (member, inside)
    )
    found = whitened_filter(released, shadows, member)
    assert area(found[inside], found[~inside]) > 0.86


def test_the_whitened_filter_finds_nothing_where_nothing_is() -> None:
    """1,000 guesses without signal leave 0.5 by 0.1 in fewer than 10^-7 of all seeds."""
    rng = np.random.default_rng(2)
    inside, member = rng.random((50, 20)) < 0.5, rng.random((32, 20)) < 0.5
    found = whitened_filter(rng.normal(size=(50, 200)), rng.normal(size=(32, 200)), member)
    assert abs(area(found[inside], found[~inside]) - 0.5) < 0.1


def test_runs_that_do_not_fit_are_refused() -> None:
    runs = np.random.default_rng(0).normal(size=(8, 5))
    member = np.arange(8)[:, None] % 2 == np.arange(3) % 2
    whitened_filter(runs[:2], runs, member)
    for wrong in (
        (runs[:2, :4], runs, member),
        (runs[:2], runs, member[:7]),
        (runs[:2], runs, member.astype(float)),
        (runs[:2], runs[:3], member[:3]),
        (runs[:2], np.ones((8, 5)), member),
        (runs[:2], runs * math.nan, member),
        (runs[:2], runs, np.ones((8, 3), dtype=bool)),
    ):
        with pytest.raises(InputError):
            whitened_filter(*wrong)


# Label distribution


def shifted_answers(
    shares: Floats, prior: Floats, queries: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Bayes-optimal logits of devices with ``shares`` and of the reference, each row moved by a constant."""
    evidence = rng.normal(size=(queries, len(prior)))
    answers = evidence + np.log(shares)[:, np.newaxis, :] + rng.normal(size=(len(shares), queries, 1))
    return answers, evidence + np.log(prior) + rng.normal(size=(queries, 1))


def test_label_distribution_is_exact_for_bayes_optimal_models() -> None:
    rng = np.random.default_rng(0)
    shares, prior = rng.dirichlet(np.full(5, 0.3), size=8), rng.dirichlet(np.full(5, 3.0))
    found = label_distribution(*shifted_answers(shares, prior, 30, rng), prior)
    np.testing.assert_allclose(found, shares, atol=1e-12)
    assert (label_divergence(shares, found) < 1e-12).all()


def test_label_distribution_equals_its_twin() -> None:
    rng = np.random.default_rng(1)
    answers, reference, prior = (
        rng.normal(size=(3, 6, 4)),
        rng.normal(size=(6, 4)),
        np.array([0.1, 0.2, 0.3, 0.4]),
    )
    found = label_distribution(answers, reference, prior)
    for device in range(3):
        weights = [
            prior[y] * math.exp(sum(answers[device, q, y] - reference[q, y] for q in range(6)) / 6)
            for y in range(4)
        ]
        np.testing.assert_allclose(found[device], np.array(weights) / sum(weights), atol=1e-12)


def test_queries_average_the_noise_away_until_it_is_device_level() -> None:
    """Noise of 2 on 1,000 queries hides little, noise of 200 all that the prior does not tell."""
    rng = np.random.default_rng(2)
    shares, prior = rng.dirichlet(np.full(5, 0.5), size=50) * 0.95 + 0.01, np.full(5, 0.2)
    answers, reference = shifted_answers(shares, prior, 1_000, rng)
    blind = label_divergence(shares, np.tile(prior, (50, 1))).mean()
    quiet, loud = (
        label_divergence(
            shares, label_distribution(answers + std * rng.normal(size=answers.shape), reference, prior)
        ).mean()
        for std in (2.0, 200.0)
    )
    assert quiet < 0.05 * blind
    assert loud > blind


def test_divergence_known_answers() -> None:
    found = label_divergence([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
    np.testing.assert_allclose(found, [0.0, math.log(2), math.inf])


def test_histograms_that_are_none_are_refused() -> None:
    answers, reference, prior = np.zeros((2, 3, 2)), np.zeros((3, 2)), np.array([0.5, 0.5])
    wrong: list[tuple[Any, Any, Any]] = [
        (answers[0], reference, prior),
        (answers, reference[1:], prior),
        (answers, reference, [1.0, 0.0]),
        (answers, reference, [0.5, 0.6]),
        (answers, reference, [0.3, 0.3, 0.4]),
        (answers * math.nan, reference, prior),
        (answers[:, :, :1], reference[:, :1], [1.0]),
    ]
    for given in wrong:
        with pytest.raises(InputError):
            label_distribution(*given)
    for true, guess in (
        ([[0.5, 0.6]], [[0.5, 0.5]]),
        ([[1.5, -0.5]], [[0.5, 0.5]]),
        ([[0.5, 0.5]], [[1.0]]),
        ([[0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]]),
    ):
        with pytest.raises(InputError):
            label_divergence(true, guess)
