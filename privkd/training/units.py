"""What DP-SGD samples and clips on a device: each record, or each person with all of its records.

Neighbouring relation: add or remove one of them. A person's gradients are added up, whatever their number,
and the sum is clipped: so a person moves the whole by at most the clip norm, as a record does.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from privkd.data.scenario import LabelledSet
from privkd.errors import DataError
from privkd.privacy.events import Unit


@dataclass(frozen=True)
class Chosen:
    """A step's records.

    Attributes:
        records: by number, ascending, int64 ``[record]``.
        owners: whose each of them is, counted from 0 among the persons that were sampled; ``None`` where each
            record is a unit by itself.
        count: how many units were sampled.
    """

    records: Tensor
    owners: Tensor | None
    count: int

    def summed(self, gradients: Tensor) -> Tensor:
        """Gradients ``[record, *shape]`` added up for each unit, ``[unit, *shape]``."""
        if self.owners is None:
            return gradients
        sums = gradients.new_zeros((self.count, *gradients.shape[1:]))
        return sums.index_add_(0, self.owners.to(gradients.device), gradients)


@dataclass(frozen=True)
class Units:
    """The units of one device.

    Attributes:
        count: how many there are; it never leaves the device.
        of: which each record belongs to, int64 ``[record]``; ``None`` where each is one by itself.
    """

    count: int
    of: Tensor | None = None

    @classmethod
    def on(cls, shard: LabelledSet, unit: Unit) -> Self:
        """Those of ``shard``.

        Raises:
            DataError: they are persons, and nothing says whose the records are.
        """
        if unit is Unit.RECORD:
            return cls(len(shard))
        if shard.persons is None:
            raise DataError("training per person needs to know whose each record is: set data.group")
        persons, of = torch.unique(shard.persons.cpu(), return_inverse=True)
        return cls(len(persons), of)

    def chosen(self, sample: Tensor) -> Chosen:
        """The records of a ``sample`` of units, bool ``[unit]``."""
        if self.of is None:
            records = sample.nonzero().flatten()
            return Chosen(records, None, len(records))
        records = sample[self.of].nonzero().flatten()
        place = sample.cumsum(0) - 1
        return Chosen(records, place[self.of[records]], int(sample.sum()))

    @property
    def table(self) -> tuple[Tensor, Tensor]:
        """Each person's records, int64 ``[unit, slot]``, and which slots are of one, bool likewise.

        A slot that is of none repeats the person's first record.
        """
        assert self.of is not None
        order = self.of.argsort(stable=True)
        sizes = torch.bincount(self.of, minlength=self.count)
        starts = sizes.cumsum(0) - sizes
        slot = torch.arange(int(sizes.max()) if self.count else 1)
        held = slot < sizes.unsqueeze(1)
        return order[starts.unsqueeze(1) + torch.where(held, slot, 0)], held
