"""Bodies of worker processes for tests: light to import, as each process does so."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

from audits.sweeps.grid import Trial
from audits.sweeps.runner import Failed, Finished, Stage


def by_seed(trial: Trial, path: Path, pipe: Connection) -> None:
    """Ends as the trial's seed says: done, failed, killed, gone."""
    match trial.seed:
        case 0:
            pipe.send(Stage("at it"))
            pipe.send(Finished(1000))
        case 1:
            pipe.send(Failed("no such data"))
        case 2:
            os.kill(os.getpid(), signal.SIGKILL)
        case _:
            sys.exit(7)


def hungry(trial: Trial, path: Path, pipe: Connection) -> None:
    """Says that it needed a gigabyte."""
    pipe.send(Finished(2**30))


def lasting(trial: Trial, path: Path, pipe: Connection) -> None:
    """Starts a process of its own, writes down both, and stays."""
    os.setsid()
    child = subprocess.Popen(["sleep", "60"])
    path.mkdir(parents=True, exist_ok=True)
    (path / "pids").write_text(f"{os.getpid()} {child.pid}")
    pipe.send(Stage("started"))
    time.sleep(60)
