"""The ways to compute a cohort's outputs and gradients, and what memory each takes."""

import contextlib
import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from privkd.models.inputs import InputType
from privkd.privacy.events import Unit
from privkd.training.vectorised.clipping import (
    PerExample,
    beyond_clipping,
    by_unit,
    clip_factors,
    gradient_norms,
)
from privkd.training.vectorised.graph import Graph, UnsupportedError, graph_of
from privkd.training.vectorised.layers import Activations, Layer, Parameters
from privkd.training.vectorised.memory import Cost, MemoryMeter
from privkd.training.vectorised.tensors import Batch, Objective, Records, Weights

FormulationName = Literal["bookkeeping", "vmap", "loop"]
_PROBE_RECORDS = 2


class Formulation(Protocol):
    """Many students' outputs and gradients, given every student's parameters by name."""

    def outputs(self, state: Parameters, inputs: Tensor) -> Tensor:
        """Inputs ``[student, record, *shape]`` to logits ``[student, record, class]``.

        A part of a model gives its outputs ``[student, record, *shape]``.
        """
        ...

    def gradients(
        self,
        trained: Parameters,
        frozen: Parameters,
        batch: Batch,
        objective: Objective,
        clip_norm: float | None,
    ) -> Parameters:
        """The weighted sums of the units' gradients, by the names of the ``trained`` parameters.

        With a ``clip_norm``, each unit's gradient, a record's or the sum of a person's, is first clipped to
        that L2 norm as Opacus does; one without a finite norm counts for nothing.
        """
        ...


@dataclass(frozen=True)
class BookKeeping:
    """All layers as one program over students, and clipping by book-keeping."""

    graph: Graph

    def outputs(self, state: Parameters, inputs: Tensor) -> Tensor:
        """See `Formulation.outputs`."""
        with torch.no_grad():
            return self._forward(state, inputs, [], {}).stack().tensor

    def gradients(
        self,
        trained: Parameters,
        frozen: Parameters,
        batch: Batch,
        objective: Objective,
        clip_norm: float | None,
    ) -> Parameters:
        """See `Formulation.gradients`."""
        calls: list[_Call] = []
        with torch.enable_grad():
            logits = self._forward({**frozen, **trained}, batch.inputs, calls, trained).tensor
            arriving = objective.output_gradients(logits, batch.targets)
            if clip_norm is None:
                arriving *= batch.weights.unsqueeze(-1)
            elif batch.held is not None:
                arriving *= batch.held.unsqueeze(-1)
            gradients = torch.autograd.grad(logits, [call.outputs.tensor for call in calls], arriving)
        with torch.no_grad():
            sums: dict[str, Tensor] = {}
            arrived = [replace(call.outputs, tensor=g) for call, g in zip(calls, gradients, strict=True)]
            if clip_norm is None:
                for call, g in zip(calls, arrived, strict=True):
                    sums.update(zip(call.layer.names, call.layer.sums(call.inputs, g), strict=True))
                return sums
            pairs = zip(calls, arrived, strict=True)
            books = [call.layer.book(call.inputs, g, batch.slots) for call, g in pairs]
            norms = gradient_norms(books)
            broken = beyond_clipping(norms, batch.weights)
            if broken.any():
                return self.gradients(trained, frozen, batch.without(broken), objective, clip_norm)
            factors = clip_factors(norms, clip_norm) * batch.weights
            for call, book in zip(calls, books, strict=True):
                sums.update(zip(call.layer.names, book.weighted_sums(factors), strict=True))
            return sums

    def _forward(
        self, parameters: Parameters, inputs: Tensor, calls: "list[_Call]", trained: Parameters
    ) -> Activations:
        """Run the graph; a trained layer's inputs and outputs are appended to ``calls``."""
        values = {self.graph.source: Activations(inputs, len(inputs))}
        for step in self.graph.steps:
            arguments = [values[name] for name in step.arguments]
            for name in step.spent:
                del values[name]
            if not isinstance(step.operation, Layer):
                values[step.result] = step.operation(*arguments)
                continue
            x = step.operation.arrange(arguments[0])
            out = step.operation.forward(x, parameters)
            if step.operation.weight in trained:
                # The first trained layer has no differentiable input: its output starts the graph.
                out = out if out.tensor.requires_grad else out.map(Tensor.requires_grad_)
                calls.append(_Call(step.operation, x.map(Tensor.detach), out))
            values[step.result] = out
        return values[self.graph.sink]


@dataclass(frozen=True)
class _Call:
    layer: Layer
    inputs: Activations
    outputs: Activations


