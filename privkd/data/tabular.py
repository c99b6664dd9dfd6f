"""Tables of numbers: NumPy archives and CSV files.

Archives hold numbers or strings alone; pickled objects are refused, and never loaded.
"""

import csv
import itertools
import lzma
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np

from privkd.config import DataConfig
from privkd.config.labels import is_missing, is_number
from privkd.data.columns import (
    LABEL_NAMES,
    UNLABELLED,
    Beside,
    Columns,
    choose_columns,
    label_among,
    labelled,
)
from privkd.data.dataset import MAX_VALUES, Array, RawSet, Source, make_source, texts_of
from privkd.errors import ConfigError, DataError, one_line

_SHOWN = 40


def has_header(cells: Sequence[str], config: DataConfig, origin: str) -> bool:
    """Whether ``cells``, of the first line, are names: as set, else as they tell.

    A feature is a number, so a line with text where features stand holds names, unless there are numbers
    beside it and none of it is the label's name. A line of numbers is a record, with or without text at its
    end.

    Raises:
        DataError: the line could be either: numbers that count the columns; text beside numbers; a label's
            name that may be a class.
    """
    if config.header != "auto":
        return config.header == "yes"
    if isinstance(config, Beside) and config.features:
        return bool(set(config.features) & set(cells))
    numbers = [cell for cell in cells if is_number(cell)]
    words = [cell for cell in cells if cell not in numbers and not is_missing(cell)]
    in_features = [cell for cell in cells[:-1] if cell in words]
    counting = _counts(cells) or (_counts(cells[:-1]) and len(cells) > 2 and cells[-1] in words)
    names_label = any(word.lower() in LABEL_NAMES for word in words) or config.label in words
    if words and (not numbers or (names_label and (in_features or counting))):
        return True
    if in_features or counting or names_label:
        line = ",".join(cells)
        shown = line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."
        raise DataError(
            f"{origin}: the first line, {shown!r}, could be a header or a record; say which with "
            "--set data.header=yes or --set data.header=no"
        )
    return False


def _counts(cells: Sequence[str]) -> bool:
    """Whether ``cells`` count from 0 or from 1, as columns without names are called."""
    return list(cells) in ([str(number + first) for number in range(len(cells))] for first in (0, 1))


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


def load_csv(path: Path, name: str, config: DataConfig) -> Source:
    """Comma-separated numeric features and one label column, with or without a header.

    For what is a header see `header.has_header`. The label is the column ``config.label``, else the one
    called ``label``, ``y``, ``class`` or ``target``, else, without a header, the last; it may be text.

    Raises:
        ConfigError: a setting names no column.
        DataError: not text, lines of unequal length, a feature that is not a number, a label missing, or
            nothing tells whether there is a header or which column is the label.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            records, columns = _parse_csv(file, path, config)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not readable as CSV ({one_line(error)}); save it as UTF-8 text") from error
    source = make_source(name, records, classes=config.classes, taken=columns.said, labelled=labelled(config))
    return replace(
        source,
        columns=columns.feature_names,
        label=columns.label_name,
        label_by_place=columns.by_place,
    )


def _parse_csv(file: IO[str], path: Path, config: DataConfig) -> tuple[RawSet, Columns]:
    lines = _cells(file)
    number, first = next(lines, (0, []))
    if not first:
        raise DataError(f"{path}: empty; give a line per record")
    if len(first) < 2 and labelled(config):
        raise DataError(f"{path}: one column only; separate features and label by commas")
    header = has_header(first, config, str(path))
    names = first if header else [f"column {column}" for column in range(1, len(first) + 1)]
    columns = choose_columns(names, config, str(path), named=header)
    said = "the first line names the columns" if header else "none, the first line is a record"
    columns = replace(columns, said={"header": said, **columns.said})
    rows, texts, labels, groups = [], [], [], []
    records = lines if header else itertools.chain([(number, first)], lines)
    for number, cells in records:
        if len(cells) != len(first):
            raise DataError(
                f"{path}: line {number} has {len(cells)} cells, the first has {len(first)}; mend it"
            )
        labels.append("" if columns.label is None else cells[columns.label])
        if columns.group is not None:
            groups.append(cells[columns.group])
        if config.text is not None:
            texts.append(cells[columns.features[0]])
            continue
        rows.append(
            _numbers(
                [cells[column] for column in columns.features],
                f"{path}: line {number}",
                [names[column] for column in columns.features],
            )
        )
    if not labels:
        raise DataError(f"{path}: a header but no records; give a line per record")
    whose = np.array(groups, dtype=np.str_) if columns.group is not None else None
    inputs = np.stack(rows) if config.text is None else texts_of(texts)
    return RawSet(inputs, np.array(labels, dtype=np.str_), groups=whose), columns


def _cells(file: IO[str]) -> Iterator[tuple[int, list[str]]]:
    """Line number and stripped cells of every line that is not blank."""
    reader = csv.reader(file, strict=True)
    for cells in reader:
        if cells:
            yield reader.line_num, [cell.strip() for cell in cells]


def _numbers(cells: Sequence[str], line: str, names: Sequence[str]) -> Array:
    try:
        return np.array(cells, dtype=np.float64)
    except ValueError as error:
        bad = next(column for column, cell in enumerate(cells) if not is_number(cell))
        cure = (
            "encode it as a number, leave its column out with --drop, or take it for the label with --label"
        )
        if len(cells) == 1:
            cure = f"where it is the records' text, say --text {names[0]!r}"
        raise DataError(f"{line}, {names[bad]!r}: {cells[bad]!r} is not a number; {cure}") from error
