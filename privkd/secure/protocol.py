"""One aggregator's steps in a round, and the process that takes them: a worker, over one link.

``python -m privkd.secure.protocol --link FD``; see ``privkd.secure.worker``. It answers pings from a thread
of its own, so that a peer's silence never looks like its own, and exits as soon as the link closes. It writes
nothing to disk.

Trust: whoever runs one honest aggregator that keeps its key is enough, with the others and the cloud honest
but curious and free to collude.
"""

import argparse
import contextlib
import gc
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from privkd.errors import ChannelError
from privkd.privacy.events import PartyId
from privkd.privacy.noise import NoiseRoot
from privkd.secure.frames import (
    Frame,
    Kind,
    Link,
    LinkClosedError,
    Task,
    WorkerSetup,
    pack_identifiers,
    unpack_identifiers,
)
from privkd.secure.normcheck import NormTest, challenge_key, project, rows
from privkd.secure.peers import PartyKeys
from privkd.secure.shares import to_ring
from privkd.secure.terms import RoundTerms, partial_sum, partial_vote, party_noise, set_digest
from privkd.secure.upload import SharedSecrets, header_of, unseal
from privkd.secure.uploads import stored_uploads

_CHUNK = 64


Step: TypeAlias = Callable[[Frame], Frame | None]
"""One step of a party: what it answers to a frame, if anything."""


class Backend(Protocol):
    """One party's place among ``parties``. Every party must make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """Which party this is, from 0."""
        ...

    @property
    def parties(self) -> int:
        """How many parties there are."""
        ...

    def gather(self, message: bytes) -> list[bytes]:
        """Every party's message, by rank. All parties see all of them."""
        ...

    def noisy_sum(
        self, shares: Sequence[NDArray[np.uint32]], noise: NDArray[np.int64] | None
    ) -> NDArray[np.uint32]:
        """This party's share ``[entry]`` of the sum over devices of ``shares``, plus its own ``noise``.

        Nothing is revealed: the sum appears only to whoever adds the shares of all parties.

        Args:
            shares: one array ``[entry]`` a device, as this party holds them.
            noise: integers ``[entry]`` that this party adds, or none.
        """
        ...

    def within(self, projected: NDArray[np.uint32], test: NormTest) -> NDArray[np.bool_]:
        """Which devices pass ``test``: ``[device]``, known to all parties, which learn nothing else.

        Args:
            projected: this party's shares of the devices' projections, ``[device, projection]``.
            test: what to hold them to.
        """
        ...

    def winners(
        self, votes: NDArray[np.uint32], scores: NDArray[np.uint32], threshold: int
    ) -> NDArray[np.bool_]:
        """This party's share ``[query, class]`` of ``voting.tally``: all parties' shares xor to it.

        Nothing is revealed to the parties. Inputs stand for integers in ``[-2^30, 2^30)``.

        Args:
            votes: this party's shares of the noisy counts for the argmax, ``[query, class]``.
            scores: its shares of the counts with the threshold's noise, ``[query, class]``.
            threshold: fewest votes that make a consensus.
        """
        ...

    def close(self) -> None:
        """Leave the group. Idempotent."""
        ...


