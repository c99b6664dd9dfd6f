"""Which record plays which role, and how private ones fall to devices: pure functions of indices and a seed.

Every record of the source has exactly one role; what nobody needs stays in ``reserve``. Each purpose draws
from its own random stream, so that changing the number of devices leaves the public sets and the tests alone.
The devices' shards are disjoint and hold every private index; one may be empty where the rule allows it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privkd.config import DataConfig
from privkd.data.constants import PUBLIC_SOURCES
from privkd.data.dataset import Indices
from privkd.data.persons import persons_of, within
from privkd.data.public_sets import (
    PublicSets,
    PublicSizes,
    Stream,
    choose_gap_classes,
    draw_of_all,
    draw_public_sets,
    none_public,
    public_sizes,
    without,
)
from privkd.errors import ConfigError, DataError
from privkd.privacy.joint import Persons

# Beyond these, gamma variates under- or overflow while the shares are already one-hot or equal.
_ALPHA_RANGE = (1e-6, 1e6)


def iid(indices: Indices, devices: int, rng: np.random.Generator) -> tuple[Indices, ...]:
    """Shards of equal size (to one record), drawn uniformly without replacement."""
    return tuple(np.array_split(rng.permutation(indices), devices))


def dirichlet(
    indices: Indices, labels: Indices, devices: int, alpha: float, rng: np.random.Generator
) -> tuple[Indices, ...]:
    """Each class divided among the devices in shares drawn from a symmetric Dirichlet (Hsu et al. 2019).

    Args:
        indices: the records to divide ``[record]``.
        labels: their classes ``[record]``, aligned with ``indices``.
        devices: number of shards.
        alpha: concentration; small gives a class to few devices, large divides it evenly.
        rng: source of the draw.
    """
    concentration = np.full(devices, np.clip(alpha, *_ALPHA_RANGE))
    pieces = []
    for label in np.unique(labels):
        members = rng.permutation(indices[labels == label])
        shares = np.cumsum(rng.dirichlet(concentration))[:-1]
        cuts = np.minimum((shares * len(members)).round().astype(np.int64), len(members))
        pieces.append(np.split(members, cuts))
    return _join(pieces, devices)


def by_class(
    indices: Indices, labels: Indices, holders: NDArray[np.bool_], rng: np.random.Generator
) -> tuple[Indices, ...]:
    """Each class divided evenly among the devices that hold it.

    Args:
        indices: the records to divide ``[record]``.
        labels: their classes ``[record]``, aligned with ``indices``.
        holders: who holds what ``[device, class]``; every class among ``labels`` needs a holder.
        rng: source of the draw.

    Raises:
        ValueError: a class has no holder.
    """
    devices = len(holders)
    pieces = []
    for label in np.unique(labels):
        owners = rng.permutation(np.flatnonzero(holders[:, label]))
        if not owners.size:
            raise ValueError(f"class {label} has records but no holder")
        parts = np.array_split(rng.permutation(indices[labels == label]), len(owners))
        shares = [indices[:0]] * devices
        for owner, part in zip(owners, parts, strict=True):
            shares[owner] = part
        pieces.append(shares)
    return _join(pieces, devices)


def natural(
    indices: Indices, groups: NDArray[np.str_], devices: int, rng: np.random.Generator
) -> tuple[Indices, ...]:
    """Whole groups dealt to the devices in turn, in an order drawn at random.

    Args:
        indices: the records to divide ``[record]``.
        groups: whose they are ``[record]``, aligned with ``indices``.
        devices: number of shards, each of one group at least.
        rng: source of the draw.

    Raises:
        ValueError: there are fewer groups than devices.
    """
    values, members = np.unique(groups, return_inverse=True)
    if len(values) < devices:
        raise ValueError(f"{len(values)} groups for {devices} devices")
    device_of = np.empty(len(values), dtype=np.int64)
    device_of[rng.permutation(len(values))] = np.arange(len(values)) % devices
    return tuple(indices[device_of[members] == device] for device in range(devices))


def assign_classes(
    devices: int, classes: int, per_device: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Which ``per_device`` classes each device holds ``[device, class]``; classes are used evenly, to one.

    Raises:
        ValueError: ``per_device`` exceeds ``classes``.
    """
    if per_device > classes:
        raise ValueError(f"{per_device} classes per device exceed the {classes} classes")
    holders = np.zeros((devices, classes), dtype=np.bool_)
    for device in range(devices):
        least_used_first = np.lexsort((rng.random(classes), holders.sum(0)))
        holders[device, least_used_first[:per_device]] = True
    return holders


def _join(pieces: list[list[Indices]], devices: int) -> tuple[Indices, ...]:
    """Gather each device's pieces over the classes."""
    empty = np.empty(0, dtype=np.int64)
    return tuple(np.concatenate([empty, *(shares[device] for shares in pieces)]) for device in range(devices))


