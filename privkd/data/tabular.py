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
from pathlib import Path
from typing import IO

import numpy as np

from privkd.data.source import MAX_VALUES, Array, RawSet, Source, make_source
from privkd.errors import DataError, one_line
from privkd.labels import is_number

LABEL_NAMES = ("label", "labels", "y", "class", "target", "targets")
"""Column or array names that mark the labels, in any case, most telling first."""

_INPUT_NAMES = ("x", "inputs", "input", "features", "data")
_TRAIN_KEYS, _TEST_KEYS = ("x_train", "y_train"), ("x_test", "y_test")
_DEFLATE_MAX_RATIO = 1032
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


def load_npz(path: Path, name: str) -> Source:
    """An archive with inputs (``x``, ``inputs``, ...) and labels (``y``, ``labels``, ``target``, ...).

    ``x_train, y_train, x_test, y_test`` bring a test split of their own. Case does not matter.

    Raises:
        DataError: damaged, pickled, larger than the file can hold, or without the arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {Path(info.filename).stem.lower(): info for info in archive.infolist()}
            pair, test = _array_names(list(members), path)
            arrays = {key: _read_npy(archive, members[key], path) for key in (*pair, *test)}
    except _ARCHIVE_ERRORS as error:
        raise DataError(
            f"{path}: not a readable npz archive ({one_line(error)}); save it with numpy.savez"
        ) from error
    split = RawSet(arrays[test[0]], arrays[test[1]]) if test else None
    return make_source(name, RawSet(arrays[pair[0]], arrays[pair[1]]), split)


def _array_names(keys: Sequence[str], path: Path) -> tuple[tuple[str, str], tuple[str, ...]]:
    """Names of inputs and labels, and those of the test split if there is one."""
    if all(key in keys for key in _TRAIN_KEYS):
        return _TRAIN_KEYS, _TEST_KEYS if all(key in keys for key in _TEST_KEYS) else ()
    inputs = [key for key in _INPUT_NAMES if key in keys]
    labels = [key for key in LABEL_NAMES if key in keys]
    if not inputs or not labels:
        found = ", ".join(keys) or "none"
        raise DataError(
            f"{path}: arrays x and y are wanted, found {found}; save with numpy.savez(path, x=..., y=...)"
        )
    return (inputs[0], labels[0]), ()


def _read_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Array:
    """One array, its header checked against the bytes that are really there before memory is taken."""
    if info.file_size > min(8 * MAX_VALUES, max(info.compress_size, 1) * _DEFLATE_MAX_RATIO):
        raise DataError(f"{path}: array {info.filename} claims {info.file_size} bytes, more than it can hold")
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


def load_csv(path: Path, name: str) -> Source:
    """Comma-separated numeric features and one label column, with or without a header.

    A header is a first line that has text where a feature should be, or that names the label column.
    The label is the column called ``label``, ``y``, ``class`` or ``target``, else the last; it may be text.

    Raises:
        DataError: not text, lines of unequal length, a feature that is not a number, or a label missing.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return make_source(name, _parse_csv(file, path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not readable as CSV ({one_line(error)}); save it as UTF-8 text") from error


def _parse_csv(file: IO[str], path: Path) -> RawSet:
    lines = _cells(file)
    number, first = next(lines, (0, []))
    if not first:
        raise DataError(f"{path}: empty; give a line per record")
    if len(first) < 2:
        raise DataError(f"{path}: one column only; separate features and label by commas")
    header = _is_header(first)
    names = first if header else [f"column {column}" for column in range(1, len(first) + 1)]
    if "" in names:
        raise DataError(f"{path}: column {names.index('') + 1} of the header has no name; name or remove it")
    label = label_column(names, str(path)) if header else len(first) - 1
    rows, labels = [], []
    records = lines if header else itertools.chain([(number, first)], lines)
    for number, cells in records:
        if len(cells) != len(first):
            raise DataError(
                f"{path}: line {number} has {len(cells)} cells, the first has {len(first)}; mend it"
            )
        labels.append(cells[label])
        rows.append(
            _numbers(
                cells[:label] + cells[label + 1 :],
                f"{path}: line {number}",
                names[:label] + names[label + 1 :],
            )
        )
    if not rows:
        raise DataError(f"{path}: a header but no records; give a line per record")
    return RawSet(np.stack(rows), np.array(labels, dtype=np.str_))


def _cells(file: IO[str]) -> Iterator[tuple[int, list[str]]]:
    """Line number and stripped cells of every line that is not blank."""
    reader = csv.reader(file, strict=True)
    for cells in reader:
        if cells:
            yield reader.line_num, [cell.strip() for cell in cells]


def _is_header(cells: Sequence[str]) -> bool:
    words = [cell for cell in cells[:-1] if cell and not is_number(cell)]
    return bool(words) or any(cell.lower() in LABEL_NAMES for cell in cells)


def label_column(names: Sequence[str], origin: str) -> int:
    """Index of the column that is called like a label, else of the last one.

    Raises:
        DataError: two columns bear the same such name, or there is but one column.
    """
    if len(names) < 2:
        raise DataError(f"{origin}: one column only; give features and a label")
    named = named_label(names, origin)
    return len(names) - 1 if named is None else named


def named_label(names: Sequence[str], origin: str) -> int | None:
    """Index of the column that is called like a label, if there is one.

    Raises:
        DataError: two columns bear the same such name.
    """
    lowered = [name.lower() for name in names]
    for wanted in LABEL_NAMES:
        if lowered.count(wanted) > 1:
            raise DataError(f"{origin}: {lowered.count(wanted)} columns are called {wanted!r}; keep one")
        if wanted in lowered:
            return lowered.index(wanted)
    return None


def _numbers(cells: Sequence[str], line: str, names: Sequence[str]) -> Array:
    try:
        return np.array(cells, dtype=np.float64)
    except ValueError as error:
        bad = next(column for column, cell in enumerate(cells) if not is_number(cell))
        cure = "encode it as a number; a label column is the last or called label"
        raise DataError(f"{line}, {names[bad]!r}: {cells[bad]!r} is not a number; {cure}") from error
