"""Who carries messages between the cloud and its devices: trusted with delivery, and with nothing else.

It sees public questions and answers without secrets. One that loses, repeats, delays, reorders or invents a
message costs time, and never privacy: devices answer a repeat with the same bytes.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from privkd.deployment.sockets import call
from privkd.privacy.events import PartyId


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
        return {name: self._devices[name](question) for name, question in questions.items()}

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
        answers: dict[PartyId, bytes] = {}

        def put(name: PartyId) -> None:
            with suppress(OSError):
                answers[name] = call(self._sockets[name], questions[name], max(0.0, until - time.monotonic()))

        known = [name for name in questions if name in self._sockets]
        with ThreadPoolExecutor(max(1, len(known)), thread_name_prefix="carrier") as pool:
            list(pool.map(put, known))
        return answers

    def close(self) -> None:
        """See `Carrier.close`."""