@dataclass(frozen=True)
class Split(PublicSets):
    """Record indices by role: disjoint, and exhaustive with ``reserve``.

    Attributes:
        device_train: each device's private training shard, possibly empty.
        device_test: each device's test set, drawn from the same shard.
        reserve: unused.
        records_per_device: nominal size of a training shard, a public constant.
        gap_classes: classes that the public labelled sets lack, sorted.
        persons: public constants about whose the records are, where that is known.
    """

    device_train: tuple[Indices, ...]
    device_test: tuple[Indices, ...]
    reserve: Indices
    records_per_device: int
    gap_classes: tuple[int, ...]
    persons: Persons | None = None


def split_indices(
    labels: Indices,
    config: DataConfig,
    seed: int,
    *,
    classes: int,
    given_test: bool = False,
    names: tuple[str, ...] | None = None,
    groups: NDArray[np.str_] | None = None,
) -> Split:
    """Give every record one role.

    The test is stratified; the proxy is a uniform draw of the rest, gap classes included; the public labelled
    sets follow ``config.gap``; devices divide a uniform draw of what is left by ``config.partition``. Neither
    the global test nor the public sets depend on the number of devices, nor in a user's own file on records
    that devices may hold: see `public_sets`. Where ``config.public`` names others, all of these are
    the devices'.

    Args:
        labels: classes of all records ``[record]``, each of ``0 .. classes - 1``, or ``classes`` where its
            label is none: such a record is dropped from the shard that it falls to.
        config: sizes, partition and gap; ``config.source`` says whether it is a public data set.
        seed: not negative.
        classes: number of classes, a public constant.
        given_test: the source brings its own test split, so none is drawn.
        names: by which the roles of a user's own records are drawn; ``None``: by position.
        groups: whose each record is ``[record]``, for the natural partition: those of one group are all
            public, or all on one device.

    Raises:
        ConfigError: a setting does not go with another, or with the number of classes.
        DataError: the source has too few records or groups for the request, or the label of a public one is
            no class.
    """
    if seed < 0:
        raise ConfigError(f"seed={seed}: expected 0 or more")
    sizes = (
        public_sizes(config, len(labels), given_test=given_test)
        if config.public is None
        else none_public(config)
    )
    if sizes.total + config.devices > len(labels):
        raise DataError(_shortage(config, sizes, len(labels), 0, f"too few for {config.devices} devices"))
    gap = choose_gap_classes(config, classes, Stream.GAP.generator(seed))
    together = names if groups is None else tuple(groups.tolist())
    sets, withheld = draw_public_sets(labels, config, sizes, gap, classes=classes, seed=seed, names=together)
    everybody = np.arange(len(labels))
    holders = _holders(config, classes, Stream.HOLDERS.generator(seed))
    free = without(everybody, withheld)
    free = free[np.isin(labels[free], np.flatnonzero(holders.any(axis=0)))]
    persons = None
    if groups is not None:
        _check_groups(groups, free, config)
        persons = persons_of(config, groups, free)
        free = within(free, groups, persons.most_records)
    nominal = _nominal(len(free), config, sizes, len(labels), len(withheld) - sizes.total)
    pairs = _divide(free, labels, config, holders, nominal, seed, groups)
    trains, tests = (
        tuple(part[labels[part] < classes] for part in parts) for parts in zip(*pairs, strict=True)
    )
    return Split(
        **vars(sets),
        device_train=trains,
        device_test=tests,
        reserve=without(everybody, np.concatenate([sets.shown, *trains, *tests])),
        records_per_device=nominal,
        gap_classes=gap,
        persons=persons,
    )


def public_indices(
    labels: Indices, config: DataConfig, seed: int, *, classes: int, given_test: bool = False
) -> Split:
    """The public roles of `split_indices` alone, where no record of the source is a device's.

    Of a data set that all the world has they are the same records. Arguments are as of `split_indices`.

    Raises:
        ConfigError: likewise, or nothing says what devices hold about.
        DataError: the source has too few records for the request, or a label is no class.
    """
    nominal = config.records_per_device
    if nominal is None and (config.public is not None or config.source not in PUBLIC_SOURCES):
        raise ConfigError(
            "data.records_per_device is not set: say about how many records a device holds, a public "
            "constant that the devices' owners agree to; the noise of their training is measured by it"
        )
    sets, gap = sets_of_all(labels, config, seed, classes=classes, given_test=given_test)
    return Split(
        **vars(sets),
        device_train=(),
        device_test=(),
        reserve=without(np.arange(len(labels)), sets.shown),
        records_per_device=none_public(config).records_per_device if nominal is None else nominal,
        gap_classes=gap,
    )


