"""Keys made by each member for itself: enrolment, renewal, revocation, rotation, and the preflight over all.

Each member has a folder of its own, and only what is public is copied from one to another, as people would.
"""

import base64
import contextlib
import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import pytest
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from fuzzing import damaged, fuzzed
from hosts import PARTIES, Hosts, done, enrolled, free_ports, privkd, secret_places
from hypothesis import given
from hypothesis import strategies as st

from privkd.errors import ChannelError, ConfigError
from privkd.journal import Journal
from privkd.secure import certificates
from privkd.secure.authority import Authority, approve
from privkd.secure.certificates import Role, fingerprint, load_certificate, load_request, request, role_of
from privkd.secure.client import ClientTls, ServiceLink, service_links
from privkd.secure.enrolment import approve_shown
from privkd.secure.inventory import inventory
from privkd.secure.party import load_party
from privkd.secure.revocation import RevocationList

MEMBERS = {
    "a": "party-0",
    "b": "party-1",
    "t": "party-2",
    "cloud": "cloud",
    "d0": "device-0",
    "d1": "device-1",
}
SECRETS = (".key", ".noise")
T = TypeVar("T")


def refused(words: str, *arguments: object) -> None:
    """One line, exit code 2, no traceback."""
    answer = privkd(*arguments)
    assert answer.code == 2, answer
    assert len(answer.err.splitlines()) == 1, answer.err
    assert re.search(words, answer.err), answer.err


def enrol(base: Path) -> Path:
    """Two aggregators, a third party, the cloud and two devices, step by step; the folder of folders."""
    done("keys", "authority", "--out", base / "ca")
    for rank, (folder, port) in enumerate(zip("abt", free_ports(3), strict=True)):
        place = ("--host", "127.0.0.1", "--host", "localhost", "--port", port)
        done("keys", "party", "--out", base / folder, "--rank", rank, "--third-party", *place)
    done("keys", "cloud", "--out", base / "cloud")
    for folder in ("d0", "d1"):
        done("keys", "device", MEMBERS[folder], "--out", base / folder)
    for folder, name in MEMBERS.items():
        asked = base / "ca" / f"{name}.csr"
        shutil.copy(base / folder / asked.name, asked)
        told = fingerprint(load_request(asked).key)
        told_to = ("--authority", base / "ca", "--fingerprint", told)
        out = done("keys", "approve", asked, *told_to, "--role", role_of(name))
        assert told in out
        for public in (
            base / "ca" / "issued" / f"{name}.pem",
            base / "ca" / "ca.pem",
            base / "ca" / "crl.pem",
        ):
            shutil.copy(public, base / folder)
    published = [base / folder / f"member-{rank}.toml" for rank, folder in enumerate("abt")]
    for folder in "abt":
        done("keys", "group", *published, "--config", base / folder / "party.toml")
    table = tomllib.loads(done("keys", "group", *published))["aggregators"]
    for folder in ("cloud", "d0", "d1"):
        name = MEMBERS[folder]
        own = {**table, "certificate": f"{name}.pem", "key": f"{name}.key"}
        (base / folder / "settings.toml").write_text(tomli_w.dumps({"aggregators": own}))
    return base


@contextlib.contextmanager
def serving(base: Path, folders: str = "abt") -> Iterator[None]:
    """The parties' services, as processes of the real command."""
    processes = []
    try:
        for folder in folders:
            command = [
                sys.executable,
                "-m",
                "privkd",
                "aggregator",
                "--config",
                str(base / folder / "party.toml"),
            ]
            processes.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        for process in processes:
            assert process.stdout is not None
            assert "listens on" in process.stdout.readline(), process.stderr
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.communicate(timeout=30)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    base = enrol(tmp_path_factory.mktemp("group"))
    with serving(base):
        yield base


def url(base: Path, folder: str) -> str:
    return "https://{}:{}".format(*load_party(base / folder / "party.toml").address)


def tls(base: Path, folder: str) -> ClientTls:
    own, name = base / folder, MEMBERS[folder]
    return ClientTls(own / "ca.pem", own / f"{name}.pem", own / f"{name}.key")


def about(address: str, shown: ClientTls, seconds: float = 10.0) -> Mapping[str, object]:
    (link,) = service_links([address], shown)
    with contextlib.closing(link):
        return link.about(time.monotonic() + seconds)


def without_more(base: Path, tmp_path: Path) -> Path:
    """A copy of the group, to be changed."""
    return Path(shutil.copytree(base, tmp_path / "group"))


