"""A cloud's server of NVFlare and couriers of devices that echo: real processes, mutual TLS, this machine."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from privkd.deployment.flare import FlareCarrier, courier_command
from privkd.deployment.kits import approve, make_authority, package, request
from privkd.deployment.sockets import Door

OTHER_USER = 23_456
"""Of the couriers, where the tests may choose and that user may run this interpreter."""
DEVICES = ("clinic-1", "clinic-2", "clinic-3")
SECONDS = 150.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


def other_user() -> int | None:
    """`OTHER_USER`, if couriers can run as it."""
    if os.getuid() != 0:
        return None
    try:
        subprocess.run(
            [sys.executable, "-c", ""], check=True, user=OTHER_USER, group=OTHER_USER, extra_groups=[]
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return OTHER_USER


class FlareRig:
    """One cloud and its devices, enrolled; every device answers what ``handlers`` says, at first an echo."""

    def __init__(self) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="flare"))
        self.base.chmod(0o755)
        self.user = other_user()
        self.port = free_port()
        self.authority = make_authority(self.base / "cloud", "localhost", self.port)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.handlers: dict[str, Callable[[bytes], bytes]] = {}
        self.doors: list[Door] = []
        for name in DEVICES:
            self._enrol(name)
        self.carrier = FlareCarrier(self.socket("cloud"), self.base / "cloud" / "operator")

    def _enrol(self, name: str) -> None:
        home = self.base / name
        home.mkdir()
        signed = approve(request(name, home / "request"), self.authority.folder)
        package(signed, home / "request", self.authority.fingerprint, home / "kit")
        self.handlers[name] = lambda message: name.encode() + message
        self.doors.append(Door(self.socket(name), lambda message: self.handlers[name](message)))
        if self.user is not None:
            os.chown(self.socket(name), 0, self.user)
            self.give(home / "kit")

    def give(self, kit: Path) -> None:
        """A kit belongs to the couriers' user."""
        for path in (kit, *kit.rglob("*")) if self.user is not None else ():
            os.chown(path, self.user, self.user)

    def socket(self, name: str) -> Path:
        return self.base / f"{name}.sock"

    def kit(self, name: str) -> Path:
        return self.base / name / ("server" if name == "cloud" else "kit")

    def log(self, name: str) -> str:
        path = self.base / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start_all(self, *as_they_are: str) -> None:
        """Start every courier."""
        for name in ("cloud", *DEVICES):
            self.start(name, as_it_is=name in as_they_are)

    def start(self, name: str, kit: Path | None = None, *, as_it_is: bool = False) -> None:
        """Start a courier: a device's as another user, if this one may choose.

        As an operator does; or a kit ``as_it_is``, with whatever policy stands in it.
        """
        kit = kit or self.kit(name)
        command = [sys.executable, "-m", "privkd", "courier", "run", str(kit), "--socket"]
        command, own = [*command, str(self.socket(name))], {}
        if as_it_is:
            command, own = courier_command(kit, self.socket(name))
        user = None if name == "cloud" else self.user
        with (self.base / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                env=os.environ | own,
                stdout=log,
                stderr=log,
                user=user,
                group=user,
                extra_groups=None if user is None else [],
            )

    def kill(self, name: str) -> None:
        """SIGKILL a courier and the processes of its jobs."""
        process = self.processes.pop(name)
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        for one in family:
            try:
                one.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        process.wait()

    def restart(self, name: str) -> None:
        self.kill(name)
        self.start(name)

    def ask(self, seconds: float = SECONDS, content: bytes = b"?") -> Mapping[str, bytes]:
        """What the devices answer to one question each."""
        return self.carrier.ask(dict.fromkeys(DEVICES, content), seconds)

    def until(self, name: str, words: str, seconds: float = 240.0) -> bool:
        """Whether a courier's log says ``words`` within ``seconds``."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if words in self.log(name):
                return True
            time.sleep(0.5)
        return False

    def close(self) -> None:
        for name in tuple(self.processes):
            self.kill(name)
        for door in self.doors:
            door.close()
        self.carrier.close()
        shutil.rmtree(self.base, ignore_errors=True)
