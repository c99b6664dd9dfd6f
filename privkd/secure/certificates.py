"""Certificates as the members of a group use them: names, roles, requests, and who a certificate is of.

A member makes its own TLS key, on elliptic curve P-256, where it runs, and asks for a certificate with a
request (PKCS #10), which holds no secret. The common name is the name by which services tell members apart:
``cloud`` opens and closes rounds, ``party-N`` serves, any other is a device's, which uploads under it.
"""

import hashlib
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.x509.oid import NameOID

from privkd.errors import ConfigError
from privkd.secure.keyfiles import make_folder, read_public, read_secret, replace_public, write_secret
from privkd.secure.party import MAX_PARTIES

CLOUD = "cloud"
"""Common name of the certificate that may open and close rounds."""
WARNING_DAYS = 30
"""A certificate that ends sooner is warned of."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_PARTY = re.compile(r"party-(0|[1-9][0-9]?)", re.ASCII)
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)", re.ASCII)
MALFORMED = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    InvalidSignature,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    x509.InvalidVersion,
)
"""What reading a damaged file raises, at once or when a part of it is asked for."""
_RESERVED = (CLOUD, "ca", "crl")


class Role(StrEnum):
    """What a certificate lets its holder be."""

    DEVICE = "device"
    CLOUD = "cloud"
    PARTY = "party"


def role_of(name: str) -> Role:
    """The role that goes with a common name.

    Raises:
        ConfigError: nobody may have the name.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"name {name!r}: expected 1 to 64 letters, digits, '.', '_' or '-', the first a letter or a digit"
        )
    if name == CLOUD:
        return Role.CLOUD
    party = _PARTY.fullmatch(name)
    if party is not None and int(party[1]) <= MAX_PARTIES:
        return Role.PARTY
    if name.lower() in _RESERVED or name.lower().startswith("party-"):
        raise ConfigError(f"name {name!r}: only the cloud is called 'cloud', and a party 'party-RANK'")
    return Role.DEVICE


def device_name(name: str) -> str:
    """``name``, which a device may have.

    Raises:
        ConfigError: it may not.
    """
    try:
        role = role_of(name)
    except ConfigError as error:
        raise ConfigError(f"device {error}") from None
    if role is not Role.DEVICE:
        raise ConfigError(f"device name {name!r}: it is that of a {role}; take another")
    return name


def host_name(host: str) -> str:
    """``host`` as certificates spell it: an address, or a name of the domain name system.

    Raises:
        ConfigError: it is neither; no port belongs to it.
    """
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        labels = bare.split(".")
        if len(bare) > 253 or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdigit():
            raise ConfigError(
                f"host {host!r}: expected an address or a host name in ASCII, without a port"
            ) from None
        return bare.lower()
    if address.is_unspecified or "%" in bare:
        raise ConfigError(f"host {host!r}: expected the address or name by which others reach the service")
    return str(address)


@dataclass(frozen=True)
class Request:
    """What a member asks for, in its own hand: the request's signature was checked.

    Attributes:
        name: the common name.
        hosts: where it serves; none for a client.
        key: public half of its TLS key.
    """

    name: str
    hosts: tuple[str, ...]
    key: ec.EllipticCurvePublicKey

    @property
    def role(self) -> Role:
        """The role that goes with its name."""
        return role_of(self.name)

    @property
    def words(self) -> str:
        """Who asks for what, in a line."""
        hosts = f" on {', '.join(self.hosts)}" if self.hosts else ""
        return f"{self.name} ({self.role}{hosts}) asks, with the key of fingerprint {fingerprint(self.key)}"


def request(name: str, folder: Path, hosts: Sequence[str] = ()) -> Path:
    """Make a member's TLS key, and its request for a certificate; the request's file.

    Writes ``NAME.key``, which stays where it is, and ``NAME.csr``, which goes to the authority.

    Args:
        name: the common name.
        folder: made where it is missing.
        hosts: where it serves; none for a client.

    Raises:
        ConfigError: a name is wrong, or the key exists already.
    """
    role, served = role_of(name), tuple(map(host_name, hosts))
    if bool(served) != (role is Role.PARTY) and role is not Role.CLOUD:
        raise ConfigError(f"name {name!r}: a party serves on a host, and a device on none")
    make_folder(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    write_secret(folder / f"{name}.key", private_pem(key))
    return _write_request(folder / f"{name}.csr", key, name, served)


def request_again(certificate: Path, key: Path, hosts: Sequence[str] = ()) -> Path:
    """Ask for another certificate for the same name and key; the request's file, beside the certificate.

    Args:
        certificate: the old one, which may have expired.
        key: its private key.
        hosts: where it serves from now on; as before unless given.

    Raises:
        ConfigError: they do not belong together, or a host is wrong.
    """
    old, private = load_certificate(certificate), load_tls_key(key)
    if fingerprint(old.public_key()) != fingerprint(private.public_key()):
        raise ConfigError(f"{key}: not the key of {certificate}")
    served = tuple(map(host_name, hosts)) or hosts_of(old)
    return _write_request(certificate.with_suffix(".csr"), private, name_of(old), served)


def _write_request(path: Path, key: ec.EllipticCurvePrivateKey, name: str, hosts: Sequence[str]) -> Path:
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject(name))
    if hosts:
        builder = builder.add_extension(alternatives(hosts), critical=False)
    made = builder.sign(key, hashes.SHA256())
    replace_public(path, made.public_bytes(serialization.Encoding.PEM))
    return path


