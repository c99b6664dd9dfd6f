"""One aggregator: it collects sealed shares, agrees with its peers on whose, and posts its noisy share.

``python -m privkd.secure.aggregator --link FD`` is the party's process. Everything else it needs comes
over the link. It answers pings from a thread of its own, so that a peer's silence never looks like its
own, and exits as soon as the link closes. It writes nothing to disk.

Trust: whoever runs one honest aggregator that keeps its key is enough, with the others and the cloud
honest but curious and free to collude.
"""

import argparse
import hashlib
import socket
from collections.abc import Iterable
from functools import partial

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from privkd.errors import ChannelError
from privkd.privacy.events import PartyId
from privkd.privacy.noise import NoiseRoot, discrete_gaussian
from privkd.secure.backend import Backend
from privkd.secure.envelope import Header, unseal
from privkd.secure.serving import Step, serve
from privkd.secure.shares import Share
from privkd.secure.wire import Frame, Kind, Link, RoundNotice, Setup, SharePost

IDENTIFIER_BYTES = 32


def agreed_digest(notice: RoundNotice, identifiers: Iterable[bytes]) -> bytes:
    """SHA-256 of a round's parameters and its agreed uploads, in any order."""
    digest = hashlib.sha256(notice.pack())
    for identifier in sorted(identifiers):
        digest.update(identifier)
    return digest.digest()


def party_noise(root: NoiseRoot, notice: RoundNotice, digest: bytes) -> NDArray[np.int64] | None:
    """What the party whose key is ``root`` adds to a round's agreed set ``[entry]``; or none."""
    if notice.variance is None:
        return None
    stream = root.stream("aggregator", notice.round, digest)
    return discrete_gaussian(notice.variance, notice.entries, stream)


class Aggregator:
    """The protocol's steps at one party, one round at a time."""

    def __init__(self, backend: Backend, private_key: X25519PrivateKey, noise_root: NoiseRoot) -> None:
        self._backend = backend
        self._private_key = private_key
        self._noise_root = noise_root
        self._notice: RoundNotice | None = None
        self._uploads: dict[PartyId, tuple[Header, Share]] = {}
        self._refused: list[str] = []

    def open(self, notice: RoundNotice) -> None:
        """Begin a round, and forget the one before."""
        self._notice = notice
        self._uploads = {}
        self._refused = []

    def receive(self, envelope: bytes) -> None:
        """Take one device's upload. A bad one is refused and left out; the same one again changes nothing."""
        try:
            header, share = unseal(envelope, self._private_key)
            self._check(header)
        except ChannelError as error:
            self._refused.append(str(error))
            return
        self._uploads[header.device] = (header, share)

    def _check(self, header: Header) -> None:
        notice = self._opened()
        addressed = (header.round, header.party, header.parties, header.entries)
        if addressed != (notice.round, self._backend.rank, self._backend.parties, notice.entries):
            raise ChannelError(f"{header.device}: upload for another round, aggregator or shape")
        known = self._uploads.get(header.device)
        if known is not None and known[0].upload_id != header.upload_id:
            raise ChannelError(f"{header.device}: second upload in one round")

    def finish(self) -> SharePost:
        """Agree on the uploads that every party holds, and make this party's noisy share of their sum.

        The noise is a function of this party's key, the round's parameters and the agreed set: a re-run
        gives the same bytes, and no other set ever meets the same noise.

        Raises:
            ChannelError: fewer uploads were agreed than the round's minimum.
        """
        notice = self._opened()
        held = {header.identifier: share for header, share in self._uploads.values()}
        agreed = set(held).intersection(*(identifiers_in(m) for m in self._backend.gather(b"".join(held))))
        if len(agreed) < max(1, notice.minimum):
            reasons = "; ".join(self._refused) or "the others are missing"
            raise ChannelError(
                f"round {notice.round}: {len(agreed)} uploads agreed, fewer than {notice.minimum} ({reasons})"
            )
        digest = agreed_digest(notice, agreed)
        shares = [held[identifier].expand(notice.entries) for identifier in sorted(agreed)]
        noise = party_noise(self._noise_root, notice, digest)
        self._notice, self._uploads = None, {}
        return SharePost(digest, self._backend.noisy_sum(shares, noise))

    def _opened(self) -> RoundNotice:
        if self._notice is None:
            raise ChannelError("no round is open")
        return self._notice


def identifiers_in(message: bytes) -> set[bytes]:
    """The upload identifiers that a message concatenates."""
    return {message[i : i + IDENTIFIER_BYTES] for i in range(0, len(message), IDENTIFIER_BYTES)}


def join(body: bytes, listener: socket.socket | None) -> tuple[Frame, Step]:
    """Join the peers, and announce the key to which devices seal their shares."""
    # Imported here: it takes seconds, and only a party's process needs it.
    from privkd.secure.crypten_backend import CryptenBackend

    setup = Setup.unpack(body)
    backend = CryptenBackend(setup.rank, setup.parties, port=setup.port, listener=listener)
    private_key = X25519PrivateKey.generate()
    aggregator = Aggregator(backend, private_key, NoiseRoot(bytes.fromhex(setup.noise_key)))
    ready = Frame(Kind.READY, private_key.public_key().public_bytes_raw())
    return ready, partial(_step, aggregator)


def _step(aggregator: Aggregator, frame: Frame) -> Frame | None:
    if frame.kind is Kind.ROUND:
        aggregator.open(RoundNotice.unpack(frame.body))
    elif frame.kind is Kind.UPLOAD:
        aggregator.receive(frame.body)
    elif frame.kind is Kind.FINISH:
        return Frame(Kind.SHARE, aggregator.finish().pack())
    else:
        raise ChannelError(f"frame of kind {frame.kind.name} out of place")
    return None


def main() -> None:
    """Run one party on the descriptors named on the command line."""
    parser = argparse.ArgumentParser(description="One aggregator of the secure channel.")
    parser.add_argument("--link", type=int, required=True, help="descriptor of the socket to the cloud")
    parser.add_argument("--store", type=int, help="descriptor of the bound socket of the peers' store")
    arguments = parser.parse_args()
    listener = None if arguments.store is None else socket.socket(fileno=arguments.store)
    serve(Link(socket.socket(fileno=arguments.link)), partial(join, listener=listener))


if __name__ == "__main__":
    main()
