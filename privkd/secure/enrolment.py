"""How a group comes together on hosts of its own: each member makes its keys, and hands on what is public.

A party's folder holds ``party.toml``, ``sealing.key``, ``noise.key`` and ``party-N.key`` (its TLS key), none
of which leaves it, and two public files: the request ``party-N.csr`` for the authority, and ``member-N.toml``
for the other parties, who fill their members lists from it. Functions return what to do next, in words.
"""

import os
import re
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import tomli_w
from pydantic import Field, ValidationError, model_validator

from privkd.config import Settings
from privkd.errors import ConfigError
from privkd.journal import Journal
from privkd.privacy.noise import KEY_BYTES
from privkd.secure.addresses import parse_listen
from privkd.secure.authority import AUTHORITY_DAYS, Authority, approve
from privkd.secure.certificates import (
    CLOUD,
    Role,
    device_name,
    fingerprint,
    host_name,
    load_certificate,
    load_request,
    name_of,
    request,
    request_again,
)
from privkd.secure.keyfiles import make_folder, read_public, replace_public, write_secret
from privkd.secure.keys import address, create_sealing_key, load_sealing_key, public_hex
from privkd.secure.party import MAX_PARTIES, PartyConfig, load_party

_HEX = re.compile(r"[0-9a-f]{64}")


class Member(Settings):
    """What one party publishes of itself: ``member-N.toml``.

    Attributes:
        rank: which party.
        parties: number of aggregators in its group.
        third_party: whether the group has a third party, whose rank is ``parties``.
        key: its public sealing key, in hexadecimal.
        url: where its service is reached.
    """

    rank: Annotated[int, Field(ge=0, le=MAX_PARTIES)]
    parties: Annotated[int, Field(ge=2, le=MAX_PARTIES)]
    third_party: bool = False
    key: Annotated[str, Field(pattern=_HEX.pattern)]
    url: str

    @model_validator(mode="after")
    def _of_the_group(self) -> Self:
        if self.rank == self.parties and not self.third_party:
            raise ValueError(
                f"rank={self.rank} of {self.parties} aggregators is the third party's: add --third-party"
            )
        if self.rank > self.parties:
            raise ValueError(f"rank={self.rank}: expected 0 to {self.parties - 1}")
        return self

    def write(self, path: Path) -> None:
        """Write the file, over an older one."""
        replace_public(path, tomli_w.dumps(self.model_dump()).encode())


def load_member(path: Path) -> Member:
    """What a party published of itself.

    Raises:
        ConfigError: the file is none of `Member`.
    """
    return _member(_tree(path), str(path))


def _member(tree: Mapping[str, Any], source: str) -> Member:
    try:
        return Member.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(step) for step in first["loc"])
        words = first["msg"].removeprefix("Value error, ")
        raise ConfigError(": ".join(filter(None, (source, name, words)))) from None


