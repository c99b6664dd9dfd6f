"""What the files of keys and certificates are, without a secret: for people, and for `privkd doctor`."""

import json
import sys
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privkd.errors import ConfigError
from privkd.privacy.noise import KEY_BYTES
from privkd.secure.certificates import (
    MALFORMED,
    WARNING_DAYS,
    check_validity,
    days_left,
    fingerprint,
    hosts_of,
    load_certificate,
    load_request,
    load_tls_key,
    name_of,
)
from privkd.secure.enrolment import load_member
from privkd.secure.keyfiles import read_public, read_secret
from privkd.secure.keys import load_sealing_key, public_hex
from privkd.secure.party import load_party


@dataclass(frozen=True)
class Shown:
    """One file.

    Attributes:
        file: where it lies.
        kind: what it is.
        name: whose it is; empty where the file does not say.
        public: the public key, or the fingerprint of a TLS key, in hexadecimal; empty where there is none.
        hosts: for which it speaks.
        until: when it ends, in ISO 8601.
        days_left: until then.
        warning: what is wrong or soon will be, and what to do.
        refused: whether it is of no use any more.
    """

    file: str
    kind: str
    name: str = ""
    public: str = ""
    hosts: tuple[str, ...] = ()
    until: str | None = None
    days_left: int | None = None
    warning: str = ""
    refused: bool = False

    @property
    def line(self) -> str:
        """All of it, in one line."""
        parts = [f"{self.file}: {self.kind}{f' of {self.name}' if self.name else ''}"]
        parts += [f"on {', '.join(self.hosts)}"] if self.hosts else []
        parts += [self.public] if self.public else []
        parts += [f"until {self.until}, {self.days_left} days left"] if self.until else []
        parts += [f"WARNING {self.warning}"] if self.warning else []
        # A stranger's certificate may hold anything, and a terminal obeys some of it.
        return "".join(sign if sign.isprintable() else "?" for sign in "; ".join(parts))


def show_keys(path: Path, *, as_json: bool) -> None:
    """Print what a file is, or each file of a folder.

    Raises:
        ConfigError: it is nothing of ours, or some file is of no use any more: the first of them, in words.
    """
    found = inventory(path)
    if as_json:
        sys.stdout.write(json.dumps([asdict(shown) for shown in found]) + "\n")
    else:
        sys.stdout.write("".join(f"{shown.line}\n" for shown in found))
    refused = [shown for shown in found if shown.refused]
    if refused:
        raise ConfigError(refused[0].warning)


def inventory(path: Path) -> list[Shown]:
    """What a file is, or each file of a folder that is ours.

    Raises:
        ConfigError: there is none.
    """
    try:
        files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    found = [shown for file in files if (shown := _shown(file)) is not None]
    if not found:
        raise ConfigError(f"{path}: no key, request, certificate or party.toml of privkd")
    return found


def _shown(path: Path) -> Shown | None:
    if path.suffix == ".toml":
        read = _settings(path)
    else:
        read = {".key": _private, ".noise": _private, ".csr": _request, ".pem": _public}.get(path.suffix)
    if read is None:
        return None
    try:
        return read(path)
    except ConfigError as error:
        return Shown(str(path), "unusable", warning=str(error), refused=True)


def _settings(path: Path) -> Callable[[Path], Shown] | None:
    try:
        tree = tomllib.loads(read_public(path).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return None
    if "sealing_key" in tree:
        return _party
    return _published if {"rank", "key", "url"} <= set(tree) else None


def _party(path: Path) -> Shown:
    party = load_party(path)
    return Shown(str(path), "settings", party.name, party.members[party.rank])


def _published(path: Path) -> Shown:
    member = load_member(path)
    return Shown(str(path), "member's file", f"party {member.rank} at {member.url}", member.key)


def _private(path: Path) -> Shown:
    secret = read_secret(path)
    if len(secret) == KEY_BYTES:
        return Shown(str(path), "noise key, secret")
    try:
        key = serialization.load_pem_private_key(secret, password=None)
    except (ValueError, TypeError):
        raise ConfigError(f"{path}: neither a noise key of {KEY_BYTES} bytes nor a key in PEM") from None
    if isinstance(key, X25519PrivateKey):
        return Shown(str(path), "sealing key, secret; public half", public=public_hex(load_sealing_key(path)))
    print_of = fingerprint(load_tls_key(path).public_key())
    return Shown(str(path), "TLS key, secret; fingerprint", public=print_of)


def _request(path: Path) -> Shown:
    asked = load_request(path)
    return Shown(str(path), "request", asked.name, fingerprint(asked.key), asked.hosts)


def _public(path: Path) -> Shown:
    data = read_public(path)
    if b"X509 CRL" in data:
        try:
            return Shown(str(path), f"{len(x509.load_pem_x509_crl(data))} revoked certificates")
        except MALFORMED:
            raise ConfigError(f"{path}: not a list of revoked certificates in PEM") from None
    certificate = load_certificate(path)
    warning, refused = "", False
    try:
        check_validity(certificate, path)
    except ConfigError as error:
        warning, refused = str(error), True
    days = days_left(certificate)
    if not refused and days < WARNING_DAYS:
        warning = f"it ends in {days:.0f} days: run `privkd keys renew {path}`"
    return Shown(
        str(path),
        "certificate",
        name_of(certificate),
        fingerprint(certificate.public_key()),
        hosts_of(certificate),
        f"{certificate.not_valid_after_utc:%Y-%m-%d}",
        int(days // 1),
        warning,
        refused,
    )
