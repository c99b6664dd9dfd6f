"""One cell, in a process of its own: trained as ``privkd train`` does, then audited.

A cell that crashes, or that the system kills for its memory, so takes nothing else with it.
"""

import json
import multiprocessing
import os
import resource
import signal
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from audits.tradeoff.request import Cell
from privkd.errors import PrivkdError, RunError, one_line
from privkd.plugins import load_plugins

if TYPE_CHECKING:
    from privkd.runs.folder import RunFolder

DONE = "cell.json"
"""Written last: what determined the cell's finished audits."""


@dataclass(frozen=True)
class Stage:
    """What a cell is at."""

    name: str


@dataclass(frozen=True)
class Finished:
    """The cell is done; ``peak`` is the most memory that its process and its children held, in bytes."""

    peak: int


@dataclass(frozen=True)
class Failed:
    """The cell could not be finished, and why, in one line."""

    reason: str


Message: TypeAlias = Stage | Finished | Failed


class PipedProgress:
    """Tells the parent each stage."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def stage(self, name: str) -> None:
        """See `privkd.progress.Progress.stage`."""
        self._pipe.send(Stage(name))

    def advance(self, done: int, total: int) -> None:
        """See `privkd.progress.Progress.advance`."""

    def figures(self, **figures: float) -> None:
        """See `privkd.progress.Progress.figures`."""


def play_cell(cell: Cell, path: Path, pipe: Connection) -> None:
    """The body of a worker process: one message a stage, and a last one."""
    os.setsid()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _train(cell, path, PipedProgress(pipe))
        _audit(cell, path, PipedProgress(pipe))
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
        pipe.send(Finished(_peak()))


def is_done(cell: Cell, path: Path) -> bool:
    """Whether the cell in ``path`` was finished, audits and all, as it would be again."""
    try:
        return bool(json.loads((path / DONE).read_bytes())["key"] == cell.key)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _train(cell: Cell, path: Path, progress: PipedProgress) -> None:
    import torch

    from privkd.data.sources import located
    from privkd.prepared import prepare
    from privkd.result import train
    from privkd.runs.folder import RunFolder

    torch.set_num_threads(1)
    config = cell.config()
    # They were named on the command line, and so are trusted.
    load_plugins(config.plugins)
    started = (path / "journal.jsonl").exists() and (path / "config.toml").exists()
    if not started:
        # As for any run: what is wrong with the settings or the data shows before there is a folder.
        prepare(config)
    with RunFolder.resume(path) if started else RunFolder.create(path, config) as folder:
        if folder.config != located(config):
            raise RunError(f"{path} holds a run of other settings: remove it")
        if not _is_finished(folder.journal):
            train(config, folder, progress, resumed=started)


def _is_finished(journal: Any) -> bool:
    return any(record.get("step") == "finished" for record in journal)


def _audit(cell: Cell, path: Path, progress: PipedProgress) -> None:
    from privkd.runs.folder import RunFolder

    with RunFolder.resume(path) as folder:
        for audit in cell.request.audits:
            _AUDITS[audit](cell, folder, progress)
        folder.write_json(DONE, {"key": cell.key})


def _membership(cell: Cell, folder: "RunFolder", progress: PipedProgress) -> None:
    from audits.membership_inference import audit_membership
    from audits.report import report_tree, write_curves
    from audits.requests import MembershipRequest

    # Each seed has coins of its own, or an interval over seeds would leave them out.
    request = MembershipRequest(shadows=cell.request.shadows, targets=cell.request.targets, seed=cell.seed)
    report = audit_membership(folder, request, progress)
    write_curves(folder, report.scored)
    folder.write_json("audit/membership.json", report_tree(report))


def _reconstruction(cell: Cell, folder: "RunFolder", progress: PipedProgress) -> None:
    from audits.reconstructions.audit import audit_reconstruction
    from audits.reconstructions.report import reconstruction_tree
    from audits.reconstructions.request import MATCHING, ReconstructionRequest

    # The one attack that every view and every kind of record has.
    request = ReconstructionRequest(attack=MATCHING, seed=cell.seed)
    report = audit_reconstruction(folder, request, progress)
    folder.write_json("audit/reconstruction.json", reconstruction_tree(report))


_AUDITS = {"membership": _membership, "reconstruction": _reconstruction}


def _peak() -> int:
    """Peak resident memory of this process and of its largest child, in bytes."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return 1024 * (own + children)


def _end_with_parent() -> None:
    """Leave no orphan behind, however the parent ends: this process and all it started."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(os.getpgid(0), signal.SIGKILL)
