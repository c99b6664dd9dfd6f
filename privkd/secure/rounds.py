"""The rounds of one party's service: opened, filled, closed, released once.

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
"""

import threading
import time
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from privkd.errors import ChannelError, ConfigError
from privkd.journal import Journal
from privkd.privacy.events import PartyId
from privkd.secure.admission import RefusalError, admit_header, admit_terms
from privkd.secure.envelope import Header, header_of, unseal
from privkd.secure.keys import load_noise_key, load_sealing_key, public_hex
from privkd.secure.party import PartyConfig
from privkd.secure.posts import agreed_in, made_in, session_mark
from privkd.secure.seating import Seating
from privkd.secure.spool import RoundSpool, stored_rounds
from privkd.secure.standing import Standing
from privkd.secure.terms import RoundTerms, attempt_label, set_digest
from privkd.secure.totals import DeviceTotals
from privkd.secure.wire import Kind
from privkd.secure.worker import Task, WorkerError, pack_identifiers, unpack_identifiers

_MAX_STRANGERS = 100


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
        if public_hex(self._sealing_key) != party.members[party.rank]:
            raise ConfigError(
                f"{party.sealing_key}: its public key is {public_hex(self._sealing_key)}, "
                f"but members[{party.rank}] says {party.members[party.rank]}"
            )
        self.seating = Seating(party, self._sealing_key, load_noise_key(party.noise_key))
        self._spools = party.directory / "rounds"
        self._spools.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(party.directory / "journal.jsonl")
        self._journalling = threading.Lock()
        self._rounds = {spool.terms.label: Standing(spool) for spool in stored_rounds(self._spools)}
        # Known by the journal alone: without a spool nothing can be said of them but that they were.
        self._gone: set[int] = set()
        self._abandoned: set[int] = set()
        for record in self._journal:
            self._recall(record)
        self._totals = DeviceTotals.recalled(party.limits.max_rho_total, self._journal)
        self._charging = threading.Lock()
        self._opening = threading.Lock()

    def _recall(self, record: dict[str, Any]) -> None:
        label = int(record["round"], 16)
        if record["event"] == "abandoned":
            self._abandoned.add(label)
        if label in self._rounds:
            self._rounds[label].recall(record)
        else:
            self._gone.add(label)

    def _record(self, label: int, event: str, **facts: Any) -> None:
        with self._journalling:
            self._journal.append({"event": event, "round": f"{label:016x}"} | facts)

    # ---- opening and abandoning ---------------------------------------------------------------------

    def open(self, terms: RoundTerms) -> None:
        """Begin a round. The same terms again change nothing.

        Raises:
            RefusalError: other terms were opened under this name, this party does not accept these, or an
                earlier attempt at the round was not abandoned here.
        """
        with self._opening:
            state = self._rounds.get(terms.label)
            if state is not None and state.spool.terms != terms:
                raise RefusalError(409, f"round {terms.folder} was opened with other terms")
            if terms.label in self._abandoned:
                raise RefusalError(409, f"round {terms.folder} was abandoned")
            if state is None:
                self._check(terms)
                state = Standing(RoundSpool.create(self._spools / terms.folder, terms))
                self._rounds[terms.label] = state
            if not state.opened:
                self._record(terms.label, "opened", terms=terms.model_dump())
                state.opened = True
                self._prune()

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
                    self._record(label, "abandoned")
                    self._gone.add(label)
                    self._abandoned.add(label)
                return
        with state.lock:
            if state.abandoned:
                return
            if state.shared:
                name = f"round {state.spool.terms.folder}"
                raise RefusalError(
                    409, f"{name}: this party's share of it was made, so it can only be completed"
                )
            with self._charging:
                self._record(label, "abandoned")
                self._totals.refund(label)
            state.abandon()
            self._abandoned.add(label)

    def _prune(self) -> None:
        done = [state for state in self._rounds.values() if state.finished]
        for state in done[: -self.party.limits.keep_rounds]:
            # Once each: a party that has seen thousands of rounds would else spend its time on them.
            if not state.pruned:
                state.spool.drop_uploads()
                state.pruned = True

    def status(self, label: int) -> dict[str, Any]:
        """What is public of a round: its terms, how far it is, and over which devices it is released."""
        state = self._opened(label)
        terms = state.spool.terms
        share = None if terms.votes is None else state.spool.share
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

    def upload(self, label: int, envelope: bytes) -> PartyId:
        """Take one device's upload, durably; the device. The same bytes again change nothing.

        Raises:
            RefusalError: it is not accepted; the reason is kept for the journal.
        """
        state = self._opened(label)
        device = self._take(state, envelope)
        state.spool.sync()
        return device

    def upload_all(self, label: int, envelopes: Iterable[bytes]) -> list[str]:
        """Take many uploads, durably and with one sync; why each that is not accepted is not."""
        state = self._opened(label)
        refused = []
        for envelope in envelopes:
            try:
                self._take(state, envelope)
            except RefusalError as refusal:
                refused.append(str(refusal))
        state.spool.sync()
        return refused

    def _take(self, state: Standing, envelope: bytes) -> PartyId:
        try:
            header = header_of(envelope)
        except ChannelError as error:
            raise RefusalError(400, str(error)) from error
        try:
            self._admit(state, header, envelope)
        except RefusalError as refusal:
            known = header.device in state.roster or len(state.refused) < _MAX_STRANGERS
            # A device whose upload is held is not besmirched by what others send in its name.
            if known and not state.spool.holds(header.device):
                state.refused[header.device] = str(refusal)
            raise
        return header.device

    def _admit(self, state: Standing, header: Header, envelope: bytes) -> None:
        terms = state.spool.terms
        admit_header(self.party, state.roster, terms, header)
        try:
            unseal(envelope, self._sealing_key)[1].check(terms.entries)
        except ChannelError as error:
            raise RefusalError(400, str(error)) from error
        with state.lock:
            if not state.spool.holds(header.device):
                if state.closed is not None or state.failure is not None:
                    raise RefusalError(409, f"{header.device}: round {terms.folder} is closed")
                if terms.expires <= time.time():
                    raise RefusalError(410, f"{header.device}: round {terms.folder} has expired")
                with self._charging:
                    beyond = self._totals.beyond([header.device], terms.rho)
                if beyond:
                    raise RefusalError(403, self._too_dear(header.device, terms))
            try:
                state.spool.add(header, envelope)
            except ChannelError as error:
                if isinstance(error.__cause__, OSError):
                    raise
                raise RefusalError(409, str(error)) from error

    def _opened(self, label: int) -> Standing:
        state = self._rounds.get(label)
        if state is None or not state.opened:
            raise RefusalError(404, f"round {label:016x} is not open here")
        return state

    # ---- closing ------------------------------------------------------------------------------------

    def close(self, label: int, session: str, *, agree: bool = True, kept: bool = False) -> bytes:
        """This party's post over the agreed set: see ``privkd.secure.posts``.

        Args:
            label: of the round.
            session: the group of workers to do it with.
            agree: whether some aggregator does not know the agreed set yet. All must then take part in
                agreeing on it, those too that have made their shares.
            kept: whether all have kept a post of one session, which is then wanted whatever ``session`` is.

        Raises:
            RefusalError: nothing is released, for good.
            WorkerError: a party's worker failed; nothing was released, and a new session may try again.
        """
        state = self._opened(label)
        with state.lock:
            if state.failure is not None:
                raise RefusalError(409, state.failure)
            if agree:
                self._freeze(state)
                self._agree(state, session)
            share = state.spool.share
            # Shares of a vote belong together only if they were made together.
            voted_apart = state.spool.terms.votes is not None and not kept
            if share is None or (voted_apart and made_in(share) != session_mark(session).hex()):
                self._freeze(state)
                share = self._share(state, session)
                state.spool.keep_share(share)
            if not state.posted:
                self._record(label, "posted")
                state.posted = True
            return share

    def _freeze(self, state: Standing) -> None:
        """From here on the round takes no more uploads, even after a restart."""
        terms = state.spool.terms
        held = set_digest(terms, [header.identifier for header in state.spool.held.values()]).hex()
        if state.closed is None:
            if terms.expires <= time.time():
                self._fail(state, f"round {terms.folder} expired before it was closed")
            self._record(terms.label, "closed", held=held)
            state.closed = held
        elif state.closed != held:
            raise RefusalError(409, f"round {terms.folder}: the spool has changed since the round was closed")

    def _agree(self, state: Standing, session: str) -> None:
        """Settle with the other aggregators over which devices the sum is, once and for all."""
        terms = state.spool.terms
        held = {header.identifier: device for device, header in state.spool.held.items()}
        answer = self.seating.ask(session, Kind.AGREE, pack_identifiers(list(held)))
        agreed = unpack_identifiers(answer)
        too_long: set[bytes] = set()
        if terms.projections and agreed:
            task = Task(str(state.spool.folder), terms.pack().decode(), tuple(held[i] for i in agreed))
            passed = self.seating.ask(session, Kind.CHECK, task.pack())
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

    def _too_dear(self, device: PartyId, terms: RoundTerms) -> str:
        limit = f"max_rho_total={self._totals.limit:g}"
        return f"{device}: round {terms.folder} would take it beyond this party's {limit}"

    def _share(self, state: Standing, session: str) -> bytes:
        """This party's post over the set in the journal."""
        terms = state.spool.terms
        if state.agreed is None:
            raise WorkerError(f"{self.party.name} has not agreed with the others yet")
        if not state.shared:
            # The limit may be lower than when the set was agreed on.
            with self._charging:
                beyond = self._totals.beyond(state.devices, Fraction(0))
            if beyond:
                self._fail(state, self._too_dear(beyond[0], terms))
        task = Task(str(state.spool.folder), terms.pack().decode(), tuple(state.devices))
        kind = Kind.SUM if terms.votes is None else Kind.VOTE
        share = self.seating.ask(session, kind, task.pack())
        if agreed_in(share) != state.agreed:
            raise WorkerError(f"{self.party.name}: its worker worked on another set")
        return share

    def _fail(self, state: Standing, reason: str) -> None:
        self._record(state.spool.terms.label, "failed", reason=reason)
        state.failure = reason
        raise RefusalError(409, reason)
