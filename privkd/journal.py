"""Durable records: an append-only JSONL file that survives a kill and shows tampering.

Each line is ``{"chain":"<sha256>","record":<json>}``, where the digest covers the previous digest and the
record's bytes. A line that was changed, removed, added or swapped breaks the chain at that line. Whole
lines missing at the end cannot show in the file itself: keep a ``Head`` elsewhere and check it.

A line without its newline is the mark of a crash in the middle of a write. That write never returned, so
nothing was built on it: it is ignored when reading and cut off by the next append.
"""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from privkd.errors import RunError
from privkd.records import Count

Record: TypeAlias = Mapping[str, Any]
"""What JSON can hold, without NaN or infinities."""

_GENESIS = hashlib.sha256(b"privkd journal, format 1").hexdigest()
_OPENING, _MIDDLE, _END = b'{"chain":"', b'","record":', b"}\n"
_DIGEST_SIZE = 64


@dataclass(frozen=True)
class Head:
    """How far a journal has come: the number of its lines, and the digest of the last."""

    lines: Count
    digest: str


class Journal:
    """The records of one file, and the one way to add to them.

    A journal without a file is empty, and its first ``append`` creates the file. One process writes at a
    time: an append that finds the file changed by somebody else is refused.
    """

    def __init__(self, path: Path) -> None:
        """Read and verify what ``path`` holds.

        Raises:
            RunError: the file cannot be read, or it is damaged (the line is named).
        """
        self.path = Path(path)
        self._records: list[dict[str, Any]] = []
        self._digests: list[str] = []
        self._size = 0  # of the whole lines
        self._size_with_tail = 0
        self._renamed = False  # and the new name is not durable yet
        with suppress(FileNotFoundError):
            self._read()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(tuple(self._records))

    def __len__(self) -> int:
        return len(self._records)

    @property
    def head(self) -> Head:
        """What to keep elsewhere, to find out later that whole lines were cut off the end."""
        return Head(len(self._digests), self._digests[-1] if self._digests else _GENESIS)

    def has(self, head: Head) -> bool:
        """Whether this journal continues (or equals) the one that had ``head``."""
        if head.lines == 0:
            return head.digest == _GENESIS
        return 0 < head.lines <= len(self._digests) and self._digests[head.lines - 1] == head.digest

    @property
    def digests(self) -> tuple[str, ...]:
        """The digest of each head that this journal ever had, the empty one's first."""
        return (_GENESIS, *self._digests)

    def append(self, record: Record) -> None:
        """Add one record; it is on the disk when this returns.

        Raises:
            RunError: the disk is full or not writable, or another process wrote to the file. The journal is
                as it was before.
        """
        line, digest = _line(record, self.head.digest)
        try:
            if self._digests:
                self._extend(line)
            else:
                self._create(line)
        except OSError as error:
            raise RunError(
                f"cannot write to {self.path}: {error.strerror or error}; nothing was recorded"
            ) from error
        self._records.append(json.loads(json.dumps(dict(record))))
        self._digests.append(digest)
        self._size += len(line)
        self._size_with_tail = self._size

    def replace(self, records: Sequence[Record]) -> None:
        """Have the file hold these ``records`` alone, one at least, under a chain of their own: all or
        nothing.

        Raises:
            RunError: the disk is full or not writable, or another process wrote to the file. The journal is
                as it was before.
        """
        lines, digests = [], [_GENESIS]
        for record in records:
            line, digest = _line(record, digests[-1])
            lines.append(line)
            digests.append(digest)
        content = b"".join(lines)
        try:
            self._swap(content)
        except OSError as error:
            raise RunError(
                f"cannot write to {self.path}: {error.strerror or error}; nothing was replaced"
            ) from error
        self._records = json.loads(json.dumps([dict(record) for record in records]))
        self._digests = digests[1:]
        self._size = self._size_with_tail = len(content)

    def _swap(self, content: bytes) -> None:
        """Put a file with ``content`` in the place of ours, at once."""
        with self._beside(content) as whole:
            if self.path.stat().st_size != self._size_with_tail:
                raise RunError(f"{self.path} was changed by another process: use one process per run")
            whole.replace(self.path)
        # Either file will do after a crash, until something is added to this one.
        self._renamed = True

    def _read(self) -> None:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise RunError(f"cannot read {self.path}: {error.strerror or error}") from error
        digest = _GENESIS
        *lines, tail = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                record, digest = _parse(line + b"\n", digest)
            except (ValueError, RecursionError) as error:
                raise RunError(
                    f"{self.path}, line {number}: damaged or altered ({error}); restore the file from a copy"
                ) from error
            self._records.append(record)
            self._digests.append(digest)
        if not lines:
            # A journal is born with its first line, so no crash leaves a file without one.
            raise RunError(f"{self.path}, line 1: damaged: no complete line; restore the file from a copy")
        self._size, self._size_with_tail = len(content) - len(tail), len(content)

    def _create(self, line: bytes) -> None:
        """Bring the file into being with its first line, at once: it is never seen empty."""
        with self._beside(line) as whole:
            os.link(whole, self.path)
        sync_folder(self.path.parent)

    @contextmanager
    def _beside(self, content: bytes) -> Iterator[Path]:
        """A file with ``content``, whole and durable beside ours; its name goes afterwards."""
        descriptor, name = tempfile.mkstemp(".part", f".{self.path.name}.", self.path.parent)
        try:
            try:
                _write_all(descriptor, content)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

    def _extend(self, line: bytes) -> None:
        if self._renamed:
            sync_folder(self.path.parent)
            self._renamed = False
        descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_size != self._size_with_tail:
                raise RunError(f"{self.path} was changed by another process: use one process per run")
            try:
                os.ftruncate(descriptor, self._size)
                os.lseek(descriptor, self._size, os.SEEK_SET)
                _write_all(descriptor, line)
                os.fsync(descriptor)
            except OSError:
                # What a failed write left behind was never promised to anybody.
                os.ftruncate(descriptor, self._size)
                self._size_with_tail = self._size
                raise
        finally:
            os.close(descriptor)


def _line(record: Record, previous: str) -> tuple[bytes, str]:
    body = json.dumps(dict(record), allow_nan=False, sort_keys=True, separators=(",", ":")).encode()
    digest = _digest(previous, body)
    return _OPENING + digest.encode() + _MIDDLE + body + _END, digest


def _parse(line: bytes, previous: str) -> tuple[dict[str, Any], str]:
    """The record in ``line``, and its digest. Raises ValueError with the damage in words."""
    start = len(_OPENING) + _DIGEST_SIZE
    body_start = start + len(_MIDDLE)
    if not line.startswith(_OPENING) or line[start:body_start] != _MIDDLE or not line.endswith(_END):
        raise ValueError("not a line of a journal")
    body = line[body_start : -len(_END)]
    digest = _digest(previous, body)
    if line[len(_OPENING) : start] != digest.encode():
        raise ValueError("its digest does not continue the chain")
    record = json.loads(body)
    if not isinstance(record, dict):
        raise ValueError("not a record")
    return record, digest


def _digest(previous: str, body: bytes) -> str:
    return hashlib.sha256(previous.encode() + body).hexdigest()


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a new file's is only once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
