"""Estimators of an epsilon lower bound: known answers, slow twins, and what they refuse."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from audits.estimators import (
    BonferroniGuesses,
    BonferroniThreshold,
    FixedGuesses,
    FixedThreshold,
    SplitThreshold,
    auc,
    clopper_pearson,
    delta_of_mu,
    epsilon_lower_bound,
    epsilon_lower_bound_one_run,
    epsilon_of_mu,
    f_dp_one_run,
    gaussian,
    mu_of_epsilon,
    one_run,
    tpr_at_fpr,
)
from privkd.errors import InputError

DELTA = 1e-5
CONFUSION = [clopper_pearson, gaussian]
ONE_RUN = [one_run, f_dp_one_run]


# Known answers


@pytest.mark.parametrize(("mu", "epsilon"), [(1.0, 4.3772), (0.5, 1.9931), (2.0, 9.9973)])
def test_epsilon_of_mu_and_back(mu: float, epsilon: float) -> None:
    assert epsilon_of_mu(mu, DELTA) == pytest.approx(epsilon, abs=1e-3)
    assert mu_of_epsilon(epsilon, DELTA) == pytest.approx(mu, abs=1e-3)


@pytest.mark.parametrize(("epsilon", "mu"), [(1, 0.268), (2, 0.502), (4, 0.925), (8, 1.666)])
def test_mu_of_epsilon(epsilon: float, mu: float) -> None:
    assert mu_of_epsilon(epsilon, DELTA) == pytest.approx(mu, abs=1e-3)


@pytest.mark.parametrize(("side", "ceiling"), [(100, 3.281), (1_000, 5.601), (10_000, 7.905)])
def test_clopper_pearson_ceiling_of_a_perfect_attack(side: int, ceiling: float) -> None:
    bound = clopper_pearson(
        true_positives=side, members=side, false_positives=0, nonmembers=side, delta=DELTA
    )
    assert bound == pytest.approx(ceiling, abs=1e-3)


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "bound"),
    [
        (500, 100, 100, 3.4792),
        (500, 100, 60, 0.0507),
        (500, 35, 23, 0.0145),
        (1_000, 200, 180, 1.796),
        (5_000, 1_000, 900, 2.018),
    ],
)
def test_one_run(canaries: int, guesses: int, correct: int, bound: float) -> None:
    found = one_run(canaries=canaries, guesses=guesses, correct=correct, delta=DELTA)
    assert found == pytest.approx(bound, abs=1e-3)


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "bound"), [(1_000, 200, 180, 2.901), (5_000, 1_000, 900, 3.023)]
)
def test_f_dp_one_run(canaries: int, guesses: int, correct: int, bound: float) -> None:
    found = f_dp_one_run(canaries=canaries, guesses=guesses, correct=correct, delta=DELTA)
    assert found == pytest.approx(bound, abs=1e-3)


def test_gaussian_meets_the_mu_of_its_rates_as_the_samples_grow() -> None:
    side = 10**9
    rates = stats.norm.sf(0.5), stats.norm.sf(-0.5)
    bound = gaussian(
        true_positives=round(side * rates[1]),
        members=side,
        false_positives=round(side * rates[0]),
        nonmembers=side,
        delta=DELTA,
    )
    assert bound == pytest.approx(4.3772, abs=2e-3)
    assert bound < epsilon_of_mu(1.0, DELTA)


# Slow twins


def naive_one_run(m: int, r: int, v: int, delta: float, alpha: float) -> float:
    """Steinke et al.'s p-value term by term, and the last epsilon of a fine grid that it rejects."""
    last = 0.0
    for epsilon in np.arange(0, 6, 0.002):
        law = stats.binom(r, math.exp(epsilon) / (1 + math.exp(epsilon)))
        beta = law.sf(v - 1)
        near = max((law.cdf(v - 1) - law.cdf(v - i - 1)) / i for i in range(1, v + 1))
        if beta + 2 * m * delta * near > alpha:
            break
        last = float(epsilon)
    return last


@pytest.mark.parametrize(
    ("m", "r", "v", "delta"), [(50, 20, 19, 1e-3), (100, 40, 30, 1e-4), (30, 30, 30, 1e-5), (80, 10, 9, 0.0)]
)
def test_one_run_equals_its_term_by_term_twin(m: int, r: int, v: int, delta: float) -> None:
    twin = naive_one_run(m, r, v, delta, 0.05)
    assert one_run(canaries=m, guesses=r, correct=v, delta=delta) == pytest.approx(twin, abs=2.1e-3)


