"""A party's service as a device or the cloud reaches it: HTTP with deadlines, and two kinds of failure."""

import contextlib
import http.client
import json
import random
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from privkd.errors import ChannelError, ConfigError, RefusalError
from privkd.secure.certificates import load_identity
from privkd.secure.group import UnreachableError
from privkd.secure.terms import RoundTerms
from privkd.secure.upload import Upload, packed

_CHUNK = 1 << 18
_MAX_ANSWER = 1 << 30
_RELAY_BYTES = 1 << 22
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_ATTEMPT_SECONDS = 15.0
T = TypeVar("T")


@dataclass(frozen=True)
class ClientTls:
    """What a client trusts, and its own certificate where services ask for one."""

    ca: Path
    certificate: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """The TLS settings.

        Raises:
            ConfigError: a file is missing or is no certificate, the certificate has expired, or others than
                its owner may read the key.
        """
        if self.certificate is not None:
            load_identity(self.certificate, self.key)
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
            RefusalError: refused for good.
            UnreachableError: no answer by the deadline, or to be tried again.
            ChannelError: its certificate is not trusted.
        """
        try:
            status, answer = self._exchange(method, path, body, deadline)
        except ssl.SSLCertVerificationError as error:
            self.close()
            raise ChannelError(
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
        reason = f"{self.url}: {_reason(status, answer)}"
        raise RefusalError(status, reason) if 400 <= status < 500 else UnreachableError(reason)

    def insist(self, method: str, path: str, body: bytes = b"", *, deadline: float) -> bytes:
        """`request`, tried again with growing pauses for as long as the party is unreachable."""

        def attempt() -> bytes:
            by = min(deadline, time.monotonic() + _ATTEMPT_SECONDS)
            return self.request(method, path, body, deadline=by)

        return persistently(attempt, deadline)

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


def send(upload: Upload, endpoints: Sequence[Endpoint], *, deadline: float) -> None:
    """Send each aggregator its envelope, again and again where it cannot be reached.

    Args:
        upload: from ``prepare``.
        endpoints: the aggregators, by rank.
        deadline: on ``time.monotonic``.

    Raises:
        ChannelError: an aggregator refused it, or cannot be reached in time.
    """
    path = f"/v1/rounds/{upload.round:016x}/uploads"
    for endpoint, envelope in zip(endpoints, upload.envelopes, strict=True):
        endpoint.insist("POST", path, envelope, deadline=deadline)


class HttpLink(Endpoint):
    """The link to a party that runs as a service; see ``privkd.secure.service``."""

    def __init__(self, url: str, tls: ClientTls | None = None) -> None:
        """Check the address; nothing is sent. Raises as `Endpoint`."""
        super().__init__(url, tls)
        # Apart, as sessions are renewed while another request still waits for its answer.
        self._sessions = Endpoint(url, tls)

    @property
    def name(self) -> str:
        """Its address."""
        return self.url

    def about(self, deadline: float) -> Mapping[str, Any]:
        """What the party says of itself."""
        answer = self.insist("GET", "/v1/party", deadline=deadline)
        try:
            facts = json.loads(answer)
            return {name: facts[name] for name in ("rank", "parties", "key", "members")}
        except (ValueError, TypeError, KeyError):
            raise ChannelError(f"{self.url} is not a party's service") from None

    def join(self, session: str, port: int | None, deadline: float) -> int:
        """Have it start a worker; the port of rank 0's rendezvous."""
        fields = {"session": session} | ({} if port is None else {"port": port})
        answer = self._sessions.request("POST", "/v1/session", json.dumps(fields).encode(), deadline=deadline)
        return int(json.loads(answer)["port"])

    def open(self, terms: RoundTerms, deadline: float) -> None:
        """Publish a round."""
        self.insist("PUT", f"/v1/rounds/{terms.folder}", terms.pack(), deadline=deadline)

    def relay(self, round: int, envelopes: Sequence[bytes], deadline: float) -> list[str]:
        """Hand on sealed uploads; what was refused."""
        refused: list[str] = []
        for batch in _batches(envelopes):
            answer = self.insist("POST", f"{_path(round)}/relay", packed(batch), deadline=deadline)
            refused += json.loads(answer)["refused"]
        return refused

    def status(self, round: int, deadline: float) -> Mapping[str, Any]:
        """What is public of an attempt at a round."""
        status: dict[str, Any] = json.loads(self.insist("GET", _path(round), deadline=deadline))
        return status

    def share(self, round: int, session: str, *, agree: bool, kept: bool, deadline: float) -> bytes:
        """Close an attempt; the party's part of the result."""
        fields = {"session": session, "agree": agree, "kept": kept}
        return self.request("POST", f"{_path(round)}/share", json.dumps(fields).encode(), deadline=deadline)

    def abandon(self, round: int, deadline: float) -> None:
        """Have it never release anything of an attempt."""
        self.request("POST", f"{_path(round)}/abandon", b"{}", deadline=deadline)

    def close(self) -> None:
        """Close the connections; the service goes on. Idempotent."""
        super().close()
        self._sessions.close()


def _path(round: int) -> str:
    return f"/v1/rounds/{round:016x}"


def service_links(urls: Sequence[str], tls: ClientTls | None = None) -> list[HttpLink]:
    """Links to the services at ``urls``; ``tls``: what to trust, and the cloud's own certificate.

    Raises:
        ConfigError: an address is malformed or named twice.
    """
    if len(set(urls)) != len(urls):
        raise ConfigError("an aggregator's address is named twice")
    return [HttpLink(url, tls) for url in urls]


def _batches(envelopes: Sequence[bytes]) -> Iterator[list[bytes]]:
    """Runs of envelopes that fit one request together."""
    batch: list[bytes] = []
    size = 0
    for envelope in envelopes:
        if batch and size + len(envelope) > _RELAY_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(envelope)
        size += len(envelope)
    if batch:
        yield batch
