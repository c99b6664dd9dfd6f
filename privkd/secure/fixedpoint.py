"""Fixed-point integers with an exact L2 bound: what a device makes of its answers. Device side: numpy."""

import hashlib
import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

RESOLUTION_BITS = 20
"""Default size of the integer clip norm: it lies in ``[2^19, 2^20)``."""


@dataclass(frozen=True)
class FixedPoint:
    """The public encoding of answers as integers, ``q = trunc(x * scale)``.

    Attributes:
        fraction_bits: ``scale`` is ``2^fraction_bits``; may be negative for a huge clip norm.
        bound: the integer L2 clip norm of one device's whole block: its sensitivity under zero-out.
    """

    fraction_bits: int
    bound: int

    @classmethod
    def for_clip_norm(cls, clip_norm: float, *, bits: int = RESOLUTION_BITS) -> Self:
        """The encoding in which ``clip_norm`` becomes an integer of ``bits`` bits, rounded down."""
        if not (math.isfinite(clip_norm) and clip_norm > 0):
            raise ValueError(f"clip_norm={clip_norm}: expected a finite number above 0")
        fraction_bits = bits - math.frexp(clip_norm)[1]
        return cls(fraction_bits, math.floor(math.ldexp(clip_norm, fraction_bits)))

    def encode(self, blocks: NDArray[np.floating]) -> NDArray[np.int64]:
        """Clip each device's block in L2 and truncate it towards zero.

        Args:
            blocks: finite, ``[device, entry]``.

        Returns:
            Integers ``[device, entry]`` with ``sum(q^2) <= bound^2`` exactly, for every device.
        """
        clipped = clip_rows(blocks.astype(np.float64), math.ldexp(self.bound, -self.fraction_bits))
        integers = np.trunc(np.ldexp(clipped, self.fraction_bits)).astype(np.int64)
        return hold_bound(integers, self.bound)

    def decode(self, integers: NDArray[np.int64]) -> NDArray[np.float64]:
        """Integers of any shape back as real numbers."""
        return np.ldexp(integers.astype(np.float64), -self.fraction_bits)


def finite_or_zero(blocks: NDArray[np.float64]) -> NDArray[np.float64]:
    """``blocks`` ``[device, entry]``, each with a value that is not finite as a block of zeros.

    So whoever cannot answer contributes what it would zeroed out, and no device betrays itself by failing.
    """
    finite = np.isfinite(blocks).all(axis=1, keepdims=True)
    return np.where(finite, blocks, 0.0)


def clip_rows(rows: NDArray[np.float64], bound: float) -> NDArray[np.float64]:
    """``rows`` ``[device, entry]``, each scaled down to L2 norm ``bound`` where it is longer.

    Exact up to float64's rounding, and free of overflow for any finite input.
    """
    largest = np.abs(rows).max(axis=1, initial=0.0, keepdims=True)
    unit = rows / np.where(largest > 0, largest, 1.0)
    # The unit rows have norms from 1 to sqrt(entries), so the comparison below cannot overflow either.
    norms = np.sqrt(np.einsum("de,de->d", unit, unit))[:, None]
    with np.errstate(over="ignore"):
        too_long = norms * largest > bound
    return np.where(too_long, unit * (bound / np.where(norms > 0, norms, 1.0)), rows)


def hold_bound(integers: NDArray[np.int64], bound: int) -> NDArray[np.int64]:
    """Move rows ``[device, entry]`` towards zero until ``sum(q^2) <= bound^2`` holds in integer arithmetic.

    Float clipping leaves at most a rounding error to mend, so the loop hardly ever runs once.
    """
    if bound > 1 << 31:
        raise ValueError(f"bound={bound}: its square must fit 64 bits")
    kept = np.clip(integers, -bound, bound)
    while (long := _squared_norms(kept) > bound * bound).any():
        kept[long] -= np.sign(kept[long])
    return kept


def content_digest(integers: NDArray[np.int64]) -> bytes:
    """SHA-256 of a device's encoded block: binds noise to content, so that none is ever used twice."""
    return hashlib.sha256(integers.astype("<i8", copy=False).tobytes()).digest()


def _squared_norms(integers: NDArray[np.int64]) -> NDArray[np.object_]:
    """Exact squared norms of rows ``[device, entry]`` whose entries are at most 2^31: no sum wraps.

    Squares are summed in two halves of 32 bits, each safe for 2^31 entries, and joined as Python integers.
    """
    squares = (integers * integers).view(np.uint64)
    low = (squares & np.uint64(0xFFFFFFFF)).sum(axis=1)
    high = (squares >> np.uint64(32)).sum(axis=1)
    return high.astype(object) * (1 << 32) + low.astype(object)