def naive_f_dp_mu(m: int, r: int, v: int, tau: float) -> float:
    """Mahloujifar et al.'s recursion without early ends, and the last mu of a grid that it rejects."""
    last = 0.0
    for mu in np.arange(0, 4, 0.005):
        h, R = tau * (r - v) / m, tau * v / m
        for i in range(v - 1, -1, -1):
            raised = max(h, float(stats.norm.cdf(stats.norm.ppf(min(R, 1.0)) - mu)))
            R += i / (r - i) * (raised - h)
            h = raised
        if not R + h > r / m:
            break
        last = float(mu)
    return last


@pytest.mark.parametrize(("m", "r", "v"), [(100, 40, 34), (60, 60, 50), (200, 20, 20), (50, 30, 14)])
def test_f_dp_one_run_equals_its_full_recursion_twin(m: int, r: int, v: int) -> None:
    found = f_dp_one_run(canaries=m, guesses=r, correct=v, delta=DELTA)
    assert mu_of_epsilon(found, DELTA) == pytest.approx(naive_f_dp_mu(m, r, v, 0.05), abs=5.1e-3)


def test_auc_and_its_delong_variance_equal_the_pairwise_twin() -> None:
    rng = np.random.default_rng(0)
    members, nonmembers = rng.integers(2, 9, 90) / 2.0, rng.integers(0, 8, 70) / 2.0
    wins = np.array([[1.0 if a > b else 0.5 if a == b else 0.0 for b in nonmembers] for a in members])
    variance = wins.mean(1).var(ddof=1) / 90 + wins.mean(0).var(ddof=1) / 70
    found = auc(members, nonmembers)
    assert found.estimate == pytest.approx(wins.mean(), abs=1e-12)
    odds = math.log(wins.mean() / (1 - wins.mean()))
    reach = 1.959964 * math.sqrt(variance) / (wins.mean() * (1 - wins.mean()))
    assert found.low <= 1 / (1 + math.exp(-odds + reach)) + 1e-9
    assert found.high >= 1 / (1 + math.exp(-odds - reach)) - 1e-9


@given(st.lists(st.integers(0, 5), min_size=20, max_size=60), st.lists(st.integers(0, 5), min_size=2))
def test_tpr_at_fpr_equals_the_twin_that_tries_every_threshold(
    nonmembers: list[int], members: list[int]
) -> None:
    found = tpr_at_fpr(members, nonmembers, 0.5)
    allowed = [
        t for t in [-1, *range(6)] if sum(n > t for n in nonmembers) <= math.floor(0.5 * len(nonmembers))
    ]
    best = max(sum(m > t for m in members) for t in allowed)
    assert found.true_positives == best
    assert found.false_positives == sum(n > found.threshold for n in nonmembers) <= 0.5 * len(nonmembers)


@pytest.mark.parametrize("signal", [0.0, 1.0, 3.0])
def test_auc_interval_covers_the_truth(signal: float) -> None:
    """95 % claimed; 92.5 % over 1,000 draws is 3.6 standard errors below: false alarm under 2 in 10^4.

    Members spread three times as wide as non-members, which Hanley and McNeil's variance does not expect.
    """
    rng = np.random.default_rng(0)
    truth = stats.norm.cdf(signal / math.sqrt(10))
    covered, width = 0, 0.0
    for _ in range(1_000):
        found = auc(signal + 3 * rng.normal(size=60), rng.normal(size=200))
        covered += found.low <= truth <= found.high
        width += (found.high - found.low) / 1_000
    assert covered >= 925
    assert width < 0.25


# Properties


@given(st.integers(1, 400), st.data())
def test_more_right_guesses_never_lower_the_bound(guesses: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, guesses - 1))
    for estimator in ONE_RUN:
        bounds = [
            estimator(canaries=2 * guesses, guesses=guesses, correct=v, delta=1e-4)
            for v in (correct, correct + 1)
        ]
        assert 0 <= bounds[0] <= bounds[1] < math.inf


