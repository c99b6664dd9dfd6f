"""Faults in the noise of DP-SGD."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import privkd.training.vectorised.train
from mutants.mutant import Fault, Mutant, Put, variance_away
from privkd.engines.simulation import Simulation
from privkd.prepared import Prepared
from privkd.privacy.randomness import Randomness, SeededRandomness, SystemRandomness
from privkd.training.dpsgd import _SuppliedNoiseOptimizer

_EVERY_ENGINE = ("cohort", "opacus", "autograd", "cohort, system noise", "opacus, system noise")
_CLASSES = 10
_DEVICES = 50
"""Canary devices of the reference, with the fewest; the cohort has 165."""
_DRAWS = 2 * _DEVICES * 606
"""In 2 rounds, with 606 weights a device."""


def _drawn(change: Callable[[Tensor], Tensor]) -> Fault:
    """Whatever either source draws, changed."""

    def put_it(put: Put) -> None:
        for source in (SeededRandomness, SystemRandomness):

            def noise(self: Randomness, size: int, drawn: Any = source.noise) -> Tensor:
                return change(drawn(self, size))

            put(source, "noise", noise)

    return put_it


def _without_last_bias(noise: Tensor) -> Tensor:
    return torch.cat([noise[:-_CLASSES], torch.zeros_like(noise[-_CLASSES:])])


def _labelled(*, device: bool, round: bool) -> Fault:
    """Sources that are known by the ``device``, or by the ``round``, alone."""

    def randomness(run: Prepared, name: str, number: int) -> Randomness:
        labels = [name] * device + [number] * round
        if run.config.privacy.noise == "system":
            return SystemRandomness(run.root, *labels)
        return SeededRandomness(run.config.seed, "device", *labels)

    return lambda put: put(Prepared, "_randomness", randomness)


def _told(share: float) -> Fault:
    """Devices that are told a smaller noise multiplier than the run is charged for."""

    def put_it(put: Put) -> None:
        train = Simulation.train_private

        def quiet(
            self: Simulation, students: Any, targets: Any, mechanism: Any, *rest: Any
        ) -> list[nn.Module]:
            less = replace(mechanism, noise_multiplier=share * mechanism.noise_multiplier)
            return train(self, students, targets, less, *rest)

        put(Simulation, "train_private", quiet)

    return put_it


def _for_half_the_clip_norm(put: Put) -> None:
    cohort = privkd.training.vectorised.train._train_privately

    def together(students: Any, plan: Any, mechanism: Any, *rest: Any) -> list[nn.Module]:
        less = replace(mechanism, noise_multiplier=mechanism.noise_multiplier / 2)
        return cohort(students, plan, less, *rest)

    put(privkd.training.vectorised.train, "_train_privately", together)
    add = _SuppliedNoiseOptimizer.add_noise

    def alone(self: Any) -> None:
        norm = self.max_grad_norm
        self.max_grad_norm = norm / 2
        add(self)
        self.max_grad_norm = norm

    put(_SuppliedNoiseOptimizer, "add_noise", alone)


_SIZE = "noise has the claimed variance"

MUTANTS = (
    Mutant(
        "noise zero",
        "the source's noise is zero",
        _drawn(torch.zeros_like),
        _EVERY_ENGINE,
        _SIZE,
        variance_away(0, _DRAWS),
        quick=True,
    ),
    Mutant(
        "noise halved",
        "half of the noise is added",
        _drawn(lambda noise: noise / 2),
        _EVERY_ENGINE,
        _SIZE,
        variance_away(0.25, _DRAWS),
        quick=True,
    ),
    Mutant(
        "noise without the last bias",
        "one weight tensor gets none",
        _drawn(_without_last_bias),
        _EVERY_ENGINE,
        _SIZE,
        variance_away(0, 2 * _DEVICES * _CLASSES),
    ),
    Mutant(
        "noise repeated over rounds",
        "the sources do not know the round",
        _labelled(device=True, round=False),
        _EVERY_ENGINE,
        "noise is fresh in every round",
        variance_away(2, _DRAWS // 2),
        quick=True,
    ),
    Mutant(
        "noise repeated over devices",
        "the sources do not know the device",
        _labelled(device=False, round=True),
        _EVERY_ENGINE,
        "noise is fresh on every device",
        variance_away(_DEVICES, _DRAWS // _DEVICES),
    ),
    Mutant(
        "fleet without noise",
        "the fleet is passed a noise multiplier of about 0",
        _told(1e-9),
        ("cohort", "opacus", "autograd"),
        _SIZE,
        variance_away(0, _DRAWS),
        quick=True,
    ),
    Mutant(
        "fleet with half of the noise",
        "the fleet is passed half of the noise multiplier",
        _told(0.5),
        ("cohort", "opacus", "autograd"),
        _SIZE,
        variance_away(0.25, _DRAWS),
    ),
    Mutant(
        "noise for half the clip norm",
        "the noise is scaled to half of what is clipped to",
        _for_half_the_clip_norm,
        ("cohort", "opacus", "autograd"),
        _SIZE,
        variance_away(0.25, _DRAWS),
    ),
)
