"""Questions over the real engine: an NVFlare server, three clients, mutual TLS on loopback."""

import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("nvflare")
pytest.importorskip("psutil")

import psutil
from flare_rig import DEVICES, FlareRig, other_user

from privkd.deployment.kits import approve, make_authority, package, request

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rig() -> Iterator[FlareRig]:
    running = FlareRig()
    try:
        running.start_all()
        yield running
    finally:
        running.close()


def everybody(content: bytes) -> dict[str, bytes]:
    return {name: name.encode() + content for name in DEVICES}


def test_every_device_answers_in_every_round(rig: FlareRig) -> None:
    for content in (b"one", b"two" * 700_000, b""):
        assert rig.ask(content=content) == everybody(content)


def test_a_courier_killed_at_work_is_in_the_next_round(rig: FlareRig) -> None:
    name = DEVICES[0]
    echo, struck = rig.handlers[name], threading.Event()

    def strike(message: bytes) -> bytes:
        if not struck.is_set():
            struck.set()
            rig.kill(name)
        return echo(message)

    rig.handlers[name] = strike
    found = rig.ask(30.0, b"a")
    assert struck.is_set()
    assert {DEVICES[1], DEVICES[2]} <= found.keys()
    rig.handlers[name] = echo
    rig.start(name)
    assert rig.ask(content=b"b") == everybody(b"b")


def test_a_device_that_comes_late_is_in_the_same_round(rig: FlareRig) -> None:
    name = DEVICES[1]
    rig.kill(name)
    # The server knows within a minute that it is away; until then its jobs wait for nobody either.
    timer = threading.Timer(5.0, rig.start, [name])
    timer.start()
    try:
        assert rig.ask(content=b"late") == everybody(b"late")
    finally:
        timer.join()


def test_a_server_killed_with_its_job_costs_time_alone(rig: FlareRig) -> None:
    name = DEVICES[2]
    echo, struck = rig.handlers[name], threading.Event()

    def strike(message: bytes) -> bytes:
        if not struck.is_set():
            struck.set()
            rig.restart("cloud")
        return echo(message)

    rig.handlers[name] = strike
    found = dict(rig.ask(240.0, b"c"))
    rig.handlers[name] = echo
    assert struck.is_set()
    assert found.items() <= everybody(b"c").items()
    assert rig.ask(240.0, b"d") == everybody(b"d")


@pytest.fixture(scope="module")
def impostor(rig: FlareRig) -> Path:
    """The kit of a device that another authority named."""
    foreign = make_authority(rig.base / "foreign", "localhost", rig.port)
    home = rig.base / "impostor"
    home.mkdir()
    signed = approve(request("impostor", home / "request"), foreign.folder)
    kit = package(signed, home / "request", foreign.fingerprint, home / "kit")
    rig.give(kit)
    return kit


def test_a_client_of_another_authority_never_joins(rig: FlareRig, impostor: Path) -> None:
    rig.start("impostor", impostor)
    try:
        assert rig.until("impostor", "CERTIFICATE_VERIFY_FAILED")
    finally:
        rig.kill("impostor")
    assert f"client {DEVICES[0]}" in rig.log("cloud")
    assert "impostor" not in rig.log("cloud")


def greeted(rig: FlareRig, certificate: Path | None) -> bool:
    """Whether the server speaks to whoever shows a certificate, believing all that the caller should."""
    context = ssl.create_default_context(cafile=str(rig.kit("cloud") / "startup" / "rootCA.pem"))
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        context.load_cert_chain(certificate / "client.crt", certificate / "client.key")
    try:
        with (
            socket.create_connection(("localhost", rig.port), timeout=30) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as link,
        ):
            link.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
            return link.recv(9) != b""
    except (ssl.SSLError, ConnectionError):
        return False


def test_the_server_speaks_to_nobody_of_another_authority(rig: FlareRig, impostor: Path) -> None:
    assert greeted(rig, rig.kit(DEVICES[0]) / "startup")
    assert not greeted(rig, impostor / "startup")
    assert not greeted(rig, None)


@pytest.mark.skipif(other_user() is None, reason="needs root, and an interpreter that another user may run")
def test_the_couriers_user_reaches_the_socket_and_nothing_else_of_a_device(rig: FlareRig) -> None:
    assert rig.user is not None
    secret = rig.base / DEVICES[0] / "device"
    secret.mkdir(mode=0o700)
    (secret / "ledger.jsonl").write_text("{}")
    for name in DEVICES:
        process = psutil.Process(rig.processes[name].pid)
        assert set(process.uids()) == {rig.user}
        assert set(process.gids()) == {rig.user}
    look = f"open({str(secret / 'ledger.jsonl')!r})"
    as_courier = {"user": rig.user, "group": rig.user, "extra_groups": []}
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, **as_courier)
    assert "PermissionError" in found.stderr
