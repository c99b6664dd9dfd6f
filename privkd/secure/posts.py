"""What each aggregator posts to the cloud, and what the posts come to.

A sum: the agreed set's digest, then this party's noisy share ``[entry]`` in Z_2^32. A vote: the digest, then
the session in which it was made, then a share of one bit an entry. Shares of a sum are functions of the set
and may be made apart; those of a vote fit together only if one session made them.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from privkd.errors import ChannelError
from privkd.privacy.noise import NoiseRoot, discrete_gaussian
from privkd.secure.shares import reconstruct
from privkd.secure.terms import RoundTerms

_DIGEST = 32
_WORD = 4


def service_noise(
    root: NoiseRoot, purpose: str, round: int, digest: bytes, variance: Fraction | None, count: int
) -> NDArray[np.int64] | None:
    """What the party whose key is ``root`` adds for one ``purpose`` to a round's agreed set, ``[count]``.

    A function of its arguments: a re-run over the same set repeats it. ``None`` without a ``variance``.
    """
    if variance is None:
        return None
    return discrete_gaussian(variance, count, root.stream(purpose, round, digest))


def sum_post(digest: bytes, share: NDArray[np.uint32]) -> bytes:
    """A post of a ``share`` ``[entry]`` of a sum."""
    return digest + share.astype("<u4", copy=False).tobytes()


def vote_post(digest: bytes, session: str, share: NDArray[np.bool_]) -> bytes:
    """A post of a ``share`` of a vote, bits of any shape."""
    return digest + session_mark(session) + np.packbits(share).tobytes()


def session_mark(session: str) -> bytes:
    """The 32 bytes that stand for a session."""
    return hashlib.sha256(session.encode()).digest()


def agreed_in(post: bytes) -> str:
    """The digest of the set that a post is over, in hexadecimal."""
    return post[:_DIGEST].hex()


def made_in(post: bytes) -> str:
    """The mark of the session that made the post of a vote, in hexadecimal."""
    return post[_DIGEST : 2 * _DIGEST].hex()


def combine(terms: RoundTerms, posts: Sequence[bytes]) -> NDArray[np.int64]:
    """What the aggregators' posts come to: the noisy sum ``[entry]``, or the vote's one-hot rows ``[entry]``.

    A row of a vote is zero where there was no consensus.

    Raises:
        ChannelError: they are not of one set, one session, or the round's size.
    """
    head = _DIGEST if terms.votes is None else 2 * _DIGEST
    size = _WORD * terms.entries if terms.votes is None else -(-terms.entries // 8)
    if len({post[:head] for post in posts}) != 1 or any(len(post) != head + size for post in posts):
        raise ChannelError("the aggregators' shares are not of one set; nothing was released")
    if terms.votes is None:
        return reconstruct([np.frombuffer(post[head:], "<u4").astype(np.uint32) for post in posts])
    shares = np.stack([np.frombuffer(post[head:], np.uint8) for post in posts])
    bits = np.unpackbits(np.bitwise_xor.reduce(shares, axis=0))
    return bits[: terms.entries].astype(np.int64)
