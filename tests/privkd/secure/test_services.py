"""The secure channel's services: every fault through real processes, against plain numpy.

In each: the released sum is exact over the agreed set, or nothing is released and the error says why.
"""

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import numpy as np
import pytest
from rig import (
    ENTRIES,
    LIMITS,
    Rig,
    block,
    services_inside,
    soon,
    strike_at_start,
    struck_rounds,
    sum_over,
    uploads_of,
)

from privkd.errors import ChannelError, ConfigError, RefusalError
from privkd.secure import local as local_module
from privkd.secure.aggregator_pb2 import Head, JoinRequest, Piece, ShareRequest, StatusRequest
from privkd.secure.authority import Authority
from privkd.secure.client import ClientTls, ServiceLink, persistently, send, service_links
from privkd.secure.frames import Kind
from privkd.secure.group import PartyGroup, UnreachableError, relay
from privkd.secure.local import LocalParties
from privkd.secure.rpc import PIECE_BYTES, stream
from privkd.secure.service import Service
from privkd.secure.terms import RoundTerms
from privkd.secure.upload import Upload, prepare, seal_integers


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    keys = tuple(bytes([rank + 1]) * 32 for rank in range(2))
    with LocalParties(2, limits=LIMITS, noise_keys=keys) as local:
        group = PartyGroup(service_links(local.urls, local.client_tls))
        rig = Rig(group, keys, local.state)
        rig.kept["local"] = local
        group.keys(soon())
        group.gather(soon())
        yield rig
        group.disconnect()


# ---- faults of uploads ------------------------------------------------------------------------------


def flipped(envelope: bytes, position: int) -> bytes:
    return envelope[:position] + bytes([envelope[position] ^ 4]) + envelope[position + 1 :]


def refused(rig: Rig, rank: int, round: int, envelope: bytes, words: str) -> None:
    with pytest.raises(RefusalError, match=words):
        rig.post(rank, round, envelope)


def spoil(rig: Rig, terms: RoundTerms, fault: str, good: Upload) -> str:
    """Commit a fault with ``device-3``'s upload; what the journal then says of the device."""
    first, second = good.envelopes
    if fault == "half an upload":
        rig.put(good, 0)
        return "missing, or another one|no upload"
    if fault == "crossed retry":
        again = prepare(block(3), terms, good.device)
        rig.put(good, 0)
        rig.put(again, 1)
        refused(rig, 1, terms.round, second, "another upload in this round was accepted before")
        return "missing, or another one"
    bad, words = {
        "wrong round": (
            prepare(block(3), terms.model_copy(update={"round": 10_000}), good.device).envelopes,
            "upload for another round",
        ),
        "truncation": ((first[:-7], second[:-7]), "altered on its way"),
        "flipped bit": ((flipped(first, len(first) - 9), flipped(second, 90)), "altered|another"),
        "swapped aggregators": ((second, first), "upload for another aggregator"),
        "bad header": ((b"?" * 200, b""), "malformed"),
        "wrong shape": (
            seal_integers(block(3, 9), terms.model_copy(update={"entries": 9}), good.device).envelopes,
            "upload for another number of entries",
        ),
        "unknown device": (prepare(block(3), terms, "stranger").envelopes, "stranger: not on the roster"),
    }[fault]  # fmt: skip
    for rank, envelope in enumerate(bad):
        refused(rig, rank, terms.round, envelope, words)
    if fault in ("bad header", "unknown device"):
        return "no upload"
    return words


@pytest.mark.parametrize(
    "fault",
    ["half an upload", "crossed retry", "wrong round", "truncation", "flipped bit", "swapped aggregators",
     "bad header", "wrong shape", "unknown device"],
)  # fmt: skip
def test_a_faulty_device_is_named_and_the_round_goes_on(rig: Rig, fault: str) -> None:
    terms = rig.open(sigma2="400")
    uploads = uploads_of(terms)
    *good, last = terms.roster
    words = spoil(rig, terms, fault, uploads[last])
    for device in good:
        rig.put(uploads[device])
    total = rig.close(terms)
    assert total.devices == tuple(good)
    exact = sum_over(terms, total.devices) + rig.noise(terms, [uploads[d] for d in good])
    np.testing.assert_array_equal(total.integers, exact)
    for rank in range(2):
        (record,) = rig.journal(rank, "agreed", terms)
        assert any(word in record["left_out"][last] for word in words.split("|"))
        if fault == "unknown device":
            assert "not on the roster" in record["left_out"]["stranger"]
    assert last in total.left_out


