"""The keys of parties, and a whole group's on one machine.

Each party has an X25519 key, to which devices seal their shares, and a 32-byte noise key, from which its
discrete Gaussians come. `make_keys` makes those of all parties in one folder, with certificates whose
authority lies beside them: for tests and pilots on one machine. Where parties are on hosts of their own, each
makes its own (``privkd.secure.enrolment``).
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privkd.errors import ConfigError
from privkd.privacy.noise import KEY_BYTES
from privkd.secure.addresses import joined
from privkd.secure.authority import Authority
from privkd.secure.certificates import CLOUD, device_name, host_name
from privkd.secure.keyfiles import make_folder, read_secret, write_secret
from privkd.secure.party import MAX_PARTIES


def create_sealing_key(path: Path) -> str:
    """Write a new X25519 private key as PEM; the public key in hexadecimal.

    Raises:
        ConfigError: the file exists already, or cannot be written.
    """
    key = X25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_secret(path, pem)
    return public_hex(key)


def load_sealing_key(path: Path) -> X25519PrivateKey:
    """The X25519 key in a PEM file.

    Raises:
        ConfigError: the file is missing, holds something else, or others than its owner may read it.
    """
    try:
        key = serialization.load_pem_private_key(read_secret(path), password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not an unencrypted private key in PEM ({error})") from None
    if not isinstance(key, X25519PrivateKey):
        raise ConfigError(f"{path}: expected an X25519 key; `privkd keys` makes one")
    return key


def load_noise_key(path: Path) -> bytes:
    """The noise key in a file.

    Raises:
        ConfigError: the file is missing, not of 32 bytes, or others than its owner may read it.
    """
    key = read_secret(path)
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{path}: noise key of {len(key)} bytes, expected {KEY_BYTES}")
    return key


def public_hex(key: X25519PrivateKey) -> str:
    """The public half in hexadecimal, as configurations pin it."""
    return key.public_key().public_bytes_raw().hex()


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
    """Make keys, certificates and one configuration a party, all in one folder; what is where, in words.

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
    make_folder(out)
    each = hosts if len(hosts) == count else [hosts[0]] * count
    write_parties(out, parties, each, port=port, devices=devices, tls=tls)
    return (
        f"{count} parties in {out}, for one machine: whoever has this folder can read every answer, so "
        "parties on hosts of their own make their own keys with `privkd keys party`\n"
        f"run `privkd aggregator --config {out}/party-N.toml` for each\n"
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
        device_name(device)
    for host in hosts:
        host_name(host)
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
) -> Authority | None:
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
    authority = Authority.create(folder) if tls else None
    if authority is not None:
        for name in (CLOUD, *devices):
            authority.issue(folder, name, name=name)
    for rank, host in enumerate(hosts):
        name = f"party-{rank}"
        write_secret(folder / f"{name}.noise", noise_keys[rank] if noise_keys else os.urandom(KEY_BYTES))
        if authority is not None:
            authority.issue(folder, f"{name}.tls", name=name, hosts=[host])
        listen = address(host, port + rank if port else 0)
        settings = _party_settings(rank, parties, listen, public, tls=tls)
        if limits:
            settings["limits"] = dict(limits)
        (folder / f"{name}.toml").write_text(tomli_w.dumps(settings))
    return authority


def address(host: str, port: int) -> str:
    """``host:port``, an IPv6 address in brackets."""
    return joined(host_name(host), port)


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
        settings["tls"] = files | {"crl": "crl.pem"}
    return settings
