"""The rounds of one party: opened, filled, closed, released once.

What a party decides is in its journal before it acts on it:

    opened -> closed (which uploads it holds) -> agreed (over which set it releases) -> posted
           -> failed, or abandoned

A closed round takes no more uploads, so a repeated closing agrees on the same set, draws the same noise and
makes the same sum or vote. A set that differs from the one in the journal is refused.

A round that came to nothing may be attempted again, under fresh shares and fresh noise, once every attempt
before is in the journal as abandoned. A party abandons nothing of which it has made its share, and makes no
share of what it abandoned. So as long as one aggregator is honest, one attempt at most is ever released.

Where the party has a ``max_rho_total``, the devices of an agreed set are charged the round's rho with that
record of the journal, so before a share is made. Uploads of a device that has too little left are refused, so
that it is left out at all aggregators; a set that holds one all the same is never released.

Nothing waits for a round that is being closed but whoever closes or abandons that one. On a full disk no
uploads are taken and no rounds opened, but what is durable is closed in room that was set aside. Finished
rounds beyond ``keep_results`` are forgotten once they expired, and the journal keeps of them what their
devices paid. Such a round's name may be taken again: the devices' envelopes of the first time name when it
expired.
"""

import threading
import time
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privkd.errors import ChannelError, RefusalError, RunError
from privkd.privacy.events import PartyId
from privkd.secure.frames import Kind, Task, pack_identifiers, unpack_identifiers
from privkd.secure.normcheck import MIN_PROJECTIONS
from privkd.secure.party import Party
from privkd.secure.terms import (
    ROUNDING,
    DeviceTotals,
    RoundTerms,
    agreed_in,
    attempt_label,
    made_in,
    session_mark,
    set_digest,
)
from privkd.secure.upload import Header, SharedSecrets, header_of, unseal
from privkd.secure.uploads import RoundUploads, StorageError
from privkd.secure.worker import Records, WorkerError, WorkerSupervisor

_MAX_STRANGERS = 100
_DAY = 86_400.0
_MOST_PAST = 100
_ROOM, _ROOM_FOR_DEVICE = 1 << 16, 400


class Reserve(Protocol):
    """Room that is set aside on the disk for closing rounds: see ``privkd.secure.state``."""

    def hold(self, size: int) -> None:
        """Set aside ``size`` bytes in all. Raises `StorageError` where there is no room."""
        ...

    def restore(self) -> None:
        """Set aside again what was given up. Raises `StorageError` where there is no room."""
        ...

    def insist(self, write: Callable[[], None]) -> None:
        """``write()``, if need be in the room that was set aside."""
        ...


@dataclass
class RoundState:
    """How far one attempt at a round has come at one party: the journal's word, but for who was refused.

    Attributes:
        uploads: what this party holds of it, and its terms.
        opened: whether it takes part in anything.
        closed: digest of the uploads that were held when it stopped taking more.
        agreed: digest of the set over which it is released.
        devices: that set.
        left_out: why the other devices are not in it.
        failure: why nothing will ever be released of it.
        abandoned: whether a next attempt may be made.
        posted: whether this party's share left it.
        pruned: whether the uploads were deleted.
        refused: why uploads were refused, by device.
        closing: held by whoever closes or abandons it, for as long as that takes.
        lock: held by whoever decides, for a moment; after ``closing`` where both are.
    """

    uploads: RoundUploads
    opened: bool = False
    closed: str | None = None
    agreed: str | None = None
    devices: list[PartyId] = field(default_factory=list)
    left_out: dict[PartyId, str] = field(default_factory=dict)
    failure: str | None = None
    abandoned: bool = False
    posted: bool = False
    pruned: bool = False
    refused: dict[PartyId, str] = field(default_factory=dict)
    closing: threading.Lock = field(default_factory=threading.Lock)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @cached_property
    def roster(self) -> frozenset[PartyId]:
        """The devices that may contribute."""
        return frozenset(self.uploads.terms.roster)

    def recall(self, record: dict[str, Any]) -> None:
        """Take up one record of the journal."""
        match record["event"]:
            case "opened":
                self.opened = True
            case "closed":
                self.closed = record["held"]
            case "agreed":
                self.agreed = record["set"]
                self.devices, self.left_out = record["devices"], record["left_out"]
            case "failed":
                self.failure = record["reason"]
            case "abandoned":
                self.abandon()
            case "posted":
                self.posted = True

    def abandon(self) -> None:
        """From here on nothing is ever released of it."""
        self.abandoned = True
        self.failure = f"round {self.uploads.terms.folder} was abandoned"

    @property
    def shared(self) -> bool:
        """Whether this party's share was made, so that it may have left."""
        return self.posted or self.uploads.share is not None

    @property
    def finished(self) -> bool:
        """Whether the uploads serve nothing but repeating what was done."""
        return self.posted or self.failure is not None

    def over(self, now: float) -> bool:
        """Whether nothing more will come of it at the Unix time ``now`` than what already did."""
        return self.finished or (self.closed is None and self.uploads.terms.expires <= now)

    def absent(self, agreed: set[PartyId]) -> dict[PartyId, str]:
        """Why each device is left out: those on the roster, and strangers who tried."""
        reasons: dict[PartyId, str] = {}
        held = self.uploads.held
        for device in (*self.uploads.terms.roster, *sorted(self.refused.copy())):
            if device in agreed or device in reasons:
                continue
            default = f"{device}: its upload is missing, or another one, at another aggregator"
            missing = self.refused.get(device, f"{device}: no upload")
            reasons[device] = default if device in held else missing
        return reasons


