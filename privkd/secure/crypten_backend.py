"""CrypTen behind the ``Backend`` interface. The only file that imports crypten.

What is used of CrypTen: its communicator over gloo, and ``MPCTensor.from_shares`` with sums. What is
deliberately not: ``reveal(dst)`` and ``get_plain_text(dst)``, which on gloo show parts of the plaintext
to every party; its fixed-point ``decode``, which is wrong for large negatives; its generators, of which
32 bits of seed are effective; the provider that shows every triple to the first party. Integers enter with
``precision=0`` and leave as raw shares. The sum needs no randomness of CrypTen's at all. The norm check and
the vote do, and have a third party deal it from cryptographic generators: AES-256-CTR streams. Two parties
that share one derive it from their pinned X25519 keys, so that nothing secret crosses the wire; a party's own
comes from the operating system.
"""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import math
import os
import secrets
import socket
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray
from torch import Tensor

from privkd.privacy.noise import KEY_BYTES, Keystream
from privkd.secure.normcheck import NormTest
from privkd.secure.shares import RING_BITS as _RING_BITS

MOVED = "torch.onnx._internal.registration"
MOVED_TO = "torch.onnx._internal.torchscript_exporter.registration"
_STORE_TIMEOUT = timedelta(minutes=10)
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
    from crypten.mpc.primitives import ArithmeticSharedTensor, BinarySharedTensor, arithmetic, beaver, binary
    from crypten.mpc.primitives.converters import convert
    from crypten.mpc.provider import tfp_provider, ttp_provider
    from crypten.mpc.provider.ttp_provider import TTPClient, TTPServer
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


class CryptenBackend:
    """One party of a CrypTen group, by default on this machine's loopback interface."""

    def __init__(
        self,
        rank: int,
        parties: int,
        *,
        port: int,
        listener: socket.socket | None = None,
        host: str = "127.0.0.1",
        interface: str = "",
        keys: PartyKeys | None = None,
    ) -> None:
        """Join the group; blocks until all ``parties`` have.

        Args:
            rank: which party this is, from 0.
            parties: how many there are.
            port: where the group's rendezvous store listens.
            listener: the socket bound to ``port``, at the one party that serves the store.
            host: where the store listens; its link is neither encrypted nor authenticated.
            interface: of the parties' own link; the loopback interface unless named.
            keys: given them, a third party of rank ``parties`` deals the correlated randomness of products,
                and all randomness comes from cryptographic generators.
        """
        self._rank = rank
        self._parties = parties
        self._store: object | None = None if listener is None else _serve_store(host, port, listener)
        set_group(rank, parties, host=host, port=port, interface=interface)
        if keys is None:
            crypten.init()
        else:
            crypten.cfg.mpc.provider = "TTP"
            crypten.init()
            _use_generators(keys, parties)

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
        communicator = crypten.communicator.get()
        sizes = [int(size) for size in communicator.all_gather(torch.tensor([len(message)]))]
        padded = message.ljust(-(-max(sizes) // 8) * 8, b"\0")
        if not padded:
            return [b""] * self._parties
        words = torch.from_numpy(np.frombuffer(padded, np.int64).copy())
        gathered = communicator.all_gather(words)
        return [row.numpy().tobytes()[:size] for row, size in zip(gathered, sizes, strict=True)]

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
        if crypten.is_initialized():
            crypten.uninit()
        self._store = None


class ThirdParty:
    """The party that deals correlated randomness and sees no shares. It must collude with no aggregator."""

    def __init__(self, parties: int, *, port: int, host: str, interface: str, keys: PartyKeys) -> None:
        """Join the group and serve until it ends; returns then."""
        set_group(parties, parties, host=host, port=port, interface=interface)
        crypten.cfg.mpc.provider = "TTP"
        _patch_functions()
        generators = [keys.shared_with(rank, "triples") for rank in range(parties)]
        stock = TTPServer._setup_generators

        def setup(server: Any) -> None:
            stock(server)  # exchanges the seeds that are then not used
            server.generators = generators

        TTPServer._setup_generators = setup
        TTPServer()


def _use_generators(keys: PartyKeys, parties: int) -> None:
    """Replace every generator of this process; to be called right after CrypTen's own were set up."""
    _patch_functions()
    cpu, rank = torch.device("cpu"), keys.rank
    after, before = (rank + 1) % parties, (rank - 1) % parties
    # The one between this party and the next is named by the first of the two.
    crypten.generators["next"][cpu] = keys.shared_with(after, f"zero {rank}")
    crypten.generators["prev"][cpu] = keys.shared_with(before, f"zero {before}")
    crypten.generators["local"][cpu] = CryptoGenerator()
    del crypten.generators["global"][cpu]
    TTPClient.get().generator = keys.shared_with(parties, "triples")


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


_DRAWS = {"generate_random_ring_element": _draw, "generate_kbit_random_tensor": _draw_bits}


def _tensor_of(share: Tensor) -> Any:
    return ArithmeticSharedTensor.from_shares(share, precision=0)


def _from_shares(share: NDArray[np.int64]) -> "crypten.mpc.MPCTensor":
    return crypten.mpc.MPCTensor.from_shares(torch.from_numpy(share), precision=0)


def set_group(rank: int, parties: int, *, host: str, port: int, interface: str) -> None:
    """Tell CrypTen, by way of the environment, which group to join."""
    rendezvous = f"tcp://{host}:{port}"
    os.environ |= {
        "DISTRIBUTED_BACKEND": "gloo",
        "RENDEZVOUS": rendezvous,
        "WORLD_SIZE": str(parties),
        "RANK": str(rank),
        # Every party is a client of the store, which by itself would listen on all interfaces. From 2.14 on
        # torch takes that for granted only where the store's address is named here as it reads it.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": urlsplit(rendezvous).hostname or host,
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": interface or _loopback_interface(),
    }


def _serve_store(host: str, port: int, listener: socket.socket) -> object:
    """The rendezvous store on a socket that is already bound, so neither port nor interface is in doubt."""
    return torch.distributed.TCPStore(  # type: ignore[attr-defined]
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=_STORE_TIMEOUT,
        master_listen_fd=listener.detach(),
    )


def _loopback_interface() -> str:
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    return names[0] if names else "lo"
