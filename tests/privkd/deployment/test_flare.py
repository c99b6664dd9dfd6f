"""Questions over the real engine: an NVFlare server, three clients as another user, mutual TLS on loopback."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nvflare")
pytest.importorskip("psutil")

from flare_rig import DEVICES, FlareRig

from privkd.deployment.kits import COURIER_CLASS, ROUNDS_CLASS, approve, make_authority, nvflare, package
from privkd.deployment.kits import device_policy as policy_of
from privkd.errors import RunError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rig() -> Iterator[FlareRig]:
    running = FlareRig()
    try:
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
