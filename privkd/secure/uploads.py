"""The sealed uploads that a party holds of a round, on disk or in memory; nothing is ever accepted twice.

On disk, what was accepted outlives the process. One folder a round: ``terms.json``, the log ``uploads``, and
``share`` once it is made. The log takes one envelope after the other, each behind its length and checksum, so
that many become durable with one sync; what a crash cut short at its end was never acknowledged. The other
files are written aside, synced and then renamed, so each is there whole or not at all.
"""

import os
import struct
import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from privkd.errors import ChannelError
from privkd.privacy.events import PartyId
from privkd.secure.terms import RoundTerms
from privkd.secure.upload import Header, header_of

_UPLOADS, _TERMS, _SHARE = "uploads", "terms.json", "share"
_RECORD = struct.Struct("<II")
_ANOTHER = "{}: another upload in this round was accepted before; a retry sends the same bytes"


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
        """Take a device's upload, whose header was checked. It is kept once ``sync`` returns.

        The same bytes again change nothing.

        Raises:
            ChannelError: other bytes of this device are held already, or cannot be compared.
        """
        ...

    def sync(self) -> None:
        """Make all that was added last. Raises `ChannelError` where it cannot be written."""
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
        self._waiting: dict[PartyId, bytes] = {}
        self._end = 0
        try:
            for start, envelope in _records(self._log, checked=True):
                header = header_of(envelope)
                self._places[header.device] = _Place(header, start, len(envelope))
                self._end = start + len(envelope)
            if self._log.stat().st_size > self._end:
                os.truncate(self._log, self._end)
        except OSError as error:
            raise ChannelError(f"spool {folder}: {error.strerror or error}") from error
        self._durable = self._end

    @classmethod
    def create(cls, folder: Path, terms: RoundTerms) -> "UploadsOnDisk":
        """A new round's."""
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / _TERMS, terms.pack())
        (folder / _UPLOADS).touch()
        sync_folder(folder)
        sync_folder(folder.parent)
        return cls(folder, terms)

    @property
    def held(self) -> dict[PartyId, Header]:
        """The header of each device's upload; all of them are durable."""
        self.sync()
        with self._lock:
            return {device: place.header for device, place in self._places.items()}

    def holds(self, device: PartyId) -> bool:
        """Whether there is an upload of this device."""
        with self._lock:
            return device in self._places

    def add(self, header: Header, envelope: bytes) -> None:
        """Take a device's upload; see `RoundUploads.add`."""
        with self._lock:
            place = self._places.get(header.device)
            if place is None:
                start = self._end + _RECORD.size
                self._places[header.device] = _Place(header, start, len(envelope))
                self._waiting[header.device] = envelope
                self._end = start + len(envelope)
                return
            kept = self._waiting.get(header.device)
        if (self._read(place) if kept is None else kept) != envelope:
            raise ChannelError(_ANOTHER.format(header.device))

    def _read(self, place: _Place) -> bytes:
        try:
            with self._log.open("rb", buffering=0) as log:
                return os.pread(log.fileno(), place.size, place.start)
        except OSError as error:
            raise ChannelError(f"spool {self.folder}: {error.strerror or error}") from error

    def sync(self) -> None:
        """Make all that was added durable. Threads that wait while one syncs share the next.

        Raises:
            ChannelError: the disk is full or not writable. What was added still waits for a sync.
        """
        with self._lock:
            wanted = self._end
        with self._syncing:
            if self._durable >= wanted:
                return
            with self._lock:
                batch, reached = dict(self._waiting), self._end
            records = b"".join(part for envelope in batch.values() for part in (_head(envelope), envelope))
            try:
                with self._log.open("r+b", buffering=0) as log:
                    # Whatever a failed write left behind the end is overwritten.
                    if os.pwrite(log.fileno(), records, self._durable) != len(records):
                        raise OSError("the disk took a part of the uploads only")
                    os.fdatasync(log.fileno())
            except OSError as error:
                raise ChannelError(f"spool {self.folder}: {error.strerror or error}") from error
            with self._lock:
                for device in batch:
                    del self._waiting[device]
                self._durable = reached

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


def stored_rounds(directory: Path) -> Iterator[UploadsOnDisk]:
    """What a party's ``directory`` of rounds holds."""
    for folder in sorted(directory.iterdir()):
        if (folder / _TERMS).is_file():
            yield UploadsOnDisk(folder, RoundTerms.unpack((folder / _TERMS).read_bytes()))


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
        ChannelError: the disk is full or not writable.
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
        raise ChannelError(f"spool {path.parent}: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
