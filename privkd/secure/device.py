"""The device's side of a round: clip, encode, share, seal, upload. Without torch and without CrypTen."""

import json
import os
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from privkd.errors import ChannelError
from privkd.privacy.events import PartyId
from privkd.privacy.noise import KEY_BYTES, NoiseRoot, discrete_gaussian
from privkd.secure.endpoint import Endpoint, persistently
from privkd.secure.envelope import UPLOAD_ID_BYTES, Header, packed, seal
from privkd.secure.fixedpoint import FixedPoint, content_digest, finite_or_zero
from privkd.secure.shares import split
from privkd.secure.terms import RoundTerms

_ATTEMPT_SECONDS = 15.0
_RELAY_BYTES = 1 << 22
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Upload:
    """A device's whole contribution to a round: one envelope an aggregator, by rank.

    A retry sends these same bytes. Keep them (``pack``) until every aggregator has them: sharing the answers
    anew would leave the aggregators with shares that do not belong together, and the device left out.
    ``round`` is the label of the attempt.
    """

    round: int
    device: PartyId
    upload_id: bytes
    envelopes: tuple[bytes, ...]

    def pack(self) -> bytes:
        """As bytes, for the device's own disk."""
        name = self.device.encode()
        parts = (self.round.to_bytes(8, "little"), name, self.upload_id, *self.envelopes)
        return b"".join(_LENGTH.pack(len(part)) + part for part in parts)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """From ``pack``.

        Raises:
            ChannelError: cut off or not an upload.
        """
        parts, position = [], 0
        try:
            while position < len(data):
                (length,) = _LENGTH.unpack_from(data, position)
                position += _LENGTH.size + length
                if position > len(data):
                    raise ValueError("cut off")
                parts.append(data[position - length : position])
            round, name, upload_id, *envelopes = parts
            return cls(int.from_bytes(round, "little"), name.decode(), upload_id, tuple(envelopes))
        except (struct.error, ValueError) as error:
            raise ChannelError(f"kept upload: damaged ({error})") from error


def prepare(
    block: NDArray[np.floating], terms: RoundTerms, device: PartyId, entropy: bytes | None = None
) -> Upload:
    """A device's ``block`` of answers, of any shape with ``terms.entries`` entries, ready to be sent.

    The block is clipped in L2 and truncated to integers of norm at most ``terms.bound``, exactly. One with a
    value that is not finite is sent as zeros, so that no device betrays itself by failing. Where the devices
    add the noise, this one adds its share. What is drawn (shares, keys, noise) is a function of
    ``entropy``, round, device and content, so no two contents ever meet the same draw.

    Args:
        block: the answers.
        terms: of the round.
        device: this device's name.
        entropy: 32 secret bytes; fresh from the operating system unless given. Simulations give their own.

    Raises:
        ChannelError: the block has another size; nothing is sent.
    """
    values = np.asarray(block, np.float64).reshape(1, -1)
    if values.size != terms.entries:
        raise ChannelError(f"{device}: {values.size} answers, but the round takes {terms.entries}")
    integers = FixedPoint(terms.fraction_bits, terms.bound).encode(finite_or_zero(values))[0]
    return seal_integers(integers, terms, device, entropy)


def seal_integers(
    integers: NDArray[np.int64], terms: RoundTerms, device: PartyId, entropy: bytes | None = None
) -> Upload:
    """``prepare`` from the clipped ``integers`` ``[entry]`` on."""
    root = NoiseRoot(os.urandom(KEY_BYTES) if entropy is None else entropy)
    # The upload's name says what it holds; its keys are also of the round's terms, so of the recipients.
    content = root.subkey("upload", terms.round, device, terms.substance(), content_digest(integers))
    own = NoiseRoot(NoiseRoot(content).subkey("sealed under", terms.pack()))
    if terms.device_variance is not None:
        stream = NoiseRoot(content).stream("noise")
        integers = integers + discrete_gaussian(terms.device_variance, terms.entries, stream)
    upload_id = NoiseRoot(content).subkey("name")[:UPLOAD_ID_BYTES]
    shares = split(integers, len(terms.keys), own.stream("shares"))
    envelopes = tuple(
        seal(
            Header(terms.label, device, upload_id, party, len(shares), terms.entries, share.form),
            share,
            bytes.fromhex(key),
            own.subkey("envelope", party),
        )
        for party, (share, key) in enumerate(zip(shares, terms.keys, strict=True))
    )
    return Upload(terms.label, device, upload_id, envelopes)


def send(upload: Upload, endpoints: Sequence[Endpoint], *, deadline: float) -> None:
    """Send each aggregator its envelope, again and again where it cannot be reached.

    Args:
        upload: from ``prepare``.
        endpoints: the aggregators, by rank.
        deadline: on ``time.monotonic``.

    Raises:
        ChannelError: an aggregator refused it, or cannot be reached in time.
    """
    path = f"/v1/rounds/{upload.round:016x}/uploads"
    for endpoint, envelope in zip(endpoints, upload.envelopes, strict=True):

        def attempt(endpoint: Endpoint = endpoint, envelope: bytes = envelope) -> bytes:
            by = min(deadline, time.monotonic() + _ATTEMPT_SECONDS)
            return endpoint.request("POST", path, envelope, deadline=by)

        persistently(attempt, deadline)


def relay(uploads: Sequence[Upload], endpoints: Sequence[Endpoint], *, deadline: float) -> list[str]:
    """Send many devices' uploads to one round, as a relay does that carries them blind; what was refused.

    Args:
        uploads: from ``prepare``, of one round.
        endpoints: the aggregators, by rank; they must know the caller as the cloud.
        deadline: on ``time.monotonic``.

    Raises:
        ChannelError: an aggregator cannot be reached in time.
    """
    refused: list[str] = []
    for rank, endpoint in enumerate(endpoints):
        for batch in _batches([(upload.round, upload.envelopes[rank]) for upload in uploads]):
            path = f"/v1/rounds/{batch[0][0]:016x}/relay"
            body = packed(envelope for _, envelope in batch)

            def attempt(endpoint: Endpoint = endpoint, path: str = path, body: bytes = body) -> bytes:
                by = min(deadline, time.monotonic() + _ATTEMPT_SECONDS)
                return endpoint.request("POST", path, body, deadline=by)

            refused += json.loads(persistently(attempt, deadline))["refused"]
    return refused


def _batches(envelopes: Sequence[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    """Runs of envelopes that fit one request together."""
    batch: list[tuple[int, bytes]] = []
    size = 0
    for round, envelope in envelopes:
        if batch and size + len(envelope) > _RELAY_BYTES:
            yield batch
            batch, size = [], 0
        batch.append((round, envelope))
        size += len(envelope)
    if batch:
        yield batch
