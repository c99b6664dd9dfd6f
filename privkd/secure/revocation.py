"""The list of revoked certificates, as a service consults it at each call."""

from functools import lru_cache
from pathlib import Path

from cryptography import x509

from privkd.errors import ConfigError
from privkd.secure.certificates import MALFORMED, load_certificate
from privkd.secure.keyfiles import read_public


class RevocationList:
    """The certificates that their authority has revoked, out of the file ``crl.pem``.

    A file that is replaced is read anew at the next question. One that cannot be read then, was signed by
    another, or is older than what was read before changes nothing, as what was revoked stays so; ``fault``
    says what is wrong with it. Safe to ask from many threads.
    """

    def __init__(self, path: Path, authority: Path) -> None:
        """Read the file.

        Args:
            path: ``crl.pem``.
            authority: the certificate of the authority that signs it.

        Raises:
            ConfigError: it is no list of revoked certificates, or not of this authority.
        """
        self.path = path
        self.fault: str | None = None
        self._authority = load_certificate(authority).public_key()
        self._stamp = self._found()
        self._number, self._serials = self._read()

    def revoked(self, certificate: bytes) -> bool:
        """Whether a peer's certificate, in PEM or DER, is revoked."""
        self._refresh()
        return _serial(certificate) in self._serials

    def __len__(self) -> int:
        self._refresh()
        return len(self._serials)

    def _refresh(self) -> None:
        stamp = self._found()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            number, serials = self._read()
            if number < self._number:
                raise ConfigError(f"{self.path}: older than the list that was read before")
        except ConfigError as error:
            self.fault = str(error)
        else:
            self._number, self._serials, self.fault = number, serials, None

    def _found(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size

    def _read(self) -> tuple[int, frozenset[int]]:
        try:
            crl = x509.load_pem_x509_crl(read_public(self.path))
            genuine = crl.is_signature_valid(self._authority)  # type: ignore[arg-type]
            number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
            serials = frozenset(entry.serial_number for entry in crl)
        except (*MALFORMED, x509.ExtensionNotFound):
            raise ConfigError(f"{self.path}: not a list of revoked certificates in PEM") from None
        if not genuine:
            raise ConfigError(f"{self.path}: signed by another authority")
        return number, serials


@lru_cache(maxsize=4096)
def _serial(certificate: bytes) -> int:
    if certificate.lstrip().startswith(b"-----"):
        return x509.load_pem_x509_certificate(certificate).serial_number
    return x509.load_der_x509_certificate(certificate).serial_number
