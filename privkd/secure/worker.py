"""The worker of one party, which runs CrypTen: started, asked under deadlines, ended, session after session.

The process itself is ``privkd.secure.protocol``. It holds nothing that matters, so it may be killed at any
moment and started again. Whoever starts it never imports torch.

A session's name is recorded before its worker starts, and none that is recorded is taken again: not after the
worker died, and not after a service was started anew, whose record is ``sessions.jsonl``. It holds the last
thousand names or more. Nothing secret rests on it, as the parties' common streams are others in every session
(``privkd.secure.peers``); it keeps shares of a vote apart that two sessions made.

**Runs in turn.** A session is of a run's lease, the part of its name before the ``-``. At rank 0 a lease
has the workers while a round is being closed, and for up to ``lease_seconds`` from when it was granted
until its round is closed. Another is told meanwhile that they are busy, and queues by asking again. Once
some other waits, a lease that had the workers for ``lease_seconds`` has to queue too, before its next
round. The other parties follow rank 0, but let no round be ended that they are still closing. A lease takes
the place of its own sessions at any time: the workers of the one before may wait for one that failed.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

import privkd
from privkd.errors import ChannelError, RefusalError, RunError
from privkd.secure.frames import Frame, Kind, Link, LinkClosedError, WorkerSetup
from privkd.secure.party import Party
from privkd.secure.terms import lease_of, session_mark

_MODULE = "privkd.secure.protocol"
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
_END_SECONDS = 5.0
_REAP_SECONDS = 0.5
_START_PATIENCE = 4
_PING_SECONDS = 1.0
_SILENT_SECONDS = 2 * _PING_SECONDS
_QUEUE_SECONDS = 10.0
_KEPT_SESSIONS = 1000


class WorkerError(ChannelError):
    """A worker died, hangs or failed. Nothing was released, and the step may be tried again."""


class BusyError(WorkerError):
    """The workers are another run's now. They may be asked for again, and come to everybody in turn."""


class Records(Protocol):
    """Where decisions are recorded: a `privkd.journal.Journal`, or in memory where nothing is to outlive
    us."""

    def append(self, record: dict[str, Any], /) -> None:
        """Add a record; it lasts when this returns."""
        ...

    def replace(self, records: Sequence[dict[str, Any]], /) -> None:
        """Keep these records alone, in place of all."""
        ...

    def __iter__(self) -> Iterator[dict[str, Any]]: ...


class RecordsInMemory(list[dict[str, Any]]):
    """`Records` that end with this object."""

    def replace(self, records: Sequence[dict[str, Any]], /) -> None:
        """Keep these records alone."""
        self[:] = records


class Worker:
    """A running worker. Every call has a deadline; whoever is late is killed.

    The process ends with this object, with the interpreter, or with the link when this process is killed.
    """

    def __init__(
        self, setup: WorkerSetup, name: str, listener: socket.socket | None, *, start_seconds: float
    ) -> None:
        """Start the process, and return while it sets itself up.

        Args:
            setup: what it is told.
            name: how errors call it.
            listener: at rank 0, the socket of the peers' store.
            start_seconds: that it may take to come up.

        Raises:
            ChannelError: it cannot be started.
        """
        self.session = setup.session
        self.name = name
        self._process, self._link = _spawn(name, listener)
        self._finalizer = weakref.finalize(self, _end, self._process, os.getpid())
        self._ready = False
        self._heard: float | None = None
        self._start_by = time.monotonic() + start_seconds
        self._send(Frame(Kind.SETUP, setup.pack()), self._start_by)

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    @property
    def death(self) -> str | None:
        """How the process died, in words; none while it lives, or if it was ended here."""
        code = self._process.poll()
        if code is None or self.ended:
            return None
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return f"{self.name} {how}"

    @property
    def ended(self) -> bool:
        """Whether it was ended here."""
        return not self._finalizer.alive

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return not self.ended and self._process.poll() is None

    @property
    def silent(self) -> bool:
        """Whether its answer is awaited, and it has given no sign of life for a while."""
        heard = self._heard
        return heard is not None and time.monotonic() - heard > _SILENT_SECONDS

    def call(
        self, frame: Frame, *, step_seconds: float, hang_seconds: float, uploads: Iterable[bytes] = ()
    ) -> bytes:
        """What the worker answers to a step, once it is up.

        Args:
            frame: the step.
            step_seconds: that it may take.
            hang_seconds: without a sign of life before it counts as lost.
            uploads: envelopes that the step is about, where the worker cannot read them itself.

        Raises:
            WorkerError: it died, failed or is late; it is killed.
        """
        try:
            if not self._ready:
                # While it imports libraries, its other threads wait long for a turn.
                self._await(Kind.READY, self._start_by, _START_PATIENCE * hang_seconds)
                self._ready = True
            deadline = time.monotonic() + step_seconds
            for envelope in uploads:
                self._send(Frame(Kind.UPLOAD, envelope), deadline)
            self._send(frame, deadline)
            return self._await(frame.kind, deadline, hang_seconds)
        except ChannelError as error:
            self.stop()
            raise WorkerError(str(error)) from error
        finally:
            self._heard = None

    def _send(self, frame: Frame, deadline: float) -> None:
        try:
            self._link.send(frame, deadline)
        except TimeoutError:
            raise ChannelError(f"{self.name} is stopped or stuck: it took nothing in time") from None
        except LinkClosedError:
            raise ChannelError(self._obituary()) from None

    def _await(self, kind: Kind, deadline: float, hang_seconds: float) -> bytes:
        self._heard = pinged = time.monotonic()
        while True:
            frame = self._poll(min(_PING_SECONDS, deadline - time.monotonic()))
            now = time.monotonic()
            if frame is not None:
                self._heard = now
                if frame.kind is kind:
                    return frame.body
                if frame.kind is Kind.FAILED:
                    raise ChannelError(self._obituary(f"{self.name}: {frame.body.decode()}"))
            elif now - self._heard > hang_seconds or (now >= deadline and self.silent):
                raise ChannelError(f"{self.name} stopped answering")
            elif now >= deadline:
                raise ChannelError(f"{self.name} did not finish in time")
            if now - pinged >= _PING_SECONDS:
                pinged = now
                self._send(Frame(Kind.PING), deadline)

    def _poll(self, seconds: float) -> Frame | None:
        frame = self._link.buffered()
        if frame is None and select.select([self._link], [], [], max(seconds, 0.0))[0]:
            try:
                frame = self._link.poll()
            except LinkClosedError:
                raise ChannelError(self._obituary()) from None
        return frame

    def _obituary(self, otherwise: str | None = None) -> str:
        return first_death([self]) or otherwise or f"{self.name} closed its link"

    def stop(self) -> None:
        """End the process. Idempotent."""
        self._finalizer()


