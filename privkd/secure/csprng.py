"""Cryptographic generators for CrypTen, keyed by the parties' own keys.

CrypTen masks products with torch's generators, of whose seeds 32 bits are effective. In their place stand
AES-256-CTR streams. Two parties that share one derive it from their pinned X25519 keys, so that nothing
secret crosses the wire; a party's own comes from the operating system.
"""

import secrets
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from privkd.privacy.noise import KEY_BYTES, Keystream


class CryptoGenerator:
    """What CrypTen takes for a generator. ``device`` is where its numbers are wanted."""

    device = "cpu"

    def __init__(self, key: bytes | None = None) -> None:
        """Keyed by ``key``, or by the operating system."""
        self._stream = Keystream(secrets.token_bytes(KEY_BYTES) if key is None else key)

    def words(self, count: int) -> NDArray[np.int64]:
        """``count`` uniform elements of Z_2^64, in an array that may be written to."""
        return self._stream.words(count).view(np.int64).copy()


@dataclass(frozen=True)
class PartyKeys:
    """One party's own key, all members' public ones by rank, and the session that they serve."""

    rank: int
    own: X25519PrivateKey
    members: tuple[bytes, ...]
    session: str

    def shared_with(self, other: int, label: str) -> CryptoGenerator:
        """The stream that this party and ``other`` share for one use, named by ``label``."""
        secret = self.own.exchange(X25519PublicKey.from_public_bytes(self.members[other]))
        low, high = sorted((self.rank, other))
        info = f"privkd crypten|{self.session}|{low}|{high}|{label}".encode()
        return CryptoGenerator(HKDF(hashes.SHA256(), KEY_BYTES, None, info).derive(secret))
