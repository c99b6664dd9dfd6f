"""Who carries messages between the cloud and its devices: trusted with delivery, and with nothing else.

It sees public questions and answers without secrets. One that loses, repeats, delays, reorders or invents a
message costs time, and never privacy: devices answer a repeat with the same bytes.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Protocol

from privkd.deployment.sockets import call
from privkd.privacy.events import PartyId

_LEAST = 1e-3
"""Seconds: a socket that may wait for none at all does not wait for its link either."""


class Carrier(Protocol):
    """Brings questions to devices and their answers back."""

    def ask(self, questions: Mapping[PartyId, bytes], seconds: float) -> Mapping[PartyId, bytes]:
        """Put each question to its device; what came back within ``seconds``, and no error for what did not.

        Returns as soon as all have answered. May be called again with the same questions.
        """
        ...

    def close(self) -> None:
        """Carry no more. Idempotent."""
        ...


class InProcessCarrier:
    """Devices of this process, one after the other; for tests."""

    def __init__(self, devices: Mapping[PartyId, Callable[[bytes], bytes]]) -> None:
        """Each device is what answers a message."""
        self._devices = dict(devices)

    def ask(self, questions: Mapping[PartyId, bytes], seconds: float) -> Mapping[PartyId, bytes]:
        """See `Carrier.ask`."""
        return {name: self._devices[name](questions[name]) for name in questions if name in self._devices}

    def close(self) -> None:
        """See `Carrier.close`."""


class SocketCarrier:
    """Devices that are processes of this machine, each at its own Unix socket."""

    def __init__(self, sockets: Mapping[PartyId, Path]) -> None:
        """Where each device listens."""
        self._sockets = dict(sockets)

    def ask(self, questions: Mapping[PartyId, bytes], seconds: float) -> Mapping[PartyId, bytes]:
        """See `Carrier.ask`."""
        until = time.monotonic() + seconds
        known = [name for name in questions if name in self._sockets]
        came: SimpleQueue[tuple[PartyId, bytes | None]] = SimpleQueue()

        def put(name: PartyId) -> None:
            answer = None
            with suppress(OSError):
                answer = call(self._sockets[name], questions[name], max(_LEAST, until - time.monotonic()))
            came.put((name, answer))

        # Daemons: a cloud that is told to stop does not wait for a device that trains.
        for name in known:
            Thread(target=put, args=(name,), daemon=True, name=f"carrier {name}").start()
        answers: dict[PartyId, bytes] = {}
        with suppress(Empty):
            for _ in known:
                name, answer = came.get(timeout=max(_LEAST, until - time.monotonic()))
                if answer is not None:
                    answers[name] = answer
        return answers

    def close(self) -> None:
        """See `Carrier.close`."""