def first_death(workers: Iterable[Worker]) -> str | None:
    """Which of ``workers`` died and how; waits a moment, as a death shows on sockets before it is reaped."""
    watched = [worker for worker in workers if not worker.ended]
    until = time.monotonic() + _REAP_SECONDS
    while True:
        deaths = [death for worker in watched if (death := worker.death)]
        if deaths or not watched or time.monotonic() >= until:
            return ", ".join(deaths) or None
        time.sleep(0.01)


def _spawn(name: str, listener: socket.socket | None) -> "tuple[subprocess.Popen[bytes], Link]":
    ours, theirs = socket.socketpair()
    descriptors = {"--link": theirs.fileno()}
    if listener is not None:
        descriptors["--store"] = listener.fileno()
    options = [word for option, number in descriptors.items() for word in (option, str(number))]
    sources = [str(Path(privkd.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, sources))
    # No GPU: CrypTen would otherwise claim memory on each.
    environment = os.environ | _ONE_THREAD | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    with theirs:
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                pass_fds=tuple(descriptors.values()),
                # Out of the terminal's foreground group: Ctrl-C is ours to handle.
                process_group=0,
            )
        except OSError as error:
            ours.close()
            raise ChannelError(f"{name} cannot be started: {error}") from error
    return process, Link(ours)


def _end(process: "subprocess.Popen[bytes]", owner: int) -> None:
    """Kill the process. The link stays open for a thread that reads it, and sees its end."""
    # A forked child inherits the finalizer, but the process is its parent's.
    if os.getpid() != owner:
        return
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_SECONDS)


