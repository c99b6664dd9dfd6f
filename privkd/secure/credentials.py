"""A service's certificate as gRPC takes it, and how long it lasts."""

import ssl
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

import grpc
from cryptography import x509

from privkd.errors import ConfigError

if TYPE_CHECKING:
    from privkd.secure.party import TlsConfig


def ends(certificate: Path) -> datetime:
    """When the certificate in a PEM file ends.

    Raises:
        ConfigError: the file is missing or holds none.
    """
    try:
        return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc
    except OSError as error:
        raise ConfigError(f"{certificate}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{certificate}: not a certificate in PEM ({error})") from None


class ServerCertificates:
    """What a service shows and whom it trusts; read anew by ``reload``, for the handshakes from then on."""

    def __init__(self, tls: "TlsConfig") -> None:
        """Read the files.

        Raises:
            ConfigError: one is missing, is no certificate or key, does not fit the other, or has ended.
        """
        self._lock = threading.Lock()
        self._fresh = False
        self.ends, self._configuration = _read(tls)
        self.credentials = grpc.dynamic_ssl_server_credentials(
            self._configuration,
            cast(Callable[[], grpc.ServerCertificateConfiguration], self._changed),
            require_client_authentication=tls.client_ca is not None,
        )

    def reload(self, tls: "TlsConfig") -> None:
        """Read the files anew. Raises as the constructor, and then goes on with the former."""
        ends, configuration = _read(tls)
        with self._lock:
            self.ends, self._configuration, self._fresh = ends, configuration, True

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """For each handshake: the new configuration once, else none."""
        with self._lock:
            fresh, self._fresh = self._fresh, False
            return self._configuration if fresh else None

    @property
    def seconds(self) -> float:
        """That the certificate still lasts."""
        return (self.ends - datetime.now(UTC)).total_seconds()


def _read(tls: "TlsConfig") -> tuple[datetime, grpc.ServerCertificateConfiguration]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(tls.certificate, tls.key)
        if tls.client_ca is not None:
            context.load_verify_locations(tls.client_ca)
        pair = tls.key.read_bytes(), tls.certificate.read_bytes()
        authority = None if tls.client_ca is None else tls.client_ca.read_bytes()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"[tls] {tls.certificate}, {tls.key}, {tls.client_ca}: {error}") from None
    until = ends(tls.certificate)
    if until <= datetime.now(UTC):
        raise ConfigError(f"[tls] {tls.certificate} ended on {until:%Y-%m-%d %H:%M} UTC; renew it")
    return until, grpc.ssl_server_certificate_configuration([pair], authority)