def room_for(terms: RoundTerms) -> int:
    """Bytes that closing a round may write: twice the share, and the journal's words on each device."""
    return _ROOM + 8 * terms.entries + 4 * len(terms.pack()) + _ROOM_FOR_DEVICE * len(terms.roster)


def admit_terms(party: Party, terms: RoundTerms) -> None:
    """Hold a round's terms to this party's own.

    Raises:
        RefusalError: it does not take part in such a round.
    """
    limits, name = party.limits, f"round {terms.folder}"
    if party.deals:
        raise RefusalError(404, f"{party.name} holds no shares, so it takes part in no round")
    if terms.keys != party.members[: party.parties]:
        raise RefusalError(409, f"{name}: its keys are not those of this party's members")
    if terms.expires <= time.time():
        raise RefusalError(410, f"{name} has expired")
    if terms.expires > time.time() + limits.max_round_days * _DAY:
        ahead = f"more than max_round_days={limits.max_round_days:g} ahead"
        raise RefusalError(403, f"{name} expires at {terms.expires}, {ahead}")
    if terms.minimum < limits.minimum_devices:
        raise RefusalError(
            403, f"{name}: minimum={terms.minimum}, this party asks for {limits.minimum_devices}"
        )
    if terms.entries * 4 > limits.max_upload_bytes:
        raise RefusalError(413, f"{name}: {terms.entries} entries, more than this party takes")
    if terms.needs_third_party and not party.third_party:
        what = "the norm check" if terms.projections else "a vote"
        raise RefusalError(409, f"{name}: {what} needs a third party, and this group has none")
    if 0 < terms.projections < MIN_PROJECTIONS:
        raise RefusalError(
            403, f"{name}: {terms.projections} projections, a norm check takes {MIN_PROJECTIONS}"
        )
    rho = terms.rho
    for limit, most in (("max_rho", limits.max_rho), ("max_rho_total", limits.max_rho_total)):
        if most is not None and (rho is None or rho > Fraction(most) * ROUNDING):
            raise RefusalError(403, f"{name}: less noise than this party's {limit}={most:g} asks for")


def admit_header(party: Party, roster: Container[PartyId], terms: RoundTerms, header: Header) -> None:
    """Hold an upload's outside to the round that it was sent to.

    Raises:
        RefusalError: it is for another round or party, or of a stranger.
    """
    found = (header.round, header.expires, header.party, header.parties, header.entries)
    expected = (terms.label, terms.expires, party.rank, party.parties, terms.entries)
    if found != expected:
        names = ("round", "expiry", "aggregator", "number of aggregators", "number of entries")
        wrong = [name for name, a, b in zip(names, found, expected, strict=True) if a != b]
        raise RefusalError(400, f"{header.device}: upload for another {wrong[0]}")
    if header.device not in roster:
        raise RefusalError(403, f"{header.device}: not on the roster of round {terms.folder}")


