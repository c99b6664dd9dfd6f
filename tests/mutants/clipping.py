"""Faults in clipping and in what the clipped sum is divided by."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import privkd.engines.simulation
import privkd.training.dpsgd
import privkd.training.vectorised.cohort
import privkd.training.vectorised.gradients
from mutants.mutant import Ends, Fault, Mutant, Put
from privkd.data.scenario import LabelledSet
from privkd.training.dpsgd import (
    Mechanism,
    _Device,
    _SuppliedNoiseOptimizer,
    _weighted_sum,
    train_private,
)
from privkd.training.units import Chosen
from privkd.training.vectorised import train_cohort
from privkd.training.vectorised.clipping import clip_factors
from privkd.training.vectorised.layers import Conv2d
from privkd.training.vectorised.tensors import Batch, Records


def unproved(put: Put) -> None:
    """Whatever computes gradients is believed."""
    put(privkd.training.vectorised.cohort, "_is_proved", lambda *arguments: True)
    put(privkd.training.dpsgd, "_is_proved", lambda *arguments: True)


def both(*faults: Fault) -> Fault:
    """Several faults at once."""

    def put_it(put: Put) -> None:
        for fault in faults:
            fault(put)

    return put_it


def _looser_together(factor: float) -> Fault:
    """The cohort clips to ``factor`` times the clip norm; infinity is not at all."""

    def factors(norms: Tensor, clip_norm: float) -> Tensor:
        return clip_factors(norms, factor * clip_norm)

    return lambda put: put(privkd.training.vectorised.gradients, "clip_factors", factors)


def _looser_alone(factor: float) -> Fault:
    """The reference does, however its per-record gradients come to be."""

    def put_it(put: Put) -> None:
        accumulate = _SuppliedNoiseOptimizer.clip_and_accumulate

        def looser(self: Any) -> None:
            norm = self.max_grad_norm
            self.max_grad_norm = factor * norm
            accumulate(self)
            self.max_grad_norm = norm

        put(_SuppliedNoiseOptimizer, "clip_and_accumulate", looser)

    return put_it


def _convolutions_together(put: Put) -> None:
    """The cohort forgets a convolution's part of a record's norm."""
    kept = Conv2d.book

    def book(self: Conv2d, x: Any, g: Any, slots: int = 1) -> Any:
        found = kept(self, x, g, slots)
        zero = found.squared_norms() * 0
        object.__setattr__(found, "squared_norms", lambda: zero)
        return found

    put(Conv2d, "book", book)


def _convolutions_alone(put: Put) -> None:
    """The reference does."""

    def accumulate(self: Any) -> None:
        samples = self.grad_samples
        counted = [s for s in samples if s.dim() != 5]
        norms = torch.stack([s.flatten(1).norm(dim=1, dtype=torch.float64) for s in counted]).norm(dim=0)
        factors = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        for parameter, sample in zip(self.params, samples, strict=True):
            parameter.summed_grad = _weighted_sum(factors, sample)

    put(_SuppliedNoiseOptimizer, "clip_and_accumulate", accumulate)


def _expanded_weights_wrong(put: Put) -> None:
    """The fastest of the reference's computations gives every record the first one's gradient."""
    compute = _Device.compute

    def wrong(self: Any, *arguments: Any) -> None:
        compute(self, *arguments)
        if self.mode == "ew":
            for parameter in self.parameters:
                samples = parameter.grad_sample
                parameter.grad_sample = samples[:1].expand_as(samples).clone()

    put(_Device, "compute", wrong)


def _persons_by_record_together(put: Put) -> None:
    """The cohort clips each record, and adds up a person's clipped gradients."""
    kept = Records.batch

    def batch(self: Records, index: Tensor, weights: Tensor) -> Batch:
        found = kept(self, index, weights)
        if found.held is None:
            return found
        each = found.weights.repeat_interleave(found.slots, dim=1) * found.held
        return Batch(found.inputs, found.targets, each)

    put(Records, "batch", batch)


def _persons_by_record_alone(put: Put) -> None:
    """The reference does."""
    put(Chosen, "summed", lambda self, gradients: gradients)


def _own_size(mechanism: Mechanism, records: int) -> Mechanism:
    return replace(mechanism, expected_batch_size=max(1, records) * mechanism.recipe.sampling_rate)


