"""CSV and TSV files: what separates cells, which line names the columns, and the cells of each."""

import csv
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np

from privkd.config import DataConfig
from privkd.config.labels import is_missing, is_number
from privkd.data.cells import Cells, categorical, pointed, said_of_missing, table_of
from privkd.data.columns import LABEL_NAMES, Beside, Columns, choose_columns, labelled
from privkd.data.dataset import MAX_VALUES, RawSet, Source, make_source, texts_of
from privkd.errors import DataError, one_line

SUFFIXES = (".csv", ".tsv", ".tab")

_SHOWN = 40
_DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t"}
_LONGEST_LINE = 1 << 24
_TOGETHER = 4096
"""Lines that are taken apart at once."""


def load_csv(path: Path, name: str, config: DataConfig) -> Source:
    """Features, numbers or text, and one label column, with or without a header.

    For what separates cells see `delimiter_of`, for what is a header `has_header`. The label is the column
    ``config.label``, else the one called ``label``, ``y``, ``class`` or ``target``, else, without a header,
    the last; it may be text.

    Raises:
        ConfigError: a setting names no column.
        DataError: not text, lines of unequal length, a feature of numbers and text, a value missing, or
            nothing tells what separates cells, whether there is a header or which column is the label.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            records, columns = _parse(file, path, config)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not readable as CSV ({one_line(error)}); save it as UTF-8 text") from error
    source = make_source(name, records, classes=config.classes, taken=columns.said, labelled=labelled(config))
    return replace(
        source, columns=columns.feature_names, label=columns.label_name, label_by_place=columns.by_place
    )


def delimiter_of(line: str, path: Path, config: DataConfig) -> str:
    """What separates cells: as set, else tabs in a ``.tsv`` file and commas in others, if nothing denies it.

    Raises:
        DataError: the first ``line`` has as many cells by something else.
    """
    if config.delimiter != "auto":
        return _DELIMITERS[config.delimiter]
    expected = "comma" if path.suffix.lower() == ".csv" else "tab"
    cells = {name: _cells_of(line, delimiter) for name, delimiter in _DELIMITERS.items()}
    other = max((name for name in cells if name != expected), key=lambda name: cells[name])
    if cells[other] > 1 and cells[other] >= cells[expected]:
        raise DataError(
            f"{path}: its first line has {cells[other]} cells by {other}s and {cells[expected]} by "
            f"{expected}s; say what separates them with --set data.delimiter={other} or {expected}"
        )
    return _DELIMITERS[expected]


def _cells_of(line: str, delimiter: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=delimiter), []))
    except csv.Error:
        return 1


def has_header(cells: Sequence[str], config: DataConfig, origin: str) -> bool:
    """Whether ``cells``, of the first line, are names: as set, else as they tell.

    A line with text where features stand holds names, unless there are numbers beside it and none of it is
    the label's name. A line of numbers is a record, with or without text at its end.

    Raises:
        DataError: the line could be either: numbers that count the columns; text beside numbers; a label's
            name that may be a class.
    """
    if config.header != "auto":
        return config.header == "yes"
    if isinstance(config, Beside) and config.features:
        return bool(set(config.features) & set(cells))
    numbers = [cell for cell in cells if is_number(pointed(cell, config.decimal))]
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


def _parse(file: IO[str], path: Path, config: DataConfig) -> tuple[RawSet, Columns]:
    delimiter = delimiter_of(_first_line(file, path), path, config)
    lines = _cells(file, delimiter)
    number, first = next(lines, (0, []))
    if not first:
        raise DataError(f"{path}: empty; give a line per record")
    if len(first) < 2 and labelled(config):
        raise DataError(
            f"{path}: one column only; separate features and label by commas, or say by what they are with "
            "--set data.delimiter=semicolon or tab"
        )
    header = has_header(first, config, str(path))
    names = first if header else [f"column {column}" for column in range(1, len(first) + 1)]
    columns = choose_columns(names, config, str(path), named=header)
    said = {"header": "the first line names the columns" if header else "none, the first line is a record"}
    if delimiter != _DELIMITERS["comma"]:
        said["cells"] = f"between {next(name for name in _DELIMITERS if _DELIMITERS[name] == delimiter)}s"
    columns = replace(columns, said={**said, **columns.said, **said_of_missing(config)})
    records = _records(
        lines if header else itertools.chain([(number, first)], lines), names, columns, path, config
    )
    if records.words is None:
        return records, columns
    return table_of(records, columns.feature_names, config, str(path)), columns


def _first_line(file: IO[str], path: Path) -> str:
    """The first line that is not blank, and the file back at its beginning."""
    while (line := file.readline(_LONGEST_LINE)).isspace():
        pass
    if len(line) == _LONGEST_LINE:
        raise DataError(f"{path}: its first line has no end; give a line per record")
    file.seek(0)
    return line


def _records(
    lines: Iterator[tuple[int, list[str]]],
    names: Sequence[str],
    columns: Columns,
    path: Path,
    config: DataConfig,
) -> RawSet:
    text = categorical(names, columns.feature_names, config, str(path))
    found = [Cells(name, True if name in text else None, config.decimal) for name in columns.feature_names]
    texts: list[str] = []
    labels: list[str] = []
    groups: list[str] = []
    while block := list(itertools.islice(lines, _TOGETHER)):
        numbers, rows = zip(*block, strict=True)
        _check_lengths(numbers, rows, len(names), path)
        if (len(labels) + len(rows)) * len(found) > MAX_VALUES:
            raise DataError(f"{path}: more than {MAX_VALUES} values; give fewer records")
        labels += ["" if columns.label is None else cells[columns.label] for cells in rows]
        if columns.group is not None:
            groups += [cells[columns.group] for cells in rows]
        if config.text is not None:
            texts += [cells[columns.features[0]] for cells in rows]
            continue
        for column, place in zip(found, columns.features, strict=True):
            column.add([cells[place] for cells in rows], [f"{path}: line {number}" for number in numbers])
    if not labels:
        raise DataError(f"{path}: a header but no records; give a line per record")
    whose = np.array(groups, dtype=np.str_) if columns.group is not None else None
    classes = np.array(labels, dtype=np.str_)
    if config.text is not None:
        return RawSet(texts_of(texts), classes, groups=whose)
    words = {number: told for number, column in enumerate(found) if (told := column.words) is not None}
    inputs = np.stack([column.values for column in found], axis=1)
    return RawSet(inputs, classes, groups=whose, words=words)


def _check_lengths(numbers: Sequence[int], rows: Sequence[Sequence[str]], width: int, path: Path) -> None:
    for number, cells in zip(numbers, rows, strict=True):
        if len(cells) != width:
            raise DataError(f"{path}: line {number} has {len(cells)} cells, the first has {width}; mend it")


def _cells(file: IO[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and stripped cells of every line that is not blank."""
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    for cells in reader:
        if cells:
            yield reader.line_num, [cell.strip() for cell in cells]
