"""What a party's service answers to each call of ``aggregator.proto``.

A call costs no thread while its body comes in. Who calls, and whether that caller may, is settled before the
body is read; of those that wait for room nothing is held but what the connection's window takes. Uploads,
closings and all else are worked off by threads of their own: a round that closes for minutes, or a crowd of
uploads, delays nothing of the others. Uploads that wait together become durable together, as writing to the
disk is most of what one costs.
"""

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import grpc

from privkd.errors import ChannelError, PrivkdError, RefusalError
from privkd.secure import aggregator_pb2 as pb
from privkd.secure.aggregator_pb2_grpc import AggregatorServicer
from privkd.secure.batches import Batches
from privkd.secure.callers import ByteBudget, Callers, TooManyCallsError
from privkd.secure.certificates import CLOUD
from privkd.secure.credentials import ServerCertificates
from privkd.secure.observed import Call, Observed
from privkd.secure.party import LimitsConfig
from privkd.secure.rounds import Rounds
from privkd.secure.rpc import PROTOCOL, code_of, cut
from privkd.secure.terms import RoundTerms
from privkd.secure.upload import header_of, largest_envelope, unpacked

_THREADS = 8
_MAX_TERMS_BYTES = 1 << 24
_MAX_OUTSIDE = 4096
"""Bytes of an upload beside its share, at most."""
_MAX_REASON_BYTES = 2000
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Pieces: TypeAlias = AsyncIterator[pb.Piece]
T = TypeVar("T")


class _Sent(NamedTuple):
    """An envelope, to which round, and who sent it."""

    round: int
    envelope: bytes
    caller: str | None


