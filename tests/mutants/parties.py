"""Faults in the aggregators' own processes, put there as each interpreter starts: see `startup`.

Nothing is imported here that a party does not need, as that would delay each of them.
"""

from collections.abc import Callable, Collection
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

import privkd.privacy.noise
from privkd.privacy.noise import Keystream, NoiseRoot

Put = Callable[[object, str, object], None]
Integers = NDArray[np.int64]

VARIABLE = "PRIVKD_MUTANT"
"""The environment variable that names the mutant."""
AGGREGATORS = (0, 1)
_OWN = "service"
"""The first label of the parties' streams."""


def quieter(share: float) -> Callable[[int | Fraction, int, Keystream], Integers]:
    """The sampler with ``share`` of the standard deviation that is asked for."""
    drawn = privkd.privacy.noise.discrete_gaussian

    def sampler(sigma2: int | Fraction, size: int, stream: Keystream) -> Integers:
        if not share:
            return np.zeros(size, np.int64)
        return drawn(Fraction(sigma2) * Fraction(share) ** 2, size, stream)

    return sampler


def forget_labels(kept: int) -> Callable[[Put], None]:
    """Streams of the parties' noise are known by their first ``kept`` labels: purpose, round, agreed set."""

    def put_it(put: Put) -> None:
        whole = NoiseRoot.stream

        def stream(self: NoiseRoot, *labels: Any) -> Keystream:
            return whole(self, *(labels[:kept] if labels[0] == _OWN else labels))

        put(NoiseRoot, "stream", stream)

    return put_it


def _adding(share: float, ranks: Collection[int]) -> Callable[[Put], None]:
    """The aggregators of these ``ranks`` add ``share`` of their noise."""

    def put_it(put: Put) -> None:
        from privkd.secure.crypten_backend import CryptenBackend

        summed = CryptenBackend.noisy_sum

        def noisy_sum(self: CryptenBackend, shares: Any, noise: Integers | None) -> NDArray[np.uint32]:
            if noise is not None and self.rank in ranks:
                noise = np.rint(share * noise).astype(np.int64)
            return summed(self, shares, noise)

        put(CryptenBackend, "noisy_sum", noisy_sum)

    return put_it


FAULTS: dict[str, Callable[[Put], None]] = {
    "no noise at one aggregator": _adding(0.0, AGGREGATORS[:1]),
    "half the noise at one aggregator": _adding(0.5, AGGREGATORS[:1]),
    "no noise at a colluding aggregator": _adding(0.0, AGGREGATORS[1:]),
    "no noise at the aggregators": lambda put: put(privkd.privacy.noise, "discrete_gaussian", quieter(0.0)),
    "half the noise at the aggregators": lambda put: put(
        privkd.privacy.noise, "discrete_gaussian", quieter(0.5)
    ),
    "aggregators' noise repeated over rounds": forget_labels(1),
    "aggregators' noise repeated over sets": forget_labels(2),
}