def _normalised_by_the_shard(put: Put) -> None:
    def alone(
        model: nn.Module, shard: LabelledSet, targets: Tensor | None, mechanism: Mechanism, source: Any
    ) -> nn.Module:
        return train_private(model, shard, targets, _own_size(mechanism, len(shard)), source)

    def together(
        models: Sequence[nn.Module],
        shards: Sequence[LabelledSet],
        targets: Sequence[Tensor] | None,
        mechanism: Mechanism,
        sources: Sequence[Any],
        progress: Any = None,
    ) -> list[nn.Module]:
        trained: dict[int, nn.Module] = {}
        for size in {len(shard) for shard in shards}:
            some = [i for i, shard in enumerate(shards) if len(shard) == size]
            given = None if targets is None else [targets[i] for i in some]
            own = train_cohort(
                [models[i] for i in some],
                [shards[i] for i in some],
                given,
                _own_size(mechanism, size),
                [sources[i] for i in some],
            )
            trained |= zip(some, own, strict=True)
        return [trained[i] for i in range(len(models))]

    put(privkd.engines.simulation, "train_private", alone)
    put(privkd.engines.simulation, "train_cohort", together)


_ALONE = "a record by itself moves the sum by at most the clip norm"
_PERSON = "a person by itself moves the sum by at most the clip norm"
_PROVED = "the proof compares the clipped sums of 10 records, chosen singly and together, to 1e-3"
_EXACT = "without chance: loud records move the sum by {} clip norms, and 1.001 is tolerated"

_FAULTS: tuple[tuple[str, str, Fault, Fault, str], ...] = (
    (
        "clipping off",
        "nothing is clipped",
        _looser_together(math.inf),
        _looser_alone(math.inf),
        "tens of",
    ),
    (
        "clipping looser",
        "gradients are clipped to twice the clip norm",
        _looser_together(2.0),
        _looser_alone(2.0),
        "2",
    ),
    (
        "convolutions unclipped",
        "the norm leaves the convolutions out",
        _convolutions_together,
        _convolutions_alone,
        "several",
    ),
)


def _of_clipping() -> Iterator[Mutant]:
    """Each fault in the cohort, where the proof rejects it and where no proof is made; and in the reference,
    all of whose computations share it, so that the last one is used unproved."""
    for name, words, together, alone, moved in _FAULTS:
        cnn = ", cnn" * name.startswith("conv")
        sampled = () if cnn else ("cohort, sampled",)
        yield Mutant(
            f"{name} in the cohort",
            f"{words} in the fast program",
            together,
            (f"cohort{cnn}",),
            "",
            _PROVED,
            ends=Ends.REPLACED,
            quick=name == "clipping off",
        )
        yield Mutant(
            f"{name} in the cohort, unproved",
            f"{words} in the fast program, and no proof is made",
            both(unproved, together),
            (f"cohort{cnn}", *sampled),
            _ALONE,
            _EXACT.format(moved),
            quick=name != "clipping off",
        )
        yield Mutant(
            f"{name} in the reference",
            f"{words} on a device by itself",
            alone,
            (f"opacus{cnn}", *(() if cnn else ("autograd",))),
            _ALONE,
            _EXACT.format(moved),
        )


MUTANTS = (
    *_of_clipping(),
    Mutant(
        "persons clipped by record in the cohort",
        "each record of a person is clipped, and then a person's are added up, in the fast program",
        _persons_by_record_together,
        ("cohort, persons",),
        "",
        "the proof compares the clipped sums of 5 persons, of one to three records, to 1e-3",
        ends=Ends.REPLACED,
    ),
    Mutant(
        "persons clipped by record in the cohort, unproved",
        "each record of a person is clipped, and then a person's are added up, and no proof is made",
        both(unproved, _persons_by_record_together),
        ("cohort, persons", "cohort, persons, sampled"),
        _PERSON,
        _EXACT.format("5"),
        quick=True,
    ),
    Mutant(
        "persons clipped by record in the reference",
        "each record of a person is clipped, and then a person's are added up, on a device by itself",
        _persons_by_record_alone,
        ("opacus, persons",),
        _PERSON,
        _EXACT.format("5"),
        quick=True,
    ),
    Mutant(
        "expanded weights wrong",
        "one way of computing per-record gradients gives all records the first one's",
        _expanded_weights_wrong,
        ("opacus",),
        "",
        _PROVED,
        ends=Ends.REPLACED,
    ),
    Mutant(
        "normalised by the shard",
        "the sum is divided by the device's own number of records",
        _normalised_by_the_shard,
        ("cohort", "opacus", "autograd"),
        _ALONE,
        _EXACT.format("30"),
        quick=True,
    ),
)