class Rounds:
    """All rounds of one party. Safe to call from many threads."""

    def __init__(
        self,
        party: Party,
        supervisor: WorkerSupervisor,
        *,
        journal: Records,
        create: Callable[[RoundTerms], RoundUploads],
        stored: Iterable[RoundUploads] = (),
        sealing_key: X25519PrivateKey | None = None,
        reserve: Reserve | None = None,
    ) -> None:
        """Take up what there is.

        Args:
            party: whose rounds they are.
            supervisor: of this party's worker.
            journal: of what it decided.
            create: makes room for the uploads of a new round.
            stored: what it holds of the rounds so far.
            sealing_key: to which devices seal their shares, to try each upload as it comes; none where all
                are made in this process, so that the worker's trial is enough.
            reserve: room for closing; none where nothing is written.
        """
        self.party = party
        self.supervisor = supervisor
        self._secrets = None if sealing_key is None else SharedSecrets(sealing_key)
        self._reserve = reserve
        self._create = create
        self._journal = journal
        self._journalling = threading.Lock()
        self._rounds = {uploads.terms.label: RoundState(uploads) for uploads in stored}
        # Known by the journal alone, and until when: without uploads nothing can be said but that they were.
        self._gone: dict[int, float] = {}
        self._abandoned: set[int] = set()
        for record in self._journal:
            if record["event"] != "compacted":
                self._recall(record)
        self._totals = DeviceTotals.recalled(party.limits.max_rho_total, self._journal)
        self._charging = threading.Lock()
        self._opening = threading.Lock()
        self._drop_remains()

    def _recall(self, record: dict[str, Any]) -> None:
        label = int(record["round"], 16)
        if record["event"] == "abandoned":
            self._abandoned.add(label)
        if label in self._rounds:
            self._rounds[label].recall(record)
        else:
            until = record["terms"]["expires"] if record["event"] == "opened" else record.get("until", 0)
            self._gone[label] = max(until, self._gone.get(label, 0))

    def _drop_remains(self) -> None:
        """Remove what is left of rounds that the journal has forgotten, or that were never opened in time."""
        for label, state in list(self._rounds.items()):
            if not state.opened and state.over(time.time()):
                state.uploads.drop()
                del self._rounds[label]

    def hold_to(self, party: Party) -> None:
        """Take other limits, from now on; rounds that are open stay so."""
        with self._charging:
            self._totals = DeviceTotals.recalled(party.limits.max_rho_total, self._journal)
            self.party = party
        self.supervisor.hold_to(party)

    def counts(self) -> dict[str, int]:
        """How many rounds are held, by how far they are; and how many ``uploads`` of those not released."""
        found = dict.fromkeys(("open", "closing", "released", "failed", "uploads"), 0)
        for state in list(self._rounds.values()):
            found["uploads"] += 0 if state.finished else len(state.uploads.held)
            going = "open" if state.closed is None else "closing"
            found["released" if state.posted else "failed" if state.failure is not None else going] += 1
        return found

    def terms(self, label: int) -> RoundTerms:
        """Those of an open round. Raises `RefusalError` where it is not open here."""
        return self._opened(label).uploads.terms

    def _record(self, label: int, event: str, **facts: Any) -> None:
        record = {"event": event, "round": f"{label:016x}"} | facts
        with self._journalling:
            self._durably(lambda: self._journal.append(record))

    def _durably(self, write: Callable[[], None]) -> None:
        """``write()`` something without which no round could be closed.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            if self._reserve is None:
                write()
            else:
                self._reserve.insist(write)
        except RunError as error:
            if isinstance(error.__cause__, OSError):
                raise StorageError.of(error.__cause__) from error
            raise

    # ---- opening and abandoning ---------------------------------------------------------------------

    def open(self, terms: RoundTerms) -> None:
        """Begin a round. The same terms again change nothing.

        Raises:
            RefusalError: other terms were opened under this name, this party does not accept these, or an
                earlier attempt at the round was not abandoned here.
        """
        with self._opening:
            state = self._rounds.get(terms.label)
            if state is not None and state.uploads.terms != terms:
                raise RefusalError(409, f"round {terms.folder} was opened with other terms")
            if terms.label in self._abandoned:
                raise RefusalError(409, f"round {terms.folder} was abandoned")
            if state is None:
                self._check(terms)
                self._prune()
                self._hold_room(terms)
                state = RoundState(self._create(terms))
                self._rounds[terms.label] = state
            if not state.opened:
                self._record(terms.label, "opened", terms=terms.model_dump())
                state.opened = True

    def _check(self, terms: RoundTerms) -> None:
        name = f"round {terms.folder}"
        if terms.label in self._gone:
            raise RefusalError(409, f"{name} is in the journal, but its spool was removed; take a new name")
        for earlier in range(terms.attempt):
            if attempt_label(terms.round, earlier) not in self._abandoned:
                raise RefusalError(409, f"{name}: attempt {earlier} at it was not abandoned here")
        admit_terms(self.party, terms)

    def abandon(self, label: int) -> None:
        """Never release anything of an attempt, known or not. Durable on return; again changes nothing.

        Raises:
            RefusalError: this party has made its share of it, so it can only be completed.
        """
        if self.party.deals:
            raise RefusalError(404, f"{self.party.name} holds no shares, so it takes part in no round")
        with self._opening:
            state = self._rounds.get(label)
            if state is None:
                if label not in self._abandoned:
                    if label in self._gone:
                        raise RefusalError(409, f"round {label:016x}: its spool was removed, so that nobody "
                                                "knows whether it was released")  # fmt: skip
                    until = time.time() + self.party.limits.max_round_days * _DAY
                    self._record(label, "abandoned", until=until)
                    self._gone[label] = until
                    self._abandoned.add(label)
                return
        with state.closing, state.lock:
            if state.abandoned:
                return
            if state.shared:
                name = f"round {state.uploads.terms.folder}"
                raise RefusalError(
                    409, f"{name}: this party's share of it was made, so it can only be completed"
                )
            with self._charging:
                self._record(label, "abandoned")
                self._totals.refund(label)
            state.abandon()
            self._abandoned.add(label)

    def _hold_room(self, terms: RoundTerms) -> None:
        """Set aside what closing all rounds that are open may need, and a new one of these ``terms``."""
        if self._reserve is not None:
            now = time.time()
            open_ones = (s.uploads.terms for s in self._rounds.values() if not s.over(now))
            self._reserve.hold(room_for(terms) + sum(map(room_for, open_ones)))

    def _prune(self) -> None:
        """Forget the uploads of all but the latest rounds that are over, and the oldest altogether."""
        now, limits = time.time(), self.party.limits
        over = [state for state in self._rounds.values() if state.over(now)]
        over.sort(key=lambda state: state.uploads.terms.expires)
        for state in over[: -limits.keep_rounds]:
            # Once each: a party that has seen thousands of rounds would else spend its time on them.
            if state.finished and not state.pruned:
                state.uploads.drop_uploads()
                state.pruned = True
        past = {s.uploads.terms.label for s in over[: -limits.keep_results] if s.uploads.terms.expires <= now}
        past |= {label for label, until in self._gone.items() if until <= now}
        # Nobody has come to finish these.
        long_ago = now - limits.max_round_days * _DAY
        past |= {label for label, s in self._rounds.items() if s.uploads.terms.expires <= long_ago}
        # Many at once: each time the journal is written anew.
        if len(past) >= min(limits.keep_results, _MOST_PAST):
            self._forget(past)

    def _forget(self, labels: set[int]) -> None:
        """Keep of rounds what their devices paid."""
        with self._charging, self._journalling:
            compacted = self._totals.forgotten(labels)
            kept = (record for record in self._journal if record["event"] != "compacted")
            try:
                self._journal.replace([compacted, *(r for r in kept if int(r["round"], 16) not in labels)])
            except RunError:
                return  # the disk is full: another time
            self._totals.forget(labels)
        for label in labels:
            self._gone.pop(label, None)
            self._abandoned.discard(label)
            state = self._rounds.pop(label, None)
            if state is not None:
                state.uploads.drop()

    def status(self, label: int) -> dict[str, Any]:
        """What is public of a round: its terms, how far it is, and over which devices it is released."""
        state = self._opened(label)
        terms = state.uploads.terms
        share = None if terms.votes is None else state.uploads.share
        expired = state.closed is None and terms.expires <= time.time()
        return {
            "terms": terms.pack().decode(),
            "closed": state.closed is not None,
            "set": state.agreed,
            "devices": state.devices,
            "left_out": state.left_out,
            "failure": state.failure,
            "over": expired or state.failure is not None,
            "shared": state.shared,
            "made_in": None if share is None else made_in(share),
        }

    # ---- uploads ------------------------------------------------------------------------------------

    def upload_many(self, uploads: Iterable[tuple[int, bytes]]) -> list[ChannelError | None]:
        """Take uploads, each to the round of its label, durably and with one sync a round.

        The same bytes again change nothing.

        Returns:
            Of each upload why it is not accepted, or none: a `RefusalError`, whose reason is kept for the
            journal, or a `StorageError` where it may be sent again.
        """
        outcomes: list[ChannelError | None] = []
        taken: dict[int, tuple[RoundState, list[tuple[int, PartyId]]]] = {}
        for number, (label, envelope) in enumerate(uploads):
            try:
                state = self._opened(label)
                self._restore_room()
                device = self._take(state, envelope)
            except ChannelError as error:
                outcomes.append(error)
            else:
                outcomes.append(None)
                taken.setdefault(label, (state, []))[1].append((number, device))
        for state, added in taken.values():
            failure = _sync_failure(state.uploads)
            for number, device in added:
                if failure is not None or not state.uploads.holds(device):
                    outcomes[number] = failure or StorageError(f"{device}: it could not be kept; try again")
        return outcomes

    def _restore_room(self) -> None:
        """Raises `StorageError` where the disk is too full for more than closing."""
        if self._reserve is not None:
            self._reserve.restore()

    def upload_all(self, label: int, envelopes: Iterable[bytes]) -> list[str]:
        """Take many uploads, durably and with one sync; why each that is not accepted is not."""
        state = self._opened(label)
        self._restore_room()
        refused, taken = [], []
        for envelope in envelopes:
            try:
                taken.append(self._take(state, envelope))
            except RefusalError as refusal:
                refused.append(str(refusal))
        state.uploads.sync()
        if not all(map(state.uploads.holds, taken)):
            raise StorageError("some uploads could not be kept; try again")
        return refused

    def _take(self, state: RoundState, envelope: bytes) -> PartyId:
        try:
            header = header_of(envelope)
        except ChannelError as error:
            raise RefusalError(400, str(error)) from error
        try:
            self._admit(state, header, envelope)
        except RefusalError as refusal:
            known = header.device in state.roster or len(state.refused) < _MAX_STRANGERS
            # A device whose upload is held is not besmirched by what others send in its name.
            if known and not state.uploads.holds(header.device):
                state.refused[header.device] = str(refusal)
            raise
        return header.device

    def _admit(self, state: RoundState, header: Header, envelope: bytes) -> None:
        terms = state.uploads.terms
        admit_header(self.party, state.roster, terms, header)
        if self._secrets is not None:
            try:
                unseal(envelope, self._secrets)[1].check(terms.entries)
            except ChannelError as error:
                raise RefusalError(400, str(error)) from error
        with state.lock:
            if not state.uploads.holds(header.device):
                if state.closed is not None or state.failure is not None:
                    raise RefusalError(409, f"{header.device}: round {terms.folder} is closed")
                if terms.expires <= time.time():
                    raise RefusalError(410, f"{header.device}: round {terms.folder} has expired")
                with self._charging:
                    beyond = self._totals.beyond([header.device], terms.rho)
                if beyond:
                    raise RefusalError(403, self._too_dear(header.device, terms))
            try:
                state.uploads.add(header, envelope)
            except StorageError:
                raise
            except ChannelError as error:
                raise RefusalError(409, str(error)) from error

    def _opened(self, label: int) -> RoundState:
        state = self._rounds.get(label)
        if state is None or not state.opened:
            raise RefusalError(404, f"round {label:016x} is not open here")
        return state

    # ---- closing ------------------------------------------------------------------------------------

    def close(self, label: int, session: str, *, agree: bool = True, kept: bool = False) -> bytes:
        """This party's part of the result over the agreed set: see ``privkd.secure.terms``.

        Args:
            label: of the round.
            session: the group of workers to do it with.
            agree: whether some aggregator does not know the agreed set yet. All must then take part in
                agreeing on it, those too that have made their shares.
            kept: whether all have kept a part of one session, which is then wanted whatever ``session`` is.

        Raises:
            RefusalError: nothing is released, for good.
            WorkerError: a party's worker failed; nothing was released, and a new session may try again.
            StorageError: the disk is full, and so is the room that was set aside.
        """
        state = self._opened(label)
        with state.closing, self.supervisor.closing(session):
            if state.failure is not None:
                raise RefusalError(409, state.failure)
            if agree:
                self._freeze(state)
                self._agree(state, session)
            share = state.uploads.share
            # Shares of a vote belong together only if they were made together.
            voted_apart = state.uploads.terms.votes is not None and not kept
            if share is None or (voted_apart and made_in(share) != session_mark(session).hex()):
                self._freeze(state)
                share = self._share(state, session)
                made = share
                self._durably(lambda: state.uploads.keep_share(made))
            if not state.posted:
                self._record(label, "posted")
                state.posted = True
            return share

    def _freeze(self, state: RoundState) -> None:
        """From here on the round takes no more uploads, even after a restart."""
        terms = state.uploads.terms
        with state.lock:
            held = set_digest(terms, [header.identifier for header in state.uploads.held.values()]).hex()
            if state.closed is None:
                if terms.expires <= time.time():
                    self._fail(state, f"round {terms.folder} expired before it was closed")
                self._record(terms.label, "closed", held=held)
                state.closed = held
        if state.closed != held:
            raise RefusalError(409, f"round {terms.folder}: the spool has changed since the round was closed")

    def _agree(self, state: RoundState, session: str) -> None:
        """Settle with the other aggregators over which devices the sum is, once and for all."""
        terms = state.uploads.terms
        held = {header.identifier: device for device, header in state.uploads.held.items()}
        agreed = unpack_identifiers(self.supervisor.ask(session, Kind.AGREE, pack_identifiers(held)))
        too_long: set[bytes] = set()
        if terms.projections and agreed:
            passed = self._ask(state, session, Kind.CHECK, [held[i] for i in agreed])
            too_long = {i for i, flag in zip(agreed, passed, strict=True) if not flag}
            agreed = [i for i in agreed if i not in too_long]
        devices = sorted(held[identifier] for identifier in agreed)
        digest = set_digest(terms, agreed).hex()
        if state.agreed is not None:
            if state.agreed != digest:
                raise RefusalError(409, f"round {terms.folder}: the agreed set differs from the one released")
            return
        absent = state.absent(set(devices)) | {
            held[i]: f"{held[i]}: rejected by the norm check" for i in too_long
        }
        if len(agreed) < terms.minimum:
            few = f"{len(agreed)} uploads agreed, fewer than {terms.minimum}"
            self._fail(state, f"round {terms.folder}: {few}; " + "; ".join(absent.values()))
        with self._charging:
            beyond = self._totals.beyond(devices, terms.rho)
            if beyond:
                self._fail(state, self._too_dear(beyond[0], terms))
            self._record(terms.label, "agreed", set=digest, devices=devices, left_out=absent)
            self._totals.charge(terms.label, devices, terms.rho)
        state.agreed, state.devices, state.left_out = digest, devices, absent

    def _ask(self, state: RoundState, session: str, kind: Kind, devices: Sequence[PartyId]) -> bytes:
        """What the worker answers to a step over the uploads of ``devices``."""
        uploads = state.uploads
        task = Task(str(uploads.folder or ""), uploads.terms.pack().decode(), tuple(devices))
        return self.supervisor.ask(session, kind, task.pack(), uploads.unread(devices))

    def _too_dear(self, device: PartyId, terms: RoundTerms) -> str:
        limit = f"max_rho_total={self._totals.limit:g}"
        return f"{device}: round {terms.folder} would take it beyond this party's {limit}"

    def _share(self, state: RoundState, session: str) -> bytes:
        """This party's part of the result over the set in the journal."""
        terms = state.uploads.terms
        if state.agreed is None:
            raise WorkerError(f"{self.party.name} has not agreed with the others yet")
        if not state.shared:
            # The limit may be lower than when the set was agreed on.
            with self._charging:
                beyond = self._totals.beyond(state.devices, Fraction(0))
            if beyond:
                self._fail(state, self._too_dear(beyond[0], terms))
        share = self._ask(state, session, Kind.SUM if terms.votes is None else Kind.VOTE, state.devices)
        if agreed_in(share) != state.agreed:
            raise WorkerError(f"{self.party.name}: its worker worked on another set")
        return share

    def _fail(self, state: RoundState, reason: str) -> None:
        self._record(state.uploads.terms.label, "failed", reason=reason)
        state.failure = reason
        raise RefusalError(409, reason)


def _sync_failure(uploads: RoundUploads) -> ChannelError | None:
    """Make durable what was added; why that cannot be, if so."""
    try:
        uploads.sync()
    except ChannelError as error:
        return error
    return None