def test_a_replay_counts_once_and_fresh_shares_are_refused(rig: Rig) -> None:
    terms = rig.open()
    for upload in uploads_of(terms).values():
        for _ in range(3):
            rig.put(upload)
    again = prepare(block(0), terms, "device-0")
    for rank in range(2):
        refused(rig, rank, terms.round, again.envelopes[rank], "a retry sends the same bytes")
    total = rig.close(terms)
    np.testing.assert_array_equal(total.integers, sum_over(terms, terms.roster))
    assert not total.left_out


def test_a_relay_carries_many_uploads_and_says_which_are_refused(rig: Rig) -> None:
    terms = rig.open(devices=6, sigma2="400")
    uploads = list(uploads_of(terms).values())
    spoilt = replace(uploads[5], envelopes=tuple(flipped(e, len(e) - 1) for e in uploads[5].envelopes))
    for _ in range(2):
        refusals = relay([*uploads[:5], spoilt], rig.group.aggregators, deadline=soon())
        assert len(refusals) == 2
        assert all(reason.startswith("device-5: upload altered") for reason in refusals)
    total = rig.close(terms)
    assert total.devices == terms.roster[:5]
    exact = sum_over(terms, total.devices) + rig.noise(terms, uploads[:5])
    np.testing.assert_array_equal(total.integers, exact)
    for body in (b"\x05\0\0", b"\x05\0\0\0abc"):
        with pytest.raises(RefusalError, match="cut off"):
            rig.service(0).call("Relay", stream(terms.label, body), soon())
    late = relay([prepare(block(5), terms, "device-5")], rig.group.aggregators, deadline=soon())
    assert all("is closed" in reason for reason in late)


def test_a_forged_envelope_in_its_name_does_not_harm_a_device(rig: Rig) -> None:
    """Not even one under the same upload id: the first bytes stay."""
    terms = rig.open()
    uploads = uploads_of(terms)
    for upload in uploads.values():
        rig.put(upload)
    victim = uploads["device-1"]
    for rank, envelope in enumerate(victim.envelopes):
        with pytest.raises(RefusalError):
            rig.post(rank, terms.round, flipped(envelope, len(envelope) - 1))
    np.testing.assert_array_equal(rig.close(terms).integers, sum_over(terms, terms.roster))


def test_nan_is_sent_as_zeros_and_huge_answers_are_clipped(rig: Rig) -> None:
    terms = rig.open(bound=1000)
    zeros = prepare(np.zeros(ENTRIES), terms, "device-0", b"e" * 32)
    for value in (np.nan, np.inf, -np.inf):
        broken = block(0).astype(np.float64)
        broken[5] = value
        assert prepare(broken, terms, "device-0", b"e" * 32) == zeros
    with pytest.raises(ChannelError, match="11 answers, but the round takes 12"):
        prepare(np.ones(11), terms, "device-0")
    huge = np.full(ENTRIES, -1e300)
    for device in terms.roster:
        rig.put(prepare(huge, terms, device))
    each = rig.close(terms).integers // 4
    assert (each == each[0]).all()
    assert 990**2 < int((each**2).sum()) <= 1000**2


def test_below_the_minimum_nothing_is_released_ever(rig: Rig) -> None:
    terms = rig.open(minimum=3)
    uploads = uploads_of(terms)
    rig.put(uploads["device-0"])
    rig.put(uploads["device-1"])
    rig.put(uploads["device-2"], 0)
    for _ in range(2):
        with pytest.raises(RefusalError, match=r"2 uploads agreed, fewer than 3.*device-3: no upload"):
            rig.close(terms)
    refused(rig, 1, terms.round, uploads["device-2"].envelopes[1], "is closed")
    assert not rig.journal(0, "agreed", terms)


