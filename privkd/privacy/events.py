"""What happened to private data, as frozen facts, and how the ledger's journal spells them.

What it costs is the ledger's business. Each event names the mechanism's public parameters and nothing
secret. Neighbouring relations:

* ``Unit.RECORD``: add or remove one record of one device (Poisson-sampled DP-SGD).
* ``Unit.PERSON``: add or remove all records of one person on one device (the same, of persons).
* ``Unit.DEVICE``: zero out one device's whole contribution; the number of devices is public.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from privkd.errors import InputError
from privkd.records import Count, Real, Record

PartyId: TypeAlias = str
"""Names who is protected: a device such as ``device-0003``."""


class Unit(StrEnum):
    """The unit of privacy. Epsilons of different units are never added."""

    RECORD = "record"
    PERSON = "person"
    DEVICE = "device"

    @property
    def neighbouring_relation(self) -> str:
        """The neighbouring relation in words, as every report states it."""
        if self is Unit.RECORD:
            return "add or remove one record of one device"
        if self is Unit.PERSON:
            return "add or remove one person: all of its records on one device"
        return "zero out one device's whole contribution (number of devices public)"


@dataclass(frozen=True)
class DpSgd:
    """``steps`` Poisson-subsampled Gaussian mechanisms (Abadi et al. 2016, Algorithm 1).

    ``noise_multiplier`` is the noise's standard deviation over the per-example clip norm;
    ``sampling_rate`` the probability with which each record joins a step.
    """

    noise_multiplier: Real
    sampling_rate: Real
    steps: Count
    kind: Literal["dp_sgd"] = field(default="dp_sgd", kw_only=True, repr=False)


@dataclass(frozen=True)
class ZCdp:
    """A mechanism that is ``rho``-zCDP, such as the discrete Gaussian with
    ``rho = sensitivity^2 / (2 sigma^2)`` (Canonne, Kamath, Steinke 2020, Theorem 4)."""

    rho: Real
    kind: Literal["zcdp"] = field(default="zcdp", kw_only=True, repr=False)


@dataclass(frozen=True)
class PostProcessing:
    """A function of what was already charged; costs nothing more. ``of`` says of what."""

    of: str
    kind: Literal["post_processing"] = field(default="post_processing", kw_only=True, repr=False)


@dataclass(frozen=True)
class NoPrivacy:
    """A release without any guarantee: epsilon is infinite, never zero."""

    reason: str
    kind: Literal["no_privacy"] = field(default="no_privacy", kw_only=True, repr=False)


PrivacyEvent: TypeAlias = DpSgd | ZCdp | PostProcessing | NoPrivacy
TaggedEvent: TypeAlias = Annotated[PrivacyEvent, Field(discriminator="kind")]
"""An event as a record holds it."""


@dataclass(frozen=True)
class Budget:
    """The most that any one party may spend on ``unit``: ``epsilon`` (inf allowed) at ``delta``."""

    unit: Unit
    epsilon: Real
    delta: Real

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise InputError(f"{self.unit} budget epsilon={self.epsilon}: expected a positive number or inf")
        if not 0 < self.delta < 1:
            raise InputError(f"{self.unit} budget delta={self.delta}: expected a number strictly in (0, 1)")


@dataclass(frozen=True)
class Key:
    """What a repeated charge has in common with the first."""

    unit: Unit
    party: PartyId
    round: int
    label: str


@dataclass(frozen=True)
class Charge:
    """One event to book for ``party`` on ``unit`` in ``round``.

    ``label`` tells apart what one party does on one unit in one round; it is the kind of event if empty.
    """

    unit: Unit
    party: PartyId
    event: TaggedEvent
    round: int
    label: str = ""

    def __post_init__(self) -> None:
        if not self.label:
            of = f": {self.event.of}" if isinstance(self.event, PostProcessing) else ""
            # What is no event is refused by whoever prices it.
            object.__setattr__(self, "label", f"{getattr(self.event, 'kind', self.event)}{of}")

    @property
    def key(self) -> Key:
        """Two charges of one key are one and the same: see ``Ledger.debit_all``."""
        return Key(Unit(self.unit), self.party, self.round, self.label)


class LedgerHeader(Record):
    """The first line of a ledger's journal."""

    format: Literal[1] = 1
    budgets: tuple[Budget, ...]


class Batch(Record):
    """A later line of it: charges that were booked together."""

    charges: tuple[Charge, ...]


class BudgetChange(Record):
    """Likewise: other budgets from here on, by somebody's deliberate act. What was charged stays charged."""

    budgets: tuple[Budget, ...]
    reason: Annotated[str, Field(min_length=1)]
