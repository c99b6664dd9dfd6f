"""Where a device's Poisson samples, protective noise and its layers' own draws come from."""

import hashlib
import hmac
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from privkd.privacy.noise import Keystream, NoiseRoot, standard_normal

Uniforms = Callable[[int], Tensor]
"""The next so many numbers of a stream, uniform in [0, 1), float64 ``[number]``."""


class Randomness(Protocol):
    """Source of the randomness of DP-SGD on one device in one round."""

    def sample(self, records: int, sampling_rate: float) -> Tensor:
        """A fresh Poisson sample: bool ``[record]``, each true with probability ``sampling_rate``."""
        ...

    def samples(self, steps: int, records: int, sampling_rate: float) -> Tensor:
        """The samples of the next ``steps`` steps at once, bool ``[step, record]``: those that `sample` would
        draw one after another."""
        ...

    def noise(self, size: int) -> Tensor:
        """``size`` fresh standard normal draws ``[size]``, in the order of the parameters.

        To be scaled and added in float64, and the sum rounded once: added in float32, the low bits of the
        result can betray what was added to (Mironov 2012, "On significance of the least significant bits for
        differential privacy", section 4).
        """
        ...

    def layers(self, step: int, records: Sequence[bytes]) -> list[Uniforms]:
        """What layers such as dropout draw for each of ``records`` in one step.

        Each record's stream is a function of the source, the step and the record itself, so that another
        record that comes or goes shifts nobody's draws: the clipped sum then changes by one clipped gradient,
        even for an adversary who knows every draw. ``records`` are digests of their contents; equal ones
        share a stream, which changes nothing in that.
        """
        ...


def derive_seed(seed: int, *labels: str | int) -> int:
    """A seed for one purpose: a 63-bit hash of ``seed`` and ``labels``; no two purposes share a stream."""
    text = "\0".join([str(seed), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def seeded_generator(seed: int, *labels: str | int) -> torch.Generator:
    """A CPU generator for one purpose of a reproducible run. Never for noise that protects people."""
    return torch.Generator().manual_seed(derive_seed(seed, *labels))


@contextmanager
def seeded_layers(seed: int, *labels: str | int) -> Iterator[None]:
    """Seed torch's global generators, from which layers such as dropout draw, and put them back after."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "layers", *labels))
        yield


class SeededRandomness:
    """Reproducible samples and noise for simulation, by torch's generator. Protects nobody in deployment."""

    def __init__(self, seed: int, *labels: str | int) -> None:
        self._samples = seeded_generator(seed, "sample", *labels)
        self._noise = seeded_generator(seed, "noise", *labels)
        self._layers = derive_seed(seed, "layers", *labels).to_bytes(8, "big")

    def sample(self, records: int, sampling_rate: float) -> Tensor:
        """See `Randomness.sample`."""
        return self.samples(1, records, sampling_rate)[0]

    def samples(self, steps: int, records: int, sampling_rate: float) -> Tensor:
        """See `Randomness.samples`."""
        return torch.rand((steps, records), generator=self._samples) < sampling_rate

    def noise(self, size: int) -> Tensor:
        """See `Randomness.noise`; float32."""
        return torch.randn(size, generator=self._noise)

    def layers(self, step: int, records: Sequence[bytes]) -> list[Uniforms]:
        """See `Randomness.layers`."""
        return [_seeded_uniforms(_record_key(self._layers, step, record)) for record in records]


class SystemRandomness:
    """Samples and noise from a cryptographic key stream, for devices that protect people.

    ``root`` comes from the operating system; a resumed run draws the same bits from it, so that repeating
    an interrupted round shows an adversary nothing new.
    """

    def __init__(self, root: NoiseRoot, *labels: str | int) -> None:
        self._samples = root.stream("dp-sgd sample", *labels)
        self._noise = root.stream("dp-sgd noise", *labels)
        self._layers = root.subkey("dp-sgd layers", *labels)

    def sample(self, records: int, sampling_rate: float) -> Tensor:
        """See `Randomness.sample`; exact to 53 bits."""
        return self.samples(1, records, sampling_rate)[0]

    def samples(self, steps: int, records: int, sampling_rate: float) -> Tensor:
        """See `Randomness.samples`; exact to 53 bits."""
        uniform = _uniform(self._samples, steps * records)
        return (uniform < sampling_rate).reshape(steps, records)

    def noise(self, size: int) -> Tensor:
        """See `Randomness.noise`; float64."""
        return torch.from_numpy(standard_normal(size, self._noise))

    def layers(self, step: int, records: Sequence[bytes]) -> list[Uniforms]:
        """See `Randomness.layers`; exact to 53 bits."""
        streams = [Keystream(_record_key(self._layers, step, record)) for record in records]
        return [lambda count, stream=stream: _uniform(stream, count) for stream in streams]  # type: ignore[misc]


def _record_key(key: bytes, step: int, record: bytes) -> bytes:
    """The 32-byte key of what layers draw for one record in one step."""
    return hmac.digest(key, step.to_bytes(8, "big") + record, "sha256")


def _seeded_uniforms(key: bytes) -> Uniforms:
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], np.uint64)))
    return lambda count: torch.from_numpy(generator.random(count))


def _uniform(stream: Keystream, count: int) -> Tensor:
    return torch.from_numpy((stream.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53)
