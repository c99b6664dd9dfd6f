"""A device's answers as additive shares in the ring Z_2^32. Device side: numpy and ``cryptography`` alone.

A 32-bit ring keeps an upload as small as the raw float32 answers; sums that would not fit it are refused
before anything is shared (``fitting_encoding``). All but one aggregator get a 32-byte seed of an AES-CTR
stream, and one gets what remains: any K - 1 of the K shares are uniform, whatever the answers.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from privkd.errors import ChannelError
from privkd.privacy.noise import KEY_BYTES, Keystream
from privkd.secure.fixedpoint import RESOLUTION_BITS, FixedPoint

RING_BITS = 32
_WORD = np.dtype("<u4")
_MIN_RESOLUTION_BITS = 8
_TAIL = 12.0
"""Standard deviations of noise that must fit the ring: beyond lies less than 2 exp(-72) of each entry."""


class Form(IntEnum):
    """How a share is written down."""

    VECTOR = 0
    SEED = 1


@dataclass(frozen=True)
class Share:
    """What one aggregator gets of one device: ring elements ``[entry]`` as bytes, or the seed of them."""

    form: Form
    data: bytes

    def expand(self, entries: int) -> NDArray[np.uint32]:
        """The ring elements ``[entry]``.

        Raises:
            ChannelError: the share's length does not fit ``entries``.
        """
        self.check(entries)
        data = Keystream(self.data).read(entries * _WORD.itemsize) if self.form is Form.SEED else self.data
        return np.frombuffer(data, _WORD).astype(np.uint32, copy=False)

    def check(self, entries: int) -> None:
        """Raise ``ChannelError`` if the share's length does not fit ``entries``."""
        expected = KEY_BYTES if self.form is Form.SEED else entries * _WORD.itemsize
        if len(self.data) != expected:
            raise ChannelError(f"share of {len(self.data)} bytes: expected {expected}")


def split(integers: NDArray[np.int64], parties: int, stream: Keystream | None = None) -> list[Share]:
    """``parties`` additive shares of ``integers`` ``[entry]``.

    Their randomness is the operating system's, or else that of ``stream``, which must be secret and serve
    these integers only. Which aggregator gets the full vector is drawn too, so that uploads even out
    among them.
    """
    source = Keystream(secrets.token_bytes(KEY_BYTES)) if stream is None else stream
    # The bias of the remainder is under 2^-59, and who holds the vector is no secret.
    holder = int(source.words(1)[0] % np.uint64(parties))
    shares = [Share(Form.SEED, source.read(KEY_BYTES)) for _ in range(parties)]
    rest = to_ring(integers)
    for party, share in enumerate(shares):
        if party != holder:
            rest -= share.expand(len(integers))
    shares[holder] = Share(Form.VECTOR, rest.astype(_WORD, copy=False).tobytes())
    return shares


def to_ring(integers: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Integers modulo 2^32, as a new array of the same shape."""
    return integers.astype(np.uint32)


def from_ring(elements: NDArray[np.uint32]) -> NDArray[np.int64]:
    """The integers in ``[-2^31, 2^31)`` that ring ``elements`` of any shape stand for."""
    return elements.view(np.int32).astype(np.int64)


def reconstruct(shares: Sequence[NDArray[np.uint32]]) -> NDArray[np.int64]:
    """The integers ``[entry]`` of which ``shares`` are all the shares."""
    return from_ring(np.sum(shares, axis=0, dtype=np.uint32))


def fitting_encoding(
    clip_norm: float, *, devices: int, parties: int = 1, rho: float | None = None
) -> FixedPoint:
    """The finest encoding, of at most 20 bits, in which the noisy sum fits the ring. All inputs are public.

    The sum of ``devices`` contributions is at most ``devices * bound`` in each entry, and each of the
    ``parties`` adds a discrete Gaussian of ``sigma = bound / sqrt(2 rho)``, whose tail is that of a normal.

    Raises:
        ChannelError: fewer than 8 bits would be left.
    """
    noise = 0.0 if rho is None else _TAIL * math.sqrt(parties / (2 * rho))
    room = RING_BITS - 1 - math.log2(devices + noise)
    bits = min(RESOLUTION_BITS, math.floor(room))
    if bits < _MIN_RESOLUTION_BITS:
        raise ChannelError(
            f"{devices} devices with rho={rho} overflow the {RING_BITS}-bit ring; "
            "raise the device budget or send fewer devices at once"
        )
    return FixedPoint.for_clip_norm(clip_norm, bits=bits)
