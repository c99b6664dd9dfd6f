"""Where an engine's courier collects a cloud's questions and leaves the answers: a Unix socket, no engine's.

`Desk` is the cloud's end; `missing`, `question` and `leave` are the courier's, which imports nothing of the
product's. Each message is a JSON head, a line's end, and bytes. All that a courier says is under a *ticket*,
the name of what was laid out, so that one that comes late finds nothing to do and can leave nothing.
"""

import json
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from privkd.deployment.sockets import Door, call

_MISSING, _QUESTION, _ANSWER = "missing", "question", "answer"
_SECONDS = 60.0
"""How long a courier waits for the desk, which never waits for anybody."""


class Desk:
    """The questions that are laid out, and the answers that were left. One batch at a time."""

    def __init__(self, path: Path) -> None:
        """Listen at ``path``. Raises `OSError`."""
        self._changed = threading.Condition()
        self._questions: dict[str, bytes] = {}
        self._answers: dict[str, bytes] = {}
        self._collected: set[str] = set()
        self._tickets: dict[str, float | None] = {}
        self._last = 0.0
        self._door = Door(path, self._handle)

    def lay_out(self, questions: Mapping[str, bytes]) -> None:
        """Lay out questions by device in place of what lay there; older tickets are over."""
        with self._changed:
            self._questions, self._answers = dict(questions), {}
            self._collected, self._tickets = set(), {}
            self._last = time.monotonic()

    def ticket(self) -> str:
        """One more ticket for what is laid out."""
        with self._changed:
            ticket = secrets.token_hex(16)
            self._tickets[ticket], self._last = None, time.monotonic()
            return ticket

    def wait(self, seconds: float) -> bool:
        """Whether all have answered, now or within ``seconds``."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._missing(), max(0.0, seconds))

    def missing(self) -> list[str]:
        """The devices that have not answered."""
        with self._changed:
            return self._missing()

    def uncollected(self) -> list[str]:
        """Those whose questions nobody has taken to them."""
        with self._changed:
            return [name for name in self._missing() if name not in self._collected]

    def shown(self, ticket: str) -> float | None:
        """Seconds since a courier first came with this ticket; ``None`` if none did."""
        with self._changed:
            first = self._tickets.get(ticket)
            return None if first is None else time.monotonic() - first

    def quiet(self) -> float:
        """Seconds since any courier came, or a ticket was made."""
        with self._changed:
            return time.monotonic() - self._last

    def clear(self) -> dict[str, bytes]:
        """Take all away: the answers that were left, by device."""
        with self._changed:
            answers = self._answers
        self.lay_out({})
        return answers

    def close(self) -> None:
        """Listen no more. Idempotent."""
        self._door.close()

    def _missing(self) -> list[str]:
        return [name for name in self._questions if name not in self._answers]

    def _handle(self, message: bytes) -> bytes:
        line, _, body = message.partition(b"\n")
        try:
            head = json.loads(line)
            ticket, verb, device = str(head["ticket"]), head["verb"], str(head["device"])
        except (ValueError, KeyError, TypeError):
            return b""
        with self._changed:
            if ticket not in self._tickets:
                return b"[]" if verb == _MISSING else b""
            self._last = time.monotonic()
            if self._tickets[ticket] is None:
                self._tickets[ticket] = self._last
            if verb == _MISSING:
                return json.dumps(self._missing()).encode()
            if device not in self._questions:
                return b""
            if verb == _QUESTION:
                self._collected.add(device)
                return self._questions[device]
            # The first answer stands: a device answers a repeat with the same bytes.
            self._answers.setdefault(device, body)
            self._changed.notify_all()
            return b""


def missing(path: str, ticket: str) -> list[str]:
    """The devices whose answers are wanted; none once the ticket is over. Raises `OSError`."""
    return [str(name) for name in json.loads(_said(path, ticket, _MISSING))]


def question(path: str, ticket: str, device: str) -> bytes:
    """What is asked of a device; empty once the ticket is over. Raises `OSError`."""
    return _said(path, ticket, _QUESTION, device)


def leave(path: str, ticket: str, device: str, answer: bytes) -> None:
    """Leave a device's answer. Raises `OSError`."""
    _said(path, ticket, _ANSWER, device, answer)


def _said(path: str, ticket: str, verb: str, device: str = "", body: bytes = b"") -> bytes:
    head = json.dumps({"ticket": ticket, "verb": verb, "device": device})
    return call(path, head.encode() + b"\n" + body, _SECONDS)
