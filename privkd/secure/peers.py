"""The parties' own links: each end proves its key before anything is said, and all that is said is encrypted.

**Handshake.** Of two parties the one of higher rank connects and says its rank and a fresh X25519 key; the
other answers with a fresh key of its own. Both agree on four secrets, of either's long-lived key (those of
``members`` in ``party.toml``) with either's fresh one, as in Noise's pattern KK. From them, the session's
name, both ranks and both fresh keys, HKDF-SHA256 derives a key for either direction and one for common
streams. The first sealed frame each way proves that the sender has its long-lived key. Who cannot make one
is dropped and nobody misses it, so a stranger at the port neither joins as a rank nor ends a session.

**Frames.** AES-256-GCM, a length in clear and a counter for a nonce: nothing can be read, altered,
replayed, left out or put in another order without the link's end. What remains to see is who talks to whom,
when, and how much; and whoever is on the way, or floods the port, can still keep a session from coming
about.

Rank 0 listens where ``[peers]`` says. The others listen on the address by which they reached it, and learn
of each other from it. As the fresh keys are part of every secret, a session's name that comes again gives
other streams.
"""

import contextlib
import json
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privkd.errors import ChannelError
from privkd.privacy.noise import KEY_BYTES

_HELLO = struct.Struct("<4sB32s")
_MAGIC = b"PKDP"
_ANSWER_BYTES = 32
_LENGTH = struct.Struct("<I")
_MAX_PROOF = 64
_MAX_FRAME = (1 << 31) - 1
_HANDSHAKE_SECONDS = 10.0
_PAUSE = 0.2
_MAX_PENDING = 64
_INLINE = 1 << 14
"""Bytes that a link takes in any case without its other end reading: less than the kernel's buffers."""


class PeerError(ChannelError):
    """A link to a peer ended, or could not be made."""


@dataclass(frozen=True)
class PartyKeys:
    """One party's own key, all members' public ones by rank, and the session that they serve."""

    rank: int
    own: X25519PrivateKey
    members: tuple[bytes, ...]
    session: str

    def agree(self, other: int, fresh: X25519PrivateKey, theirs: bytes) -> tuple[bytes, bytes, bytes]:
        """The keys of the link with ``other``: from the lower rank to the higher, back, and of common
        streams.

        ``theirs`` is the other's fresh public key. Raises ``ValueError`` if it is no key.
        """
        public, member = (X25519PublicKey.from_public_bytes(key) for key in (theirs, self.members[other]))
        ours = fresh.public_key().public_bytes_raw()
        mixed = [self.own.exchange(public), fresh.exchange(member)]
        low, high, first, second = self.rank, other, ours, theirs
        if other < self.rank:
            low, high, first, second, mixed = high, low, second, first, mixed[::-1]
        secret = b"".join([self.own.exchange(member), *mixed, fresh.exchange(public)])
        info = f"privkd peers|{self.session}|{low}|{high}|".encode() + first + second
        keys = HKDF(hashes.SHA256(), 3 * KEY_BYTES, None, info).derive(secret)
        return keys[:KEY_BYTES], keys[KEY_BYTES : 2 * KEY_BYTES], keys[2 * KEY_BYTES :]


