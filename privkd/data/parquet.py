"""Parquet and Arrow files: encoded images with a label, or numeric columns with a label.

The only importer of pyarrow.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import numpy as np

from privkd.config import DataConfig
from privkd.config.labels import is_missing
from privkd.data.cells import categorical, said_of_missing, table_of
from privkd.data.columns import Columns, choose_columns, labelled
from privkd.data.dataset import MAX_VALUES, Array, RawSet, Source, Words, make_source, texts_of
from privkd.data.encoding import dates
from privkd.data.images import decode_images
from privkd.errors import DataError, one_line

_IMAGE_BYTES = "bytes"
_IMAGE_NAMES = ("image", "img")
_INDEX = re.compile(r"__index_level_[0-9]+__")


class _Table(NamedTuple):
    """Records of a table, what was taken for what, and the feature columns' names, of which images have none,
    and the label's."""

    records: RawSet
    said: dict[str, str]
    features: tuple[str, ...]
    label: str | None


def load_parquet(
    paths: Sequence[Path],
    name: str,
    config: DataConfig,
    test: Sequence[Path] = (),
    taken: Mapping[str, str] | None = None,
    class_names: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> Source:
    """Read the files of a data set, one after the other, and those that hold its test split.

    Images are a column ``struct<bytes, ...>`` or of plain binary values; other columns but the label are then
    left out. Otherwise every column but the label is a feature and must be numeric; the index of a pandas
    table is none.

    Args:
        paths: one file, or the shards of one table.
        name: what messages call the data set.
        config: the settings on columns.
        test: likewise; empty where there is no test split.
        taken: what was taken for what before the files were read, in words.
        class_names: of columns that number classes, those of the classes by the column's name.

    Raises:
        ConfigError: a setting names no column.
        DataError: pyarrow is not installed, a file is damaged, lacks columns or holds what is no number, or
            nothing tells which column is the label or the image.
    """
    records, said, features, label = _read(paths, config)
    split = None
    if test:
        split, _, theirs, _ = _read(test, config)
        if theirs != features:
            raise DataError(
                f"{test[0]}: its features are not those of {paths[0].name}, or stand in another order; write "
                "them alike"
            )
    names = class_names.get(label or "", ())
    known = {*(config.classes or ()), *names}
    if names:
        records = replace(records, labels=_in_names(records.labels, names, str(paths[0])))
        split = split and replace(split, labels=_in_names(split.labels, names, str(test[0])))
    said = {**said, **(taken or {})}
    source = make_source(name, records, split, classes=known, taken=said, labelled=labelled(config))
    return replace(source, columns=features, label=label)


def _in_names(labels: Array, names: Sequence[str], origin: str) -> Array:
    """Classes by name of their numbers ``[record]``."""
    if labels.dtype.kind not in "iu":
        return labels
    strange = (labels < 0) | (labels >= len(names))
    if strange.any():
        row = int(np.argmax(strange))
        raise DataError(
            f"{origin}: label {labels[row]} of record {row} is the number of none of the {len(names)} "
            "classes; give it one or remove the record"
        )
    return np.array(names, dtype=np.str_)[labels]


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("Parquet files need pyarrow; run: pip install 'privkd[parquet]'") from error
    return pyarrow, pyarrow.parquet


def _read(paths: Sequence[Path], config: DataConfig) -> _Table:
    """Inputs and labels of a table's files."""
    pyarrow, parquet = _pyarrow()
    tables: list[Any] = []
    for path in paths:
        try:
            before = sum(table.num_rows for table in tables)
            if path.suffix == ".arrow":
                tables.append(_mapped(pyarrow, path, before))
                continue
            with parquet.ParquetFile(path) as file:
                _check_size(path, file.metadata.num_rows, file.metadata.num_columns, before)
                tables.append(file.read())
        except _unreadable(pyarrow) as error:
            raise DataError(
                f"{path}: not a readable {_kind(path)} file ({one_line(error)}); write it again"
            ) from error
    for path, table in zip(paths, tables, strict=True):
        if not table.schema.equals(tables[0].schema):
            raise DataError(
                f"{path}: its columns or their types are not those of {paths[0].name}; write them alike"
            )
    origin = _Origin(paths, [table.num_rows for table in tables])
    try:
        whole = tables[0] if len(tables) == 1 else pyarrow.concat_tables(tables)
        return _parse(pyarrow, whole, origin, config)
    except _unreadable(pyarrow) as error:
        raise DataError(
            f"{paths[0]}: not a readable {_kind(paths[0])} file ({one_line(error)}); write it again"
        ) from error


def arrow_columns(path: Path) -> tuple[str, ...]:
    """The columns of an Arrow stream by name.

    Raises:
        DataError: pyarrow is not installed, or the file is damaged.
    """
    pyarrow, _ = _pyarrow()
    try:
        with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
            return tuple(stream.schema.names)
    except _unreadable(pyarrow) as error:
        raise DataError(f"{path}: not a readable Arrow file ({one_line(error)}); write it again") from error


def _mapped(pyarrow: ModuleType, path: Path, before: int) -> Any:
    """The table of an Arrow stream, in the memory that the file takes, checked through and through."""
    with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
        table = stream.read_all()
    _check_size(path, table.num_rows, table.num_columns, before)
    table.validate(full=True)
    return table


def _check_size(path: Path, rows: int, columns: int, before: int) -> None:
    if (before + rows) * columns > MAX_VALUES:
        raise DataError(f"{path}: declares {rows} rows of {columns} columns; give fewer records")


def _kind(path: Path) -> str:
    return "Arrow" if path.suffix == ".arrow" else "Parquet"


def read_columns(path: Path, wanted: Sequence[str]) -> dict[str, Array]:
    """The columns ``wanted`` of a file, of numbers, truth values or text, each ``[row]``.

    Raises:
        DataError: pyarrow is not installed, the file is damaged, or a column is missing, there twice, of
            another type, or lacks values.
    """
    pyarrow, parquet = _pyarrow()
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for name in wanted:
                if names.count(name) != 1:
                    there = "there twice" if name in names else "missing"
                    raise DataError(
                        f"{path}: column {name!r} is {there}; it has {', '.join(names) or 'none'}"
                    )
            if file.metadata.num_rows * len(wanted) > MAX_VALUES:
                raise DataError(f"{path}: declares {file.metadata.num_rows} rows; give fewer records")
            table = file.read(list(wanted))
        origin = _Origin([path], [table.num_rows])
        places = [table.column_names.index(name) for name in wanted]
        values = [_texts_or_numbers(pyarrow, table, place, origin, "column", "values") for place in places]
    except _unreadable(pyarrow) as error:
        raise DataError(f"{path}: not a readable Parquet file ({one_line(error)}); write it again") from error
    return dict(zip(wanted, values, strict=True))


def _unreadable(pyarrow: ModuleType) -> tuple[type[Exception], ...]:
    return (pyarrow.ArrowException, OSError, MemoryError, UnicodeDecodeError)


@dataclass(frozen=True)
class _Origin:
    """The files of a table and how many ``rows`` each has, as messages call them."""

    paths: Sequence[Path]
    rows: Sequence[int]

    def __str__(self) -> str:
        more = len(self.paths) - 1
        return f"{self.paths[0]}" + (f" and {more} more" if more else "")


def _parse(pyarrow: ModuleType, table: Any, origin: _Origin, config: DataConfig) -> _Table:
    if not table.num_rows:
        raise DataError(f"{origin}: no records; give at least two")
    columns = choose_columns(table.column_names, config, str(origin), index=_row_numbers(table))
    text = columns.features[0] if config.text is not None else None
    image = None if config.text is not None else _image_column(pyarrow, table, columns, str(origin))
    labels = (
        np.full(table.num_rows, "")
        if columns.label is None
        else _texts_or_numbers(pyarrow, table, columns.label, origin, "label column", "classes")
    )
    groups = (
        None
        if columns.group is None
        else _texts_or_numbers(pyarrow, table, columns.group, origin, "column", "groups")
    )
    if text is not None:
        texts = _texts(pyarrow, table.column(text), table.column_names[text], origin)
        records = RawSet(texts, labels, groups=groups)
        return _Table(records, columns.said, columns.feature_names, columns.label_name)
    if image is None:
        inputs, words = _features(pyarrow, table, columns, origin, config)
        records = RawSet(inputs, labels, groups=groups, words=words)
        records = table_of(records, columns.feature_names, config, str(origin))
        said = {**columns.said, **said_of_missing(config)}
        return _Table(records, said, columns.feature_names, columns.label_name)
    pixels, colour = _images(pyarrow, table, image, origin, config.image_size)
    records = RawSet(pixels, labels, colour, groups)
    return _Table(records, _of_images(table, columns, image), (), columns.label_name)


def _of_images(table: Any, columns: Columns, image: int) -> dict[str, str]:
    names = table.column_names
    used = (columns.label, columns.group, image)
    left_out = [repr(name) for number, name in enumerate(names) if number not in used]
    return {
        **{name: columns.said[name] for name in ("label", "group") if name in columns.said},
        "image": f"column {names[image]!r}",
        **({"left out": ", ".join(left_out)} if left_out else {}),
    }


def _row_numbers(table: Any) -> set[str]:
    """The columns that hold the index of a pandas table, as its metadata say, or as pandas calls them."""
    found = {name for name in table.column_names if _INDEX.fullmatch(name)}
    try:
        told = json.loads((table.schema.metadata or {}).get(b"pandas", b"{}"))
    except (ValueError, RecursionError):
        return found
    index = told.get("index_columns") if isinstance(told, dict) else None
    return (
        found | {name for name in index or () if isinstance(name, str)} if isinstance(index, list) else found
    )


def _image_column(pyarrow: ModuleType, table: Any, columns: Columns, origin: str) -> int | None:
    """Index of the column of binary values, or of structs with binary ``bytes``: of several, the one that is
    called ``image`` or ``img``, else the only struct.

    Raises:
        DataError: several could be.
    """
    found = [number for number in columns.features if _binary(pyarrow, table.schema.field(number).type)]
    named = [number for number in found if table.column_names[number].lower() in _IMAGE_NAMES]
    structs = [number for number in found if pyarrow.types.is_struct(table.schema.field(number).type)]
    for candidates in (named, structs, found):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            names = ", ".join(repr(table.column_names[number]) for number in candidates)
            raise DataError(f"{origin}: {names} could be the images; leave all but one out with --drop")
    return None


def _binary(pyarrow: ModuleType, kind: Any) -> bool:
    types = pyarrow.types
    if types.is_struct(kind):
        inner = kind.get_field_index(_IMAGE_BYTES)
        kind = kind.field(inner).type if inner >= 0 else kind
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _images(
    pyarrow: ModuleType, table: Any, image: int, origin: _Origin, image_size: int | None
) -> tuple[Array, Array]:
    column, name = table.column(image), table.column_names[image]
    if pyarrow.types.is_struct(column.type):
        inner = column.type.get_field_index(_IMAGE_BYTES)
        # `flatten`, unlike `field`, makes the bytes of a missing struct missing too.
        column = pyarrow.chunked_array([chunk.flatten()[inner] for chunk in column.chunks])
    if column.null_count:
        raise DataError(f"{origin}: {column.null_count} images are missing; fill in or remove their rows")
    places = (
        f"{path}, row {row}, column {name!r}"
        for path, rows in zip(origin.paths, origin.rows, strict=True)
        for row in range(rows)
    )
    return decode_images(column.to_pylist(), places, image_size)


def _features(
    pyarrow: ModuleType, table: Any, columns: Columns, origin: _Origin, config: DataConfig
) -> tuple[Array, dict[int, Words]]:
    """The feature columns ``[record, feature]``, and those of text by their places among them."""
    text = categorical(table.column_names, columns.feature_names, config, str(origin))
    found: list[Array] = []
    words: dict[int, Words] = {}
    for place, index in enumerate(columns.features):
        column, name = table.column(index), table.column_names[index]
        told = _words(pyarrow, column, forced=name in text)
        if told is not None:
            words[place] = told
            found.append(np.full(len(column), np.nan))
        else:
            found.append(_numbers(pyarrow, column, name, origin))
    return np.stack(found, axis=1), words


def _words(pyarrow: ModuleType, column: Any, *, forced: bool) -> Words | None:
    """A column of text, or one that is ``forced`` to be; ``None`` of any other."""
    types, kind = pyarrow.types, column.type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    text = types.is_string(kind) or types.is_large_string(kind)
    if not (
        text or (forced and (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)))
    ):
        return None
    coded = column.cast(kind).cast(pyarrow.large_string()).combine_chunks().dictionary_encode()
    if isinstance(coded, pyarrow.ChunkedArray):
        coded = coded.combine_chunks()
    values = [value.strip() for value in coded.dictionary.to_pylist()]
    known: dict[str, int] = {}
    places = [-1 if is_missing(value) else known.setdefault(value, len(known)) for value in values]
    codes = coded.indices.fill_null(len(values)).to_numpy(zero_copy_only=False)
    return Words(tuple(known), np.array([*places, -1], dtype=np.int32)[codes])


