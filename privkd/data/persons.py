"""Whose the records of a device are: public constants about persons, and what keeps each within them."""

import numpy as np
from numpy.typing import NDArray

from privkd.config import DataConfig
from privkd.data.dataset import Indices
from privkd.errors import ConfigError
from privkd.privacy.joint import Persons


def check_persons(config: DataConfig) -> None:
    """Refuse constants about persons whose records nobody tells apart.

    Raises:
        ConfigError: one is set, and ``data.group`` is not.
    """
    for name in ("persons_per_device", "records_per_person"):
        if config.group is None and getattr(config, name) is not None:
            raise ConfigError(
                f"data.{name}={getattr(config, name)}: nothing says whose each record is; name the column "
                "that does with --group COLUMN"
            )


def persons_as_set(config: DataConfig) -> Persons | None:
    """What is set of persons whose records are elsewhere; ``None`` where it is not all set."""
    if config.persons_per_device is None or config.records_per_person is None:
        return None
    return Persons(config.persons_per_device, config.records_per_person)


def persons_of(config: DataConfig, groups: NDArray[np.str_], free: Indices) -> Persons:
    """As set; else, in a simulation, of the groups of all records that devices may hold.

    Args:
        config: what is set.
        groups: whose each record is ``[record]``.
        free: the records that devices may hold, at least one.
    """
    counts = np.unique(groups[free], return_counts=True)[1]
    per_device = config.persons_per_device or max(1, len(counts) // config.devices)
    return Persons(per_device, config.records_per_person or int(counts.max()))


def within(records: Indices, groups: NDArray[np.str_], most: int) -> Indices:
    """Of ``records``, the first ``most`` of each person's, in the order of the source.

    Which of a person's stay depends on that person's own records alone.
    """
    order = np.argsort(records, kind="stable")
    whose = numbered_persons(groups[records[order]])
    first = np.argsort(whose, kind="stable")
    counts = np.bincount(whose)
    place = np.arange(len(whose)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = np.zeros(len(records), dtype=np.bool_)
    kept[order[first[place < most]]] = True
    return records[kept]


def numbered_persons(groups: NDArray[np.str_]) -> Indices:
    """Persons as numbers from 0, int64 ``[record]``; an empty array has none."""
    return np.unique(groups, return_inverse=True)[1].astype(np.int64)