def _tree(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_public(path).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


# ---- each member's own keys --------------------------------------------------------------------------


def make_party(
    folder: Path,
    *,
    rank: int,
    parties: int,
    third_party: bool,
    hosts: Sequence[str],
    port: int,
    listen: str | None = None,
) -> str:
    """Make one party's keys, its request and its ``party.toml``, whose members are left to fill.

    Args:
        folder: of this party alone.
        rank: which party it is; the third party's is ``parties``.
        parties: number of aggregators.
        third_party: whether the group has a third party.
        hosts: by which others reach it.
        port: of its service.
        listen: ``host:port`` to bind, where it is not the first of ``hosts``.

    Raises:
        ConfigError: a setting is out of range, or a key exists already.
    """
    if not hosts:
        raise ConfigError("hosts: give the address or the name by which others reach this party")
    if not 1 <= port <= 65535:
        raise ConfigError(f"port={port}: expected 1 to 65535")
    place = address(hosts[0], port)
    asked = {"rank": rank, "parties": parties, "third_party": third_party, "url": f"https://{place}"}
    _member({**asked, "key": "0" * 64}, "this party")
    for host in hosts:
        host_name(host)
    try:
        parse_listen("listen", listen or place)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if (folder / "party.toml").exists():
        raise ConfigError(f"{folder / 'party.toml'} exists already: name another folder")
    make_folder(folder)
    public = create_sealing_key(folder / "sealing.key")
    write_secret(folder / "noise.key", os.urandom(KEY_BYTES))
    name = f"party-{rank}"
    csr = request(name, folder, hosts)
    _member({**asked, "key": public}, "this party").write(folder / f"member-{rank}.toml")
    settings = {
        "rank": rank,
        "parties": parties,
        "listen": listen or place,
        "directory": "state",
        "sealing_key": "sealing.key",
        "noise_key": "noise.key",
        "members": [],
        "tls": {"certificate": f"{name}.pem", "key": f"{name}.key", "client_ca": "ca.pem", "crl": "crl.pem"},
    }
    replace_public(folder / "party.toml", tomli_w.dumps(settings).encode())
    return (
        f"public key of party {rank}: {public}\n"
        f"1. send {csr} to the authority, and tell it another way: {_fingerprint(csr)}\n"
        f"2. put {name}.pem, ca.pem and crl.pem, which come back, into {folder}\n"
        f"3. exchange {folder / f'member-{rank}.toml'} with the other parties, then run\n"
        f"   `privkd keys group MEMBER... --config {folder / 'party.toml'}`\n"
        "4. set [limits] max_rho and max_rho_total in party.toml, and [peers] host and port to where rank 0 "
        "waits for the others\n"
        f"5. run `privkd doctor --role aggregator --config {folder / 'party.toml'}`"
    )


def make_device(name: str, folder: Path) -> str:
    """Make a device's TLS key and its request, on the device.

    Raises:
        ConfigError: it may not have the name, or the key exists already.
    """
    return _client(request(device_name(name), folder))


def make_cloud(folder: Path, *, hosts: Sequence[str] = ()) -> str:
    """Make the cloud's TLS key and its request, on its host; ``hosts`` where it serves too.

    Raises:
        ConfigError: a host is wrong, or the key exists already.
    """
    return _client(request(CLOUD, folder, hosts))


def _client(csr: Path) -> str:
    return (
        f"send {csr} to the authority, and tell it another way: {_fingerprint(csr)}\n"
        f"put {csr.stem}.pem and ca.pem, which come back, into {csr.parent}"
    )


# ---- the authority -----------------------------------------------------------------------------------


def make_authority(folder: Path, *, days: int | None = None) -> str:
    """Make an authority.

    Raises:
        ConfigError: ``days`` is out of range, or there is one already.
    """
    made = Authority.create(folder, days=AUTHORITY_DAYS if days is None else days)
    return (
        f"authority in {folder}, until {made.certificate.not_valid_after_utc:%Y-%m-%d}: ca.key stays there; "
        "every member gets ca.pem, and every party crl.pem too"
    )


def approve_shown(
    csr: Path,
    authority: Path,
    *,
    role: str = "device",
    days: int | None = None,
    renew: bool = False,
    expected: str | None = None,
    ask: Callable[[str], bool] | None = None,
) -> str:
    """Approve a request once ``ask``, if any, said yes to who asks for what; both, in words.

    Raises:
        ConfigError: the answer was no, or as `approve`.
    """
    if role not in list(Role):
        raise ConfigError(f"role={role!r}: expected {', '.join(Role)}")
    asked = load_request(csr)
    if ask is not None and not ask(
        f"{asked.words}\nIs this the fingerprint that it told, and shall it have it?"
    ):
        raise ConfigError(f"{csr}: not approved")
    made = approve(csr, authority, role=Role(role), days=days, renew=renew, expected=expected)
    rest = f"ca.pem and crl.pem of {authority}" if asked.role is Role.PARTY else f"{authority / 'ca.pem'}"
    shown = f"{asked.words}\n" if ask is None else ""
    return f"{shown}hand back {made}, and {rest}"


def revoke(name: str, authority: Path) -> str:
    """Take back a member's certificates; what to do with the list.

    Raises:
        ConfigError: it has none.
        RunError: the journal is damaged.
    """
    count = Authority(authority).revoke(name)
    return (
        f"{count} of {name} revoked: put {authority / 'crl.pem'} over each party's, which reads it by itself"
    )


def add_device(name: str, folder: Path, authority: Path, *, days: int | None = None) -> str:
    """Enrol a device on the authority's own machine: its key, its certificate, and ``ca.pem``.

    Nobody else is touched: services know devices by the authority and by the roster of each round.

    Raises:
        ConfigError: as `request` and `approve`.
    """
    csr = request(device_name(name), folder)
    made = approve(csr, authority, days=days)
    replace_public(folder / f"{name}.pem", read_public(made))
    replace_public(folder / "ca.pem", read_public(authority / "ca.pem"))
    return f"{name} is enrolled: move {folder} to it, and leave no copy here"


def renew(certificate: Path, *, key: Path | None = None, hosts: Sequence[str] = ()) -> str:
    """Ask for a certificate anew, for the same key; it may be long expired.

    Raises:
        ConfigError: see `request_again`.
    """
    csr = request_again(certificate, key or certificate.with_suffix(".key"), hosts)
    role = load_request(csr).role
    with_role = "" if role is Role.DEVICE else f" --role {role}"
    return (
        f"send {csr} to the authority, which runs\n"
        f"  privkd keys approve {csr.name} --renew{with_role}\n"
        f"then put {name_of(load_certificate(certificate))}.pem, which comes back, over {certificate}, and "
        "have what uses it read it: a party on SIGHUP, all else when it is started again"
    )


def _fingerprint(csr: Path) -> str:
    return f"key fingerprint {fingerprint(load_request(csr).key)}"


# ---- the group ---------------------------------------------------------------------------------------


def group(members: Sequence[Path], *, config: Path, keys: Sequence[str] = ()) -> str:
    """Fill a party's members list from what the parties published; what it says now, in words.

    Ranks that are not given stay as they are, so that after one party's rotation its file alone is enough.

    Args:
        members: files ``member-N.toml``.
        config: the party's ``party.toml``.
        keys: further ones, as ``RANK=HEX``.

    Raises:
        ConfigError: the files are of different groups, a rank is missing or given twice, or this party's own
            key is another.
    """
    tree = _tree(config)
    published = [load_member(path) for path in members]
    given = _given(published, keys)
    rank, parties = tree.get("rank"), tree.get("parties")
    if not isinstance(rank, int) or not isinstance(parties, int) or "sealing_key" not in tree:
        raise ConfigError(f"{config}: expected a party's settings, as `privkd keys party` writes them")
    own = public_hex(load_sealing_key(config.parent / str(tree["sealing_key"])))
    if given.setdefault(rank, own) != own:
        raise ConfigError(f"rank {rank} is this party itself, and its public key is {own}")
    if any(member.parties != parties for member in published):
        raise ConfigError(f"{config}: a group of {parties} aggregators, and a member's file says otherwise")
    before = dict(enumerate(map(str, tree.get("members", ()))))
    listed = _listed({**before, **given}, parties, {member.third_party for member in published})
    _rewrite(config, members=listed)
    lines = [f"  {i} {key}{'' if before.get(i) == key else '  (new)'}" for i, key in enumerate(listed)]
    return "\n".join(["members by rank, to be compared with what each party says of itself:", *lines])


def aggregators_table(members: Sequence[Path]) -> str:
    """The table ``[aggregators]`` of the cloud's and of devices' settings: TOML, the third party's url last.

    Raises:
        ConfigError: the files are not those of one whole group.
    """
    published = sorted((load_member(path) for path in members), key=lambda member: member.rank)
    given = _given(published, ())
    parties, third = published[0].parties, {member.third_party for member in published}
    if len({member.parties for member in published}) > 1:
        raise ConfigError("members: these files are of groups of different sizes")
    listed = _listed(given, parties, third)
    table = {
        "urls": [member.url for member in published],
        "keys": listed[:parties],
        "ca": "ca.pem",
        "certificate": f"{CLOUD}.pem",
        "key": f"{CLOUD}.key",
    }
    return tomli_w.dumps({"aggregators": table}) + "# A device puts its own name for cloud.\n"


def _given(published: Sequence[Member], keys: Sequence[str]) -> dict[int, str]:
    """The public key of each rank that is named."""
    found = [(member.rank, member.key) for member in published]
    for text in keys:
        rank, _, key = text.partition("=")
        if not (rank.isascii() and rank.isdigit() and len(rank) < 3) or not _HEX.fullmatch(key):
            raise ConfigError(f"member {text!r}: expected RANK=KEY, the key in 64 hexadecimal digits")
        found.append((int(rank), key))
    if not found:
        raise ConfigError("members: name the parties' member-N.toml, or give --member RANK=KEY")
    given = dict(found)
    if len(given) != len(found):
        raise ConfigError("members: a rank is given twice")
    return given


def _listed(given: Mapping[int, str], parties: int, third_party: set[bool]) -> list[str]:
    """Keys by rank, if they are those of one whole group."""
    if len(third_party) > 1:
        raise ConfigError("members: some files are of a group with a third party, some of one without")
    third = third_party == {True} or (not third_party and parties in given)
    missing = [rank for rank in range(parties + third) if rank not in given]
    if missing:
        raise ConfigError(f"members: rank {missing[0]} is missing; give its member-{missing[0]}.toml")
    if len(given) > parties + third:
        raise ConfigError(f"members: rank {max(given)} is none of this group")
    listed = [given[rank] for rank in range(parties + third)]
    if len(set(listed)) < len(listed):
        raise ConfigError("members: two ranks have one key")
    return listed


def rotate(config: Path) -> str:
    """Give a party a new sealing key beside the old one; what is to be done then, in words.

    Raises:
        ConfigError: a round is open under the old key, or the settings cannot be changed.
        RunError: the party's journal is damaged.
    """
    party = load_party(config)
    _check_none_open(party)
    old = public_hex(load_sealing_key(party.sealing_key))
    fresh = _next(party.sealing_key)
    public = create_sealing_key(fresh)
    named = Path(_tree(config)["sealing_key"]).with_name(fresh.name)
    members = [public if key == old else key for key in party.members]
    _rewrite(config, sealing_key=str(named), members=members)
    published = config.parent / f"member-{party.rank}.toml"
    handed = f"--member {party.rank}={public}"
    if published.exists():
        load_member(published).model_copy(update={"key": public}).write(published)
        handed = str(published)
    return (
        f"public key of party {party.rank}: {public}\nwas: {old}\n"
        f"1. each other party runs `privkd keys group {handed} --config party.toml`\n"
        "2. the cloud and every device put the new key into [aggregators] keys; the cloud publishes its next "
        "run with it, as a run is bound to the keys that it was published with\n"
        "3. start the services again, all in one pause between runs\n"
        f"4. delete {party.sealing_key} then: whoever has it can read what was sealed to it"
    )


def _check_none_open(party: PartyConfig) -> None:
    """Raise ``ConfigError`` where a round that the old key opens may still be closed."""
    open_until: dict[str, float] = {}
    for record in Journal(party.directory / "journal.jsonl"):
        match record.get("event"):
            case "opened":
                open_until[record["round"]] = record["terms"]["expires"]
            case "posted" | "failed" | "abandoned":
                open_until.pop(record["round"], None)
    left = max(open_until.values(), default=0.0) - time.time()
    if left > 0:
        raise ConfigError(
            f"{party.directory}: a round is open for another {left / 60:.0f} minutes, and was sealed to the "
            "old key: close it, or wait"
        )


def _next(key: Path) -> Path:
    """A name for the key that follows ``key``: ``sealing.key``, ``sealing-2.key``, and so on."""
    stem = re.sub(r"-\d+$", "", key.stem)
    number = 2
    while (found := key.with_name(f"{stem}-{number}{key.suffix}")).exists():
        number += 1
    return found


def _rewrite(config: Path, **settings: str | list[str]) -> None:
    """Change top-level settings of a ``party.toml`` and nothing else of it, not its comments either.

    Raises:
        ConfigError: the outcome would be no party's settings; the file is as it was.
    """
    text = read_public(config).decode()
    wanted = {**_tree(config), **settings}
    for name, value in settings.items():
        written = tomli_w.dumps({name: value}).rstrip("\n")
        pattern = rf"^[ \t]*{name}[ \t]*=[ \t]*(\[[^\]]*\]|\"[^\"\n]*\"|'[^'\n]*')"
        # Keys and names of files have no backslash but by a mistake, which the comparison below finds.
        text = re.sub(pattern, written.replace("\\", r"\\"), text, count=1, flags=re.MULTILINE)
    try:
        same = tomllib.loads(text) == wanted
    except tomllib.TOMLDecodeError:
        same = False
    if not same:
        words = "; ".join(f"{name} = {value!r}" for name, value in settings.items())
        raise ConfigError(f"{config}: cannot be changed by itself; write into it: {words}")
    trial = config.with_name(f".{config.name}.new")
    replace_public(trial, text.encode())
    try:
        load_party(trial)
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(trial), str(config))) from None
    finally:
        trial.unlink(missing_ok=True)
    replace_public(config, text.encode())
