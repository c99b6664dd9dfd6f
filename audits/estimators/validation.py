"""What the estimators accept: counts, probabilities and scores, checked once and for all of them."""

import math
from operator import index
from typing import SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from privkd.errors import InputError

Floats = NDArray[np.float64]


def checked_count(name: str, value: SupportsIndex, *, least: int = 0) -> int:
    """``value`` as an int of at least ``least``.

    Raises:
        InputError: it is not a whole number, or too small.
    """
    try:
        count = index(value)
    except TypeError:
        raise InputError(f"{name}={value!r}: give a whole number") from None
    if count < least:
        raise InputError(f"{name}={count}: give at least {least}")
    return count


def checked_share(
    part_name: str, part: SupportsIndex, whole_name: str, whole: SupportsIndex, *, least_whole: int = 1
) -> tuple[int, int]:
    """``(part, whole)`` as ints with 0 <= part <= whole.

    Raises:
        InputError: either is no count, or the part exceeds the whole.
    """
    total = checked_count(whole_name, whole, least=least_whole)
    count = checked_count(part_name, part)
    if count > total:
        raise InputError(f"{part_name}={count} exceeds {whole_name}={total}: it counts some of them")
    return count, total


def checked_confidence(confidence: float) -> float:
    """The confidence level as a float strictly between 0 and 1, or InputError."""
    level = _real("confidence", confidence)
    if not 0 < level < 1:
        raise InputError(f"confidence={confidence!r}: give a number between 0 and 1, such as 0.95")
    return level


def checked_delta(delta: float, *, zero_allowed: bool) -> float:
    """``delta`` as a float in (0, 1), or in [0, 1) for estimators that know pure differential privacy.

    Raises:
        InputError: it lies outside.
    """
    value = _real("delta", delta)
    if not (0 < value < 1 or (zero_allowed and value == 0)):
        raise InputError(f"delta={delta!r}: give a number between 0 and 1, such as 1e-5")
    return value


def checked_scores(name: str, scores: ArrayLike, *, least: int = 2) -> NDArray[np.float64]:
    """Scores as a float64 vector without NaN; infinities order like any other value.

    Raises:
        InputError: not a vector of numbers, fewer than ``least``, or NaN among them.
    """
    try:
        vector = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name}: give a vector of numbers") from None
    if vector.ndim != 1:
        raise InputError(f"{name} has shape {vector.shape}: give one score a sample, as a vector")
    if len(vector) < least:
        raise InputError(f"{name} holds {len(vector)} scores: give at least {least}")
    if (missing := int(np.isnan(vector).sum())) > 0:
        raise InputError(f"{name} holds {missing} NaN: an attack must score every sample")
    return vector


def _real(name: str, value: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{name}={value!r}: give a number") from None
    if math.isnan(number):
        raise InputError(f"{name} is NaN: give a number")
    return number
