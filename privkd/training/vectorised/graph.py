"""A model's forward pass as a list of steps on many students at once."""

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from privkd.models.text import Within
from privkd.training.vectorised.layers import (
    Activations,
    Conv2d,
    Embedding,
    GroupNorm,
    Layer,
    Linear,
    fast_tanh,
    group_norm,
)

Operation = Callable[..., Activations]
TensorFunction = Callable[..., Tensor]


class UnsupportedError(Exception):
    """The model holds something that has no cohort form; it is trained in another formulation."""


@dataclass(frozen=True)
class Step:
    """``result = operation(*arguments)``, by the names of values; ``spent`` are not needed after."""

    result: str
    operation: Layer | Operation
    arguments: tuple[str, ...]
    spent: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """The steps from the value ``source`` to the value ``sink``."""

    steps: tuple[Step, ...]
    source: str
    sink: str

    @property
    def layers(self) -> list[Layer]:
        """The layers with parameters."""
        return [step.operation for step in self.steps if isinstance(step.operation, Layer)]

    def cut(self, trained: Collection[str]) -> "tuple[Graph, Graph] | None":
        """The part before all layers with ``trained`` parameters, and the rest.

        ``None`` if no layer lies before, or if more than one value passes between.
        """
        before, after, moved = [], [], set[str]()
        for step in self.steps:
            layer = step.operation
            if (isinstance(layer, Layer) and layer.weight in trained) or moved.intersection(step.arguments):
                after.append(step)
                moved.add(step.result)
            else:
                before.append(step)
        passed = {name for step in after for name in step.arguments} - moved
        idle = not any(isinstance(step.operation, Layer) for step in before)
        if idle or len(passed) != 1 or self.sink not in moved:
            return None
        (border,) = passed
        return Graph(tuple(before), self.source, border), Graph(tuple(after), border, self.sink)


_POINTWISE: dict[Any, TensorFunction] = {
    torch.relu: F.relu,
    F.relu: F.relu,
    "relu": F.relu,
    torch.tanh: fast_tanh,
    F.tanh: fast_tanh,
    "tanh": fast_tanh,
    torch.sigmoid: torch.sigmoid,
    F.sigmoid: torch.sigmoid,
    "sigmoid": torch.sigmoid,
    F.gelu: F.gelu,
    F.silu: F.silu,
    F.elu: F.elu,
}
_POINTWISE_MODULES = (
    nn.Sigmoid,
    nn.GELU,
    nn.SiLU,
    nn.ELU,
    nn.LeakyReLU,
    nn.Softplus,
    nn.Identity,
)
_POOLS = (F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d)
_POOL_MODULES = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


