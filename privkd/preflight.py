"""A preflight for one role of a group: what of its files, its peers and its machine would stop a round.

It changes nothing, and prints no secret. The role's file is ``party.toml`` for an aggregator; the cloud's and
a device's have a table ``[aggregators]``::

    [aggregators]
    urls = ["https://a.example:8440", "https://b.example:8440"]     # by rank, the third party's last
    keys = ["9f..", "07.."]           # the aggregators' public keys by rank
    ca = "ca.pem"                     # relative to this file
    certificate = "device-0.pem"
    key = "device-0.key"
"""

import shutil
import socket
import ssl
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from pydantic import BaseModel, Field, ValidationError

from privkd.doctor import Finding, print_findings
from privkd.errors import ConfigError, PrivkdError
from privkd.secure.addresses import is_loopback, joined
from privkd.secure.certificates import (
    WARNING_DAYS,
    Role,
    check_validity,
    days_left,
    hosts_of,
    load_certificate,
    load_identity,
    name_of,
    role_of,
)
from privkd.secure.client import ClientTls, service_links
from privkd.secure.keyfiles import read_public
from privkd.secure.keys import load_noise_key, load_sealing_key, public_hex
from privkd.secure.party import PartyConfig, TlsConfig, load_party
from privkd.secure.revocation import RevocationList

ROLES = ("aggregator", "device", "cloud")
_WORDS = {True: ("broken", "red"), False: ("warning", "yellow")}
_SECONDS = 5.0
_ALERT_SECONDS = 0.5
_MOST_SKEW = 60.0
_LEAST_DISK = 1 << 30
_PACKAGES = {"aggregator": ("torch", "crypten"), "device": ("torch", "opacus"), "cloud": ("torch",)}


def preflight_command(role: str, config: Path | None, *, peers: Sequence[str] = (), as_json: bool) -> int:
    """Print what `preflight` finds; the exit code: 1 where something would stop a round.

    Raises:
        ConfigError: there is no such role, or no file was named.
    """
    if role not in ROLES:
        raise ConfigError(f"role={role!r}: expected {', '.join(ROLES)}")
    if config is None:
        raise ConfigError(f"--role {role} needs --config: the settings of this {role}, as TOML")
    return print_findings(
        preflight(role, config, peers=peers),
        as_json=as_json,
        words=_WORDS,
        bad="A round would fail: mend what is broken above.",
        good="Ready for a round.",
    )


def preflight(role: str, config: Path, *, peers: Sequence[str] = ()) -> list[Finding]:
    """Look at everything that a role needs for a round.

    Args:
        role: one of `ROLES`.
        config: its file.
        peers: an aggregator's other parties' addresses, which its file does not name.
    """
    try:
        findings = list(_aggregator(config, peers) if role == "aggregator" else _client(role, config))
    except PrivkdError as error:
        findings = [_finding("settings", str(error), f"mend {config}")]
    return [*findings, *_machine(role, config.resolve().parent)]


def _finding(name: str, found: str, cure: str = "", *, required: bool = True) -> Finding:
    return Finding(name, " ".join(found.split()), cure, "", required)


def _tried(name: str, look: Callable[[], str], cure: str, *, required: bool = True) -> Finding:
    try:
        return _finding(name, look())
    except PrivkdError as error:
        return _finding(name, str(error), cure, required=required)


# ---- an aggregator -----------------------------------------------------------------------------------


def _aggregator(config: Path, peers: Sequence[str]) -> Iterator[Finding]:
    party = load_party(config)
    yield _finding("settings", f"{config}: {party.name} of {len(party.members)} parties")
    yield _tried("sealing key", lambda: _sealing(party), "restore the key, or run `privkd keys group` anew")
    yield _tried(
        "noise key",
        lambda: f"{party.noise_key}: {8 * len(load_noise_key(party.noise_key))} bits",
        "restore it, or make the party's keys anew",
    )
    if party.tls is None:
        yield _finding("certificate", "none: on the loopback interface alone")
    else:
        yield from _identity(party.tls.certificate, party.tls.key, party.tls.client_ca)
        yield from _served(party, party.tls)
    yield _limits(party)
    yield _rendezvous(party)
    reached = [_own(party), *(_Peer.at(url, _party_tls(party)) for url in peers)]
    for peer in reached:
        yield peer.finding(party.members)
    ranks = {peer.rank for peer in reached}
    if peers and not set(range(len(party.members))) <= ranks:
        lacking = sorted(set(range(len(party.members))) - ranks)
        words = f"rank {', '.join(map(str, lacking))} did not answer"
        yield _finding("group", words, "start those services, and name each with --peer")
    elif peers:
        yield _finding("group", f"all {len(party.members)} parties answer")
    else:
        yield _finding("group", "the others were not asked", "name each with --peer URL", required=False)
    yield _clock(reached)