def test_a_reason_as_long_as_a_crowd_is_told_in_part(rig: Rig) -> None:
    """Whole, it would not fit where gRPC carries it, and the round look as if it could be closed yet."""
    terms = rig.open(devices=2000, minimum=2)
    with pytest.raises(RefusalError, match=r"0 uploads agreed, fewer than 2.*device-0: no upload.* \.\.\.$"):
        rig.close(terms)
    assert "device-1999: no upload" in rig.service(0).status(terms.label, soon())["failure"]


def test_an_expired_round_takes_and_releases_nothing(rig: Rig) -> None:
    terms = rig.open(expires=int(time.time()) + 2)
    uploads = uploads_of(terms)
    for device in terms.roster[:2]:
        rig.put(uploads[device])
    time.sleep(max(0.0, terms.expires + 0.1 - time.time()))
    refused(rig, 0, terms.round, uploads["device-2"].envelopes[0], "has expired")
    rig.put(uploads["device-0"])  # a retry of what is held is no upload
    with pytest.raises(RefusalError, match="expired before it was closed"):
        rig.close(terms)
    with pytest.raises(RefusalError, match="has expired"):
        rig.open(expires=int(time.time()) - 1)


def test_a_released_round_repeats_bit_for_bit_and_takes_no_more(rig: Rig) -> None:
    terms = rig.open(sigma2="1000000")
    uploads = uploads_of(terms)
    for device in terms.roster[:3]:
        rig.put(uploads[device])
    first = rig.close(terms)
    refused(rig, 0, terms.round, uploads["device-3"].envelopes[0], "is closed")
    rig.put(uploads["device-0"])
    np.testing.assert_array_equal(rig.close(terms).integers, first.integers)
    shutil.copytree(rig.state(0) / "rounds" / terms.folder, rig.state(0) / "kept")
    for rank in range(2):  # the shares are lost, so the parties make them again
        (rig.state(rank) / "rounds" / terms.folder / "share").unlink()
    np.testing.assert_array_equal(rig.close(terms).integers, first.integers)


def test_a_round_s_name_is_never_used_for_other_terms(rig: Rig) -> None:
    terms = rig.open()
    rig.group.open(terms, soon())
    for change in ({"bound": 7}, {"roster": ("a", "b")}, {"sigma2": "5"}, {"minimum": 3}):
        with pytest.raises(RefusalError, match="opened with other terms"):
            rig.group.open(terms.model_copy(update=change), soon())
    other = terms.model_copy(update={"round": 10**6, "keys": ("00" * 32, "11" * 32)})
    with pytest.raises(RefusalError, match="keys are not those"):
        rig.group.open(other, soon())
    with pytest.raises(RefusalError, match="this party asks for 2"):
        rig.open(minimum=1)


def test_devices_noise_is_in_the_shares(rig: Rig) -> None:
    """The sum then differs from the plain one by noise of the stated size: chi-square at 1e-6."""
    terms = rig.open(sigma2="4000000", noise="devices", entries=4000, bound=10_000)
    for device in terms.roster:
        rig.put(prepare(np.zeros(4000), terms, device))
    residual = rig.close(terms).integers / np.sqrt(2 * 4_000_000)  # 4 devices, of which 2 would do
    assert abs((residual**2).sum() - 4000) < 5 * np.sqrt(2 * 4000)


def test_a_session_s_name_is_never_used_twice_not_even_after_a_restart() -> None:
    """At the third party too, whose triples would repeat under it."""

    def join(rank: int, name: str, port: int | None = None) -> int:
        return persistently(lambda: links[rank].join(name, port, soon()), soon())

    with LocalParties(2, limits=LIMITS, third_party=True) as parties:
        links = service_links(parties.urls, parties.client_tls)
        port = join(0, "first")
        assert join(0, "first") == port, "while its worker lives it is the same session"
        for rank in (1, 2):
            assert [join(rank, "first", port), join(rank, "first", port)] == [port] * 2
        other = join(0, "second")
        join(2, "second", other)
        for rank in (0, 2):
            with pytest.raises(RefusalError, match="the name of this session was used before"):
                join(rank, "first", port)
        for rank in range(3):
            os.kill(parties.pids[rank], signal.SIGKILL)
        for rank, name in [(0, "first"), (0, "second"), (1, "first"), (2, "first"), (2, "second")]:
            with pytest.raises(RefusalError, match="the name of this session was used before"):
                join(rank, name, port)
        assert join(2, "third", port) == port
        for link in links:
            link.close()


