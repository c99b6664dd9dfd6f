"""``privkd device run``: the device's process. It listens at its socket until it is told to end."""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any, NoReturn

from privkd.deployment.device import DeviceProgram
from privkd.deployment.device_state import DeviceState
from privkd.deployment.owner import load_owner
from privkd.deployment.sockets import Door
from privkd.errors import RunError

_LONGEST = 3600.0


def run(config: Path) -> NoReturn:
    """Answer questions at the socket of ``config`` until SIGTERM or SIGINT, and end the process.

    What is durable stays so however it ends, and a question that was cut short is answered when it comes
    again.

    Raises:
        ConfigError: ``config`` is wrong.
        RunError: the state is in use, damaged or lacks its key, or the socket cannot be made.
    """
    import torch

    owner = load_owner(config)
    os.nice(owner.nice)
    torch.set_num_threads(owner.threads)
    ended = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with DeviceState.open(owner) as state:
        program = DeviceProgram(owner, state, write_log)
        try:
            door = Door(owner.socket, program.handle)
        except OSError as error:
            raise RunError(f"{owner.socket}: {error.strerror or error}") from None
        write_log({"time": time.time(), "event": "listening", "socket": str(owner.socket)})
        _notify("READY=1")
        pause = _watchdog_seconds()
        while not ended.wait(pause):
            _notify("WATCHDOG=1")
        _notify("STOPPING=1")
        door.close()
    write_log({"time": time.time(), "event": "ended"})
    # What is durable is kept. A thread that is in the middle of a training would abort the interpreter's end.
    os._exit(0)


def write_log(what: Mapping[str, Any]) -> None:
    """One line of JSON on stderr; ``time`` is Unix time."""
    moment = datetime.fromtimestamp(what["time"], UTC).isoformat(timespec="milliseconds")
    sys.stderr.write(json.dumps({**what, "time": moment}) + "\n")
    sys.stderr.flush()


def _watchdog_seconds() -> float:
    """How often a service manager wants a sign of life: half of what it waits for one."""
    return min(_LONGEST, int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6 or _LONGEST)


def _notify(text: str) -> None:
    """Tell the service manager, if there is one (sd_notify)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        link.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        link.send(text.encode())
