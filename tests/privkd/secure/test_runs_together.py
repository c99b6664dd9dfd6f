"""Runs that share a group: whose turn it is, that both finish, and that nobody waits for a round that
closes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from rig import LIMITS, Rig, services_inside, sum_over, take, uploads_of

from privkd.errors import RefusalError, RunError
from privkd.journal import Journal
from privkd.secure import worker as workers
from privkd.secure.client import service_links
from privkd.secure.frames import Kind, WorkerSetup
from privkd.secure.group import PartyGroup
from privkd.secure.keys import make_keys
from privkd.secure.local import LocalParties
from privkd.secure.party import LimitsConfig, Party
from privkd.secure.rounds import Rounds
from privkd.secure.state import held
from privkd.secure.worker import BusyError, RecordsInMemory, Worker, WorkerSupervisor

MEMBERS = ("11" * 32, "22" * 32, "33" * 32)
LEASE = 30.0


class NoWorker:
    """Stands where a worker would."""

    def __init__(self, setup: WorkerSetup, *_: object, **__: object) -> None:
        self.session = setup.session
        self.alive = True

    def stop(self) -> None:
        self.alive = False


class Clock:
    """A monotonic clock that the test moves."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(workers, "Worker", NoWorker)
    monkeypatch.setattr(workers, "time", clock)
    return clock


def supervisor(rank: int = 0, sessions: workers.Records | None = None) -> WorkerSupervisor:
    party = Party(rank=rank, parties=2, members=MEMBERS, limits=LimitsConfig(lease_seconds=LEASE))
    records = RecordsInMemory() if sessions is None else sessions
    return WorkerSupervisor(party, X25519PrivateKey.generate(), bytes(32), records, name="worker")


# ---- whose turn it is -------------------------------------------------------------------------------


def test_a_lease_has_the_workers_until_its_round_is_closed(clock: Clock) -> None:
    seat = supervisor()
    seat.join("a-1", None)
    for _ in range(3):
        with pytest.raises(BusyError, match="aggregator-0 is busy with another run's round; try again"):
            seat.join("b-1", None)
    with seat.closing("a-1"), pytest.raises(BusyError):
        seat.join("b-2", None)
    seat.join("b-3", None)
    with pytest.raises(BusyError):
        seat.join("a-2", None)


def test_a_lease_that_does_nothing_ends_in_time(clock: Clock) -> None:
    seat = supervisor()
    seat.join("a-1", None)
    clock.now += LEASE + 1
    seat.join("b-1", None)
    assert seat.worker is not None
    assert seat.worker.session == "b-1"


def test_a_lease_takes_its_own_place_at_any_time(clock: Clock) -> None:
    """The worker of its session before may wait for one that failed."""
    seat = supervisor()
    seat.join("a-1", None)
    with seat.closing("a-1"):
        seat.join("a-2", None)
    with pytest.raises(BusyError):
        seat.join("b-1", None)


def test_whoever_waits_gets_the_workers_in_turn_and_who_gave_up_does_not(clock: Clock) -> None:
    seat = supervisor()
    seat.join("a-1", None)
    for lease in "bcd":
        with pytest.raises(BusyError):
            seat.join(f"{lease}-1", None)
    with seat.closing("a-1"):
        pass
    for lease in "cdae":
        with pytest.raises(BusyError):
            seat.join(f"{lease}-2", None)
    seat.join("b-3", None)
    clock.now += 11.0  # c has asked no more
    with pytest.raises(BusyError):
        seat.join("d-3", None)
    with seat.closing("b-3"):
        pass
    seat.join("d-4", None)


def test_a_quick_run_gives_way_once_it_had_its_turn(clock: Clock) -> None:
    seat = supervisor()
    seat.join("a-1", None)
    for second in range(40):
        clock.now += 1.0
        if second < LEASE:
            with seat.closing("a-1"), pytest.raises(BusyError):
                seat.join("b-1", None)
        else:
            with pytest.raises(BusyError, match="it is another run's turn"), seat.closing("a-1"):
                raise AssertionError
            break
    with pytest.raises(BusyError):
        seat.join("a-2", None)
    seat.join("b-2", None)
    clock.now += 100.0
    with seat.closing("b-2"):
        pass


def test_the_other_parties_follow_rank_0_but_for_a_round_that_they_close(clock: Clock) -> None:
    for rank in (1, 2):
        seat = supervisor(rank)
        seat.join("a-1", 5)
        with seat.closing("a-1"), pytest.raises(BusyError):
            seat.join("b-1", 6)
        seat.join("b-2", 6)
        seat.join("a-3", 7)


