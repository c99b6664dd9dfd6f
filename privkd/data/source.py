"""A data set in memory, checked: the one shape that every reader hands on.

Nothing is scaled or numbered here: the constants for that are known when it is known which records are public
(`data.constants`). Byte arrays of more than two axes are images and end up channels first,
``[record, channel, height, width]``.
"""

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from privkd.errors import DataError
from privkd.labels import canonical_label

Array: TypeAlias = NDArray[Any]

MAX_VALUES = 2**31
"""Largest number of feature values read: 8 GiB as float32."""

_CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class RawSet:
    """Records as they were read.

    Attributes:
        inputs: numbers ``[record, *shape]``; in a ``Source`` uint8, or float32 and finite.
        labels: classes ``[record]``; in a ``Source`` text, in the form of `labels.canonical_label`.
        colour: which images are coloured ``[record]``, of three channels; ``None`` where ``inputs`` are no
            decoded images.
    """

    inputs: Array
    labels: Array
    colour: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Source:
    """A labelled data set, before any split.

    Attributes:
        name: what messages call it.
        records: all that is to be split.
        test: the test split that came with the data, if any: public.
        names: what tells a record of ``records`` from others, whatever it holds; ``None``: its position.
        classes: the label space, where the source has the same one whatever records it holds.
        divisor: what its whole numbers are divided by, where that too is known of the source.
        whole: whether the features are whole numbers by type.
    """

    name: str
    records: RawSet
    test: RawSet | None = None
    names: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    divisor: float | None = None
    whole: bool = False


def make_source(
    name: str, records: RawSet, test: RawSet | None = None, *, names: tuple[str, ...] | None = None
) -> Source:
    """Check the arrays of one data set.

    Args:
        name: the file or function, named in every message.
        records: numbers ``[record, *shape]`` with integers or strings ``[record]``.
        test: a test split that came with the data.
        names: see `Source`.

    Raises:
        DataError: no records, unequal lengths, a feature that is not a finite number, a missing label, labels
            of a type that names no class, or a test split that does not match.
    """
    checked = _checked(name, records)
    whole = records.inputs.dtype.kind in "biu"
    source = Source(name, checked, names=names, whole=whole)
    if test is None:
        return source
    own = f"{name} (test split)"
    split = _checked(own, test)
    _check_alike(own, split, checked)
    return replace(source, test=split, whole=whole and test.inputs.dtype.kind in "biu")


def _checked(name: str, records: RawSet) -> RawSet:
    _check_lengths(name, records.inputs, records.labels)
    return RawSet(_features(records.inputs, name), label_texts(records.labels, name), records.colour)


def _check_alike(name: str, test: RawSet, records: RawSet) -> None:
    if test.inputs.dtype != records.inputs.dtype:
        raise DataError(
            f"{name}: bytes (uint8) here or in the training inputs, and other numbers in the other; "
            "store both alike"
        )
    if _shape(test) != _shape(records):
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
    if inputs.ndim < 2:
        raise DataError(f"{name}: inputs have shape {inputs.shape}; give at least [record, feature]")
    if len(inputs) != len(labels):
        raise DataError(f"{name}: {len(inputs)} inputs but {len(labels)} labels; give one label per record")
    if inputs.size == 0:
        raise DataError(f"{name}: inputs of shape {inputs.shape} hold no values; give at least two records")
    if inputs.size > MAX_VALUES:
        raise DataError(f"{name}: {inputs.size} values exceed the limit of {MAX_VALUES}; give fewer records")


def label_texts(labels: Array, name: str) -> Array:
    """Labels as text, each in its canonical form.

    Raises:
        DataError: a label is missing, or they are of a type that names no class.
    """
    if labels.dtype.kind == "O" and all(isinstance(label, str) for label in labels):
        labels = labels.astype(np.str_)
    if labels.dtype.kind not in "UTbiuf":
        raise DataError(f"{name}: labels of type {labels.dtype} are not classes; give integers or strings")
    if labels.dtype.kind in "UT":
        labels = np.char.strip(labels.astype(np.str_))
        if (labels == "").any():
            row = int(np.argmax(labels == ""))
            raise DataError(f"{name}: record {row} has no label; give it one or remove the record")
    elif labels.dtype.kind == "b":
        labels = labels.astype(np.int64)
    values, positions = np.unique(labels, return_inverse=True)
    return np.array([canonical_label(str(value)) for value in values], dtype=np.str_)[positions]


def _features(inputs: Array, name: str) -> Array:
    """Bytes as they are, channels first; any other numbers as float32.

    Raises:
        DataError: a feature is not a finite real number.
    """
    if inputs.dtype.kind not in "biuf":
        raise DataError(
            f"{name}: inputs of type {inputs.dtype} are not numbers; encode them as numbers first"
        )
    if inputs.dtype == np.uint8:
        return _channels_first(inputs)
    with np.errstate(over="ignore"):
        floats = np.array(inputs, dtype=np.float32, order="C")
    fine = np.isfinite(floats)
    if not fine.all():
        where = tuple(int(axis) for axis in np.unravel_index(int(np.argmin(fine)), fine.shape))
        place = f"record {where[0]}, feature {', '.join(map(str, where[1:]))}"
        raise DataError(f"{name}: {place} is {inputs[where]}, not a finite float32; remove or impute it")
    return floats


def _channels_first(images: Array) -> Array:
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[3] in _CHANNELS and images.shape[1] not in _CHANNELS:
        return images.transpose(0, 3, 1, 2)
    return images
