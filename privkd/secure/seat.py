"""The process in which a party's service runs CrypTen: the protocol's steps over the spool's uploads.

``python -m privkd.secure.seat --link FD``; see ``privkd.secure.worker``.
"""

import argparse
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from privkd.errors import ChannelError
from privkd.privacy.events import PartyId
from privkd.privacy.noise import NoiseRoot
from privkd.secure.aggregator import identifiers_in
from privkd.secure.backend import Backend
from privkd.secure.csprng import PartyKeys
from privkd.secure.envelope import unseal
from privkd.secure.normcheck import NormTest, challenge_key, project, rows
from privkd.secure.posts import service_noise, sum_post, vote_post
from privkd.secure.serving import Step, serve
from privkd.secure.shares import to_ring
from privkd.secure.spool import spooled
from privkd.secure.terms import RoundTerms, set_digest
from privkd.secure.wire import Frame, Kind, Link
from privkd.secure.worker import Task, WorkerSetup

_CHUNK = 64


class Seat:
    """The worker's steps, at one aggregator."""

    def __init__(
        self, backend: Backend, sealing_key: X25519PrivateKey, noise_root: NoiseRoot, session: str
    ) -> None:
        self._backend = backend
        self._session = session
        self._sealing_key = sealing_key
        self._noise_root = noise_root

    def step(self, frame: Frame) -> Frame:
        """One step; every aggregator takes the same ones."""
        if frame.kind is Kind.AGREE:
            return Frame(Kind.AGREE, self._agree(frame.body))
        if frame.kind is Kind.CHECK:
            return Frame(Kind.CHECK, self._check(Task.unpack(frame.body)))
        if frame.kind is Kind.SUM:
            return Frame(Kind.SUM, self._sum(Task.unpack(frame.body)))
        if frame.kind is Kind.VOTE:
            return Frame(Kind.VOTE, self._vote(Task.unpack(frame.body)))
        raise ChannelError(f"frame of kind {frame.kind.name} out of place")

    def _agree(self, held: bytes) -> bytes:
        """The identifiers that every aggregator holds, in order."""
        messages = self._backend.gather(held)
        return b"".join(sorted(identifiers_in(held).intersection(*map(identifiers_in, messages))))

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
        """This party's post of the noisy sum over the agreed set."""
        terms = RoundTerms.unpack(task.terms.encode())
        identifiers, partial_sums = self._partial_sums(task, terms)
        digest = set_digest(terms, identifiers)
        noise = self._noise("service", terms, digest, terms.variance, terms.entries)
        return sum_post(digest, self._backend.noisy_sum(partial_sums, noise))

    def _vote(self, task: Task) -> bytes:
        """This party's post of the vote of the agreed set."""
        terms = RoundTerms.unpack(task.terms.encode())
        if terms.votes is None:
            raise ChannelError(f"round {terms.folder} holds no vote")
        identifiers, partial_sums = self._partial_sums(task, terms)
        digest = set_digest(terms, identifiers)
        counts = np.sum(partial_sums, axis=0, dtype=np.uint32).reshape(-1, terms.votes.classes)
        votes, scores = counts, counts
        noise = self._noise("service votes", terms, digest, terms.variance, counts.size)
        if noise is not None:
            votes = counts + to_ring(noise).reshape(counts.shape)
        noise = self._noise("service threshold", terms, digest, terms.votes.variance, len(counts))
        if noise is not None:
            scores = counts + to_ring(noise)[:, None]
        share = self._backend.winners(votes, scores, terms.votes.threshold)
        return vote_post(digest, self._session, share)

    def _noise(
        self, purpose: str, terms: RoundTerms, digest: bytes, variance: Fraction | None, count: int
    ) -> NDArray[np.int64] | None:
        """What this party adds, ``[count]``: a re-run over the same set repeats it."""
        return service_noise(self._noise_root, purpose, terms.round, digest, variance, count)

    def _partial_sums(self, task: Task, terms: RoundTerms) -> tuple[list[bytes], list[NDArray[np.uint32]]]:
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
        for device, envelope in spooled(Path(task.folder)):
            if device in wanted:
                wanted.remove(device)
                header, share = unseal(envelope, self._sealing_key)
                yield device, (header.identifier, share.expand(terms.entries))
        if wanted:
            raise ChannelError(f"{min(wanted)}: its upload is gone from the spool")


def _join(body: bytes, listener: socket.socket | None) -> tuple[Frame, Step]:
    # Imported here: it takes seconds, and only the worker's process needs it.
    from privkd.secure.crypten_backend import CryptenBackend, ThirdParty

    setup = WorkerSetup.unpack(body)
    key = X25519PrivateKey.from_private_bytes(bytes.fromhex(setup.sealing_key))
    members = tuple(bytes.fromhex(member) for member in setup.members)
    keys = PartyKeys(setup.rank, key, members, setup.session)
    if setup.rank == setup.parties:
        deal = partial(
            ThirdParty,
            setup.parties,
            keys=keys,
            port=setup.port,
            host=setup.host,
            interface=setup.interface,
        )
        threading.Thread(target=_until_the_end, args=(deal,), daemon=True).start()
        return Frame(Kind.READY), _no_step
    backend = CryptenBackend(
        setup.rank,
        setup.parties,
        host=setup.host,
        port=setup.port,
        interface=setup.interface,
        listener=listener,
        keys=keys if setup.third_party else None,
    )
    seat = Seat(backend, key, NoiseRoot(bytes.fromhex(setup.noise_key)), setup.session)
    return Frame(Kind.READY), seat.step


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
    parser.add_argument("--store", type=int, help="descriptor of the bound socket of the peers' store")
    arguments = parser.parse_args()
    listener = None if arguments.store is None else socket.socket(fileno=arguments.store)
    with contextlib.suppress(BrokenPipeError):
        serve(Link(socket.socket(fileno=arguments.link)), partial(_join, listener=listener))


if __name__ == "__main__":
    main()
