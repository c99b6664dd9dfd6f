"""The cloud's side of rounds among a group's parties: open, close, add the shares.

It sees no device's answers. A party is reached by a `PartyLink`: over the network (``privkd.secure.client``),
or in this process (``privkd.secure.local``).
"""

import contextlib
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from privkd.errors import ChannelError, RefusalError
from privkd.privacy.events import PartyId
from privkd.secure.terms import MAX_ATTEMPTS, RoundTerms, agreed_in, combine
from privkd.secure.upload import Upload

_PAUSE = 0.2
_GRACE = 1.0
T = TypeVar("T")


class UnreachableError(ChannelError):
    """A party did not answer in time, or asks to try again."""


class PartyLink(Protocol):
    """One party as the cloud reaches it, for one thread at a time. Every call may be repeated.

    Calls end by their ``deadline`` on ``time.monotonic``, or by those of the party itself. They raise
    `RefusalError` where the party refuses for good, `UnreachableError` where it may be asked again, and
    `ChannelError` where its group is lost.
    """

    @property
    def name(self) -> str:
        """How errors call it."""
        ...

    def about(self, deadline: float) -> Mapping[str, Any]:
        """``rank``, ``parties`` (how many aggregators), public ``key`` and number of ``members``."""
        ...

    def join(self, session: str, port: int | None, deadline: float) -> int:
        """Have it start a worker for a common ``session``; the port of rank 0's rendezvous.

        Raises `UnreachableError` while the workers are another run's; see ``privkd.secure.worker``.
        """
        ...

    def open(self, terms: RoundTerms, deadline: float) -> None:
        """Publish a round."""
        ...

    def relay(self, round: int, envelopes: Sequence[bytes], deadline: float) -> list[str]:
        """Hand on sealed uploads to the attempt ``round``; what was refused."""
        ...

    def status(self, round: int, deadline: float) -> Mapping[str, Any]:
        """What is public of an attempt at a round; see ``privkd.secure.rounds``."""
        ...

    def share(self, round: int, session: str, *, agree: bool, kept: bool, deadline: float) -> bytes:
        """Close an attempt; the party's part of the result."""
        ...

    def abandon(self, round: int, deadline: float) -> None:
        """Have it never release anything of an attempt."""
        ...

    def close(self) -> None:
        """Let go of the party. Idempotent."""
        ...


@dataclass(frozen=True)
class Total:
    """A release: over which devices, why others were left out, and the noisy sum, or the vote's one-hot rows,
    as integers ``[entry]``; ``agreed`` is the digest of its set, under the round's name ``round``."""

    devices: tuple[PartyId, ...]
    left_out: Mapping[PartyId, str]
    integers: NDArray[np.int64]
    agreed: bytes
    round: int


