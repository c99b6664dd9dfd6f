"""The authority of a group: it approves requests, renews, revokes, and remembers every certificate it gave.

Its folder holds ``ca.pem`` and ``crl.pem``, which every member gets; ``ca.key``, which never leaves it;
``issued/NAME.pem``, each name's latest certificate; and the journal ``issued.jsonl``, in which a certificate
is recorded before it is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from privkd.errors import ConfigError
from privkd.journal import Journal
from privkd.secure.certificates import (
    Request,
    Role,
    alternatives,
    check_validity,
    fingerprint,
    host_name,
    load_certificate,
    load_request,
    load_tls_key,
    private_pem,
    role_of,
    subject,
)
from privkd.secure.keyfiles import make_folder, replace_public, write_secret

AUTHORITY_DAYS, MEMBER_DAYS = 3650, 365
"""How long the authority's certificate holds, and a member's, unless told otherwise."""
_MOST_DAYS = 7300
_NAME = "privkd authority"


@dataclass(frozen=True)
class Issued:
    """One certificate in the authority's journal.

    Attributes:
        name: the common name.
        serial: the certificate's number.
        fingerprint: of its key.
        until: when it ends.
        revoked: whether it was taken back.
    """

    name: str
    serial: int
    fingerprint: str
    until: datetime
    revoked: bool = False

    @property
    def live(self) -> bool:
        """Whether services take it."""
        return not self.revoked and self.until > datetime.now(UTC)


class Authority:
    """A certificate authority on elliptic curve P-256, in its folder. One process at a time changes it."""

    def __init__(self, folder: Path) -> None:
        """Take up the authority that `create` made.

        Raises:
            ConfigError: a file is missing, or others may read its key.
            RunError: the journal is damaged.
        """
        self.folder = folder
        self.certificate = load_certificate(folder / "ca.pem")
        self._key = load_tls_key(folder / "ca.key")
        if fingerprint(self._key.public_key()) != fingerprint(self.certificate.public_key()):
            raise ConfigError(f"{folder / 'ca.key'}: not the key of {folder / 'ca.pem'}")
        self._journal = Journal(folder / "issued.jsonl")

    @classmethod
    def create(cls, folder: Path, *, days: int = AUTHORITY_DAYS) -> Self:
        """Make a new authority.

        Raises:
            ConfigError: ``days`` is out of range, or there is one already.
        """
        until = datetime.now(UTC) + _span(days)
        make_folder(folder)
        key = ec.generate_private_key(ec.SECP256R1())
        write_secret(folder / "ca.key", private_pem(key))
        name = subject(_NAME)
        made = (
            _builder(name, name, key.public_key(), until)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        replace_public(folder / "ca.pem", made.public_bytes(serialization.Encoding.PEM))
        authority = cls(folder)
        authority._write_revoked()
        return authority

    @property
    def issued(self) -> list[Issued]:
        """Every certificate that it gave, oldest first."""
        revoked = {record["serial"] for record in self._journal if record["event"] == "revoked"}
        return [
            Issued(
                record["name"],
                int(record["serial"], 16),
                record["fingerprint"],
                datetime.fromisoformat(record["until"]),
                record["serial"] in revoked,
            )
            for record in self._journal
            if record["event"] == "issued"
        ]

    def approve(
        self, asked: Request, *, role: Role = Role.DEVICE, days: int | None = None, renew: bool = False
    ) -> Path:
        """Give a member its certificate; its file.

        Args:
            asked: from `load_request`.
            role: that the approver means to give: the name must be of it.
            days: that it holds; a year unless given, and no longer than the authority's own.
            renew: whether the name may have a certificate already, which must then be of the same key.

        Raises:
            ConfigError: the name is of another role or taken, or ``days`` is out of range.
            RunError: another process changed the journal.
        """
        if asked.role is not role:
            raise ConfigError(
                f"{asked.name} is the name of a {asked.role}, not of a {role}: approve it with "
                f"--role {asked.role} if that is what you mean to let it be"
            )
        if (asked.role is Role.PARTY) != bool(asked.hosts) and asked.role is not Role.CLOUD:
            raise ConfigError(f"{asked.name}: a party serves on a host, and a device on none")
        self._check_free(asked, renew=renew)
        made = self._sign(asked, self._until(days))
        folder = self.folder / "issued"
        make_folder(folder)
        path = folder / f"{asked.name}.pem"
        replace_public(path, made.public_bytes(serialization.Encoding.PEM))
        return path

    def issue(self, folder: Path, stem: str, *, name: str, hosts: Sequence[str] = ()) -> None:
        """Make a member's key here too, where all members are on one machine: ``stem.key``, ``stem.pem``."""
        key = ec.generate_private_key(ec.SECP256R1())
        asked = Request(name, tuple(map(host_name, hosts)), key.public_key())
        write_secret(folder / f"{stem}.key", private_pem(key))
        made = self._sign(asked, self._until(None))
        replace_public(folder / f"{stem}.pem", made.public_bytes(serialization.Encoding.PEM))

    def revoke(self, name: str) -> int:
        """Take back every certificate of a name that holds, and write ``crl.pem``; how many there were.

        Raises:
            ConfigError: no certificate of the name holds; the list is written all the same.
            RunError: another process changed the journal.
        """
        live = [found for found in self.issued if found.live and found.name == name]
        for found in live:
            self._record("revoked", name=name, serial=f"{found.serial:x}")
        # A crash may have come between an earlier record and the list.
        self._write_revoked()
        if not live:
            raise ConfigError(f"{name!r} has no certificate of {self.folder} that holds")
        return len(live)

    def _check_free(self, asked: Request, *, renew: bool) -> None:
        # Whatever case they are written in, two names that look alike would be taken for each other.
        live = [found for found in self.issued if found.live and found.name.lower() == asked.name.lower()]
        if not live:
            return
        until = f"{live[-1].until:%Y-%m-%d}"
        if not renew:
            raise ConfigError(
                f"{live[-1].name} has a certificate until {until}: --renew gives it another for the same "
                f"key; if that key was lost, run `privkd keys revoke {live[-1].name}` first"
            )
        if all(found.fingerprint != fingerprint(asked.key) or found.name != asked.name for found in live):
            raise ConfigError(
                f"{asked.name} asks with another key than that of its certificate: only the same key is "
                f"renewed; if it was lost, run `privkd keys revoke {live[-1].name}` and approve this anew"
            )

    def _until(self, days: int | None) -> datetime:
        check_validity(self.certificate, self.folder / "ca.pem")
        end = self.certificate.not_valid_after_utc
        until = datetime.now(UTC) + _span(MEMBER_DAYS if days is None else days)
        if days is not None and until > end:
            raise ConfigError(f"days={days}: the authority's own certificate ends on {end:%Y-%m-%d}")
        return min(until, end)

    def _sign(self, asked: Request, until: datetime) -> x509.Certificate:
        serves = ExtendedKeyUsageOID.SERVER_AUTH if asked.hosts else None
        # Parties show theirs to each other too.
        uses = [use for use in (serves, ExtendedKeyUsageOID.CLIENT_AUTH) if use is not None]
        builder = (
            _builder(subject(asked.name), self.certificate.subject, asked.key, until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
        )
        if asked.hosts:
            builder = builder.add_extension(alternatives(asked.hosts), critical=False)
        made = builder.sign(self._key, hashes.SHA256())
        self._record(
            "issued",
            name=asked.name,
            role=str(role_of(asked.name)),
            hosts=list(asked.hosts),
            serial=f"{made.serial_number:x}",
            fingerprint=fingerprint(asked.key),
            until=made.not_valid_after_utc.isoformat(),
        )
        return made

    def _write_revoked(self) -> None:
        """Write ``crl.pem``, numbered by the journal's lines."""
        now = datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now)
            # It is handed out when it changes, not on a day: an old one must not shut everybody out.
            .next_update(max(self.certificate.not_valid_after_utc, now + timedelta(days=1)))
            .add_extension(x509.CRLNumber(len(self._journal)), critical=False)
        )
        for found in self.issued:
            if found.revoked:
                entry = x509.RevokedCertificateBuilder().serial_number(found.serial).revocation_date(now)
                builder = builder.add_revoked_certificate(entry.build())
        made = builder.sign(self._key, hashes.SHA256())
        replace_public(self.folder / "crl.pem", made.public_bytes(serialization.Encoding.PEM))

    def _record(self, event: str, **facts: Any) -> None:
        self._journal.append({"event": event, "at": datetime.now(UTC).isoformat()} | facts)


def approve(
    request: Path,
    authority: Path,
    *,
    role: Role = Role.DEVICE,
    days: int | None = None,
    renew: bool = False,
    expected: str | None = None,
) -> Path:
    """Have the authority in a folder approve the request in a file; the certificate's file.

    Args:
        request: a PEM file.
        authority: its folder.
        role: see `Authority.approve`, as for ``days`` and ``renew``.
        expected: the fingerprint that the member told by another way; not compared unless given.

    Raises:
        ConfigError: the request, or what it asks for, is refused; nothing was issued.
    """
    asked = load_request(request)
    if expected is not None and expected.lower() != fingerprint(asked.key):
        raise ConfigError(f"{request}: its key's fingerprint is {fingerprint(asked.key)}, not {expected}")
    return Authority(authority).approve(asked, role=role, days=days, renew=renew)


def _span(days: int) -> timedelta:
    if not 1 <= days <= _MOST_DAYS:
        raise ConfigError(f"days={days}: expected 1 to {_MOST_DAYS}")
    return timedelta(days=days)


def _builder(
    name: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # An hour back, as clocks differ.
        .not_valid_before(datetime.now(UTC) - timedelta(hours=1))
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    """What a key is for: to sign certificates, or handshakes."""
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
