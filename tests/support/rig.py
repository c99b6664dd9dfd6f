"""Running parties of the secure channel: rounds among them, their oracle, and blows at their workers."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

from privkd.journal import Journal
from privkd.privacy.noise import NoiseRoot, discrete_gaussian
from privkd.secure.client import ServiceLink, service_links
from privkd.secure.frames import Kind
from privkd.secure.group import PartyGroup, Total, UnreachableError
from privkd.secure.keys import make_keys
from privkd.secure.party import load_party
from privkd.secure.rounds import Rounds
from privkd.secure.service import Service
from privkd.secure.terms import RoundTerms, set_digest
from privkd.secure.upload import Upload, prepare, upload_identifier
from privkd.secure.worker import Worker, WorkerSetup

Integers = NDArray[np.int64]
ENTRIES = 12
SECONDS = 120.0
LIMITS = {"request_seconds": 5.0, "step_seconds": 60.0, "hang_seconds": 5.0}


def soon(seconds: float = SECONDS) -> float:
    return time.monotonic() + seconds


@dataclass
class Rig:
    """A running group, and rounds with names of their own."""

    group: PartyGroup
    noise_keys: tuple[bytes, ...]
    state: Callable[[int], Path]
    name: int = 0
    kept: dict[str, object] = field(default_factory=dict)

    def open(self, devices: int = 4, **changes: object) -> RoundTerms:
        self.name += 1
        fields: dict[str, object] = {
            "round": self.name, "keys": self.group.keys(soon()), "entries": ENTRIES, "minimum": 2,
            "fraction_bits": 0, "bound": 100_000, "sigma2": None, "expires": int(time.time()) + 600,
            "roster": tuple(f"device-{i}" for i in range(devices)),
        }  # fmt: skip
        terms = RoundTerms(**(fields | changes))  # type: ignore[arg-type]
        self.group.open(terms, soon())
        return terms

    def put(self, upload: Upload, *ranks: int) -> None:
        """Send an upload's envelopes to these aggregators."""
        for rank in ranks or range(len(upload.envelopes)):
            self.post(rank, upload.round, upload.envelopes[rank])

    def post(self, rank: int, round: int, envelope: bytes) -> None:
        """As the cloud, for whatever device the envelope names, if any."""
        self.service(rank).upload(round, "", envelope, soon())

    def service(self, rank: int) -> ServiceLink:
        link = self.group.aggregators[rank]
        assert isinstance(link, ServiceLink)
        return link

    def close(self, terms: RoundTerms) -> Total:
        return self.group.close(terms, soon())

    def records(self, rank: int) -> list[dict[str, object]]:
        return list(Journal(self.state(rank) / "journal.jsonl"))

    def journal(self, rank: int, event: str, terms: RoundTerms) -> list[dict[str, object]]:
        records = Journal(self.state(rank) / "journal.jsonl")
        return [r for r in records if r["event"] == event and r["round"] == terms.folder]

    def noise(self, terms: RoundTerms, uploads: list[Upload]) -> Integers:
        """What the aggregators add, by their keys."""
        digest = set_digest(terms, [upload_identifier(u.round, u.device, u.upload_id) for u in uploads])
        if terms.variance is None:
            return np.zeros(terms.entries, np.int64)
        return sum(
            discrete_gaussian(
                terms.variance, terms.entries, NoiseRoot(key).stream("service", terms.round, digest)
            )
            for key in self.noise_keys
        )


def take(rounds: Rounds, label: int, envelope: bytes) -> None:
    """One upload, or why it is not accepted."""
    (failure,) = rounds.upload_many([(label, envelope)])
    if failure is not None:
        raise failure


def block(seed: int, entries: int = ENTRIES) -> Integers:
    return np.random.default_rng(seed).integers(-1000, 1000, entries)


def uploads_of(terms: RoundTerms) -> dict[str, Upload]:
    return {device: prepare(block(i), terms, device) for i, device in enumerate(terms.roster)}


def sum_over(terms: RoundTerms, devices: tuple[str, ...]) -> Integers:
    blocks = {device: block(i) for i, device in enumerate(terms.roster)}
    return np.sum([blocks[device] for device in devices], axis=0)


@contextlib.contextmanager
def services_inside(
    folder: Path, *, third_party: bool = False, limits: Mapping[int, Mapping[str, object]] | None = None
) -> Iterator[list[Service]]:
    """Services in threads of this process, so that a test can strike their workers at a given step.

    ``limits``: further ones, by rank.
    """
    make_keys(folder, third_party=third_party, tls=False)
    services = []
    for rank in range(2 + third_party):
        party = load_party(folder / f"party-{rank}.toml")
        own = {"hang_seconds": 3.0, "step_seconds": 60.0, **(limits or {}).get(rank, {})}
        services.append(Service(party.model_copy(update={"limits": party.limits.model_copy(update=own)})))
    for service in services:
        service.start()
    yield services
    for service in services:
        service.stop()


def strike(
    monkeypatch: pytest.MonkeyPatch, victim: str, kind: Kind, blow: signal.Signals, *, after: bool
) -> list[int]:
    """Have the victim's worker hit once, right before or after its step of this kind."""
    hit: list[int] = []
    call = Worker.call

    def struck(self: Worker, frame: object, **seconds: float) -> bytes:
        def hits() -> bool:
            return self.name == f"{victim}'s worker" and getattr(frame, "kind", None) is kind and not hit

        if hits() and not after:
            hit.append(self.pid)
            os.kill(self.pid, blow)
        answer = call(self, frame, **seconds)  # type: ignore[arg-type]
        if hits():
            hit.append(self.pid)
            os.kill(self.pid, blow)
            if kind in (Kind.SUM, Kind.VOTE):
                raise UnreachableError("the service fails before it keeps the share")
        return answer

    monkeypatch.setattr(Worker, "call", struck)
    return hit


def strike_at_start(monkeypatch: pytest.MonkeyPatch, victim: str, blow: signal.Signals) -> list[int]:
    """Have the victim's next worker hit once, as soon as its process exists."""
    hit: list[int] = []
    start = Worker.__init__

    def struck(self: Worker, setup: WorkerSetup, name: str, *rest: Any, **more: Any) -> None:
        start(self, setup, name, *rest, **more)
        if name == f"{victim}'s worker" and not hit:
            hit.append(self.pid)
            os.kill(self.pid, blow)

    monkeypatch.setattr(Worker, "__init__", struck)
    return hit


Strike: TypeAlias = tuple[str, Kind, signal.Signals, bool]
"""Which party's worker is hit, at which step, how, and whether after it."""


def struck_rounds(
    services: list[Service], strikes: Sequence[Strike], **changes: object
) -> Iterator[tuple[Rig, RoundTerms]]:
    """A round for each strike, opened with ``changes``; each comes out as if nothing had happened."""
    group = PartyGroup(service_links([service.url for service in services]))
    keys = tuple(s.party.noise_key.read_bytes() for s in services if not s.party.deals)
    rig = Rig(group, keys, lambda rank: services[rank].party.directory)
    for victim, kind, blow, after in strikes:
        with pytest.MonkeyPatch.context() as patch:
            terms = rig.open(**({"sigma2": "77"} | changes))
            uploads = uploads_of(terms)
            for upload in uploads.values():
                rig.put(upload)
            hit = strike(patch, victim, kind, blow, after=after)
            total = rig.close(terms)
            assert len(hit) == 1
        exact = sum_over(terms, terms.roster) + rig.noise(terms, list(uploads.values()))
        np.testing.assert_array_equal(total.integers, exact)
        yield rig, terms
    group.disconnect()
