"""NumPy archives. They hold numbers or strings alone; pickled objects are refused, and never loaded."""

import lzma
import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from privkd.config import DataConfig
from privkd.data.columns import UNLABELLED, Beside, label_among, labelled
from privkd.data.dataset import MAX_VALUES, Array, RawSet, Source, make_source
from privkd.errors import ConfigError, DataError, one_line

_INPUT_NAMES = ("x", "inputs", "input", "features", "data")
_SPLITS = (
    (("x_train", "y_train"), ("x_test", "y_test")),
    (("train_images", "train_labels"), ("test_images", "test_labels")),
)
"""Names of inputs and labels to train on and to test on: those of Keras, and of MedMNIST (Yang et al.)."""
_DEFLATE_MAX_RATIO = 1032
_FREELY, _LIKELY_RATIO = 1 << 30, 200
"""Bytes that an array may unpack to however small it was packed, and how many times its size beyond that."""
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_ARCHIVE_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
    MemoryError,
)


def load_npz(path: Path, name: str, config: DataConfig) -> Source:
    """An archive with inputs (``x``, ``inputs``, ...) and labels (``y``, ``labels``, ``target``, ...).

    ``x_train, y_train, x_test, y_test``, or ``train_images, train_labels, test_images, test_labels``, bring a
    test split of their own. Case does not matter.
    ``config.label`` names the array of the labels, ``config.group`` that of the groups, ``config.drop``
    arrays that are neither.

    Raises:
        ConfigError: a setting names no array.
        DataError: damaged, pickled, larger than the file can hold, without the arrays, or two could be the
            labels.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {Path(info.filename).stem.lower(): info for info in archive.infolist()}
            group = _group_name(list(members), config, path)
            keys = [key for key in _without(list(members), config, path) if key not in group]
            pair, test = _array_names(keys, config, path)
            arrays = {key: _read_npy(archive, members[key], path) for key in (*pair, *test, *group)}
    except _ARCHIVE_ERRORS as error:
        raise DataError(
            f"{path}: not a readable npz archive ({one_line(error)}); save it with numpy.savez"
        ) from error
    split = RawSet(arrays[test[0]], arrays[test[1]]) if test else None
    taken = {
        "label": f"array {pair[1]!r}" if pair[1:] else UNLABELLED,
        "features": f"array {pair[0]!r}",
        **({"test split": f"arrays {test[0]!r} and {test[1]!r}"} if test else {}),
    }
    if group:
        taken["group"] = f"array {group[0]!r}, as set"
    left_out = [key for key in members if key not in (*pair, *test, *group)]
    if left_out:
        taken["left out"] = ", ".join(map(repr, left_out))
    groups = arrays[group[0]] if group else None
    records = RawSet(arrays[pair[0]], arrays[pair[-1]], groups=groups)
    return make_source(
        name,
        records,
        split,
        classes=config.classes,
        taken=taken,
        tokens=config.tokens,
        labelled=labelled(config),
    )


def read_arrays(path: Path) -> dict[str, Array]:
    """All arrays of an archive by their names.

    Raises:
        DataError: damaged, pickled, larger than the file can hold, or two arrays of one name.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [Path(info.filename).stem for info in archive.infolist()]
            if twice := {name for name in names if names.count(name) > 1}:
                raise DataError(f"{path}: two arrays are called {min(twice)!r}; save each once")
            infos = zip(names, archive.infolist(), strict=True)
            return {name: _read_npy(archive, info, path) for name, info in infos}
    except _ARCHIVE_ERRORS as error:
        raise DataError(
            f"{path}: not a readable npz archive ({one_line(error)}); save it with numpy.savez"
        ) from error


def _without(keys: Sequence[str], config: DataConfig, path: Path) -> list[str]:
    for name in config.drop:
        if name.lower() not in keys and not isinstance(config, Beside):
            raise ConfigError(
                f"data.drop={name!r}: {path} has no such array; it has {', '.join(keys) or 'none'}"
            )
    return [key for key in keys if key not in [name.lower() for name in config.drop]]


def _group_name(keys: Sequence[str], config: DataConfig, path: Path) -> tuple[str, ...]:
    """The array that says whose each record is; none unless one is set."""
    if config.group is None or isinstance(config, Beside):
        return ()
    if config.group.lower() not in keys:
        raise ConfigError(
            f"data.group={config.group!r}: {path} has no such array; it has {', '.join(keys) or 'none'}"
        )
    return (config.group.lower(),)


def _array_names(
    keys: Sequence[str], config: DataConfig, path: Path
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of inputs and, where they are needed, labels; and those of the test split if there is one."""
    wanted = None if config.label is None else config.label.lower()
    if wanted is not None and wanted not in keys and labelled(config):
        raise ConfigError(
            f"data.label={config.label!r}: {path} has no such array; it has {', '.join(keys) or 'none'}"
        )
    for train, test in _SPLITS:
        if wanted in (None, train[1]) and all(key in keys for key in train):
            return train, test if all(key in keys for key in test) else ()
    label = wanted
    if wanted is None:
        place = label_among(keys, str(path), "arrays")
        label = None if place is None else keys[place]
    inputs = [key for key in _INPUT_NAMES if key in keys and key != label]
    if inputs and not labelled(config):
        return (inputs[0],), ()
    if not inputs or label is None:
        found = ", ".join(keys) or "none"
        raise DataError(
            f"{path}: arrays x and y are wanted, found {found}; save with numpy.savez(path, x=..., y=...)"
        )
    return (inputs[0], label), ()


def _read_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Array:
    """One array, its header checked against the bytes that are really there before memory is taken."""
    if info.file_size > min(8 * MAX_VALUES, max(info.compress_size, 1) * _DEFLATE_MAX_RATIO):
        raise DataError(f"{path}: array {info.filename} claims {info.file_size} bytes, more than it can hold")
    if info.file_size > max(_FREELY, info.compress_size * _LIKELY_RATIO):
        raise DataError(
            f"{path}: array {info.filename} unpacks from {info.compress_size} bytes to {info.file_size}, "
            "which looks like a trap; save it with numpy.savez, unpacked"
        )
    with archive.open(info) as member:
        _check_npy_header(member, info, path)
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _check_npy_header(member: IO[bytes], info: zipfile.ZipInfo, path: Path) -> None:
    version = np.lib.format.read_magic(member)
    if version not in _NPY_HEADERS:
        raise DataError(
            f"{path}: array {info.filename} is of an unknown version {version}; save plain arrays"
        )
    shape, _, dtype = _NPY_HEADERS[version](member)
    if dtype.hasobject:
        raise DataError(
            f"{path}: array {info.filename} holds pickled objects, refused; save numbers or strings"
        )
    payload = info.file_size - member.tell()
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != payload:
        raise DataError(f"{path}: array {info.filename} declares shape {shape} but holds {payload} bytes")
