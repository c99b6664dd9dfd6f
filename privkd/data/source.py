"""A data set in memory, checked: the one shape that every reader hands on.

Features are scaled by a public rule, never by statistics of the records: bytes (``uint8``) become
``value / 255``, unless they are 0/1 flags, which stay 0/1; every other number is left as it is.
Byte arrays of more than two axes are images and end up channels first, ``[record, channel, height, width]``.
"""

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privkd.errors import DataError

Array: TypeAlias = NDArray[Any]

MAX_VALUES = 2**31
"""Largest number of feature values read: 8 GiB as float32."""

_CHANNELS = (1, 3, 4)
_BYTES = 255.0


@dataclass(frozen=True)
class Source:
    """A labelled data set, before any split.

    Attributes:
        name: what messages call it.
        inputs: float32 ``[record, *shape]``, finite.
        labels: int64 ``[record]``, each of ``0 .. classes - 1``, in the sorted order of the original labels.
        classes: number of classes, at least 2.
        test_inputs: the test split that came with the data, float32 ``[test, *shape]``, if any.
        test_labels: its labels, int64 ``[test]``.
        divisor: what the whole numbers of the raw data were divided by; 1 where features are as they came.
    """

    name: str
    inputs: Tensor
    labels: Tensor
    classes: int
    test_inputs: Tensor | None = None
    test_labels: Tensor | None = None
    divisor: float = 1.0


def make_source(name: str, inputs: Array, labels: Array, test: tuple[Array, Array] | None = None) -> Source:
    """Check the arrays of one data set, scale its features and number its classes.

    Args:
        name: the file or function, named in every message.
        inputs: numbers ``[record, *shape]``.
        labels: integers or strings ``[record]``.
        test: inputs and labels of a test split that came with the data.

    Raises:
        DataError: no records, unequal lengths, a feature that is not a finite number, labels that are not
            classes, fewer than two classes, or a test split that does not match.
    """
    _check_lengths(name, inputs, labels)
    keys = label_keys(labels, name)
    values = np.unique(keys)
    if len(values) < 2:
        raise DataError(f"{name}: all labels are {str(values[0])!r}; a data set needs at least two classes")
    flags = is_flags(inputs)
    features = scale(inputs, name, flags=flags)
    divisor = _BYTES if inputs.dtype == np.uint8 and not flags else 1.0
    numbers = torch.from_numpy(np.searchsorted(values, keys))
    source = Source(name, features, numbers, len(values), divisor=divisor)
    return source if test is None else _with_test(source, values, *test, flags=flags)


def _with_test(source: Source, values: Array, inputs: Array, labels: Array, *, flags: bool) -> Source:
    """Attach a test split, its labels numbered as the training labels are."""
    name = f"{source.name} (test split)"
    _check_lengths(name, inputs, labels)
    keys = label_keys(labels, name)
    if keys.dtype.kind != values.dtype.kind:
        raise DataError(
            f"{name}: labels like {str(keys[0])!r} do not match training labels like {str(values[0])!r}"
        )
    strangers = np.setdiff1d(keys, values)
    if strangers.size:
        raise DataError(
            f"{name}: label {str(strangers[0])!r} does not occur among the training labels; remove it"
        )
    features = scale(inputs, name, flags=flags)
    if features.shape[1:] != source.inputs.shape[1:]:
        theirs, ours = tuple(features.shape[1:]), tuple(source.inputs.shape[1:])
        raise DataError(f"{name}: inputs of shape {theirs} do not match training inputs of shape {ours}")
    numbers = torch.from_numpy(np.searchsorted(values, keys))
    return replace(source, test_inputs=features, test_labels=numbers)


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


def label_keys(labels: Array, name: str) -> Array:
    """Labels as int64 or as strings, whichever sorts them as a person would.

    Raises:
        DataError: a label is missing or a fraction, or is of a type that names no class.
    """
    if labels.dtype.kind == "O" and all(isinstance(label, str) for label in labels):
        labels = labels.astype(np.str_)
    if labels.dtype.kind in "UT":
        return _text_keys(labels.astype(np.str_), name)
    if labels.dtype.kind in "bi":
        return labels.astype(np.int64)
    if labels.dtype.kind == "u":
        if labels.size and int(labels.max()) > np.iinfo(np.int64).max:
            raise DataError(f"{name}: label {labels.max()} is too large; number the classes from 0")
        return labels.astype(np.int64)
    if labels.dtype.kind == "f":
        return _whole(labels.astype(np.float64), name)
    raise DataError(f"{name}: labels of type {labels.dtype} are not classes; give integers or strings")


def _text_keys(labels: Array, name: str) -> Array:
    """Strings, or int64 where every string is a whole number."""
    labels = np.char.strip(labels)
    if (labels == "").any():
        row = int(np.argmax(labels == ""))
        raise DataError(f"{name}: record {row} has no label; give it one or remove the record")
    try:
        numbers = labels.astype(np.float64)
    except ValueError:
        return labels
    return _whole(numbers, name)


def _whole(numbers: NDArray[np.float64], name: str) -> Array:
    """Whole numbers below 2^53 as int64; anything else names no class."""
    with np.errstate(invalid="ignore"):
        fine = (np.abs(numbers) < 2**53) & (numbers == np.floor(numbers))
    if not fine.all():
        row = int(np.argmin(fine))
        raise DataError(
            f"{name}: label {numbers[row]} of record {row} is not an integer class; use 0, 1, 2, ..."
        )
    return numbers.astype(np.int64)


def is_flags(inputs: Array) -> bool:
    """Whether the bytes are 0/1 flags."""
    return inputs.dtype == np.uint8 and bool(inputs.max(initial=0) <= 1)


def scale(inputs: Array, name: str, *, flags: bool) -> Tensor:
    """Features as float32 by the public rule of this module; ``flags`` says that bytes are 0/1 already.

    Raises:
        DataError: a feature is not a finite real number.
    """
    if inputs.dtype.kind not in "biuf":
        raise DataError(
            f"{name}: inputs of type {inputs.dtype} are not numbers; encode them as numbers first"
        )
    if inputs.dtype == np.uint8:
        features = torch.from_numpy(np.array(_channels_first(inputs), dtype=np.float32, order="C"))
        return features if flags else features.div_(_BYTES)
    with np.errstate(over="ignore"):
        floats = np.array(inputs, dtype=np.float32, order="C")
    fine = np.isfinite(floats)
    if not fine.all():
        where = tuple(int(axis) for axis in np.unravel_index(int(np.argmin(fine)), fine.shape))
        place = f"record {where[0]}, feature {', '.join(map(str, where[1:]))}"
        raise DataError(f"{name}: {place} is {inputs[where]}, not a finite float32; remove or impute it")
    return torch.from_numpy(floats)


def _channels_first(images: Array) -> Array:
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[3] in _CHANNELS and images.shape[1] not in _CHANNELS:
        return images.transpose(0, 3, 1, 2)
    return images
