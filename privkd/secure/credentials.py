"""What a party's service shows, and whom it trusts."""

import ssl
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

import grpc

from privkd.errors import ConfigError
from privkd.secure.certificates import load_certificate, load_identity
from privkd.secure.revocation import RevocationList

if TYPE_CHECKING:
    from privkd.secure.party import TlsConfig


class ServerCertificates:
    """The files of ``[tls]``; read anew by ``reload``, for the handshakes from then on.

    Attributes:
        asks: whether callers must show certificates.
        ends: when the service's own certificate ends.
    """

    def __init__(self, tls: "TlsConfig") -> None:
        """Read the files.

        Raises:
            ConfigError: one is missing, is no certificate or key, does not fit the other, or has expired.
        """
        self.asks = tls.client_ca is not None
        self._lock = threading.Lock()
        self._fresh = False
        self._take(tls)
        self.credentials = grpc.dynamic_ssl_server_credentials(
            self._configuration,
            cast(Callable[[], grpc.ServerCertificateConfiguration], self._changed),
            require_client_authentication=self.asks,
        )

    def reload(self, tls: "TlsConfig") -> None:
        """Read the files anew. Raises as the constructor, and then goes on with the former."""
        if (tls.client_ca is not None) != self.asks:
            raise ConfigError("[tls] client_ca: whether clients show certificates needs a restart to change")
        self._take(tls)
        with self._lock:
            self._fresh = True

    def _take(self, tls: "TlsConfig") -> None:
        pair = load_identity(tls.certificate, tls.key)
        authority, revoked = None, None
        if tls.client_ca is not None:
            authority = _authority(tls)
            revoked = None if tls.crl is None else RevocationList(tls.crl, tls.client_ca)
        ends = load_certificate(tls.certificate).not_valid_after_utc
        with self._lock:
            self.ends, self._revoked = ends, revoked
            self._configuration = grpc.ssl_server_certificate_configuration([pair[::-1]], authority)

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """For each handshake: the new configuration once, else none."""
        with self._lock:
            fresh, self._fresh = self._fresh, False
            return self._configuration if fresh else None

    def revoked(self, certificate: bytes) -> bool:
        """Whether a caller's certificate, in PEM, was taken back: asked at each call, as connections last."""
        return self._revoked is not None and self._revoked.revoked(certificate)

    @property
    def seconds(self) -> float:
        """That the certificate still lasts."""
        return (self.ends - datetime.now(UTC)).total_seconds()


def _authority(tls: "TlsConfig") -> bytes:
    """What callers' certificates are held to, in PEM."""
    assert tls.client_ca is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(tls.client_ca)
        return tls.client_ca.read_bytes()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"[tls] {tls.client_ca}: {error}") from None
