"""A party's service as a device or the cloud reaches it: gRPC with deadlines, and two kinds of failure."""

import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import grpc

from privkd.errors import ChannelError, ConfigError, RefusalError
from privkd.secure import aggregator_pb2 as pb
from privkd.secure.addresses import is_loopback, joined
from privkd.secure.aggregator_pb2_grpc import AggregatorStub
from privkd.secure.certificates import check_validity, load_certificate, load_identity
from privkd.secure.group import UnreachableError
from privkd.secure.rpc import FINAL, OPTIONS, PROTOCOL, stream
from privkd.secure.terms import RoundTerms
from privkd.secure.upload import Upload, packed

_MAX_STATUS_BYTES = 1 << 28
_RELAY_BYTES = 1 << 22
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_ATTEMPT_SECONDS = 15.0
_LOOK_SECONDS = 2.0
_ENCRYPTED = {"grpcs": True, "https": True, "grpc": False, "http": False}
_OPTIONS: list[tuple[str, Any]] = [
    *OPTIONS,
    ("grpc.max_receive_message_length", _MAX_STATUS_BYTES),
    # Each link has a connection of its own, under its own certificate.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),
]
T = TypeVar("T")


@dataclass(frozen=True)
class ClientTls:
    """What a client trusts, and its own certificate where services ask for one."""

    ca: Path
    certificate: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """The same for Python's own TLS.

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

    def credentials(self) -> grpc.ChannelCredentials:
        """As gRPC takes them. Raises as `context`."""
        self.context()
        key, certificate = (path and path.read_bytes() for path in (self.key, self.certificate))
        return grpc.ssl_channel_credentials(self.ca.read_bytes(), key or None, certificate or None)


class ServiceLink:
    """The link to a party that runs as a service: see ``aggregator.proto``. Keeps a connection open.

    Calls raise `RefusalError` where the party refuses for good, `UnreachableError` where there was no answer
    by the deadline or it may be asked again, and `ChannelError` where one does not trust the other's
    certificate. Deadlines are on ``time.monotonic``. Any number of threads may use it.
    """

    def __init__(self, url: str, tls: ClientTls | None = None) -> None:
        """Check the address; nothing is sent.

        Raises:
            ConfigError: not an address of ``grpc`` on the loopback interface, or of ``grpcs``; ``http`` and
                ``https`` mean the same.
        """
        parts = urlsplit(url)
        try:
            self._host, self._port = parts.hostname or "", parts.port or 0
        except ValueError:
            self._host, self._port = "", 0
        if parts.scheme not in _ENCRYPTED or not self._host or not self._port:
            raise ConfigError(f"aggregator {url!r}: expected an address such as grpcs://host:8440")
        if not _ENCRYPTED[parts.scheme] and not is_loopback(self._host):
            raise ConfigError(f"aggregator {url!r}: without grpcs only the loopback interface is allowed")
        self.url = url
        self._tls = tls
        self._credentials: grpc.ChannelCredentials | None = None
        if _ENCRYPTED[parts.scheme]:
            self._credentials = grpc.ssl_channel_credentials() if tls is None else tls.credentials()
        self._opening = threading.Lock()
        self._channel: grpc.Channel | None = None

    @property
    def name(self) -> str:
        """Its address."""
        return self.url

    # ---- the calls ----------------------------------------------------------------------------------

    def about(self, deadline: float) -> Mapping[str, Any]:
        """What the party says of itself: also its ``version``, and how far its clock is ahead, in seconds."""
        answer = self.insist("About", pb.AboutRequest, deadline)
        if answer.protocol != PROTOCOL:
            raise ChannelError(f"{self.url} speaks protocol {answer.protocol}, and this is {PROTOCOL}: "
                               f"it runs privkd {answer.version}")  # fmt: skip
        if not answer.rank < len(answer.members):
            raise ChannelError(f"{self.url} is not a party's service")
        return {
            "rank": answer.rank,
            "parties": answer.parties,
            "key": answer.members[answer.rank].hex(),
            "members": len(answer.members),
            "version": answer.version,
            "ahead": answer.clock_ms / 1000 - time.time(),
        }

    def join(self, session: str, port: int | None, deadline: float) -> int:
        """Have it start a worker; the port of rank 0's rendezvous."""
        return int(self.call("Join", pb.JoinRequest(session=session, port=port), deadline).port)

    def open(self, terms: RoundTerms, deadline: float) -> None:
        """Publish a round."""
        self.insist("Open", lambda: stream(terms.label, terms.pack()), deadline)

    def upload(self, round: int, device: str, envelope: bytes, deadline: float) -> None:
        """Hand over a device's envelope, again and again while the party cannot be reached."""
        self.insist("Upload", lambda: stream(round, envelope, device), deadline)

    def relay(self, round: int, envelopes: Sequence[bytes], deadline: float) -> list[str]:
        """Hand on sealed uploads; what was refused."""
        refused: list[str] = []
        for batch in _batches(envelopes):
            request = partial(stream, round, packed(batch))
            refused += self.insist("Relay", request, deadline).refused
        return refused

    def status(self, round: int, deadline: float) -> Mapping[str, Any]:
        """What is public of an attempt at a round."""
        answer = self.insist("Status", lambda: pb.StatusRequest(round=round), deadline)
        optional = {
            name: getattr(answer, name) if answer.HasField(name) else None
            for name in ("set", "failure", "made_in")
        }
        return optional | {
            "terms": answer.terms.decode(),
            "closed": answer.closed,
            "devices": list(answer.devices),
            "left_out": dict(answer.left_out),
            "over": answer.over,
            "shared": answer.shared,
        }

    def share(self, round: int, session: str, *, agree: bool, kept: bool, deadline: float) -> bytes:
        """Close an attempt; the party's part of the result."""
        request = pb.ShareRequest(round=round, session=session, agree=agree, kept=kept)
        pieces: Iterable[pb.Piece] = self.call("Share", request, deadline, list)
        return b"".join(piece.data for piece in pieces)

    def abandon(self, round: int, deadline: float) -> None:
        """Have it never release anything of an attempt."""
        self.call("Abandon", pb.AbandonRequest(round=round), deadline)

    # ---- what they have in common -------------------------------------------------------------------

    def insist(self, name: str, request: Callable[[], Any], deadline: float) -> Any:
        """`call`, tried again with growing pauses for as long as the party is unreachable.

        Each attempt is given twice the time of the one before: a party that is behind with its work would
        fall back further if all began anew while they wait.
        """
        patience = _ATTEMPT_SECONDS

        def attempt() -> Any:
            nonlocal patience
            by, patience = min(deadline, time.monotonic() + patience), 2 * patience
            return self.call(name, request(), by)

        return persistently(attempt, deadline)

    def call(self, name: str, request: Any, deadline: float, read: Callable[[Any], Any] | None = None) -> Any:
        """What the party answers to one call of its service.

        Args:
            name: of the call, as in ``aggregator.proto``.
            request: its message, or an iterator over its pieces.
            deadline: on ``time.monotonic``.
            read: of an answer in pieces, what is made of them.
        """
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise UnreachableError(f"{self.url} did not answer in time")
        try:
            answer = getattr(AggregatorStub(self._opened()), name)(request, timeout=remaining)
            return answer if read is None else read(answer)
        except grpc.RpcError as error:
            raise self._failure(error) from error

    def _opened(self) -> grpc.Channel:
        with self._opening:
            if self._channel is None:
                target = joined(self._host, self._port)
                self._channel = (
                    grpc.insecure_channel(target, _OPTIONS)
                    if self._credentials is None
                    else grpc.secure_channel(target, self._credentials, _OPTIONS)
                )
            return self._channel

    def _failure(self, error: grpc.RpcError) -> ChannelError:
        """What an error of gRPC means to whoever called."""
        code, details = error.code(), " ".join((error.details() or "").split())
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and "Deadline Exceeded" in details:
            return UnreachableError(f"{self.url} did not answer in time")
        if code in FINAL:
            return RefusalError(FINAL[code], f"{self.url}: {details}")
        if code is grpc.StatusCode.UNAVAILABLE and self._credentials is not None:
            distrust = self._distrust(details)
            if distrust is not None:
                return ChannelError(distrust)
        return UnreachableError(f"{self.url}: {details or code.name}")

    def _distrust(self, details: str) -> str | None:
        """Why a connection cannot come about as long as the certificates are what they are, if that is so."""
        if "Hostname Verification" in details:
            return f"{self.url}: its certificate is not trusted (it is for another host than {self._host!r})"
        _, found, reason = details.partition("CERTIFICATE_VERIFY_FAILED: ")
        if found:
            return f"{self.url}: its certificate is not trusted ({reason.partition(':')[0]})"
        own = None if self._tls is None else self._tls.certificate
        if own is not None:
            try:
                check_validity(load_certificate(own), own)
            except ConfigError as error:
                return f"{self.url}: {error}"
        broken_off = any(words in details for words in ("Socket closed", "reset by peer", "Broken pipe"))
        # Twice, as a service that is being killed looks the same for once.
        if broken_off and self._turned_away() and self._turned_away():
            what = "a client without a certificate" if own is None else f"this client's certificate {own}"
            return f"{self.url}: it does not accept {what}"
        return None

    def _turned_away(self) -> bool:
        """Whether it ends a connection right after a handshake that was well on our side.

        That is how gRPC refuses a client's certificate. It does not say why.
        """
        context = ssl.create_default_context() if self._tls is None else self._tls.context()
        context.set_alpn_protocols(["h2"])
        try:
            with (
                socket.create_connection((self._host, self._port), _LOOK_SECONDS) as raw,
                context.wrap_socket(raw, server_hostname=self._host) as connection,
            ):
                return connection.recv(1) == b""
        except OSError as error:
            return isinstance(error, ConnectionResetError)

    def close(self) -> None:
        """Close the connection; the service goes on, and the next call opens another. Idempotent."""
        with self._opening:
            if self._channel is not None:
                self._channel.close()
                self._channel = None


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


def send(upload: Upload, links: Sequence[ServiceLink], *, deadline: float) -> None:
    """Send each aggregator its envelope, again and again where it cannot be reached.

    Args:
        upload: from ``prepare``.
        links: to the aggregators, by rank.
        deadline: on ``time.monotonic``.

    Raises:
        ChannelError: an aggregator refused it, or cannot be reached in time.
    """
    for link, envelope in zip(links, upload.envelopes, strict=True):
        link.upload(upload.round, upload.device, envelope, deadline)


def service_links(urls: Sequence[str], tls: ClientTls | None = None) -> list[ServiceLink]:
    """Links to the services at ``urls``; ``tls``: what to trust, and the cloud's own certificate.

    Raises:
        ConfigError: an address is malformed or named twice.
    """
    if len(set(urls)) != len(urls):
        raise ConfigError("an aggregator's address is named twice")
    return [ServiceLink(url, tls) for url in urls]


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