class AggregatorProtocol:
    """The steps of one aggregator. Every aggregator takes the same ones, in the same order."""

    def __init__(
        self, backend: Backend, sealing_key: X25519PrivateKey, noise_root: NoiseRoot, session: str
    ) -> None:
        self._backend = backend
        self._session = session
        self._secrets = SharedSecrets(sealing_key)
        self._noise_root = noise_root
        self._uploads: list[tuple[PartyId, bytes]] = []

    def step(self, frame: Frame) -> Frame | None:
        """One step; what it comes to. An upload is kept for the next step, and answered nothing."""
        if frame.kind is Kind.UPLOAD:
            self._uploads.append((header_of(frame.body).device, frame.body))
            return None
        if frame.kind is Kind.AGREE:
            return Frame(Kind.AGREE, self._agree(frame.body))
        steps = {Kind.CHECK: self._check, Kind.SUM: self._sum, Kind.VOTE: self._vote}
        if frame.kind not in steps:
            raise ChannelError(f"frame of kind {frame.kind.name} out of place")
        answer = steps[frame.kind](Task.unpack(frame.body))
        self._uploads = []
        return Frame(frame.kind, answer)

    def _agree(self, held: bytes) -> bytes:
        """The identifiers that every aggregator holds, in order."""
        sets = [set(unpack_identifiers(message)) for message in self._backend.gather(held)]
        return pack_identifiers(sorted(set.intersection(*sets)))

    def _check(self, task: Task) -> bytes:
        """A byte a device, in the task's order: 1 where its norm is within the bound."""
        terms = RoundTerms.unpack(task.terms.encode())
        found = dict(self._opened(task, terms))
        opened = [found[device] for device in task.devices]
        # Unpredictable to the devices, whose uploads are fixed; the same again when the step is repeated.
        fixed = set_digest(terms, [identifier for identifier, _ in opened])
        own = self._noise_root.subkey("challenge", terms.round, fixed)
        key = challenge_key(self._backend.gather(own))
        signs = rows(key, terms.projections, terms.entries)
        projected = np.stack([project(share, signs) for _, share in opened])
        return self._backend.within(projected, NormTest.of(terms.bound, terms.projections)).tobytes()

    def _sum(self, task: Task) -> bytes:
        """This party's part of the noisy sum over the agreed set."""
        terms = RoundTerms.unpack(task.terms.encode())
        identifiers, sums = self._chunk_sums(task, terms)
        digest = set_digest(terms, identifiers)
        noise = self._noise("service", terms, digest, terms.variance, terms.entries)
        return partial_sum(digest, self._backend.noisy_sum(sums, noise))

    def _vote(self, task: Task) -> bytes:
        """This party's part of the vote of the agreed set."""
        terms = RoundTerms.unpack(task.terms.encode())
        if terms.votes is None:
            raise ChannelError(f"round {terms.folder} holds no vote")
        identifiers, sums = self._chunk_sums(task, terms)
        digest = set_digest(terms, identifiers)
        counts = np.sum(sums, axis=0, dtype=np.uint32).reshape(-1, terms.votes.classes)
        votes, scores = counts, counts
        noise = self._noise("service votes", terms, digest, terms.variance, counts.size)
        if noise is not None:
            votes = counts + to_ring(noise).reshape(counts.shape)
        noise = self._noise("service threshold", terms, digest, terms.votes.variance, len(counts))
        if noise is not None:
            scores = counts + to_ring(noise)[:, None]
        share = self._backend.winners(votes, scores, terms.votes.threshold)
        return partial_vote(digest, self._session, share)

    def _noise(
        self, purpose: str, terms: RoundTerms, digest: bytes, variance: Fraction | None, count: int
    ) -> NDArray[np.int64] | None:
        """What this party adds, ``[count]``: a re-run over the same set repeats it."""
        return party_noise(self._noise_root, purpose, terms.round, digest, variance, count)

    def _chunk_sums(self, task: Task, terms: RoundTerms) -> tuple[list[bytes], list[NDArray[np.uint32]]]:
        """The uploads' identifiers, and their shares ``[entry]``, summed by the chunk.

        Adding what this party holds needs no peer. Chunks bound the memory, and hand CrypTen, whose ring
        takes twice the bytes, a few rows in place of all.
        """
        identifiers: list[bytes] = []
        sums: list[NDArray[np.uint32]] = []
        for number, (_, (identifier, share)) in enumerate(self._opened(task, terms)):
            identifiers.append(identifier)
            if number % _CHUNK == 0:
                sums.append(np.zeros(terms.entries, np.uint32))
            sums[-1] += share
        return identifiers, sums

    def _opened(
        self, task: Task, terms: RoundTerms
    ) -> Iterator[tuple[PartyId, tuple[bytes, NDArray[np.uint32]]]]:
        """Each of the task's devices with its upload's identifier and share ``[entry]``, as they came."""
        wanted = set(task.devices)
        for device, envelope in stored_uploads(Path(task.folder)) if task.folder else self._uploads:
            if device in wanted:
                wanted.remove(device)
                header, share = unseal(envelope, self._secrets)
                yield device, (header.identifier, share.expand(terms.entries))
        if wanted:
            raise ChannelError(f"{min(wanted)}: its upload is gone")


