"""Whole groups on this machine: parties of this process, or services as they are deployed.

`local_links` holds the rounds of all parties in this process, by the services' own code: what is left out is
what one owner of all parties has no use for, the network, certificates, uploads and journals on disk. Each
party's worker is a process of its own all the same. `LocalParties` are the services themselves, each with its
own keys, uploads and journal: started, watched, restarted where one dies, and stopped.
"""

import contextlib
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tomli_w
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

import privkd
from privkd.errors import ChannelError, PrivkdError, RefusalError
from privkd.secure.certificates import CLOUD
from privkd.secure.client import ClientTls
from privkd.secure.keys import public_hex, write_parties
from privkd.secure.party import LimitsConfig, Party
from privkd.secure.rounds import Rounds
from privkd.secure.terms import RoundTerms
from privkd.secure.uploads import UploadsInMemory
from privkd.secure.worker import RecordsInMemory, Worker, WorkerSupervisor, first_death

_WATCH_SECONDS = 0.1
_END_SECONDS = 5.0
_ORPHANED_SECONDS = 0.05
_HOST = "127.0.0.1"
_MAX_BLOCK_BYTES = 1 << 28


def local_links(
    aggregators: int,
    noise_keys: Sequence[bytes],
    *,
    third_party: bool = False,
    step_seconds: float,
    start_seconds: float,
) -> "list[LocalLink]":
    """Links to new parties of this process; their workers start with the first session.

    Args:
        aggregators: how many there are.
        noise_keys: the parties' noise keys, by rank.
        third_party: whether there is a third party too.
        step_seconds: that each step of a worker may take.
        start_seconds: that the workers may take to come up.
    """
    sealing_keys = [X25519PrivateKey.generate() for _ in range(aggregators + third_party)]
    limits = LimitsConfig(
        minimum_devices=1,
        start_seconds=start_seconds,
        step_seconds=step_seconds,
        hang_seconds=step_seconds,
        max_upload_bytes=_MAX_BLOCK_BYTES,
    )
    members = tuple(public_hex(key) for key in sealing_keys)
    group = _Group()
    return [
        LocalLink(Party(rank=rank, parties=aggregators, members=members, limits=limits), key, noise, group)
        for rank, (key, noise) in enumerate(zip(sealing_keys, noise_keys, strict=True))
    ]


class _Group:
    """The workers of a local group: one lost is all lost, and is told by all alike."""

    def __init__(self) -> None:
        self.supervisors: list[WorkerSupervisor] = []
        self._judging = threading.Lock()
        self._verdict: str | None = None

    def lost(self, error: ChannelError) -> ChannelError:
        """What to raise for an ``error`` of one worker; ends all."""
        with self._judging:
            if self._verdict is None:
                self._verdict = self._blame(error)
                for supervisor in self.supervisors:
                    supervisor.stop()
            return ChannelError(f"{self._verdict}; nothing was released")

    def _blame(self, error: ChannelError) -> str:
        """A worker whose peer was killed or stands still complains first, but the other one is to blame."""
        others: list[Worker] = [s.worker for s in self.supervisors if s.worker is not None]
        death = first_death(others)
        silent = [worker.name for worker in others if worker.silent]
        return death or (f"{', '.join(silent)} stopped answering" if silent else str(error))


class LocalLink:
    """The link to a party of this process. One round is held at a time, and forgotten when the next opens.

    So a round that failed, or is asked for again, is simply held again, and as its noise is a function of the
    set of uploads, the same uploads meet the same noise and others another.
    """

    def __init__(self, party: Party, sealing_key: X25519PrivateKey, noise_key: bytes, group: _Group) -> None:
        self._party = party
        self._group = group
        self.supervisor = WorkerSupervisor(party, sealing_key, noise_key, RecordsInMemory(), name=party.name)
        group.supervisors.append(self.supervisor)
        self._rounds = self._no_rounds()

    def _no_rounds(self) -> Rounds:
        return Rounds(self._party, self.supervisor, journal=RecordsInMemory(), create=UploadsInMemory)

    @property
    def name(self) -> str:
        """As its worker is called."""
        return self._party.name

    def about(self, deadline: float) -> Mapping[str, Any]:
        """See `PartyLink.about`, as for all below."""
        return self._party.public

    def join(self, session: str, port: int | None, deadline: float) -> int:
        """Start its worker."""
        return self.supervisor.join(session, port)

    def open(self, terms: RoundTerms, deadline: float) -> None:
        """Open a round, and forget the one before."""
        self._rounds = self._no_rounds()
        self._rounds.open(terms)

    def relay(self, round: int, envelopes: Sequence[bytes], deadline: float) -> list[str]:
        """Take uploads; what was refused."""
        return self._rounds.upload_all(round, envelopes)

    def status(self, round: int, deadline: float) -> Mapping[str, Any]:
        """What is public of a round."""
        return self._rounds.status(round)

    def share(self, round: int, session: str, *, agree: bool, kept: bool, deadline: float) -> bytes:
        """Close a round; the party's part of the result. The workers' own limits say how long it takes."""
        try:
            return self._rounds.close(round, session, agree=agree, kept=kept)
        except RefusalError:
            raise
        except ChannelError as error:
            raise self._group.lost(error) from error

    def abandon(self, round: int, deadline: float) -> None:
        """Never release anything of a round."""
        self._rounds.abandon(round)

    def close(self) -> None:
        """End its worker. Idempotent."""
        self.supervisor.stop()


