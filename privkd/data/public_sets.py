"""Which records everybody may see: test, public labelled sets and proxy; and what these lack.

A data set that all the world has is stratified by the labels of all its records. Of a user's own file the
sets lie in a **pool** that is drawn blind to the labels: records in the order of a random key each, as many
as it takes until the pool's own labels fill the sets. Whether a record outside the pool is there, and what it
holds, changes nothing in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from privkd.config import DataConfig
from privkd.data.constants import PUBLIC_SOURCES
from privkd.data.dataset import Indices
from privkd.errors import ConfigError, DataError
from privkd.privacy.randomness import derive_seed


class Stream(IntEnum):
    """Spawn keys: one random stream for each purpose of a split."""

    GAP = 0
    PUBLIC = 1
    POOL = 2
    HOLDERS = 3
    PARTITION = 4

    def generator(self, seed: int) -> np.random.Generator:
        """This stream's."""
        return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(int(self),)))


@dataclass(frozen=True)
class PublicSets:
    """Record indices of the sets that everybody may see.

    Attributes:
        test: global test set; empty where the source brings its own.
        public: public labelled set.
        validation: public labelled validation set.
        proxy: unlabelled public set.
    """

    test: Indices
    public: Indices
    validation: Indices
    proxy: Indices

    @property
    def shown(self) -> Indices:
        """The records of all these sets."""
        return np.concatenate([self.test, self.public, self.validation, self.proxy])


@dataclass(frozen=True)
class PublicSizes:
    """Sizes of the sets that everybody may see, and the shard size wished for where nothing is set."""

    test: int
    public: int
    validation: int
    proxy: int
    records_per_device: int

    @property
    def total(self) -> int:
        """Records of all sets."""
        return self.test + self.public + self.validation + self.proxy


NO_RECORDS: Indices = np.empty(0, dtype=np.int64)
_SHARD = 1000
"""Records that a device is wished to hold where nothing is known of the source."""

_BY_SOURCE = {
    "digits": PublicSizes(test=360, public=160, validation=80, proxy=360, records_per_device=140),
    "docstrings": PublicSizes(test=480, public=240, validation=120, proxy=600, records_per_device=160),
    "mnist": PublicSizes(test=0, public=2000, validation=500, proxy=5000, records_per_device=1000),
    "cifar10": PublicSizes(test=0, public=5000, validation=1000, proxy=5000, records_per_device=1000),
}


