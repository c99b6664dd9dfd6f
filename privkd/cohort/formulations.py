"""The ways to compute a cohort's outputs and gradients."""

import contextlib
import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from privkd.cohort.activations import Activations
from privkd.cohort.clipping import PerExample, beyond_clipping, clip_factors, gradient_norms
from privkd.cohort.graph import Graph, UnsupportedError, graph_of
from privkd.cohort.layers import Layer, Parameters
from privkd.cohort.objective import Batch, Objective

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
        """The weighted sums of the records' gradients, by the names of the ``trained`` parameters.

        With a ``clip_norm``, each record's gradient is first clipped to that L2 norm as Opacus does; one
        without a finite norm counts for nothing.
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
            gradients = torch.autograd.grad(logits, [call.outputs.tensor for call in calls], arriving)
        with torch.no_grad():
            sums: dict[str, Tensor] = {}
            arrived = [replace(call.outputs, tensor=g) for call, g in zip(calls, gradients, strict=True)]
            if clip_norm is None:
                for call, g in zip(calls, arrived, strict=True):
                    sums.update(zip(call.layer.names, call.layer.sums(call.inputs, g), strict=True))
                return sums
            books = [call.layer.book(call.inputs, g) for call, g in zip(calls, arrived, strict=True)]
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
            torch.ones_like(batch.weights[..., None]),
        )
        each = vmap(grad(loss), in_dims=(None, None, 0, 0, 0), randomness=draws)
        gradients = vmap(each, randomness=draws)(*state, *records)
        book = PerExample(tuple(gradients.values()))
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


def answering(model: nn.Module, input_shape: tuple[int, ...]) -> Formulation | None:
    """The fastest formulation whose logits are those of ``model`` on made-up records; ``None`` for a loop."""
    if any(True for _ in model.buffers()):
        return None
    probe = OutputProbe.of(model, input_shape)
    found = candidates(copy.deepcopy(model).eval())
    return next((candidate for candidate in found if probe.agrees(candidate)), None)


@dataclass(frozen=True)
class OutputProbe:
    """Two students' parameters, a few made-up records, and the model's own logits on them."""

    state: dict[str, Tensor]
    inputs: Tensor
    logits: Tensor | None

    @staticmethod
    def of(model: nn.Module, input_shape: tuple[int, ...]) -> "OutputProbe":
        """The probe of ``model`` in evaluation mode; without logits where it fails by itself."""
        twin = copy.deepcopy(model).eval()
        first = next(twin.parameters())
        state = {name: torch.stack([p.detach(), 0.5 * p.detach()]) for name, p in twin.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        inputs = torch.rand((2, _PROBE_RECORDS, *input_shape), generator=generator).to(first)
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
        batch = Batch(self.inputs, self.logits.softmax(-1), self.inputs.new_ones(self.inputs.shape[:2]))
        try:
            found = candidate.outputs(self.state, self.inputs)
            candidate.gradients(self.state, {}, batch, Objective(0.5, 2.0), None)
        except Exception:  # whatever a model raises here, another formulation takes it
            return False
        return found.shape == self.logits.shape and torch.allclose(found, self.logits, rtol=1e-4, atol=1e-5)
