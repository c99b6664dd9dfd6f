"""The losses of distillation, forward and reverse. Pure functions.

Teacher first, student second, everywhere: ``KL(teacher || student)``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def soft_targets(logits: Tensor, temperature: float) -> Tensor:
    """``softmax(logits / temperature)`` over the last axis (Hinton et al. 2015)."""
    return F.softmax(logits / temperature, dim=-1)


def divergence(targets: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``KL(targets || softmax(logits / temperature))`` per example, ``[..., class]`` to ``[...]``.

    ``targets`` are probabilities; a zero entry contributes nothing.
    """
    log_predictions = F.log_softmax(logits / temperature, dim=-1)
    return (torch.xlogy(targets, targets) - targets * log_predictions).sum(-1)


def forward_loss(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, *, alpha: float, temperature: float
) -> Tensor:
    """``(1 - alpha) CE(labels) + alpha T^2 KL(teacher || student)`` per example (Hinton et al. 2015).

    Args:
        logits: the student's, ``[..., class]``.
        labels: int64 ``[...]``.
        teacher_logits: the frozen teacher's, ``[..., class]``; ``None`` trains directly on the labels.
        alpha: weight of the teacher, in [0, 1].
        temperature: of both distributions in the teacher's term.
    """
    flat = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none")
    direct = flat.reshape(labels.shape)
    if teacher_logits is None or alpha == 0.0:
        return direct
    targets = soft_targets(teacher_logits, temperature)
    return (1 - alpha) * direct + alpha * temperature**2 * divergence(targets, logits, temperature)


@dataclass(frozen=True)
class ReverseWeights:
    """Weights of the reverse loss: ``trust`` in the release, ``anchor`` to the teacher before it."""

    trust: float
    anchor: float


def reverse_loss(
    public_logits: Tensor,
    labels: Tensor,
    proxy_logits: Tensor,
    targets: Tensor,
    query_weights: Tensor,
    old_probabilities: Tensor,
    weights: ReverseWeights,
) -> Tensor:
    """``CE(public) + trust mean(w KL(target || teacher)) + anchor mean(KL(old || teacher))``, a scalar.

    Args:
        public_logits: the teacher's, on labelled public records ``[record, class]``.
        labels: of those records, int64 ``[record]``.
        proxy_logits: the teacher's, on proxy queries ``[query, class]``.
        targets: probabilities learned from the release ``[query, class]``.
        query_weights: trust in each target, ``[query]``, in [0, 1].
        old_probabilities: of the teacher before the update ``[query, class]``.
        weights: see `ReverseWeights`.
    """
    loss = F.cross_entropy(public_logits, labels)
    loss = loss + weights.trust * (query_weights * divergence(targets, proxy_logits)).mean()
    if weights.anchor:
        loss = loss + weights.anchor * divergence(old_probabilities, proxy_logits).mean()
    return loss
