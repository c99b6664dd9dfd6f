"""Frames between a party and its worker, over one local stream socket, and what they carry.

A frame is a kind, a length and a body. Nothing on the wire is pickled.
"""

import json
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Self

from privkd.privacy.events import PartyId

_HEAD = struct.Struct("<BI")
_CHUNK = 1 << 18
_IDENTIFIER_BYTES = 32


class Kind(IntEnum):
    """What a frame is. The last four are the protocol's steps: they go to the worker, and come back."""

    SETUP = 1
    READY = 2
    PING = 3
    PONG = 4
    FAILED = 5
    UPLOAD = 6
    AGREE = 7
    CHECK = 8
    SUM = 9
    VOTE = 10


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
class WorkerSetup:
    """What a worker is told when it starts: over the link, as the keys must not be on display."""

    rank: int
    parties: int
    host: str
    port: int
    sealing_key: str
    noise_key: str
    members: tuple[str, ...]
    session: str

    def pack(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """From ``pack``."""
        fields = json.loads(body)
        return cls(**fields | {"members": tuple(fields["members"])})


@dataclass(frozen=True)
class Task:
    """A step over some uploads of a round.

    They lie in ``folder``; where that is empty, each came in a frame of its own before the task.
    """

    folder: str
    terms: str
    devices: tuple[PartyId, ...]

    def pack(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """From ``pack``."""
        fields = json.loads(body)
        return cls(**fields | {"devices": tuple(fields["devices"])})


def pack_identifiers(identifiers: Iterable[bytes]) -> bytes:
    """The body of an ``AGREE`` frame."""
    return b"".join(identifiers)


def unpack_identifiers(body: bytes) -> list[bytes]:
    """From ``pack_identifiers``."""
    return [body[i : i + _IDENTIFIER_BYTES] for i in range(0, len(body), _IDENTIFIER_BYTES)]


def _remaining(deadline: float | None) -> float | None:
    # A timeout of exactly zero would make the socket non-blocking, which is another mode.
    return None if deadline is None else max(deadline - time.monotonic(), 1e-3)