@dataclass(frozen=True)
class Vmapped:
    """Gradients record by record through `torch.func`: the readable twin, for any model that maps.

    ``model`` is a skeleton whose weights are replaced in each call; not to be shared between threads.
    """

    model: nn.Module

    def outputs(self, state: Parameters, inputs: Tensor) -> Tensor:
        """See `Formulation.outputs`."""
        with torch.no_grad():
            out: Tensor = vmap(self._logits, randomness="different")(dict(state), inputs)
        return out

    def gradients(
        self,
        trained: Parameters,
        frozen: Parameters,
        batch: Batch,
        objective: Objective,
        clip_norm: float | None,
    ) -> Parameters:
        """See `Formulation.gradients`."""

        # Layers that draw would draw for other records than theirs, which a record more or less shifts.
        draws = "different" if clip_norm is None else "error"

        def loss(own: Parameters, rest: Parameters, x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
            """Has the loss's gradient, not its value."""
            logits = self._logits({**rest, **own}, x)
            return (logits * objective.output_gradients(logits, target) * weight.unsqueeze(-1)).sum()

        state = (dict(trained), dict(frozen))
        if clip_norm is None:
            summed = vmap(grad(loss), randomness=draws)
            sums: Parameters = summed(*state, batch.inputs, batch.targets, batch.weights)
            return sums
        # Each record is a batch of one.
        records = (
            batch.inputs.unsqueeze(2),
            batch.targets.unsqueeze(2),
            torch.ones_like(batch.weights[..., None]) if batch.held is None else batch.held[..., None],
        )
        each = vmap(grad(loss), in_dims=(None, None, 0, 0, 0), randomness=draws)
        gradients = vmap(each, randomness=draws)(*state, *records)
        book = PerExample(tuple(by_unit(gradient, batch.slots) for gradient in gradients.values()))
        norms = gradient_norms([book])
        broken = beyond_clipping(norms, batch.weights)
        if broken.any():
            return self.gradients(trained, frozen, batch.without(broken), objective, clip_norm)
        factors = clip_factors(norms, clip_norm) * batch.weights
        return dict(zip(gradients, book.weighted_sums(factors), strict=True))

    def _logits(self, state: Parameters, inputs: Tensor) -> Tensor:
        out: Tensor = functional_call(self.model, dict(state), (inputs,))
        return out


def candidates(model: nn.Module, trained: Collection[str] | None = None) -> Iterator[Formulation]:
    """The formulations that ``model`` may take, the fastest first; each is still to be proved.

    The model is in the mode in which it is to be computed. ``trained`` names the parameters in training, by
    default all.
    """
    if len({(p.dtype, p.device) for p in model.parameters()}) != 1:
        return
    with contextlib.suppress(UnsupportedError):
        graph = graph_of(model)
        if trained is None or not any(layer.is_split(trained) for layer in graph.layers):
            yield BookKeeping(graph)
    yield Vmapped(copy.deepcopy(model))


def answering(model: nn.Module, inputs: InputType) -> Formulation | None:
    """The fastest formulation whose logits are those of ``model`` on made-up records; ``None`` for a loop."""
    if any(True for _ in model.buffers()):
        return None
    probe = OutputProbe.of(model, inputs)
    found = candidates(copy.deepcopy(model).eval())
    return next((candidate for candidate in found if probe.agrees(candidate)), None)


@dataclass(frozen=True)
class OutputProbe:
    """Two students' parameters, a few made-up records, and the model's own logits on them."""

    state: dict[str, Tensor]
    inputs: Tensor
    logits: Tensor | None

    @staticmethod
    def of(model: nn.Module, kind: InputType) -> "OutputProbe":
        """The probe of ``model`` in evaluation mode; without logits where it fails by itself."""
        twin = copy.deepcopy(model).eval()
        first = next(twin.parameters())
        state = {name: torch.stack([p.detach(), 0.5 * p.detach()]) for name, p in twin.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        inputs = kind.made_up(2, _PROBE_RECORDS, generator=generator)
        inputs = inputs.to(first) if inputs.is_floating_point() else inputs.to(first.device)
        try:
            with torch.no_grad():
                rows = [{name: both[i] for name, both in state.items()} for i in (0, 1)]
                logits = [functional_call(twin, row, (x,)) for row, x in zip(rows, inputs, strict=True)]
            return OutputProbe(state, inputs, torch.stack(logits))
        except Exception:  # a model that fails by itself is left to fail in the loop
            return OutputProbe(state, inputs, None)

    def agrees(self, candidate: Formulation) -> bool:
        """Whether ``candidate`` gives the model's logits, and gradients of any kind."""
        if self.logits is None:
            return False
        batch = Batch(self.inputs, self.logits.softmax(-1), self.logits.new_ones(self.inputs.shape[:2]))
        try:
            found = candidate.outputs(self.state, self.inputs)
            candidate.gradients(self.state, {}, batch, Objective(0.5, 2.0), None)
        except Exception:  # whatever a model raises here, another formulation takes it
            return False
        return found.shape == self.logits.shape and torch.allclose(found, self.logits, rtol=1e-4, atol=1e-5)


_UNBOUNDED = 1 << 62
_COPIES_OF_TRAINED = 10
"""Rows of the size of the trained parameters: weights, gradient, sums, two moments, average, a temporary, the
result, and two for noise in float64."""
_OF_PERSONS = 3
"""A person's gradient of a layer is formed where it takes at most twice the memory of what it is made of."""
_LARGEST_FEATURES = 4
"""Features are kept only if a record's take at most this many times the memory of its inputs."""


@dataclass(frozen=True)
class Gradients:
    """How a chunk's gradients are computed.

    Attributes:
        formulation: of the model, or of what follows ``frozen_part``.
        objective: the loss.
        clip_norm: of each record's gradient, or ``None`` without privacy.
        trained: names of the parameters in training.
        frozen_part: the model up to the first layer in training, whose outputs do not change from step to
            step and are computed once; ``None`` if there is no such part, or nothing to be gained.
        records_per_pass: how many records of each student go through at once.
    """

    formulation: Formulation
    objective: Objective
    clip_norm: float | None
    trained: frozenset[str]
    frozen_part: Formulation | None = None
    records_per_pass: int = _UNBOUNDED

    def with_frozen_part(self, model: nn.Module, inputs: InputType) -> Self:
        """The same with the frozen part set apart, if the formulation can and it pays."""
        parts = (
            self.formulation.graph.cut(self.trained) if isinstance(self.formulation, BookKeeping) else None
        )
        if parts is None:
            return self
        before, after = (BookKeeping(part) for part in parts)
        state = {name: parameter.detach().unsqueeze(0) for name, parameter in model.named_parameters()}
        blank = inputs.zeros(1, 1, device=next(model.parameters()).device)
        if before.outputs(state, blank).numel() > _LARGEST_FEATURES * blank.numel():
            return self
        return replace(self, formulation=after, frozen_part=before)

    def write_to(
        self, totals: Parameters, weights: Weights, records: Records, index: Tensor, of: Tensor
    ) -> None:
        """Write the weighted sums of a batch's gradients into ``totals``, by parameter ``[student, *shape]``.

        ``index`` and ``of`` ``[student, unit]`` say which units, and with which weight.
        """
        if index.shape[1] == 0:
            for total in totals.values():
                total.zero_()
        at_once = max(1, self.records_per_pass // records.slots)
        for start in range(0, index.shape[1], at_once):
            part = slice(start, start + at_once)
            sums = self._of_batch(weights, records.batch(index[:, part], of[:, part]))
            for name, total in totals.items():
                total.copy_(sums[name]) if start == 0 else total.add_(sums[name])

    def features(self, weights: Weights, records: Records) -> Records:
        """``records`` as the formulation takes them: after the frozen part, if there is one."""
        if self.frozen_part is None or not any(records.counts):
            return records
        singly = records.singly
        index, present = singly.poisson(torch.ones(sum(records.counts), dtype=torch.bool))
        parts = []
        for start in range(0, index.shape[1], self.records_per_pass):
            part = slice(start, start + self.records_per_pass)
            batch = singly.batch(index[:, part], present[:, part])
            parts.append(self.frozen_part.outputs(weights.frozen_views, batch.inputs))
        return records.replaced(torch.cat(parts, dim=1)[present.bool().to(weights.frozen.device)])

    def footprint(self, weights: Weights, inputs: Tensor, classes: int) -> "Footprint":
        """Measured on made-up records.

        Args:
            weights: of one student.
            inputs: a few records of one student, ``[1, record, *shape]``.
            classes: number of classes.
        """
        size = inputs.shape[:2]
        ones = weights.frozen.new_ones(size)
        batch = Batch(inputs, ones.new_zeros((*size, classes)), ones)
        preparing = 0
        if self.frozen_part is not None:
            with MemoryMeter() as meter:
                batch = replace(batch, inputs=self.frozen_part.outputs(weights.frozen_views, inputs))
            preparing = meter.bytes
        with MemoryMeter() as meter:
            self._of_batch(weights, batch)
        held = inputs.nbytes + batch.targets.nbytes + (batch.inputs.nbytes if self.frozen_part else 0)
        passing = held + max(preparing, meter.bytes)
        rows = weights.frozen.nbytes + _COPIES_OF_TRAINED * weights.trained.nbytes
        return Footprint(rows, held // size[1], passing // size[1])

    def _of_batch(self, weights: Weights, batch: Batch) -> Parameters:
        trained, frozen = weights.trained_views, weights.frozen_views
        return self.formulation.gradients(trained, frozen, batch, self.objective, self.clip_norm)


@dataclass(frozen=True)
class Footprint:
    """Upper bounds on the memory that training takes, in bytes.

    Attributes:
        parameters: for each student, whatever its records.
        held: for each record of a student.
        passing: for each record of a batch.
    """

    parameters: int
    held: int
    passing: int

    def cost(self, records: int, unit: Unit = Unit.RECORD) -> Cost:
        """The cost of students with at most so many records."""
        passing = self.passing if unit is Unit.RECORD else _OF_PERSONS * self.passing
        return Cost(self.parameters + records * self.held, passing)