class PeerLink:
    """A sealed link to one peer. One thread may send while another receives."""

    def __init__(self, endpoint: socket.socket, keys: PartyKeys, other: int, fresh: X25519PrivateKey,
                 theirs: bytes) -> None:  # fmt: skip
        """Over a connected socket on which the fresh keys were exchanged."""
        sealing, opening, self._common = keys.agree(other, fresh, theirs)
        if other < keys.rank:
            sealing, opening = opening, sealing
        self.socket = endpoint
        self._other = other
        self._sealing, self._opening = AESGCM(sealing), AESGCM(opening)
        self._sent = self._received = 0

    def stream_key(self, label: str) -> bytes:
        """The 32 bytes that both ends know for one use, named by ``label``, and nobody else."""
        info = b"privkd peers, stream|" + label.encode()
        return HKDF(hashes.SHA256(), KEY_BYTES, None, info).derive(self._common)

    def send(self, message: bytes) -> None:
        """Send a message whole. Raises `PeerError` where the peer has gone."""
        sealed = self._sealing.encrypt(self._sent.to_bytes(12, "big"), message, None)
        self._sent += 1
        try:
            self.socket.sendall(_LENGTH.pack(len(sealed)) + sealed)
        except OSError as error:
            raise PeerError(f"the link to party {self._other} ended") from error

    def receive(self, most: int = _MAX_FRAME) -> bytes:
        """The next message, of at most so many bytes sealed.

        Raises:
            PeerError: the peer has gone, or what came is not its.
        """
        try:
            (size,) = _LENGTH.unpack(_read(self.socket, _LENGTH.size))
            if size > most:
                raise PeerError(f"party {self._other} sent {size} bytes at once")
            opened = self._opening.decrypt(self._received.to_bytes(12, "big"), _read(self.socket, size), None)
        except OSError as error:
            raise PeerError(f"the link to party {self._other} ended") from error
        except InvalidTag as error:
            raise PeerError(f"what came from party {self._other} is not its") from error
        self._received += 1
        return opened


class Peers:
    """A party's links to all other parties of its session."""

    def __init__(self, rank: int, links: Mapping[int, PeerLink]) -> None:
        """``links`` by rank."""
        self.rank = rank
        self._links = dict(links)

    @classmethod
    def meet(cls, keys: PartyKeys, *, host: str, port: int, listener: socket.socket | None = None) -> Self:
        """Find all others; returns when all are there, however long that takes.

        Args:
            keys: this party's.
            host: rank 0's address.
            port: rank 0's.
            listener: at rank 0, the socket that is bound to them.
        """
        members = len(keys.members)
        if keys.rank == 0:
            assert listener is not None
            door = _Door(listener, keys)
            found = door.await_peers(members - 1)
            places = {rank: [_address(link), int(proof)] for rank, (link, proof) in found.items()}
            for link, _ in found.values():
                link.send(json.dumps(places).encode())
            return cls(0, {rank: link for rank, (link, _) in found.items()})
        first, door = _reach_first(keys, host, port)
        told: dict[str, tuple[str, int]] = json.loads(first.receive())
        links = {0: first}
        for rank in range(1, keys.rank):
            host, port = told[str(rank)]
            links[rank] = _reach(keys, rank, host, port)
        awaited = door.await_peers(members - 1 - keys.rank)
        return cls(keys.rank, links | {rank: link for rank, (link, _) in awaited.items()})

    def link(self, other: int) -> PeerLink:
        """That to the party of rank ``other``."""
        return self._links[other]

    def exchange(self, message: bytes, parties: int) -> list[bytes]:
        """Every message of the ``parties`` lowest ranks, which all call this at once, by rank."""
        others = [rank for rank in range(parties) if rank != self.rank]
        sending = None
        if len(message) > _INLINE:
            # Two that both wait until the other reads would wait for ever.
            sending = threading.Thread(target=self._send_all, args=(others, message), daemon=True)
            sending.start()
        else:
            self._send_all(others, message)
        found = {rank: self._links[rank].receive() for rank in others} | {self.rank: message}
        if sending is not None:
            sending.join()
        return [found[rank] for rank in range(parties)]

    def _send_all(self, others: list[int], message: bytes) -> None:
        for rank in others:
            # A peer that has gone shows where its own message is missed.
            with contextlib.suppress(PeerError):
                self._links[rank].send(message)

    def close(self) -> None:
        """End all links. Idempotent."""
        for link in self._links.values():
            link.socket.close()