def load_request(path: Path) -> Request:
    """The request in a PEM file.

    Raises:
        ConfigError: it is none, was altered, or asks for what nobody may have.
    """
    try:
        asked = x509.load_pem_x509_csr(read_public(path))
        genuine, key = asked.is_signature_valid, asked.public_key()
        hosts = _hosts(asked.extensions)
        names = [str(found.value) for found in asked.subject]
    except MALFORMED:
        raise ConfigError(f"{path}: not a request for a certificate in PEM") from None
    if not genuine:
        raise ConfigError(f"{path}: whoever sent it does not hold the key that it names, or it was altered")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(f"{path}: expected a key on elliptic curve P-256, as `privkd keys` makes it")
    if len(names) != 1 or not asked.subject.get_attributes_for_oid(NameOID.COMMON_NAME):
        raise ConfigError(f"{path}: expected a common name and nothing more as the subject")
    role_of(names[0])
    return Request(names[0], tuple(map(host_name, hosts)), key)


def load_certificate(path: Path) -> x509.Certificate:
    """The first certificate in a PEM file, expired or not.

    Raises:
        ConfigError: there is none.
    """
    try:
        found = x509.load_pem_x509_certificate(read_public(path))
        # Each part is read when it is first asked for, and may be what is damaged.
        _ = found.public_key(), found.subject, hosts_of(found), found.not_valid_after_utc
    except MALFORMED:
        raise ConfigError(f"{path}: not a certificate in PEM") from None
    return found


def load_tls_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private key of a certificate.

    Raises:
        ConfigError: it is none on an elliptic curve, or others may read it.
    """
    try:
        key = serialization.load_pem_private_key(read_secret(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: not an unencrypted private key in PEM ({error})") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: expected a key on an elliptic curve; `privkd keys` makes one")
    return key


def load_identity(certificate: Path, key: Path | None = None) -> tuple[bytes, bytes]:
    """A member's certificate chain and private key, both in PEM, fit to be shown to a peer now.

    Args:
        certificate: with the chain behind it, if any.
        key: of the certificate; it lies in the same file unless given.

    Raises:
        ConfigError: the key is not the certificate's, others may read it, or the certificate is not valid
            now.
    """
    found = load_certificate(certificate)
    check_validity(found, certificate)
    secret = read_secret(key or certificate)
    try:
        private = serialization.load_pem_private_key(secret, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{key or certificate}: not an unencrypted private key in PEM ({error})") from None
    if fingerprint(private.public_key()) != fingerprint(found.public_key()):
        raise ConfigError(f"{key or certificate}: not the key of {certificate}")
    return read_public(certificate), secret


def check_validity(certificate: x509.Certificate, path: Path) -> None:
    """Raise ``ConfigError`` where a certificate is not valid now."""
    now = datetime.now(UTC)
    if certificate.not_valid_after_utc <= now:
        raise ConfigError(
            f"{path}: the certificate of {name_of(certificate)} expired on "
            f"{certificate.not_valid_after_utc:%Y-%m-%d}: run `privkd keys renew {path}`"
        )
    if certificate.not_valid_before_utc > now:
        raise ConfigError(
            f"{path}: valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on, and here it is "
            f"{now:%Y-%m-%d %H:%M} UTC: set the clock"
        )


def days_left(certificate: x509.Certificate) -> float:
    """Days until a certificate ends; negative once it has."""
    return (certificate.not_valid_after_utc - datetime.now(UTC)).total_seconds() / 86400


def name_of(certificate: x509.Certificate) -> str:
    """The common name; empty where there is none."""
    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else ""


def hosts_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """The hosts for which a certificate speaks."""
    return _hosts(certificate.extensions)


def _hosts(extensions: x509.Extensions) -> tuple[str, ...]:
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(name.value) for name in names)


def fingerprint(key: PublicKeyTypes) -> str:
    """SHA-256 of a public key (its SubjectPublicKeyInfo), in hexadecimal."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()


def subject(common: str) -> x509.Name:
    """A subject that is a common name alone."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def alternatives(hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    """Hosts as a certificate names them; each from `host_name`."""

    def general(host: str) -> x509.GeneralName:
        try:
            return x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            return x509.DNSName(host)

    return x509.SubjectAlternativeName(list(map(general, hosts)))


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as files hold it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
