"""torch.export's ``.pt2``: the graph as JSON and the weights as raw bytes, for any number of records."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from privkd.export.artefact import CLASSES, Answering, Deployable


class TorchFormat:
    """See `Format`. The extra file ``classes`` has the classes' names as a JSON list."""

    def write(self, model: Deployable, example: Tensor, path: Path) -> None:
        """See `Format.write`."""
        program = exported(model, example)
        # The example would be written by pickle, and nobody needs it to answer.
        program.example_inputs = None
        torch.export.save(program, path, extra_files={CLASSES: json.dumps(model.classes)})

    def load(self, path: Path) -> Answering:
        """See `Format.load`."""
        module = torch.export.load(path).module()
        return lambda records: module(records)


def exported(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """``model`` as a graph that takes any number of records."""
    records = torch.export.Dim("records", min=1)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: records},))
    for node in program.graph.nodes:
        # Whoever gets the file learns nothing of the machine that wrote it.
        node.meta.pop("stack_trace", None)
    return program
