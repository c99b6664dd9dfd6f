"""The one place that books what was done to private data, and refuses what a budget forbids.

A charge is on the disk before ``debit`` returns, so a release that follows it is never unaccounted for.
Budgets are per unit and hold for each party by itself: parties hold disjoint data, so what a run spent on
a unit is its worst party's epsilon (parallel composition). Epsilons of different units protect against
different things; nothing here combines them.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeAlias

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError, computed_field

from privkd.errors import BudgetError, InputError, PrivkdError, RunError
from privkd.journal import Head, Journal
from privkd.privacy.accounting import Bound, compose, price, upper_bound
from privkd.privacy.bounds import LowerBound
from privkd.privacy.events import (
    Batch,
    Budget,
    BudgetChange,
    Charge,
    DpSgd,
    Key,
    LedgerHeader,
    NoPrivacy,
    PartyId,
    PostProcessing,
    PrivacyEvent,
    Unit,
    ZCdp,
)
from privkd.records import Count, Real, Record, faults

__all__ = ["Budget", "Charge", "Ledger", "Statement"]


class Statement(Record):
    """What was spent on ``unit``, against what, how that was computed, and what an audit proves beside it.

    Attributes:
        high: upper bound on epsilon, of the ``party``: the worst one where the row speaks for several.
        low: no analysis of the same events can claim less; ``estimate`` is the accountant's own answer.
        lower_bound: what the audit of the run's own mechanism proves, where there was one.
        delta: of all bounds.
        budget: the epsilon that was allowed.
        parties: how many parties the row speaks for.
        charges: number of the party's events, free ones included.
        method: how its events were composed.
        reasons: why there is no guarantee, where there is none.
        party: ``None`` where nobody was charged. It is not written: the parties' names are the journal's.
    """

    unit: Unit
    high: Real = Field(alias="epsilon")
    low: Real = Field(alias="epsilon_low")
    estimate: Real = Field(alias="epsilon_estimate")
    lower_bound: LowerBound | None = None
    delta: Real
    budget: Real
    parties: Count
    charges: Count
    method: str
    reasons: tuple[str, ...]
    party: PartyId | None = Field(default=None, exclude=True)

    @property
    def epsilon(self) -> Bound:
        """All that is known of the epsilon that was spent."""
        return Bound(self.low, self.estimate, self.high, self.method)

    @computed_field
    @property
    def neighbouring_relation(self) -> str:
        """In words."""
        return self.unit.neighbouring_relation

    @property
    def alarm(self) -> str | None:
        """In words, where the lower bound lies above the upper one."""
        return self.lower_bound.alarm(self.high, self.delta) if self.lower_bound else None


def _from_units(given: Any) -> Any:
    """Statements from their mapping; those of version 0.1.0 name their unit nowhere else."""
    if not isinstance(given, Mapping):
        return given
    rows = []
    for unit, row in given.items():
        lower = row["lower_bound"]
        rows.append({"unit": unit} | row | {"lower_bound": lower and {"unit": unit} | lower})
    return tuple(rows)


Statements: TypeAlias = Annotated[
    tuple[Statement, ...],
    BeforeValidator(_from_units),
    PlainSerializer(lambda rows: {row.unit.value: row.tree() for row in rows}, when_used="json"),
]
"""One statement for each unit; in JSON a mapping from the unit to the statement."""


class Ledger:
    """The charges of one run, in a journal on disk or (``path=None``) in memory alone."""

    def __init__(self, path: Path | None, budgets: Iterable[Budget]) -> None:
        """Start a ledger, or continue the one at ``path``, whose budgets must be these.

        Raises:
            InputError: no budget, or two for one unit.
            RunError: ``path`` is damaged, cannot be read or written, or holds other budgets.
        """
        given = tuple(budgets)
        self._budgets = _by_unit(given)
        self._booked: dict[Key, PrivacyEvent] = {}
        self._charges: defaultdict[tuple[Unit, PartyId], list[Charge]] = defaultdict(list)
        self._journal = None if path is None else Journal(path)
        if self._journal is None:
            return
        if len(self._journal):
            self._replay(self._journal)
        else:
            self._journal.append(LedgerHeader(budgets=given).tree())

    @classmethod
    def open(
        cls, path: Path, budgets: Iterable[Budget], *, must_exist: bool, at_least: Head | None = None
    ) -> Self:
        """Start or continue the ledger at ``path``; with ``must_exist``, continue only.

        ``at_least`` is a ``head`` that was kept elsewhere: a ledger that lost lines since is refused.

        Raises:
            InputError: no budget, or two for one unit.
            RunError: the file is missing though it must exist, is damaged, lost lines, or has other budgets.
        """
        if (must_exist or at_least) and not path.exists():
            raise RunError(
                f"{path} is missing, so what the run spent is unknown: restore it or start a new run"
            )
        ledger = cls(path, budgets)
        if at_least and ledger._journal and not ledger._journal.has(at_least):
            raise RunError(f"{path} lost charges that were booked: restore it or start a new run")
        return ledger

    @classmethod
    def load(cls, path: Path, *, at_least: Head | None = None) -> Self:
        """Continue the ledger at ``path`` under the budgets it was started with. Raises as ``open`` does."""
        journal = Journal(path)
        if not len(journal):
            raise RunError(f"{path} is missing: expected the ledger of a run")
        return cls.open(path, _lines(journal)[0], must_exist=True, at_least=at_least)

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """One for each unit in use."""
        return tuple(self._budgets.values())

    @property
    def head(self) -> Head | None:
        """How far the journal has come, to be kept outside of it; ``None`` in memory."""
        return self._journal.head if self._journal else None

    @property
    def digests(self) -> tuple[str, ...]:
        """See `Journal.digests`; none in memory."""
        return self._journal.digests if self._journal else ()

    def change(self, budgets: Iterable[Budget], reason: str) -> None:
        """Go on under other ``budgets``, by somebody's deliberate act; it is durable when this returns.

        All charges stay booked. Who spent more already can be charged no more.

        Raises:
            InputError: not one budget for each unit of before, or no reason.
            RunError: the disk failed.
        """
        given = _by_unit(tuple(budgets))
        if given.keys() != self._budgets.keys():
            raise InputError(f"budgets for {_in_words(given)}: expected the units {', '.join(self._budgets)}")
        if not reason.strip():
            raise InputError("a budget is changed for a reason: say which")
        if self._journal:
            self._journal.append(BudgetChange(budgets=tuple(given.values()), reason=reason).tree())
        self._budgets = given

    def debit(self, unit: Unit, party: PartyId, event: PrivacyEvent, *, round: int, label: str = "") -> None:
        """Book one event; it is durable when this returns. Raises as ``debit_all`` does."""
        self.debit_all([Charge(unit, party, event, round, label)])

    def debit_all(self, charges: Sequence[Charge]) -> None:
        """Book all ``charges`` or none, in one line of the journal.

        Repeating a charge that was booked (same unit, party, round, label and event) is no new spending: a
        resumed run replays the same randomness. Whoever draws new randomness needs another round or label.

        Raises:
            BudgetError: some party would spend more than its unit's budget.
            RunError: a key was booked before with another event, or the disk failed.
            InputError: a unit without a budget, an impossible event, a nameless party, a negative round.
            PrivkdError: post-processing of nothing (see ``post_process``).
        """
        new = self._new(charges)
        if not new:
            return
        self._check_budgets(new)
        if self._journal:
            self._journal.append(Batch(charges=tuple(new)).tree())
        for charge in new:
            self._book(charge)

    def post_process(self, unit: Unit, *parties: PartyId, round: int, of: str) -> None:
        """State that a release is a function of what was charged before, and so costs nothing more.

        This is what makes the answers of a DP-SGD student on public inputs free (Dwork and Roth 2014,
        Proposition 2.1). ``of`` names the source in words.

        Raises:
            PrivkdError: a party has no DP-SGD (or unprotected) charge on ``unit``, up to ``round``, that
                could be the source.
        """
        self.debit_all([Charge(unit, party, PostProcessing(of), round) for party in parties])

    def epsilon(self, unit: Unit, party: PartyId, *, delta: float | None = None) -> Bound:
        """What ``party`` has spent on ``unit``, at ``delta`` or at the budget's own."""
        budget = self._budget(unit)
        return price(self.events(unit, party), budget.delta if delta is None else delta)

    def spent(self, unit: Unit, *, delta: float | None = None) -> Bound:
        """The worst party's epsilon on ``unit``; 0 where nobody was charged."""
        worst = self._worst(unit, delta)
        return (
            price((), self._budget(unit).delta) if worst is None else self.epsilon(unit, worst, delta=delta)
        )

    def events(self, unit: Unit, party: PartyId) -> tuple[PrivacyEvent, ...]:
        """The events of ``party`` on ``unit``, in the order of their booking."""
        return tuple(charge.event for charge in self.charges(unit, party))

    def charges(self, unit: Unit, party: PartyId) -> tuple[Charge, ...]:
        """The charges of ``party`` on ``unit``, in the order of their booking."""
        return tuple(self._charges.get((unit, party), ()))

    def parties(self, unit: Unit) -> tuple[PartyId, ...]:
        """Who has a charge on ``unit``, in alphabetical order."""
        return tuple(sorted(party for other, party in self._charges if other == unit))

    def reasons(self, unit: Unit) -> tuple[str, ...]:
        """Why ``unit`` has no guarantee, each reason once; empty where it has one."""
        return tuple(dict.fromkeys(r for party in self.parties(unit) for r in self._reasons(unit, party)))

    def statement(self, *, by_party: bool = False) -> tuple[Statement, ...]:
        """One row for each unit with a budget, for its worst party; or one for each party."""
        if by_party:
            return tuple(self._row(unit, p, parties=1) for unit in self._budgets for p in self.parties(unit))
        return tuple(self._row(u, self._worst(u), parties=len(self.parties(u))) for u in self._budgets)

    def _row(self, unit: Unit, party: PartyId | None, *, parties: int) -> Statement:
        budget = self._budget(unit)
        events = () if party is None else self.events(unit, party)
        epsilon = price(events, budget.delta)
        return Statement(
            unit=unit,
            party=party,
            parties=parties,
            high=epsilon.high,
            low=epsilon.low,
            estimate=epsilon.estimate,
            delta=budget.delta,
            budget=budget.epsilon,
            charges=len(events),
            method=epsilon.method,
            reasons=() if party is None else self._reasons(unit, party),
        )

    def _worst(self, unit: Unit, delta: float | None = None) -> PartyId | None:
        at = self._budget(unit).delta if delta is None else delta
        return max(self.parties(unit), key=lambda p: upper_bound(self.events(unit, p), at), default=None)

    def _reasons(self, unit: Unit, party: PartyId) -> tuple[str, ...]:
        reasons = (_reason(event) for event in self.events(unit, party))
        return tuple(dict.fromkeys(reason for reason in reasons if reason is not None))

    def _budget(self, unit: Unit) -> Budget:
        try:
            return self._budgets[unit]
        except KeyError:
            raise InputError(f"no budget for unit {unit}: give one (its epsilon may be inf)") from None

    def _new(self, charges: Sequence[Charge]) -> list[Charge]:
        """The charges that were not booked yet, checked in their order."""
        new: dict[Key, Charge] = {}
        pending: defaultdict[tuple[Unit, PartyId], list[Charge]] = defaultdict(list)
        for charge in charges:
            self._budget(charge.unit)
            if charge.round < 0 or not charge.party:
                raise InputError(
                    f"charge of {charge.party!r} in round {charge.round}: expected a name and a round from 0"
                )
            key = charge.key
            before = new[key].event if key in new else self._booked.get(key)
            if before is None:
                who = charge.unit, charge.party
                _check_source(charge, [*self._charges.get(who, ()), *pending[who]])
                pending[who].append(charge)
                new[key] = charge
            elif before != charge.event:
                raise RunError(
                    f"round {charge.round}, {charge.party}, unit {charge.unit}: {charge.event} was booked as "
                    f"{before} before; resume with the settings the run was started with"
                )
        return list(new.values())

    def _check_budgets(self, new: Sequence[Charge]) -> None:
        added: defaultdict[tuple[Unit, PartyId], list[PrivacyEvent]] = defaultdict(list)
        for charge in new:
            added[charge.unit, charge.party].append(charge.event)
        for (unit, party), events in added.items():
            budget, before = self._budget(unit), self.events(unit, party)
            if math.isinf(budget.epsilon):
                compose(events)  # possible events, at any price
                continue
            cost = upper_bound([*before, *events], budget.delta)
            if cost > budget.epsilon:
                so_far = upper_bound(before, budget.delta)
                raise BudgetError(
                    f"round {new[0].round}: {party} would spend epsilon {cost:.4g} of {budget.epsilon:g} on "
                    f"unit {unit} at delta {budget.delta:g} ({so_far:.4g} so far); nothing was booked: "
                    "raise the budget, add noise or take fewer steps"
                )

    def _book(self, charge: Charge) -> None:
        self._booked[charge.key] = charge.event
        self._charges[charge.unit, charge.party].append(charge)

    def _replay(self, journal: Journal) -> None:
        budgets, charges = _lines(journal)
        before = {budget.unit: budget for budget in budgets}
        if before != self._budgets:
            raise RunError(
                f"{journal.path} was started with {_in_words(before)}, not {_in_words(self._budgets)}: "
                "resume with the budgets the run was started with"
            )
        for charge in charges:
            self._book(charge)


