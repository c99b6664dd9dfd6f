"""CrypTen behind the ``Backend`` interface. The only file that imports crypten.

What is used of CrypTen: ``MPCTensor.from_shares`` with sums, comparisons and conversions, over a
communicator of ours, whose links are authenticated and encrypted (``privkd.secure.peers``). What is
deliberately not: its own communicator, as gloo lets in whoever knows the port, in clear; ``reveal(dst)``
and ``get_plain_text(dst)``, which on gloo show parts of the plaintext to every party; its fixed-point
``decode``, which is wrong for large negatives; its generators, of which 32 bits of seed are effective; the
provider that shows every triple to the first party. Integers enter with ``precision=0`` and leave as raw
shares. The sum needs no randomness of CrypTen's at all. The norm check and the vote do, and have a third
party deal it from cryptographic generators: AES-256-CTR streams. Two parties that share one derive it from
the secret of their link, so that it does not cross the wire and is another in every session; a party's own
comes from the operating system.
"""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import json
import math
import secrets
import socket
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ReduceOp

from privkd.privacy.noise import KEY_BYTES, Keystream
from privkd.secure.normcheck import NormTest
from privkd.secure.peers import PartyKeys, PeerError, Peers
from privkd.secure.shares import RING_BITS as _RING_BITS

MOVED = "torch.onnx._internal.registration"
MOVED_TO = "torch.onnx._internal.torchscript_exporter.registration"
_CHUNK = 64
_QUERIES = 1024


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """Within, ``import crypten`` works where its ONNX converter, unused here, would break it.

    torch 2.9 moved a module that it imports, and the ``onnx`` package is no dependency of ours.
    """
    stand_ins: dict[str, types.ModuleType] = {}
    if importlib.util.find_spec(MOVED) is None:
        stand_ins[MOVED] = importlib.import_module(MOVED_TO)
    if importlib.util.find_spec("onnx") is None:
        for name in ("onnx", "onnx.numpy_helper"):
            stand_ins[name] = types.ModuleType(name)
            stand_ins[name].__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=name == "onnx")
        stand_ins["onnx"].numpy_helper = stand_ins["onnx.numpy_helper"]  # type: ignore[attr-defined]
    sys.modules |= stand_ins
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


with importable():
    import crypten
    import crypten.communicator
    from crypten.common import rng
    from crypten.communicator import Communicator
    from crypten.mpc.primitives import ArithmeticSharedTensor, BinarySharedTensor, arithmetic, beaver, binary
    from crypten.mpc.primitives.converters import convert
    from crypten.mpc.provider import tfp_provider, ttp_provider
    from crypten.mpc.provider.ttp_provider import TTPServer
    from crypten.mpc.ptype import ptype as Ptype

_DRAWING = (rng, arithmetic, binary, tfp_provider, ttp_provider)


class CryptoGenerator:
    """What CrypTen takes for a generator. ``device`` is where its numbers are wanted."""

    device = "cpu"

    def __init__(self, key: bytes | None = None) -> None:
        """Keyed by ``key``, or by the operating system."""
        self._stream = Keystream(secrets.token_bytes(KEY_BYTES) if key is None else key)

    def words(self, count: int) -> NDArray[np.int64]:
        """``count`` uniform elements of Z_2^64, in an array that may be written to."""
        return self._stream.words(count).view(np.int64).copy()


