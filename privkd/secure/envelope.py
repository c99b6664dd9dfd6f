"""A share sealed to one aggregator, so that spools, pipes and the cloud carry it blind. Device side.

X25519 with a fresh key for each envelope, HKDF-SHA256, AES-256-GCM. The header travels in clear and is
authenticated. The key serves one envelope only, so the nonce is constant.
"""

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privkd.errors import ChannelError
from privkd.privacy.events import PartyId
from privkd.secure.shares import RING_BITS, Form, Share

UPLOAD_ID_BYTES = 16
_MAGIC = b"PKDU"
_VERSION = 1
_FIXED = struct.Struct("<4sBBBBBIQ16sH")
_PUBLIC_KEY_BYTES = 32
_NONCE = bytes(12)
_LENGTH = struct.Struct("<I")


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
