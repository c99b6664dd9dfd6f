"""What bounds a run from below, and how much anyone may rebuild of what its events touched.

A lower bound is what an audit proves of a run, to stand beside what the ledger promises.

Reconstruction robustness: an adversary whose prior gives a blind guess the success ``kappa`` rebuilds its
target with probability of at most ``sup {P(E) : Q(E) <= kappa}``, where ``P`` is the law of the release with
the target and ``Q`` without it (Balle, Cherubin and Hayes 2022; Hayes, Mahloujifar and Balle 2023, Theorem
2). That is ``1 - f(kappa)`` for the trade-off curve ``f``; it is concave in ``kappa``, and so it also holds
on average over a prior. Neighbouring relation: that of the events, with and without the target.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import StrictBool
from scipy.optimize import minimize_scalar
from scipy.special import ndtr, ndtri

from privkd.errors import InputError
from privkd.journal import Journal
from privkd.privacy.accounting import Composition, compose, delta_curve, upper_bound
from privkd.privacy.events import PrivacyEvent, Unit
from privkd.records import Count, Real, Record, record_of


@dataclass(frozen=True)
class LowerBound:
    """What an audit of the run's mechanisms proves: that it spends at least ``epsilon`` on ``unit``.

    It is wrong with probability ``1 - confidence`` at most, and rests on ``canaries`` trials, which took the
    ``path`` named in words; the delta and the neighbouring relation are those of the ledger's statement for
    the unit.
    """

    unit: Unit
    epsilon: Real
    confidence: Real
    canaries: Count
    path: str

    def alarm(self, epsilon_upper: float, delta: float) -> str | None:
        """The alarm in words, where the bound lies above the ledger's upper bound."""
        if self.epsilon <= epsilon_upper:
            return None
        words = crossed(self.unit, self.epsilon, epsilon_upper, confidence=self.confidence, delta=delta)
        return f"canaries through the run's own mechanism: {words}"


@dataclass(frozen=True)
class Check:
    """A yes-or-no question put to a running mechanism: its ``name``, whether it ``passed``, what was seen."""

    name: str
    passed: StrictBool
    seen: str


@dataclass(frozen=True)
class Audited:
    """What the audit of a run came to: lower ``bounds`` by unit, and ``checks`` of its mechanisms."""

    bounds: tuple[LowerBound, ...] = ()
    checks: tuple[Check, ...] = ()


class _Note(Record):
    """What an audit came to, in a run's journal."""

    step: Literal["audited"] = "audited"
    bounds: tuple[LowerBound, ...]
    checks: tuple[Check, ...]


def note_audit(journal: Journal, audited: Audited) -> None:
    """Note in a run's journal what its audit came to. Durable on return."""
    journal.append(_Note(bounds=audited.bounds, checks=audited.checks).tree())


def noted_audit(journal: Journal) -> Audited | None:
    """What a run's journal says that its audit came to, if it was audited.

    Raises:
        RunError: the note is not of this version's form.
    """
    row = next((row for row in journal if row.get("step") == "audited"), None)
    if row is None:
        return None
    note = record_of(_Note, row, journal.path)
    return Audited(note.bounds, note.checks)


def failure(checks: Iterable[Check]) -> str | None:
    """The first of the checks that failed, if any did, in words."""
    for check in checks:
        if not check.passed:
            return f"the check {check.name!r} fails: {check.seen}; do not release, the mechanism is broken"
    return None


def crossed(unit: Unit, lower: float, upper: float, *, confidence: float, delta: float) -> str:
    """A lower bound above its upper bound, in words."""
    return (
        f"epsilon is at least {lower:.4g} per {unit} (confidence {100 * confidence:.4g} %), but the ledger "
        f"claims at most {upper:.4g} at delta {delta:g}"
    )


_LEAST_DELTA = 1e-15
_ROUNDING = 1e-9
_LEAST_EPSILON, _POINTS = -20.0, 2000
_LARGEST_EXPONENT = 700.0


def reconstruction_ceiling(events: Sequence[PrivacyEvent], kappa: float) -> float:
    """Upper bound on the probability of a successful reconstruction, in ``[kappa, 1]``.

    Exact for Gaussian mechanisms without sampling: ``Phi(Phi^-1(kappa) + mu)``. For all others, the least of
    ``e^epsilon kappa + delta`` over the pairs that the accountant proves, and for zCDP also of
    ``exp(-(sqrt(log 1/kappa) - sqrt(rho))^2)``, which a Renyi divergence of ``alpha rho`` at every order
    allows. No events leave ``kappa``, a release without privacy 1.

    Args:
        events: all that was released of one party's unit.
        kappa: success of the best guess without the release, such as 1/10 for ten equally likely candidates.

    Raises:
        InputError: ``kappa`` outside (0, 1), an impossible parameter, or an unknown kind of event.
    """
    if not 0 < kappa < 1:
        raise InputError(f"kappa={kappa!r}: expected a probability strictly between 0 and 1")
    composed = compose(events)
    if composed.infinite:
        return 1.0
    if not composed.sampled and not composed.rho:
        return float(ndtr(ndtri(kappa) + math.sqrt(composed.mu_squared)))
    ceiling = _from_curve(events, kappa)
    if ceiling >= 1:
        ceiling = min(_from_pairs(events, kappa), _from_renyi(composed, kappa))
    return min(1.0, max(kappa, ceiling * (1 + _ROUNDING)))


def _from_curve(events: Sequence[PrivacyEvent], kappa: float) -> float:
    """min over epsilon of e^epsilon kappa + delta(epsilon); any epsilon, even below 0, gives a bound."""
    epsilons = np.linspace(_LEAST_EPSILON, -math.log(kappa), _POINTS)
    return float((np.exp(epsilons) * kappa + delta_curve(events, epsilons)).min())


def _from_pairs(events: Sequence[PrivacyEvent], kappa: float) -> float:
    """The same over the epsilons that the accountant proves at each delta."""

    def bound(log_delta: float) -> float:
        delta = math.exp(log_delta)
        return math.exp(min(upper_bound(events, delta) + math.log(kappa), _LARGEST_EXPONENT)) + delta

    limits = (math.log(_LEAST_DELTA), math.log1p(-kappa))
    best = minimize_scalar(bound, bounds=limits, method="bounded", options={"xatol": 1e-2})
    return float(best.fun)


def _from_renyi(composed: Composition, kappa: float) -> float:
    rho, surprise = composed.rho + composed.mu_squared / 2, -math.log(kappa)
    if composed.sampled or rho >= surprise:
        return 1.0
    return math.exp(-((math.sqrt(surprise) - math.sqrt(rho)) ** 2))