def _numbers(pyarrow: ModuleType, column: Any, name: str, origin: _Origin) -> Array:
    """A column of numbers, NaN where one is missing."""
    types, kind = pyarrow.types, column.type
    if types.is_temporal(kind):
        shown = next((str(value) for value in column.to_pylist() if value is not None), str(kind))
        raise DataError(f"{origin}: {dates(name, shown)}")
    if types.is_decimal(kind) or types.is_null(kind) or types.is_boolean(kind):
        column = column.cast(pyarrow.float64() if not types.is_boolean(kind) or column.null_count else kind)
    elif not (types.is_integer(kind) or types.is_floating(kind)):
        raise DataError(
            f"{origin}: column {name!r} of type {kind} is not numeric; encode it as numbers, or leave it out "
            "with --drop"
        )
    return np.asarray(column.to_numpy())


def _texts_or_numbers(
    pyarrow: ModuleType, table: Any, index: int, origin: _Origin, what: str, names: str
) -> Array:
    column, name = table.column(index), table.column_names[index]
    types = pyarrow.types
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if types.is_string(column.type) or types.is_large_string(column.type):
        column = column.fill_null("")
        return np.array(column.to_pylist(), dtype=np.str_)
    if not (types.is_integer(column.type) or types.is_floating(column.type) or types.is_boolean(column.type)):
        raise DataError(
            f"{origin}: {what} {name!r} of type {column.type} names no {names}; give integers or text"
        )
    return _values(column, name, origin)


def _texts(pyarrow: ModuleType, column: Any, name: str, origin: _Origin) -> Array:
    """A column of text, as `str` objects."""
    types = pyarrow.types
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (types.is_string(column.type) or types.is_large_string(column.type)):
        raise DataError(f"{origin}: data.text={name!r}: a column of type {column.type} is no text")
    if column.null_count:
        raise DataError(f"{origin}: column {name!r} has {column.null_count} missing texts; remove their rows")
    return texts_of(column.to_pylist())


def _values(column: Any, name: str, origin: _Origin) -> Array:
    if column.null_count:
        raise DataError(
            f"{origin}: column {name!r} has {column.null_count} missing values; impute or remove them"
        )
    return np.asarray(column.to_numpy())
