"""A party's service as a device or the cloud reaches it: HTTP with deadlines, and two kinds of failure."""

import contextlib
import http.client
import json
import random
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from privkd.errors import ChannelError, ConfigError

_CHUNK = 1 << 18
_MAX_ANSWER = 1 << 30
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
T = TypeVar("T")


class RefusedError(ChannelError):
    """The party said no, for good."""


class UnreachableError(ChannelError):
    """The party did not answer in time, or asks to try again."""


@dataclass(frozen=True)
class ClientTls:
    """What a client trusts, and its own certificate where services ask for one."""

    ca: Path
    certificate: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """The TLS settings.

        Raises:
            ConfigError: a file is missing or is no certificate.
        """
        try:
            context = ssl.create_default_context(cafile=self.ca)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"certificates {self.ca}, {self.certificate}, {self.key}: {error}") from None
        return context


class Endpoint:
    """One party's address. Keeps a connection open between requests; for one thread at a time."""

    def __init__(self, url: str, tls: ClientTls | None = None) -> None:
        """Check the address; nothing is sent.

        Raises:
            ConfigError: not an address of http on the loopback interface, or of https.
        """
        parts = urlsplit(url)
        try:
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:
            self._host, self._port = "", None
        if parts.scheme not in ("http", "https") or not self._host or self._port is None:
            raise ConfigError(f"aggregator {url!r}: expected an address such as https://host:8440")
        if parts.scheme == "http" and self._host not in ("127.0.0.1", "::1", "localhost"):
            raise ConfigError(f"aggregator {url!r}: without https only the loopback interface is allowed")
        self.url = url
        self._context: ssl.SSLContext | None = None
        if parts.scheme == "https":
            self._context = ssl.create_default_context() if tls is None else tls.context()
        self._connection: http.client.HTTPConnection | None = None

    def request(self, method: str, path: str, body: bytes = b"", *, deadline: float) -> bytes:
        """The body of the answer.

        Args:
            method: HTTP's.
            path: see ``privkd.secure.service``.
            body: of the request.
            deadline: on ``time.monotonic``.

        Raises:
            RefusedError: refused for good.
            UnreachableError: no answer by the deadline, or to be tried again.
        """
        try:
            status, answer = self._exchange(method, path, body, deadline)
        except ssl.SSLCertVerificationError as error:
            self.close()
            raise RefusedError(
                f"{self.url}: its certificate is not trusted ({error.verify_message})"
            ) from error
        except TimeoutError as error:
            self.close()
            raise UnreachableError(f"{self.url} did not answer in time") from error
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise UnreachableError(f"{self.url}: {error or type(error).__name__}") from error
        if status == 200:
            return answer
        raise (RefusedError if 400 <= status < 500 else UnreachableError)(
            f"{self.url}: {_reason(status, answer)}"
        )

    def _exchange(self, method: str, path: str, body: bytes, deadline: float) -> tuple[int, bytes]:
        kept = self._connection is not None
        try:
            return self._try(method, path, body, deadline)
        except (ConnectionError, http.client.BadStatusLine, ssl.SSLEOFError, ssl.SSLZeroReturnError):
            # A party closes idle connections; requests may be repeated, so once more on a fresh one.
            if not kept:
                raise
            self.close()
            return self._try(method, path, body, deadline)

    def _try(self, method: str, path: str, body: bytes, deadline: float) -> tuple[int, bytes]:
        connection = self._connected(deadline)
        connection.request(method, path, body, {"Content-Type": "application/octet-stream"})
        self._bound(connection, deadline)
        response = connection.getresponse()
        parts, size = [], 0
        while chunk := response.read(_CHUNK):
            parts.append(chunk)
            size += len(chunk)
            if size > _MAX_ANSWER:
                raise http.client.HTTPException("an answer without end")
            self._bound(connection, deadline)
        if response.will_close:
            self.close()
        return response.status, b"".join(parts)

    def _connected(self, deadline: float) -> http.client.HTTPConnection:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        if self._connection is None:
            port, timeout = self._port, remaining
            self._connection = (
                http.client.HTTPConnection(self._host, port, timeout=timeout)
                if self._context is None
                else http.client.HTTPSConnection(self._host, port, timeout=timeout, context=self._context)
            )
            self._connection.connect()
        self._bound(self._connection, deadline)
        return self._connection

    @staticmethod
    def _bound(connection: http.client.HTTPConnection, deadline: float) -> None:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        if connection.sock is not None:
            connection.sock.settimeout(remaining)

    def close(self) -> None:
        """Close the connection; the next request opens another. Idempotent."""
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.close()
            self._connection = None


def persistently(attempt: Callable[[], T], deadline: float) -> T:
    """``attempt()``, tried again with growing pauses for as long as the party is unreachable.

    Raises:
        ChannelError: refused, or still unreachable at ``deadline``.
    """
    pause = _FIRST_PAUSE
    while True:
        try:
            return attempt()
        except UnreachableError:
            if time.monotonic() + pause >= deadline:
                raise
        # Spread out, so that a thousand devices do not knock at once. No secret is drawn here.
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, _LONGEST_PAUSE)


def _reason(status: int, answer: bytes) -> str:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return str(json.loads(answer)["error"])
    return f"HTTP status {status}"
