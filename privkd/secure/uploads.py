"""The sealed uploads that a party holds of a round, on disk or in memory; nothing is ever accepted twice.

On disk, what was accepted outlives the process. One folder a round: ``terms.json``, the log ``uploads``, and
``share`` once it is made. The log takes one envelope after the other, each behind its length and checksum, so
that many become durable with one sync; what a crash cut short at its end was never acknowledged. The other
files are written aside, synced and then renamed, so each is there whole or not at all.
"""

import contextlib
import errno
import os
import shutil
import struct
import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from privkd.errors import ChannelError
from privkd.journal import sync_folder
from privkd.privacy.events import PartyId
from privkd.secure.terms import RoundTerms
from privkd.secure.upload import Header, header_of

_UPLOADS, _TERMS, _SHARE = "uploads", "terms.json", "share"
_RECORD = struct.Struct("<II")
_ANOTHER = "{}: another upload in this round was accepted before; a retry sends the same bytes"


class StorageError(ChannelError):
    """Something cannot be written here now, such as on a full disk. It may be tried again; no path is
    told."""

    @classmethod
    def of(cls, error: OSError) -> "StorageError":
        """What a party says outside of ``error``; whoever raises it keeps that as the cause."""
        return cls(f"this party cannot write to its disk ({error.strerror or 'cut off'}); try again later")


@dataclass(frozen=True)
class _Place:
    """Where an envelope lies in the log."""

    header: Header
    start: int
    size: int


class RoundUploads(Protocol):
    """What one party holds of one round. Safe to call from many threads."""

    @property
    def terms(self) -> RoundTerms:
        """The round's."""
        ...

    @property
    def folder(self) -> Path | None:
        """Where the party's worker reads the uploads; none where it must be sent them."""
        ...

    @property
    def held(self) -> dict[PartyId, Header]:
        """The header of each device's upload; all of them are kept."""
        ...

    def holds(self, device: PartyId) -> bool:
        """Whether there is an upload of this device."""
        ...

    def add(self, header: Header, envelope: bytes) -> None:
        """Take a device's upload, whose header was checked.

        It is kept if it is still held once ``sync`` returns. The same bytes again change nothing.

        Raises:
            ChannelError: other bytes of this device are held already, or cannot be compared.
        """
        ...

    def sync(self) -> None:
        """Make all that was added last. Raises `StorageError` where it cannot be written."""
        ...

    def unread(self, devices: Sequence[PartyId]) -> Sequence[bytes]:
        """The envelopes of ``devices`` that the party's worker must be sent: none where it reads them."""
        ...

    @property
    def share(self) -> bytes | None:
        """This party's part of the result, once it was made."""
        ...

    def keep_share(self, share: bytes) -> None:
        """Keep the part for as long as the round."""
        ...

    def drop_uploads(self) -> None:
        """Forget the sealed uploads of a finished round."""
        ...

    def drop(self) -> None:
        """Forget all of the round."""
        ...


class UploadsInMemory:
    """`RoundUploads` that end with this object."""

    folder = None

    def __init__(self, terms: RoundTerms) -> None:
        """None yet."""
        self.terms = terms
        self.share: bytes | None = None
        self._kept: dict[PartyId, tuple[Header, bytes]] = {}

    @property
    def held(self) -> dict[PartyId, Header]:
        """The header of each device's upload."""
        return {device: header for device, (header, _) in self._kept.items()}

    def holds(self, device: PartyId) -> bool:
        """Whether there is an upload of this device."""
        return device in self._kept

    def add(self, header: Header, envelope: bytes) -> None:
        """Take a device's upload; see `RoundUploads.add`."""
        if self._kept.setdefault(header.device, (header, envelope))[1] != envelope:
            raise ChannelError(_ANOTHER.format(header.device))

    def sync(self) -> None:
        """Nothing outlasts this object."""

    def unread(self, devices: Sequence[PartyId]) -> Sequence[bytes]:
        """The envelopes of ``devices``."""
        return [self._kept[device][1] for device in devices]

    def keep_share(self, share: bytes) -> None:
        """Keep this party's part of the result."""
        self.share = share

    def drop_uploads(self) -> None:
        """Forget all uploads."""
        self._kept.clear()

    def drop(self) -> None:
        """Forget all uploads; the rest goes with this object."""
        self._kept.clear()