class PartyServicer(AggregatorServicer):
    """The calls of one party's service."""

    def __init__(
        self, rounds: Rounds, folder: Path, observed: Observed, trust: ServerCertificates | None
    ) -> None:
        """``folder``: where the rounds are kept; ``trust``: who is who, else each caller may do all."""
        self._rounds = rounds
        self._folder = str(folder)
        self._observed = observed
        self._trust = trust if trust is not None and trust.asks else None
        self._limits = rounds.party.limits
        self._callers = Callers(self._limits)
        self._budget = ByteBudget(self._limits.max_bytes_at_once)
        self._uploads = Batches(self._taken, "uploads")
        self._closing = ThreadPoolExecutor(_THREADS, "closing")
        self._else = ThreadPoolExecutor(_THREADS, "calls")

    async def hold_to(self, limits: LimitsConfig) -> None:
        """Take other limits, from the next call on."""
        self._limits = self._callers.limits = limits
        self._budget.resize(limits.max_bytes_at_once)

    # ---- the calls ----------------------------------------------------------------------------------

    async def About(self, request: pb.AboutRequest, context: Context) -> pb.AboutReply:
        """Who this is."""
        party = self._rounds.party
        async with self._call("About", context):
            return pb.AboutReply(
                protocol=PROTOCOL,
                version=version("privkd"),
                rank=party.rank,
                parties=party.parties,
                members=[bytes.fromhex(member) for member in party.members],
                clock_ms=time.time_ns() // 1_000_000,
            )

    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinReply:
        """Start a worker."""
        async with self._call("Join", context, cloud_only=True):
            port = request.port if request.HasField("port") else None
            if port is not None and not 0 < port < 1 << 16:
                raise RefusalError(400, f"port={port}: expected 1 to 65535")
            return pb.JoinReply(
                port=await _in(self._else, self._rounds.supervisor.join, request.session, port)
            )

    async def Open(self, pieces: Pieces, context: Context) -> pb.Done:
        """Begin a round."""
        async with self._call("Open", context, cloud_only=True) as call:
            head = await self._head(pieces, call, _MAX_TERMS_BYTES)
            async with self._budget.taken(head.size):
                await _in(self._else, self._open, head.round, await self._body(pieces, head.size))
            return pb.Done()

    async def Upload(self, pieces: Pieces, context: Context) -> pb.Done:
        """Take one envelope."""
        async with self._call("Upload", context) as call:
            head = await self._head(pieces, call, self._limits.max_upload_bytes + _MAX_OUTSIDE)
            if call.caller not in (None, CLOUD, head.device):
                raise RefusalError(403, f"{call.caller!r} may not upload for {head.device}")
            _within(head.size, largest_envelope(self._rounds.terms(head.round).entries))
            async with self._budget.taken(head.size):
                body = await self._body(pieces, head.size)
                await self._uploads.done(_Sent(head.round, body, call.caller))
            return pb.Done()

    async def Relay(self, pieces: Pieces, context: Context) -> pb.RelayReply:
        """Take many envelopes."""
        async with self._call("Relay", context, cloud_only=True) as call:
            head = await self._head(pieces, call, self._limits.max_upload_bytes + _MAX_OUTSIDE)
            async with self._budget.taken(head.size):
                body = await self._body(pieces, head.size)
                return pb.RelayReply(refused=await _in(self._else, self._relay, head.round, body))

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusReply:
        """How far a round is."""
        async with self._call("Status", context, cloud_only=True):
            status = await _in(self._else, self._rounds.status, request.round)
            return pb.StatusReply(**status | {"terms": status["terms"].encode()})

    async def Share(self, request: pb.ShareRequest, context: Context) -> AsyncIterator[pb.Piece]:
        """Close a round; this party's part of the result."""
        async with self._call("Share", context, cloud_only=True) as call:
            close = partial(self._rounds.close, agree=request.agree, kept=request.kept)
            share = await _in(self._closing, close, request.round, request.session)
            call.size = len(share)
            for piece in cut(share):
                yield piece

    async def Abandon(self, request: pb.AbandonRequest, context: Context) -> pb.Done:
        """Never release anything of a round."""
        async with self._call("Abandon", context, cloud_only=True):
            # It waits for a closing that is on.
            await _in(self._closing, self._rounds.abandon, request.round)
            return pb.Done()

    # ---- what they have in common -------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _call(self, name: str, context: Context, *, cloud_only: bool = False) -> AsyncIterator[Call]:
        """A call of one who may make it: counted, logged, and its failure told in words."""
        shown = context.auth_context() if self._trust is not None else {}
        own_name = _first(shown, "x509_common_name").decode(errors="replace")
        call = Call(name, None if self._trust is None else own_name)
        start, status = time.monotonic(), None
        failure: tuple[grpc.StatusCode, str] | None = None
        try:
            if self._trust is not None and self._trust.revoked(_first(shown, "x509_pem_cert")):
                raise RefusalError(403, "this certificate was revoked")
            with self._callers.admitted(call.caller):
                if cloud_only and call.caller not in (None, CLOUD):
                    raise RefusalError(403, f"{call.caller!r} may not open, close or relay rounds")
                yield call
        except RefusalError as refusal:
            status, failure = refusal.status, (code_of(refusal.status), self._told(refusal))
        except TooManyCallsError as error:
            failure = grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
        except PrivkdError as error:
            failure = grpc.StatusCode.UNAVAILABLE, self._told(error)
        except TimeoutError:
            failure = grpc.StatusCode.DEADLINE_EXCEEDED, "the body of the call did not come in time"
        except (asyncio.CancelledError, GeneratorExit):
            call.code = "CANCELLED"
            raise
        except Exception as error:  # the service outlives a bug in one call
            failure = grpc.StatusCode.INTERNAL, f"{type(error).__name__}; the service's log says where"
            self._observed.log.write(logging.ERROR, "bug", **_where(error))
        finally:
            if failure is not None:
                call.code, call.reason = failure[0].name, failure[1]
            self._observed.ended(call, time.monotonic() - start, status)
        if failure is not None:
            await context.abort(*failure)

    def _told(self, error: PrivkdError) -> str:
        """What a caller is told: in one line, and nothing of where files lie."""
        text = " ".join(str(error).split()).replace(self._folder, "...")
        # It travels in a header, which has its limits; a round's whole story is in its status.
        kept = text.encode()[:_MAX_REASON_BYTES].decode(errors="ignore")
        return text if kept == text else f"{kept} ..."

    async def _head(self, pieces: Pieces, call: Call, limit: int) -> pb.Head:
        """The head of a call's stream, whose body is at most ``limit`` bytes."""
        async with asyncio.timeout(self._limits.request_seconds):
            first = await anext(aiter(pieces), None)
        if first is None or not first.HasField("head") or first.data:
            raise RefusalError(400, "a stream's first piece has a head, and no data")
        call.size = first.head.size
        _within(first.head.size, limit)
        return first.head

    async def _body(self, pieces: Pieces, size: int) -> bytes:
        """The rest of a call's stream, of ``size`` bytes as its head said."""
        parts: list[bytes] = []
        missing = size
        async with asyncio.timeout(self._limits.request_seconds):
            async for piece in pieces:
                missing -= len(piece.data)
                if piece.HasField("head") or missing < 0:
                    raise RefusalError(400, f"more than the {size} bytes that the call's head says")
                parts.append(piece.data)
        if missing:
            raise RefusalError(400, f"cut off: {missing} of {size} bytes are missing")
        return b"".join(parts)

    def _open(self, round: int, body: bytes) -> None:
        with _malformed():
            terms = RoundTerms.unpack(body)
        if terms.label != round:
            raise RefusalError(400, f"terms of round {terms.folder} sent to round {round:016x}")
        self._rounds.open(terms)

    def _taken(self, sent: Sequence[_Sent]) -> list[Exception | None]:
        """Of each why it is not taken, if it is not; those that are, are durable."""
        strange = [_not_own(each) for each in sent]
        own = [(each.round, each.envelope) for each, why in zip(sent, strange, strict=True) if why is None]
        outcomes = iter(self._rounds.upload_many(own))
        return [why or next(outcomes) for why in strange]

    def _relay(self, round: int, body: bytes) -> list[str]:
        with _malformed():
            envelopes = unpacked(body)
        return self._rounds.upload_all(round, envelopes)

    def close(self) -> None:
        """Let go of the threads; those that are at work end with it."""
        self._uploads.close()
        for pool in (self._closing, self._else):
            pool.shutdown(wait=False, cancel_futures=True)


def _first(shown: Mapping[str, Iterable[bytes]], name: str) -> bytes:
    """What a caller's certificate says under a name, or nothing."""
    return next(iter(shown.get(name, ())), b"")


def _not_own(sent: _Sent) -> RefusalError | None:
    """Why a caller may not send this envelope, whatever the call's head said; none if it may."""
    if sent.caller in (None, CLOUD):
        return None
    try:
        device = header_of(sent.envelope).device
    except ChannelError as error:
        return RefusalError(400, str(error))
    return (
        None if device == sent.caller else RefusalError(403, f"{sent.caller!r} may not upload for {device}")
    )


def _within(size: int, limit: int) -> None:
    if size > limit:
        raise RefusalError(413, f"{size} bytes: more than the limit of {limit}")


@contextlib.contextmanager
def _malformed() -> Any:
    """What cannot be read is the caller's mistake."""
    try:
        yield
    except ChannelError as error:
        raise RefusalError(400, str(error)) from error


async def _in(pool: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)


def _where(error: Exception) -> dict[str, object]:
    """Of a bug its kind and place; its text could quote what must not be written down."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return {"error": type(error).__name__, "place": f"{frame.name}:{frame.lineno}"}
