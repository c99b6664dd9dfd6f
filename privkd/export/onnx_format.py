"""ONNX through torch.onnx, answered by ONNX Runtime. The only file that imports onnxruntime."""

import json
import logging
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from privkd.export.artefact import CLASSES, Answering, Deployable
from privkd.export.torch_format import exported

_INPUT, _OUTPUT = "records", "logits"


class OnnxFormat:
    """See `Format`. The input is called ``records``, the output ``logits``; any number of records.

    The model's metadata have ``classes``, their names as a JSON list.
    """

    def write(self, model: Deployable, example: Tensor, path: Path) -> None:
        """See `Format.write`."""
        # torch.onnx warns of libraries that no student of ours uses.
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                exported(model, example),
                dynamo=True,
                input_names=[_INPUT],
                output_names=[_OUTPUT],
                verbose=False,
            )
        if program is None:
            raise RuntimeError("torch.onnx gave no program")
        for node in program.model.graph:
            node.metadata_props.clear()
        program.model.metadata_props[CLASSES] = json.dumps(model.classes)
        program.save(path, external_data=False)

    def load(self, path: Path) -> Answering:
        """See `Format.load`."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        def answer(records: Tensor) -> Tensor:
            return torch.from_numpy(np.asarray(session.run([_OUTPUT], {_INPUT: records.numpy()})[0]))

        return answer
