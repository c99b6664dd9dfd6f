"""Parquet files: encoded images with a label, or numeric columns with a label.

The only importer of pyarrow.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from privkd.data.images import decode_images
from privkd.data.source import MAX_VALUES, Array, RawSet, Source, make_source
from privkd.data.tabular import LABEL_NAMES, label_column, named_label
from privkd.errors import DataError, one_line

_IMAGE_BYTES = "bytes"


def load_parquet(path: Path, name: str, test: Path | None = None) -> Source:
    """Read a Parquet file, and another that holds its test split.

    Images are a column ``struct<bytes, ...>`` or of plain binary values; other columns but the label are then
    ignored. Otherwise every column but the label is a feature and must be numeric.

    Raises:
        DataError: pyarrow is not installed, or a file is damaged, lacks columns or holds what is no number.
    """
    return make_source(name, _read(path), None if test is None else _read(test))


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("Parquet files need pyarrow; run: pip install 'privkd[parquet]'") from error
    return pyarrow, pyarrow.parquet


def _read(path: Path) -> RawSet:
    """Inputs and labels of one file."""
    pyarrow, parquet = _pyarrow()
    try:
        with parquet.ParquetFile(path) as file:
            rows, columns = file.metadata.num_rows, file.metadata.num_columns
            if rows * columns > MAX_VALUES:
                raise DataError(f"{path}: declares {rows} rows of {columns} columns; give fewer records")
            return _parse(pyarrow, file.read(), path)
    except (pyarrow.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({one_line(error)}); write it again") from error


def _parse(pyarrow: ModuleType, table: Any, path: Path) -> RawSet:
    if not table.num_rows:
        raise DataError(f"{path}: no records; give at least two")
    image = _image_column(pyarrow, table)
    if image is None:
        label = label_column(table.column_names, str(path))
        return RawSet(_features(pyarrow, table, label, path), _labels(pyarrow, table, label, path))
    named = named_label(table.column_names, str(path))
    if named is None:
        wanted, found = ", ".join(LABEL_NAMES), ", ".join(map(repr, table.column_names))
        raise DataError(f"{path}: no label column among {found}; name one of its columns {wanted}")
    pixels, colour = _images(pyarrow, table.column(image), path)
    return RawSet(pixels, _labels(pyarrow, table, named, path), colour)


def _image_column(pyarrow: ModuleType, table: Any) -> int | None:
    """Index of the first column of binary values, or of structs with binary ``bytes``."""
    types = pyarrow.types
    for index, field in enumerate(table.schema):
        kind = field.type
        if types.is_struct(kind):
            inner = kind.get_field_index(_IMAGE_BYTES)
            kind = kind.field(inner).type if inner >= 0 else kind
        if types.is_binary(kind) or types.is_large_binary(kind):
            return index
    return None


def _images(pyarrow: ModuleType, column: Any, path: Path) -> tuple[Array, Array]:
    if pyarrow.types.is_struct(column.type):
        inner = column.type.get_field_index(_IMAGE_BYTES)
        # `flatten`, unlike `field`, makes the bytes of a missing struct missing too.
        column = pyarrow.chunked_array([chunk.flatten()[inner] for chunk in column.chunks])
    if column.null_count:
        raise DataError(f"{path}: {column.null_count} images are missing; fill in or remove their rows")
    return decode_images(column.to_pylist(), (f"{path}, row {row}" for row in range(len(column))))


def _features(pyarrow: ModuleType, table: Any, label: int, path: Path) -> Array:
    """Every column but the label, as ``[record, feature]``."""
    types = pyarrow.types
    columns = []
    for index, field in enumerate(table.schema):
        if index == label:
            continue
        kind = field.type
        if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
            raise DataError(
                f"{path}: column {field.name!r} of type {kind} is not numeric; encode it as numbers"
            )
        columns.append(_values(table.column(index), field.name, path))
    if not columns:
        raise DataError(f"{path}: no feature columns beside the label; give at least one")
    return np.stack(columns, axis=1)


def _labels(pyarrow: ModuleType, table: Any, index: int, path: Path) -> Array:
    column, name = table.column(index), table.column_names[index]
    types = pyarrow.types
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if types.is_string(column.type) or types.is_large_string(column.type):
        column = column.fill_null("")
        return np.array(column.to_pylist(), dtype=np.str_)
    if not (types.is_integer(column.type) or types.is_floating(column.type) or types.is_boolean(column.type)):
        raise DataError(
            f"{path}: label column {name!r} of type {column.type} names no classes; give integers or text"
        )
    return _values(column, name, path)


def _values(column: Any, name: str, path: Path) -> Array:
    if column.null_count:
        raise DataError(
            f"{path}: column {name!r} has {column.null_count} missing values; impute or remove them"
        )
    return np.asarray(column.to_numpy())
