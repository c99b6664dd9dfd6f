"""A device: from a published task and its own records to the answer that its channel encodes.

It needs neither the cloud nor any other device. Private records enter here, and only bounded answers on
public inputs leave, for a channel that the ledger has paid for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privkd.config import StudentConfig
from privkd.data.scenario import LabelledSet
from privkd.messages import Question, Task
from privkd.privacy.randomness import Randomness
from privkd.training.dpsgd import train_private, train_unprotected
from privkd.training.fit import logits_of

_LEAST_LOGIT = -100.0


@dataclass(frozen=True)
class Draws:
    """What a device draws in one round: ``private`` samples, noise and layers' draws where it trains with
    DP-SGD, else ``batches``."""

    private: Randomness
    batches: torch.Generator


@dataclass(frozen=True)
class Answer:
    """What one device made of a task: its ``student``, which stays, and the bounded ``block``
    ``[query, class]``, which its channel encodes."""

    student: nn.Module
    block: Tensor


def answer(
    task: Task, number: int, records: LabelledSet, draws: Draws, before: nn.Module | None = None
) -> Answer:
    """All that a device does in a round.

    Args:
        task: of the round.
        number: the device's, which decides its architecture.
        records: private; neighbouring relation of the student: add or remove one of them.
        draws: the device's own, of this round.
        before: its student of the round before, if any.
    """
    student = train(task, task.start(number, before), records, draws)
    logits = logits_of(student, task.question.inputs)
    return Answer(student, responses(logits[None], task.question)[0])


def train(task: Task, start: nn.Module, records: LabelledSet, draws: Draws) -> nn.Module:
    """The student ``start`` after this round's training on ``records``: see `train_private`."""
    training, mechanism = task.training, task.mechanism
    targets = logits_of(task.teacher, records.inputs) if training.alpha else None
    if mechanism is not None:
        return train_private(start, records, targets, mechanism, draws.private)
    return train_unprotected(
        start,
        records,
        targets,
        training.private_fit,
        draws.batches,
        alpha=training.alpha,
        temperature=training.temperature,
    )


def merge(
    student: nn.Module,
    teacher: nn.Module,
    start: nn.Module,
    training: StudentConfig,
    inputs: Tensor,
    generator: torch.Generator,
) -> nn.Module:
    """The student that a device is left with: ``start``, distilled toward `between_both`.

    Acts on public ``inputs`` ``[record, *shape]``: post-processing of what the student's DP-SGD paid for.

    Args:
        student: the device's own.
        teacher: the last one.
        start: a student freshly distilled from it.
        training: the weights of both, and how to distil.
        inputs: public.
        generator: of the batches.

    Raises:
        TrainingError: the student's weights are not finite, before or after.
    """
    targets = between_both(logits_of(student, inputs), logits_of(teacher, inputs), training.own_weight)
    return train_unprotected(
        start,
        unlabelled(inputs),
        targets,
        training.delivery_fit,
        generator,
        alpha=1.0,
        temperature=1.0,
    )


def between_both(student: Tensor, teacher: Tensor, own_weight: float) -> Tensor:
    """Logits of the mean of two models' probabilities, in which the student's weigh ``own_weight``.

    ``student`` and ``teacher`` are logits ``[record, class]``.
    """
    mean = own_weight * F.softmax(student, dim=-1) + (1 - own_weight) * F.softmax(teacher, dim=-1)
    return mean.log().clamp(min=_LEAST_LOGIT)


def unlabelled(inputs: Tensor) -> LabelledSet:
    """Public ``inputs`` for a training with all weight on soft targets, in which no label counts."""
    return LabelledSet(inputs, torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device))


def responses(logits: Tensor, question: Question) -> Tensor:
    """What devices send, bounded: a row's L2 norm is at most 1, or sqrt(2) for residuals.

    Args:
        logits: the students', ``[device, query, class]``.
        question: how to answer.
    """
    if question.kind == "votes":
        votes = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(torch.float32)
        # As a probability would: a channel then sends zeros for the device.
        return torch.where(logits.isfinite().all(-1, keepdim=True), votes, torch.nan)
    probabilities = F.softmax(logits, dim=-1)
    return probabilities - question.prior if question.kind == "residuals" else probabilities