def sets_of_all(
    labels: Indices, config: DataConfig, seed: int, *, classes: int, given_test: bool
) -> tuple[PublicSets, tuple[int, ...]]:
    """The public sets out of records that are public as a whole, and the classes that these lack.

    Arguments and errors are as of `public_indices`.
    """
    sizes = public_sizes(config, len(labels), given_test=given_test)
    if sizes.total > len(labels):
        raise DataError(
            f"source {config.public or config.source!r} has {len(labels)} records, fewer than "
            f"test_records={sizes.test}, public_records={sizes.public}, "
            f"validation_records={sizes.validation} and proxy_records={sizes.proxy} together: lower one"
        )
    gap = choose_gap_classes(config, classes, Stream.GAP.generator(seed))
    sets = draw_of_all(labels, config, sizes, gap, classes=classes, seed=seed)
    if config.public is not None:
        gap = tuple(np.setdiff1d(np.arange(classes), labels).tolist())
    return sets, gap


def _nominal(free: int, config: DataConfig, sizes: PublicSizes, records: int, surplus: int) -> int:
    """Nominal shard size: as set, else what ``free`` records of the source's allow.

    Raises:
        DataError: they are too few.
    """
    nominal = config.records_per_device
    if nominal is None:
        nominal = min(sizes.records_per_device, free // config.devices - config.device_test_records)
    need = config.devices * (nominal + config.device_test_records)
    if nominal < 1 or need > free:
        wish = f"{config.devices} devices x ({max(nominal, 1)} + {config.device_test_records} test records)"
        left = f"{free} that devices can hold, too few for {wish}"
        raise DataError(_shortage(config, sizes, records, surplus, left))
    return nominal


def _check_groups(groups: NDArray[np.str_], free: Indices, config: DataConfig) -> None:
    """Raise `DataError` unless each device can have a group of its own."""
    left, all_of_them = len(np.unique(groups[free])), len(np.unique(groups))
    if left < config.devices:
        raise DataError(
            f"source {config.source!r} has {all_of_them} groups of {config.group or 'users'!r}, "
            f"{all_of_them - left} of them public: {left} are too few for {config.devices} devices; lower "
            "devices, or public_records, validation_records, proxy_records and test_records"
        )


def _divide(
    free: Indices,
    labels: Indices,
    config: DataConfig,
    holders: NDArray[np.bool_],
    nominal: int,
    seed: int,
    groups: NDArray[np.str_] | None,
) -> list[tuple[Indices, Indices]]:
    """Each device's training and test records, out of ``free``."""
    if groups is not None:
        rng = Stream.PARTITION.generator(seed)
        shards = natural(free, groups[free], config.devices, rng)
        return [_train_test(rng.permutation(shard), nominal, config.device_test_records) for shard in shards]
    need = config.devices * (nominal + config.device_test_records)
    # Keys per record, not a permutation of `free`: a smaller pool is then a subset of a larger one.
    keys = Stream.POOL.generator(seed).random(len(labels))[free]
    pool = free[np.argsort(keys, kind="stable")[:need]]
    rng = Stream.PARTITION.generator(seed)
    if config.partition == "dirichlet":
        shards = dirichlet(pool, labels[pool], config.devices, config.dirichlet_alpha, rng)
    elif config.partition == "classes":
        shards = by_class(pool, labels[pool], holders, rng)
    else:
        shards = iid(pool, config.devices, rng)
    return [_train_test(rng.permutation(shard), nominal, config.device_test_records) for shard in shards]


def _train_test(shard: Indices, nominal: int, tests: int) -> tuple[Indices, Indices]:
    """A shuffled shard cut in the nominal proportion; test records beyond the size set are left out."""
    held_out = len(shard) * tests // (nominal + tests)
    return shard[held_out:], shard[: min(held_out, tests)]


def _holders(config: DataConfig, classes: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which classes each device may hold ``[device, class + 1]``: the last column is of labels that are none,
    which anybody may have."""
    if config.partition != "classes":
        return np.ones((config.devices, classes + 1), dtype=np.bool_)
    if config.classes_per_device > classes:
        raise ConfigError(f"classes_per_device={config.classes_per_device}: the source has {classes} classes")
    holders = assign_classes(config.devices, classes, config.classes_per_device, rng)
    return np.pad(holders, ((0, 0), (0, 1)), constant_values=True)


def _shortage(config: DataConfig, sizes: PublicSizes, records: int, surplus: int, left: str) -> str:
    passed_over = f", for which {surplus} more were passed over," if surplus else ""
    return (
        f"source {config.source!r} has {records} records: test_records={sizes.test}, "
        f"public_records={sizes.public}, validation_records={sizes.validation} and "
        f"proxy_records={sizes.proxy}{passed_over} leave {left}; lower one of these, devices, "
        "records_per_device or device_test_records"
    )