@given(st.integers(1, 300), st.integers(1, 300), st.data())
def test_confusion_bounds_are_finite_and_rise_with_a_better_attack(
    members: int, nonmembers: int, data: st.DataObject
) -> None:
    hits = data.draw(st.integers(0, members - 1))
    alarms = data.draw(st.integers(0, nonmembers - 1))
    for estimator in CONFUSION:
        worse, better = (
            estimator(
                true_positives=h, members=members, false_positives=f, nonmembers=nonmembers, delta=DELTA
            )
            for h, f in ((hits, alarms + 1), (hits + 1, alarms))
        )
        assert 0 <= better < math.inf
        # An attack worse than chance is bounded by the other half of the region, which falls as it improves.
        if hits / members >= (alarms + 1) / nonmembers:
            assert worse <= better + 1e-9


@given(st.floats(0, 60), st.floats(1e-12, 0.5))
def test_mu_and_epsilon_are_inverse(epsilon: float, delta: float) -> None:
    mu = mu_of_epsilon(epsilon, delta)
    assert delta_of_mu(mu, epsilon=epsilon) == pytest.approx(delta, rel=1e-6)
    assert epsilon_of_mu(mu, delta) == pytest.approx(epsilon, abs=1e-6)


def test_higher_confidence_lowers_every_bound() -> None:
    counts: dict[str, Any] = {
        "true_positives": 80,
        "members": 100,
        "false_positives": 5,
        "nonmembers": 100,
        "delta": DELTA,
    }
    guesses: dict[str, Any] = {"canaries": 200, "guesses": 100, "correct": 85, "delta": DELTA}
    for confusion in CONFUSION:
        assert confusion(**counts, confidence=0.99) < confusion(**counts, confidence=0.9)
    for single in ONE_RUN:
        assert single(**guesses, confidence=0.99) < single(**guesses, confidence=0.9)


# Edges


def test_nothing_found_bounds_nothing() -> None:
    for confusion in CONFUSION:
        for hits, alarms in ((0, 0), (10, 10), (0, 10)):
            bound = confusion(
                true_positives=hits, members=10, false_positives=alarms, nonmembers=10, delta=DELTA
            )
            assert bound == 0.0
    for single in ONE_RUN:
        assert single(canaries=10, guesses=0, correct=0, delta=DELTA) == 0.0
        assert single(canaries=10, guesses=10, correct=0, delta=DELTA) == 0.0
        assert single(canaries=1, guesses=1, correct=1, delta=DELTA) == 0.0


def test_extreme_deltas_and_mu() -> None:
    assert clopper_pearson(
        true_positives=9, members=9, false_positives=0, nonmembers=9, delta=0.0
    ) == pytest.approx(0.6808, abs=1e-3)
    assert one_run(canaries=100, guesses=100, correct=90, delta=0.0) > one_run(
        canaries=100, guesses=100, correct=90, delta=1e-4
    )
    assert one_run(canaries=100, guesses=100, correct=90, delta=0.9) == 0.0
    assert one_run(canaries=100, guesses=100, correct=90, delta=1e-300) == pytest.approx(
        one_run(canaries=100, guesses=100, correct=90, delta=0.0)
    )
    assert epsilon_of_mu(0.0, DELTA) == 0.0
    assert epsilon_of_mu(math.inf, DELTA) == math.inf
    assert mu_of_epsilon(math.inf, DELTA) == math.inf
    assert epsilon_of_mu(1_000.0, DELTA) == pytest.approx(5e5 + 1_000 * 4.2649, rel=1e-4)


@pytest.mark.parametrize("delta", [-1e-5, 1.0, 2.0, math.nan, "x"])
def test_impossible_delta_is_refused(delta: Any) -> None:
    for confusion in CONFUSION:
        with pytest.raises(InputError, match="delta"):
            confusion(true_positives=5, members=9, false_positives=0, nonmembers=9, delta=delta)
    for single in ONE_RUN:
        with pytest.raises(InputError, match="delta"):
            single(canaries=9, guesses=5, correct=4, delta=delta)


def test_a_gaussian_curve_has_no_finite_epsilon_at_delta_zero() -> None:
    with pytest.raises(InputError, match="delta"):
        gaussian(true_positives=5, members=9, false_positives=0, nonmembers=9, delta=0.0)
    with pytest.raises(InputError, match="delta"):
        f_dp_one_run(canaries=9, guesses=5, correct=4, delta=0.0)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -0.1, 95, math.nan])
