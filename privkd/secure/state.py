"""A party's directory: of one process at a time, with room to close what is open, and no more than is needed.

lock            held by the process whose it is
reserve         room on the disk for closing what is open, given up when the disk is full
journal.jsonl   what the party decided
sessions.jsonl  names of sessions that were used
rounds/         terms, sealed uploads and the party's share of each round
"""

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privkd.errors import PrivkdError, RunError
from privkd.journal import Journal
from privkd.secure.party import PartyConfig
from privkd.secure.rounds import Rounds
from privkd.secure.uploads import StorageError, UploadsOnDisk, stored_rounds
from privkd.secure.worker import WorkerSupervisor

T = TypeVar("T")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Within, a party's ``directory`` is this process's alone, which two could only spoil.

    Raises:
        RunError: another process has it, or it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise RunError(f"{directory}: {error.strerror or error}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise RunError(
            f"{directory} is in use by another process: stop that one, or name another directory"
        ) from None
    finally:
        os.close(descriptor)


class Reserve:
    """Room on the disk that nothing but closing may use. Safe to call from many threads.

    Where the file system copies on write, or compresses, what is set aside may be less than it looks.
    """

    def __init__(self, path: Path) -> None:
        """Take up what a process before set aside."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._lock = threading.Lock()
        self._has = os.fstat(self._file).st_size
        self._wanted = self._has

    def hold(self, size: int) -> None:
        """Set aside ``size`` bytes in all.

        Raises:
            StorageError: the disk has no room for them; what was set aside stays.
        """
        with self._lock:
            if size > self._has:
                self._grow(size)
            elif size < self._has:
                os.ftruncate(self._file, size)
                self._has = size
            self._wanted = size

    def restore(self) -> None:
        """Set aside again what was given up. Raises `StorageError` while the disk has no room for it."""
        if self._has >= self._wanted:
            return
        with self._lock:
            if self._has < self._wanted:
                self._grow(self._wanted)

    def _grow(self, size: int) -> None:
        try:
            os.posix_fallocate(self._file, 0, size)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._has)
            raise StorageError.of(error) from error
        self._has = size

    def insist(self, write: Callable[[], T]) -> T:
        """``write()``; where the disk is full, once more in the room that was set aside, which is given
        up."""
        try:
            return write()
        except PrivkdError as error:
            if not (isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL):
                raise
        with self._lock:
            os.ftruncate(self._file, 0)
            self._has = 0
            return write()

    def __del__(self) -> None:
        """The file stays."""
        with contextlib.suppress(OSError, AttributeError):
            os.close(self._file)


def open_rounds(party: PartyConfig, sealing_key: X25519PrivateKey, noise_key: bytes) -> Rounds:
    """The rounds in a party's directory.

    Raises:
        ChannelError: a round's files cannot be read.
        RunError: a journal is damaged, or the directory cannot be made.
    """
    folder = party.directory / "rounds"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reserve = Reserve(party.directory / "reserve")
    except OSError as error:
        raise RunError(f"{party.directory}: {error.strerror or error}") from None
    supervisor = WorkerSupervisor(
        party,
        sealing_key,
        noise_key,
        Journal(party.directory / "sessions.jsonl"),
        name=f"{party.name}'s worker",
        insist=reserve.insist,
    )
    return Rounds(
        party,
        supervisor,
        journal=Journal(party.directory / "journal.jsonl"),
        create=lambda terms: UploadsOnDisk.create(folder / terms.folder, terms),
        stored=stored_rounds(folder),
        sealing_key=sealing_key,
        reserve=reserve,
    )
