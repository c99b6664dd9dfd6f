"""A service as its operator meets it: its protocol's file, logs, metrics, health, reload, end, and limits."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rig import LIMITS, Rig, block, services_inside, soon, sum_over, uploads_of

from privkd.errors import ChannelError, ConfigError, RefusalError
from privkd.secure import aggregator_pb2
from privkd.secure.authority import Authority
from privkd.secure.callers import ByteBudget, Callers, TooManyCallsError
from privkd.secure.client import ClientTls, ServiceLink, send, service_links
from privkd.secure.frames import Kind
from privkd.secure.group import PartyGroup, UnreachableError
from privkd.secure.keys import make_keys
from privkd.secure.local import LocalParties
from privkd.secure.party import LimitsConfig, load_party
from privkd.secure.party_state import party_state
from privkd.secure.service import Service
from privkd.secure.servicer import PartyServicer
from privkd.secure.terms import RoundTerms
from privkd.secure.upload import prepare, seal_integers
from privkd.secure.worker import Worker

ROOT = Path(__file__).resolve().parents[3]
RUN = (
    "import sys; from pathlib import Path; from privkd.secure.service import serve; serve(Path(sys.argv[1]))"
)


# ---- the protocol's file ----------------------------------------------------------------------------


def test_the_generated_code_is_that_of_the_protocol(tmp_path: Path) -> None:
    """``make proto`` makes it anew. Lines that name the generator's version are not compared."""
    names = [f"privkd/secure/aggregator_pb2{end}" for end in (".py", ".pyi", "_grpc.py")]
    outs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"-I{ROOT}",
        *outs,
        "privkd/secure/aggregator.proto",
    ]
    subprocess.run(command, check=True, timeout=60, cwd=ROOT)

    def content(path: Path) -> list[str]:
        lines = path.read_text().splitlines()
        version = ("# Protobuf Python Version", "GRPC_GENERATED_VERSION = ", "    5,", "    6,", "    7,")
        return [line for line in lines if not line.startswith(version) and not line.strip(" ,").isdigit()]

    for name in names:
        assert content(tmp_path / name) == content(ROOT / name), name


def test_the_protocol_says_how_long_an_envelope_is_and_what_lies_where(tmp_path: Path) -> None:
    """The bytes as ``aggregator.proto`` states them, read without the package's own reader."""
    make_keys(tmp_path, tls=False)
    party = load_party(tmp_path / "party-0.toml")
    terms = RoundTerms(
        round=2**60 + 5, keys=party.members, entries=7, minimum=2, fraction_bits=0, bound=9, sigma2=None,
        roster=("dévice",), expires=int(time.time()) + 60,
    )  # fmt: skip
    upload = seal_integers(np.zeros(7, np.int64), terms, "dévice")
    forms = set()
    for rank, envelope in enumerate(upload.envelopes):
        assert envelope[:8] == b"PKDU" + bytes([2, rank, 2, 32])
        forms.add(envelope[8])
        assert int.from_bytes(envelope[9:13], "little") == 7
        assert int.from_bytes(envelope[13:21], "little") == terms.label
        assert int.from_bytes(envelope[21:29], "little") == terms.expires
        assert envelope[29:45] == upload.upload_id
        size = int.from_bytes(envelope[45:47], "little")
        assert envelope[47 : 47 + size].decode() == "dévice"
        assert len(envelope) == 47 + size + 32 + 32 + {0: 4 * 7, 1: 32}[envelope[8]] + 16
    assert forms == {0, 1}


def test_every_call_is_the_servicer_s() -> None:
    service = aggregator_pb2.DESCRIPTOR.services_by_name["Aggregator"]
    assert all(method.name in vars(PartyServicer) for method in service.methods)


# ---- a service of its own ---------------------------------------------------------------------------