def _sealing(party: PartyConfig) -> str:
    own, listed = public_hex(load_sealing_key(party.sealing_key)), party.members[party.rank]
    if own != listed:
        raise ConfigError(f"{party.sealing_key} is of {own}, but members[{party.rank}] is {listed}")
    return f"{party.sealing_key}: {own}"


def _served(party: PartyConfig, tls: TlsConfig) -> Iterator[Finding]:
    """Whether the certificate and the list of revoked ones fit this party's service."""
    with suppress(PrivkdError):
        found = load_certificate(tls.certificate)
        wanted, name, host = f"party-{party.rank}", name_of(found), party.address[0]
        cure = f"ask again with `privkd keys renew {tls.certificate} --host {host}`"
        if name != wanted:
            yield _finding("name", f"the certificate is {name}'s, and this is {wanted}", f"take {wanted}'s")
        if not _is_unspecified(host) and host not in hosts_of(found):
            words = f"the certificate is for {', '.join(hosts_of(found))}, and it listens on {host}"
            yield _finding("hosts", words, cure, required=False)
    ca = tls.client_ca
    if ca is None:
        words = "clients show no certificates: whoever reaches it can open and close rounds"
        yield _finding("clients", words, "set tls.client_ca")
    elif tls.crl is None:
        words = "no list: who was revoked is still let in"
        yield _finding("revoked", words, "set tls.crl to the authority's crl.pem", required=False)
    else:
        crl = tls.crl
        yield _tried(
            "revoked", lambda: _revoked(crl, ca, tls.certificate), "take the authority's crl.pem anew"
        )


def _revoked(crl: Path, ca: Path, certificate: Path) -> str:
    held = RevocationList(crl, ca)
    if held.revoked(read_public(certificate)):
        raise ConfigError(f"{certificate} is revoked itself: ask the authority for another")
    return f"{crl}: {len(held)} certificates"


def _limits(party: PartyConfig) -> Finding:
    unset = [name for name in ("max_rho", "max_rho_total") if getattr(party.limits, name) is None]
    if unset:
        words = f"no {' and no '.join(unset)}: a cloud can ask the same device for ever"
        return _finding("limits", words, "set them under [limits]", required=False)
    return _finding("limits", f"rho {party.limits.max_rho} a round, {party.limits.max_rho_total} a device")


def _rendezvous(party: PartyConfig) -> Finding:
    host, cure = party.peers.host, "set [peers] host to rank 0's address, as the other parties reach it"
    if is_loopback(host) and not is_loopback(party.address[0]):
        words = f"rank 0 is {host}, which is this host's own: right on one machine alone"
        return _finding("peers", words, cure, required=False)
    return _tried("peers", lambda: f"rank 0 at {_resolved(host)}", cure)


def _party_tls(party: PartyConfig) -> ClientTls | None:
    tls = party.tls
    if tls is None or tls.client_ca is None:
        return None
    return ClientTls(tls.client_ca, tls.certificate, tls.key)


def _own(party: PartyConfig) -> "_Peer":
    """This party's own service, as others would reach it."""
    host, port = party.address
    if _is_unspecified(host):
        names: tuple[str, ...] = ()
        if party.tls is not None:
            with suppress(PrivkdError):
                names = hosts_of(load_certificate(party.tls.certificate))
        host = names[0] if names else "127.0.0.1"
    url = f"{'http' if party.tls is None else 'https'}://{joined(host, port)}"
    if port == 0:
        return _Peer(url, fault="it takes any port, which nobody can know", cure="set a port in listen")
    cure = "start it: `privkd aggregator --config party.toml`"
    return _Peer.at(url, _party_tls(party), start=cure, required=False)


# ---- the cloud and devices ---------------------------------------------------------------------------


class _Aggregators(BaseModel):
    """The table ``[aggregators]``; see the module."""

    urls: tuple[str, ...] = Field(min_length=1)
    keys: tuple[str, ...] = Field(min_length=2)
    ca: Path
    certificate: Path
    key: Path