def test_names_of_sessions_are_used_once_and_their_record_stays_small(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "sessions.jsonl"
    records = RecordsInMemory()
    seat = supervisor(sessions=records)
    sizes = []
    for number in range(5000):
        seat.join(f"a-{number}", None)
        sizes.append(len(records))
    assert max(sizes) < 2000
    records.replace(list(records)[-1200:])
    journal = Journal(path)
    for record in records:
        journal.append(record)
    again = supervisor(sessions=Journal(path))
    for number in (4999, 4500, 4001):
        with pytest.raises(RefusalError, match="was used before"):
            again.join(f"a-{number}", None)
    for number in range(900):
        again.join(f"b-{number}", None)
    assert len(Journal(path)) <= 2000
    with pytest.raises(RefusalError, match="was used before"):
        supervisor(sessions=Journal(path)).join("b-899", None)


# ---- through services -------------------------------------------------------------------------------


def test_two_runs_on_one_group_both_finish_and_every_sum_is_exact() -> None:
    """Three rounds each, at once; every turn costs a worker a party, and no turn is lost."""
    with LocalParties(2, limits=LIMITS) as parties:
        done: dict[int, int] = {}
        wrong: list[BaseException] = []

        def run(number: int) -> None:
            group = PartyGroup(service_links(parties.urls, parties.client_tls))
            rig = Rig(group, (), parties.state, name=1000 * number)
            try:
                for _ in range(3):
                    terms = rig.open()
                    for upload in uploads_of(terms).values():
                        rig.put(upload)
                    total = rig.close(terms)
                    np.testing.assert_array_equal(total.integers, sum_over(terms, terms.roster))
                    done[number] = done.get(number, 0) + 1
            except BaseException as error:
                wrong.append(error)
            finally:
                group.disconnect()

        threads = [threading.Thread(target=run, args=(number,)) for number in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(240)
        assert not wrong
        assert done == {1: 3, 2: 3}
        for rank in range(2):
            assert len(Journal(parties.state(rank) / "sessions.jsonl")) <= 6


@pytest.fixture
def stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Rig, Rounds, threading.Event]]:
    """A group whose closings stop in each worker's first step until they are let go on."""
    begun, go_on = threading.Semaphore(0), threading.Event()
    call = Worker.call

    def held_up(self: Worker, frame: object, **seconds: float) -> bytes:
        if getattr(frame, "kind", None) is Kind.AGREE:
            begun.release()
            assert go_on.wait(60)
        return call(self, frame, **seconds)  # type: ignore[arg-type]

    monkeypatch.setattr(Worker, "call", held_up)
    with services_inside(tmp_path) as services:
        group = PartyGroup(service_links([service.url for service in services]))
        rig = Rig(group, (), lambda rank: services[rank].party.directory)
        rig.kept["begun"] = begun
        yield rig, services[0].rounds, go_on
        go_on.set()
        group.disconnect()


def test_nobody_waits_for_a_round_that_is_being_closed(
    stuck: tuple[Rig, Rounds, threading.Event],
) -> None:
    """Late uploads are refused at once, and other rounds open, fill and tell how they stand."""
    rig, rounds, go_on = stuck
    terms, other = rig.open(90), rig.open(3)
    uploads = uploads_of(terms)
    for device in terms.roster[:4]:
        rig.put(uploads[device])
    found: list[object] = []
    closing = threading.Thread(target=lambda: found.append(rig.close(terms)))
    closing.start()
    begun = rig.kept["begun"]
    assert isinstance(begun, threading.Semaphore)
    for _ in range(2):
        assert begun.acquire(timeout=60), "either party is closing"
    start = time.monotonic()
    for device in terms.roster[4:]:
        with pytest.raises(RefusalError, match="is closed"):
            take(rounds, terms.label, uploads[device].envelopes[0])
    assert rounds.status(terms.label)["closed"]
    for upload in uploads_of(other).values():
        take(rounds, other.label, upload.envelopes[0])
    rounds.open(other.model_copy(update={"round": other.round + 500}))
    assert closing.is_alive()
    assert time.monotonic() - start < 20, "86 refusals take no step's time"
    go_on.set()
    closing.join(60)
    assert found


# ---- one process a directory ------------------------------------------------------------------------


def test_a_second_process_on_a_party_s_directory_is_refused(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys", tls=False)
    config = tmp_path / "keys" / "party-0.toml"
    command = [sys.executable, "-m", "privkd", "aggregator", "--config", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert "listens on" in first.stdout.readline()
        twin = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (twin.returncode, twin.stdout) == (2, "")
        assert "is in use by another process: stop that one" in " ".join(twin.stderr.split())
        assert "Traceback" not in twin.stderr
        os.kill(first.pid, signal.SIGKILL)
    again = held(tmp_path / "keys" / "state-0")
    with held(tmp_path / "keys" / "state-0"), pytest.raises(RunError, match="in use"), again:
        raise AssertionError