# ---- enrolment ---------------------------------------------------------------------------------------


def test_the_members_of_an_enrolled_group_answer_each_other(group: Path) -> None:
    members = load_party(group / "a" / "party.toml").members
    for folder in ("cloud", "d0", "d1", "b"):
        for rank, party in enumerate("abt"):
            facts = about(url(group, party), tls(group, folder))
            assert (facts["rank"], facts["parties"], facts["members"]) == (rank, 2, 3)
            assert facts["key"] == members[rank]


def test_no_private_key_leaves_its_folder(group: Path) -> None:
    """Nor does a part of one."""
    places = secret_places(group)
    # An authority's; a sealing, a noise and a TLS key of each party; one of each other member.
    assert len(places) == 1 + 3 * 3 + 3
    assert all(found == {secret.parent} for secret, found in places.items())


def test_a_device_is_added_and_no_party_is_touched(group: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for folder in "abt" for path in (group / folder).glob("*.*")}
    done("keys", "add-device", "late", "--out", tmp_path / "late", "--authority", group / "ca")
    own = tmp_path / "late"
    facts = about(url(group, "a"), ClientTls(own / "ca.pem", own / "late.pem", own / "late.key"))
    assert facts["rank"] == 0
    assert {path: path.read_bytes() for path in before} == before


def test_certificates_of_another_authority_are_refused(group: Path, tmp_path: Path) -> None:
    """A stranger with an authority of its own takes the name of the cloud, or of a party."""
    done("keys", "authority", "--out", tmp_path / "ca")
    done("keys", "cloud", "--out", tmp_path)
    approve(tmp_path / "cloud.csr", tmp_path / "ca", role=Role.CLOUD)
    foreign = tmp_path / "ca" / "issued" / "cloud.pem"
    with pytest.raises(ChannelError):
        about(url(group, "a"), ClientTls(group / "cloud" / "ca.pem", foreign, tmp_path / "cloud.key"), 3.0)
    with pytest.raises(ChannelError, match="not trusted"):
        about(url(group, "a"), ClientTls(tmp_path / "ca" / "ca.pem"), 3.0)


def test_a_certificate_with_another_key_is_refused(group: Path) -> None:
    crossed = ClientTls(group / "d0" / "ca.pem", group / "d0" / "device-0.pem", group / "d1" / "device-1.key")
    with pytest.raises(ConfigError, match="not the key of"):
        about(url(group, "a"), crossed)


