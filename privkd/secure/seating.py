"""The worker of one party, session after session: started, asked, and ended with the session.

The parties' common streams, and so the third party's correlated randomness, are functions of their keys and
the session's name. Under a name that was used before they would repeat, and mask other secrets than the first
time. So every name is in ``sessions.jsonl`` before its worker starts, and none is taken twice: not after the
worker died, and not after the service was started anew.
"""

import socket
import threading

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privkd.journal import Journal
from privkd.secure.admission import RefusalError
from privkd.secure.party import PartyConfig
from privkd.secure.posts import session_mark
from privkd.secure.wire import Frame, Kind
from privkd.secure.worker import Worker, WorkerError, WorkerSetup


class Seating:
    """One party's place among the workers. Safe to call from many threads."""

    def __init__(self, party: PartyConfig, sealing_key: X25519PrivateKey, noise_key: bytes) -> None:
        """Take up the names of the sessions so far; nothing is started yet.

        Raises:
            RunError: their journal is damaged.
        """
        self._sessions = Journal(party.directory / "sessions.jsonl")
        self._used = {record["session"] for record in self._sessions}
        self._party = party
        self._sealing_key = sealing_key
        self._noise_key = noise_key
        self._changing = threading.Lock()
        self._worker: Worker | None = None
        self._port = 0

    def join(self, session: str, port: int | None) -> int:
        """Start a worker that joins the parties' ``session``; the port of its rendezvous.

        A group of workers cannot be mended, so a new session ends the worker of the one before. While the
        worker lives, the same session again changes nothing.

        Args:
            session: names the group of workers, and no other before or after.
            port: of rank 0's rendezvous; rank 0 itself needs none, and binds it.

        Raises:
            RefusalError: the name was used before, or the port is missing.
            RunError: the name cannot be recorded.
            WorkerError: the worker cannot be started.
        """
        with self._changing:
            if self._worker is not None and self._worker.session == session and self._worker.alive:
                return self._port
            if session_mark(session).hex() in self._used:
                raise RefusalError(409, "the name of this session was used before; take a new one")
            self._end()
            if self._party.rank == 0:
                with self._bind() as listener:
                    self._port = listener.getsockname()[1]
                    self._worker = self._start(session, listener)
            else:
                if port is None:
                    raise RefusalError(400, "a session needs the port of rank 0's rendezvous")
                self._port = port
                self._worker = self._start(session, None)
            return self._port

    def _bind(self) -> socket.socket:
        peers = self._party.peers
        try:
            return socket.create_server((peers.host, peers.port), backlog=64)
        except OSError as error:
            raise WorkerError(
                f"{self._party.name}: cannot listen on {peers.host}:{peers.port}: {error}"
            ) from error

    def _start(self, session: str, listener: socket.socket | None) -> Worker:
        mark = session_mark(session).hex()
        self._sessions.append({"session": mark})
        self._used.add(mark)
        party = self._party
        setup = WorkerSetup(
            rank=party.rank,
            parties=party.parties,
            host=party.peers.host,
            port=self._port,
            interface=party.peers.interface,
            sealing_key=self._sealing_key.private_bytes_raw().hex(),
            noise_key=self._noise_key.hex(),
            members=party.members,
            session=session,
        )
        return Worker(setup, party.name, listener, start_seconds=party.limits.start_seconds)

    def ask(self, session: str, kind: Kind, body: bytes) -> bytes:
        """What the session's worker answers to a step.

        Raises:
            WorkerError: there is none, or it failed.
        """
        worker, limits = self._worker, self._party.limits
        if worker is None or worker.session != session:
            raise WorkerError(f"{self._party.name} has no worker in this session")
        return worker.call(
            Frame(kind, body), step_seconds=limits.step_seconds, hang_seconds=limits.hang_seconds
        )

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def stop(self) -> None:
        """End the worker. Idempotent."""
        with self._changing:
            self._end()