class LocalParties:
    """``parties`` services on the loopback interface, with a third party if asked for, behind TLS.

    They end with ``stop``, with this object, with the interpreter, or, as each watches its standard input,
    with this process however it ends. Their folder goes with them: where this process was killed, they remove
    it themselves.
    """

    def __init__(
        self,
        parties: int = 2,
        *,
        third_party: bool = False,
        tls: bool = True,
        limits: Mapping[str, Any] | None = None,
        noise_keys: tuple[bytes, ...] = (),
        start_seconds: float = 60.0,
    ) -> None:
        """Make keys in a folder that ends with this object, and start the services.

        Args:
            parties: number of aggregators.
            third_party: whether to start a third party too.
            tls: whether they ask for and show certificates.
            limits: the ``[limits]`` of all.
            noise_keys: the parties' noise keys, by rank; fresh unless given.
            start_seconds: that all services together may take to come up.

        Raises:
            ChannelError: a service does not come up.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="privkd-parties-")
        self.folder = Path(self._folder.name)
        count = parties + third_party
        self.authority = write_parties(
            self.folder, parties, [_HOST] * count, tls=tls, noise_keys=noise_keys, limits=limits
        )
        self._processes: list[subprocess.Popen[bytes]] = []
        self._watch = _Watch(self.folder, self._processes)
        self._finalizer = weakref.finalize(
            self, _end, self._processes, self._watch, self._folder, os.getpid()
        )
        self.urls: tuple[str, ...] = ()
        try:
            for rank in range(count):
                self._processes.append(_launch(self.folder, rank))
            deadline = time.monotonic() + start_seconds
            self.urls = tuple(self._address(rank, deadline) for rank in range(count))
        except BaseException:
            self.stop()
            raise
        threading.Thread(target=self._watch.run, daemon=True).start()

    def _address(self, rank: int, deadline: float) -> str:
        """Where a service listens, which it says first; from then on it keeps that port."""
        process = self._processes[rank]
        assert process.stdout is not None
        # The line is written at once, so that whatever can be read is all of it.
        if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise ChannelError(f"aggregator-{rank} is stopped or stuck: it did not come up in time")
        line = process.stdout.readline().decode()
        if not line:
            error = process.stderr.read().decode().strip() if process.stderr else ""
            raise ChannelError(f"aggregator-{rank} did not come up: {error or 'it gave no reason'}")
        url = line.split()[-1]
        config = self.folder / f"party-{rank}.toml"
        settings = tomllib.loads(config.read_text()) | {"listen": url.partition("://")[2]}
        config.write_text(tomli_w.dumps(settings))
        return url

    @property
    def client_tls(self) -> ClientTls | None:
        """What the cloud trusts and shows."""
        if self.authority is None:
            return None
        return ClientTls(self.folder / "ca.pem", self.folder / f"{CLOUD}.pem", self.folder / f"{CLOUD}.key")

    @property
    def pids(self) -> list[int]:
        """The services' processes, by rank."""
        return [process.pid for process in self._processes]

    def state(self, rank: int) -> Path:
        """A party's directory."""
        return self.folder / f"state-{rank}"

    def stop(self) -> None:
        """End all processes and remove the folder. Idempotent."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _launch(folder: Path, rank: int) -> "subprocess.Popen[bytes]":
    path = os.pathsep.join(
        filter(None, [str(Path(privkd.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])
    )
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(folder / f"party-{rank}.toml"), str(os.getpid())],
            # Held open by us alone: its end is how a service learns of ours.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
            process_group=0,
        )
    except OSError as error:
        raise ChannelError(f"aggregator-{rank} cannot be started: {error}") from error


class _Watch:
    """Starts each service again that dies: it takes up its uploads and journal."""

    def __init__(self, folder: Path, processes: "list[subprocess.Popen[bytes]]") -> None:
        self._folder = folder
        self._processes = processes
        self._stopping = threading.Event()
        self._launching = threading.Lock()

    def run(self) -> None:
        """Watch until ``stop``."""
        while not self._stopping.wait(_WATCH_SECONDS):
            with self._launching:
                for rank, process in enumerate(self._processes):
                    if process.poll() is not None and not self._stopping.is_set():
                        with contextlib.suppress(ChannelError):
                            self._processes[rank] = _launch(self._folder, rank)

    def stop(self) -> None:
        """From the return on, nothing is started any more."""
        self._stopping.set()
        with self._launching:
            pass


def _end(
    processes: "list[subprocess.Popen[bytes]]",
    watch: _Watch,
    folder: "tempfile.TemporaryDirectory[str]",
    owner: int,
) -> None:
    # A forked child inherits the finalizer, but the processes are its parent's.
    if os.getpid() != owner:
        return
    watch.stop()
    for process in processes:
        process.kill()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
    with contextlib.suppress(OSError):
        folder.cleanup()


def _main(config: Path, owner: int) -> None:
    """Run one party for the process ``owner``, and remove what is left of all where that has gone.

    Several do so, and whoever is last finds all the others' files.
    """
    from privkd.secure.service import serve

    serve(config, while_input=True)
    if not select.select([sys.stdin], [], [], 0)[0]:
        return  # it was told to end, and whoever started it may start it again
    until = time.monotonic() + _END_SECONDS
    while os.getppid() == owner and time.monotonic() < until:
        time.sleep(_ORPHANED_SECONDS)
    if os.getppid() != owner:
        shutil.rmtree(config.parent, ignore_errors=True)


if __name__ == "__main__":
    try:
        _main(Path(sys.argv[1]), int(sys.argv[2]))
    except PrivkdError as failure:
        sys.exit(str(failure))
