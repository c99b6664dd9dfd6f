"""The cloud's side of rounds among services: open, close, add the shares. It sees no device's answers."""

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from privkd.errors import ChannelError, ConfigError
from privkd.privacy.events import PartyId
from privkd.secure.endpoint import ClientTls, Endpoint, RefusedError, UnreachableError, persistently
from privkd.secure.posts import agreed_in, combine
from privkd.secure.terms import MAX_ATTEMPTS, RoundTerms

_ATTEMPT_SECONDS = 15.0
_PAUSE = 0.2
_GRACE = 1.0
T = TypeVar("T")


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
    """The running services of one group. For one thread at a time."""

    def __init__(
        self, urls: Sequence[str], tls: ClientTls | None = None, *, pins: Sequence[str] = ()
    ) -> None:
        """Check the addresses; nothing is sent yet.

        Args:
            urls: of the aggregators, and of the third party if there is one, in any order.
            tls: what to trust, and the cloud's own certificate.
            pins: the aggregators' public keys by rank, in hexadecimal; else what they say is believed.

        Raises:
            ConfigError: an address is malformed or named twice.
        """
        if len(set(urls)) != len(urls):
            raise ConfigError("an aggregator's address is named twice")
        self._endpoints = [Endpoint(url, tls) for url in urls]
        # Apart, as sessions are renewed while other requests still wait for their answers.
        self._seats = [Endpoint(url, tls) for url in urls]
        self._pins = tuple(pins)
        self._pool = ThreadPoolExecutor(max_workers=2 * len(urls) or 1, thread_name_prefix="party")
        self._session: str | None = None
        self._keys: tuple[str, ...] = ()

    @property
    def aggregators(self) -> list[Endpoint]:
        """The aggregators by rank, once ``keys`` was asked for."""
        return self._endpoints[: len(self._keys)]

    @property
    def third_party(self) -> bool:
        """Whether the group has one, once ``keys`` was asked for."""
        return len(self._endpoints) > len(self._keys)

    def keys(self, deadline: float) -> tuple[str, ...]:
        """The aggregators' public keys, by rank.

        Raises:
            ChannelError: a party cannot be reached, they are not one whole group, or a key is not as pinned.
        """
        if not self._keys:
            facts = self._each(self._endpoints, lambda e: _facts(e, deadline))
            order = sorted(range(len(facts)), key=lambda i: int(facts[i]["rank"]))
            found = [(f["rank"], f["parties"], f["members"]) for f in (facts[i] for i in order)]
            parties = int(facts[0]["parties"])
            if found != [(rank, parties, len(facts)) for rank in range(len(facts))]:
                named = ", ".join(f"{e.url} is rank {f['rank']} of {f['members']}"
                                  for e, f in zip(self._endpoints, facts, strict=True))  # fmt: skip
                raise ChannelError(f"the addresses do not name every party of one group once: {named}")
            keys = tuple(str(facts[i]["key"]) for i in order[:parties])
            if self._pins and keys != self._pins:
                raise ChannelError("the aggregators' keys are not the pinned ones; nothing was sent")
            self._endpoints = [self._endpoints[i] for i in order]
            self._seats = [self._seats[i] for i in order]
            self._keys = keys
        return self._keys

    def gather(self, deadline: float) -> str:
        """Have every party start a worker for a common session, unless one is on; the session."""
        if self._session is None:
            session = secrets.token_hex(16)
            self.keys(deadline)
            first, *others = self._seats
            port = json.loads(_post(first, "/v1/session", {"session": session}, deadline))["port"]
            self._each(
                others, lambda e: _post(e, "/v1/session", {"session": session, "port": port}, deadline)
            )
            self._session = session
        return self._session

    def open(self, terms: RoundTerms, deadline: float) -> None:
        """Publish a round.

        Raises:
            ChannelError: an aggregator refused it or cannot be reached.
        """
        self.keys(deadline)
        path = f"/v1/rounds/{terms.folder}"
        self._each(
            self.aggregators,
            lambda e: persistently(
                lambda: e.request("PUT", path, terms.pack(), deadline=_soon(deadline)), deadline
            ),
        )

    def close(self, terms: RoundTerms, deadline: float) -> Total:
        """Close a round and put the parties' shares together.

        Where a worker dies or hangs, all parties start new ones and go on from their spools; the outcome is
        the same as it would have been.

        Raises:
            ChannelError: refused for good, or still failing at ``deadline``; nothing was released.
        """
        self.keys(deadline)
        failure: ChannelError | None = None
        while time.monotonic() < deadline:
            try:
                posts = self._shares(terms, deadline)
                return self._attributed(terms, combine(terms, posts), agreed_in(posts[0]), deadline)
            except UnreachableError as error:
                failure = error
                time.sleep(_PAUSE)
        raise ChannelError(f"{failure or 'the parties did not answer in time'}; nothing was released")

    def _shares(self, terms: RoundTerms, deadline: float) -> list[bytes]:
        session = self.gather(deadline)
        path = f"/v1/rounds/{terms.folder}"
        found = self._each(self.aggregators, lambda e: _status(e, path, deadline))
        # Those who agreed before a failure have to help those who did not get so far.
        made_in = {status["made_in"] for status in found}
        closing = {
            "session": session,
            "agree": any(status["set"] is None for status in found),
            "kept": len(made_in) == 1 and made_in != {None},
        }
        return self._each(
            self.aggregators,
            lambda e: _post(e, f"{path}/share", closing, deadline),
            on_failure=lambda: self._renew(deadline),
        )

    def _renew(self, deadline: float) -> None:
        """Begin a new session: the workers of the old one may wait for the one that failed."""
        self._session = None
        with contextlib.suppress(UnreachableError):
            self.gather(deadline)

    def _attributed(
        self, terms: RoundTerms, integers: NDArray[np.int64], agreed: str, deadline: float
    ) -> Total:
        path = f"/v1/rounds/{terms.folder}"
        found = self._each(self.aggregators, lambda e: _status(e, path, deadline))
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
            path = f"/v1/rounds/{fresh.folder}"
            found = self._each(self.aggregators, partial(_known, path=path, deadline=deadline))
            known = [status for status in found if status is not None]
            if any(status["shared"] for status in known) or not any(status["over"] for status in known):
                opened = {status["terms"] for status in known}
                under = RoundTerms.unpack(opened.pop().encode()) if len(opened) == 1 else fresh
                return under if under.substance() == fresh.substance() else fresh
            self._each(self.aggregators, partial(_post, path=f"{path}/abandon", fields={}, deadline=deadline))
        raise ChannelError(f"round {terms.folder} came to nothing {MAX_ATTEMPTS} times; nothing was released")

    def _each(
        self,
        endpoints: Sequence[Endpoint],
        work: Callable[[Endpoint], T],
        on_failure: Callable[[], None] = lambda: None,
    ) -> list[T]:
        """``work`` on all at once; a refusal outweighs a failure, and all are awaited."""
        futures = [self._pool.submit(work, endpoint) for endpoint in endpoints]
        finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        errors = [error for future in finished if (error := future.exception()) is not None]
        # After a refusal the others are about to refuse too, unless they wait for the one that did.
        grace = 0.0 if any(isinstance(error, UnreachableError) for error in errors) else _GRACE
        if errors and (not grace or wait(futures, grace).not_done):
            on_failure()
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in errors:
            if isinstance(error, RefusedError) or not isinstance(error, ChannelError):
                raise error
        if errors:
            reasons = [str(error) for error in errors]
            raise UnreachableError("; ".join(dict.fromkeys(reasons)))
        return [future.result() for future in futures]

    def disconnect(self) -> None:
        """Close the connections; the services go on. Idempotent."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for endpoint in (*self._endpoints, *self._seats):
            endpoint.close()


def _facts(endpoint: Endpoint, deadline: float) -> dict[str, Any]:
    answer = persistently(lambda: endpoint.request("GET", "/v1/party", deadline=_soon(deadline)), deadline)
    try:
        facts = json.loads(answer)
        return {name: facts[name] for name in ("rank", "parties", "key", "members")}
    except (ValueError, TypeError, KeyError):
        raise ChannelError(f"{endpoint.url} is not a party's service") from None


def _status(endpoint: Endpoint, path: str, deadline: float) -> dict[str, Any]:
    answer = persistently(lambda: endpoint.request("GET", path, deadline=_soon(deadline)), deadline)
    status: dict[str, Any] = json.loads(answer)
    return status


def _known(endpoint: Endpoint, path: str, deadline: float) -> dict[str, Any] | None:
    """``_status``; none of a round that the party does not have open."""
    try:
        return _status(endpoint, path, deadline)
    except RefusedError:
        return None


def _post(endpoint: Endpoint, path: str, fields: dict[str, Any], deadline: float) -> bytes:
    return endpoint.request("POST", path, json.dumps(fields).encode(), deadline=deadline)


def _soon(deadline: float) -> float:
    return min(deadline, time.monotonic() + _ATTEMPT_SECONDS)
