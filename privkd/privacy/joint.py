"""What several units of one owner get together, through the accountant: never epsilon times their number.

Beside the ledger, not in it: these are other prices of the same events, and nothing is added to anything.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from privkd.privacy.accounting import group_upper_bound, replaced_upper_bound, upper_bound
from privkd.privacy.events import PrivacyEvent, Unit
from privkd.records import Count, Real

_COUNTS = (2, 5, 10)
"""How many records on one device are spoken of, where it is not known how many a person has."""


@dataclass(frozen=True)
class Persons:
    """Public constants about the persons whose records devices hold.

    Attributes:
        per_device: the nominal number of persons on a device, never a true count.
        most_records: of one person on a device; more are dropped there.
    """

    per_device: int
    most_records: int


@dataclass(frozen=True)
class Joint:
    """Units of one owner, and the epsilon that all of them get together, at the run's delta.

    The relation is that all of them are added or all removed; of devices that all are zeroed out; of one
    record under the unit person, that its person's other records stay.

    Attributes:
        unit: what the owner has several of.
        count: how many of them on each of
        devices: so many devices.
        epsilon: upper bound of the whole run.
    """

    unit: Unit
    count: Count
    devices: Count
    epsilon: Real

    @property
    def words(self) -> str:
        """Who that is."""
        if self.unit is Unit.DEVICE:
            return f"somebody with {self.devices} devices"
        if self.devices > 1:
            what = "a record" if self.unit is Unit.RECORD else "records"
            return f"somebody with {what} on each of {self.devices} devices"
        if self.count == 1:
            return "one record of a person whose others stay"
        return f"somebody with {self.count} records on one device"


@dataclass(frozen=True)
class Spent:
    """What a run costs, of which joint prices are made.

    Attributes:
        unit: that training protects, a record or a person.
        training: its events on one device.
        releases: those of the channel, for one device.
        delta: of all units.
        most_records: of one person on a device, where that is bounded.
    """

    unit: Unit
    training: Sequence[PrivacyEvent]
    releases: Sequence[PrivacyEvent]
    delta: float
    most_records: int | None = None

    @property
    def joints(self) -> tuple[Joint, ...]:
        """All that is worth saying; of a unit that has no guarantee, nothing."""
        found = [*self._of_training(), *self._of_devices()]
        return tuple(joint for joint in found if joint.epsilon < float("inf"))

    def _of_training(self) -> Iterator[Joint]:
        events, delta = self.training, self.delta
        if self.unit is Unit.PERSON:
            if self.most_records is None or self.most_records > 1:
                yield Joint(Unit.RECORD, 1, 1, replaced_upper_bound(events, delta))
        else:
            for count in self._counts():
                yield Joint(Unit.RECORD, count, 1, group_upper_bound(events, delta, count))
        yield Joint(self.unit, 1, 2, upper_bound([*events, *events], delta))

    def _counts(self) -> tuple[int, ...]:
        most = self.most_records
        if most is None:
            return _COUNTS
        return tuple(sorted({count for count in (*_COUNTS, most) if 1 < count <= most}))

    def _of_devices(self) -> Iterator[Joint]:
        yield Joint(Unit.DEVICE, 1, 2, group_upper_bound(self.releases, self.delta, 2))
