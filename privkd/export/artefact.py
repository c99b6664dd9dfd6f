"""A student as a device runs it: preprocessing and logits in one module, checked against the original."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from privkd.errors import ModelError
from privkd.export.record import TOLERANCE, Check

CLASSES = "classes"
"""Under which an artefact keeps the classes' names."""
Answering: TypeAlias = Callable[[Tensor], Tensor]
"""Raw records ``[record, *shape]`` to logits ``[record, class]``, through the artefact."""


class Format(Protocol):
    """One form of artefact."""

    def write(self, model: "Deployable", example: Tensor, path: Path) -> None:
        """Write ``model``, traced on ``example`` ``[2, *shape]``, to ``path``."""
        ...

    def load(self, path: Path) -> Answering:
        """The artefact at ``path`` as something that answers, on one CPU thread."""
        ...


class Deployable(nn.Module):
    """From raw records to logits: the run's preprocessing (`Constants.module`), then the student.

    ``classes`` are by name, in the order of the logits: a format keeps them beside the weights where it can.
    """

    def __init__(self, student: nn.Module, preprocessing: nn.Module, classes: Sequence[str]) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.preprocessing = preprocessing
        self.student = student

    def forward(self, records: Tensor) -> Tensor:
        """Raw float32 ``[record, *shape]`` to logits ``[record, class]``."""
        logits: Tensor = self.student(self.preprocessing(records))
        return logits


@torch.no_grad()
def check_equal(student: nn.Module, answer: Answering, inputs: Tensor, raw: Tensor) -> Check:
    """Put the same records to both: ``inputs`` to the student as in the run, ``raw`` to the artefact.

    Raises:
        ModelError: the answers differ by more than ``TOLERANCE``.
    """
    ours, theirs = student(inputs), answer(raw)
    if ours.shape != theirs.shape:
        raise ModelError(
            f"the exported student answers with shape {list(theirs.shape)}, the original with "
            f"{list(ours.shape)}; nothing was written, take another --format"
        )
    difference = float(((ours - theirs).abs() / ours.abs().clamp(min=1)).max())
    if not difference <= TOLERANCE:
        raise ModelError(
            f"the exported student's logits differ from the original's by {difference:.2g}, more than "
            f"{TOLERANCE:g}; nothing was written, take another --format"
        )
    return Check(len(raw), difference)
