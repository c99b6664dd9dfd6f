"""The aggregators' backend in plain numpy, among the threads of one process: the oracle of CrypTen's."""

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from privkd.privacy.votes import tally
from privkd.secure.normcheck import NormTest
from privkd.secure.shares import reconstruct, to_ring


class LocalGroup:
    """The table of parties that are threads of one process."""

    def __init__(self, parties: int, *, timeout: float = 60.0) -> None:
        self.parties = parties
        self._messages = [b""] * parties
        self._barrier = threading.Barrier(parties, timeout=timeout)

    def gather(self, rank: int, message: bytes) -> list[bytes]:
        """Every thread's message; waits for all of them."""
        self._messages[rank] = message
        self._barrier.wait()
        messages = list(self._messages)
        self._barrier.wait()
        return messages


class RingBackend:
    """The protocol's arithmetic in numpy."""

    def __init__(self, rank: int, group: LocalGroup) -> None:
        self._rank = rank
        self._group = group

    @property
    def rank(self) -> int:
        """Which party this is, from 0."""
        return self._rank

    @property
    def parties(self) -> int:
        """How many parties there are."""
        return self._group.parties

    def gather(self, message: bytes) -> list[bytes]:
        """Every party's message, by rank."""
        return self._group.gather(self._rank, message)

    def noisy_sum(
        self, shares: Sequence[NDArray[np.uint32]], noise: NDArray[np.int64] | None
    ) -> NDArray[np.uint32]:
        """This party's share ``[entry]`` of the sum, plus its ``noise``, modulo 2^32."""
        total: NDArray[np.uint32] = np.sum(shares, axis=0, dtype=np.uint32)
        return total if noise is None else total + to_ring(noise)

    def within(self, projected: NDArray[np.uint32], test: NormTest) -> NDArray[np.bool_]:
        """Which devices pass ``test``, worked out in the open."""
        return test.passes(self._opened(projected))

    def winners(
        self, votes: NDArray[np.uint32], scores: NDArray[np.uint32], threshold: int
    ) -> NDArray[np.bool_]:
        """This party's share ``[query, class]`` of the vote, worked out in the open: rank 0 holds it all."""
        won = tally(self._opened(votes), self._opened(scores), threshold)
        return won if self._rank == 0 else np.zeros_like(won)

    def _opened(self, share: NDArray[np.uint32]) -> NDArray[np.int64]:
        shares = [np.frombuffer(message, np.uint32) for message in self.gather(share.tobytes())]
        return reconstruct(shares).reshape(share.shape)

    def close(self) -> None:
        """Nothing stands behind it."""
