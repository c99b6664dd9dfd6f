"""The aggregators' processes as the cloud sees them: started, waited for under deadlines, never orphaned."""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import privkd
from privkd.errors import ChannelError
from privkd.privacy.noise import NoiseRoot
from privkd.secure.wire import Frame, Kind, Link, LinkClosedError, Setup

_MODULE = "privkd.secure.aggregator"
_PING_SECONDS = 2.0
_REAP_SECONDS = 0.5
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Party:
    """One aggregator's process and the link to it. ``name`` is how errors call it."""

    rank: int
    process: "subprocess.Popen[bytes]"
    link: Link
    name: str

    def death(self) -> str | None:
        """How the process died, in words; none while it lives."""
        code = self.process.poll()
        if code is None:
            return None
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return f"{self.name} {how}"

    def send(self, frame: Frame, deadline: float) -> None:
        """Send a frame by ``deadline``.

        Raises:
            ChannelError: the party died or takes nothing; it is named.
        """
        try:
            self.link.send(frame, deadline)
        except TimeoutError:
            raise ChannelError(f"{self.name} is stopped or stuck: it took no upload in time") from None
        except LinkClosedError:
            raise ChannelError(obituary([self])) from None


def party_key(root: NoiseRoot, rank: int) -> bytes:
    """The noise key of the aggregator ``rank``, where one process makes them all."""
    return root.subkey("aggregator", rank)


class Session:
    """``parties`` running aggregators. Whatever goes wrong raises ``ChannelError``; the caller then stops it.

    The processes end with this object, with the interpreter, or with the pipe when this process is killed.
    """

    def __init__(self, parties: int, root: NoiseRoot) -> None:
        """Start the processes, and return while they set themselves up."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        port = listener.getsockname()[1]
        self.parties: list[Party] = []
        # The list is shared, so that even a start that fails half way leaves nothing behind.
        self._finalizer = weakref.finalize(self, end, self.parties, os.getpid())
        with listener:
            for rank in range(parties):
                party = spawn(rank, listener if rank == 0 else None, _MODULE)
                self.parties.append(party)
                setup = Setup(rank, parties, port, party_key(root, rank).hex())
                party.send(Frame(Kind.SETUP, setup.pack()), time.monotonic() + _PING_SECONDS)
        self._public_keys: list[bytes] = []

    def public_keys(self, deadline: float) -> list[bytes]:
        """The aggregators' X25519 keys, by rank; waits until all are ready."""
        if not self._public_keys:
            self._public_keys = self.collect(Kind.READY, deadline)
        return self._public_keys

    def check(self) -> None:
        """Raise ``ChannelError`` if a party has died."""
        if any(party.death() for party in self.parties):
            raise ChannelError(obituary(self.parties))

    def broadcast(self, frame: Frame, deadline: float) -> None:
        """Send the same frame to every party."""
        for party in self.parties:
            party.send(frame, deadline)

    def collect(self, kind: Kind, deadline: float) -> list[bytes]:
        """The body of one frame of this ``kind`` from every party, by rank.

        Shortly before the deadline the silent ones are pinged, to tell a stopped party from its peers,
        which wait for it as we do.

        Raises:
            ChannelError: a party died, failed or is late; it is named.
        """
        bodies: dict[int, bytes] = {}
        answered: set[int] = set()
        now = time.monotonic()
        ping_at = deadline - min(_PING_SECONDS, (deadline - now) / 4)
        pinged = False
        with selectors.DefaultSelector() as selector:
            for party in self.parties:
                selector.register(party.link, selectors.EVENT_READ, party)
            while len(bodies) < len(self.parties):
                now = time.monotonic()
                if now >= deadline:
                    raise ChannelError(self._late(set(bodies), answered))
                if now >= ping_at and not pinged:
                    self.broadcast(Frame(Kind.PING), deadline)
                    pinged = True
                for key, _ in selector.select((deadline if pinged else ping_at) - now):
                    for frame in self._frames(key.data):
                        if frame.kind is kind:
                            bodies[key.data.rank] = frame.body
                        elif frame.kind is Kind.PONG:
                            answered.add(key.data.rank)
        return [bodies[party.rank] for party in self.parties]

    def _frames(self, party: Party) -> list[Frame]:
        """What a readable party has sent."""
        try:
            frames = [frame] if (frame := party.link.poll()) else []
        except LinkClosedError:
            raise ChannelError(obituary([party])) from None
        while (frame := party.link.buffered()) is not None:
            frames.append(frame)
        for frame in frames:
            if frame.kind is Kind.FAILED:
                # A party whose peer was killed complains first, but the dead one is to blame.
                raise ChannelError(obituary(self.parties, otherwise=f"{party.name}: {frame.body.decode()}"))
        return frames

    def _late(self, done: set[int], answered: set[int]) -> str:
        waiting = [party for party in self.parties if party.rank not in done]
        silent = [party.name for party in waiting if party.rank not in answered]
        if silent:
            return f"{', '.join(silent)} stopped answering"
        return f"{', '.join(party.name for party in waiting)} did not finish in time"

    def stop(self) -> None:
        """End all processes. Idempotent."""
        self._finalizer()


def spawn(rank: int, listener: socket.socket | None, module: str, name: str | None = None) -> Party:
    """Start ``module`` as a party's process, with a link to it and, at rank 0, its store's ``listener``.

    Raises:
        ChannelError: the process cannot be started.
    """
    ours, theirs = socket.socketpair()
    descriptors = {"--link": theirs.fileno()}
    if listener is not None:
        descriptors["--store"] = listener.fileno()
    options = [word for name, number in descriptors.items() for word in (name, str(number))]
    sources = [str(Path(privkd.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, sources))
    # No GPU: CrypTen would otherwise claim memory on each.
    environment = os.environ | _ONE_THREAD | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    with theirs:
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *options],
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
            raise ChannelError(f"aggregator-{rank} cannot be started: {error}") from error
    return Party(rank, process, Link(ours), name or f"aggregator-{rank}")


def obituary(parties: Sequence[Party], otherwise: str | None = None) -> str:
    """Which of ``parties`` died and how; waits a moment, as a death shows on sockets before it is reaped."""
    until = time.monotonic() + _REAP_SECONDS
    while True:
        deaths = [death for party in parties if (death := party.death())]
        if deaths:
            return ", ".join(deaths)
        if time.monotonic() >= until:
            return otherwise or f"{', '.join(party.name for party in parties)} closed its link"
        time.sleep(0.01)


def end(parties: list[Party], owner: int) -> None:
    """Kill the processes and wait for them, if the process ``owner`` is this one."""
    # A forked child inherits the finalizer, but the processes are its parent's.
    if os.getpid() != owner:
        return
    for party in parties:
        party.link.close()
        party.process.kill()
    for party in parties:
        with contextlib.suppress(subprocess.TimeoutExpired):
            party.process.wait(_PING_SECONDS)
