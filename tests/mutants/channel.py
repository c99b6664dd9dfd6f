"""Faults in the channel: in this process here, in the aggregators' own in `mutants.parties`."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import privkd.channels.channel
import privkd.channels.secure
import privkd.secure.terms
from mutants.mutant import Fault, Mutant, Put, nowhere, variance_away
from mutants.parties import forget_labels, quieter
from privkd.channels.channel import noise_variance
from privkd.channels.secure import SecureChannel
from privkd.privacy.noise import Keystream, NoiseRoot
from privkd.secure.fixedpoint import FixedPoint

_SECURE = ("secure", "services")
_DRAWS = 800
"""At the least: 2 rounds of 400 canary devices."""


def with_noise(share: float) -> Fault:
    return lambda put: put(privkd.channels.channel, "discrete_gaussian", quieter(share))


def _told(share: float) -> Fault:
    """What the cloud believes that the aggregators add, by the same code as theirs."""

    def put_it(put: Put) -> None:
        put(privkd.secure.terms, "discrete_gaussian", quieter(share))

    return put_it


def _relabelled(chosen: Callable[[Sequence[Any]], Sequence[Any]]) -> Fault:
    """The noised channel's streams are known by the ``chosen`` labels of round, device, variance, content."""

    def put_it(put: Put) -> None:
        whole = NoiseRoot.stream

        def stream(self: NoiseRoot, *labels: Any) -> Keystream:
            kept = (labels[0], *chosen(labels[1:])) if labels[0] == "noised" else labels
            return whole(self, *kept)

        put(NoiseRoot, "stream", stream)

    return put_it


def divided_by_the_devices(put: Put) -> None:
    """The noise is for the sensitivity of the mean, and is added to the sum."""
    released: list[int] = [1]
    whole = SecureChannel.carry

    def carry(self: Any, question: Any, answers: Any, devices: Sequence[str]) -> Any:
        released[0] = len(devices)
        return whole(self, question, answers, devices)

    def variance(bound: int, rho: float) -> Fraction:
        return noise_variance(bound // released[0], rho)

    put(SecureChannel, "carry", carry)
    put(privkd.channels.secure, "noise_variance", variance)


def clipped_at_twice(put: Put) -> None:
    """Devices' blocks are clipped to twice the clip norm that the noise is for."""

    def encode(self: FixedPoint, blocks: Any) -> Any:
        return kept(FixedPoint(self.fraction_bits, 2 * self.bound), blocks)

    kept = FixedPoint.encode
    put(FixedPoint, "encode", encode)


_SIZE = "the channel's noise has the claimed variance"
_ROUNDS = "the channel's noise is fresh in every round"
_DEVICES = "the channel's noise is fresh for every device"
_ATTEMPTS = "the channel's noise is fresh in every attempt"

MUTANTS = (
    Mutant(
        "noised channel without noise",
        "devices add none",
        with_noise(0.0),
        ("noised",),
        _SIZE,
        variance_away(0, _DRAWS),
        quick=True,
    ),
    Mutant(
        "noised channel with half of the noise",
        "devices add half of theirs",
        with_noise(0.5),
        ("noised",),
        _SIZE,
        variance_away(0.25, _DRAWS),
    ),
    Mutant(
        "one noise for all devices",
        "all devices draw from one stream",
        _relabelled(lambda labels: (labels[0], labels[2])),
        ("noised",),
        _DEVICES,
        variance_away(100, _DRAWS),
        quick=True,
    ),
    Mutant(
        "devices' noise repeated over rounds",
        "a device's stream does not know the round",
        _relabelled(lambda labels: (labels[1], labels[2])),
        ("noised",),
        _ROUNDS,
        variance_away(2, _DRAWS // 2),
        quick=True,
    ),
    Mutant(
        "devices' noise repeated over contents",
        "a device's stream does not know what the noise is added to",
        _relabelled(lambda labels: labels[:3]),
        ("noised",),
        _ATTEMPTS,
        variance_away(0, 100),
    ),
    Mutant(
        "blocks clipped at twice the norm",
        "a device sends twice what the noise is for",
        clipped_at_twice,
        ("noised", *_SECURE),
        _DEVICES,
        "half of 400 canaries' entries are off by a clip norm: their mean by 7 standard deviations",
    ),
    Mutant(
        "sensitivity of the mean",
        "the noise of the sum is scaled to the clip norm divided by the number of devices",
        divided_by_the_devices,
        _SECURE,
        _SIZE,
        variance_away(1e-4, _DRAWS),
    ),
    Mutant(
        "no noise at one aggregator",
        "the honest one adds none",
        nowhere,
        _SECURE,
        _SIZE,
        variance_away(0.5, _DRAWS),
        in_parties=True,
        quick=True,
    ),
    Mutant(
        "half the noise at one aggregator",
        "the honest one adds half of its own",
        nowhere,
        _SECURE,
        _SIZE,
        variance_away(0.625, _DRAWS),
        in_parties=True,
    ),
    Mutant(
        "no noise at a colluding aggregator",
        "one that the adversary has on its side adds none, and says that it did",
        nowhere,
        _SECURE,
        _SIZE,
        variance_away(0.5, _DRAWS),
        in_parties=True,
    ),
    Mutant(
        "no noise at the aggregators",
        "their sampler returns zeros, the cloud's as well",
        _told(0.0),
        _SECURE,
        _SIZE,
        variance_away(0, _DRAWS),
        in_parties=True,
    ),
    Mutant(
        "half the noise at the aggregators",
        "their sampler is too narrow, the cloud's as well",
        _told(0.5),
        _SECURE,
        _SIZE,
        variance_away(0.25, _DRAWS),
        in_parties=True,
    ),
    Mutant(
        "aggregators' noise repeated over rounds",
        "their streams know neither the round nor the set",
        forget_labels(1),
        _SECURE,
        _ROUNDS,
        variance_away(2, _DRAWS // 2),
        in_parties=True,
    ),
    Mutant(
        "aggregators' noise repeated over sets",
        "their streams know the round alone, so another set meets the same noise",
        forget_labels(2),
        ("secure",),
        _ATTEMPTS,
        variance_away(0, 100),
        in_parties=True,
    ),
)