class _Tracer(fx.Tracer):
    """What acts within a record is one step, whatever it does there."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """See `fx.Tracer.is_leaf_module`."""
        return isinstance(m, Within) or super().is_leaf_module(m, module_qualified_name)


def graph_of(model: nn.Module) -> Graph:
    """Trace ``model`` and give every step its cohort form.

    Raises:
        UnsupportedError: a step has none.
    """
    try:
        nodes = list(_Tracer().trace(model).nodes)
    except Exception as error:  # the user's forward may fail under tracing in any way
        raise UnsupportedError(f"the forward pass cannot be traced: {error}") from error
    if [node.op for node in nodes].count("placeholder") != 1 or nodes[0].op != "placeholder":
        raise UnsupportedError("the model takes more than one input")
    modules = dict(model.named_modules())
    steps = []
    for node in nodes[1:-1]:
        arguments = tuple(argument.name for argument in node.all_input_nodes)
        spent = tuple(value.name for value in node.all_input_nodes if _last_user(value, nodes) is node)
        steps.append(Step(node.name, _operation(node, modules), arguments, spent))
    sink = nodes[-1].args[0]
    if not isinstance(sink, fx.Node):
        raise UnsupportedError("the model returns more than one value")
    graph = Graph(tuple(steps), nodes[0].name, sink.name)
    _check_parameters(model, graph)
    return graph


def _last_user(value: fx.Node, nodes: Sequence[fx.Node]) -> fx.Node:
    return max(value.users, key=nodes.index)


def _check_parameters(model: nn.Module, graph: Graph) -> None:
    used = sorted(name for layer in graph.layers for name in layer.names)
    if used != sorted(name for name, _ in model.named_parameters(remove_duplicate=False)):
        raise UnsupportedError("a parameter is shared, unused, or used outside its layer")
    if any(True for _ in model.buffers()):
        raise UnsupportedError("the model has buffers")


def _operation(node: fx.Node, modules: dict[str, nn.Module]) -> Layer | Operation:
    target: Any = node.target
    if node.op == "call_module" and isinstance(modules[target], Within) and not node.kwargs:
        return _within(modules[target])
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        return _of_module(target, modules[target])
    operation = _of_function(node, target) if node.op in ("call_function", "call_method") else None
    if operation is None:
        raise UnsupportedError(f"no cohort form for {node.op} {target}")
    return operation


def _of_function(node: fx.Node, target: Any) -> Operation | None:
    constants, settings = node.args[1:], dict(node.kwargs)
    if target in (operator.add, torch.add) and len(node.all_input_nodes) == len(node.args) and not settings:
        return _add
    if len(node.all_input_nodes) != 1:
        return None
    if target in ("flatten", torch.flatten) and constants in ((1,), (1, -1)) and not settings:
        return _flatten
    if target in _POINTWISE and not constants and not settings.pop("inplace", False):
        return _pointwise(partial(_POINTWISE[target], **settings))
    if target in _POOLS:
        return _pool(lambda t: target(t, *constants, **settings))
    return None


def _of_module(name: str, module: nn.Module) -> Layer | Operation:
    kind, weight = type(module), f"{name}.weight".lstrip(".")
    bias = f"{name}.bias".lstrip(".") if getattr(module, "bias", None) is not None else None
    if kind is nn.Linear:
        return Linear(weight, bias)
    if isinstance(module, nn.Embedding) and kind is nn.Embedding and _is_plain_table(module):
        return Embedding(weight, None, module.num_embeddings)
    if isinstance(module, nn.LayerNorm) and kind is nn.LayerNorm and not module.elementwise_affine:
        return lambda x: x.stack().map(module)
    if isinstance(module, nn.Conv2d) and kind is nn.Conv2d:
        return _convolution(module, weight, bias)
    if isinstance(module, nn.GroupNorm) and kind is nn.GroupNorm:
        if module.affine and bias is not None:
            return GroupNorm(weight, bias, module.num_groups, module.eps)
        if not module.affine:
            return _group_norm(module.num_groups, module.eps)
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
        return _flatten
    if kind in (nn.ReLU, nn.Tanh):
        return _pointwise(F.relu if kind is nn.ReLU else fast_tanh)
    if kind in _POINTWISE_MODULES and not getattr(module, "inplace", False):
        return _pointwise(module)
    if kind in _POOL_MODULES and not getattr(module, "return_indices", False):
        return _pool(module)
    raise UnsupportedError(f"no cohort form for layer {name!r} ({kind.__name__})")


def _convolution(module: nn.Conv2d, weight: str, bias: str | None) -> Conv2d:
    plain = module.groups == 1 and tuple(module.dilation) == (1, 1) and module.padding_mode == "zeros"
    if not plain or isinstance(module.padding, str):
        raise UnsupportedError("a convolution has groups, dilation or unusual padding")
    (kernel_y, kernel_x), (stride_y, stride_x) = module.kernel_size, module.stride
    pad_y, pad_x = module.padding
    return Conv2d(weight, bias, (kernel_y, kernel_x), (stride_y, stride_x), (pad_y, pad_x))


def _is_plain_table(module: nn.Embedding) -> bool:
    return module.padding_idx is None and module.max_norm is None and not module.scale_grad_by_freq


def _within(module: nn.Module) -> Operation:
    def operation(*given: Activations) -> Activations:
        out: Tensor = module(*(x.stack().tensor for x in given))
        return Activations(out, given[0].students)

    return operation


def _pointwise(function: TensorFunction) -> Operation:
    return lambda x: x.map(function)


def _pool(function: TensorFunction) -> Operation:
    return lambda x: x.fold().map(function)


def _group_norm(groups: int, epsilon: float) -> Operation:
    return lambda x: group_norm(x.fold() if x.tensor.dim() == 5 else x, groups, epsilon)


def _flatten(x: Activations) -> Activations:
    return x.stack().map(lambda t: t.flatten(2))


def _add(x: Activations, y: Activations) -> Activations:
    if x.folded != y.folded:
        x, y = x.stack(), y.stack()
    return Activations(x.tensor + y.tensor, x.students, x.folded)
