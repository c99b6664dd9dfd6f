"""The device's side of a round: clip, encode, share, seal. Without torch and without CrypTen.

Each share is sealed to one aggregator, so that files, pipes and the cloud carry it blind: X25519,
HKDF-SHA256, AES-256-GCM. The header travels in clear and is authenticated.

A device has one X25519 key a run, a function of its secret and the run's name, so that an aggregator agrees
on a secret with it once a run (`SharedSecrets`) and not once an upload. Each envelope's AES key is derived
of that secret under the envelope's own salt, both public keys and the header, which names the round, the
attempt, the aggregator and when the round expires. The salt is a pseudo-random function, under the device's
secret, of the content and of all terms, so two envelopes that differ in anything have different keys, and
the nonce may be constant. One envelope's AES key tells nothing of another's. Whoever steals a device's
secret, or an aggregator's sealing key, opens all that was sealed with it.
"""

import hashlib
import os
import struct
import threading
from collections import OrderedDict
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
_VERSION = 2
_FIXED = struct.Struct("<4sBBBBBIQQ16sH")
_PUBLIC_KEY_BYTES = 32
_SALT_BYTES = 32
_MAX_KNOWN = 1 << 16
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

    The block is clipped in L2 and truncated to integers of norm at most ``terms.bound``, exactly. One with
    a value that is not finite is sent as zeros, so that no device betrays itself by failing. Where the
    devices add the noise, this one adds its share. What is drawn (shares, salts, noise) is a function of
    ``entropy``, round, device and content, so no two contents ever meet the same draw. The sealing key is
    one of ``entropy``, the run and the device alone.

    Args:
        block: the answers.
        terms: of the round.
        device: this device's name.
        entropy: 32 secret bytes, this device's root in every round of a run; fresh from the operating system
            unless given, and then every upload costs each aggregator a key exchange.

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
    sealing_key = root.subkey("sealing key", terms.run, device)
    envelopes = tuple(
        seal(
            Header(
                terms.label, terms.expires, device, upload_id, party, len(shares), terms.entries, share.form
            ),
            share,
            bytes.fromhex(key),
            sealing_key,
            own.subkey("salt", party),
        )
        for party, (share, key) in enumerate(zip(shares, terms.keys, strict=True))
    )
    return Upload(terms.label, device, upload_id, envelopes)


@dataclass(frozen=True)
class Header:
    """What an envelope says on its outside.

    Attributes:
        expires: when the round does, so that no later round of its name takes the envelope.
        party: which of the ``parties`` aggregators it is for.
        entries: number of ring elements.
        upload_id: names the upload, so that aggregators agree on the same bytes of the same device.
    """

    round: int
    expires: int
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
            self.expires,
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


class SharedSecrets:
    """What an aggregator's key has agreed on with devices' keys: one key exchange a device and run.

    Keeps one secret a device, of those heard of last; only of devices that proved to have their key by an
    envelope that opens, so nobody pushes another's out by naming it. Safe to call from many threads.
    """

    def __init__(self, private_key: X25519PrivateKey, most: int = _MAX_KNOWN) -> None:
        """None yet; at ``most`` so many are kept."""
        self._private_key = private_key
        self.public = private_key.public_key().public_bytes_raw()
        self._most = most
        self._known: OrderedDict[PartyId, tuple[bytes, bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, device: PartyId, public: bytes) -> bytes:
        """The secret with ``device``'s key ``public``. Raises ``ValueError`` if that is no key."""
        with self._lock:
            known = self._known.get(device)
        if known is not None and known[0] == public:
            return known[1]
        return self._private_key.exchange(X25519PublicKey.from_public_bytes(public))

    def keep(self, device: PartyId, public: bytes, secret: bytes) -> None:
        """Remember a secret under which an envelope of ``device`` opened."""
        with self._lock:
            self._known[device] = public, secret
            self._known.move_to_end(device)
            if len(self._known) > self._most:
                self._known.popitem(last=False)


def seal(
    header: Header,
    share: Share,
    recipient: bytes,
    own_key: bytes | None = None,
    salt: bytes | None = None,
) -> bytes:
    """The envelope of ``share`` for the aggregator whose 32-byte X25519 public key is ``recipient``.

    ``own_key`` is the sender's 32-byte private key, and ``salt`` the envelope's 32 bytes; both fresh unless
    given. Under one key no salt may serve two headers or shares. Given both, the envelope is a function of
    the arguments.
    """
    outside = header.pack()
    own = X25519PrivateKey.generate() if own_key is None else X25519PrivateKey.from_private_bytes(own_key)
    salt = os.urandom(_SALT_BYTES) if salt is None else salt
    own_public = own.public_key().public_bytes_raw()
    secret = own.exchange(X25519PublicKey.from_public_bytes(recipient))
    key = _key(secret, salt, own_public, recipient, outside)
    return outside + own_public + salt + AESGCM(key).encrypt(_NONCE, share.data, outside)


def unseal(envelope: bytes, recipient: X25519PrivateKey | SharedSecrets) -> tuple[Header, Share]:
    """The header and the share of an envelope; ``recipient``: the aggregator's key, and what it knows.

    Raises:
        ChannelError: it is malformed, was altered, or is sealed to another key.
    """
    secrets = recipient if isinstance(recipient, SharedSecrets) else SharedSecrets(recipient)
    header, size = _parse(envelope)
    outside, salted = envelope[:size], size + _PUBLIC_KEY_BYTES
    own_public, salt = envelope[size:salted], envelope[salted : salted + _SALT_BYTES]
    try:
        secret = secrets.of(header.device, own_public)
        key = _key(secret, salt, own_public, secrets.public, outside)
        data = AESGCM(key).decrypt(_NONCE, memoryview(envelope)[salted + _SALT_BYTES :], outside)
    except (InvalidTag, ValueError) as error:
        raise ChannelError(f"{header.device}: upload altered on its way, or sealed to another key") from error
    secrets.keep(header.device, own_public, secret)
    return header, Share(header.form, data)


def largest_envelope(entries: int) -> int:
    """Bytes that an envelope of a share ``[entry]`` has at most."""
    beside = _FIXED.size + MAX_DEVICE_NAME + _PUBLIC_KEY_BYTES + _SALT_BYTES + _TAG_BYTES
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
        magic, version, party, parties, ring, form, entries, round, expires, upload_id, length = fields
        if magic == _MAGIC and version != _VERSION:
            raise ChannelError(f"upload of version {version}: this party opens version {_VERSION} alone")
        size = _FIXED.size + length
        name = envelope[_FIXED.size : size].decode()
        header = Header(round, expires, name, upload_id, party, parties, entries, Form(form))
    except (struct.error, ValueError) as error:
        raise ChannelError("upload with a malformed header") from error
    if (magic, ring) != (_MAGIC, RING_BITS):
        raise ChannelError("upload of a foreign kind or ring")
    return header, size


def _key(secret: bytes, salt: bytes, own_public: bytes, recipient: bytes, outside: bytes) -> bytes:
    info = b"privkd upload 2" + own_public + recipient + outside
    return HKDF(hashes.SHA256(), 32, salt, info).derive(secret)


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
