"""ExecuTorch's ``.pte`` with XNNPACK, one record an answer. The only file that imports executorch."""

import copy
import logging
import warnings
from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor, nn
from torch.nn import functional as F

from privkd.export.artefact import Answering, Deployable

_BLOCK = 256


class ExecutorchFormat:
    """See `Format`. The artefact takes one record at a time, ``[1, *shape]``."""

    def write(self, model: Deployable, example: Tensor, path: Path) -> None:
        """See `Format.write`."""
        logging.getLogger("executorch").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(_in_blocks(model), (example[:1],))
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            path.write_bytes(lowered.to_executorch().buffer)

    def load(self, path: Path) -> Answering:
        """See `Format.load`."""
        method = Runtime.get().load_program(path).load_method("forward")

        def answer(records: Tensor) -> Tensor:
            # The runtime's next answer overwrites the last.
            return torch.cat([method.execute([record[None]])[0].clone() for record in records])

        return answer


class _Blocks(nn.Module):
    """A linear layer that sums its products in blocks.

    XNNPACK adds all products of an output one after the other: over the 3,969 features of a scattering
    student of 28x28 images rounding then comes to 1e-5.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weights = nn.ParameterList(linear.weight.detach().split(_BLOCK, dim=1))
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """See `nn.Linear`."""
        pairs = zip(inputs.split(_BLOCK, dim=-1), self.weights, strict=True)
        first, *others = (F.linear(block, weight) for block, weight in pairs)
        total = sum(others, start=first)
        return total if self.bias is None else total + self.bias


def _in_blocks(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with `_Blocks` for its large linear layers."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.in_features > _BLOCK:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _Blocks(module))
    return model
