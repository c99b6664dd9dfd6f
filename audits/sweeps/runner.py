"""Plays runs that are kept: each trained, measured, resumed where it was cut short, never played twice.

Trials run side by side, each in a process of its own, within the cores and the memory: one that fails, or
that the system kills for its memory, takes nothing else with it. Light to import, as each process does so.
"""

import fcntl
import math
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from audits.evidence import write_whole
from audits.sweeps.grid import DONE, RECORD, TRIALS, Done, Grid, Record, Trial, is_done, is_sweep, read_record
from privkd.config import Config
from privkd.errors import ConfigError, PrivkdError, RunError, one_line
from privkd.plugins import load_plugins
from privkd.secure.installed import check_channel

if TYPE_CHECKING:
    from rich.progress import TaskID

    from privkd.progress import Progress
    from privkd.runs.folder import RunFolder

_FIRST_GUESS = 1.5 * 2**30
"""Bytes a trial is taken to need, until one has said how many it needed."""
_MARGIN = 1.2
_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Stage:
    """What a trial is at; it starts with ``starting``."""

    name: str


@dataclass(frozen=True)
class Finished:
    """The trial is done; ``peak`` is the most memory that its process and its children held, in bytes."""

    peak: int


@dataclass(frozen=True)
class Failed:
    """The trial could not be finished, and why, in one line."""

    reason: str


Message: TypeAlias = Stage | Finished | Failed
Watcher: TypeAlias = Callable[[Trial, Message], None]
"""Told how the trials get on: the last of each is that it finished or failed."""
Body: TypeAlias = Callable[[Trial, Path, Connection], None]
"""Plays a trial in a folder, and sends the same messages."""


@dataclass(frozen=True)
class Limits:
    """How many trials may run at once, and the bytes that they may hold together."""

    jobs: int
    memory: float

    @classmethod
    def given(cls, jobs: int | None, gibibytes: float | None) -> "Limits":
        """What is asked for; where that is ``None``, the cores and the free memory that there are.

        Raises:
            ConfigError: a number that is not above 0.
        """
        for name, value in (("jobs", jobs), ("memory", gibibytes)):
            if value is not None and not value > 0:
                raise ConfigError(f"--{name} {value:g}: expected a number above 0")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(jobs or cores, _free_memory() if gibibytes is None else gibibytes * 2**30)


def _free_memory() -> float:
    """Bytes that may be taken without swapping; infinite where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return math.inf


@contextmanager
def trained(path: Path, config: Config, progress: "Progress", stage: str = "") -> Iterator["RunFolder"]:
    """The finished run of ``config`` in ``path``, held while the context lasts.

    It is started, resumed, or taken as it was kept; ``progress`` is told ``stage`` unless that is so. What is
    wrong with the settings or the data shows before there is a folder.

    Raises:
        RunError: the folder holds a run of other settings, or its data or code changed since.
        PrivkdError: otherwise as training does.
    """
    from audits.evidence import is_run
    from privkd.data.sources import located
    from privkd.prepared import prepare
    from privkd.run import train_in
    from privkd.runs.fingerprints import check_files
    from privkd.runs.folder import RunFolder

    # They were named on the command line, and so are trusted.
    load_plugins(config.plugins)
    kept = is_run(path)
    prepared = None
    if not kept:
        check_channel(config.channel)
        prepared = prepare(config)
    with RunFolder.resume(path) if kept else RunFolder.create(path, config) as folder:
        check_files(folder)
        if folder.config != located(config):
            raise RunError(f"{path} holds a run of other settings, or on data elsewhere: name another --out")
        if not _is_finished(folder):
            if stage:
                progress.stage(f"{stage}, in {path}")
            train_in(config, folder, progress, resumed=kept, prepared=prepared)
        yield folder


def _is_finished(folder: "RunFolder") -> bool:
    """Whether the run wrote down its result, and it is still what was written."""
    noted = [record["result"] for record in folder.journal if record.get("step") == "finished"]
    return (folder.path / "result.json").is_file() and noted[-1:] == [folder.digest("result.json")]


def play(path: Path, grid: Grid, limits: Limits, watcher: Watcher) -> None:
    """Train and audit what of ``grid`` ``path`` does not hold yet.

    Raises:
        RunError: the folder cannot be written, another process plays a sweep there, or the data or the code
            of a trial that is done changed since.
    """
    with _held(path):
        _check_kept(path, grid)
        _write(path, Record(request=grid, failed=read_record(path).failed if is_sweep(path) else {}))
        failed = run_trials(unfinished(path, grid), lambda trial: folder_of(path, trial), limits, watcher)
        _write(path, Record(request=grid, failed={trial.folder: why for trial, why in failed.items()}))


def folder_of(path: Path, trial: Trial) -> Path:
    """Where the sweep in ``path`` keeps the run of ``trial``."""
    return path / TRIALS / trial.folder


def unfinished(path: Path, grid: Grid) -> list[Trial]:
    """The trials of ``grid`` that ``path`` does not hold done."""
    return [trial for trial in grid.trials if not is_done(trial, folder_of(path, trial))]


def _check_kept(path: Path, grid: Grid) -> None:
    """Trials on other data or code than those that are done could not be set beside them."""
    done = [here for trial in grid.trials if is_done(trial, here := folder_of(path, trial))]
    if done:
        from privkd.runs.fingerprints import check_files
        from privkd.runs.folder import RunFolder

        for here in done:
            with RunFolder.resume(here) as folder:
                check_files(folder)


def _write(path: Path, record: Record) -> None:
    write_whole(path / RECORD, record.model_dump_json(indent=2).encode())


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """One process at a time plays a sweep."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}; name another --out") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise RunError(f"{path} is in use by another process: wait for it to end") from None
    finally:
        os.close(descriptor)


