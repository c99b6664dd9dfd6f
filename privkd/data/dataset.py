"""A data set in memory, checked: the one shape that every reader hands on.

Nothing is scaled or numbered here: the constants for that are known when it is known which records are public
(`data.constants`). Byte arrays of three axes are images, as are arrays of any type of four, and images end up
channels first, ``[record, channel, height, width]``.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from privkd.config.labels import canonical_number, is_missing
from privkd.errors import DataError

Array: TypeAlias = NDArray[Any]
Indices: TypeAlias = NDArray[np.int64]
"""Positions of records, or numbers of their classes."""

MAX_VALUES = 2**31
"""Largest number of feature values read: 8 GiB as float32."""

_CHANNELS = (1, 3, 4)
_LARGEST_ID = 2**62


@dataclass(frozen=True)
class Words:
    """A column of a table that holds text.

    Attributes:
        values: what is written in it, each once.
        codes: for each record its place in ``values``, int32 ``[record]``; -1 where there is none.
    """

    values: tuple[str, ...]
    codes: NDArray[np.int32]


@dataclass(frozen=True)
class RawSet:
    """Records as they were read.

    Attributes:
        inputs: numbers ``[record, *shape]``, or texts ``[record]``; in a ``Source`` uint8, float32 and
            finite, int64 where they are token ids, or `str` objects.
        labels: classes ``[record]``; in a ``Source`` text, of numbers in the form of
            `labels.canonical_number`, and empty of records that need none.
        colour: which images are coloured ``[record]``, of three channels; ``None`` where ``inputs`` are no
            decoded images.
        groups: whose each record is ``[record]``, as text in a ``Source``; ``None`` where nobody says.
        words: of a table, its columns of text by their places; a number that is missing is NaN in ``inputs``,
            and so is all that is text. ``None``: it is no table.
        rows: the records' places in their file, where some of it was left out.
    """

    inputs: Array
    labels: Array
    colour: NDArray[np.bool_] | None = None
    groups: Array | None = None
    words: Mapping[int, Words] | None = None
    rows: Indices | None = None

    def at(self, places: Indices) -> "RawSet":
        """The records at ``places``."""

        def picked(values: Any) -> Any:
            return None if values is None else values[places]

        words = self.words and {
            column: replace(each, codes=each.codes[places]) for column, each in self.words.items()
        }
        return replace(
            self,
            inputs=self.inputs[places],
            labels=self.labels[places],
            colour=picked(self.colour),
            groups=picked(self.groups),
            words=words,
            rows=picked(self.rows),
        )


@dataclass(frozen=True)
class Source:
    """A labelled data set, before any split.

    Attributes:
        name: what messages call it.
        records: all that is to be split.
        test: the test split that came with the data, or beside them, if any: public.
        public: the public records, where they came beside the data: then all of ``records`` are private.
        proxy: the public inputs without labels that came beside the data, if any.
        names: what tells a record of ``records`` from others, whatever it holds; ``None``: its position.
        classes: the label space, where the source has the same one whatever records it holds.
        divisor: what its whole numbers are divided by, where that too is known of the source.
        whole: whether the features are whole numbers by type.
        columns: the features of a table by name; none of an array.
        label: the label's column of a table by name.
        label_by_place: nothing but its place speaks for the label's column.
        tokens: whether the inputs are texts or token ids, and so stay whole numbers.
        taken: what was taken for what, in words, by its name: the same whatever the private records hold.
    """

    name: str
    records: RawSet
    test: RawSet | None = None
    public: "Source | None" = None
    proxy: RawSet | None = None
    names: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    divisor: float | None = None
    whole: bool = False
    columns: tuple[str, ...] = ()
    label: str | None = None
    label_by_place: bool = False
    tokens: bool = False
    taken: Mapping[str, str] = field(default_factory=dict)


def make_source(
    name: str,
    records: RawSet,
    test: RawSet | None = None,
    *,
    names: tuple[str, ...] | None = None,
    classes: Collection[str] | None = None,
    taken: Mapping[str, str] | None = None,
    labelled: bool = True,
    tokens: bool = False,
) -> Source:
    """Check the arrays of one data set.

    Args:
        name: the file or function, named in every message.
        records: numbers ``[record, *shape]`` with integers or strings ``[record]``.
        test: a test split that came with the data.
        names: see `Source`.
        classes: names that are classes even where they look like a mark of a missing label.
        taken: see `Source`; layout and test split are added where they are not said.
        labelled: whether the labels matter; else they are neither checked nor kept.
        tokens: take whole numbers for token ids; texts are taken for texts in any case.

    Raises:
        DataError: no records, unequal lengths, a feature that is not a finite number, a missing label, labels
            of a type that names no class, or a test split that does not match.
    """
    known = frozenset(classes or ())
    if not labelled:
        records = replace(records, labels=np.full(records.inputs.shape[:1], "", dtype=np.str_))
    checked = _checked(name, records, known if labelled else {""}, tokens)
    whole = records.inputs.dtype.kind in "biu"
    split_said = "none came with the data" if test is None else "came with the data"
    said = {"test split": split_said, **(taken or {}), "layout": _layout(records, checked)}
    tokens = tokens or checked.inputs.dtype.kind == "O"
    if names is None and records.rows is not None:
        names = tuple(map(str, records.rows.tolist()))
    source = Source(name, checked, names=names, whole=whole, tokens=tokens, taken=said)
    if test is None:
        return source
    own = f"{name} (test split)"
    split = _checked(own, test, known, tokens)
    check_alike(own, split, checked)
    return replace(source, test=split, whole=whole and test.inputs.dtype.kind in "biu")


def _checked(name: str, records: RawSet, classes: Collection[str], tokens: bool) -> RawSet:
    if records.labels.ndim == 2 and records.labels.shape[1] == 1:
        records = replace(records, labels=records.labels[:, 0])
    inputs = records.inputs
    if inputs.ndim == 1 and inputs.dtype.kind in "UTO":
        inputs = texts_of(inputs.tolist(), name)
    _check_lengths(name, inputs, records.labels)
    labels = label_texts(records.labels, name, classes)
    groups = None if records.groups is None else _group_texts(records.groups, len(labels), name)
    if inputs.dtype.kind != "O":
        numbers = partial(_features, absent=records.words is not None)
        inputs = _token_ids(inputs, name) if tokens else _channels_first(numbers(inputs, name))
    return replace(records, inputs=inputs, labels=labels, groups=groups)


def texts_of(texts: Sequence[Any], name: str = "") -> Array:
    """``texts`` as an array of `str` objects ``[record]``; what is no Unicode in one becomes a question mark.

    Raises:
        DataError: one is no text.
    """
    found = np.empty(len(texts), dtype=object)
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            kind = "missing" if text is None else f"of type {type(text).__name__}"
            raise DataError(f"{name}: the text of record {row} is {kind}; give it one or remove the record")
        found[row] = text if text.isascii() else text.encode(errors="replace").decode()
    return found


def _token_ids(inputs: Array, name: str) -> Array:
    """Whole numbers ``[record, position]`` as int64.

    Raises:
        DataError: they are none, or one is negative.
    """
    if inputs.dtype.kind not in "iu" or inputs.ndim != 2:
        raise DataError(
            f"{name}: data.tokens takes whole numbers [record, position], not {inputs.dtype} of shape "
            f"{inputs.shape}; store token ids as integers, one row a record"
        )
    if inputs.dtype.kind == "i" and inputs.min() < 0:
        raise DataError(f"{name}: token id {inputs.min()} is negative; ids are 0, which pads, 1, 2, ...")
    return np.minimum(inputs, _LARGEST_ID).astype(np.int64)


def _group_texts(groups: Array, records: int, name: str) -> Array:
    """Groups as text, numbers in their canonical form.

    Raises:
        DataError: there is not one for each record, or one is missing.
    """
    if groups.shape != (records,):
        raise DataError(f"{name}: groups have shape {groups.shape}; give one per record, shape [{records}]")
    texts = np.char.strip(groups.astype(np.str_))
    if groups.dtype.kind not in "UTO":
        values, positions = np.unique(texts, return_inverse=True)
        texts = np.array([canonical_number(str(value)) for value in values], dtype=np.str_)[positions]
    for row, text in enumerate(texts):
        if is_missing(str(text)):
            raise DataError(f"{name}: record {row} has no group ({str(text)!r}); give it one or remove it")
    return texts


def _layout(raw: RawSet, checked: RawSet) -> str:
    """How the axes of a record were understood."""
    if checked.inputs.dtype.kind == "O":
        return "text"
    if raw.colour is not None:
        return "images, turned upright, on white where they are transparent"
    shape, kept = tuple(raw.inputs.shape[1:]), tuple(checked.inputs.shape[1:])
    if shape == kept:
        return f"{list(kept)}, as it came"
    return f"{list(kept)}, channels first, of {list(shape)} in the data"


def check_alike(name: str, test: RawSet, records: RawSet) -> None:
    """Do nothing where ``test``, or other records beside the data, called ``name``, fit the data's.

    Raises:
        DataError: they are of another type or shape.
    """
    if test.inputs.dtype != records.inputs.dtype:
        kinds = "texts" if "O" in (test.inputs.dtype.kind, records.inputs.dtype.kind) else "bytes (uint8)"
        raise DataError(
            f"{name}: {kinds} here or in the training inputs, and other numbers in the other; "
            "store both alike"
        )
    if (test.colour is None) != (records.colour is None):
        raise DataError(
            f"{name}: image files here or in the training inputs, and arrays in the other; give both alike"
        )
    if records.inputs.dtype.kind != "i" and _shape(test) != _shape(records):
        theirs, ours = tuple(test.inputs.shape[1:]), tuple(records.inputs.shape[1:])
        raise DataError(f"{name}: inputs of shape {theirs} do not match training inputs of shape {ours}")


def _shape(records: RawSet) -> tuple[int, ...]:
    """That of one input; of a decoded image without its channels, which are settled later."""
    return tuple(records.inputs.shape[1 if records.colour is None else 2 :])


def _check_lengths(name: str, inputs: Array, labels: Array) -> None:
    if labels.ndim != 1:
        raise DataError(
            f"{name}: labels have shape {labels.shape}; give one class per record, shape [record]"
        )
    if inputs.ndim < 2 and inputs.dtype.kind != "O":
        raise DataError(f"{name}: inputs have shape {inputs.shape}; give at least [record, feature]")
    if len(inputs) != len(labels):
        raise DataError(f"{name}: {len(inputs)} inputs but {len(labels)} labels; give one label per record")
    if inputs.size == 0:
        raise DataError(f"{name}: inputs of shape {inputs.shape} hold no values; give at least two records")
    if inputs.size > MAX_VALUES:
        raise DataError(f"{name}: {inputs.size} values exceed the limit of {MAX_VALUES}; give fewer records")


def label_texts(labels: Array, name: str, classes: Collection[str] = ()) -> Array:
    """Labels as text: text as it is written, without the space around it, numbers in their canonical form.

    Args:
        labels: integers or strings ``[record]``.
        name: what messages call the data set.
        classes: names that are classes even where they look like a mark of a missing label.

    Raises:
        DataError: a label is missing, or they are of a type that names no class.
    """
    if labels.dtype.kind == "O":
        labels = _of_objects(labels)
    if labels.dtype.kind not in "UTbiuf":
        raise DataError(f"{name}: labels of type {labels.dtype} are not classes; give integers or strings")
    text = labels.dtype.kind in "UT"
    if text:
        labels = np.char.strip(labels.astype(np.str_))
    elif labels.dtype.kind == "b":
        labels = labels.astype(np.int64)
    values, positions = np.unique(labels, return_inverse=True)
    spelt = [str(value) if text else canonical_number(str(value)) for value in values]
    for number, label in enumerate(spelt):
        if is_missing(label) and label not in classes:
            raise DataError(_missing(label, int(np.argmax(positions == number)), name))
    return np.array(spelt, dtype=np.str_)[positions]


def _of_objects(labels: Array) -> Array:
    """Text among which some is missing, as text; anything else as it came."""
    absent = [label is None or (isinstance(label, float) and label != label) for label in labels.flat]
    if not all(none or isinstance(label, str) for none, label in zip(absent, labels.flat, strict=True)):
        return labels
    texts = ["" if none else label for none, label in zip(absent, labels.flat, strict=True)]
    return np.array(texts, dtype=np.str_).reshape(labels.shape)


def _missing(label: str, row: int, name: str) -> str:
    if not label:
        return f"{name}: record {row} has no label; give it one or remove the record"
    return (
        f"{name}: label {label} of record {row} says that it is missing; give it one or remove the record, "
        "or name all classes with --classes if it is one of them"
    )


def _features(inputs: Array, name: str, *, absent: bool) -> Array:
    """Bytes as they are; any other numbers as float32.

    Raises:
        DataError: a feature is not a finite real number, or NaN where some may be ``absent``.
    """
    if inputs.dtype.kind not in "biuf":
        raise DataError(
            f"{name}: inputs of type {inputs.dtype} are not numbers; encode them as numbers first"
        )
    if inputs.dtype == np.uint8:
        return inputs[:, None] if inputs.ndim == 3 else inputs
    with np.errstate(over="ignore"):
        floats = np.array(inputs, dtype=np.float32, order="C")
    fine = np.isfinite(floats) | np.isnan(floats) if absent else np.isfinite(floats)
    if not fine.all():
        where = tuple(int(axis) for axis in np.unravel_index(int(np.argmin(fine)), fine.shape))
        place = f"record {where[0]}, feature {', '.join(map(str, where[1:]))}"
        raise DataError(f"{name}: {place} is {inputs[where]}, not a finite float32; remove or impute it")
    return floats


def _channels_first(inputs: Array) -> Array:
    if inputs.ndim == 4 and inputs.shape[3] in _CHANNELS and inputs.shape[1] not in _CHANNELS:
        return inputs.transpose(0, 3, 1, 2)
    return inputs
