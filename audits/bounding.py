"""Lower bounds by every estimator, each beside what it assumes and whether that is known of the scores."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from audits.estimators import (
    BandGuesses,
    BandThreshold,
    BonferroniGuesses,
    ConfusionEstimator,
    GuessRule,
    clopper_pearson,
    epsilon_lower_bound,
    epsilon_lower_bound_one_run,
    f_dp_one_run,
    gaussian,
    gaussian_pair,
    one_run,
    tpr_at_fpr,
)
from audits.estimators.guess_band import numbers_of_guesses
from audits.estimators.rates import TprAtFpr
from audits.estimators.validation import checked_confidence, checked_delta
from audits.findings import Bound, Refused
from audits.tables import Scored
from privkd.errors import InputError

COINS = "a fair coin decided each membership"
INDEPENDENT = "scores are independent of each other"
CURVE = "the mechanism is Gaussian"
PAIR = "each side's scores are normal, of one variance"


@dataclass(frozen=True)
class Claim:
    """What is claimed of the mechanism behind the scores, and what is known of them.

    Attributes:
        epsilon: the upper bound; infinite where nothing is claimed.
        delta: of both bounds.
        independent: each score has nothing to do with the others: from a run of its own, or of canaries that
            do not meet.
        gaussian: the mechanism is claimed to be exactly Gaussian (mu-GDP), such as full-batch DP-SGD.
        confidence: with which all bounds that count hold together.

    Raises:
        InputError: ``epsilon`` is negative or NaN, or a level lies outside (0, 1).
    """

    epsilon: float = math.inf
    delta: float = 1e-5
    independent: bool = False
    gaussian: bool = False
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise InputError(f"epsilon={self.epsilon!r}: give a number of at least 0")
        checked_delta(self.delta, zero_allowed=False)
        checked_confidence(self.confidence)

    def grants(self, assumptions: Iterable[str]) -> bool:
        """Whether all of them are known, or tested on the scores themselves."""
        known = {COINS: True, INDEPENDENT: self.independent, CURVE: self.gaussian, PAIR: True}
        return all(known[assumption] for assumption in assumptions)


def claimed(
    epsilon: float | None,
    delta: float | None,
    *,
    independent: bool = False,
    gaussian: bool = False,
    confidence: float = 0.95,
) -> Claim:
    """The claim; without an ``epsilon`` nothing is claimed.

    Raises:
        InputError: as `Claim`, or there is an ``epsilon`` without a ``delta``.
    """
    if delta is None and epsilon is not None:
        raise InputError(f"epsilon={epsilon:g} without its delta: a claim is a pair, such as with delta 1e-5")
    epsilon = math.inf if epsilon is None else epsilon
    return Claim(epsilon, Claim.delta if delta is None else delta, independent, gaussian, confidence)


def counting(claim: Claim) -> int:
    """How many bounds of one attack count under what ``claim`` knows of the scores."""
    return sum(claim.grants(estimator.assumes) for estimator in _ESTIMATORS)


def bounds_of(scored: Scored, claim: Claim, confidence: float) -> tuple[Bound, ...]:
    """By every estimator, each with ``confidence``."""
    return tuple(_bound(estimator, scored, claim, confidence) for estimator in _ESTIMATORS)


def pair_bound(scored: Scored, delta: float, confidence: float) -> Bound:
    """That of the Gaussian pair alone, which stands beside another bound and counts for nothing."""
    return _bound(_PAIR, scored, Claim(delta=delta), confidence)


def rate_or_refusal(scored: Scored, fpr: float) -> TprAtFpr | Refused:
    """The true-positive rate, or why so few samples do not carry it."""
    try:
        return tpr_at_fpr(scored.members, scored.nonmembers, fpr)
    except InputError as error:
        return Refused(fpr, str(error))


class _Estimated(NamedTuple):
    """A lower bound, and what the estimator's own tests found, in words."""

    epsilon: float
    tested: str | None = None


class _Estimator(NamedTuple):
    name: str
    assumes: tuple[str, ...]
    estimate: Callable[[Scored, float, float], _Estimated]


def _bound(estimator: _Estimator, scored: Scored, claim: Claim, confidence: float) -> Bound:
    counts, words = claim.grants(estimator.assumes), "; ".join(estimator.assumes)
    try:
        found = estimator.estimate(scored, claim.delta, confidence)
    except InputError as error:
        return Bound(estimator.name, words, None, counts, str(error))
    return Bound(estimator.name, words, found.epsilon, counts, found.tested)


def _one_run(scored: Scored, delta: float, confidence: float) -> _Estimated:
    m = len(scored.values)
    # A band is the tighter rule as far as delta lets it reach.
    reach = int(numbers_of_guesses(m, delta, 1 - confidence)[-1])
    rule: GuessRule = BandGuesses() if 16 * reach >= m else _three_numbers(m, (100, 20, 4))
    found = epsilon_lower_bound_one_run(
        scored.values, scored.inside, rule=rule, estimator=one_run, delta=delta, confidence=confidence
    )
    return _Estimated(found)


def _f_dp_one_run(scored: Scored, delta: float, confidence: float) -> _Estimated:
    rule = _three_numbers(len(scored.values), (50, 10, 3))
    found = epsilon_lower_bound_one_run(
        scored.values, scored.inside, rule=rule, estimator=f_dp_one_run, delta=delta, confidence=confidence
    )
    return _Estimated(found)


def _three_numbers(samples: int, parts: tuple[int, ...]) -> BonferroniGuesses:
    return BonferroniGuesses(tuple(sorted({max(2, samples // part) for part in parts})))


def _clopper_pearson(scored: Scored, delta: float, confidence: float) -> _Estimated:
    return _by_threshold(clopper_pearson, scored, delta, confidence)


def _gaussian(scored: Scored, delta: float, confidence: float) -> _Estimated:
    return _by_threshold(gaussian, scored, delta, confidence)


def _by_threshold(
    estimator: ConfusionEstimator, scored: Scored, delta: float, confidence: float
) -> _Estimated:
    members, nonmembers, rule = scored.members, scored.nonmembers, BandThreshold()
    return _Estimated(
        epsilon_lower_bound(
            members, nonmembers, rule=rule, estimator=estimator, delta=delta, confidence=confidence
        )
    )


def _gaussian_pair(scored: Scored, delta: float, confidence: float) -> _Estimated:
    found = gaussian_pair(scored.members, scored.nonmembers, delta=delta, confidence=confidence)
    tested = f"tested: normal (p = {found.normal:.2g}), of one variance (p = {found.equal_spread:.2g})"
    return _Estimated(found.epsilon, tested)


_PAIR = _Estimator("gaussian_pair", (INDEPENDENT, CURVE, PAIR), _gaussian_pair)
_ESTIMATORS = (
    _Estimator("one_run", (COINS,), _one_run),
    _Estimator("clopper_pearson", (INDEPENDENT,), _clopper_pearson),
    _Estimator("f_dp_one_run", (COINS, CURVE), _f_dp_one_run),
    _Estimator("gaussian", (INDEPENDENT, CURVE), _gaussian),
    _PAIR,
)