@dataclass
class _Running:
    trial: Trial
    process: SpawnProcess
    pipe: Connection
    last: Finished | Failed | None = None


def play_trial(trial: Trial, path: Path, pipe: Connection) -> None:
    """The body of a trial's process: trained as ``privkd train`` does, then audited.

    Sends one message a stage, and a last one.
    """
    os.setsid()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        import torch

        torch.set_num_threads(1)
        with trained(path, trial.config(), _Piped(pipe)) as folder:
            for audit in trial.grid.audits:
                _AUDITS[audit](trial, folder, _Piped(pipe))
            folder.write_json(DONE, Done(key=trial.key).model_dump())
    except PrivkdError as error:
        pipe.send(Failed(" ".join(str(error).split())))
    except MemoryError:
        pipe.send(Failed("out of memory: lower --jobs, or the size of the run"))
    except KeyboardInterrupt:
        # The parent stops; it asks nobody why.
        return
    except Exception as error:
        pipe.send(Failed(one_line(error)))
    else:
        # Kilobytes, of this process and of its largest child.
        peaks = [
            resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
        pipe.send(Finished(1024 * sum(peaks)))


class _Piped:
    """Tells the parent each stage."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def stage(self, name: str) -> None:
        self._pipe.send(Stage(name))

    def advance(self, done: int, total: int) -> None: ...

    def figures(self, **figures: float) -> None: ...


def _membership(trial: Trial, folder: "RunFolder", progress: "Progress") -> None:
    from audits.membership_audit import audit_membership, keep_membership
    from audits.requests import MembershipRequest

    # Each seed has coins of its own, or an interval over seeds would leave them out.
    request = MembershipRequest(shadows=trial.grid.shadows, targets=trial.grid.targets, seed=trial.seed)
    keep_membership(folder, audit_membership(folder, request, progress))


def _reconstruction(trial: Trial, folder: "RunFolder", progress: "Progress") -> None:
    from audits.reconstructions.audit import audit_reconstruction
    from audits.requests import MATCHING, ReconstructionRequest

    # The one attack that every view and every kind of record has.
    request = ReconstructionRequest(attack=MATCHING, seed=trial.seed)
    folder.write_json("audit/reconstruction.json", audit_reconstruction(folder, request, progress).tree())


_AUDITS = {"membership": _membership, "reconstruction": _reconstruction}


def _end_with_parent() -> None:
    """Leave no orphan behind, however the parent ends: this process and all it started."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(os.getpgid(0), signal.SIGKILL)


def run_trials(
    trials: Sequence[Trial],
    folder_of: Callable[[Trial], Path],
    limits: Limits,
    watcher: Watcher,
    body: Body = play_trial,
) -> dict[Trial, str]:
    """Play ``trials``, each by ``body`` in a process of its own.

    Returns:
        Why each trial failed that did. The rest are done.
    """
    waiting, running = deque(trials), list[_Running]()
    failed: dict[Trial, str] = {}
    peaks: list[float] = []
    try:
        while waiting or running:
            while waiting and _fits(len(running), max(peaks, default=_FIRST_GUESS), limits):
                trial = waiting.popleft()
                running.append(_start(trial, folder_of(trial), body))
                watcher(trial, Stage("starting"))
            for one in _ended(running, watcher):
                running.remove(one)
                last = one.last or Failed(_vanished(one.process.exitcode or 0))
                if isinstance(last, Failed):
                    failed[one.trial] = last.reason
                else:
                    peaks.append(last.peak)
                watcher(one.trial, last)
    finally:
        _stop(running)
    return failed


def _fits(running: int, need: float, limits: Limits) -> bool:
    """One trial always runs: whether it fits shows by trying."""
    return running == 0 or (running < limits.jobs and (running + 1) * need * _MARGIN <= limits.memory)


def _start(trial: Trial, path: Path, body: Body) -> _Running:
    # A fresh interpreter: a forked one would share the parent's threads and locks.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=body, args=(trial, path, theirs), name=trial.label)
    process.start()
    theirs.close()
    return _Running(trial, process, ours)


def _ended(running: Sequence[_Running], watcher: Watcher) -> Iterator[_Running]:
    """Those that ended, after passing on what all have said."""
    pipes: list[Any] = [one.pipe for one in running if not one.pipe.closed]
    wait([*pipes, *(one.process.sentinel for one in running)], timeout=_POLL_SECONDS)
    for one in tuple(running):
        _listen(one, watcher)
        if not one.process.is_alive():
            _listen(one, watcher)
            one.pipe.close()
            if not isinstance(one.last, Finished):
                # What it may have left running: it led a group of its own.
                _signal(one, signal.SIGKILL)
            yield one


def _listen(one: _Running, watcher: Watcher) -> None:
    try:
        while not one.pipe.closed and one.pipe.poll():
            message = one.pipe.recv()
            if isinstance(message, Stage):
                watcher(one.trial, message)
            else:
                one.last = message
    except (EOFError, OSError):
        # The other end is gone; the process' exit says the rest.
        one.process.join(_GRACE_SECONDS)


def _vanished(code: int) -> str:
    """Why a process ended without a last word."""
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


def _signal(one: _Running, number: signal.Signals) -> None:
    """To the whole group of a trial, once it has one of its own; it may have outlived the trial's process."""
    with suppress(ProcessLookupError, PermissionError):
        if one.process.pid is not None:
            os.killpg(one.process.pid, number)


@contextmanager
def on_stderr(path: Path, total: int, *, quiet: bool) -> Iterator[Watcher]:
    """Tells a person how ``total`` trials get on.

    A bar for all and a line for each that runs; where stderr is no terminal, a line for each that ended.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.text import Text

    console = Console(stderr=True, quiet=quiet)
    console.print(f"curve folder: {path}", highlight=False, markup=False, soft_wrap=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    tasks: dict[Trial, TaskID] = {}
    with Progress(
        *columns, console=console, transient=True, disable=quiet or not console.is_terminal
    ) as bars:
        every = bars.add_task("cells", total=total)

        def tell(trial: Trial, message: Message) -> None:
            if trial not in tasks:
                tasks[trial] = bars.add_task("", total=None)
            if isinstance(message, Stage):
                bars.update(tasks[trial], description=f"  {trial.label}: {message.name}")
                return
            bars.remove_task(tasks[trial])
            bars.advance(every)
            if not console.is_terminal:
                ended = f"{bars.tasks[0].completed:.0f} of {total}"
                outcome = f"failed: {message.reason}" if isinstance(message, Failed) else "done"
                console.print(Text(f"{ended}: {trial.label}: {outcome}"), soft_wrap=True)
            elif isinstance(message, Failed):
                console.print(Text(f"failed: {trial.label}: {message.reason}", style="red"), soft_wrap=True)

        yield tell