class _SealedCommunicator(Communicator):
    """What CrypTen's primitives ask of their communicator, over ``peers``: this, and nothing else of it."""

    BYTES_PER_ELEMENT = 8
    instance: "_SealedCommunicator | None" = None

    def __init__(self, peers: Peers, parties: int) -> None:
        self.peers = peers
        self.parties = parties
        self.reset_communication_stats()

    @classmethod
    def is_initialized(cls) -> bool:
        return cls.instance is not None

    @classmethod
    def get(cls) -> "_SealedCommunicator | None":
        return cls.instance

    def get_rank(self) -> int:
        return self.peers.rank

    def get_world_size(self) -> int:
        return self.parties

    def all_reduce(self, input: Any, op: Any = ReduceOp.SUM, batched: bool = False) -> Any:
        """All parties' tensors combined; where ``batched``, of each of a list in one exchange."""
        tensors = list(input) if batched else [input]
        own = np.concatenate([tensor.contiguous().reshape(-1).numpy() for tensor in tensors])
        found = [
            np.frombuffer(message, np.int64) for message in self.peers.exchange(own.tobytes(), self.parties)
        ]
        combine = np.bitwise_xor if op == ReduceOp.BXOR else np.add
        total = torch.from_numpy(combine.reduce(found))
        parts = total.split([tensor.numel() for tensor in tensors])
        reduced = [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
        return reduced if batched else reduced[0]


class _Dealer:
    """What CrypTen's provider takes for its client of the third party."""

    instance: "_Dealer"

    def __init__(self, peers: Peers, parties: int) -> None:
        self._link = peers.link(parties)
        self._generator = CryptoGenerator(self._link.stream_key("triples"))

    @classmethod
    def get(cls) -> "_Dealer":
        return cls.instance

    def get_generator(self, device: Any = None) -> CryptoGenerator:
        return self._generator

    def ttp_request(self, function: str, device: Any, *arguments: Any) -> Tensor:
        """Rank 0's share of what the third party deals; the others draw theirs."""
        self._link.send(json.dumps([function, *arguments]).encode())
        shape = json.loads(self._link.receive())
        share = np.frombuffer(self._link.receive(), np.int64).copy()
        return torch.from_numpy(share).reshape(shape)


class CryptenBackend:
    """One party of a CrypTen group."""

    def __init__(
        self, keys: PartyKeys, parties: int, *, port: int, host: str, listener: socket.socket | None = None
    ) -> None:
        """Join the group; blocks until all have.

        Args:
            keys: this party's. Where they name one more than ``parties``, that one is the third party,
                which deals the correlated randomness of products.
            parties: how many aggregators there are.
            port: where rank 0 waits for the others.
            host: rank 0's address.
            listener: at rank 0, the socket bound to ``port``.
        """
        self._rank = keys.rank
        self._parties = parties
        self._peers = Peers.meet(keys, host=host, port=port, listener=listener)
        _SealedCommunicator.instance = _SealedCommunicator(self._peers, parties)
        crypten.communicator.DistributedCommunicator = _SealedCommunicator
        _use_generators(self._peers, parties)
        if len(keys.members) > parties:
            crypten.cfg.mpc.provider = "TTP"
            _Dealer.instance = _Dealer(self._peers, parties)
            ttp_provider.TTPClient = _Dealer

    @property
    def rank(self) -> int:
        """Which party this is, from 0."""
        return self._rank

    @property
    def parties(self) -> int:
        """How many parties there are."""
        return self._parties

    def gather(self, message: bytes) -> list[bytes]:
        """Every party's message, by rank."""
        return self._peers.exchange(message, self._parties)

    def noisy_sum(
        self, shares: Sequence[NDArray[np.uint32]], noise: NDArray[np.int64] | None
    ) -> NDArray[np.uint32]:
        """This party's share ``[entry]`` of the sum, plus its ``noise``, modulo 2^32.

        CrypTen's ring is Z_2^64. As 2^32 divides 2^64, its low half is the sum in ours.
        """
        total = _from_shares(np.zeros(len(shares[0]), np.int64) if noise is None else noise)
        for start in range(0, len(shares), _CHUNK):
            stacked = np.stack(shares[start : start + _CHUNK]).astype(np.int64)
            total = total + _from_shares(stacked).sum(0)
        elements: NDArray[np.int64] = total.share.numpy()
        return elements.astype(np.uint32)

    def within(self, projected: NDArray[np.uint32], test: NormTest) -> NDArray[np.bool_]:
        """Which devices pass ``test``: ``[device]``, known to all parties, which learn nothing else.

        Args:
            projected: this party's shares modulo 2^32 of the projections, ``[device, projection]``.
            test: what to hold them to.
        """
        flags = [
            self._passes(chunk, test) for chunk in np.split(projected, range(_CHUNK, len(projected), _CHUNK))
        ]
        return np.concatenate(flags)

    def _passes(self, projected: NDArray[np.uint32], test: NormTest) -> NDArray[np.bool_]:
        """In the upper half of Z_2^64 shares modulo 2^32 are shares. As bits it comes down exactly."""
        raised = projected.astype(np.int64)
        if self._rank == 0:
            raised += 1 << test.range_bits
        bits = convert(_tensor_of(torch.from_numpy(raised << _RING_BITS)), Ptype.binary)
        # Arithmetic from here on; CrypTen's own products divide by their scale, which is not exact.
        bits = BinarySharedTensor.stack([bits >> (_RING_BITS + i) for i in range(_RING_BITS)]) & 1
        share = beaver.B2A_single_bit(bits).share
        low = test.range_bits + 1
        weights = 1 << torch.arange(low).reshape(-1, 1, 1)
        value = (share[:low] * weights).sum(0)
        if self._rank == 0:
            value -= 1 << test.range_bits
        squares = beaver.square(_tensor_of(value)).share.sum(1)
        excess = squares + share[low:].sum((0, 2)) * (test.threshold + 1)
        room = -excess
        if self._rank == 0:
            room += test.threshold
        negative = (convert(_tensor_of(room), Ptype.binary) >> 63) & 1
        failed: NDArray[np.int64] = negative.reveal().numpy()
        return failed == 0

    def winners(
        self, votes: NDArray[np.uint32], scores: NDArray[np.uint32], threshold: int
    ) -> NDArray[np.bool_]:
        """This party's share ``[query, class]`` of the vote; see ``Backend.winners``.

        A class wins that is behind no other when all pairs are compared, where some class reaches the
        threshold. The maximum itself is never needed, so all comparisons are one batch. Their signs are then
        packed, 64 queries to a word, for the few ANDs that are left.
        """
        parts = [
            self._winners(votes[i : i + _QUERIES], scores[i : i + _QUERIES], threshold)
            for i in range(0, len(votes), _QUERIES)
        ]
        return np.concatenate(parts)

    def _winners(
        self, votes: NDArray[np.uint32], scores: NDArray[np.uint32], threshold: int
    ) -> NDArray[np.bool_]:
        queries, classes = votes.shape
        first, second = np.triu_indices(classes, 1)
        reach = scores - np.uint32(threshold) if self._rank == 0 else scores
        below = self._negative(np.concatenate([(votes[:, first] - votes[:, second]).T, reach.T]))
        behind, short = below[: len(first)], below[len(first) :]
        # Of two classes that draw, the lower one counts as ahead.
        ahead = np.empty((classes, classes, below.shape[1]), np.int64)
        ahead[first, second], ahead[second, first] = self._not(behind), behind
        rivals = ahead[~np.eye(classes, dtype=bool)].reshape(classes, classes - 1, -1)
        unbeaten = self._all(rivals.transpose(1, 0, 2))
        consensus = self._not(self._all(short[:, None])).repeat(classes, axis=0)
        won = self._all(np.stack([unbeaten, consensus]))
        return np.unpackbits(won.view(np.uint8), axis=1)[:, :queries].T.astype(np.bool_)

    def _negative(self, share: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Which entries of ``[row, query]`` are negative: shared bits, packed to words ``[row, word]``."""
        raised = torch.from_numpy(share.astype(np.int64) << _RING_BITS)
        bits = convert(_tensor_of(raised), Ptype.binary).share.numpy() < 0
        packed = np.packbits(bits, axis=1)
        return np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8))).view(np.int64)

    def _not(self, words: NDArray[np.int64]) -> NDArray[np.int64]:
        return ~words if self._rank == 0 else words

    @staticmethod
    def _all(words: NDArray[np.int64]) -> NDArray[np.int64]:
        """The AND of shared words ``[operand, ...]`` over the operands, in a tree."""
        left = words
        while len(left) > 1:
            half = len(left) // 2
            pair = [BinarySharedTensor.from_shares(torch.from_numpy(part.copy())) for part in
                    (left[:half], left[half : 2 * half])]  # fmt: skip
            left = np.concatenate([beaver.AND(*pair).share.numpy(), left[2 * half :]])
        joined: NDArray[np.int64] = left[0]
        return joined

    def close(self) -> None:
        """Leave the group. Idempotent."""
        self._peers.close()
        _SealedCommunicator.instance = None


class ThirdParty(TTPServer):
    """The party that deals correlated randomness and sees no shares. It must collude with no aggregator."""

    def __init__(self, keys: PartyKeys, parties: int, *, port: int, host: str) -> None:
        """Join the group and serve until it ends; raises `PeerError` then."""
        peers = Peers.meet(keys, host=host, port=port)
        _patch_functions()
        self.device = "cpu"
        self.generators = [CryptoGenerator(peers.link(rank).stream_key("triples")) for rank in range(parties)]
        asking = peers.link(0)
        while True:
            function, *arguments = json.loads(asking.receive())
            if function not in ttp_provider.TTP_FUNCTIONS:
                raise PeerError(f"party 0 asked the third party for {function!r}")
            dealt = getattr(self, function)(*arguments)
            asking.send(json.dumps(list(dealt.shape)).encode())
            asking.send(dealt.contiguous().numpy().tobytes())


def _use_generators(peers: Peers, parties: int) -> None:
    """Give CrypTen cryptographic generators, its own and one with either neighbour."""
    _patch_functions()
    cpu, rank = torch.device("cpu"), peers.rank
    after, before = (rank + 1) % parties, (rank - 1) % parties
    # The one between this party and the next is named by the first of the two.
    following, preceding = (
        CryptoGenerator(peers.link(other).stream_key(f"zero {first}"))
        for other, first in ((after, rank), (before, before))
    )
    crypten.generators["next"][cpu], crypten.generators["prev"][cpu] = following, preceding
    crypten.generators["local"][cpu] = CryptoGenerator()


def _patch_functions() -> None:
    """Have CrypTen draw from cryptographic generators, and from nothing else."""
    for module in _DRAWING:
        for name, draw in (
            ("generate_random_ring_element", _draw),
            ("generate_kbit_random_tensor", _draw_bits),
        ):
            if hasattr(module, name):
                setattr(module, name, draw)


def _draw(size: Any, ring_size: int = 2**64, generator: Any = None, **_: Any) -> Tensor:
    chosen = crypten.generators["local"][torch.device("cpu")] if generator is None else generator
    if not isinstance(chosen, CryptoGenerator) or ring_size != 2**64:
        raise TypeError("randomness asked of a generator that is not cryptographic")
    shape = (size,) if isinstance(size, int) else tuple(size)
    return torch.from_numpy(chosen.words(math.prod(shape))).reshape(shape)


def _draw_bits(size: Any, bitlength: int | None = None, generator: Any = None, **_: Any) -> Tensor:
    words = _draw(size, generator=generator)
    return words if bitlength in (None, 64) else words & ((1 << bitlength) - 1)


def _tensor_of(share: Tensor) -> Any:
    return ArithmeticSharedTensor.from_shares(share, precision=0)


def _from_shares(share: NDArray[np.int64]) -> "crypten.mpc.MPCTensor":
    return crypten.mpc.MPCTensor.from_shares(torch.from_numpy(share), precision=0)
