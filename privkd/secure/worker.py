"""The worker of a party's service, as the service sees it: started, asked under deadlines, ended.

The process itself is ``privkd.secure.seat``. It holds nothing that matters: uploads lie in the spool,
decisions in the service's journal, so it may be killed at any moment and started again. The service itself
never imports torch.
"""

import contextlib
import json
import os
import select
import socket
import subprocess
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self

from privkd.errors import ChannelError
from privkd.privacy.events import PartyId
from privkd.secure.aggregator import IDENTIFIER_BYTES
from privkd.secure.parties import Party, obituary, spawn
from privkd.secure.wire import Frame, Kind, LinkClosedError

_MODULE = "privkd.secure.seat"
_END_SECONDS = 5.0
_START_PATIENCE = 4
_PING_SECONDS = 1.0


class WorkerError(ChannelError):
    """A worker died, hangs or failed. Nothing was released, and the step may be tried again."""


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker is told when it starts: over the link, as the keys must not be on display."""

    rank: int
    parties: int
    host: str
    port: int
    interface: str
    sealing_key: str
    noise_key: str
    members: tuple[str, ...]
    session: str

    @property
    def third_party(self) -> bool:
        """Whether the group has a third party."""
        return len(self.members) > self.parties

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
    """A step over some uploads of a round, which lie in ``folder``."""

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


class Worker:
    """A running worker, seen from the service. Every call has a deadline; whoever is late is killed."""

    def __init__(
        self, setup: WorkerSetup, name: str, listener: socket.socket | None, *, start_seconds: float
    ) -> None:
        """Start the process, and return while it sets itself up."""
        self.session = setup.session
        self.name = name
        self._party = spawn(setup.rank, listener, _MODULE, f"{name}'s worker")
        self._finalizer = weakref.finalize(self, _end, self._party, os.getpid())
        self._ready = False
        self._start_by = time.monotonic() + start_seconds
        self._party.send(Frame(Kind.SETUP, setup.pack()), time.monotonic() + start_seconds)

    @property
    def pid(self) -> int:
        """The process."""
        return self._party.process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._finalizer.alive and self._party.death() is None

    def call(self, frame: Frame, *, step_seconds: float, hang_seconds: float) -> bytes:
        """What the worker answers to a step, once it is up.

        Raises:
            WorkerError: it died, failed, or gave no sign of life for ``hang_seconds``; it is killed.
        """
        try:
            if not self._ready:
                # While it imports libraries, its other threads wait long for a turn.
                self._await(Kind.READY, self._start_by, _START_PATIENCE * hang_seconds)
                self._ready = True
            deadline = time.monotonic() + step_seconds
            self._party.send(frame, deadline)
            return self._await(frame.kind, deadline, hang_seconds)
        except ChannelError as error:
            self.stop()
            raise WorkerError(str(error)) from error

    def _await(self, kind: Kind, deadline: float, hang_seconds: float) -> bytes:
        heard = pinged = time.monotonic()
        while True:
            frame = self._poll(min(_PING_SECONDS, deadline - time.monotonic()))
            now = time.monotonic()
            if frame is not None:
                heard = now
                if frame.kind is kind:
                    return frame.body
                if frame.kind is Kind.FAILED:
                    raise ChannelError(obituary([self._party], f"{self._party.name}: {frame.body.decode()}"))
            elif now - heard > hang_seconds:
                raise ChannelError(f"{self._party.name} stopped answering")
            elif now >= deadline:
                raise ChannelError(f"{self._party.name} did not finish in time")
            if now - pinged >= _PING_SECONDS:
                pinged = now
                self._party.send(Frame(Kind.PING), deadline)

    def _poll(self, seconds: float) -> Frame | None:
        link = self._party.link
        frame = link.buffered()
        if frame is None and select.select([link], [], [], max(seconds, 0.0))[0]:
            try:
                frame = link.poll()
            except LinkClosedError:
                raise ChannelError(obituary([self._party])) from None
        return frame

    def stop(self) -> None:
        """End the process. Idempotent."""
        self._finalizer()


def _end(party: Party, owner: int) -> None:
    """Kill the process. The link stays open for a thread that reads it, and sees its end."""
    # A forked child inherits the finalizer, but the process is its parent's.
    if os.getpid() != owner:
        return
    party.process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        party.process.wait(_END_SECONDS)


def pack_identifiers(identifiers: Sequence[bytes]) -> bytes:
    """The body of an ``AGREE`` frame."""
    return b"".join(identifiers)


def unpack_identifiers(body: bytes) -> list[bytes]:
    """From ``pack_identifiers``."""
    return [body[i : i + IDENTIFIER_BYTES] for i in range(0, len(body), IDENTIFIER_BYTES)]
