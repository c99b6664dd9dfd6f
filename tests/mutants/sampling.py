"""Faults in how batches are drawn."""

from typing import Any

import torch
from torch import Tensor

from mutants.mutant import Mutant, Put
from privkd.privacy.randomness import Randomness, SeededRandomness, SystemRandomness

_SAMPLED = ("cohort, sampled", "opacus, sampled", "autograd, sampled", "cohort, sampled, system noise")


def _dealt(put: Put) -> None:
    """Every record comes once in each epoch of ``1 / sampling_rate`` steps, in a step dealt anew."""

    def samples(self: Any, steps: int, records: int, sampling_rate: float) -> Tensor:
        epoch, rows = round(1 / sampling_rate), []
        for _ in range(steps):
            place = getattr(self, "dealt_steps", 0)
            if place % epoch == 0:
                self.dealt = _permutation(self, records) % epoch
            rows.append(self.dealt == place % epoch)
            self.dealt_steps = place + 1
        return torch.stack(rows)

    for source in (SeededRandomness, SystemRandomness):
        put(source, "samples", samples)


def _permutation(source: SeededRandomness | SystemRandomness, records: int) -> Tensor:
    if isinstance(source, SeededRandomness):
        return torch.randperm(records, generator=source._samples)
    return torch.from_numpy(source._samples.words(records).argsort())


def _twice(put: Put) -> None:
    for source in (SeededRandomness, SystemRandomness):

        def samples(
            self: Randomness, steps: int, records: int, sampling_rate: float, drawn: Any = source.samples
        ) -> Tensor:
            chosen: Tensor = drawn(self, steps, records, min(1.0, 2 * sampling_rate))
            return chosen

        put(source, "samples", samples)


_RECORDS = "records are drawn by Poisson sampling at the claimed rate"

MUTANTS = (
    Mutant(
        "batches dealt",
        "each record is in exactly one batch of an epoch, and is charged as if drawn by Poisson sampling",
        _dealt,
        _SAMPLED,
        _RECORDS,
        "the variance of 240 records' counts, at the least, is 0: 11 standard deviations",
        quick=True,
    ),
    Mutant(
        "batches twice as large",
        "each record joins a batch with twice the probability that is charged for",
        _twice,
        _SAMPLED,
        _RECORDS,
        "240 records, at the least, in 8 batches of 20 in place of 4: 35 standard deviations",
    ),
)
