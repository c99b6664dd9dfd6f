"""Rounds of two parties on disk, struck at random: what comes out is exact, once, and paid for to the grain.

A party that is struck dies in the middle of a call to the disk (before it, after it, or with half of it
written) and takes part in nothing until it is read anew from what it left; or its disk is full for a while.
``--fault-rounds`` says how many rounds.
"""

import contextlib
import errno
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from rig import take
from ring import LocalGroup, RingBackend

from privkd.errors import RefusalError
from privkd.journal import Journal
from privkd.privacy.noise import NoiseRoot, discrete_gaussian
from privkd.secure import rounds as rounds_module
from privkd.secure.frames import Frame, Kind, pack_identifiers, unpack_identifiers
from privkd.secure.keys import public_hex
from privkd.secure.party import LimitsConfig, Party
from privkd.secure.protocol import AggregatorProtocol
from privkd.secure.rounds import Rounds
from privkd.secure.state import Reserve
from privkd.secure.terms import RoundTerms, agreed_in, combine
from privkd.secure.upload import Upload, prepare
from privkd.secure.uploads import UploadsOnDisk, stored_rounds
from privkd.secure.worker import WorkerError

KEYS = [X25519PrivateKey.generate() for _ in range(2)]
ROOTS = [NoiseRoot(bytes([rank]) * 32) for rank in range(2)]
DEVICES = tuple(f"d{i}" for i in range(5))
LIMITS = LimitsConfig(
    minimum_devices=1, keep_rounds=1, keep_results=3, max_rho_total=1e9, max_round_days=0.01
)
WRITES = ("write", "pwrite")
CALLS = (*WRITES, "fsync", "fdatasync", "link", "replace", "rename", "unlink", "truncate", "ftruncate")


class DeathError(BaseException):
    """The end of a party's process."""


