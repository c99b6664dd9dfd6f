"""What each device has paid at one aggregator, over all rounds, and the most that it may pay.

A cloud that departs from the protocol can ask the same device round after round, each time at a price that
a single round may have. So an aggregator with a ``max_rho_total`` adds up, for each device by its name, the
rho of every attempt at a round of which it makes a share: zCDP composes additively, also where a round is
chosen after the ones before were seen (Bun and Steinke 2016). A round without noise counts as infinite.

Neighbouring relation: zero out one device's whole contribution, in every round. The totals are of what is
public: who took part in which round, and under how much noise. The journal is where they are kept.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, Self

from privkd.privacy.events import PartyId
from privkd.secure.terms import RoundTerms

_GRAINS = 1 << 64
ROUNDING = Fraction(1 + 2**-40)
"""How far rho may lie above a limit: both are often made of floats, and a fitting price should fit."""


class DeviceTotals:
    """The devices' totals at one aggregator, in rho of zCDP. For one thread at a time.

    Attributes:
        limit: the most for each device; ``None`` for no limit, and then nothing is added up.
    """

    def __init__(self, limit: float | None) -> None:
        """Nothing is charged yet."""
        self.limit = limit
        # In whole grains, each price rounded up: fractions would grow with every round.
        self._spent: Counter[PartyId] = Counter()
        self._without_noise: Counter[PartyId] = Counter()
        self._charged: dict[int, tuple[tuple[PartyId, ...], Fraction | None]] = {}

    @classmethod
    def recalled(cls, limit: float | None, records: Iterable[dict[str, Any]]) -> Self:
        """The totals that a party's journal comes to, whatever its limit was when it was written."""
        totals = cls(limit)
        if limit is None:
            return totals
        prices: dict[int, Fraction | None] = {}
        for record in records:
            label = int(record["round"], 16)
            match record["event"]:
                case "opened":
                    prices[label] = RoundTerms.model_validate(record["terms"]).rho
                case "agreed":
                    totals.charge(label, record["devices"], prices.get(label))
                case "abandoned":
                    totals.refund(label)
        return totals

    def beyond(self, devices: Iterable[PartyId], rho: Fraction | None) -> list[PartyId]:
        """Those of ``devices`` whose totals would exceed the limit with ``rho`` more; ``None``: no noise."""
        if self.limit is None:
            return []
        if rho is None:
            return list(devices)
        most = math.floor(Fraction(self.limit) * ROUNDING * _GRAINS) - _grains(rho)
        return [device for device in devices if self._without_noise[device] or self._spent[device] > most]

    def charge(self, label: int, devices: Sequence[PartyId], rho: Fraction | None) -> None:
        """Charge ``devices`` for the attempt ``label`` at a round: once, however often it is repeated."""
        if self.limit is None or label in self._charged:
            return
        self._charged[label] = tuple(devices), rho
        self._add(devices, rho, 1)

    def refund(self, label: int) -> None:
        """Take back what an attempt cost, which was abandoned, so that no share was or will be made of it."""
        if label in self._charged:
            devices, rho = self._charged.pop(label)
            self._add(devices, rho, -1)

    def _add(self, devices: Sequence[PartyId], rho: Fraction | None, sign: int) -> None:
        for device in devices:
            if rho is None:
                self._without_noise[device] += sign
            else:
                self._spent[device] += sign * _grains(rho)


def _grains(rho: Fraction) -> int:
    return math.ceil(rho * _GRAINS)