def test_a_session_s_name_is_used_up_by_a_worker_that_died(inside: list[Service]) -> None:
    seating = inside[0].rounds.supervisor
    port = seating.join("once", None)
    assert seating.join("once", None) == port
    seating.stop()
    with pytest.raises(ChannelError, match="the name of this session was used before"):
        seating.join("once", None)
    seating.join("again", None)


# ---- faults of clients ------------------------------------------------------------------------------


def local(rig: Rig) -> LocalParties:
    found = rig.kept["local"]
    assert isinstance(found, LocalParties)
    return found


def address(rig: Rig, rank: int = 0) -> tuple[str, int]:
    host, port = rig.service(rank).url.partition("://")[2].split(":")
    return host, int(port)


@pytest.fixture
def device(rig: Rig, tmp_path: Path) -> Iterator[ServiceLink]:
    """The first aggregator as device-0 reaches it, under a certificate of its own."""
    authority = local(rig).authority
    assert authority is not None
    authority.issue(tmp_path, "device-0", name="device-0")
    own = ClientTls(local(rig).folder / "ca.pem", tmp_path / "device-0.pem", tmp_path / "device-0.key")
    link = ServiceLink(rig.service(0).url, own)
    yield link
    link.close()


@pytest.mark.slow
def test_a_client_that_dribbles_is_cut_off_and_delays_nobody(rig: Rig, device: ServiceLink) -> None:
    terms = rig.open()

    def slowly() -> Iterator[Piece]:
        yield Piece(head=Head(round=terms.label, size=100, device="device-0"))
        while True:
            time.sleep(0.2)
            yield Piece(data=b"x")

    with ThreadPoolExecutor(1) as pool:
        start = time.monotonic()
        dribbling = pool.submit(device.call, "Upload", slowly(), soon())
        rig.open()
        assert time.monotonic() - start < 4, "others wait"
        with pytest.raises(UnreachableError, match="did not come in time"):
            dribbling.result(30)
    assert 4 < time.monotonic() - start < 9, "request_seconds is 5"


def test_silent_connections_shut_nobody_out(rig: Rig) -> None:
    """They take no certificate, so anybody can open them; each is let go when no handshake comes of it."""
    silent = [socket.create_connection(address(rig)) for _ in range(200)]
    for _ in range(3):
        link = ServiceLink(rig.service(0).url, local(rig).client_tls)
        start = time.monotonic()
        link.about(soon())
        assert time.monotonic() - start < 3
        link.close()
    for connection in silent:
        connection.settimeout(30)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(1) == b""
        connection.close()


@pytest.mark.parametrize(
    ("name", "request_", "words"),
    [
        ("Join", JoinRequest(session="s", port=99999), "port=99999"),
        ("Open", stream(0xFFFFFF, b"{}"), "terms of a round"),
        ("Open", stream(0xFFFFFF, b"\xff"), "terms of a round"),
        ("Open", iter([Piece(head=Head(size=1 << 25))]), "more than the limit"),
        ("Upload", stream(0xFFFFFFFF, b"x"), "is not open here"),
        ("Share", ShareRequest(round=0xFFFFFFFF), "is not open here"),
        ("Status", StatusRequest(round=0xFFFFFFFF), "is not open here"),
        ("Relay", iter([Piece(data=b"x")]), "first piece has a head"),
        ("Relay", iter([]), "first piece has a head"),
        ("Relay", iter([Piece(head=Head(round=1, size=9)), Piece(data=b"12345")]), "cut off: 4 of 9"),
        ("Relay", iter([Piece(head=Head(round=1, size=2)), Piece(data=b"12345")]), "more than the 2 bytes"),
        ("Relay", iter([Piece(head=Head(round=1, size=2)), Piece(head=Head())]), "more than the 2 bytes"),
        ("Relay", iter([Piece(head=Head(round=1, size=1 << 40))]), "more than the limit"),
    ],
)  # fmt: skip
def test_oversize_and_malformed_calls_are_refused(rig: Rig, name: str, request_: object, words: str) -> None:
    with pytest.raises(RefusalError, match=words):
        rig.service(0).call(name, request_, soon(), list if name == "Share" else None)


