"""Confident-GNMax: its price against the exact law by enumeration, its settings, and what is learned."""

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from privkd.cloud import learn, targets_of
from privkd.config import ReverseConfig, load_config
from privkd.errors import ConfigError
from privkd.messages import Release
from privkd.plan import PublicFacts, make_plan
from privkd.privacy.events import ZCdp
from privkd.privacy.votes import (
    MAX_VOTE_SIGMA2,
    ORDERS,
    VoteRule,
    affordable_queries,
    data_dependent_rdp,
    rdp_epsilon,
    tally,
    vote_rho,
    vote_rule,
)

Floats = NDArray[np.float64]


# ---- the exact law, by enumeration ------------------------------------------------------------------


def mass(sigma2: float, reach: int) -> Floats:
    """The discrete Gaussian on ``[-reach, reach]``."""
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma2))
    found: Floats = weights / weights.sum()
    return found


def outcome_law(counts: tuple[int, ...], rule: VoteRule) -> Floats:
    """Probabilities of no consensus, then of each class, with one aggregator; ties go to the lower class."""
    assert rule.sigma2 is not None
    assert rule.threshold_sigma2 is not None
    reach = math.ceil(9 * math.sqrt(max(rule.sigma2, rule.threshold_sigma2))) + 2
    noise = mass(float(rule.threshold_sigma2), reach)
    passed = noise[np.arange(-reach, reach + 1) + max(counts) >= rule.threshold].sum()
    one = mass(float(rule.sigma2), reach)
    low, high = min(counts) - reach, max(counts) + reach
    values = np.arange(low, high + 1)
    laws = np.zeros((len(counts), len(values)))
    for k, count in enumerate(counts):
        laws[k, count - reach - low : count + reach + 1 - low] = one
    up_to = laws.cumsum(axis=1)
    below = up_to - laws
    wins = []
    for k in range(len(counts)):
        rivals = [below[j] if j < k else up_to[j] for j in range(len(counts)) if j != k]
        wins.append(np.prod([laws[k], *rivals], axis=0).sum())
    return np.array([1 - passed, *(passed * np.array(wins))])


def divergence(p: Floats, q: Floats, order: float) -> float:
    kept = p > 1e-300
    logs = order * np.log(p[kept]) + (1 - order) * np.log(np.maximum(q[kept], 1e-300))
    return float(np.logaddexp.reduce(logs) / (order - 1))


def worst(counts: tuple[int, ...], rule: VoteRule, order: float) -> float:
    """Largest Renyi divergence of one query from its neighbours: one vote less, or one more."""
    law, found = outcome_law(counts, rule), 0.0
    for k, step in itertools.product(range(len(counts)), (-1, 1)):
        other = tuple(count + step * (j == k) for j, count in enumerate(counts))
        if min(other) >= 0:
            found = max(found, divergence(law, outcome_law(other, rule), order))
    return found


CASES = [
    ((30, 3, 1), VoteRule(1, 20, Fraction(9), Fraction(9))),
    ((30, 24, 1), VoteRule(1, 20, Fraction(9), Fraction(16))),
    ((9, 8, 8), VoteRule(1, 20, Fraction(4), Fraction(4))),
    ((12, 10), VoteRule(1, 11, Fraction(9, 4), Fraction(5, 2))),
    ((60, 0, 0, 0), VoteRule(1, 40, Fraction(100), Fraction(25))),
    ((5, 5, 5), VoteRule(1, 5, Fraction(1), Fraction(1))),
]


@pytest.mark.parametrize(("counts", "rule"), CASES)
@pytest.mark.parametrize("order", [2.0, 4.0, 12.0, 40.0])
def test_prices_bound_the_exact_divergence(counts: tuple[int, ...], rule: VoteRule, order: float) -> None:
    exact = worst(counts, rule, order)
    assert rule.rho is not None
    assert exact <= float(rule.rho) * order * (1 + 1e-9)
    at = int(np.argmin(np.abs(ORDERS - order)))
    found = data_dependent_rdp(np.array([counts]), rule, parties=1)
    assert found is not None
    assert exact <= found[at] * (1 + 1e-6) + 1e-12
    assert found[at] <= float(rule.rho) * ORDERS[at] * (1 + 1e-12)


