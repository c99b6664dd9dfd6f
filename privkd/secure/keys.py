"""Who the parties are: their keys, and certificates to try the services with.

Each party has an X25519 key, to which devices seal their shares, and a 32-byte noise key, from which its
discrete Gaussians come. The certificates are for tests and pilots: the authority's key lies beside them.
In production take yours from the authority that you have.
"""

import ipaddress
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from privkd.errors import ConfigError
from privkd.privacy.noise import KEY_BYTES
from privkd.secure.party import MAX_PARTIES

CLOUD = "cloud"
"""Common name of the certificate that may open and close rounds."""
_TAKEN = (CLOUD, "ca")


def write_secret(path: Path, data: bytes) -> None:
    """Write a new file that its owner alone may read.

    Raises:
        ConfigError: it exists already, or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise ConfigError(f"{path} exists already: a key is never overwritten; name another folder") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None


def create_sealing_key(path: Path) -> str:
    """Write a new X25519 private key as PEM; the public key in hexadecimal."""
    key = X25519PrivateKey.generate()
    write_secret(path, _pem(key))
    return public_hex(key)


def load_sealing_key(path: Path) -> X25519PrivateKey:
    """The X25519 key in a PEM file.

    Raises:
        ConfigError: the file is missing or holds something else.
    """
    try:
        key = serialization.load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not an unencrypted private key in PEM ({error})") from None
    if not isinstance(key, X25519PrivateKey):
        raise ConfigError(f"{path}: expected an X25519 key; `privkd keys` makes one")
    return key


def load_noise_key(path: Path) -> bytes:
    """The noise key in a file.

    Raises:
        ConfigError: the file is missing or not of 32 bytes.
    """
    key = _read(path)
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{path}: noise key of {len(key)} bytes, expected {KEY_BYTES}")
    return key


def public_hex(key: X25519PrivateKey) -> str:
    """The public half in hexadecimal, as configurations pin it."""
    return key.public_key().public_bytes_raw().hex()


class TestAuthority:
    """A certificate authority for tests and pilots, on elliptic curve P-256."""

    __test__ = False

    def __init__(self, *, days: int = 365) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._until = datetime.now(UTC) + timedelta(days=days)
        self._name = _name("privkd test authority")
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        self.certificate = (
            self._builder(self._name, self._key.public_key())
            .add_extension(constraints, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .add_extension(_signing_only(), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def write(self, folder: Path) -> None:
        """Write ``ca.pem`` and ``ca.key``."""
        _write_public(folder / "ca.pem", self.certificate.public_bytes(serialization.Encoding.PEM))
        write_secret(folder / "ca.key", _pem(self._key))

    def issue(self, folder: Path, stem: str, *, name: str, hosts: Sequence[str] = ()) -> None:
        """Write ``stem.pem`` and ``stem.key``: for a server on ``hosts``, or without any for a client.

        ``name`` is the common name, by which a service tells devices and the cloud apart.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(_name(name), key.public_key())
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
        )
        usage = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if hosts:
            alternatives = x509.SubjectAlternativeName([_host(host) for host in hosts])
            builder = builder.add_extension(alternatives, critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        _write_public(folder / f"{stem}.pem", certificate.public_bytes(serialization.Encoding.PEM))
        write_secret(folder / f"{stem}.key", _pem(key))

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            # An hour back, as clocks differ.
            .not_valid_before(datetime.now(UTC) - timedelta(hours=1))
            .not_valid_after(self._until)
        )