class PartyGroup:
    """The parties of one group. For one thread at a time."""

    def __init__(self, links: Sequence[PartyLink], *, pins: Sequence[str] = (), lease: str = "") -> None:
        """Nothing is sent yet.

        Args:
            links: to the aggregators, and to the third party if there is one, in any order.
            pins: the aggregators' public keys by rank, in hexadecimal; else what they say is believed.
            lease: names whoever asks, in hexadecimal, such as a run that was interrupted and comes again; a
                name of its own unless given. See ``privkd.secure.worker``.
        """
        self._links = list(links)
        self._pins = tuple(pins)
        self._pool = ThreadPoolExecutor(max_workers=2 * len(links) or 1, thread_name_prefix="party")
        self._lease = lease or secrets.token_hex(8)
        self._session: str | None = None
        self._begun: str | None = None
        self._keys: tuple[str, ...] = ()

    @property
    def aggregators(self) -> list[PartyLink]:
        """The aggregators by rank, once ``keys`` was asked for."""
        return self._links[: len(self._keys)]

    @property
    def third_party(self) -> bool:
        """Whether the group has one, once ``keys`` was asked for."""
        return len(self._links) > len(self._keys)

    def keys(self, deadline: float) -> tuple[str, ...]:
        """The aggregators' public keys, by rank.

        Raises:
            ChannelError: a party cannot be reached, they are not one whole group, or a key is not as pinned.
        """
        if not self._keys:
            facts = self._each(self._links, lambda link: link.about(deadline))
            order = sorted(range(len(facts)), key=lambda i: int(facts[i]["rank"]))
            found = [(f["rank"], f["parties"], f["members"]) for f in (facts[i] for i in order)]
            parties = int(facts[0]["parties"])
            if found != [(rank, parties, len(facts)) for rank in range(len(facts))]:
                named = ", ".join(f"{link.name} is rank {f['rank']} of {f['members']}"
                                  for link, f in zip(self._links, facts, strict=True))  # fmt: skip
                raise ChannelError(f"the addresses do not name every party of one group once: {named}")
            keys = tuple(str(facts[i]["key"]) for i in order[:parties])
            if self._pins and keys != self._pins:
                raise ChannelError("the aggregators' keys are not the pinned ones; nothing was sent")
            self._links = [self._links[i] for i in order]
            self._keys = keys
        return self._keys

    def gather(self, deadline: float) -> str:
        """Have every party start a worker for a common session, unless one is on; the session.

        Raises:
            ChannelError: a party refused or cannot be reached.
            UnreachableError: a party's workers are another run's for now; asking again keeps the place in the
                queue.
        """
        if self._session is None:
            self.keys(deadline)
            again = self._begun is not None
            session, port = self._begin(deadline)
            self._begun = session
            try:
                self._each(self._links[1:], lambda link: link.join(session, port, deadline))
            except RefusalError as error:
                self._begun = None
                if again:  # a party that had joined has lost its worker since
                    raise UnreachableError(str(error)) from error
                raise
            self._begun, self._session = None, session
        return self._session

    def _begin(self, deadline: float) -> tuple[str, int]:
        """A session that rank 0 joined, and the port: one that others were too busy for, or a new one."""
        first = self._links[0]
        if self._begun is not None:
            with contextlib.suppress(RefusalError):
                return self._begun, first.join(self._begun, None, deadline)
        session = f"{self._lease}-{secrets.token_hex(16)}"
        return session, first.join(session, None, deadline)

    def open(self, terms: RoundTerms, deadline: float) -> None:
        """Publish a round.

        Raises:
            ChannelError: an aggregator refused it or cannot be reached.
        """
        self.keys(deadline)
        self._each(self.aggregators, lambda link: link.open(terms, deadline))

    def close(self, terms: RoundTerms, deadline: float) -> Total:
        """Close a round and put the parties' shares together.

        Where a worker dies or hangs, all parties start new ones and go on from their uploads; the outcome is
        the same as it would have been.

        Raises:
            ChannelError: refused for good, or still failing at ``deadline``; nothing was released.
        """
        self.keys(deadline)
        failure: ChannelError | None = None
        while time.monotonic() < deadline:
            try:
                parts = self._shares(terms, deadline)
                return self._attributed(terms, combine(terms, parts), agreed_in(parts[0]), deadline)
            except UnreachableError as error:
                failure = error
                time.sleep(_PAUSE)
        raise ChannelError(f"{failure or 'the parties did not answer in time'}; nothing was released")

    def _shares(self, terms: RoundTerms, deadline: float) -> list[bytes]:
        session = self.gather(deadline)
        found = self._each(self.aggregators, lambda link: link.status(terms.label, deadline))
        # Those who agreed before a failure have to help those who did not get so far.
        made_in = {status["made_in"] for status in found}
        agree = any(status["set"] is None for status in found)
        kept = len(made_in) == 1 and made_in != {None}
        return self._each(
            self.aggregators,
            lambda link: link.share(terms.label, session, agree=agree, kept=kept, deadline=deadline),
            renew_by=deadline,
        )

    def _renew(self, deadline: float, waiting: Collection["Future[T]"]) -> None:
        """Begin a new session: the workers of the old one may wait for the one that failed.

        Tries for as long as somebody is ``waiting`` for them.
        """
        self._session = self._begun = None
        while True:
            with contextlib.suppress(UnreachableError):
                self.gather(deadline)
                return
            if not wait(waiting, _PAUSE).not_done:
                return

    def _attributed(
        self, terms: RoundTerms, integers: NDArray[np.int64], agreed: str, deadline: float
    ) -> Total:
        found = self._each(self.aggregators, lambda link: link.status(terms.label, deadline))
        if len({tuple(status["devices"]) for status in found}) != 1:
            raise ChannelError("the aggregators name different devices; nothing was released")
        left_out: dict[PartyId, str] = {}
        for status in found:
            # A refusal says more than a mere absence, which the other aggregators may have seen.
            left_out |= {
                device: why
                for device, why in status["left_out"].items()
                if device not in left_out or not why.endswith(": no upload")
            }
        return Total(tuple(found[0]["devices"]), left_out, integers, bytes.fromhex(agreed), terms.round)

    def standing(self, terms: RoundTerms, deadline: float) -> RoundTerms:
        """The terms under which a round goes on: those of the attempt that is on, or else of a new one.

        Attempts that came to nothing are abandoned first, by every aggregator. Nothing is opened yet.

        Args:
            terms: as they would be for a first attempt.
            deadline: on ``time.monotonic``.

        Raises:
            ChannelError: an aggregator cannot be reached, or one has made its share of an attempt that
                another has given up.
        """
        self.keys(deadline)
        for attempt in range(MAX_ATTEMPTS):
            fresh = terms.model_copy(update={"attempt": attempt})
            found = self._each(self.aggregators, partial(_known, round=fresh.label, deadline=deadline))
            known = [status for status in found if status is not None]
            if any(status["shared"] for status in known) or not any(status["over"] for status in known):
                opened = {status["terms"] for status in known}
                under = RoundTerms.unpack(opened.pop().encode()) if len(opened) == 1 else fresh
                return under if under.substance() == fresh.substance() else fresh
            self._each(self.aggregators, partial(_abandon, round=fresh.label, deadline=deadline))
        raise ChannelError(f"round {terms.folder} came to nothing {MAX_ATTEMPTS} times; nothing was released")

    def _each(
        self,
        links: Sequence[PartyLink],
        work: Callable[[PartyLink], T],
        renew_by: float | None = None,
    ) -> list[T]:
        """``work`` on all at once; a refusal outweighs a failure, and all are awaited.

        With ``renew_by``, a deadline, a failure begins a new session, so that nobody waits for who failed.
        """
        futures = [self._pool.submit(work, link) for link in links]
        finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        errors = [error for future in finished if (error := future.exception()) is not None]
        # After a refusal the others are about to refuse too, unless they wait for the one that did.
        grace = 0.0 if any(isinstance(error, UnreachableError) for error in errors) else _GRACE
        if errors and renew_by is not None and (not grace or wait(futures, grace).not_done):
            self._renew(renew_by, futures)
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in errors:
            if not isinstance(error, UnreachableError):
                raise error
        if errors:
            reasons = [str(error) for error in errors]
            raise UnreachableError("; ".join(dict.fromkeys(reasons)))
        return [future.result() for future in futures]

    def disconnect(self) -> None:
        """Let go of the parties. Idempotent."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for link in self._links:
            link.close()


def relay(uploads: Sequence[Upload], links: Sequence["PartyLink"], *, deadline: float) -> list[str]:
    """Hand on many devices' uploads to one round, blind; what was refused.

    Args:
        uploads: from ``prepare``, of one round.
        links: to the aggregators, by rank.
        deadline: on ``time.monotonic``.

    Raises:
        ChannelError: an aggregator cannot be reached in time.
    """
    refused: list[str] = []
    for rank, link in enumerate(links):
        envelopes = [upload.envelopes[rank] for upload in uploads]
        refused += link.relay(uploads[0].round, envelopes, deadline) if uploads else []
    return refused


def _known(link: PartyLink, round: int, deadline: float) -> Mapping[str, Any] | None:
    """The status of an attempt; none of one that the party does not have open."""
    try:
        return link.status(round, deadline)
    except RefusalError:
        return None


def _abandon(link: PartyLink, round: int, deadline: float) -> None:
    link.abandon(round, deadline)
