"""Cells side by side, within the cores and the memory; one that fails does not stop the rest."""

import math
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Protocol

from audits.tradeoff.request import Cell
from audits.tradeoff.worker import Failed, Finished, Message, Stage, play_cell

_FIRST_GUESS = 1.5 * 2**30
"""Bytes a cell is taken to need, until one has said how many it needed."""
_MARGIN = 1.2
_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.5


class Watcher(Protocol):
    """Told how the cells get on."""

    def started(self, cell: Cell) -> None:
        """The cell's process is on its way."""
        ...

    def stage(self, cell: Cell, name: str) -> None:
        """What the cell is at."""
        ...

    def ended(self, cell: Cell, reason: str | None) -> None:
        """The cell is done, or failed for this reason."""
        ...


@dataclass(frozen=True)
class Limits:
    """How many cells may run at once, and the bytes that they may hold together."""

    jobs: int
    memory: float


@dataclass
class _Running:
    cell: Cell
    process: SpawnProcess
    pipe: Connection
    last: Message | None = field(default=None)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> float:
    """Bytes that may be taken without swapping; infinite where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return math.inf


def run_cells(
    cells: Sequence[Cell],
    folder_of: Callable[[Cell], Path],
    limits: Limits,
    watcher: Watcher,
    body: Callable[[Cell, Path, Connection], None] = play_cell,
) -> dict[Cell, str]:
    """Play ``cells``, each by ``body`` in a process of its own.

    Returns:
        Why each cell failed that did. The rest are done.
    """
    waiting, running = deque(cells), list[_Running]()
    failed: dict[Cell, str] = {}
    peaks: list[float] = []
    try:
        while waiting or running:
            while waiting and _fits(len(running), max(peaks, default=_FIRST_GUESS), limits):
                cell = waiting.popleft()
                running.append(_start(cell, folder_of(cell), body))
                watcher.started(cell)
            for one in _ended(running, watcher):
                running.remove(one)
                reason = _reason(one)
                if reason is not None:
                    failed[one.cell] = reason
                if isinstance(one.last, Finished):
                    peaks.append(one.last.peak)
                watcher.ended(one.cell, reason)
    finally:
        _stop(running)
    return failed


def _fits(running: int, need: float, limits: Limits) -> bool:
    """One cell always runs: whether it fits shows by trying."""
    if running == 0:
        return True
    return running < limits.jobs and (running + 1) * need * _MARGIN <= limits.memory


def _start(cell: Cell, path: Path, body: Callable[[Cell, Path, Connection], None]) -> _Running:
    # A fresh interpreter: a forked one would share the parent's threads and locks.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=body, args=(cell, path, theirs), name=cell.label)
    process.start()
    theirs.close()
    return _Running(cell, process, ours)


def _ended(running: Sequence[_Running], watcher: Watcher) -> Iterator[_Running]:
    """Those that ended, after passing on what all have said."""
    waited = [thing for one in running for thing in (one.process.sentinel, one.pipe) if not _closed(thing)]
    wait(waited, timeout=_POLL_SECONDS)
    for one in tuple(running):
        _listen(one, watcher)
        if not one.process.is_alive():
            _listen(one, watcher)
            one.pipe.close()
            if not isinstance(one.last, Finished) and one.process.pid is not None:
                _kill_group(one.process.pid)
            yield one


def _closed(thing: object) -> bool:
    return isinstance(thing, Connection) and thing.closed


def _listen(one: _Running, watcher: Watcher) -> None:
    try:
        while not one.pipe.closed and one.pipe.poll():
            message = one.pipe.recv()
            if isinstance(message, Stage):
                watcher.stage(one.cell, message.name)
            else:
                one.last = message
    except (EOFError, OSError):
        # The other end is gone; the process' exit says the rest.
        one.process.join(_GRACE_SECONDS)


def _reason(one: _Running) -> str | None:
    """Why an ended cell failed, ``None`` if it did not."""
    if isinstance(one.last, Failed):
        return one.last.reason
    if isinstance(one.last, Finished):
        return None
    code = one.process.exitcode or 0
    if code == -signal.SIGKILL:
        return "killed by SIGKILL, most likely for lack of memory: lower --jobs or --memory, then --resume"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; try again with --resume"
    return f"ended with exit code {code} and without a word; try again with --resume"


def _stop(running: Sequence[_Running]) -> None:
    """End what still runs, with all that it started. A run that is cut short is resumed later."""
    for one in running:
        _signal(one, signal.SIGINT)
    deadline = time.monotonic() + _GRACE_SECONDS
    for one in running:
        one.process.join(max(0.0, deadline - time.monotonic()))
    for one in running:
        _signal(one, signal.SIGKILL)
        one.process.kill()
        one.process.join()


def _kill_group(pid: int) -> None:
    """What a worker that died may have left running; it led a group of its own."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _signal(one: _Running, number: signal.Signals) -> None:
    """To the whole group of a worker, once it has one of its own."""
    pid = one.process.pid
    with suppress(ProcessLookupError, PermissionError):
        if pid is not None and os.getpgid(pid) == pid:
            os.killpg(pid, number)
