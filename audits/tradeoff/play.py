"""A curve from its request: the cells that are not done yet are played, then all are read back."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from audits.files import write_whole
from audits.tradeoff.curve import CELLS, RECORD, Curve, is_curve, read_curve, read_request, record_tree
from audits.tradeoff.request import Cell, CurveRequest, request_tree
from audits.tradeoff.runner import Limits, Watcher, run_cells
from audits.tradeoff.worker import is_done
from privkd.errors import RunError


def play_curve(path: Path, request: CurveRequest, limits: Limits, watcher: Watcher) -> Curve:
    """Train and audit what ``path`` does not hold yet.

    Raises:
        RunError: the folder cannot be written, another process plays a curve there, or the data or the code
            of a cell that is done changed since.
    """
    with _held(path):
        _check_kept(path, request)
        before = dict(read_request(path)[1]) if is_curve(path) else {}
        _write(path, request, before)
        left = unfinished(path, request)
        failed = run_cells(left, lambda cell: _folder(path, cell), limits, watcher)
        _write(path, request, {cell.folder: reason for cell, reason in failed.items()})
        return read_curve(path)


def unfinished(path: Path, request: CurveRequest) -> list[Cell]:
    """The cells of ``request`` that ``path`` does not hold done."""
    return [cell for cell in request.cells if not is_done(cell, _folder(path, cell))]


def _check_kept(path: Path, request: CurveRequest) -> None:
    """Cells on other data or code than those that are done could not be set beside them."""
    done = [cell for cell in request.cells if is_done(cell, _folder(path, cell))]
    if done:
        from privkd.runs.fingerprints import check_files
        from privkd.runs.folder import RunFolder

        for cell in done:
            with RunFolder.resume(_folder(path, cell)) as folder:
                check_files(folder)


def _folder(path: Path, cell: Cell) -> Path:
    return path / CELLS / cell.folder


def _write(path: Path, request: CurveRequest, reasons: dict[str, str]) -> None:
    write_whole(path / RECORD, json.dumps(record_tree(request_tree(request), reasons), indent=2).encode())


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """One process at a time plays a curve."""
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