class UploadsOnDisk:
    """`RoundUploads` in a folder."""

    def __init__(self, folder: Path, terms: RoundTerms) -> None:
        """Take up what the folder holds.

        Raises:
            ChannelError: the log cannot be read or mended.
        """
        self.folder = folder
        self.terms = terms
        self._log = folder / _UPLOADS
        self._lock = threading.Lock()
        self._syncing = threading.Lock()
        self._places: dict[PartyId, _Place] = {}
        self._waiting: dict[PartyId, tuple[Header, bytes]] = {}
        self._durable = 0
        try:
            for start, envelope in _records(self._log, checked=True):
                header = header_of(envelope)
                self._places[header.device] = _Place(header, start, len(envelope))
                self._durable = start + len(envelope)
            if self._log.stat().st_size > self._durable:
                os.truncate(self._log, self._durable)
        except OSError as error:
            raise ChannelError(f"spool {folder}: {error.strerror or error}") from error

    @classmethod
    def create(cls, folder: Path, terms: RoundTerms) -> "UploadsOnDisk":
        """A new round's.

        Raises:
            StorageError: the disk is full or not writable.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Last: a folder without terms is none of a round.
            (folder / _UPLOADS).touch()
            write_durably(folder / _TERMS, terms.pack())
            sync_folder(folder.parent)
        except OSError as error:
            raise StorageError.of(error) from error
        return cls(folder, terms)

    @property
    def held(self) -> dict[PartyId, Header]:
        """The header of each device's upload; all of them are durable."""
        with contextlib.suppress(StorageError):
            self.sync()
        with self._lock:
            return {device: place.header for device, place in self._places.items()}

    def holds(self, device: PartyId) -> bool:
        """Whether there is an upload of this device."""
        with self._lock:
            return device in self._places or device in self._waiting

    def add(self, header: Header, envelope: bytes) -> None:
        """Take a device's upload; see `RoundUploads.add`."""
        with self._lock:
            place, waiting = self._places.get(header.device), self._waiting.get(header.device)
            if place is None and waiting is None:
                self._waiting[header.device] = header, envelope
                return
        kept = waiting[1] if waiting is not None else self._read(place) if place is not None else b""
        if kept != envelope:
            raise ChannelError(_ANOTHER.format(header.device))

    def _read(self, place: _Place) -> bytes:
        try:
            with self._log.open("rb", buffering=0) as log:
                return os.pread(log.fileno(), place.size, place.start)
        except OSError as error:
            raise StorageError.of(error) from error

    def sync(self) -> None:
        """Make all that was added durable. Threads that wait while one syncs share the next.

        Raises:
            StorageError: the disk is full or not writable. What it did not take is held no more, so that it
                keeps nobody from closing the round over the rest.
        """
        with self._syncing:
            with self._lock:
                batch = dict(self._waiting)
            if not batch:
                return
            try:
                places = self._written(batch)
            except OSError as error:
                raise StorageError.of(error) from error
            else:
                with self._lock:
                    self._places |= places
            finally:
                with self._lock:
                    for device in batch:
                        del self._waiting[device]

    def _written(self, batch: dict[PartyId, tuple[Header, bytes]]) -> dict[PartyId, _Place]:
        """Where in the log the envelopes of a ``batch`` lie, which are durable when this returns."""
        places, parts, end = {}, [], self._durable
        for device, (header, envelope) in batch.items():
            places[device] = _Place(header, end + _RECORD.size, len(envelope))
            parts += [_head(envelope), envelope]
            end += _RECORD.size + len(envelope)
        records = b"".join(parts)
        with self._log.open("r+b", buffering=0) as log:
            # Whatever a failed write left behind the end is overwritten.
            if os.pwrite(log.fileno(), records, self._durable) != len(records):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fdatasync(log.fileno())
        self._durable = end
        return places

    def unread(self, devices: Sequence[PartyId]) -> Sequence[bytes]:
        """None: the worker reads them."""
        return ()

    @property
    def share(self) -> bytes | None:
        """This party's part of the result, once it was made."""
        try:
            return (self.folder / _SHARE).read_bytes()
        except FileNotFoundError:
            return None

    def keep_share(self, share: bytes) -> None:
        """Keep the part for as long as the round's folder."""
        write_durably(self.folder / _SHARE, share)

    def drop_uploads(self) -> None:
        """Delete the sealed uploads of a finished round."""
        with self._lock:
            os.truncate(self._log, 0)

    def drop(self) -> None:
        """Delete the round's folder: its terms first, as a folder without them is none of a round."""
        (self.folder / _TERMS).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def stored_rounds(directory: Path) -> Iterator[UploadsOnDisk]:
    """What a party's ``directory`` of rounds holds. Folders that were not yet, or are no more a round's
    go."""
    for folder in sorted(directory.iterdir()):
        if (folder / _TERMS).is_file():
            yield UploadsOnDisk(folder, RoundTerms.unpack((folder / _TERMS).read_bytes()))
        else:
            shutil.rmtree(folder, ignore_errors=True)


def stored_uploads(folder: Path) -> Iterator[tuple[PartyId, bytes]]:
    """Each device's sealed upload in a round's ``folder``, as they came.

    Raises:
        ChannelError: the log cannot be read.
    """
    try:
        for _, envelope in _records(folder / _UPLOADS, checked=False):
            yield header_of(envelope).device, envelope
    except OSError as error:
        raise ChannelError(f"spool {folder}: {error.strerror or error}") from error


def _records(log: Path, *, checked: bool) -> Iterator[tuple[int, bytes]]:
    """Where each envelope starts, and the envelope; up to the first cut off or, if ``checked``, damaged."""
    with log.open("rb") as file:
        position = 0
        while len(head := file.read(_RECORD.size)) == _RECORD.size:
            size, checksum = _RECORD.unpack(head)
            envelope = file.read(size)
            if len(envelope) != size or (checked and _checksum(envelope) != checksum):
                return
            yield position + _RECORD.size, envelope
            position += _RECORD.size + size


def _head(envelope: bytes) -> bytes:
    return _RECORD.pack(len(envelope), _checksum(envelope))


def _checksum(envelope: bytes) -> int:
    # Of the length too: a run of zeros, as a crash may leave behind, is then no record.
    return zlib.crc32(envelope, zlib.crc32(len(envelope).to_bytes(4, "little")))


def write_durably(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; it is on the disk when this returns.

    Raises:
        StorageError: the disk is full or not writable.
    """
    try:
        descriptor, name = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError.of(error) from error