def test_what_is_no_call_is_refused_and_they_serve_on(rig: Rig) -> None:
    assert local(rig).client_tls is not None
    credentials = local(rig).client_tls.credentials()  # type: ignore[union-attr]
    with grpc.secure_channel("{}:{}".format(*address(rig)), credentials) as channel:
        for path, body, code in [
            ("/privkd.v1.Aggregator/Nothing", b"", grpc.StatusCode.UNIMPLEMENTED),
            ("/nowhere", b"", grpc.StatusCode.UNIMPLEMENTED),
            ("/privkd.v1.Aggregator/Status", b"\xff\xff\xff", grpc.StatusCode.UNKNOWN),
            ("/privkd.v1.Aggregator/Join", bytes((1 << 20) + 1), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ]:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(path)(body, timeout=20)
            assert caught.value.code() is code
    context = local(rig).client_tls.context()  # type: ignore[union-attr]
    for garbage in (b"POST /v1/party HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(1000)):
        raw = context.wrap_socket(socket.create_connection(address(rig)), server_hostname="127.0.0.1")
        with raw, contextlib.suppress(OSError):
            raw.sendall(garbage)
            raw.settimeout(20)
            while raw.recv(1 << 16):
                pass
    rig.open()


def resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) << 10


def test_nothing_large_is_held_of_what_will_be_refused(rig: Rig, device: ServiceLink) -> None:
    """Sixteen streams of 64 MiB each, to calls and rounds that are not for who sends them."""
    before = resident(local(rig).pids[0])
    sent: list[int] = []

    def flood(round: int, size: int) -> Iterator[Piece]:
        yield Piece(head=Head(round=round, size=size, device="device-0"))
        for _ in range(256):
            sent.append(PIECE_BYTES)
            yield Piece(data=bytes(PIECE_BYTES))

    def flooded(name: str) -> None:
        with pytest.raises(RefusalError, match=r"may not|is not open here"):
            device.call(name, flood(0xFFFFFF, 1 << 26), soon())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(flooded, ["Upload", "Relay", "Open", "Upload"] * 4))
    assert resident(local(rig).pids[0]) - before < 32 << 20
    assert sum(sent) < 64 << 20, "the caller was told at once"


def test_certificates_say_who_may_do_what(rig: Rig, device: ServiceLink) -> None:
    terms = rig.open()
    first, second = (uploads_of(terms)[name].envelopes[0] for name in ("device-0", "device-1"))
    device.upload(terms.label, "device-0", first, soon())
    for name in ("device-1", "device-0"):
        with pytest.raises(RefusalError, match="'device-0' may not upload for device-1"):
            device.upload(terms.label, name, second, soon())
    only_cloud: list[Callable[[], object]] = [
        lambda: device.share(terms.label, "s", agree=True, kept=False, deadline=soon()),
        lambda: device.relay(terms.label, [first], soon()),
        lambda: device.abandon(terms.label, soon()),
        lambda: device.open(terms, soon()),
        lambda: device.join("s", None, soon()),
        lambda: device.status(terms.label, soon()),
    ]
    for call in only_cloud:
        with pytest.raises(RefusalError, match="may not open, close or relay"):
            call()
    assert device.about(soon())["rank"] == 0