def public_sizes(config: DataConfig, records: int, *, given_test: bool = False) -> PublicSizes:
    """The sizes set in ``config``; where ``None``, the source's own, or a share of its ``records``.

    A source without sizes of its own gives a fifth to the test (none where it brings one), a tenth to the
    public labelled set, a twentieth to validation, a fifth to the proxy (none where that has its own file);
    at most 10,000, 5,000, 1,000, 5,000. Of a file of public records nothing is left: see `_whole_file`.

    Raises:
        ConfigError: a size of the test is set, but the source brings one.
        DataError: the file of public records is too small.
    """
    if given_test and config.test_records is not None:
        raise ConfigError(
            f"data.test_records={config.test_records}: the data bring a test split of their own; leave it out"
        )
    default = _BY_SOURCE.get(config.source) or PublicSizes(
        test=min(10_000, max(1, records // 5)),
        public=min(5000, max(1, records // 10)),
        validation=min(1000, max(1, records // 20)),
        proxy=min(5000, records // 5),
        records_per_device=_SHARD,
    )
    default = replace(
        default,
        test=0 if given_test else default.test,
        proxy=default.proxy if config.proxy is None else 0,
    )
    if config.public is not None:
        return _whole_file(config, records, given_test=given_test)
    return PublicSizes(
        test=default.test if config.test_records is None else config.test_records,
        public=default.public if config.public_records is None else config.public_records,
        validation=default.validation if config.validation_records is None else config.validation_records,
        proxy=default.proxy if config.proxy_records is None else config.proxy_records,
        records_per_device=default.records_per_device,
    )


def none_public(config: DataConfig) -> PublicSizes:
    """Of data whose public records are in a file of their own."""
    known = _BY_SOURCE.get(config.source)
    return PublicSizes(0, 0, 0, 0, _SHARD if known is None else known.records_per_device)


def _whole_file(config: DataConfig, records: int, *, given_test: bool) -> PublicSizes:
    """Of a file of public records: a fifth to the test and to the proxy, where these have no files of their
    own, a tenth to validation, at most 10,000, 5,000 and 1,000; the rest is the public labelled set."""
    wished = {
        "test": 0 if given_test else config.test_records or min(10_000, max(1, records // 5)),
        "proxy": 0 if config.proxy else config.proxy_records,
        "validation": config.validation_records or min(1000, max(1, records // 10)),
    }
    if wished["proxy"] is None:
        wished["proxy"] = min(5000, max(1, records // 5))
    sizes = {name: size for name, size in wished.items() if size is not None}
    public = records - sum(sizes.values())
    if public < 1:
        shown = ", ".join(f"{size} to {name}" for name, size in sizes.items() if size)
        raise DataError(
            f"{config.public}: {records} records give {shown}, and leave none to learn from; add records, or "
            "lower these"
        )
    return PublicSizes(**sizes, public=public, records_per_device=_SHARD)


def draw_public_sets(
    labels: Indices,
    config: DataConfig,
    sizes: PublicSizes,
    gap: tuple[int, ...],
    *,
    classes: int,
    seed: int,
    names: tuple[str, ...] | None,
) -> tuple[PublicSets, Indices]:
    """The public sets, and all records that no device may hold: on whose labels the sets depend.

    Arguments are as of `split.split_indices`; ``sizes`` leave a record at least.

    Raises:
        DataError: too few records outside the gap, or the label of a public record is no class.
    """
    if not sizes.total:
        return PublicSets(*[NO_RECORDS] * 4), NO_RECORDS
    if config.source in PUBLIC_SOURCES:
        found = draw_of_all(labels, config, sizes, gap, classes=classes, seed=seed)
        return found, found.shown
    keys = _keys(len(labels), seed, names)
    order = np.argsort(keys, kind="stable")
    for size in _pool_sizes(sizes.total, keys[order]):
        pool = order[:size]
        _check_classes(pool, labels, classes, config)
        try:
            return _drawn(pool, labels, config, sizes, gap, classes), pool
        except DataError:
            if size == len(order):
                raise
    raise AssertionError("the last pool holds all records")


def draw_of_all(
    labels: Indices,
    config: DataConfig,
    sizes: PublicSizes,
    gap: tuple[int, ...],
    *,
    classes: int,
    seed: int,
) -> PublicSets:
    """The sets of a source that is public as a whole. Arguments and errors as of `draw_public_sets`."""
    order = Stream.PUBLIC.generator(seed).permutation(len(labels))
    _check_classes(order, labels, classes, config)
    return _drawn(order, labels, config, sizes, gap, classes)


def _keys(records: int, seed: int, names: tuple[str, ...] | None) -> NDArray[np.float64]:
    """A random key for each record, whatever it holds and whatever others there are."""
    if names is None:
        return Stream.PUBLIC.generator(seed).random(records)
    return np.array([derive_seed(seed, "public", name) for name in names], dtype=np.float64)


def _pool_sizes(least: int, keys: NDArray[np.float64]) -> Iterator[int]:
    """Sizes to try, a hundredth larger each; records of one key are in or out together."""
    size = least
    while size < len(keys):
        size = int(np.searchsorted(keys, keys[size - 1], side="right"))
        yield size
        size += max(1, size // 100)
    yield len(keys)


def _check_classes(pool: Indices, labels: Indices, classes: int, config: DataConfig) -> None:
    strange = pool[labels[pool] == classes]
    if strange.size:
        raise DataError(
            f"source {config.public or config.source!r}: record {strange.min()} is public, but its label is "
            f"none of the {classes} classes; name it too with --classes, or remove the record"
        )


def _drawn(
    order: Indices,
    labels: Indices,
    config: DataConfig,
    sizes: PublicSizes,
    gap: tuple[int, ...],
    classes: int,
) -> PublicSets:
    """The sets from the records of ``order``, stratified by the census of these alone."""
    census = np.bincount(labels[order], minlength=classes)
    test = _take(order, labels, proportional(census, sizes.test))
    rest = without(order, test)
    # Proxy from the back, public sets from the front: the size of one leaves the other alone.
    proxy, rest = rest[len(rest) - sizes.proxy :], rest[: len(rest) - sizes.proxy]
    public = _take(rest, labels, _public_quota(census, labels[rest], sizes.public, config, gap))
    rest = without(rest, public)
    validation = _take(rest, labels, _public_quota(census, labels[rest], sizes.validation, config, gap))
    return PublicSets(test, public, validation, proxy)


def choose_gap_classes(config: DataConfig, classes: int, rng: np.random.Generator) -> tuple[int, ...]:
    """The classes that the public labelled sets lack, sorted; by default half of them, drawn by ``rng``.

    Raises:
        ConfigError: a class out of range, or classes named for a gap that concerns none.
    """
    if config.simulated_gap not in ("rare", "withheld"):
        if config.gap_classes:
            raise ConfigError(
                f"gap_classes={list(config.gap_classes)}: gap={config.simulated_gap!r} concerns no classes"
            )
        return ()
    if config.gap_classes is None:
        return tuple(sorted(int(label) for label in rng.permutation(classes)[: classes // 2]))
    beyond = [label for label in config.gap_classes if label >= classes]
    if beyond:
        raise ConfigError(f"gap_classes={list(config.gap_classes)}: expected classes of 0 to {classes - 1}")
    return tuple(sorted(set(config.gap_classes)))


def proportional(counts: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """``total`` divided in proportion to ``counts``, by largest remainder; no share exceeds its count.

    ``total`` must not exceed the sum of ``counts``.
    """
    if total == 0:
        return np.zeros_like(counts)
    whole = int(counts.sum())
    quota, remainder = np.divmod(counts * total, whole)
    largest = np.argsort(-remainder, kind="stable")[: total - int(quota.sum())]
    quota[largest] += 1
    return quota


def _public_quota(
    census: NDArray[np.int64], left: Indices, records: int, config: DataConfig, gap: tuple[int, ...]
) -> NDArray[np.int64]:
    """Records per class of a public labelled set of ``records``, drawn from records labelled ``left``.

    A rare class gets ``rare_share`` of ``records / classes``, and at least one record where there is one for
    each class at all. The other classes share the remainder as in the whole source's ``census``, or as in
    what is left where that is too little.
    """
    classes = len(census)
    room = np.bincount(left, minlength=classes)
    quota = np.zeros_like(room)
    concerned = list(gap)
    if config.simulated_gap == "rare" and config.rare_share > 0:
        fair = records / classes
        rare = max(min(round(config.rare_share * fair), int(fair)), int(fair >= 1))
        quota[concerned] = np.minimum(room[concerned], rare)
    room[concerned] = 0
    remainder = records - int(quota.sum())
    if remainder > room.sum():
        raise DataError(
            f"source {config.source!r}: a public labelled set of {records} with gap={config.simulated_gap!r} "
            f"needs {remainder} records outside the classes {concerned}, but {room.sum()} are left; "
            "lower public_records, validation_records or proxy_records, or name fewer gap_classes"
        )
    others = np.where(np.isin(np.arange(classes), concerned), 0, census)
    wish = proportional(others, remainder)
    return quota + (wish if (wish <= room).all() else proportional(room, remainder))


def _take(order: Indices, labels: Indices, quota: NDArray[np.int64]) -> Indices:
    """The first ``quota[class]`` records of each class in ``order``, in that order."""
    ordered = labels[order]
    by_label = np.argsort(ordered, kind="stable")
    counts = np.bincount(ordered, minlength=len(quota))
    starts = np.cumsum(counts) - counts
    rank = np.empty(len(order), dtype=np.int64)
    rank[by_label] = np.arange(len(order)) - np.repeat(starts, counts)
    return order[rank < quota[ordered]]


def without(order: Indices, taken: Indices) -> Indices:
    """``order`` less what is ``taken``."""
    return order[~np.isin(order, taken)]