def test_impossible_confidence_is_refused(confidence: float) -> None:
    with pytest.raises(InputError, match="confidence"):
        clopper_pearson(
            true_positives=5, members=9, false_positives=0, nonmembers=9, delta=DELTA, confidence=confidence
        )
    with pytest.raises(InputError, match="confidence"):
        one_run(canaries=9, guesses=5, correct=4, delta=DELTA, confidence=confidence)


@pytest.mark.parametrize(
    "wrong",
    [
        {"true_positives": 10},
        {"true_positives": -1},
        {"false_positives": 10},
        {"members": 0, "true_positives": 0},
        {"nonmembers": 0, "false_positives": 0},
        {"members": 9.5},
        {"true_positives": None},
    ],
)
def test_impossible_counts_are_refused(wrong: dict[str, Any]) -> None:
    right = {"true_positives": 5, "members": 9, "false_positives": 0, "nonmembers": 9, "delta": DELTA}
    for confusion in CONFUSION:
        with pytest.raises(InputError) as caught:
            confusion(**(right | wrong))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [{"correct": 6}, {"guesses": 10}, {"correct": -1}, {"canaries": 0}, {"correct": 2.0}]
)
def test_impossible_guesses_are_refused(wrong: dict[str, Any]) -> None:
    right = {"canaries": 9, "guesses": 5, "correct": 4, "delta": DELTA}
    for single in ONE_RUN:
        with pytest.raises(InputError):
            single(**(right | wrong))


def test_numpy_integers_are_counts() -> None:
    hits = np.int64(9)
    assert clopper_pearson(true_positives=hits, members=hits, false_positives=0, nonmembers=9, delta=0) > 0


# Rates


def test_a_low_rate_is_refused_under_the_nonmembers_that_carry_it() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match=r"0\.1 % needs at least 10,000 non-members, got 9,999"):
        tpr_at_fpr(rng.normal(size=9_999), rng.normal(size=9_999), 0.001)
    assert tpr_at_fpr(rng.normal(size=100), rng.normal(size=10_000), 0.001).false_positives == 10
    with pytest.raises(InputError, match="1,000 non-members"):
        tpr_at_fpr(rng.normal(size=999), rng.normal(size=999), 0.01)
    for fpr in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(InputError, match="fpr"):
            tpr_at_fpr(rng.normal(size=999), rng.normal(size=999), fpr)


def test_ties_never_let_more_nonmembers_pass_than_allowed() -> None:
    found = tpr_at_fpr(np.ones(50), np.ones(1_000), 0.01)
    assert (found.true_positives, found.false_positives, found.estimate, found.low) == (0, 0, 0.0, 0.0)
    assert 0 < found.high < 0.1


def test_perfect_scores_keep_an_interval() -> None:
    found = tpr_at_fpr(np.ones(100), np.zeros(1_000), 0.01)
    assert found.estimate == found.high == 1.0
    assert found.low == pytest.approx(0.025 ** (1 / 100))
    area = auc(np.ones(100), np.zeros(100))
    assert area.estimate == area.high == 1.0
    assert 0.9 < area.low < 1.0
    mirrored = auc(np.zeros(100), np.ones(100))
    assert (mirrored.estimate, mirrored.low) == (0.0, 0.0)
    assert mirrored.high == pytest.approx(1 - area.low)


def test_infinite_scores_order_like_any_other() -> None:
    assert auc([math.inf, 1.0], [-math.inf, 0.0]).estimate == 1.0
    assert auc([math.inf, math.inf], [math.inf, math.inf]).estimate == 0.5


def test_bad_scores_are_refused() -> None:
    good = [0.0, 1.0]
    for bad in ([0.0, math.nan], [1.0], [], [[0.0, 1.0]], ["a", "b"]):
        with pytest.raises(InputError):
            auc(bad, good)
        with pytest.raises(InputError):
            tpr_at_fpr(bad, good, 0.5)
        with pytest.raises(InputError):
            epsilon_lower_bound(good, bad, rule=FixedThreshold(0.5), estimator=clopper_pearson, delta=DELTA)


# Rules