def test_the_enumeration_would_catch_a_price_too_low() -> None:
    """Its power: what a vote with twenty times the variance costs is too little."""
    counts, at = (30, 24, 1), int(np.argmin(np.abs(ORDERS - 4)))
    stated = VoteRule(1, 20, Fraction(180), Fraction(320))
    claimed = data_dependent_rdp(np.array([counts]), stated, parties=1)
    assert claimed is not None
    assert worst(counts, stated, 4.0) <= claimed[at]
    assert worst(counts, VoteRule(1, 20, Fraction(9), Fraction(16)), 4.0) > claimed[at]


def test_a_clear_consensus_costs_less_and_a_close_vote_does_not() -> None:
    rule = VoteRule(1, 60, Fraction(400), Fraction(200))
    assert rule.rho is not None
    full = float(rule.rho) * ORDERS
    clear = data_dependent_rdp(np.array([[250, 1, 0]]), rule, 2)
    close = data_dependent_rdp(np.array([[126, 125, 0]]), rule, 2)
    nothing = data_dependent_rdp(np.array([[0, 0, 0]]), VoteRule(1, 200, Fraction(400), Fraction(200)), 2)
    assert clear is not None
    assert close is not None
    assert nothing is not None
    at = int(np.argmin(np.abs(ORDERS - 8)))
    assert clear[at] < 1e-3 * full[at]
    assert nothing[at] < 1e-3 * full[at]
    np.testing.assert_allclose(close, full)
    both = data_dependent_rdp(np.array([[250, 1, 0], [126, 125, 0]]), VoteRule(2, 60, rule.threshold_sigma2,
                                                                              rule.sigma2), 2)  # fmt: skip
    assert both is not None
    np.testing.assert_allclose(both, clear + close)
    assert data_dependent_rdp(np.array([[1, 2]]), VoteRule(1, 1, None, None), 2) is None


def test_the_conversion_is_that_of_zcdp() -> None:
    from privkd.privacy.accounting import price

    for rho in (0.01, 0.3, 2.0):
        mine = rdp_epsilon(rho * ORDERS, 1e-5)
        exact = price([ZCdp(rho)], 1e-5).high
        assert exact <= mine * (1 + 1e-6)
        assert mine <= 1.002 * exact


# ---- the rule and the tally -------------------------------------------------------------------------


@given(
    devices=st.integers(1, 10**4),
    queries=st.integers(1, 5000),
    rho=st.floats(1e-3, 50),
    share=st.floats(0.01, 0.99),
    threshold=st.floats(0.01, 1),
)
def test_a_rule_costs_what_it_may_and_hardly_less(
    devices: int, queries: int, rho: float, share: float, threshold: float
) -> None:
    rule = vote_rule(devices=devices, queries=queries, rho=rho, threshold=threshold, threshold_share=share)
    assert rule.rho is not None
    assert rule.threshold_sigma2 is not None
    assert rule.sigma2 is not None
    assert rule.rho <= Fraction(rho)
    # Variances are rounded up by less than 1/1024, which shows where there is next to no noise.
    assert float(rule.rho) >= rho * (1 - 1 / 1024 / float(min(rule.sigma2, rule.threshold_sigma2)))
    assert rule.rho == vote_rho(queries, rule.threshold_sigma2, rule.sigma2)
    assert devices * threshold - 1e-6 <= rule.threshold < devices * threshold + 1


def test_without_noise_or_with_too_much_of_it() -> None:
    rule = vote_rule(devices=5, queries=9, rho=None, threshold=0.6, threshold_share=0.5)
    assert (rule.threshold, rule.rho, rule.sigma2) == (3, None, None)
    with pytest.raises(ConfigError, match="raise the device budget"):
        vote_rule(devices=5, queries=10**9, rho=1e-9, threshold=0.6, threshold_share=0.5)
    assert vote_rho(1, MAX_VOTE_SIGMA2, MAX_VOTE_SIGMA2) > 0


@pytest.mark.parametrize("devices", [1, 5, 100, 1000])
def test_affordable_queries_keep_the_noise_under_a_fifth_of_the_devices(devices: int) -> None:
    queries = affordable_queries(devices=devices, parties=2, rho=0.4, threshold_share=0.5)
    for asked, kept in ((queries, True), (2 * queries + 2, False)):
        rule = vote_rule(devices=devices, queries=asked, rho=0.4, threshold=0.6, threshold_share=0.5)
        assert rule.sigma2 is not None
        within = math.sqrt(2 * rule.sigma2) <= 0.2 * devices * 1.01
        assert within == kept or queries == 1


