"""Bytes in and out over a Unix socket: the border between an engine's courier and a device.

It imports nothing of the product's, so that a courier runs with as little as can be. A message is its length,
8 bytes with the least first, and its bytes.
"""

import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread

_LENGTH = struct.Struct("<Q")
_CHUNK = 1 << 20
MAX_BYTES = 1 << 30


def call(path: Path | str, message: bytes, seconds: float) -> bytes:
    """What whoever listens at ``path`` answers to ``message``.

    Raises:
        OSError: nobody listens, ``seconds`` pass without a piece of the answer, or it is cut off.
    """
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(seconds)
        link.connect(str(path))
        send(link, message)
        return receive(link)


def send(link: socket.socket, message: bytes) -> None:
    """Send one message. Raises `OSError`."""
    link.sendall(_LENGTH.pack(len(message)))
    link.sendall(message)


def receive(link: socket.socket) -> bytes:
    """The next message.

    Raises:
        OSError: the link ends before it does, or it is longer than `MAX_BYTES`.
    """
    (size,) = _LENGTH.unpack(_exactly(link, _LENGTH.size))
    if size > MAX_BYTES:
        raise ConnectionError(f"a message of {size} bytes")
    return _exactly(link, size)


def _exactly(link: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = link.recv(min(_CHUNK, size - len(parts)))
        if not part:
            raise ConnectionError("the link was closed in the middle of a message")
        parts += part
    return bytes(parts)


class Door:
    """Listens at a Unix socket, and answers each message by ``handle``, in a thread for each link.

    The socket is its owner's and its group's, so that a courier of that group may knock.
    """

    def __init__(self, path: Path, handle: Callable[[bytes], bytes], *, seconds: float = 600.0) -> None:
        """Listen; a socket that a kill left is replaced. Raises `OSError`."""
        self.path = path
        self._handle = handle
        self._seconds = seconds
        with suppress(FileNotFoundError):
            path.unlink()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        path.chmod(0o660)
        self._listener.listen(16)
        self._thread = Thread(target=self._serve, daemon=True, name=f"door {path.name}")
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            Thread(target=self._answer, args=(link,), daemon=True).start()

    def _answer(self, link: socket.socket) -> None:
        with link, suppress(OSError):
            link.settimeout(self._seconds)
            send(link, self._handle(receive(link)))

    def close(self) -> None:
        """Listen no more. Idempotent."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with suppress(FileNotFoundError, PermissionError):
            self.path.unlink()