def _client(role: str, config: Path) -> Iterator[Finding]:
    table = _aggregators(config)
    folder = config.resolve().parent
    ca, certificate, key = (folder / path for path in (table.ca, table.certificate, table.key))
    yield _finding("settings", f"{config}: {len(table.urls)} services, {len(table.keys)} pinned keys")
    yield from _identity(certificate, key, ca)
    with suppress(PrivkdError):
        name = name_of(load_certificate(certificate))
        if role_of(name) is not Role(role):
            yield _finding("name", f"{name!r} is that of a {role_of(name)}", f"take a {role}'s certificate")
    tls = ClientTls(ca, certificate, key)
    # A device has nothing to say to the third party.
    needed = table.urls if role == "cloud" else table.urls[: len(table.keys)]
    reached = [_Peer.at(url, tls) for url in needed]
    for peer in reached:
        yield peer.finding(table.keys)
    yield _group(table, reached)
    yield _clock(reached)


def _aggregators(config: Path) -> _Aggregators:
    try:
        tree = tomllib.loads(read_public(config).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{config} is not TOML: {error}") from None
    try:
        return _Aggregators.model_validate(tree.get("aggregators", {}))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(("aggregators", *map(str, first["loc"])))
        raise ConfigError(f"{config}: {name}: {first['msg']}; `privkd keys group` prints it") from None


def _group(table: _Aggregators, needed: "Sequence[_Peer]") -> Finding:
    """Whether the services that are ``needed`` belong to one group, which the table names whole."""
    silent = [peer.url for peer in needed if not peer.facts]
    if silent:
        words = f"not known: {len(silent)} of {len(needed)} did not say who they are"
        return _finding("group", words, "mend those first")
    sizes = {(peer.facts["parties"], peer.facts["members"]) for peer in needed if peer.facts}
    if len(sizes) > 1:
        return _finding("group", "the services are of different groups", "take the urls of one group")
    ((parties, members),) = sizes
    if parties != len(table.keys):
        words = f"{parties} aggregators, and {len(table.keys)} pinned keys"
        return _finding("group", words, "pin each aggregator's key, by rank")
    ranks = [peer.rank for peer in needed]
    if ranks != list(range(len(needed))):
        words = f"the urls are of rank {', '.join(map(str, ranks))}"
        return _finding("group", words, "name every party once in urls, by rank, the third party last")
    if len(table.urls) != members:
        words = f"a group of {members}, and {len(table.urls)} urls"
        return _finding("group", words, "name the third party last in urls")
    return _finding("group", f"{parties} aggregators{' and the third party' if members > parties else ''}")


# ---- what roles share --------------------------------------------------------------------------------


def _identity(certificate: Path, key: Path, ca: Path | None) -> Iterator[Finding]:
    """The role's own certificate: key, validity, authority."""
    cure = f"run `privkd keys renew {certificate}`, or put back the key that belongs to it"
    yield _tried("certificate", lambda: _own_certificate(certificate, key), cure)
    with suppress(PrivkdError):
        ends = days_left(load_certificate(certificate))
        if 0 < ends < WARNING_DAYS:
            cure = f"run `privkd keys renew {certificate}`"
            yield _finding("expiry", f"it ends in {ends:.0f} days", cure, required=False)
    if ca is not None:
        cure = "take ca.pem of the authority that approved it"
        yield _tried("authority", lambda: _issued(certificate, ca), cure)


def _own_certificate(certificate: Path, key: Path) -> str:
    load_identity(certificate, key)
    found = load_certificate(certificate)
    return f"{certificate}: {name_of(found)}, another {days_left(found):.0f} days"


def _issued(certificate: Path, ca: Path) -> str:
    found, authority = load_certificate(certificate), load_certificate(ca)
    check_validity(authority, ca)
    try:
        found.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise ConfigError(f"{certificate} was not approved by the authority of {ca}") from None
    return f"{ca}: another {days_left(authority):.0f} days"


@dataclass(frozen=True)
class _Peer:
    """A party's service, and what came of reaching it.

    Attributes:
        url: where it is.
        facts: what it says of itself, also its ``version``, and by how many seconds its clock is ``ahead``;
            nothing where it was not reached.
        days: until its certificate ends.
        fault: why it was not reached.
        cure: what mends that.
        required: whether a round needs it now.
    """

    url: str
    facts: Mapping[str, Any] | None = None
    days: float | None = None
    fault: str = ""
    cure: str = ""
    required: bool = True

    @classmethod
    def at(cls, url: str, tls: ClientTls | None, *, start: str = "", required: bool = True) -> "_Peer":
        """Reach a service as a round would: a connection, TLS both ways, who it is."""
        cure = start or "start that service, or let this host through to its port"
        try:
            parts = urlsplit(url)
            place = parts.hostname or "", parts.port or 0
            _resolved(place[0])
            days = None
            with closing(socket.create_connection(place, _SECONDS)) as connection:
                if parts.scheme in ("https", "grpcs") and tls is not None:
                    cure = "see who approved which certificate: `privkd keys show` on both sides"
                    days, required = _handshake(connection, place[0], tls), True
            (link,) = service_links([url], tls)
            with closing(link):
                facts = dict(link.about(time.monotonic() + _SECONDS))
        except ssl.SSLCertVerificationError as error:
            return cls(url, fault=f"its certificate is not trusted ({error.verify_message})", cure=cure)
        except ssl.SSLError as error:
            return cls(url, fault=f"it refuses this certificate ({error.reason})", cure=cure)
        except (OSError, ValueError, PrivkdError) as error:
            return cls(url, fault=str(error).removeprefix(f"{url}: "), cure=cure, required=required)
        return cls(url, facts, days)

    @property
    def rank(self) -> int:
        """Its rank; -1 where it was not reached."""
        return -1 if self.facts is None else int(self.facts["rank"])

    def finding(self, pins: Sequence[str]) -> Finding:
        """What to say of it, its key held to ``pins`` by rank."""
        if self.facts is None:
            return _finding(self.url, self.fault, self.cure, required=self.required)
        key, rank = str(self.facts["key"]), self.rank
        if rank < len(pins) and key != pins[rank]:
            words = f"rank {rank} says that its key is {key}, but {pins[rank]} is pinned"
            return _finding(self.url, words, "ask that party, by another way, which key is its own")
        if self.days is not None and self.days < WARNING_DAYS:
            words = f"rank {rank}; its certificate ends in {self.days:.0f} days"
            return _finding(self.url, words, "have that party run `privkd keys renew`", required=False)
        theirs, ours = self.facts["version"], _version("privkd")
        if theirs != ours:
            words = f"rank {rank} runs privkd {theirs}, and here it is {ours}"
            return _finding(self.url, words, "run the same version on all hosts", required=False)
        whose = "key as pinned" if rank < len(pins) else "the third party"
        days = "" if self.days is None else f", certificate for another {self.days:.0f} days"
        return _finding(self.url, f"rank {rank}, {whose}{days}")


def _handshake(connection: socket.socket, host: str, tls: ClientTls) -> float:
    """Shake hands, and wait whether the other side takes our certificate; days until its own ends."""
    context = tls.context()
    context.set_alpn_protocols(["h2", "http/1.1"])
    with context.wrap_socket(connection, server_hostname=host) as secured:
        shown = secured.getpeercert(binary_form=True)
        secured.settimeout(_ALERT_SECONDS)
        # TLS 1.3 tells a client that it is refused only after the handshake.
        with suppress(TimeoutError):
            secured.recv(1)
    return days_left(x509.load_der_x509_certificate(shown or b""))


def _clock(reached: "Sequence[_Peer]") -> Finding:
    now = f"here it is {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    skews = {peer.url: float(peer.facts["ahead"]) for peer in reached if peer.facts}
    if not skews:
        return _finding("clock", f"{now}; no peer told its own")
    url, worst = max(skews.items(), key=lambda item: abs(item[1]))
    if abs(worst) > _MOST_SKEW:
        words = f"{now}; that of {url} is {abs(worst):.0f} s {'ahead' if worst > 0 else 'behind'}"
        return _finding("clock", words, "set both by NTP: rounds and certificates end by the clock")
    return _finding("clock", f"{now}; peers within {abs(worst):.0f} s")


def _machine(role: str, folder: Path) -> Iterator[Finding]:
    """Versions and disk."""
    found = {"privkd": _version("privkd")} | {name: _version(name) for name in _PACKAGES[role]}
    missing = [name for name, number in found.items() if number is None]
    words = ", ".join(f"{name} {number or 'missing'}" for name, number in found.items())
    yield _finding("versions", words, "run `privkd doctor --fix`" if missing else "")
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield _finding("disk", f"{folder}: {error.strerror}", f"make {folder}")
        return
    cure = "" if free >= _LEAST_DISK else "make room: what a disk cannot hold is refused"
    yield _finding("disk", f"{free / (1 << 30):.1f} GiB free for {folder}", cure)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _resolved(host: str) -> str:
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        raise ConfigError(f"no address is known for {host!r}") from None
    return host


def _is_unspecified(host: str) -> bool:
    return host in ("", "0.0.0.0", "::")
