"""The rounds of one party's service: opened, filled, closed, released once.

What a party decides is in its journal before it acts on it:

    opened -> closed (which uploads it holds) -> agreed (over which set it releases) -> posted, or failed

A closed round takes no more uploads, so a repeated closing agrees on the same set, draws the same noise and
makes the same bytes. A set that differs from the one in the journal is refused.
"""

import socket
import threading
import time
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from privkd.errors import ChannelError, ConfigError
from privkd.events import PartyId
from privkd.journal import Journal
from privkd.secure.envelope import Header, header_of, unseal
from privkd.secure.keys import load_noise_key, load_sealing_key, public_hex
from privkd.secure.party import PartyConfig
from privkd.secure.shares import Share
from privkd.secure.spool import RoundSpool, stored_rounds
from privkd.secure.terms import RoundTerms, set_digest
from privkd.secure.wire import Frame, Kind
from privkd.secure.worker import (
    Task,
    Worker,
    WorkerError,
    WorkerSetup,
    pack_identifiers,
    unpack_identifiers,
)

_MAX_STRANGERS = 100


class RefusalError(ChannelError):
    """This party will not do what was asked, now or later. ``status`` is HTTP's."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass
class _Round:
    """One round's state; the journal's, but for who was refused."""

    spool: RoundSpool
    opened: bool = False
    closed: str | None = None
    agreed: str | None = None
    devices: list[PartyId] = field(default_factory=list)
    left_out: dict[PartyId, str] = field(default_factory=dict)
    failure: str | None = None
    posted: bool = False
    pruned: bool = False
    refused: dict[PartyId, str] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)


class Rounds:
    """All rounds of one party. Safe to call from many threads."""

    def __init__(self, party: PartyConfig) -> None:
        """Take up what the party's directory holds.

        Raises:
            ConfigError: a key is missing, or not the one that the members list names.
            RunError: the journal is damaged.
        """
        self.party = party
        self._sealing_key = load_sealing_key(party.sealing_key)
        self._noise_key = load_noise_key(party.noise_key)
        if public_hex(self._sealing_key) != party.members[party.rank]:
            raise ConfigError(
                f"{party.sealing_key}: its public key is {public_hex(self._sealing_key)}, "
                f"but members[{party.rank}] says {party.members[party.rank]}"
            )
        self._spools = party.directory / "rounds"
        self._spools.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(party.directory / "journal.jsonl")
        self._journalling = threading.Lock()
        self._rounds = {spool.terms.round: _Round(spool) for spool in stored_rounds(self._spools)}
        self._gone: set[int] = set()
        for record in self._journal:
            self._recall(record)
        self._opening = threading.Lock()
        self._seating = threading.Lock()
        self._worker: Worker | None = None
        self._port = 0

    def _recall(self, record: dict[str, Any]) -> None:
        state = self._rounds.get(int(record["round"], 16))
        if state is None:
            self._gone.add(int(record["round"], 16))
            return
        match record["event"]:
            case "opened":
                state.opened = True
            case "closed":
                state.closed = record["held"]
            case "agreed":
                state.agreed = record["set"]
                state.devices, state.left_out = record["devices"], record["left_out"]
            case "failed":
                state.failure = record["reason"]
            case "posted":
                state.posted = True

    def _record(self, state: _Round, event: str, **facts: Any) -> None:
        with self._journalling:
            self._journal.append({"event": event, "round": state.spool.terms.folder} | facts)

    # ---- opening ------------------------------------------------------------------------------------

    def open(self, terms: RoundTerms) -> None:
        """Begin a round. The same terms again change nothing.

        Raises:
            RefusalError: other terms were opened under this name, or this party does not accept these.
        """
        with self._opening:
            state = self._rounds.get(terms.round)
            if state is not None and state.spool.terms != terms:
                raise RefusalError(409, f"round {terms.folder} was opened with other terms")
            if state is None:
                self._check(terms)
                state = _Round(RoundSpool.create(self._spools / terms.folder, terms))
                self._rounds[terms.round] = state
            if not state.opened:
                self._record(state, "opened", terms=terms.model_dump())
                state.opened = True
                self._prune()

    def _check(self, terms: RoundTerms) -> None:
        limits, name = self.party.limits, f"round {terms.folder}"
        if terms.round in self._gone:
            raise RefusalError(409, f"{name} is in the journal, but its spool was removed; take a new name")
        if self.party.deals:
            raise RefusalError(404, f"{self.party.name} holds no shares, so it takes part in no round")
        if terms.keys != self.party.members[: self.party.parties]:
            raise RefusalError(409, f"{name}: its keys are not those of this party's members")
        if terms.expires <= time.time():
            raise RefusalError(410, f"{name} has expired")
        if terms.minimum < limits.minimum_devices:
            raise RefusalError(
                403, f"{name}: minimum={terms.minimum}, this party asks for {limits.minimum_devices}"
            )
        if terms.entries * 4 > limits.max_upload_bytes:
            raise RefusalError(413, f"{name}: {terms.entries} entries, more than this party takes")
        if terms.projections and not self.party.third_party:
            raise RefusalError(409, f"{name}: the norm check needs a third party, and this group has none")
        if limits.max_rho is not None and (
            not terms.total
            or Fraction(terms.bound**2) / (2 * terms.total) > Fraction(limits.max_rho) * Fraction(1 + 2**-40)
        ):
            raise RefusalError(
                403, f"{name}: less noise than this party's max_rho={limits.max_rho:g} asks for"
            )

    def _prune(self) -> None:
        done = [state for state in self._rounds.values() if state.posted or state.failure]
        for state in done[: -self.party.limits.keep_rounds]:
            # Once each: a party that has seen thousands of rounds would else spend its time on them.
            if not state.pruned:
                state.spool.drop_uploads()
                state.pruned = True

    def status(self, round: int) -> dict[str, Any]:
        """What is public of a round: its terms, how far it is, and over which devices it is released."""
        state = self._opened(round)
        return {
            "terms": state.spool.terms.pack().decode(),
            "closed": state.closed is not None,
            "set": state.agreed,
            "devices": state.devices,
            "left_out": state.left_out,
            "failure": state.failure,
        }

    # ---- uploads ------------------------------------------------------------------------------------

    def upload(self, round: int, envelope: bytes) -> PartyId:
        """Take one device's upload, durably; the device. The same bytes again change nothing.

        Raises:
            RefusalError: it is not accepted; the reason is kept for the journal.
        """
        state = self._opened(round)
        try:
            header = header_of(envelope)
        except ChannelError as error:
            raise RefusalError(400, str(error)) from error
        try:
            self._admit(state, header, envelope)
        except RefusalError as refusal:
            known = header.device in state.spool.terms.roster or len(state.refused) < _MAX_STRANGERS
            # A device whose upload is held is not besmirched by what others send in its name.
            if known and header.device not in state.spool.held:
                state.refused[header.device] = str(refusal)
            raise
        return header.device

    def _admit(self, state: _Round, header: Header, envelope: bytes) -> None:
        terms = state.spool.terms
        self._check_header(terms, header)
        try:
            share: Share = unseal(envelope, self._sealing_key)[1]
            share.expand(terms.entries)
        except ChannelError as error:
            raise RefusalError(400, str(error)) from error
        with state.lock:
            if header.device not in state.spool.held:
                if state.closed is not None or state.failure is not None:
                    raise RefusalError(409, f"{header.device}: round {terms.folder} is closed")
                if terms.expires <= time.time():
                    raise RefusalError(410, f"{header.device}: round {terms.folder} has expired")
            try:
                state.spool.add(header, envelope)
            except ChannelError as error:
                if isinstance(error.__cause__, OSError):
                    raise
                raise RefusalError(409, str(error)) from error

    def _check_header(self, terms: RoundTerms, header: Header) -> None:
        found = (header.round, header.party, header.parties, header.entries)
        expected = (terms.round, self.party.rank, self.party.parties, terms.entries)
        if found != expected:
            names = ("round", "aggregator", "number of aggregators", "number of entries")
            wrong = [name for name, a, b in zip(names, found, expected, strict=True) if a != b]
            raise RefusalError(400, f"{header.device}: upload for another {wrong[0]}")
        if header.device not in terms.roster:
            raise RefusalError(403, f"{header.device}: not on the roster of round {terms.folder}")

    def _opened(self, round: int) -> _Round:
        state = self._rounds.get(round)
        if state is None or not state.opened:
            raise RefusalError(404, f"round {round:016x} is not open here")
        return state

    # ---- the worker ---------------------------------------------------------------------------------

    def join(self, session: str, port: int | None) -> int:
        """Start a worker that joins the parties' ``session``; the port of its rendezvous.

        A group of workers cannot be mended, so a new session ends the worker of the one before.

        Args:
            session: names the group of workers.
            port: of rank 0's rendezvous; rank 0 itself needs none, and binds it.

        Raises:
            WorkerError: the worker cannot be started.
        """
        with self._seating:
            if self._worker is not None and self._worker.session == session and self._worker.alive:
                return self._port
            self._end_worker()
            if self.party.rank == 0:
                with self._bind() as listener:
                    self._port = listener.getsockname()[1]
                    self._worker = self._start(session, listener)
            else:
                if port is None:
                    raise RefusalError(400, "a session needs the port of rank 0's rendezvous")
                self._port = port
                self._worker = self._start(session, None)
            return self._port

    def _bind(self) -> socket.socket:
        peers = self.party.peers
        try:
            return socket.create_server((peers.host, peers.port), backlog=64)
        except OSError as error:
            raise WorkerError(
                f"{self.party.name}: cannot listen on {peers.host}:{peers.port}: {error}"
            ) from error

    def _start(self, session: str, listener: socket.socket | None) -> Worker:
        party = self.party
        setup = WorkerSetup(
            rank=party.rank,
            parties=party.parties,
            host=party.peers.host,
            port=self._port,
            interface=party.peers.interface,
            sealing_key=self._sealing_key.private_bytes_raw().hex(),
            noise_key=self._noise_key.hex(),
            members=party.members,
            session=session,
        )
        return Worker(setup, party.name, listener, start_seconds=party.limits.start_seconds)

    def _end_worker(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def _ask(self, session: str, kind: Kind, body: bytes) -> bytes:
        worker, limits = self._worker, self.party.limits
        if worker is None or worker.session != session:
            raise WorkerError(f"{self.party.name} has no worker in this session")
        return worker.call(
            Frame(kind, body), step_seconds=limits.step_seconds, hang_seconds=limits.hang_seconds
        )

    # ---- closing ------------------------------------------------------------------------------------

    def close(self, round: int, session: str, *, agree: bool = True) -> bytes:
        """This party's noisy share of the agreed sum: the set's digest, then ring elements.

        Args:
            round: which one.
            session: the group of workers to do it with.
            agree: whether some aggregator does not know the agreed set yet. All must then take part in
                agreeing on it, those too that have made their shares.

        Raises:
            RefusalError: nothing is released, for good.
            WorkerError: a party's worker failed; nothing was released, and a new session may try again.
        """
        state = self._opened(round)
        with state.lock:
            if state.failure is not None:
                raise RefusalError(409, state.failure)
            if agree:
                self._freeze(state)
                self._agree(state, session)
            share = state.spool.share
            if share is None:
                self._freeze(state)
                share = self._sum(state, session)
                state.spool.keep_share(share)
            if not state.posted:
                self._record(state, "posted")
                state.posted = True
            return share

    def _freeze(self, state: _Round) -> None:
        """From here on the round takes no more uploads, even after a restart."""
        terms = state.spool.terms
        held = set_digest(terms, [header.identifier for header in state.spool.held.values()]).hex()
        if state.closed is None:
            if terms.expires <= time.time():
                self._fail(state, f"round {terms.folder} expired before it was closed")
            self._record(state, "closed", held=held)
            state.closed = held
        elif state.closed != held:
            raise RefusalError(409, f"round {terms.folder}: the spool has changed since the round was closed")

    def _agree(self, state: _Round, session: str) -> None:
        """Settle with the other aggregators over which devices the sum is, once and for all."""
        terms = state.spool.terms
        held = {header.identifier: device for device, header in state.spool.held.items()}
        answer = self._ask(session, Kind.AGREE, pack_identifiers(list(held)))
        agreed = unpack_identifiers(answer)
        too_long: set[bytes] = set()
        if terms.projections and agreed:
            task = Task(str(state.spool.folder), terms.pack().decode(), tuple(held[i] for i in agreed))
            passed = self._ask(session, Kind.CHECK, task.pack())
            too_long = {i for i, flag in zip(agreed, passed, strict=True) if not flag}
            agreed = [i for i in agreed if i not in too_long]
        devices = sorted(held[identifier] for identifier in agreed)
        digest = set_digest(terms, agreed).hex()
        if state.agreed is not None:
            if state.agreed != digest:
                raise RefusalError(409, f"round {terms.folder}: the agreed set differs from the one released")
            return
        absent = self._absent(state, set(devices)) | {
            held[i]: f"{held[i]}: rejected by the norm check" for i in too_long
        }
        if len(agreed) < terms.minimum:
            few = f"{len(agreed)} uploads agreed, fewer than {terms.minimum}"
            self._fail(state, f"round {terms.folder}: {few}; " + "; ".join(absent.values()))
        self._record(state, "agreed", set=digest, devices=devices, left_out=absent)
        state.agreed, state.devices, state.left_out = digest, devices, absent

    def _sum(self, state: _Round, session: str) -> bytes:
        """This party's share of the sum over the set in the journal."""
        terms = state.spool.terms
        if state.agreed is None:
            raise WorkerError(f"{self.party.name} has not agreed with the others yet")
        task = Task(str(state.spool.folder), terms.pack().decode(), tuple(state.devices))
        share = self._ask(session, Kind.SUM, task.pack())
        if share[:32].hex() != state.agreed:
            raise WorkerError(f"{self.party.name}: its worker summed over another set")
        return share

    def _absent(self, state: _Round, agreed: set[PartyId]) -> dict[PartyId, str]:
        """Why each device is left out: those on the roster, and strangers who tried."""
        reasons: dict[PartyId, str] = {}
        held = state.spool.held
        for device in (*state.spool.terms.roster, *sorted(state.refused)):
            if device in agreed or device in reasons:
                continue
            default = f"{device}: its upload is missing, or another one, at another aggregator"
            missing = state.refused.get(device, f"{device}: no upload")
            reasons[device] = default if device in held else missing
        return reasons

    def _fail(self, state: _Round, reason: str) -> None:
        self._record(state, "failed", reason=reason)
        state.failure = reason
        raise RefusalError(409, reason)

    def stop(self) -> None:
        """End the worker. Idempotent."""
        with self._seating:
            self._end_worker()
