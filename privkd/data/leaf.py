"""Federated data as JSON in the form of the LEAF benchmark (Caldas et al. 2018, arXiv 1812.01097).

An object with ``users``, ``num_samples`` and ``user_data``, which gives each user's inputs ``x`` and labels
``y``. Users are decoded one at a time, so that memory holds little beside the file's text and the arrays.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from privkd.config import DataConfig
from privkd.data.columns import UNLABELLED, Beside, labelled
from privkd.data.dataset import MAX_VALUES, Array, RawSet, Source, make_source
from privkd.errors import DataError, one_line

_TRAIN, _TEST = "train", "test"
_USERS, _COUNTS, _DATA = "users", "num_samples", "user_data"
_LARGEST = 1 << 32
"""Bytes of one file, whose text is in memory as a whole."""
_FIRST = 4096
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def leaf_files(folder: Path, split: str = _TRAIN) -> list[Path]:
    """The JSON files of a split: in the sub-folder of its name, else, of ``train``, in ``folder`` itself."""
    below = sorted(path for path in (folder / split).glob("*.json") if path.is_file())
    if below or split != _TRAIN:
        return below
    return sorted(path for path in folder.glob("*.json") if path.is_file() and not path.name.startswith("."))


def looks_like_leaf(paths: Sequence[Path]) -> bool:
    """Whether one of the files begins as such a file does."""
    return any(_begins_so(path) for path in paths)


def load_leaf(paths: Sequence[Path], name: str, config: DataConfig, test: Sequence[Path] = ()) -> Source:
    """The users' records in all ``paths``, and in those of the ``test`` split if there are any.

    Whose a record is, is known: unless ``config.partition`` says otherwise, devices hold whole users.

    Raises:
        DataError: a file is damaged, holds something else, or more than memory should; or records differ in
            shape.
    """
    records = _read(paths, labels=labelled(config))
    split = _read(test, labels=labelled(config)) if test else None
    natural = config.partition == "iid" and not isinstance(config, Beside)
    said = "users of the JSON" if natural else f"none, as data.partition={config.partition!r} is set"
    taken = {
        "label": "'y' of each user" if labelled(config) else UNLABELLED,
        "features": "'x' of each user",
        **({"group": said} if not isinstance(config, Beside) else {}),
        **({"test split": ", ".join(repr(path.name) for path in test[:2])} if test else {}),
    }
    if not natural:
        records = RawSet(records.inputs, records.labels)
    if split is not None:
        split = RawSet(split.inputs, split.labels)
    return make_source(name, records, split, classes=config.classes, taken=taken, labelled=labelled(config))


def _begins_so(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            first = file.read(_FIRST)
    except OSError:
        return False
    return first.lstrip().startswith(b"{") and any(b'"%s"' % key.encode() in first for key in (_USERS, _DATA))


@dataclass
class _Gathered:
    """What was decoded so far: arrays of inputs, and for each record its label and its user."""

    inputs: list[Array] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    users: list[str] = field(default_factory=list)
    values: int = 0


def _read(paths: Sequence[Path], *, labels: bool) -> RawSet:
    gathered = _Gathered()
    for path in paths:
        try:
            if path.stat().st_size > _LARGEST:
                raise DataError(f"{path}: larger than {_LARGEST >> 30} GiB; split it into several files")
            _gather(path.read_text(encoding="utf-8-sig"), path, gathered, labels=labels)
        except (OSError, UnicodeDecodeError, MemoryError) as error:
            raise DataError(f"{path}: not readable as JSON ({one_line(error)}); fetch it again") from error
    if not gathered.inputs:
        raise DataError(f"{paths[0]}: no user has a record; give at least two records")
    shapes = {array.shape[1:] for array in gathered.inputs}
    if len(shapes) > 1:
        first, other = map(list, sorted(shapes)[:2])
        raise DataError(f"{paths[0]}: 'x' has records of shape {first} and of shape {other}; give them one")
    return RawSet(
        np.concatenate(gathered.inputs), np.array(gathered.labels), groups=np.array(gathered.users, np.str_)
    )


def _gather(text: str, path: Path, gathered: _Gathered, *, labels: bool) -> None:
    """Decode one file, user by user.

    Raises:
        DataError: it is no such JSON, or does not hold what it says that it holds.
    """
    said: dict[str, Any] = {}
    held: dict[str, int] = {}

    def user(name: str, at: int) -> int:
        if name in held:
            raise DataError(f"{path}: user {name!r} is there twice; give each user once")
        own, end = _DECODER.raw_decode(text, at)
        held[name] = _add(own, name, path, gathered, labels=labels)
        return end

    def member(name: str, at: int) -> int:
        if name == _DATA:
            return _walk(text, at, user)
        said[name], end = _DECODER.raw_decode(text, at)
        return end

    try:
        if _past_space(text, _walk(text, _past_space(text, 0), member)) != len(text):
            raise ValueError("something follows the object")
    except (ValueError, IndexError, RecursionError, TypeError) as error:
        raise DataError(f"{path}: not JSON in LEAF's form ({one_line(error)}); fetch it again") from error
    _check_complete(said, held, path)


def _walk(text: str, at: int, value: Callable[[str, int], int]) -> int:
    """Go through the members of the JSON object at ``at``, and return where it ends.

    ``value`` is told a member's name and where its value begins, and says where that ends.

    Raises:
        ValueError: there is no such object.
        IndexError: the text ends inside it.
    """
    at = _past(text, at, "{")
    while text[at] != "}":
        name, at = _DECODER.raw_decode(text, at)
        if not isinstance(name, str):
            raise ValueError(f"a name is expected at character {at}")
        at = _past_space(text, value(name, _past(text, _past_space(text, at), ":")))
        if text[at] != "}":
            at = _past(text, at, ",")
            if text[at] == "}":
                raise ValueError(f"a name is expected at character {at}")
    return at + 1


def _past(text: str, at: int, mark: str) -> int:
    if text[at] != mark:
        raise ValueError(f"{mark!r} is expected at character {at}")
    return _past_space(text, at + 1)


def _past_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def _add(own: Any, user: str, path: Path, gathered: _Gathered, *, labels: bool) -> int:
    """Add one user's records, and return how many there are."""
    if not isinstance(own, dict) or not isinstance(own.get("x"), list):
        raise DataError(f"{path}: user {user!r} has no list 'x' of inputs; fetch the file again")
    rows, marks = own["x"], own.get("y") if labels else [""] * len(own["x"])
    if not isinstance(marks, list) or len(marks) != len(rows):
        raise DataError(
            f"{path}: user {user!r} has not one label in 'y' for each of {len(rows)} inputs in 'x'"
        )
    if not rows:
        return 0
    gathered.inputs.append(_numbers(rows, user, path))
    gathered.values += gathered.inputs[-1].size
    if gathered.values > MAX_VALUES:
        raise DataError(f"{path}: more than {MAX_VALUES} values; give fewer users")
    if any(isinstance(mark, list | dict) for mark in marks):
        raise DataError(f"{path}: user {user!r} has a label that is no number and no text; give one a record")
    gathered.labels += marks
    gathered.users += [user] * len(rows)
    return len(rows)


def _numbers(rows: list[Any], user: str, path: Path) -> Array:
    try:
        array = np.array(rows)
    except ValueError as error:
        raise DataError(f"{path}: user {user!r} has inputs of several shapes; give them one") from error
    if array.dtype.kind not in "biuf":
        shown = "text" if array.dtype.kind in "US" else "what is no number"
        raise DataError(f"{path}: 'x' of user {user!r} holds {shown}; give numbers")
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _check_complete(said: dict[str, Any], held: dict[str, int], path: Path) -> None:
    """Raise `DataError` unless all users are there, with as many records as is said of them."""
    users = said.get(_USERS)
    if not isinstance(users, list) or sorted(map(str, users)) != sorted(held):
        raise DataError(f"{path}: '{_USERS}' does not name the users in '{_DATA}'; fetch the file again")
    counts = said.get(_COUNTS)
    if counts is None:
        return
    if not isinstance(counts, list) or len(counts) != len(users):
        raise DataError(f"{path}: '{_COUNTS}' is not one number for each user; fetch the file again")
    for user, count in zip(map(str, users), counts, strict=True):
        if count != held[user]:
            raise DataError(
                f"{path}: user {user!r} has {held[user]} records where {_COUNTS} says {count}; fetch it again"
            )