def _by_unit(budgets: Sequence[Budget]) -> dict[Unit, Budget]:
    found = {budget.unit: budget for budget in budgets}
    if not budgets or len(found) != len(budgets):
        raise InputError(f"{len(budgets)} budgets given: expected exactly one for each unit in use")
    return found


def _lines(journal: Journal) -> tuple[tuple[Budget, ...], list[Charge]]:
    """The budgets that hold at the end of a ledger's journal, and all charges."""
    budgets, charges = _header(journal), list[Charge]()
    for number, line in enumerate(tuple(journal)[1:], start=2):
        try:
            if "budgets" in line:
                budgets = BudgetChange.model_validate(line).budgets
            else:
                charges += Batch.model_validate(line).charges
        except (ValidationError, InputError) as error:
            raise RunError(
                f"{journal.path}, line {number}: not a batch of charges ({faults(error)})"
            ) from None
    return budgets, charges


def _header(journal: Journal) -> tuple[Budget, ...]:
    try:
        return LedgerHeader.model_validate(next(iter(journal))).budgets
    except (ValidationError, InputError) as error:
        raise RunError(f"{journal.path}, line 1: not the header of a ledger ({faults(error)})") from None


def _check_source(charge: Charge, earlier: Iterable[Charge]) -> None:
    if not isinstance(charge.event, PostProcessing):
        return
    if not any(c.round <= charge.round and isinstance(c.event, DpSgd | NoPrivacy) for c in earlier):
        raise PrivkdError(
            f"{charge.party} has no DP-SGD charge on unit {charge.unit} up to round {charge.round}, so "
            f"{charge.event.of!r} cannot be post-processing: debit its source first"
        )


def _reason(event: PrivacyEvent) -> str | None:
    """Why ``event`` alone gives no guarantee, if it gives none."""
    match event:
        case NoPrivacy(reason):
            return reason
        case DpSgd(0, rate, steps) if rate * steps > 0:
            return "DP-SGD without noise"
        case ZCdp(rho) if math.isinf(rho):
            return "a channel without noise"
    return None


def _in_words(budgets: Mapping[Unit, Budget]) -> str:
    return ", ".join(f"{b.unit} epsilon {b.epsilon:g} at delta {b.delta:g}" for b in budgets.values())
