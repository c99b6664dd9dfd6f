"""A whole group of services on this machine: started, watched, restarted where one dies, and stopped.

The services are the same as in a deployment, each a process of its own with its own keys, spool and
journal; only that one owner runs them all.
"""

import contextlib
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tomli_w

import privkd
from privkd.errors import ChannelError
from privkd.secure.endpoint import ClientTls
from privkd.secure.keys import CLOUD, TestAuthority, create_noise_key, create_sealing_key, write_secret

_WATCH_SECONDS = 0.1
_END_SECONDS = 5.0
_HOST = "127.0.0.1"


class LocalParties:
    """``parties`` services on the loopback interface, with a third party if asked for, behind TLS.

    They end with ``stop``, with this object, with the interpreter, or, as each watches its standard input,
    with this process however it ends.
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
        self._tls = tls
        self._configure(parties, count, dict(limits or {}), noise_keys)
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

    def _configure(
        self, parties: int, count: int, limits: dict[str, Any], noise_keys: tuple[bytes, ...]
    ) -> None:
        public = [create_sealing_key(self.folder / f"party-{rank}.key") for rank in range(count)]
        self.authority = authority = TestAuthority() if self._tls else None
        if authority is not None:
            authority.write(self.folder)
            authority.issue(self.folder, CLOUD, name=CLOUD)
        for rank in range(count):
            noise = self.folder / f"party-{rank}.noise"
            if noise_keys:
                write_secret(noise, noise_keys[rank])
            else:
                create_noise_key(noise)
            settings: dict[str, Any] = {
                "rank": rank,
                "parties": parties,
                "listen": f"{_HOST}:0",
                "directory": f"state-{rank}",
                "sealing_key": f"party-{rank}.key",
                "noise_key": noise.name,
                "members": public,
                "limits": limits,
            }
            if authority is not None:
                authority.issue(self.folder, f"party-{rank}.tls", name=f"party-{rank}", hosts=[_HOST])
                settings["tls"] = {
                    "certificate": f"party-{rank}.tls.pem",
                    "key": f"party-{rank}.tls.key",
                    "client_ca": "ca.pem",
                }
            (self.folder / f"party-{rank}.toml").write_text(tomli_w.dumps(settings))

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
        if not self._tls:
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
            [sys.executable, "-P", "-m", "privkd.secure.commands", str(folder / f"party-{rank}.toml")],
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
    """Starts each service again that dies: it takes up its spool and journal."""

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
