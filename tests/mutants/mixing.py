"""Faults by which one record reaches another: layers' draws, buffers, and models that mix records."""

import contextlib
import copy
from typing import Any

import torch
from torch import nn

import privkd.cloud
import privkd.engines.simulation
import privkd.training.dpsgd
import privkd.training.vectorised.train
from mutants.clipping import both, unproved
from mutants.mutant import Ends, Mutant, Put, nowhere
from privkd.privacy.randomness import seeded_layers
from privkd.training.dpsgd import _Device, train_private


def _masks_in_the_order_of_the_batch(put: Put) -> None:
    """Layers draw from torch's generator, which each device's training begins from the public seed."""
    put(privkd.training.dpsgd, "Recordwise", lambda records, streams: contextlib.nullcontext())

    def seeded(*arguments: Any, **more: Any) -> nn.Module:
        with seeded_layers(0, "public"):
            return train_private(*arguments, **more)

    for module in (privkd.engines.simulation, privkd.training.vectorised.train):
        put(module, "train_private", seeded)


def _buffers_kept(put: Put) -> None:
    """A device is left with whatever its student wrote to its buffers."""
    put(privkd.training.dpsgd, "buffers_kept", lambda model: contextlib.nullcontext())
    finished = _Device.finished

    @torch.no_grad()
    def leaking(self: _Device, original: nn.Module) -> nn.Module:
        student = finished(self, original)
        for kept, written in zip(student.buffers(), self.model.buffers(), strict=True):
            kept.copy_(written)
        return student

    put(_Device, "finished", leaking)


def _remembered(put: Put) -> None:
    """A device is left with the very module that was trained, and what that holds beside its weights."""
    compute, finished = _Device.compute, _Device.finished

    def noting(self: _Device, shard: Any, targets: Any, chosen: Any, streams: Any) -> None:
        compute(self, shard, targets, chosen, streams)
        if len(chosen):
            layer = next(module for module in self.model.modules() if isinstance(module, nn.Tanh))
            layer.noted = shard.inputs[chosen].mean(0)

    def leaking(self: _Device, original: nn.Module) -> nn.Module:
        student = finished(self, original)
        for own, trained in zip(student.modules(), _inner(self.model).modules(), strict=True):
            own.__dict__.update({k: copy.copy(v) for k, v in vars(trained).items() if k == "noted"})
        return student

    put(_Device, "compute", noting)
    put(_Device, "finished", leaking)


def _inner(model: nn.Module) -> nn.Module:
    """The user's module within Opacus' wrapper."""
    inner = getattr(model, "_module", model)
    assert isinstance(inner, nn.Module)
    return inner


def _teacher_unchecked(put: Put) -> None:
    put(privkd.cloud, "check_apart", lambda *arguments: None)


def _students_unchecked(put: Put) -> None:
    for module in (privkd.federation, privkd.training.dpsgd):
        put(module, "check_records_apart", lambda *arguments: None)


_AMONG = "a record among others moves the sum as it does by itself"
_REST = "training changes nothing but the weights in training"
_NO_CHANCE = "without chance: {}"

MUTANTS = (
    Mutant(
        "masks in the order of the batch",
        "layers draw from the public seed, batch by batch, so that one record less shifts all later masks",
        _masks_in_the_order_of_the_batch,
        ("cohort, dropout", "opacus, dropout"),
        _AMONG,
        _NO_CHANCE.format("the sum moves by several clip norms"),
        quick=True,
    ),
    Mutant(
        "buffers kept",
        "a device is left with the buffers that its student wrote in training",
        _buffers_kept,
        ("opacus, buffer",),
        _REST,
        _NO_CHANCE.format("buffers are compared bit by bit"),
        quick=True,
    ),
    Mutant(
        "batch remembered",
        "a device is left with a layer that holds the mean of its last batch",
        _remembered,
        ("opacus",),
        _REST,
        _NO_CHANCE.format("tensors that layers hold on to are compared bit by bit"),
    ),
    Mutant(
        "mixing teacher",
        "a teacher whose answers to a record depend on the others",
        nowhere,
        ("cohort, mixing teacher", "opacus, mixing teacher"),
        "the teacher cannot teach private records",
        "tried in double precision on batches of 3 and 7",
        ends=Ends.REFUSED,
        quick=True,
    ),
    Mutant(
        "mixing teacher, unchecked",
        "the same, and nobody looks",
        _teacher_unchecked,
        ("cohort, mixing teacher", "opacus, mixing teacher"),
        _AMONG,
        _NO_CHANCE.format("all soft targets move with one record"),
        quick=True,
    ),
    Mutant(
        "mixing student",
        "a student that takes away the batch's mean",
        nowhere,
        ("opacus, mixing student",),
        "the student cannot be trained with DP-SGD",
        "tried in double precision on batches of 3 and 7",
        ends=Ends.REFUSED,
    ),
    Mutant(
        "mixing student, unchecked",
        "the same, and nobody looks; the proof of its gradients leaves it one record at a time",
        _students_unchecked,
        ("opacus, mixing student",),
        "",
        "no batch is computed together",
        ends=Ends.REPLACED,
    ),
    Mutant(
        "mixing student, unchecked and unproved",
        "the same, and its gradients are believed as well",
        both(_students_unchecked, unproved),
        ("opacus, mixing student",),
        _AMONG,
        _NO_CHANCE.format("every record's gradient moves with one record"),
    ),
    Mutant(
        "remembering student",
        "a student that adds a little of the batch before",
        nowhere,
        ("opacus, remembering student",),
        "the student cannot be trained with DP-SGD",
        "tried in double precision on batches of 3 and 7",
        ends=Ends.REFUSED,
    ),
)