def test_certificates_that_do_not_serve_are_told_at_once_and_in_words(rig: Rig, tmp_path: Path) -> None:
    """Not tried again until the deadline: nothing would change."""
    folder, url, authority = local(rig).folder, rig.service(0).url, local(rig).authority
    assert authority is not None

    def own(stem: str, ca: Path = folder / "ca.pem") -> ClientTls:
        return ClientTls(ca, tmp_path / f"{stem}.pem", tmp_path / f"{stem}.key")

    Authority.create(tmp_path).issue(tmp_path, "foreign", name="device-0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authority, "_until", lambda _: datetime.now(UTC) + timedelta(seconds=2))
        authority.issue(tmp_path, "old", name="device-0")
    old = ServiceLink(url, own("old"))
    time.sleep(2.1)
    with pytest.raises(ConfigError, match=r"old\.pem: the certificate of device-0 expired on .* keys renew"):
        ServiceLink(url, own("old"))

    elsewhere = url.replace("127.0.0.1", "localhost")
    for link, words in [
        (old, r"old\.pem: the certificate of device-0 expired on .*: run `privkd keys renew"),
        (ServiceLink(url, own("foreign")), r"does not accept this client's certificate .*foreign\.pem"),
        (ServiceLink(url, ClientTls(folder / "ca.pem")), "does not accept a client without a certificate"),
        (ServiceLink(url, own("foreign", tmp_path / "ca.pem")), "its certificate is not trusted"),
        (ServiceLink(url), "its certificate is not trusted"),
        (ServiceLink(elsewhere, local(rig).client_tls), "is for another host than 'localhost'"),
    ]:
        start = time.monotonic()
        with pytest.raises(ChannelError, match=words) as caught:
            send(Upload(1, "device-0", bytes(16), (b"x",)), [link], deadline=soon())
        assert not isinstance(caught.value, UnreachableError)
        assert time.monotonic() - start < 5
        link.close()


def test_no_older_tls_is_spoken(rig: Rig) -> None:
    assert local(rig).client_tls is not None
    context = local(rig).client_tls.context()  # type: ignore[union-attr]
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(address(rig)) as raw, pytest.raises(OSError, match=r"EOF|reset"):
        context.wrap_socket(raw, server_hostname="127.0.0.1")
    context = local(rig).client_tls.context()  # type: ignore[union-attr]
    raw = socket.create_connection(address(rig))
    with context.wrap_socket(raw, server_hostname="127.0.0.1") as connection:
        assert connection.version() == "TLSv1.3"


def test_a_stopped_service_keeps_nobody_waiting(rig: Rig) -> None:
    pid = local(rig).pids[1]
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(0.5)  # a signal takes a moment to be delivered
        start = time.monotonic()
        with pytest.raises(UnreachableError, match="did not answer in time"):
            rig.service(1).about(soon(1.0))
        assert time.monotonic() - start < 30
    finally:
        os.kill(pid, signal.SIGCONT)


def test_the_group_must_be_whole_and_as_pinned(rig: Rig) -> None:
    urls, tls = local(rig).urls, local(rig).client_tls
    keys = rig.group.keys(soon())
    for group, words in [
        (PartyGroup(service_links(urls[:1], tls)), "do not name every party"),
        (PartyGroup(service_links(urls, tls), pins=keys[::-1]), "not the pinned ones"),
    ]:
        with pytest.raises(ChannelError, match=words):
            group.keys(soon())
        group.disconnect()
    assert PartyGroup(service_links(urls[::-1], tls), pins=keys).keys(soon()) == keys
    with pytest.raises(ConfigError, match="named twice"):
        service_links([urls[0], urls[0]])
    for url in ("nonsense", "http://10.0.0.1:80", "grpc://10.0.0.1:80", "https://host", "ftp://127.0.0.1:1",
                "grpcs://host:0", "grpcs://host:99999", "grpcs://:80"):  # fmt: skip
        with pytest.raises(ConfigError, match="aggregator"):
            ServiceLink(url)
    for spelling in ("https", "grpcs"):
        link = ServiceLink(f"{spelling}://{urls[0].partition('://')[2]}", tls)
        assert link.about(soon())["key"] == keys[0]
        link.close()


# ---- a randomised test against numpy ----------------------------------------------------------------


def test_random_faults_against_numpy(rig: Rig, request: pytest.FixtureRequest) -> None:
    """Each round, each device draws a fault, and now and then a service is killed before the round is closed.

    ``--fault-rounds`` says how many rounds.
    """
    rng = np.random.default_rng(17)
    rounds = request.config.getoption("--fault-rounds")
    released = 0
    for _ in range(rounds):
        devices = int(rng.integers(2, 7))
        minimum = int(rng.integers(2, devices + 1))
        sigma2 = rng.choice(["", "3/2", "10000"])
        terms = rig.open(devices, minimum=minimum, sigma2=str(sigma2) or None)
        uploads = uploads_of(terms)
        whole = [device for device in terms.roster if _played(rig, rng, terms, uploads[device])]
        if rng.random() < 1 / 200:
            os.kill(local(rig).pids[int(rng.integers(2))], signal.SIGKILL)
        if len(whole) < minimum:
            with pytest.raises(RefusalError, match=f"{len(whole)} uploads agreed, fewer than {minimum}"):
                rig.close(terms)
            continue
        total = rig.close(terms)
        assert total.devices == tuple(whole)
        exact = sum_over(terms, total.devices) + rig.noise(terms, [uploads[d] for d in whole])
        np.testing.assert_array_equal(total.integers, exact)
        released += 1
    assert 0 < released <= rounds


def _played(rig: Rig, rng: np.random.Generator, terms: RoundTerms, upload: Upload) -> bool:
    """Upload with a random fault; whether all parties hold it."""
    fault = rng.choice(["none", "replay", "half", "crossed", "garbage", "flip", "swap", "absent", "fresh"],
                       p=[0.4, 0.1, 0.1, 0.1, 0.06, 0.06, 0.06, 0.06, 0.06])  # fmt: skip
    rank = int(rng.integers(2))
    if fault in ("none", "replay", "fresh"):
        for _ in range(3 if fault == "replay" else 1):
            rig.put(upload)
        if fault == "fresh":
            again = prepare(block(99), terms, upload.device)
            refused(rig, rank, terms.round, again.envelopes[rank], "same bytes")
        return True
    if fault == "half":
        rig.put(upload, rank)
    elif fault == "crossed":
        rig.put(upload, rank)
        rig.put(prepare(block(99), terms, upload.device), 1 - rank)
    elif fault != "absent":
        envelope = upload.envelopes[rank]
        bad = {
            "garbage": rng.bytes(int(rng.integers(0, 400))),
            "flip": flipped(envelope, int(rng.integers(0, len(envelope)))),
            "swap": upload.envelopes[1 - rank],
        }[str(fault)]
        refused(rig, rank, terms.round, bad, "upload|roster")
    return False


# ---- deaths -----------------------------------------------------------------------------------------


def test_services_killed_between_the_steps_go_on_from_their_spools() -> None:
    """SIGKILL of a service after its uploads, of the other after the release: the same bytes throughout."""
    with LocalParties(2, limits=LIMITS, noise_keys=(b"a" * 32, b"b" * 32)) as parties:
        group = PartyGroup(service_links(parties.urls, parties.client_tls))
        rig = Rig(group, (b"a" * 32, b"b" * 32), parties.state)
        terms = rig.open(sigma2="50")
        uploads = uploads_of(terms)
        for device in terms.roster[:3]:
            rig.put(uploads[device])
        os.kill(parties.pids[0], signal.SIGKILL)
        send(uploads["device-3"], group.aggregators, deadline=soon())
        total = rig.close(terms)
        exact = sum_over(terms, terms.roster) + rig.noise(terms, list(uploads.values()))
        np.testing.assert_array_equal(total.integers, exact)
        os.kill(parties.pids[1], signal.SIGKILL)
        again = group.close(terms, soon())
        np.testing.assert_array_equal(again.integers, exact)
        group.disconnect()
        pids = parties.pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[list[Service]]:
    """Two services of this process."""
    with services_inside(tmp_path) as services:
        yield services


STRIKES = [
    ("aggregator-0", Kind.AGREE, signal.SIGKILL, False),
    ("aggregator-1", Kind.AGREE, signal.SIGSTOP, False),
    ("aggregator-1", Kind.AGREE, signal.SIGKILL, True),
    ("aggregator-0", Kind.AGREE, signal.SIGSTOP, True),
    ("aggregator-1", Kind.SUM, signal.SIGKILL, False),
    ("aggregator-0", Kind.SUM, signal.SIGSTOP, False),
    ("aggregator-0", Kind.SUM, signal.SIGKILL, True),
    ("aggregator-1", Kind.SUM, signal.SIGSTOP, True),
]


def test_a_killed_worker_is_replaced_and_the_bytes_are_the_same(inside: list[Service]) -> None:
    for rig, terms in struck_rounds(inside, STRIKES[4:5]):
        for rank in range(2):
            assert [len(rig.journal(rank, event, terms)) for event in ("closed", "agreed", "posted")] == [
                1
            ] * 3


@pytest.mark.slow
def test_workers_killed_and_stopped_at_every_step(inside: list[Service]) -> None:
    for rig, terms in struck_rounds(inside, STRIKES):
        for rank in range(2):
            assert len(rig.journal(rank, "agreed", terms)) == 1


CHECK_STRIKES = [
    ("aggregator-0", Kind.CHECK, signal.SIGKILL, False),
    ("aggregator-1", Kind.CHECK, signal.SIGSTOP, False),
    ("aggregator-1", Kind.CHECK, signal.SIGKILL, True),
    ("aggregator-0", Kind.CHECK, signal.SIGSTOP, True),
]


@pytest.mark.slow
def test_workers_killed_and_stopped_at_the_norm_check(tmp_path: Path) -> None:
    """The check is made again, with the same rows, and lets the same devices pass."""
    with services_inside(tmp_path, third_party=True) as services:
        for rig, terms in struck_rounds(services, CHECK_STRIKES, projections=64):
            for rank in range(2):
                assert len(rig.journal(rank, "agreed", terms)) == 1


@pytest.mark.parametrize(
    ("victim", "blow"),
    [("aggregator-1", signal.SIGKILL), pytest.param("aggregator-0", signal.SIGSTOP, marks=pytest.mark.slow)],
)
def test_a_worker_lost_while_starting_is_replaced(
    inside: list[Service], victim: str, blow: signal.Signals
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        hit = strike_at_start(patch, victim, blow)
        other = "aggregator-0" if victim == "aggregator-1" else "aggregator-1"
        (_,) = struck_rounds(inside, [(other, Kind.AGREE, signal.SIGCONT, False)])
        assert len(hit) == 1


def test_a_service_stopped_while_starting_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []
    launch = local_module._launch

    def stopped(folder: Path, rank: int) -> "subprocess.Popen[bytes]":
        process = launch(folder, rank)
        launched.append(process.pid)
        if rank == 1:
            os.kill(process.pid, signal.SIGSTOP)
        return process

    monkeypatch.setattr(local_module, "_launch", stopped)
    with pytest.raises(ChannelError, match="aggregator-1 is stopped or stuck"):
        LocalParties(2, start_seconds=20.0)
    for pid in launched:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.slow
def test_a_changed_spool_after_a_release_is_refused(inside: list[Service]) -> None:
    """Shares lost and an upload gone: neither the other set nor new noise ever comes out."""
    group = PartyGroup(service_links([service.url for service in inside]))
    rig = Rig(group, (), lambda rank: inside[rank].party.directory)
    terms = rig.open(sigma2="77")
    for upload in uploads_of(terms).values():
        rig.put(upload)
    rig.close(terms)
    for service in inside:
        folder = service.party.directory / "rounds" / terms.folder
        (folder / "share").unlink()
        service.rounds.supervisor.stop()
        os.truncate(folder / "uploads", (folder / "uploads").stat().st_size - 1)
    revived = [Service(service.party) for service in inside]
    for service in revived:
        with pytest.raises(ChannelError, match="the spool has changed since the round was closed"):
            service.rounds.close(terms.round, "any")
        service.stop()
    shutil.rmtree(inside[0].party.directory / "rounds" / terms.folder)
    emptied = Service(inside[0].party)
    with pytest.raises(ChannelError, match="its spool was removed"):
        emptied.rounds.open(terms)
    emptied.stop()
    group.disconnect()


@pytest.mark.parametrize("ending", ["kill", "exit"])
def test_local_parties_end_with_the_process_that_started_them(ending: str) -> None:
    script = (
        "from privkd.secure.local import LocalParties; import time\n"
        "parties = LocalParties(2)\nprint(*parties.pids, parties.folder, flush=True)\n"
        f"{'time.sleep(600)' if ending == 'kill' else ''}"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        *pids, folder = parent.stdout.readline().split()
        if ending == "kill":
            parent.kill()
        parent.wait(30)
    until = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids):
        assert time.monotonic() < until, "orphans"
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)