@dataclass
class Striker:
    """Stands in every call to the disk; strikes the party whose turn it is to act."""

    draw: random.Random
    acting: "Node | None" = None
    fuse: int = -1
    full: int = 0
    deaths: int = 0
    fulls: int = 0

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def struck(*arguments: Any, **named: Any) -> Any:
            node = self.acting
            if node is None:
                return call(*arguments, **named)
            if node.dead:
                raise DeathError
            self.fuse -= 1
            if self.full and name not in ("unlink", "truncate", "ftruncate"):
                self.full -= 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.fuse != 0:
                return call(*arguments, **named)
            if self.draw.random() < 0.25:
                self.full, self.fulls = self.draw.randrange(1, 6), self.fulls + 1
                return struck(*arguments, **named)
            node.dead, self.deaths = True, self.deaths + 1
            how = self.draw.choice(["before", "half", "after"])
            if how == "half" and name in WRITES:
                descriptor, data, *place = arguments
                call(descriptor, bytes(data)[: len(data) // 2], *place)
            elif how == "after":
                call(*arguments, **named)
            raise DeathError

        return struck

    @contextlib.contextmanager
    def strikes(self, node: "Node") -> Iterator[None]:
        """Within, ``node`` acts, and lives again afterwards. Its death is a worker's to whoever asked it."""
        before, self.acting = self.acting, node
        try:
            yield
        except DeathError:
            raise WorkerError("died") from None
        finally:
            self.acting = before
            if node.dead:
                self.acting = None
                node.dead = False
                node.open()
                self.acting = before


@dataclass
class Node:
    """One party, which reads itself anew from its folder."""

    rank: int
    folder: Path
    striker: Striker
    nodes: list["Node"]
    dead: bool = False
    rounds: Rounds = field(init=False)

    def open(self) -> None:
        (self.folder / "rounds").mkdir(parents=True, exist_ok=True)
        members = tuple(public_hex(key) for key in KEYS)
        self.rounds = Rounds(
            Party(rank=self.rank, parties=2, members=members, limits=LIMITS),
            self,  # type: ignore[arg-type]
            journal=Journal(self.folder / "journal.jsonl"),
            create=lambda terms: UploadsOnDisk.create(self.folder / "rounds" / terms.folder, terms),
            stored=stored_rounds(self.folder / "rounds"),
            sealing_key=KEYS[self.rank],
            reserve=Reserve(self.folder / "reserve"),
        )

    def closing(self, session: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def ask(self, session: str, kind: Kind, body: bytes, uploads: object = ()) -> bytes:
        """The steps of a worker; the other party's part in agreeing is taken at once."""
        if kind is Kind.AGREE:
            other = self.nodes[1 - self.rank]
            label = int(session, 16)
            with self.striker.strikes(other):
                state = other.rounds._opened(label)
                other.rounds._freeze(state)
                theirs = {header.identifier for header in state.uploads.held.values()}
            return pack_identifiers(sorted(theirs.intersection(unpack_identifiers(body))))
        backend = RingBackend(self.rank, LocalGroup(2))
        protocol = AggregatorProtocol(backend, KEYS[self.rank], ROOTS[self.rank], session)
        answer = protocol.step(Frame(kind, body))
        assert answer is not None
        return answer.body


class Group:
    """Both parties and whoever asks them, who never gives up before a refusal."""

    def __init__(self, folder: Path, striker: Striker) -> None:
        self.striker = striker
        self.nodes: list[Node] = []
        self.nodes += [Node(rank, folder / str(rank), striker, self.nodes) for rank in range(2)]
        for node in self.nodes:
            node.open()

    def insist(self, node: Node, act: Callable[[Rounds], Any]) -> Any:
        for _ in range(200):
            with contextlib.suppress(WorkerError, rounds_module.StorageError), self.striker.strikes(node):
                return act(node.rounds)
        raise AssertionError("it never came to anything")

    def upload(self, upload: Upload, rank: int) -> None:
        envelope = upload.envelopes[rank]
        self.insist(self.nodes[rank], lambda rounds: take(rounds, upload.round, envelope))

    def close(self, terms: RoundTerms) -> list[bytes]:
        def share(rounds: Rounds) -> bytes:
            agree = any(node.rounds.status(terms.label)["set"] is None for node in self.nodes)
            return rounds.close(terms.label, terms.folder, agree=agree)

        return [self.insist(node, share) for node in self.nodes]


class Clock:
    """Unix time that passes a minute a round, so that rounds expire and are forgotten."""

    now = float(int(time.time()))

    def time(self) -> float:
        return self.now


def test_whatever_strikes_a_sum_is_exact_and_made_once(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, clock = random.Random(11), Clock()
    striker = Striker(draw)
    for name in CALLS:
        monkeypatch.setattr(os, name, striker.wrap(name, getattr(os, name)))
    monkeypatch.setattr(rounds_module, "time", clock)
    shared = Path("/dev/shm")
    spent = [Counter[str](), Counter[str]()]
    released = refused = 0
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        group = Group(Path(folder), striker)
        for number in range(request.config.getoption("--fault-rounds")):
            clock.now += 60
            terms = _terms(number, int(clock.now) + 100, draw)
            striker.fuse = draw.randrange(1, 150)
            came = _played(group, terms, draw)
            released, refused = released + came, refused + (not came)
            striker.fuse, striker.full = -1, 0
            for node, counted in zip(group.nodes, spent, strict=True):
                for device in node.rounds.status(terms.label)["devices"]:
                    counted[device] += -((-(terms.rho or Fraction(0)) * 2**64).__floor__())
        for node, counted in zip(group.nodes, spent, strict=True):
            node.open()
            assert node.rounds._totals._spent == counted
            assert len(list((Path(folder) / str(node.rank) / "rounds").iterdir())) < 20
    print(f"{released} released, {refused} refused; {striker.deaths} deaths, {striker.fulls} full disks")
    assert released > refused
    assert striker.deaths > 0


def _terms(number: int, expires: int, draw: random.Random) -> RoundTerms:
    return RoundTerms(
        round=number, run="ab" * 32, keys=tuple(public_hex(key) for key in KEYS), entries=6,
        minimum=draw.randrange(1, 5), fraction_bits=0, bound=10_000,
        sigma2=draw.choice(["50000", "1000000/3"]), roster=DEVICES, expires=expires,
    )  # fmt: skip


def _played(group: Group, terms: RoundTerms, draw: random.Random) -> bool:
    """A round among random devices, of which some reach one party alone; whether its exact sum came."""
    for node in group.nodes:
        group.insist(node, lambda rounds: rounds.open(terms))
    blocks = {device: np.array([draw.randrange(-1000, 1000) for _ in range(6)]) for device in DEVICES}
    both = set()
    for device, block in blocks.items():
        upload = prepare(block, terms, device, device.encode().ljust(32, b"."))
        ranks = draw.choice([(0, 1), (0, 1), (0, 1), (1, 0), (0,), ()])
        for rank in ranks:
            group.upload(upload, rank)
        if len(ranks) == 2:
            both.add(device)
    if len(both) < terms.minimum:
        for _ in range(2):
            with pytest.raises(RefusalError, match=f"{len(both)} uploads agreed, fewer than {terms.minimum}"):
                group.close(terms)
        return False
    shares = group.close(terms)
    status = group.nodes[0].rounds.status(terms.label)
    assert set(status["devices"]) == both
    digest = bytes.fromhex(agreed_in(shares[0]))
    exact = np.sum([blocks[device] for device in both], axis=0)
    for root in ROOTS:
        assert terms.variance is not None
        exact = exact + discrete_gaussian(terms.variance, 6, root.stream("service", terms.round, digest))
    np.testing.assert_array_equal(combine(terms, shares), exact)
    assert group.close(terms) == shares
    for node in group.nodes:
        label = terms.folder
        posted = [r for r in node.rounds._journal if r.get("round") == label and r["event"] == "posted"]
        assert len(posted) == 1
    return True