def _signing_only() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: X25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_public(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; `privkd keys` makes one") from None


def make_keys(
    out: Path,
    *,
    parties: int = 2,
    third_party: bool = False,
    hosts: Sequence[str] = ("127.0.0.1",),
    port: int = 0,
    devices: Sequence[str] = (),
    tls: bool = True,
) -> str:
    """Make keys, test certificates and one configuration a party; what is where, in words.

    Args:
        out: a folder for all files.
        parties: number of aggregators.
        third_party: whether to make a third party too.
        hosts: host names or addresses of the parties' services, by rank; one for all is enough.
        port: of the first party's service, the others' follow; 0 lets each take any.
        devices: names for which client certificates are made.
        tls: whether to make certificates and to use them.

    Raises:
        ConfigError: a setting is out of range, or a file exists already.
    """
    count = parties + third_party
    _check_new_group(parties, count, hosts, port, devices)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror or error}") from None
    each = hosts if len(hosts) == count else [hosts[0]] * count
    write_parties(out, parties, each, port=port, devices=devices, tls=tls)
    return (
        f"{count} parties in {out}: give each party its own party-N files"
        f"{' and ca.pem' if tls else ''}, then run `privkd aggregator --config party-N.toml` there\n"
        "each party sets its own [limits] in party-N.toml: max_rho for a round, and max_rho_total for each "
        "device over all rounds, without which a cloud can ask the same device for ever"
    )


def _check_new_group(
    parties: int, count: int, hosts: Sequence[str], port: int, devices: Sequence[str]
) -> None:
    """Raise ``ConfigError`` if no group of ``count`` members can be so."""
    if not 2 <= parties <= MAX_PARTIES:
        raise ConfigError(f"parties={parties}: expected 2 to {MAX_PARTIES}")
    if not 0 <= port <= 65535 - count:
        raise ConfigError(f"port={port}: expected 0 to {65535 - count}")
    for device in devices:
        if not device or set(device) & set("/\\\0") or device.startswith((".", "party-")) or device in _TAKEN:
            raise ConfigError(f"device {device!r}: its certificate needs a name that can be a file's")
    if len(hosts) not in (1, count):
        raise ConfigError(f"{len(hosts)} hosts for {count} parties: give one for all, or one each")


def write_parties(
    folder: Path,
    parties: int,
    hosts: Sequence[str],
    *,
    port: int = 0,
    devices: Sequence[str] = (),
    tls: bool = True,
    noise_keys: Sequence[bytes] = (),
    limits: Mapping[str, Any] | None = None,
) -> TestAuthority | None:
    """What `make_keys` writes; the authority of the certificates, if any.

    Args:
        folder: exists already.
        parties: number of aggregators; another one of ``hosts`` is the third party's.
        hosts: of each party.
        port: see `make_keys`, as for ``devices`` and ``tls``.
        devices: see `make_keys`.
        tls: see `make_keys`.
        noise_keys: by rank; fresh unless given.
        limits: the ``[limits]`` of all.
    """
    public = [create_sealing_key(folder / f"party-{rank}.key") for rank in range(len(hosts))]
    authority = TestAuthority() if tls else None
    if authority is not None:
        authority.write(folder)
        for name in (CLOUD, *devices):
            authority.issue(folder, name, name=name)
    for rank, host in enumerate(hosts):
        name = f"party-{rank}"
        write_secret(folder / f"{name}.noise", noise_keys[rank] if noise_keys else os.urandom(KEY_BYTES))
        if authority is not None:
            authority.issue(folder, f"{name}.tls", name=name, hosts=[host])
        listen = f"{host}:{port + rank if port else 0}"
        settings = _party_settings(rank, parties, listen, public, tls=tls)
        if limits:
            settings["limits"] = dict(limits)
        (folder / f"{name}.toml").write_text(tomli_w.dumps(settings))
    return authority


def _party_settings(
    rank: int, parties: int, listen: str, members: Sequence[str], *, tls: bool
) -> dict[str, Any]:
    """A ``party.toml`` beside the files of `write_parties`."""
    name = f"party-{rank}"
    settings: dict[str, Any] = {
        "rank": rank,
        "parties": parties,
        "listen": listen,
        "directory": f"state-{rank}",
        "sealing_key": f"{name}.key",
        "noise_key": f"{name}.noise",
        "members": list(members),
    }
    if tls:
        files = {"certificate": f"{name}.tls.pem", "key": f"{name}.tls.key", "client_ca": "ca.pem"}
        settings["tls"] = files
    return settings
