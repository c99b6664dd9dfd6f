"""Budgets and charges, and how the ledger's journal spells them: tagged JSON, infinity as ``"inf"``."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from privkd.errors import InputError
from privkd.privacy.events import DpSgd, NoPrivacy, PartyId, PostProcessing, PrivacyEvent, Unit, ZCdp

FORMAT = 1


@dataclass(frozen=True)
class Budget:
    """The most that any one party may spend on ``unit``: ``epsilon`` (inf allowed) at ``delta``."""

    unit: Unit
    epsilon: float
    delta: float

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
    event: PrivacyEvent
    round: int
    label: str = ""

    @property
    def key(self) -> Key:
        """Two charges of one key are one and the same: see ``Ledger.debit_all``."""
        return Key(Unit(self.unit), self.party, self.round, self.label or _default_label(self.event))


JsonObject: TypeAlias = dict[str, Any]


def encode_header(budgets: Iterable[Budget]) -> JsonObject:
    """The first line of a ledger."""
    rows = [{"unit": str(b.unit), "epsilon": _number(b.epsilon), "delta": b.delta} for b in budgets]
    return {"format": FORMAT, "budgets": rows}


def decode_header(header: Mapping[str, Any]) -> tuple[Budget, ...]:
    """Raises ValueError: not the first line of a ledger."""
    try:
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']!r}, but this version reads format {FORMAT}")
        rows = header["budgets"]
        return tuple(Budget(Unit(row["unit"]), float(row["epsilon"]), float(row["delta"])) for row in rows)
    except (KeyError, TypeError, InputError) as error:
        raise ValueError(f"not the header of a ledger: {error}") from error


def encode_charge(charge: Charge) -> JsonObject:
    """One row of a batch."""
    key = charge.key
    event = _encode_event(charge.event)
    return {
        "unit": str(key.unit),
        "party": key.party,
        "round": int(key.round),
        "label": key.label,
        "event": event,
    }


def decode_charge(row: Mapping[str, Any]) -> Charge:
    """Raises ValueError: not a row of a batch."""
    try:
        event = _decode_event(row["event"])
        return Charge(Unit(row["unit"]), str(row["party"]), event, int(row["round"]), str(row["label"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a charge: {error!r}") from error


def _default_label(event: PrivacyEvent) -> str:
    kind = str(_encode_event(event)["kind"])
    return f"{kind}: {event.of}" if isinstance(event, PostProcessing) else kind


def _encode_event(event: PrivacyEvent) -> JsonObject:
    match event:
        case DpSgd(noise, rate, steps):
            return {
                "kind": "dp_sgd",
                "noise_multiplier": _number(noise),
                "sampling_rate": float(rate),
                "steps": int(steps),
            }
        case ZCdp(rho):
            return {"kind": "zcdp", "rho": _number(rho)}
        case PostProcessing(of):
            return {"kind": "post_processing", "of": of}
        case NoPrivacy(reason):
            return {"kind": "no_privacy", "reason": reason}
    raise InputError(f"cannot book {event!r}: unknown kind of privacy event")


def _decode_event(fields: Mapping[str, Any]) -> PrivacyEvent:
    match fields["kind"]:
        case "dp_sgd":
            noise, rate = float(fields["noise_multiplier"]), float(fields["sampling_rate"])
            return DpSgd(noise, rate, int(fields["steps"]))
        case "zcdp":
            return ZCdp(float(fields["rho"]))
        case "post_processing":
            return PostProcessing(str(fields["of"]))
        case "no_privacy":
            return NoPrivacy(str(fields["reason"]))
        case kind:
            raise ValueError(f"unknown kind of privacy event: {kind!r}")


def _number(value: float) -> float | str:
    """JSON has no infinity."""
    return "inf" if math.isinf(value) else float(value)