def expired(base: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have a member's certificate be one that ended a minute ago."""
    name = MEMBERS[folder]
    with monkeypatch.context() as patch:
        patch.setattr(Authority, "_until", lambda *_: datetime.now(UTC) - timedelta(minutes=1))
        made = Authority(base / "ca").approve(
            load_request(base / folder / f"{name}.csr"), role=role_of(name), renew=True
        )
    shutil.copy(made, base / folder)
    return base / folder / made.name


def sent_away(base: Path, own: Path, certificate: Path) -> bool:
    """Whether a service ends the connection with a client that shows a certificate, before it answers."""
    context = ssl.create_default_context(cafile=str(own / "ca.pem"))
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    place = load_party(base / "a" / "party.toml").address
    try:
        with context.wrap_socket(socket.create_connection(place, 5), server_hostname=place[0]) as connection:
            connection.settimeout(5)
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            return not connection.recv(1)
    except TimeoutError:
        return False
    except OSError:
        return True


def test_an_expired_certificate_is_refused_on_both_sides(
    group: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = without_more(group, tmp_path)
    old = expired(copy, "d0", monkeypatch)
    with pytest.raises(ConfigError, match=r"expired on .* run `privkd keys renew"):
        about(url(group, "a"), tls(copy, "d0"))
    refused("device-0 expired on", "keys", "show", old)
    assert sent_away(group, copy / "d0", old), "a client that shows it all the same"
    assert not sent_away(group, group / "d0", group / "d0" / old.name), "the twin"
    expired(copy, "a", monkeypatch)
    refused("party-0 expired on", "aggregator", "--config", copy / "a" / "party.toml")


def test_a_revoked_device_is_refused_at_once(group: Path, tmp_path: Path) -> None:
    own = tmp_path / "lost"
    done("keys", "add-device", "lost", "--out", own, "--authority", group / "ca")
    shown = ClientTls(own / "ca.pem", own / "lost.pem", own / "lost.key")
    assert about(url(group, "b"), shown)["rank"] == 1
    assert "1 of lost revoked" in done("keys", "revoke", "lost", "--authority", group / "ca")
    assert about(url(group, "b"), shown)["rank"] == 1, "until the party has the list"
    shutil.copy(group / "ca" / "crl.pem", group / "b")
    with pytest.raises(ChannelError, match="revoked"):
        about(url(group, "b"), shown, 3.0)
    assert about(url(group, "b"), tls(group, "d0"))["rank"] == 1
    pinned = (group / "d0" / "settings.toml").read_text().replace("device-0", "lost")
    (own / "settings.toml").write_text(pinned)
    code, found = preflight("device", own / "settings.toml")
    assert code == 1
    assert "this certificate was revoked" in str(found[url(group, "b")]["found"])
    refused("no certificate of .* that holds", "keys", "revoke", "lost", "--authority", group / "ca")


def test_the_page_for_three_hosts_is_followed_to_the_letter(tmp_path: Path) -> None:
    """Its sections 1 to 5; the rest of it takes processes, and is followed in a test of its own."""
    found = enrolled(Hosts(tmp_path), lambda letter: ("--host", f"{letter}.example"), {})["aggregators"]
    parties = [load_party(tmp_path / letter / "party" / "party.toml") for letter in PARTIES]
    assert len({party.members for party in parties}) == 1
    assert [(party.rank, party.limits.minimum_devices, party.peers.port) for party in parties] == [
        (rank, 4, 8450) for rank in range(3)
    ]
    assert tuple(found["keys"]) == parties[0].members[:2]
    assert found["urls"] == [f"https://{letter}.example:8440" for letter in PARTIES]


# ---- the authority -----------------------------------------------------------------------------------


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    Authority.create(tmp_path / "ca")
    return tmp_path / "ca"


def test_a_name_has_one_certificate_and_only_its_key_is_renewed(authority: Path, tmp_path: Path) -> None:
    first = request("box", tmp_path / "one")
    other = request("box", tmp_path / "two")
    old = load_certificate(approve(first, authority, days=30))
    command = ("--authority", authority)
    refused("box has a certificate until .*--renew", "keys", "approve", first, *command)
    refused("asks with another key", "keys", "approve", other, *command, "--renew")
    shutil.copy(authority / "issued" / "box.pem", tmp_path / "one")
    done("keys", "renew", tmp_path / "one" / "box.pem")
    done("keys", "approve", first, *command, "--renew")
    new = load_certificate(authority / "issued" / "box.pem")
    assert fingerprint(new.public_key()) == fingerprint(old.public_key())
    assert new.not_valid_after_utc > old.not_valid_after_utc + timedelta(days=300)
    assert "2 of box revoked" in done("keys", "revoke", "box", *command)
    held = RevocationList(authority / "crl.pem", authority / "ca.pem")
    assert all(held.revoked(found.public_bytes(serialization.Encoding.PEM)) for found in (old, new))
    assert held.revoked(old.public_bytes(serialization.Encoding.DER))
    done("keys", "approve", other, *command)
    latest = load_certificate(authority / "issued" / "box.pem")
    assert not held.revoked(latest.public_bytes(serialization.Encoding.PEM))
    assert [found.revoked for found in Authority(authority).issued] == [True, True, False]


@pytest.mark.parametrize(("name", "role"), [("cloud", Role.CLOUD), ("party-1", Role.PARTY)])
def test_nobody_becomes_more_than_the_approver_means(
    authority: Path, tmp_path: Path, name: str, role: Role
) -> None:
    asked = request(name, tmp_path, ["10.0.0.5"])
    refused(f"{name} is the name of a {role}", "keys", "approve", asked, "--authority", authority)
    refused("role='king'", "keys", "approve", asked, "--authority", authority, "--role", "king")
    assert not (authority / "issued").exists()
    assert Authority(authority).issued == []
    done("keys", "approve", asked, "--authority", authority, "--role", role)


def test_names_that_look_alike_are_one(authority: Path, tmp_path: Path) -> None:
    approve(request("Box", tmp_path / "one"), authority)
    with pytest.raises(ConfigError, match="Box has a certificate"):
        approve(request("box", tmp_path / "two"), authority)
    with pytest.raises(ConfigError, match="another key"):
        approve(tmp_path / "two" / "box.csr", authority, renew=True)


def test_a_request_that_was_altered_or_is_no_member_s_is_refused(authority: Path, tmp_path: Path) -> None:
    asked = request("box", tmp_path)
    key = ec.generate_private_key(ec.SECP256R1())
    der = bytearray(x509.load_pem_x509_csr(asked.read_bytes()).public_bytes(serialization.Encoding.DER))
    der[der.index(b"box")] = ord("f")

    def written(data: x509.CertificateSigningRequest) -> Path:
        path = tmp_path / "bad.csr"
        path.write_bytes(data.public_bytes(serialization.Encoding.PEM))
        return path

    def signed(name: x509.Name, private: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> Path:
        return written(
            x509.CertificateSigningRequestBuilder().subject_name(name).sign(private, hashes.SHA256())
        )

    common, unit = x509.NameOID.COMMON_NAME, x509.NameOID.ORGANIZATIONAL_UNIT_NAME
    box = x509.NameAttribute(common, "box")
    command = ("keys", "approve")
    where = ("--authority", authority)
    refused("altered", *command, written(x509.load_der_x509_csr(bytes(der))), *where)
    refused("P-256", *command, signed(x509.Name([box]), rsa.generate_private_key(65537, 2048)), *where)
    refused("P-256", *command, signed(x509.Name([box]), ec.generate_private_key(ec.SECP384R1())), *where)
    two = x509.Name([box, x509.NameAttribute(common, "cloud")])
    refused("nothing more", *command, signed(two, key), *where)
    refused("nothing more", *command, signed(x509.Name([x509.NameAttribute(unit, "box")]), key), *where)
    refused("name '../box'", *command, signed(x509.Name([x509.NameAttribute(common, "../box")]), key), *where)
    served = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([box]))
    hosted = served.add_extension(x509.SubjectAlternativeName([x509.DNSName("a.example")]), critical=False)
    refused("a device on none", *command, written(hosted.sign(key, hashes.SHA256())), *where)
    (tmp_path / "bad.csr").write_bytes(b"rubbish")
    refused("not a request", *command, tmp_path / "bad.csr", *where)
    refused("fingerprint is", *command, asked, *where, "--fingerprint", "0" * 64)
    assert Authority(authority).issued == []


def test_the_approver_may_say_no(authority: Path, tmp_path: Path) -> None:
    asked, said = request("box", tmp_path), []
    with pytest.raises(ConfigError, match="not approved"):
        approve_shown(asked, authority, ask=lambda words: bool(said.append(words)))
    (words,) = said
    assert fingerprint(load_request(asked).key) in words
    assert Authority(authority).issued == []
    assert str(authority / "issued" / "box.pem") in approve_shown(asked, authority, ask=lambda _: True)


def test_a_list_that_a_crash_left_behind_is_written_again(authority: Path, tmp_path: Path) -> None:
    shown = approve(request("box", tmp_path), authority).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Authority, "_write_revoked", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Authority(authority).revoke("box")
    assert not RevocationList(authority / "crl.pem", authority / "ca.pem").revoked(shown)
    refused("no certificate", "keys", "revoke", "box", "--authority", authority)
    assert RevocationList(authority / "crl.pem", authority / "ca.pem").revoked(shown)


def interrupted(_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["request", "certificate", "list"])
def test_damaged_files_are_refused_in_words(authority: Path, tmp_path: Path, kind: str) -> None:
    """Whatever is wrong with one, it is said in one line, and nothing else is raised."""
    asked = request("party-0", tmp_path, ["a.example", "10.0.0.1"])
    made = approve(asked, authority, role=Role.PARTY)
    Authority(authority).revoke("party-0")
    source, damaged_file = {
        "request": (asked, tmp_path / "damaged.csr"),
        "certificate": (made, tmp_path / "damaged.pem"),
        "list": (authority / "crl.pem", tmp_path / "damaged.pem"),
    }[kind]
    first, *body, last = source.read_text().splitlines()

    @fuzzed()
    @given(damaged(base64.b64decode("".join(body))))
    def damage(content: bytes) -> None:
        damaged_file.write_text(f"{first}\n{base64.encodebytes(content).decode()}{last}\n")
        (shown,) = inventory(damaged_file)
        assert shown.line.isprintable()
        if kind == "list":
            or_refused(lambda _: RevocationList(damaged_file, authority / "ca.pem"), "")

    damage()


def test_a_certificate_ends_no_later_than_its_authority(tmp_path: Path) -> None:
    done("keys", "authority", "--out", tmp_path / "ca", "--days", 40)
    asked = request("box", tmp_path)
    refused("own certificate ends", "keys", "approve", asked, "--authority", tmp_path / "ca", "--days", 41)
    made = load_certificate(approve(asked, tmp_path / "ca"))
    assert made.not_valid_after_utc <= load_certificate(tmp_path / "ca" / "ca.pem").not_valid_after_utc
    refused("never overwritten", "keys", "authority", "--out", tmp_path / "ca")


def test_a_list_of_revoked_ones_is_never_taken_back(authority: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        approve(request(name, tmp_path), authority)
    shown = {name: (authority / "issued" / f"{name}.pem").read_bytes() for name in ("one", "two")}
    served = tmp_path / "crl.pem"
    shutil.copy(authority / "crl.pem", served)
    held = RevocationList(served, authority / "ca.pem")
    empty = served.read_bytes()
    Authority(authority).revoke("one")
    Path(shutil.copy(authority / "crl.pem", tmp_path / "new")).replace(served)
    assert held.revoked(shown["one"])
    assert not held.revoked(shown["two"])
    Authority.create(tmp_path / "other")
    foreign = (tmp_path / "other" / "crl.pem").read_bytes()
    for bad, words in ((empty, "older"), (foreign, "another authority"), (b"?", "not a list")):
        served.write_bytes(bad)
        assert held.revoked(shown["one"])
        assert re.search(words, held.fault or "")
    served.unlink()
    assert held.revoked(shown["one"])
    Authority(authority).revoke("two")
    shutil.copy(authority / "crl.pem", served)
    assert held.revoked(shown["two"])
    assert held.fault is None
    served.write_bytes(foreign)
    with pytest.raises(ConfigError, match="another authority"):
        RevocationList(served, authority / "ca.pem")


# ---- what is refused ---------------------------------------------------------------------------------


BAD = [
    (["device", "x" * 80], "device name 'x+'"),
    (["device", "cloud"], "device name 'cloud'"),
    (["device", "party-0"], "device name 'party-0'"),
    (["device", "Cloud"], "only the cloud"),
    (["device", "../up"], "device name"),
    (["device", ""], "device name ''"),
    (["party", "--rank", "0", "--host", "höst"], "host 'höst'"),
    (["party", "--rank", "0", "--host", "1.2.3.4:99"], "host '1.2.3.4:99'.*without a port"),
    (["party", "--rank", "0", "--host", "1.2.3.999"], "host '1.2.3.999'"),
    (["party", "--rank", "0", "--host", "0.0.0.0"], "by which others reach"),
    (["party", "--rank", "0"], "hosts"),
    (["party", "--rank", "0", "--host", "a", "--port", "0"], "port=0"),
    (["party", "--rank", "0", "--host", "a", "--listen", "everywhere"], "expected host:port"),
    (["party", "--rank", "2", "--host", "a"], "add --third-party"),
    (["party", "--rank", "3", "--host", "a", "--third-party"], "rank=3"),
    (["party", "--rank", "-1", "--host", "a"], "rank"),
    (["party", "--rank", "0", "--host", "a", "--parties", "17"], "parties"),
    (["cloud", "--host", "a b"], "host 'a b'"),
    (["authority", "--days", "0"], "days=0"),
    (["authority", "--days", "99999999999"], "days=99999999999"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_requests_are_one_line_and_leave_nothing(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    refused(words, "keys", *arguments, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "x" * 80], "device name"),
        (["--host", "höst"], "host 'höst'"),
        (["--host", "1.2.3.4:99"], "without a port"),
        (["--parties", "1"], "parties=1"),
    ],
)
def test_so_are_those_for_one_machine(tmp_path: Path, options: list[str], words: str) -> None:
    refused(words, "keys", "--out", tmp_path / "new", *options)
    assert not (tmp_path / "new").exists()


def test_the_options_of_one_machine_go_with_no_command(tmp_path: Path) -> None:
    assert "for one machine" in done("keys", "--out", tmp_path / "all")
    assert "Usage: " in done("keys")
    refused("missing option --out", "keys", "--parties", 3)
    refused("options stand after 'device'", "keys", "--out", tmp_path, "device", "box", "--out", tmp_path)


def test_a_party_is_made_once(tmp_path: Path) -> None:
    party = ("keys", "party", "--rank", 0, "--host", "a", "--out", tmp_path)
    done(*party)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    refused("exists already", *party)
    (tmp_path / "party.toml").unlink()
    refused("never overwritten", *party)
    assert {path: path.read_bytes() for path in before if path.exists()}.items() <= before.items()


def test_secrets_that_others_may_read_are_refused_wherever_they_are_loaded(
    group: Path, tmp_path: Path
) -> None:
    copy = without_more(group, tmp_path)
    for name in ("sealing.key", "noise.key", "party-0.key"):
        secret = copy / "a" / name
        for mode in (0o640, 0o604, 0o620, 0o666):
            secret.chmod(mode)
            refused(
                f"{name}: others .*mode {mode:o}.*chmod 600",
                "aggregator",
                "--config",
                copy / "a" / "party.toml",
            )
        refused("chmod 600", "keys", "show", secret)
        secret.chmod(0o600)
    (copy / "ca" / "ca.key").chmod(0o644)
    refused("chmod 600", "keys", "approve", copy / "d0" / "device-0.csr", "--authority", copy / "ca")
    (copy / "d0" / "device-0.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        about(url(group, "a"), tls(copy, "d0"))


def or_refused(check: Callable[[str], T], text: str) -> T | None:
    """What ``check`` says of ``text``; nothing where it is refused, in one line."""
    try:
        return check(text)
    except ConfigError as error:
        words = str(error)
    assert "\n" not in words
    return None


@given(st.text(max_size=70) | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,70}", fullmatch=True))
def test_a_name_is_refused_or_fit_for_a_file_and_a_certificate(name: str) -> None:
    role = or_refused(role_of, name)
    if role is None:
        return
    assert Path("folder", name).name == name
    assert name.isascii()
    assert certificates.subject(name).get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value == name
    assert (role is Role.CLOUD) == (name == "cloud")
    assert (role is Role.PARTY) == (name in {f"party-{rank}" for rank in range(17)})
    assert role is not Role.DEVICE or name.lower() not in ("cloud", "ca", "crl")


@given(
    st.text(max_size=30)
    | st.ip_addresses().map(str)
    | st.from_regex(r"[a-z0-9.:\[\]-]{1,20}", fullmatch=True)
)
def test_a_host_is_refused_or_can_be_certified(host: str) -> None:
    spelt = or_refused(certificates.host_name, host)
    if spelt is None:
        return
    (general,) = certificates.alternatives([spelt])
    assert str(general.value) == spelt
    assert certificates.host_name(spelt) == spelt


# ---- the group's settings and rotation ---------------------------------------------------------------


def test_a_group_is_filled_from_files_or_keys_and_checked(group: Path, tmp_path: Path) -> None:
    copy = without_more(group, tmp_path)
    config, files = copy / "a" / "party.toml", [copy / f / f"member-{r}.toml" for r, f in enumerate("abt")]
    members = load_party(config).members
    blank = re.sub(r"members = \[[^\]]*\]", "members = []", config.read_text())
    blank = f"# mine\n{blank}\n[limits]\nmax_rho = 0.5  # mine too\n"
    config.write_text(blank)
    refused("0 members: .*privkd keys group", "aggregator", "--config", config)
    refused("rank 1 is missing", "keys", "group", files[0], files[2], "--config", config)
    refused("given twice", "keys", "group", *files, files[1], "--config", config)
    refused("this party itself", "keys", "group", "--member", f"0={members[1]}", "--config", config)
    refused("64 hexadecimal", "keys", "group", "--member", "1=xyz", "--config", config)
    refused("name the parties", "keys", "group", "--config", config)
    refused("two ranks have one key", "keys", "group", "--member", f"1={members[0]}", "--config", config)
    refused("none of this group", "keys", "group", *files, "--member", f"3={'0' * 64}", "--config", config)
    small = files[1].with_name("small.toml")
    small.write_text(files[1].read_text().replace("third_party = true", "third_party = false"))
    refused("without", "keys", "group", small, files[2], "--config", config)
    assert config.read_text() == blank
    given_keys = [word for rank in (1, 2) for word in ("--member", f"{rank}={members[rank]}")]
    done("keys", "group", *given_keys, "--config", config)
    assert load_party(config).members == members
    assert config.read_text().startswith("# mine\n")
    assert "max_rho = 0.5  # mine too" in config.read_text()


def test_a_sealing_key_is_rotated_between_rounds(tmp_path: Path) -> None:
    base = enrol(tmp_path)
    config = base / "a" / "party.toml"
    before = load_party(config)
    (base / "a" / "state").mkdir()
    journal = Journal(base / "a" / "state" / "journal.jsonl")
    opened = {"event": "opened", "round": "0" * 16, "terms": {"expires": int(time.time()) + 600}}
    journal.append(opened)
    refused("a round is open for another (9|10) minutes", "keys", "rotate", "--config", config)
    assert load_party(config) == before
    journal.append({"event": "posted", "round": "0" * 16})
    (base / "a" / "state" / "journal.jsonl").unlink()
    assert before.members[0] in done("keys", "rotate", "--config", config)
    after = load_party(config)
    assert after.sealing_key.name == "sealing-2.key"
    assert before.sealing_key.exists()
    assert after.members[1:] == before.members[1:]
    assert after.members[0] != before.members[0]
    for folder in "bt":
        done("keys", "group", base / "a" / "member-0.toml", "--config", base / folder / "party.toml")
        assert load_party(base / folder / "party.toml").members == after.members
    with serving(base):
        assert about(url(base, "a"), tls(base, "d0"))["key"] == after.members[0]
        answer = privkd("doctor", "--role", "device", "--config", base / "d0" / "settings.toml", "--json")
    found = {each["name"]: each for each in json.loads(answer.out)}
    assert answer.code == 1
    assert f"{before.members[0]} is pinned" in found[url(base, "a")]["found"]
    assert found[url(base, "b")]["cure"] == ""
    done("keys", "rotate", "--config", config)
    assert load_party(config).sealing_key.name == "sealing-3.key"


# ---- what is shown -----------------------------------------------------------------------------------


def test_a_folder_is_shown_without_a_secret(group: Path) -> None:
    members = load_party(group / "a" / "party.toml").members
    shown = {
        Path(each["file"]).name: each for each in json.loads(done("keys", "show", group / "a", "--json"))
    }
    for name in ("party.toml", "member-0.toml", "sealing.key"):
        assert shown[name]["public"] == members[0]
    for name in ("party-0.pem", "party-0.key", "party-0.csr"):
        assert shown[name]["public"] == fingerprint(
            load_certificate(group / "a" / "party-0.pem").public_key()
        )
    assert shown["party-0.pem"]["hosts"] == ["127.0.0.1", "localhost"]
    assert shown["party-0.pem"]["days_left"] in (364, 365)
    assert not any(each["warning"] for each in shown.values())
    out = done("keys", "show", group / "a")
    assert secrets_in(out, group) == []
    assert members[0] in out


def test_what_ends_soon_is_warned_of(authority: Path, tmp_path: Path) -> None:
    made = approve(request("box", tmp_path), authority, days=20)
    assert "WARNING it ends in 20 days: run `privkd keys renew" in done("keys", "show", made)
    refused("no key, request", "keys", "show", Path(__file__))
    refused("no key, request", "keys", "show", tmp_path / "none")


def secrets_in(text: str, base: Path) -> list[Path]:
    """The secret files of which 16 bytes, in any spelling, are in ``text``."""
    found = []
    for path in base.rglob("*"):
        if path.suffix not in SECRETS:
            continue
        data = path.read_bytes()
        spelt = data.decode().splitlines()[1][30:60] if data.startswith(b"-----") else data.hex()[:32]
        if spelt in text:
            found.append(path)
    return found


# ---- the preflight -----------------------------------------------------------------------------------


def preflight(role: str, config: Path, *more: object) -> tuple[int, dict[str, dict[str, object]]]:
    answer = privkd("doctor", "--role", role, "--config", config, *more, "--json")
    assert secrets_in(answer.out + answer.err, config.parent.parent) == []
    found = json.loads(answer.out)
    assert all("\n" not in f"{each['found']}{each['cure']}" for each in found)
    return answer.code, {each["name"]: each for each in found}


def test_all_is_well_in_an_enrolled_group(group: Path) -> None:
    for folder, role in (("cloud", "cloud"), ("d0", "device")):
        code, found = preflight(role, group / folder / "settings.toml")
        assert code == 0, found
        assert found["group"]["found"] == "2 aggregators and the third party"
        assert not [each for each in found.values() if each["cure"]]
    peers = [word for folder in "bt" for word in ("--peer", url(group, folder))]
    code, found = preflight("aggregator", group / "a" / "party.toml", *peers)
    assert code == 0, found
    assert found["group"]["found"] == "all 3 parties answer"
    assert {name for name, each in found.items() if each["cure"]} == {"limits"}
    assert "Ready for a round." in done(
        "doctor", "--role", "cloud", "--config", group / "cloud" / "settings.toml"
    )


def test_the_preflight_names_what_would_stop_a_round(
    group: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = without_more(group, tmp_path)
    config = copy / "cloud" / "settings.toml"
    tree = tomllib.loads(config.read_text())["aggregators"]

    def changed(**fields: object) -> Path:
        config.write_text(tomli_w.dumps({"aggregators": {**tree, **fields}}))
        return config

    code, found = preflight("cloud", changed(urls=tree["urls"][:2]))
    assert (code, found["group"]["cure"]) == (1, "name the third party last in urls")
    code, found = preflight("cloud", changed(urls=tree["urls"][::-1]))
    assert "of rank 2, 1, 0" in str(found["group"]["found"])
    (nobody,) = free_ports(1)
    silent = f"https://127.0.0.1:{nobody}"
    code, found = preflight("cloud", changed(urls=[*tree["urls"][:2], silent]))
    assert "refused" in str(found[silent]["found"])
    assert "1 of 3" in str(found["group"]["found"])
    code, found = preflight("cloud", changed(keys=tree["keys"][::-1]))
    assert "is pinned" in str(found[tree["urls"][0]]["found"])
    code, found = preflight("cloud", changed(certificate="../d0/device-0.pem", key="../d0/device-0.key"))
    assert "that of a device" in str(found["name"]["found"])
    code, found = preflight("cloud", changed(key="../d0/device-0.key"))
    assert "not the key of" in str(found["certificate"]["found"])
    Authority.create(copy / "other")
    code, found = preflight("cloud", changed(ca="../other/ca.pem"))
    assert "was not approved" in str(found["authority"]["found"])
    assert "not trusted" in str(found[tree["urls"][0]]["found"])
    code, found = preflight("cloud", changed(urls=[]))
    assert "aggregators.urls" in str(found["settings"]["found"])
    changed()
    expired(copy, "cloud", monkeypatch)
    code, found = preflight("cloud", config)
    assert "expired" in str(found["certificate"]["found"])
    assert code == 1


def test_a_clock_and_a_version_that_differ_are_named(group: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = ServiceLink.about
    for ahead, stands in ((59.0, True), (-61.0, False), (3600.0, False)):
        changed = {"ahead": ahead, "version": "0.0.9"}
        with monkeypatch.context() as patch:
            patch.setattr(ServiceLink, "about", lambda *args, changed=changed: {**inner(*args), **changed})
            code, found = preflight("device", group / "d0" / "settings.toml")
        assert (code == 0) == stands
        assert (found["clock"]["cure"] == "") == stands
        assert "runs privkd 0.0.9" in str(found[url(group, "a")]["found"])
        assert not found[url(group, "a")]["required"]


def test_so_does_an_aggregator_s(group: Path, tmp_path: Path) -> None:
    copy = without_more(group, tmp_path)
    config = copy / "a" / "party.toml"
    text = config.read_text()
    (copy / "a" / "noise.key").chmod(0o644)
    config.write_text(text.replace(str(load_party(config).address[1]), str(free_ports(1)[0])))
    code, found = preflight("aggregator", config)
    assert code == 1
    assert "chmod 600" in str(found["noise key"]["found"])
    not_up = found[url(copy, "a")]
    assert "privkd aggregator" in str(not_up["cure"])
    assert not not_up["required"], "a preflight is run before the service is"
    (copy / "a" / "noise.key").chmod(0o600)
    shutil.copy(copy / "b" / "sealing.key", copy / "a" / "other.key")
    config.write_text(text.replace('"sealing.key"', '"other.key"'))
    code, found = preflight("aggregator", config)
    assert "but members[0] is" in str(found["sealing key"]["found"])
    config.write_text(text.replace("127.0.0.1", "10.1.2.3"))
    code, found = preflight("aggregator", config)
    assert "listens on 10.1.2.3" in str(found["hosts"]["found"])
    assert "right on one machine alone" in str(found["peers"]["found"])


def test_a_preflight_needs_a_role_and_a_file(tmp_path: Path) -> None:
    refused("role='king'", "doctor", "--role", "king", "--config", tmp_path / "x")
    refused("needs --config", "doctor", "--role", "cloud")
    answer = privkd("doctor", "--role", "device", "--config", tmp_path / "none.toml")
    assert answer.code == 1
    assert "none.toml: No such file" in answer.out