def serve(link: Link, join: Callable[[bytes], tuple[Frame, Step]]) -> None:
    """Serve ``link`` until it closes: set up with ``join``, then step after step. Never returns.

    Pings are answered from a thread of its own, so that a peer's silence never looks like this party's. A
    failure is reported in one line, after which the party serves no more: its peers may be stuck in the
    step that failed, so the group has to be started afresh.

    Args:
        link: to whoever started the process.
        join: from the body of the first frame, the first answer and the steps.
    """
    inbox: queue.SimpleQueue[Frame] = queue.SimpleQueue()
    sending = threading.Lock()

    def post(frame: Frame) -> None:
        with sending:
            link.send(frame)

    threading.Thread(target=_listen, args=(link, inbox, post), daemon=True).start()
    try:
        ready, step = join(inbox.get().body)
        post(ready)
        while True:
            answer = step(inbox.get())
            if answer is not None:
                post(answer)
    except ChannelError as error:
        post(Frame(Kind.FAILED, str(error).encode()))
    except ImportError as error:
        post(Frame(Kind.FAILED, f"CrypTen cannot be imported ({error}); run `privkd doctor`".encode()))
    except Exception as error:
        # Peers that die surface here as many kinds of error, and their text may run over many lines.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        post(Frame(Kind.FAILED, reason.encode()))
    threading.Event().wait()


def _listen(link: Link, inbox: "queue.SimpleQueue[Frame]", post: Callable[[Frame], None]) -> None:
    """Read the link for ever: answer pings at once, queue the rest. The link's end is the process's."""
    try:
        while True:
            frame = link.receive()
            if frame.kind is Kind.PING:
                post(Frame(Kind.PONG))
            else:
                inbox.put(frame)
    except LinkClosedError:
        pass
    finally:
        # The main thread may be blocked in a collective, so nothing gentler would end the process.
        os._exit(0)


def _join(body: bytes, listener: socket.socket | None) -> tuple[Frame, Step]:
    # Imported here: it takes seconds, and only the worker's process needs it. It leaves nothing to collect,
    # and looking for it would take a tenth of that time.
    gc.disable()
    from privkd.secure.crypten_backend import CryptenBackend, ThirdParty

    gc.enable()

    setup = WorkerSetup.unpack(body)
    key = X25519PrivateKey.from_private_bytes(bytes.fromhex(setup.sealing_key))
    members = tuple(bytes.fromhex(member) for member in setup.members)
    keys = PartyKeys(setup.rank, key, members, setup.session)
    if setup.rank == setup.parties:
        deal = partial(ThirdParty, keys, setup.parties, port=setup.port, host=setup.host)
        threading.Thread(target=_until_the_end, args=(deal,), daemon=True).start()
        return Frame(Kind.READY), _no_step
    backend = CryptenBackend(keys, setup.parties, host=setup.host, port=setup.port, listener=listener)
    root = NoiseRoot(bytes.fromhex(setup.noise_key))
    return Frame(Kind.READY), AggregatorProtocol(backend, key, root, setup.session).step


def _until_the_end(deal: Callable[[], object]) -> None:
    try:
        deal()
    finally:
        # The peers wait for ever for a third party that lives on without serving them.
        os._exit(1)


def _no_step(frame: Frame) -> Frame:
    raise ChannelError(f"frame of kind {frame.kind.name} sent to the third party")


def main() -> None:
    """Run one worker on the descriptors named on the command line."""
    parser = argparse.ArgumentParser(description="The worker of a party's service.")
    parser.add_argument("--link", type=int, required=True, help="descriptor of the socket to the service")
    parser.add_argument("--store", type=int, help="descriptor of the socket where the peers meet")
    arguments = parser.parse_args()
    listener = None if arguments.store is None else socket.socket(fileno=arguments.store)
    with contextlib.suppress(BrokenPipeError):
        serve(Link(socket.socket(fileno=arguments.link)), partial(_join, listener=listener))


if __name__ == "__main__":
    main()
