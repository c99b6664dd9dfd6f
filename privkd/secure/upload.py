"""The device's side of a round: clip, encode, share, seal. Without torch and without CrypTen.

Each share is sealed to one aggregator, so that files, pipes and the cloud carry it blind: X25519 with a fresh
key for each envelope, HKDF-SHA256, AES-256-GCM. The header travels in clear and is authenticated. The key
serves one envelope only, so the nonce is constant.
"""

import hashlib
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from privkd.errors import ChannelError
from privkd.privacy.events import PartyId
from privkd.privacy.noise import KEY_BYTES, NoiseRoot, discrete_gaussian
from privkd.secure.fixedpoint import FixedPoint, content_digest, finite_or_zero
from privkd.secure.shares import RING_BITS, Form, Share, split
from privkd.secure.terms import MAX_DEVICE_NAME, RoundTerms

UPLOAD_ID_BYTES = 16
_MAGIC = b"PKDU"
_VERSION = 1
_FIXED = struct.Struct("<4sBBBBBIQ16sH")
_PUBLIC_KEY_BYTES = 32
_NONCE = bytes(12)
_TAG_BYTES = 16
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


@dataclass(frozen=True)
class Header:
    """What an envelope says on its outside.

    Attributes:
        party: which of the ``parties`` aggregators it is for.
        entries: number of ring elements.
        upload_id: names the upload, so that aggregators agree on the same bytes of the same device.
    """

    round: int
    device: PartyId
    upload_id: bytes
    party: int
    parties: int
    entries: int
    form: Form

    def pack(self) -> bytes:
        """The header's bytes."""
        name = self.device.encode()
        fixed = _FIXED.pack(
            _MAGIC,
            _VERSION,
            self.party,
            self.parties,
            RING_BITS,
            self.form,
            self.entries,
            self.round,
            self.upload_id,
            len(name),
        )
        return fixed + name

    @property
    def identifier(self) -> bytes:
        """SHA-256 of round, device and upload id: what the aggregators agree on."""
        return upload_identifier(self.round, self.device, self.upload_id)


def upload_identifier(round: int, device: PartyId, upload_id: bytes) -> bytes:
    """The 32 bytes under which all aggregators know one upload."""
    return hashlib.sha256(round.to_bytes(8, "big") + upload_id + device.encode()).digest()


def seal(header: Header, share: Share, recipient: bytes, own_key: bytes | None = None) -> bytes:
    """The envelope of ``share`` for the aggregator whose 32-byte X25519 public key is ``recipient``.

    ``own_key`` is the 32-byte private key of this envelope, fresh unless given. Given one, the envelope is
    a function of the arguments; it must then serve one header and one share only.
    """
    outside = header.pack()
    own = X25519PrivateKey.generate() if own_key is None else X25519PrivateKey.from_private_bytes(own_key)
    own_public = own.public_key().public_bytes_raw()
    secret = own.exchange(X25519PublicKey.from_public_bytes(recipient))
    key = _key(secret, own_public, recipient, outside)
    return outside + own_public + AESGCM(key).encrypt(_NONCE, share.data, outside)


def unseal(envelope: bytes, private_key: X25519PrivateKey) -> tuple[Header, Share]:
    """The header and the share of an envelope.

    Raises:
        ChannelError: it is malformed, was altered, or is sealed to another key.
    """
    header, size = _parse(envelope)
    outside, own_public = envelope[:size], envelope[size : size + _PUBLIC_KEY_BYTES]
    try:
        secret = private_key.exchange(X25519PublicKey.from_public_bytes(own_public))
        key = _key(secret, own_public, private_key.public_key().public_bytes_raw(), outside)
        data = AESGCM(key).decrypt(_NONCE, envelope[size + _PUBLIC_KEY_BYTES :], outside)
    except (InvalidTag, ValueError) as error:
        raise ChannelError(f"{header.device}: upload altered on its way, or sealed to another key") from error
    return header, Share(header.form, data)


def largest_envelope(entries: int) -> int:
    """Bytes that an envelope of a share ``[entry]`` has at most."""
    beside = _FIXED.size + MAX_DEVICE_NAME + _PUBLIC_KEY_BYTES + _TAG_BYTES
    return beside + max(4 * entries, KEY_BYTES)


def header_of(envelope: bytes) -> Header:
    """The header on an envelope's outside, not authenticated.

    Raises:
        ChannelError: it is malformed.
    """
    return _parse(envelope)[0]


def _parse(envelope: bytes) -> tuple[Header, int]:
    try:
        fields = _FIXED.unpack_from(envelope)
        magic, version, party, parties, ring, form, entries, round, upload_id, length = fields
        size = _FIXED.size + length
        header = Header(
            round, envelope[_FIXED.size : size].decode(), upload_id, party, parties, entries, Form(form)
        )
    except (struct.error, ValueError) as error:
        raise ChannelError("upload with a malformed header") from error
    if (magic, version, ring) != (_MAGIC, _VERSION, RING_BITS):
        raise ChannelError("upload of a foreign kind, version or ring")
    return header, size


def _key(secret: bytes, own_public: bytes, recipient: bytes, outside: bytes) -> bytes:
    info = b"privkd upload" + own_public + recipient + outside
    return HKDF(hashes.SHA256(), 32, None, info).derive(secret)


def packed(envelopes: Iterable[bytes]) -> bytes:
    """Many envelopes in one message, each behind its length."""
    return b"".join(part for envelope in envelopes for part in (_LENGTH.pack(len(envelope)), envelope))


def unpacked(message: bytes) -> list[bytes]:
    """From ``packed``.

    Raises:
        ChannelError: cut off.
    """
    envelopes, position = [], 0
    while position < len(message):
        head = message[position : position + _LENGTH.size]
        start = position + _LENGTH.size
        if len(head) == _LENGTH.size:
            position = start + _LENGTH.unpack(head)[0]
        if len(head) < _LENGTH.size or position > len(message):
            raise ChannelError("uploads that are cut off")
        envelopes.append(message[start:position])
    return envelopes
