"""Frames between the cloud and an aggregator, over one local stream socket.

A frame is a kind, a length and a body. Nothing on the wire is pickled.
"""

import json
import socket
import struct
import time
from dataclasses import asdict, dataclass
from enum import IntEnum
from fractions import Fraction
from typing import Self

import numpy as np
from numpy.typing import NDArray

_HEAD = struct.Struct("<BI")
_CHUNK = 1 << 18


class Kind(IntEnum):
    """What a frame is. The last four go to the worker of a service, and come back."""

    SETUP = 1
    ROUND = 2
    UPLOAD = 3
    FINISH = 4
    PING = 5
    READY = 6
    SHARE = 7
    FAILED = 8
    PONG = 9
    AGREE = 10
    CHECK = 11
    SUM = 12
    VOTE = 13


@dataclass(frozen=True)
class Frame:
    """One message."""

    kind: Kind
    body: bytes = b""


class LinkClosedError(Exception):
    """The other end has gone."""


class Link:
    """Frames over a connected stream socket, each call under a deadline on ``time.monotonic``."""

    def __init__(self, endpoint: socket.socket) -> None:
        self._socket = endpoint
        self._buffer = bytearray()

    def fileno(self) -> int:
        """The socket's descriptor, for waiting on several links."""
        return self._socket.fileno()

    def send(self, frame: Frame, deadline: float | None = None) -> None:
        """Send a frame whole.

        Raises:
            LinkClosedError: the other end has gone.
            TimeoutError: it did not take the frame by ``deadline``; the link is of no more use.
        """
        self._socket.settimeout(_remaining(deadline))
        try:
            self._socket.sendall(_HEAD.pack(frame.kind, len(frame.body)) + frame.body)
        except TimeoutError:
            raise
        except OSError as error:
            raise LinkClosedError from error

    def receive(self, deadline: float | None = None) -> Frame:
        """The next frame.

        Raises:
            LinkClosedError: the other end has gone.
            TimeoutError: no whole frame came by ``deadline``; what came of it is kept.
        """
        self._socket.settimeout(_remaining(deadline))
        while (frame := self.buffered()) is None:
            self._fill()
        return frame

    def buffered(self) -> Frame | None:
        """The next frame if all of it has been read already."""
        if len(self._buffer) < _HEAD.size:
            return None
        kind, length = _HEAD.unpack_from(self._buffer)
        end = _HEAD.size + length
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[_HEAD.size : end])
        del self._buffer[:end]
        return Frame(Kind(kind), body)

    def poll(self) -> Frame | None:
        """Read once what a readable socket holds; the next frame if that completes one.

        Raises:
            LinkClosedError: the other end has gone.
        """
        if (frame := self.buffered()) is not None:
            return frame
        self._fill()
        return self.buffered()

    def _fill(self) -> None:
        try:
            chunk = self._socket.recv(_CHUNK)
        except TimeoutError:
            raise
        except OSError as error:
            raise LinkClosedError from error
        if not chunk:
            raise LinkClosedError
        self._buffer += chunk

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()


@dataclass(frozen=True)
class Setup:
    """What an aggregator is told when it starts: over the link, as the noise key must not be on display."""

    rank: int
    parties: int
    port: int
    noise_key: str

    def pack(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """From ``pack``."""
        return cls(**json.loads(body))


@dataclass(frozen=True)
class RoundNotice:
    """The public parameters of one round.

    Attributes:
        entries: length of each device's block.
        minimum: fewest devices over which the sum may be released.
        fraction_bits: see ``FixedPoint``.
        bound: see ``FixedPoint``.
        sigma2: variance of each aggregator's discrete Gaussian, as ``"p/q"``; none for no noise.
    """

    round: int
    entries: int
    minimum: int
    fraction_bits: int
    bound: int
    sigma2: str | None

    @property
    def variance(self) -> Fraction | None:
        """``sigma2`` as a number."""
        return None if self.sigma2 is None else Fraction(self.sigma2)

    def pack(self) -> bytes:
        """As JSON, equal for equal notices."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """From ``pack``."""
        return cls(**json.loads(body))


@dataclass(frozen=True)
class SharePost:
    """What one aggregator posts to the cloud: its noisy share ``[entry]`` of the sum over the agreed set.

    ``agreed`` is the digest of round, parameters and agreed uploads.
    """

    agreed: bytes
    share: NDArray[np.uint32]

    def pack(self) -> bytes:
        """Digest, then ring elements."""
        return self.agreed + self.share.astype("<u4", copy=False).tobytes()

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """From ``pack``."""
        return cls(body[:32], np.frombuffer(body[32:], "<u4").astype(np.uint32, copy=False))


def _remaining(deadline: float | None) -> float | None:
    # A timeout of exactly zero would make the socket non-blocking, which is another mode.
    return None if deadline is None else max(deadline - time.monotonic(), 1e-3)
