"""Records of text: JSON lines, and folders with one sub-folder of ``.txt`` files for each class."""

import itertools
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from privkd.config import DataConfig
from privkd.config.labels import canonical_number
from privkd.data.columns import LABEL_NAMES, UNLABELLED, Beside, label_among, labelled
from privkd.data.dataset import RawSet, Source, make_source, texts_of
from privkd.data.folders import class_files, files_below, splits_of
from privkd.errors import ConfigError, DataError, one_line

TEXT_SUFFIXES = frozenset({".txt"})

_TEXT_FIELD = "text"
_MOST_BYTES = 16 << 20
"""Of one record. A text of that size is no text that a student reads."""
_LONGEST_NAME = 256
_SHOWN, _MOST_NAMED = 40, 8


def load_text_folder(folder: Path, name: str) -> Source:
    """A folder whose sub-folders are the classes and hold texts, one a file in UTF-8; see `splits_of`.

    Raises:
        DataError: no class folders, an empty one, splits without class folders, or a file that is no text.
    """
    splits = splits_of(folder, "texts")
    records, names = _read_classes(splits.train)
    test = None if splits.test is None else _read_classes(splits.test)[0]
    taken = {"label": "each text's folder", "text": "the files", **splits.said}
    classes = {*records.labels.tolist(), *(() if test is None else test.labels.tolist())}
    return make_source(name, records, test, names=names, classes=classes, taken=taken)


def load_texts(folder: Path, name: str) -> Source:
    """The texts in a folder and in its sub-folders, without labels.

    Raises:
        DataError: there are none, or a file is no text; or the sub-folders are splits.
    """
    texts = texts_of([_text_in(path) for path in files_below(folder, TEXT_SUFFIXES, "texts")])
    return make_source(name, RawSet(texts, texts), taken={"label": UNLABELLED}, labelled=False)


def _read_classes(folder: Path) -> tuple[RawSet, tuple[str, ...]]:
    files, labels = class_files(folder, TEXT_SUFFIXES, "texts")
    texts = [_text_in(path) for path in files]
    return RawSet(texts_of(texts), np.array(labels)), tuple(file.name for file in files)


def _text_in(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{path}: larger than {_MOST_BYTES >> 20} MiB; cut it, or remove it")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as text ({one_line(error)}); save it as UTF-8") from error


@dataclass
class _Lines:
    """The fields of the records that were read so far."""

    texts: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)


def load_json_lines(path: Path, name: str, config: DataConfig) -> Source:
    """A line of JSON for each record: an object with a text and a label, in fields of its own.

    The text is in ``config.text``, else in ``text``; the label in ``config.label``, else in the one field of
    the first record that is called like a label; whose the record is in ``config.group``. Other fields are
    left out.

    Raises:
        ConfigError: a setting names no field.
        DataError: not JSON lines in UTF-8, a record without its fields, a text that is none, or nothing tells
            which field is the label.
    """
    records = _objects(path)
    first = next(records, None)
    if first is None:
        raise DataError(f"{path}: empty; give a line of JSON for each record")
    read, fields = _Lines(), _fields_of(first[1], config, path)
    for number, record in itertools.chain([first], records):
        _take(record, fields, read, f"{path}: line {number}")
    said = UNLABELLED if fields.label is None else f"field {fields.label!r}"
    taken = {"label": said, "text": f"field {fields.text!r}"}
    if fields.group is not None:
        taken["group"] = f"field {fields.group!r}, as set"
    taken["left out"] = "all other fields"
    groups = np.array(read.groups, dtype=np.str_) if fields.group is not None else None
    found = RawSet(texts_of(read.texts), np.array(read.labels, dtype=np.str_), groups=groups)
    return make_source(name, found, classes=config.classes, taken=taken, labelled=labelled(config))


@dataclass(frozen=True)
class _Fields:
    """Which field is which; a record's label is not always needed."""

    text: str
    label: str | None
    group: str | None


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of every line that is not blank."""
    try:
        with path.open("rb") as file:
            for number in range(1, 1 << 62):
                line = file.readline(_MOST_BYTES + 1)
                if not line:
                    return
                if len(line) > _MOST_BYTES:
                    raise DataError(f"{path}: line {number} is longer than {_MOST_BYTES >> 20} MiB; cut it")
                if line.strip(b"\xef\xbb\xbf \t\r\n"):
                    yield number, _object(line, f"{path}: line {number}")
    except OSError as error:
        raise DataError(f"{path}: not readable ({one_line(error)})") from error


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not readable as JSON ({one_line(error)}); mend it, as UTF-8") from error
    if not isinstance(found, dict):
        raise DataError(f'{where} is no object; write {{"text": ..., "label": ...}} for each record')
    return found


def _fields_of(record: dict[str, Any], config: DataConfig, path: Path) -> _Fields:
    settings = {"text": config.text}
    if not isinstance(config, Beside):
        settings |= {"label": config.label, "group": config.group}
    for setting, wanted in settings.items():
        if wanted is not None and wanted not in record:
            raise ConfigError(f"data.{setting}={wanted!r}: {path} has no such field; it has {_named(record)}")
    text = config.text or _TEXT_FIELD
    if text not in record:
        raise DataError(f"{path}: no field 'text', only {_named(record)}; say which is it with --text NAME")
    names = [key for key in record if key not in (text, config.group)]
    if not labelled(config):
        return _Fields(text, None, None)
    label, group = config.label, None if isinstance(config, Beside) else config.group
    if label is None:
        place = label_among(names, str(path), "fields")
        if place is None:
            raise DataError(
                f"{path}: no field is called like a label ({', '.join(LABEL_NAMES)}); it has "
                f"{_named(record)}; say which is it with --label NAME"
            )
        label = names[place]
    if label == text:
        raise ConfigError(f"data.label={label!r} is data.text too; take it for one of them")
    return _Fields(text, label, group)


def _named(names: Collection[str]) -> str:
    shown = [repr(name[:_SHOWN]) for name in names][:_MOST_NAMED]
    more = len(names) - _MOST_NAMED
    return (", ".join(shown) or "none") + (f" and {more} more" if more > 0 else "")


def _take(record: dict[str, Any], fields: _Fields, read: _Lines, where: str) -> None:
    text = record.get(fields.text)
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {fields.text!r} is {_shown(text)}, no text; give it one or remove it"
        )
    read.texts.append(text)
    label = "" if fields.label is None else _name(record.get(fields.label), fields.label, where)
    read.labels.append(label)
    if fields.group is not None:
        read.groups.append(_name(record.get(fields.group), fields.group, where))


def _name(value: Any, name: str, where: str) -> str:
    """A class or a group as text, numbers in their canonical form."""
    if isinstance(value, str) and len(value) <= _LONGEST_NAME:
        return value
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int | float):
        return canonical_number(str(value))
    raise DataError(f"{where}: field {name!r} is {_shown(value)}; give a short text or a whole number")


def _shown(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