def test_the_tally_is_the_loop() -> None:
    rng = np.random.default_rng(0)
    votes, scores = rng.integers(-5, 6, (2, 500, 4))
    won = tally(votes, scores, 3)
    for row, score, outcome in zip(votes, scores, won, strict=True):
        expected = [False] * 4
        if max(score) >= 3:
            expected[list(row).index(max(row))] = True
        assert outcome.tolist() == expected


# ---- settings and plan ------------------------------------------------------------------------------

FACTS = PublicFacts(devices=100, records_per_device=100, proxy=1000, classes=10)


def settings(**changes: Any) -> Any:
    return load_config(None, (), {"channel.aggregation": "votes"} | changes)


def test_votes_are_sent_and_asked_within_the_budget() -> None:
    config = settings(**{"privacy.device_epsilon": 8.0})
    assert config.channel.sends == "votes"
    assert load_config().channel.sends == "probabilities"
    plan = make_plan(config, FACTS)
    assert plan.votes is not None
    assert plan.votes.rho is not None
    assert plan.rho is not None
    assert plan.votes.queries == plan.queries
    assert plan.votes.threshold == 60
    assert plan.votes.rho <= plan.rho
    assert plan.device_event == ZCdp(plan.rho)
    assert 0.98 * 8 < plan.device.high <= 8
    assert 10 < plan.queries < 1000
    more = make_plan(settings(**{"privacy.device_epsilon": 8.0, "reverse.queries": 900}), FACTS)
    assert more.votes is not None
    assert more.votes.sigma2 is not None
    assert plan.votes.sigma2 is not None
    assert more.queries == 900
    assert more.votes.sigma2 > plan.votes.sigma2
    free = make_plan(settings(), FACTS)
    assert free.votes == VoteRule(1000, 60, None, None)
    assert math.isinf(free.device.high)
    assert make_plan(load_config(), FACTS).votes is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channel.kind": "plain"}, "are for kind 'secure'"),
        ({"channel.answers": "residuals"}, "under aggregation 'votes' devices send 'votes'"),
        ({"channel.noise_from": "devices"}, "the noise of votes is the aggregators'"),
        ({"channel.vote_threshold": 0.0}, "vote_threshold"),
        ({"channel.threshold_share": 1.0}, "threshold_share"),
        ({"channel.aggregation": "majority"}, "expected one of"),
    ],
)
def test_settings_that_make_no_vote_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(**changes)


# ---- what the teacher learns ------------------------------------------------------------------------


def mean_release(queries: Tensor, answers: Tensor, noise_std: float) -> Release:
    return Release(queries, answers, torch.zeros_like(answers), noise_std, ())


def test_only_answered_queries_are_learned() -> None:
    prior = torch.full((6, 3), 1 / 3)
    label = torch.eye(3)
    first = mean_release(torch.tensor([0, 2, 5]), torch.stack([label[1], torch.zeros(3), label[2]]), 0.0)
    second = mean_release(torch.tensor([2, 5]), torch.stack([torch.zeros(3), label[0]]), 0.0)
    targets = targets_of([first, second], prior, ReverseConfig(memory=0.5, margin=2.0))
    assert targets.queries.tolist() == [0, 5]
    assert targets.probabilities.argmax(-1).tolist() == [1, 0], "the later label weighs more"
    torch.testing.assert_close(targets.probabilities[0], label[1])
    assert targets.weights.tolist() == [1.0, 1.0]


def test_where_nothing_was_answered_nothing_is_learned() -> None:
    from privkd.cloud import PublicData
    from privkd.data.scenario import LabelledSet

    silent = mean_release(torch.tensor([0, 1]), torch.zeros(2, 3), 0.0)
    targets = targets_of([silent], torch.full((4, 3), 1 / 3), ReverseConfig())
    assert len(targets.queries) == len(targets.probabilities) == len(targets.weights) == 0
    teacher = torch.nn.Linear(2, 3)
    records = LabelledSet(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    data = PublicData(records, records, torch.zeros(4, 2))
    absorbed = learn(teacher, targets, data, ReverseConfig(), torch.Generator())
    assert absorbed.teacher is teacher
    assert absorbed.accepted == 0.0