class WorkerSupervisor:
    """Starts one party's workers and asks them. Safe to call from many threads."""

    def __init__(
        self,
        party: Party,
        sealing_key: X25519PrivateKey,
        noise_key: bytes,
        sessions: Records,
        *,
        name: str,
        insist: Callable[[Callable[[], None]], None] = lambda write: write(),
    ) -> None:
        """Take up the names of the ``sessions`` so far; nothing is started yet.

        Args:
            party: whose worker it is.
            sealing_key: the party's.
            noise_key: the party's.
            sessions: a record of each name that was used.
            name: see `Worker`.
            insist: how to write what must be written even on a full disk.
        """
        self._sessions = sessions
        self._insist = insist
        self._used = {record["session"] for record in sessions}
        self._party = party
        self._sealing_key = sealing_key
        self._noise_key = noise_key
        self._name = name
        self._changing = threading.Lock()
        self._port = 0
        self._granted = self._held_until = 0.0
        self._engaged = 0
        # Leases that were told to wait, in that order, and when they last asked.
        self._queue: dict[str, float] = {}
        self.worker: Worker | None = None

    @property
    def sessions(self) -> int:
        """How many workers were started, over restarts too."""
        return len(self._used)

    def hold_to(self, party: Party) -> None:
        """Take other limits, from the next step or worker on."""
        self._party = party

    def join(self, session: str, port: int | None) -> int:
        """Start a worker that joins the parties' ``session``; the port of its rendezvous.

        A group of workers cannot be mended, so a new session ends the worker of the one before. While the
        worker lives, the same session again changes nothing.

        Args:
            session: names the group of workers, and no other before or after; see the module.
            port: of rank 0's rendezvous; rank 0 itself needs none, and binds it.

        Raises:
            RefusalError: the name was used before, or the port is missing.
            BusyError: the workers are another lease's.
            RunError: the name cannot be recorded.
            WorkerError: the worker cannot be started.
        """
        with self._changing:
            worker, now = self.worker, time.monotonic()
            if worker is not None and worker.session == session and worker.alive:
                self._held_until = now + self._party.limits.lease_seconds
                return self._port
            if session_mark(session).hex() in self._used:
                raise RefusalError(409, "the name of this session was used before; take a new one")
            if self._party.rank != 0 and port is None:
                raise RefusalError(400, "a session needs the port of rank 0's rendezvous")
            self._take_turn(lease_of(session), now)
            self._end()
            if self._party.rank == 0:
                with self._bind() as listener:
                    self._port = listener.getsockname()[1]
                    self.worker = self._start(session, listener)
            else:
                self._port = port or 0
                self.worker = self._start(session, None)
            return self._port

    def _take_turn(self, lease: str, now: float) -> None:
        """Give the workers to a lease. Raises `BusyError` where it is not its turn, and notes that it
        waits."""
        worker, arbiter = self.worker, self._party.rank == 0
        mine = worker is not None and lease_of(worker.session) == lease
        busy = self._engaged > 0 or (arbiter and now < self._held_until)
        if not (mine and busy):
            first = next(iter(self._waiting(now)), lease)
            if (worker is not None and worker.alive and busy) or (arbiter and first != lease):
                self._queue[lease] = now
                raise BusyError(f"{self._party.name} is busy with another run's round; try again")
            self._granted = now
        self._queue.pop(lease, None)
        self._held_until = now + self._party.limits.lease_seconds

    def _waiting(self, now: float) -> dict[str, float]:
        """The queue, without those who do not ask any more."""
        self._queue = {lease: asked for lease, asked in self._queue.items() if now - asked < _QUEUE_SECONDS}
        return self._queue

    @contextlib.contextmanager
    def closing(self, session: str) -> Iterator[None]:
        """Within, a round is being closed in ``session``, if that is the one that is on. Its lease ends then.

        Raises:
            BusyError: the session's lease had its turn, and others wait.
        """
        with self._changing:
            worker, now = self.worker, time.monotonic()
            ours = worker is not None and worker.session == session
            had_turn = now - self._granted > self._party.limits.lease_seconds
            if ours and had_turn and not self._engaged and self._waiting(now).keys() - {lease_of(session)}:
                self._end()
                raise BusyError(f"{self._party.name}: it is another run's turn; try again")
            self._engaged += ours
        try:
            yield
        finally:
            with self._changing:
                self._engaged -= ours
                if ours and self.worker is worker:
                    self._held_until = time.monotonic()

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
        self._insist(lambda: self._sessions.append({"session": mark}))
        self._used.add(mark)
        self._forget_sessions()
        party = self._party
        setup = WorkerSetup(
            rank=party.rank,
            parties=party.parties,
            host=party.peers.host,
            port=self._port,
            sealing_key=self._sealing_key.private_bytes_raw().hex(),
            noise_key=self._noise_key.hex(),
            members=party.members,
            session=session,
        )
        return Worker(setup, self._name, listener, start_seconds=party.limits.start_seconds)

    def _forget_sessions(self) -> None:
        if len(self._used) < 2 * _KEPT_SESSIONS:
            return
        latest = list(self._sessions)[-_KEPT_SESSIONS:]
        # Where the disk is full, the next session tries again.
        with contextlib.suppress(RunError):
            self._sessions.replace(latest)
            self._used = {record["session"] for record in latest}

    def ask(self, session: str, kind: Kind, body: bytes, uploads: Iterable[bytes] = ()) -> bytes:
        """What the session's worker answers to a step; ``uploads``: see `Worker.call`.

        Raises:
            WorkerError: there is none, or it failed.
        """
        worker, limits = self.worker, self._party.limits
        if worker is None or worker.session != session:
            raise WorkerError(f"{self._party.name} has no worker in this session")
        return worker.call(
            Frame(kind, body),
            step_seconds=limits.step_seconds,
            hang_seconds=limits.hang_seconds,
            uploads=uploads,
        )

    def _end(self) -> None:
        if self.worker is not None:
            self.worker.stop()
            self.worker = None

    def stop(self) -> None:
        """End the worker. Idempotent."""
        with self._changing:
            self._end()
