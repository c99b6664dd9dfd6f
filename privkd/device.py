"""A device: from a published task and its own records to the answer that its channel encodes.

It needs neither the cloud nor any other device. Private records enter here, and only bounded answers on
public inputs leave, for a channel that the ledger has paid for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privkd.data.scenario import LabelledSet
from privkd.messages import Question, Task
from privkd.privacy.randomness import Randomness
from privkd.training.dpsgd import train_private, train_unprotected
from privkd.training.fit import logits_of


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
