"""Where a device's Poisson samples and protective noise come from."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from privkd.noise import NoiseRoot, standard_normal


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

    def sample(self, records: int, sampling_rate: float) -> Tensor:
        """See `Randomness.sample`."""
        return self.samples(1, records, sampling_rate)[0]

    def samples(self, steps: int, records: int, sampling_rate: float) -> Tensor:
        """See `Randomness.samples`."""
        return torch.rand((steps, records), generator=self._samples) < sampling_rate

    def noise(self, size: int) -> Tensor:
        """See `Randomness.noise`; float32."""
        return torch.randn(size, generator=self._noise)


class SystemRandomness:
    """Samples and noise from a cryptographic key stream, for devices that protect people.

    ``root`` comes from the operating system; a resumed run draws the same bits from it, so that repeating
    an interrupted round shows an adversary nothing new.
    """

    def __init__(self, root: NoiseRoot, *labels: str | int) -> None:
        self._samples = root.stream("dp-sgd sample", *labels)
        self._noise = root.stream("dp-sgd noise", *labels)

    def sample(self, records: int, sampling_rate: float) -> Tensor:
        """See `Randomness.sample`; exact to 53 bits."""
        return self.samples(1, records, sampling_rate)[0]

    def samples(self, steps: int, records: int, sampling_rate: float) -> Tensor:
        """See `Randomness.samples`; exact to 53 bits."""
        uniform = (self._samples.words(steps * records) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return torch.from_numpy((uniform < sampling_rate).reshape(steps, records))

    def noise(self, size: int) -> Tensor:
        """See `Randomness.noise`; float64."""
        return torch.from_numpy(standard_normal(size, self._noise))