class _Door:
    """Lets in the peers of higher rank.

    Each caller has a thread and a few seconds. Of too many the one that came first gives way, so silence
    shuts nobody out.
    """

    def __init__(self, listener: socket.socket, keys: PartyKeys) -> None:
        self._listener = listener
        self._keys = keys
        self._pending: deque[socket.socket] = deque()
        self._found: dict[int, tuple[PeerLink, bytes]] = {}
        self._changed = threading.Condition()
        self.port = int(listener.getsockname()[1])
        threading.Thread(target=self._listen, daemon=True).start()

    def await_peers(self, count: int) -> dict[int, tuple[PeerLink, bytes]]:
        """Each peer's link and what came with its proof, once ``count`` are in; the door is closed then."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._found) >= count)
            found = dict(self._found)
        # A thread that waits in accept holds the socket; only this wakes it.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        return found

    def _listen(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except ConnectionAbortedError:
                continue
            except OSError:
                return
            with self._changed:
                self._pending.append(caller)
                if len(self._pending) > _MAX_PENDING:
                    _end(self._pending.popleft())
            threading.Thread(target=self._admit, args=(caller,), daemon=True).start()

    def _admit(self, caller: socket.socket) -> None:
        try:
            rank, link, proof = self._proved(caller)
        except (OSError, PeerError, ValueError, struct.error):
            _end(caller)
        else:
            with self._changed:
                if rank in self._found:
                    # It did not hear that it was let in, and called again.
                    _end(self._found[rank][0].socket)
                self._found[rank] = link, proof
                self._changed.notify_all()
        finally:
            with self._changed, contextlib.suppress(ValueError):
                self._pending.remove(caller)

    def _proved(self, caller: socket.socket) -> tuple[int, PeerLink, bytes]:
        caller.settimeout(_HANDSHAKE_SECONDS)
        magic, rank, theirs = _HELLO.unpack(_read(caller, _HELLO.size))
        if magic != _MAGIC or not self._keys.rank < rank < len(self._keys.members):
            raise ValueError("no peer of a higher rank")
        fresh = X25519PrivateKey.generate()
        link = PeerLink(caller, self._keys, rank, fresh, theirs)
        caller.sendall(fresh.public_key().public_bytes_raw())
        proof = link.receive(_MAX_PROOF)
        link.send(b"")
        _settle(caller)
        return rank, link, proof


def _reach_first(keys: PartyKeys, host: str, port: int) -> tuple[PeerLink, _Door]:
    """The link to rank 0, which is told where this party lets in others, and that door."""
    while True:
        try:
            caller = socket.create_connection((host, port), _HANDSHAKE_SECONDS)
            listener = socket.create_server((caller.getsockname()[0], 0), family=caller.family, backlog=64)
        except OSError:
            time.sleep(_PAUSE)
            continue
        door = _Door(listener, keys)
        with contextlib.suppress(OSError, PeerError, ValueError):
            return _introduce(caller, keys, 0, str(door.port).encode()), door
        _end(caller)
        _end(listener)
        time.sleep(_PAUSE)


def _reach(keys: PartyKeys, other: int, host: str, port: int) -> PeerLink:
    """The link to a party of lower rank; tries until there is one."""
    while True:
        with contextlib.suppress(OSError, PeerError, ValueError):
            caller = socket.create_connection((host, port), _HANDSHAKE_SECONDS)
            return _introduce(caller, keys, other, b"")
        time.sleep(_PAUSE)


def _introduce(caller: socket.socket, keys: PartyKeys, other: int, proof: bytes) -> PeerLink:
    fresh = X25519PrivateKey.generate()
    caller.sendall(_HELLO.pack(_MAGIC, keys.rank, fresh.public_key().public_bytes_raw()))
    link = PeerLink(caller, keys, other, fresh, _read(caller, _ANSWER_BYTES))
    link.send(proof)
    link.receive(_MAX_PROOF)
    _settle(caller)
    return link


def _settle(endpoint: socket.socket) -> None:
    """From here on a peer may be silent for as long as the supervisors of both workers let it."""
    endpoint.settimeout(None)
    endpoint.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _address(link: PeerLink) -> str:
    return str(link.socket.getpeername()[0])


def _read(endpoint: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = endpoint.recv_into(view)
        if count == 0:
            raise ConnectionResetError("closed")
        view = view[count:]
    return bytes(data)


def _end(endpoint: socket.socket) -> None:
    with contextlib.suppress(OSError):
        endpoint.shutdown(socket.SHUT_RDWR)
    endpoint.close()