class Served:
    """One party's service as `privkd aggregator` runs it, its log in a file."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.config = folder, folder / f"party-{rank}.toml"
        self.log_path = folder / f"log-{rank}"
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", RUN, str(self.config)],
                stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        assert self.process.stdout is not None
        self.first = self.process.stdout.readline()
        self.url = self.first.split()[-1]

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log_path.read_text().splitlines()]

    def await_event(self, event: str) -> dict[str, Any]:
        until = time.monotonic() + 20
        while True:
            found = [line for line in self.log() if line["event"] == event]
            if found or time.monotonic() > until:
                assert found, f"{event} is not in {self.log_path.read_text()}"
                return found[-1]
            time.sleep(0.05)

    def children(self) -> list[int]:
        return [int(child) for task in Path(f"/proc/{self.process.pid}/task").iterdir()
                for child in (task / "children").read_text().split()]  # fmt: skip


def settings(config: Path, **changes: Any) -> None:
    config.write_text(tomli_w.dumps(tomllib.loads(config.read_text()) | changes))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def served(tmp_path: Path) -> Iterator[list[Served]]:
    make_keys(tmp_path, devices=("device-0",))
    for rank in range(2):
        settings(
            tmp_path / f"party-{rank}.toml",
            status={"listen": f"127.0.0.1:{free_port()}"}, log={"level": "debug"}, limits=LIMITS,
        )  # fmt: skip
    services = [Served(tmp_path, rank) for rank in range(2)]
    yield services
    for service in services:
        service.process.kill()
        service.process.wait(10)


def cloud(folder: Path) -> ClientTls:
    return ClientTls(folder / "ca.pem", folder / "cloud.pem", folder / "cloud.key")


def looked_up(service: Served, path: str) -> tuple[int, str]:
    listen = tomllib.loads(service.config.read_text())["status"]["listen"]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{listen}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def opened(served: list[Served]) -> Rig:
    links = service_links([service.url for service in served], cloud(served[0].folder))
    return Rig(PartyGroup(links), (), lambda rank: served[0].folder / f"state-{rank}")


def test_what_a_service_shows_of_a_round_and_what_it_never_shows(served: list[Served]) -> None:
    folder, rig = served[0].folder, opened(served)
    terms = rig.open(minimum=3)
    uploads = uploads_of(terms)
    for device in terms.roster[:2]:
        rig.put(uploads[device])
    stranger = prepare(block(9), terms, "stranger")
    with pytest.raises(RefusalError, match="not on the roster"):
        rig.put(stranger)
    own = ClientTls(folder / "ca.pem", folder / "device-0.pem", folder / "device-0.key")
    with pytest.raises(RefusalError, match="may not"):
        ServiceLink(served[0].url, own).abandon(terms.label, soon())
    assert looked_up(served[0], "/healthz") == (200, "ok\n")
    assert looked_up(served[0], "/readyz") == (200, "ready\n")
    assert looked_up(served[0], "/nothing")[0] == 404
    state = json.loads(looked_up(served[0], "/status")[1])
    assert (state["rounds"]["open"], state["uploads"], state["worker"]["running"]) == (1, 2, False)
    assert 0 < state["certificate_seconds"] < 366 * 86400
    for device in terms.roster[2:]:
        rig.put(uploads[device])
    rig.close(terms)
    figures = looked_up(served[0], "/metrics")[1]
    for line in (
        'privkd_calls_total{call="Upload",code="OK"} 4.0', 'privkd_refusals_total{reason="forbidden"} 2.0',
        'privkd_rounds{state="released"} 1.0', "privkd_worker_sessions 1.0", "privkd_worker_up 1.0",
        "process_resident_memory_bytes ", "process_cpu_seconds_total ", "privkd_certificate_seconds 3",
        "privkd_upload_bytes_total ", 'privkd_call_seconds_bucket{call="Upload"',
    ):  # fmt: skip
        assert f"\n{line}" in figures, line
    rig.group.disconnect()
    check_log(served[0], [e for u in (*uploads.values(), stranger) for e in u.envelopes])


def serial(service: Served) -> int:
    """Of the certificate that it shows."""
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as raw:
        context = cloud(service.folder).context()
        with context.wrap_socket(raw, server_hostname="127.0.0.1") as connection:
            shown = connection.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


def test_certificates_and_limits_are_read_anew_and_a_signal_ends_it(served: list[Served]) -> None:
    """In the middle of a round, which is none the worse for it."""
    folder, first, rig = served[0].folder, served[0], opened(served)
    terms = rig.open()
    uploads = uploads_of(terms)
    rig.put(uploads["device-0"])
    before, authority = serial(first), Authority(folder)
    for end in (".pem", ".key"):
        (folder / f"party-0.tls{end}").unlink()
    authority.issue(folder, "party-0.tls", name="party-0", hosts=["127.0.0.1"])
    settings(first.config, limits=LIMITS | {"max_upload_bytes": 4})
    first.process.send_signal(signal.SIGHUP)
    first.await_event("reloaded")
    assert serial(first) != before
    with pytest.raises(RefusalError, match="more than this party takes"):
        rig.open(entries=100)
    settings(first.config, rank=1)
    first.process.send_signal(signal.SIGHUP)
    assert "without a restart" in first.await_event("not reloaded")["reason"]
    for device in terms.roster[1:]:
        rig.put(uploads[device])
    np.testing.assert_array_equal(rig.close(terms).integers, sum_over(terms, terms.roster))
    workers = [child for service in served for child in service.children()]
    assert len(workers) == 2
    for number, service in zip((signal.SIGTERM, signal.SIGINT), served, strict=True):
        begun = time.monotonic()
        service.process.send_signal(number)
        assert service.process.wait(20) == 0
        assert time.monotonic() - begun < 8
        assert service.log()[-1]["event"] == "ended"
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    rig.group.disconnect()


def check_log(service: Served, envelopes: list[bytes]) -> None:
    """Every line is an object with a time, a level and an event; what is secret is in none."""
    lines = service.log()
    assert all({"time", "level", "event"} <= set(line) for line in lines)
    calls = [line for line in lines if line["event"] == "call"]
    upload = next(c for c in calls if c["call"] == "Upload" and c["code"] == "OK")
    assert upload["caller"] == "cloud"
    assert upload["bytes"] in [len(e) for e in envelopes]
    assert upload["ms"] >= 0
    refused = next(c for c in calls if c["code"] == "PERMISSION_DENIED" and c["caller"] == "device-0")
    assert refused["level"] == "warning"
    assert "may not" in refused["reason"]
    text, folder = service.log_path.read_text(), service.folder
    secrets = [*envelopes, (folder / "party-0.noise").read_bytes()]
    for path in (folder / "party-0.key", folder / "party-0.tls.key", folder / "ca.key"):
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        raw = (serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        secrets.append(key.private_bytes(*raw))
    for secret in secrets:
        # Any sixteen bytes of it, as hexadecimal, base64 or Python would write them.
        for start in range(0, len(secret) - 16, 8):
            part = secret[start : start + 16]
            assert part.hex() not in text
            assert base64.b64encode(part)[:-3].decode() not in text
            assert repr(part)[2:-1] not in text
    assert str(folder) not in text


def test_the_state_of_a_service_is_told_whether_it_runs_or_not(served: list[Served]) -> None:
    rig = opened(served)
    terms = rig.open()
    rig.put(uploads_of(terms)["device-0"])
    asked = [sys.executable, "-m", "privkd", "aggregator", "--config", str(served[0].config), "--status"]
    said = subprocess.run([*asked, "--json"], capture_output=True, text=True, timeout=120, check=True)
    tree = json.loads(said.stdout)
    assert tree["answers"]
    assert (tree["party"], tree["uploads"], tree["rounds"]["open"]) == ("aggregator-0", 1, 1)
    served[0].process.kill()
    served[0].process.wait(10)
    state = party_state(served[0].config)
    assert not state.answers
    assert state.rounds["open"] == 1
    assert state.certificate_seconds is not None
    assert state.certificate_seconds > 0
    rig.group.disconnect()


def test_the_standard_health_service_answers(tmp_path: Path) -> None:
    with services_inside(tmp_path) as services:
        link = ServiceLink(services[0].url)
        health = health_pb2_grpc.HealthStub(link._opened())
        for name in ("", "privkd.v1.Aggregator"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        link.close()


def test_a_port_that_is_in_use_is_told_in_one_line(tmp_path: Path) -> None:
    make_keys(tmp_path, tls=False)
    party = load_party(tmp_path / "party-0.toml")
    first = Service(party)
    listen = first.url.partition("://")[2]
    with pytest.raises(ConfigError, match=f"listen='{listen}': it is in use"):
        Service(load_party(tmp_path / "party-1.toml").model_copy(update={"listen": listen}))
    first.stop()


def test_an_expired_certificate_is_told_at_the_start(tmp_path: Path) -> None:
    make_keys(tmp_path)
    for end in (".pem", ".key"):
        (tmp_path / f"party-0.tls{end}").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Authority, "_until", lambda *_: datetime.now(UTC) - timedelta(seconds=5))
        Authority(tmp_path).issue(tmp_path, "party-0.tls", name="party-0", hosts=["127.0.0.1"])
    with pytest.raises(ConfigError, match=r"party-0\.tls\.pem: the certificate of party-0 expired on"):
        Service(load_party(tmp_path / "party-0.toml"))


def test_the_listener_for_operators_is_for_this_machine_alone(tmp_path: Path) -> None:
    make_keys(tmp_path)
    settings(tmp_path / "party-0.toml", status={"listen": "0.0.0.0:9440"})
    with pytest.raises(ConfigError, match=r"status\.listen='0\.0\.0\.0:9440': .*only the loopback"):
        load_party(tmp_path / "party-0.toml")


# ---- what may be taken ------------------------------------------------------------------------------


def test_a_caller_is_held_to_its_part_and_others_are_not() -> None:
    callers = Callers(LimitsConfig(calls_per_caller=2, calls_per_second=0.5))
    with callers.admitted("a"), callers.admitted("a"):
        with pytest.raises(TooManyCallsError, match="'a' has 2 calls on"), callers.admitted("a"):
            pass
        with callers.admitted("b"), callers.admitted(None), callers.admitted("cloud"):
            pass
    for _ in range(3):
        with callers.admitted("a"):
            pass
    with pytest.raises(TooManyCallsError, match=r"more than 0\.5 times a second"), callers.admitted("a"):
        pass
    for _ in range(100):
        with callers.admitted("cloud"), callers.admitted(None):
            pass


def test_bytes_are_given_out_in_order_and_come_back() -> None:
    async def play() -> None:
        budget, order = ByteBudget(10), []

        async def take(name: str, size: int, seconds: float) -> None:
            async with budget.taken(size):
                order.append(name)
                await asyncio.sleep(seconds)

        first = asyncio.create_task(take("first", 6, 0.05))
        await asyncio.sleep(0)
        large = asyncio.create_task(take("larger than all", 99, 0.01))
        given_up = asyncio.create_task(take("given up", 9, 0))
        small = asyncio.create_task(take("small", 1, 0))
        await asyncio.sleep(0.01)
        assert order == ["first"], "a small one does not pass a large one that came before"
        given_up.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await given_up
        await asyncio.gather(first, large, small)
        assert order == ["first", "larger than all", "small"]
        budget.resize(4)
        async with budget.taken(4):
            assert budget._free == 0
        assert budget._free == 4

    asyncio.run(play())


def test_a_device_that_calls_too_often_is_put_off_and_then_served(tmp_path: Path) -> None:
    with LocalParties(2, limits=LIMITS | {"calls_per_second": 0.5}) as parties:
        assert parties.authority is not None
        parties.authority.issue(tmp_path, "device-0", name="device-0")
        own = ClientTls(parties.folder / "ca.pem", tmp_path / "device-0.pem", tmp_path / "device-0.key")
        link = ServiceLink(parties.urls[0], own)
        group = PartyGroup(service_links(parties.urls, parties.client_tls))
        rig = Rig(group, (), parties.state)
        terms = rig.open()
        upload = uploads_of(terms)["device-0"]
        for _ in range(5):
            link.about(soon())
        with pytest.raises(UnreachableError, match=r"calls more than 0\.5 times a second"):
            link.call("About", aggregator_pb2.AboutRequest(), soon())
        send(upload, [link, *rig.group.aggregators[1:]], deadline=soon(30))
        group.disconnect()
        link.close()


def test_late_uploads_and_all_else_are_answered_while_a_round_closes(tmp_path: Path) -> None:
    """Eighty at once, more than there are threads for anything."""
    with services_inside(tmp_path) as services, pytest.MonkeyPatch.context() as patch:
        group = PartyGroup(service_links([service.url for service in services]))
        rig = Rig(group, (), lambda rank: services[rank].party.directory)
        roster = tuple(f"device-{i}" for i in range(84))
        terms, other = rig.open(roster=roster), rig.open()
        uploads = uploads_of(terms)
        for device in roster[:4]:
            rig.put(uploads[device])
        closing, go_on = threading.Event(), threading.Event()
        call = Worker.call

        def held_up(self: Worker, frame: Any, **more: Any) -> bytes:
            if frame.kind is Kind.AGREE:
                closing.set()
                assert go_on.wait(60)
            return call(self, frame, **more)

        patch.setattr(Worker, "call", held_up)
        with ThreadPoolExecutor(1) as closer, ThreadPoolExecutor(20) as crowd:
            closed = closer.submit(rig.close, terms)
            assert closing.wait(60)

            def late(device: str) -> float:
                start = time.monotonic()
                with pytest.raises(RefusalError, match="is closed"):
                    rig.put(uploads[device], 0)
                return time.monotonic() - start

            assert max(crowd.map(late, roster[4:])) < 10
            rig.put(uploads[roster[0]], 0)  # a retry of what is held
            for device, upload in uploads_of(other).items():
                rig.put(upload)
                assert rig.service(0).status(terms.label, soon(5))["closed"], device
            assert not closed.done()
            go_on.set()
            assert closed.result(60).devices == roster[:4]
        group.disconnect()


def test_an_error_tells_nothing_of_where_files_lie(tmp_path: Path) -> None:
    """A disk that is full, and a bug: the one is tried again, and neither tells a path or a traceback."""
    with services_inside(tmp_path) as services:
        link = ServiceLink(services[0].url)
        rounds = services[0].rounds

        def failing(error: Exception) -> Callable[..., None]:
            def fail(*_: object, **__: object) -> None:
                raise error

            return fail

        folder = services[0].party.directory
        for error, words in [
            (
                ChannelError(f"spool {folder}/rounds/7: No space left on device"),
                r"spool \.\.\./rounds/7: No space",
            ),
            (ValueError(f"secret {folder}"), "ValueError; the service's log says where"),
        ]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(rounds, "status", failing(error))
                with pytest.raises(UnreachableError, match=words) as caught:
                    link.call("Status", aggregator_pb2.StatusRequest(round=7), soon(5))
            assert str(folder) not in str(caught.value)
            assert "\n" not in str(caught.value)
        link.close()


def test_each_attempt_is_given_twice_the_time_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    link, given = ServiceLink("grpc://127.0.0.1:1"), []

    def late(name: str, request: object, deadline: float) -> None:
        given.append(deadline - time.monotonic())
        if len(given) < 4:
            raise UnreachableError("late")

    monkeypatch.setattr(link, "call", late)
    link.upload(1, "device-0", b"", soon(100))
    assert given[:3] == pytest.approx([15, 30, 60], abs=1)
    assert given[3] < 100, "none is longer than the deadline"
