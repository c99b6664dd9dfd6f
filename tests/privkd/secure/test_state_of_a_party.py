"""What a party keeps: totals survive that rounds are forgotten, files stay small, and a full disk closes
rounds."""

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from rig import LIMITS, Rig, block, soon, take

from privkd.channels.channel import noise_variance
from privkd.errors import RefusalError, RunError
from privkd.journal import Journal
from privkd.secure import rounds as rounds_module
from privkd.secure.client import send, service_links
from privkd.secure.frames import Kind, pack_identifiers, unpack_identifiers
from privkd.secure.group import PartyGroup, UnreachableError
from privkd.secure.keys import make_keys, public_hex
from privkd.secure.party import LimitsConfig, Party
from privkd.secure.rounds import Rounds
from privkd.secure.rpc import stream
from privkd.secure.state import Reserve
from privkd.secure.terms import DeviceTotals, RoundTerms, partial_sum, set_digest
from privkd.secure.upload import prepare
from privkd.secure.uploads import StorageError, UploadsOnDisk, stored_rounds

KEYS = [X25519PrivateKey.generate() for _ in range(2)]
DEVICES = tuple(f"d{i}" for i in range(6))
NOW = int(time.time())


class Alone:
    """A worker of a party that agrees with itself."""

    def closing(self, session: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def ask(self, session: str, kind: Kind, body: bytes, uploads: object = ()) -> bytes:
        if kind is Kind.AGREE:
            return pack_identifiers(sorted(unpack_identifiers(body)))
        task = json.loads(body)
        terms = RoundTerms.unpack(task["terms"].encode())
        held = dict(UploadsOnDisk(Path(task["folder"]), terms).held)
        digest = set_digest(terms, [held[device].identifier for device in task["devices"]])
        return partial_sum(digest, np.zeros(terms.entries, np.uint32))


def party(**limits: object) -> Party:
    members = tuple(public_hex(key) for key in KEYS)
    own = {"minimum_devices": 1, "keep_rounds": 2, "keep_results": 4} | limits
    return Party(rank=0, parties=2, members=members, limits=LimitsConfig(**own))


def opened(folder: Path, **limits: object) -> Rounds:
    (folder / "rounds").mkdir(exist_ok=True)
    return Rounds(
        party(**limits),
        Alone(),  # type: ignore[arg-type]
        journal=Journal(folder / "journal.jsonl"),
        create=lambda terms: UploadsOnDisk.create(folder / "rounds" / terms.folder, terms),
        stored=stored_rounds(folder / "rounds"),
        reserve=Reserve(folder / "reserve"),
    )


def terms_of(round: int, **changes: object) -> RoundTerms:
    fields: dict[str, object] = {
        "round": round, "keys": party().members, "entries": 4, "minimum": 1, "fraction_bits": 0,
        "bound": 1000, "sigma2": str(noise_variance(1000, 0.1)), "roster": DEVICES, "expires": NOW + 100,
    }  # fmt: skip
    return RoundTerms(**(fields | changes))  # type: ignore[arg-type]


class Clock:
    """Unix time that the test moves."""

    now = float(NOW)

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(rounds_module, "time", clock)
    return clock


def play(rounds: Rounds, terms: RoundTerms, devices: tuple[str, ...]) -> bytes:
    rounds.open(terms)
    for device in devices:
        take(rounds, terms.label, prepare(np.zeros(4), terms, device).envelopes[0])
    return rounds.close(terms.label, "session")


def test_totals_survive_that_rounds_are_forgotten_to_the_last_grain(tmp_path: Path, clock: Clock) -> None:
    """400 rounds of random prices, some without noise, some abandoned, with restarts, against the plain
    sum."""
    draw = random.Random(3)
    spent: dict[str, Fraction] = dict.fromkeys(DEVICES, Fraction(0))
    free: Counter[str] = Counter()
    rounds, sizes, folders = opened(tmp_path, max_round_days=0.02), [], []
    for number in range(400):
        clock.now += 60
        terms = terms_of(number, expires=int(clock.now) + draw.choice([50, 300]),
                         sigma2=draw.choice([None, *("12345/7", "99991/3", "1000003")]))  # fmt: skip
        devices = tuple(draw.sample(DEVICES, draw.randrange(1, 6)))
        if draw.random() < 0.1:
            rounds.open(terms)
            rounds.abandon(terms.label)
            rounds.abandon(2**60 + number)
        else:
            play(rounds, terms, devices)
            for device in devices:
                if terms.rho is None:
                    free[device] += 1
                else:
                    # Each price is rounded up to whole grains of 2^-64.
                    spent[device] += Fraction(-(-terms.rho * 2**64 // 1), 2**64)
        if draw.random() < 0.01:
            rounds = opened(tmp_path, max_round_days=0.02)
        sizes.append((tmp_path / "journal.jsonl").stat().st_size)
        folders.append(len(list((tmp_path / "rounds").iterdir())))
    for totals in (rounds._totals, DeviceTotals.recalled(1.0, Journal(tmp_path / "journal.jsonl"))):
        assert {d: Fraction(totals._spent[d], 2**64) for d in DEVICES} == spent
        assert {d: totals._without_noise[d] for d in DEVICES} == {d: free[d] for d in DEVICES}
    assert max(sizes[200:]) <= max(sizes[:200]) + 2000, "the journal does not grow"
    assert max(folders) <= 30
    assert len(rounds._rounds) + len(rounds._gone) < 80


def test_a_limit_holds_over_rounds_that_were_forgotten(tmp_path: Path, clock: Clock) -> None:
    for number in range(30):
        rounds = opened(tmp_path, max_rho_total=2.95)
        clock.now += 200
        terms = terms_of(number, expires=int(clock.now) + 100)
        if number < 29:
            play(rounds, terms, DEVICES)
            continue
        with pytest.raises(RefusalError, match=r"would take it beyond this party's max_rho_total=2\.95"):
            play(rounds, terms, DEVICES)
    assert len(rounds._rounds) < 10


def test_what_did_not_expire_is_kept_and_repeats(tmp_path: Path, clock: Clock) -> None:
    rounds = opened(tmp_path)
    shares = {}
    for number in range(40):
        clock.now += 1
        shares[number] = play(rounds, terms_of(number, expires=NOW + 1000), DEVICES)
    rounds = opened(tmp_path)
    assert all(rounds.close(number, "any", agree=False) == share for number, share in shares.items())
    clock.now += 2000
    for number in range(40, 60):
        clock.now += 200
        play(rounds, terms_of(number, expires=int(clock.now) + 100), DEVICES)
    with pytest.raises(RefusalError, match="is not open here"):
        rounds.status(0)


def test_an_envelope_of_a_forgotten_round_is_of_no_use_to_its_name(tmp_path: Path, clock: Clock) -> None:
    rounds = opened(tmp_path)
    old = terms_of(0)
    envelope = prepare(np.ones(4), old, "d0").envelopes[0]
    play(rounds, old, DEVICES[1:])
    for number in range(1, 30):
        clock.now += 200
        play(rounds, terms_of(number, expires=int(clock.now) + 100), DEVICES)
    again = terms_of(0, expires=int(clock.now) + 100)
    rounds.open(again)
    with pytest.raises(RefusalError, match="upload for another expiry"):
        take(rounds, again.label, envelope)


def test_a_crash_between_the_journal_and_the_folders_leaves_nothing(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = opened(tmp_path)
    monkeypatch.setattr(UploadsOnDisk, "drop", lambda _: None)
    for number in range(30):
        clock.now += 200
        play(rounds, terms_of(number, expires=int(clock.now) + 100), DEVICES)
    assert len(list((tmp_path / "rounds").iterdir())) == 30
    monkeypatch.undo()
    monkeypatch.setattr(rounds_module, "time", clock)
    opened(tmp_path)
    assert len(list((tmp_path / "rounds").iterdir())) < 12


def test_a_round_that_expires_too_far_ahead_is_refused(tmp_path: Path) -> None:
    rounds = opened(tmp_path)
    for expires in (int(time.time()) + 31 * 86_400, 10**18):
        with pytest.raises(RefusalError, match=f"expires at {expires}, more than max_round_days=30 ahead"):
            rounds.open(terms_of(1, expires=expires))
    rounds.open(terms_of(1, expires=int(time.time()) + 29 * 86_400))


# ---- a journal that is written anew -----------------------------------------------------------------


def test_a_journal_is_replaced_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for number in range(5):
        journal.append({"n": number})
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", _full)
        with pytest.raises(RunError, match="No space left on device; nothing was replaced"):
            journal.replace([{"n": 9}])
    assert path.read_bytes() == before
    assert [record["n"] for record in journal] == [0, 1, 2, 3, 4]
    journal.replace([{"n": 9}])
    journal.append({"n": 10})
    assert [record["n"] for record in Journal(path)] == [9, 10]
    assert [p.name for p in tmp_path.iterdir()] == ["journal.jsonl"]
    twin = Journal(path)
    twin.append({"n": 11})
    with pytest.raises(RunError, match="changed by another process"):
        journal.replace([{"n": 0}])


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- full disks -------------------------------------------------------------------------------------


def test_only_what_closes_a_round_gets_at_the_reserve(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / "reserve")
    reserve.hold(100_000)
    assert (tmp_path / "reserve").stat().st_blocks * 512 >= 100_000
    tried: list[int] = []

    def write() -> str:
        tried.append((tmp_path / "reserve").stat().st_size)
        if len(tried) == 1:
            try:
                _full()
            except OSError as error:
                raise StorageError.of(error) from error
        return "written"

    assert reserve.insist(write) == "written"
    assert tried == [100_000, 0]
    reserve.restore()
    assert (tmp_path / "reserve").stat().st_size == 100_000
    reserve.hold(500)
    assert Reserve(tmp_path / "reserve")._has == 500


def mounted(folder: Path, size: str) -> Callable[[list[str]], "subprocess.Popen[str]"]:
    """Starts commands that see a file system of their own, of so many bytes, at ``folder``."""

    def start(command: list[str]) -> "subprocess.Popen[str]":
        script = f'mount -t tmpfs -o size={size} none "$1" && shift && exec "$@"'
        return subprocess.Popen(
            ["unshare", "-m", "sh", "-c", script, "sh", str(folder), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="may not mount a file system of its own")
def test_on_a_full_disk_what_is_durable_is_closed_and_the_rest_may_come_again(tmp_path: Path) -> None:
    """Party 0 has 900 KB: some uploads of 120 KB fit, others do not, and the round is exact over those that
    do."""
    make_keys(tmp_path / "k", tls=False)
    (tmp_path / "k" / "state-0").mkdir()
    for rank in range(2):
        config = tmp_path / "k" / f"party-{rank}.toml"
        limits = "\n".join(f"{name} = {value}" for name, value in LIMITS.items())
        config.write_text(f"{config.read_text()}\n[limits]\n{limits}\n")
    commands = [
        [sys.executable, "-m", "privkd", "aggregator", "--config", str(tmp_path / "k" / f"party-{rank}.toml")]
        for rank in range(2)
    ]
    processes = [mounted(tmp_path / "k" / "state-0", "900k")(commands[0])]
    processes.append(subprocess.Popen(commands[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        urls = [_told(process) for process in processes]
        group = PartyGroup(service_links(urls))
        rig = Rig(group, (), lambda rank: tmp_path / "k" / f"state-{rank}")
        # Which of the two parties holds an upload is drawn: of 24, party 0 holds too many but once in 7,000.
        terms = rig.open(24, entries=30_000, bound=1_000_000)
        assert not _fills(urls, terms)
        total = rig.close(terms)
        blocks = {device: block(number, 30_000) for number, device in enumerate(terms.roster)}
        np.testing.assert_array_equal(total.integers, np.sum([blocks[d] for d in total.devices], axis=0))
        assert 2 <= len(total.devices) < 24
        np.testing.assert_array_equal(rig.close(terms).integers, total.integers)
        with pytest.raises(UnreachableError, match="cannot write to its disk"):
            rig.service(0).call("Open", stream(9, _big(terms)), soon())
        group.disconnect()
    finally:
        for process in processes:
            process.terminate()
            process.communicate(timeout=30)


def _told(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().split()[-1]


def _fills(urls: list[str], terms: RoundTerms) -> list[str]:
    """Send uploads until the disk is full; what was told of it that should not be."""
    bad, refused = [], 0
    for number, device in enumerate(terms.roster):
        upload = prepare(block(number, terms.entries), terms, device)
        try:
            send(upload, service_links(urls), deadline=time.monotonic() + 3.0)
        except UnreachableError as error:
            refused += 1
            told = str(error).partition(": ")[2]
            bad += [told] if "/" in told or "cannot write to its disk (No space left" not in told else []
            if refused == 3:
                break
    assert refused, "the disk was to be full"
    return bad


def _big(terms: RoundTerms) -> bytes:
    return terms.model_copy(update={"round": 9, "entries": 1 << 20}).pack()
