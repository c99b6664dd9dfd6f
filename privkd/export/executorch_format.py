"""ExecuTorch's ``.pte`` with XNNPACK, one record an answer. The only file that imports executorch."""

import logging
import warnings
from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor, nn

from privkd.export.formats import Answering


class ExecutorchFormat:
    """See `Format`. The artefact takes one record at a time, ``[1, *shape]``."""

    suffix = ".pte"

    def write(self, model: nn.Module, example: Tensor, path: Path) -> None:
        """See `Format.write`."""
        logging.getLogger("executorch").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (example[:1],))
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            path.write_bytes(lowered.to_executorch().buffer)

    def load(self, path: Path) -> Answering:
        """See `Format.load`."""
        method = Runtime.get().load_program(path).load_method("forward")

        def answer(records: Tensor) -> Tensor:
            # The runtime's next answer overwrites the last.
            return torch.cat([method.execute([record[None]])[0].clone() for record in records])

        return answer
