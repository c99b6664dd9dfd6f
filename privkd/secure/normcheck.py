"""Whether a device kept to the clip norm, found out on its shares, so that it cannot poison the sum.

Once the uploads are fixed, the aggregators draw ``m`` random rows ``r`` with entries in {-1, 0, 0, 1} and
project each device's shared block ``q`` on them, which needs no exchange. For a block of norm ``C`` the sum
of ``(r q)^2`` has mean ``m C^2 / 2``. In multi-party computation they test whether it is at most ``tau(m)``
times that, and learn that one bit a device.

**An honest device is not named**, but with a chance of 2^-40. Zeroed out it would pass always, so that being
named is a release of its own, which no noise covers. An entry of ``r`` is the difference of two fair bits, so
for every block with ``|q| <= C``, dense or one-hot,

    E exp(t r q) = prod_j cosh^2(t q_j / 2) <= exp(t^2 |q|^2 / 4),   E exp(l (r q)^2) <= (1 - l C^2)^(-1/2)

(the second by averaging the first over a Gaussian ``t``), and by Chernoff

    P(sum_m (r q)^2 >= tau m C^2 / 2) <= exp(-(m / 2) (tau - 1 - ln tau)).

``tau(m)`` is where the right side is 2^-40 = 9.1e-13 (``FALSE_ALARM``), for each device and each attempt at a
round. A plan under a device budget is refused where its rounds times that exceed a thousandth of delta: one
attempt at each round adds less than that to delta, and even a thousand attempts at each, the most that there
can be, add no more than delta itself.

**A cheat is caught.** A dense block's sum follows the chi-square law with ``m`` degrees of freedom; that of
a block of few entries spreads less about the same mean. A dense block passes with probability

    m     tau    of norm 1.5 C   2 C       3 C       caught with 0.99 from
    29    4.39   1.00            0.67      9.4e-3    3.0 C
    64    2.95   0.95            5.7e-2    7.0e-8    2.15 C
    128   2.24   0.50            1.4e-5    1.1e-19   1.75 C
    256   1.81   9.5e-3          1.4e-15   7.8e-47   1.5 C

Under ``MIN_PROJECTIONS`` = 29 one of norm ``3 C`` would pass too often, so no fewer are accepted.

The ring wraps, so two things need care. A sum of squares alone can be made to wrap to something small: each
projection is therefore first held to ``16 C``, which an honest one exceeds with probability 2 exp(-256) at
most, by the bound above. And with entries of +1 and -1 alone two entries of 2^31 would cancel in every
projection. With zeros, an entry that lies further than ``32 C`` from 0 modulo 2^32 makes a projection too
large with probability 1/2 or more, whatever the other entries are, so that its block passes all ``m`` with
2^-m at most.

Sources: Boucheron, Lugosi and Massart 2013, "Concentration Inequalities", chapter 2 (sub-Gaussian variables,
Chernoff's method); Rothblum, Omri, Chen and Talwar 2024, "PINE" (such rows, and wrapping, in a norm check).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from privkd.privacy.noise import Keystream

FALSE_ALARM = 2.0**-40
"""Bound on the chance that one honest device is named in one attempt at a round."""

MIN_PROJECTIONS, MAX_PROJECTIONS = 29, 256
_MAX_RANGE_BITS = 26


def false_alarm(projections: int, tau: float) -> float:
    """Bound on the chance that an honest block fails at the tolerance ``tau``, of 1 or more; see the module.

    Neighbouring relation: zero out the device's whole block, which then never fails.
    """
    return math.exp(-projections / 2 * (tau - 1 - math.log(tau)))


@cache
def tolerance(projections: int) -> float:
    """``tau(m)``: the least for which ``false_alarm`` is at most ``FALSE_ALARM``, rounded up."""
    low, high = 1.0, 2.0
    while false_alarm(projections, high) > FALSE_ALARM:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if false_alarm(projections, middle) <= FALSE_ALARM else (middle, high)
    return high


@dataclass(frozen=True)
class NormTest:
    """The public side of the check.

    Attributes:
        range_bits: a projection must lie in ``[-2^range_bits, 2^range_bits)``.
        threshold: most that the sum of squared projections may be.
    """

    range_bits: int
    threshold: int

    @classmethod
    def of(cls, bound: int, projections: int) -> "NormTest":
        """The test for the clip norm ``bound``.

        Raises:
            ValueError: the numbers would not fit 64 bits.
        """
        range_bits = (16 * bound - 1).bit_length()
        if range_bits > _MAX_RANGE_BITS or not 1 <= projections <= MAX_PROJECTIONS:
            raise ValueError(f"bound={bound}, projections={projections}: expected up to 2^22 and 256")
        return cls(range_bits, int(tolerance(projections) * projections * bound * bound / 2))

    def passes(self, projected: NDArray[np.int64]) -> NDArray[np.bool_]:
        """What the parties find out, in the open: ``[device]`` for ``projected`` ``[device, projection]``."""
        inside = (np.abs(projected + 0.5) < 1 << self.range_bits).all(axis=1)
        small = np.where(inside[:, None], projected, 0)
        return inside & ((small * small).sum(axis=1) <= self.threshold)


def challenge_key(contributions: Sequence[bytes]) -> bytes:
    """The key of the rows, from every aggregator's contribution."""
    digest = hashlib.sha256(b"privkd norm check")
    for contribution in contributions:
        digest.update(hashlib.sha256(contribution).digest())
    return digest.digest()


def rows(key: bytes, projections: int, entries: int) -> NDArray[np.int8]:
    """The random rows ``[projection, entry]``."""
    count = projections * entries
    words = np.frombuffer(Keystream(key).read(-(-count // 4)), np.uint8)
    bits = np.unpackbits(words)[: 2 * count].view(np.int8)
    return (bits[0::2] - bits[1::2]).reshape(projections, entries)


def project(share: NDArray[np.uint32], signs: NDArray[np.int8]) -> NDArray[np.uint32]:
    """This party's share of a block's projections ``[projection]``, from its ``share`` ``[entry]`` of it.

    Halves of 16 bits keep every float64 sum exact, and let the product run at BLAS's speed.
    """
    high, low = (share >> np.uint32(16)).astype(np.float64), (share & np.uint32(0xFFFF)).astype(np.float64)
    wide = signs.astype(np.float64)
    parts = [(wide @ half).astype(np.int64) for half in (high, low)]
    return ((parts[0] << 16) + parts[1]).astype(np.uint32)