def test_fixed_threshold_counts_scores_at_the_threshold_as_members() -> None:
    found = epsilon_lower_bound(
        [1.0] * 100, [0.0] * 100, rule=FixedThreshold(1.0), estimator=clopper_pearson, delta=DELTA
    )
    assert found == pytest.approx(3.281, abs=1e-3)


@pytest.mark.parametrize("estimator", CONFUSION)
def test_constant_scores_bound_nothing(estimator: Any) -> None:
    for rule in (FixedThreshold(0.0), SplitThreshold(0), BonferroniThreshold(8)):
        assert epsilon_lower_bound([0.0] * 50, [0.0] * 50, rule=rule, estimator=estimator, delta=DELTA) == 0


@pytest.mark.parametrize("estimator", ONE_RUN)
def test_position_of_tied_canaries_reveals_nothing(estimator: Any) -> None:
    member = np.arange(400) < 200
    for rule in (FixedGuesses(100), BonferroniGuesses((50, 100, 400))):
        found = epsilon_lower_bound_one_run(
            np.zeros(400), member, rule=rule, estimator=estimator, delta=DELTA
        )
        assert found < 0.5  # guessing by position would be right every time: above 3


def test_guesses_are_the_extremes_half_each() -> None:
    scores, member = np.arange(40.0), np.arange(40) >= 20
    for count in (1, 2, 9, 40):
        found = epsilon_lower_bound_one_run(
            scores, member, rule=FixedGuesses(count), estimator=one_run, delta=DELTA
        )
        assert found == one_run(canaries=40, guesses=count, correct=count, delta=DELTA)
    assert (
        epsilon_lower_bound_one_run(scores, member, rule=FixedGuesses(0), estimator=one_run, delta=DELTA) == 0
    )


def test_rules_pay_for_their_choice() -> None:
    scores, member = np.arange(40.0), np.arange(40) >= 20
    several = epsilon_lower_bound_one_run(
        scores, member, rule=BonferroniGuesses((10, 40)), estimator=one_run, delta=DELTA
    )
    assert several == one_run(canaries=40, guesses=40, correct=40, delta=DELTA, confidence=0.975)
    tried = epsilon_lower_bound(
        np.ones(100) + np.arange(100),
        np.zeros(100),
        rule=BonferroniThreshold(5),
        estimator=clopper_pearson,
        delta=DELTA,
    )
    assert (
        tried
        < clopper_pearson(
            true_positives=100, members=100, false_positives=0, nonmembers=100, delta=DELTA, confidence=0.99
        )
        + 1e-12
    )


def test_bad_rules_are_refused() -> None:
    scores, member = np.arange(40.0), np.arange(40) >= 20
    for make in (
        lambda: SplitThreshold(0, share=0.0),
        lambda: SplitThreshold(0, share=1.0),
        lambda: SplitThreshold(-1),
        lambda: BonferroniThreshold(0),
        lambda: FixedGuesses(-1),
        lambda: BonferroniGuesses(()),
    ):
        with pytest.raises(InputError):
            make()
    unknown: Any = "best"
    with pytest.raises(InputError, match="rule"):
        epsilon_lower_bound(scores, scores, rule=unknown, estimator=gaussian, delta=DELTA)
    with pytest.raises(InputError, match="rule"):
        epsilon_lower_bound_one_run(scores, member, rule=unknown, estimator=one_run, delta=DELTA)
    with pytest.raises(InputError, match="threshold"):
        epsilon_lower_bound(scores, scores, rule=FixedThreshold(math.nan), estimator=gaussian, delta=DELTA)
    with pytest.raises(InputError, match="guesses=41"):
        epsilon_lower_bound_one_run(scores, member, rule=FixedGuesses(41), estimator=one_run, delta=DELTA)


def test_membership_without_a_fair_coin_is_refused() -> None:
    for member in (np.ones(40, bool), np.arange(40), np.ones(39, bool)):
        with pytest.raises(InputError, match="member"):
            epsilon_lower_bound_one_run(
                np.arange(40.0), member, rule=FixedGuesses(10), estimator=one_run, delta=DELTA
            )


def test_two_samples_a_side_are_enough_to_say_nothing() -> None:
    for rule in (FixedThreshold(0.5), SplitThreshold(0), BonferroniThreshold(3)):
        assert epsilon_lower_bound([1, 2], [0, 0], rule=rule, estimator=clopper_pearson, delta=DELTA) == 0
