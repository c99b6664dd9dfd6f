"""What a cohort's step is computed from: a padded batch and the loss, in closed form."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from privkd.distill import soft_targets


@dataclass(frozen=True)
class Batch:
    """One step's records of every student, padded to the longest batch.

    Attributes:
        inputs: ``[student, record, *shape]``.
        targets: see `Objective.targets`, ``[student, record, class]``.
        weights: of each record in its student's sum ``[student, record]``; zero where padded.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor

    def without(self, records: Tensor) -> Self:
        """The batch with the ``records``, bool ``[student, record]``, made padding."""
        return type(self)(*(_blank(values, records) for values in (self.inputs, self.targets, self.weights)))


@dataclass(frozen=True)
class Objective:
    """`distill.forward_loss` by its gradient with respect to the logits ``z``, which is

        (1 - alpha) (softmax(z) - onehot) + alpha T (softmax(z / T) - softmax(teacher / T)).

    What does not depend on ``z`` is computed once a record, not once a step.
    """

    alpha: float
    temperature: float

    @staticmethod
    def of(alpha: float, temperature: float, teacher_logits: object | None) -> "Objective":
        """The objective with these constants; without a teacher, on the labels alone."""
        return Objective(0.0 if teacher_logits is None else alpha, temperature)

    def targets(
        self, labels: Tensor, teacher_logits: Tensor | None, classes: int, dtype: torch.dtype
    ) -> Tensor:
        """``(1 - alpha) onehot + alpha T softmax(teacher / T)`` of each record ``[record, class]``."""
        onehot = F.one_hot(labels, classes).to(dtype)
        if teacher_logits is None:
            return onehot
        soft = soft_targets(teacher_logits, self.temperature)
        return (1 - self.alpha) * onehot + self.alpha * self.temperature * soft

    def output_gradients(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The gradient of each record's loss with respect to its logits ``[student, record, class]``.

        Takes the student's logits and the targets; holds no graph.
        """
        # A softmax over a short last axis is about ten times slower than one over the first.
        z = logits.detach().flatten(0, -2).t().contiguous()
        push = []
        if self.alpha < 1.0:
            push.append(F.softmax(z, 0).mul_(1 - self.alpha))
        if self.alpha > 0.0:
            push.append(F.softmax(z / self.temperature, 0).mul_(self.alpha * self.temperature))
        total = push[0] if len(push) == 1 else push[0].add_(push[1])
        return torch.sub(total.t().view(logits.shape), targets)


def _blank(values: Tensor, records: Tensor) -> Tensor:
    return values.masked_fill(records.view(*records.shape, *[1] * (values.dim() - 2)), 0.0)
