"""What an audit proves of a run, to stand beside what the ledger promises."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pydantic import StrictBool

from privkd.journal import Journal
from privkd.privacy.events import Unit
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
