"""From the students' answers to what the teacher is asked to learn.

Everything here acts on public inputs, on the teacher, or on what a channel already released: it is
post-processing and costs nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from privkd.config import ReverseConfig

AnswerKind = Literal["probabilities", "votes", "residuals"]


def bounded_answers(logits: Tensor, teacher_probabilities: Tensor, kind: AnswerKind) -> Tensor:
    """What each device sends, bounded: a row's L2 norm is at most 1, or sqrt(2) for residuals.

    Args:
        logits: the students', ``[device, query, class]``.
        teacher_probabilities: the published teacher's, ``[query, class]``.
        kind: ``probabilities``, ``votes`` (one-hot first choices) or ``residuals`` (probabilities less
            the teacher's).
    """
    if kind == "votes":
        votes = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(torch.float32)
        # As a probability would: a channel then sends zeros for the device.
        return torch.where(logits.isfinite().all(-1, keepdim=True), votes, torch.nan)
    probabilities = F.softmax(logits, dim=-1)
    return probabilities - teacher_probabilities if kind == "residuals" else probabilities


def choose_queries(
    teacher_logits: Tensor, count: int, selection: Literal["uncertain", "random"], generator: torch.Generator
) -> Tensor:
    """Indices of ``count`` proxy records to ask about, ascending, int64 ``[query]``.

    ``uncertain`` takes those of the highest entropy of the teacher's answer, a public and free criterion;
    ties fall to the lower index.
    """
    count = min(count, len(teacher_logits))
    if selection == "random":
        order = torch.randperm(len(teacher_logits), generator=generator)
    else:
        log_probabilities = F.log_softmax(teacher_logits, dim=-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
        order = entropy.argsort(descending=True, stable=True).cpu()
    return order[:count].sort().values


def project_on_simplex(points: Tensor) -> Tensor:
    """Nearest probability vectors in L2, over the last axis (Duchi et al. 2008, Figure 1)."""
    # The projection does not change along (1, ..., 1), and near 0 a unit is not lost beside huge values.
    points = points - points.amax(-1, keepdim=True)
    ordered = points.sort(dim=-1, descending=True).values
    ranks = torch.arange(1, points.shape[-1] + 1, device=points.device, dtype=points.dtype)
    excess = (ordered.cumsum(-1) - 1) / ranks
    support = (ordered > excess).sum(-1, keepdim=True)
    threshold = excess.gather(-1, support - 1)
    return (points - threshold).clamp_(min=0)


def shrink(noisy: Tensor, prior: Tensor, noise_variance: Tensor) -> Tensor:
    """Posterior mean of the true mean answer, given the known noise variance.

    Entries are modelled as ``true ~ N(prior, v)`` and ``noisy ~ N(true, noise_variance)``; ``v`` is
    estimated from the release itself by its second moment (empirical Bayes, Efron & Morris 1973).

    Args:
        noisy: ``[query, class]``.
        prior: the teacher's probabilities ``[query, class]``.
        noise_variance: ``[query]``, public.
    """
    difference = noisy - prior
    if not len(noisy):
        return prior
    variance = (difference.square().mean() - noise_variance.mean()).clamp(min=0)
    kept = variance / (variance + noise_variance).clamp(min=1e-12)
    return prior + kept[:, None] * difference


@dataclass(frozen=True)
class Knowledge:
    """One release as the cloud keeps it: re-using it is free.

    Attributes:
        queries: proxy indices, int64 ``[query]``.
        answers: noisy mean probabilities, unbounded under noise, or labels, ``[query, class]``. A row of
            zeros is a query that was not answered: a vote without consensus.
        noise_std: known standard deviation of the noise on each entry.
    """

    queries: Tensor
    answers: Tensor
    noise_std: float


@dataclass(frozen=True)
class Targets:
    """What the teacher is asked to learn.

    Attributes:
        queries: proxy indices, int64 ``[query]``.
        probabilities: to learn, ``[query, class]``.
        weights: of each query, in [0, 1], ``[query]``.
        prior: what the teacher answers before, ``[query, class]``.
    """

    queries: Tensor
    probabilities: Tensor
    weights: Tensor
    prior: Tensor


def targets_of(buffer: Sequence[Knowledge], prior: Tensor, config: ReverseConfig) -> Targets:
    """Combine the releases in ``buffer``, oldest first, into targets.

    Per query the releases are averaged with weights ``memory ** age``, shrunk toward ``prior`` by the
    known noise variance, projected on the simplex, and only then sharpened: sharpening first would
    amplify the noise.

    Args:
        buffer: at least one release.
        prior: the teacher's probabilities on the whole proxy set ``[proxy, class]``.
        config: memory, sharpening and trust.

    Returns:
        Targets on the queries that were answered; none where nothing was.
    """
    total = torch.zeros(len(prior), dtype=torch.float64)
    sums = torch.zeros(prior.shape, dtype=torch.float64)
    variances = torch.zeros(len(prior), dtype=torch.float64)
    for age, knowledge in zip(range(len(buffer) - 1, -1, -1), buffer, strict=True):
        weight = config.memory**age
        answers = knowledge.answers.to("cpu", torch.float64)
        answered = (answers != 0).any(-1)
        queries = knowledge.queries[answered]
        total[queries] += weight
        sums[queries] += weight * answers[answered]
        variances[queries] += (weight * knowledge.noise_std) ** 2
    queries = torch.nonzero(total > 0).flatten()
    noise_variance = variances[queries] / total[queries].square()
    prior_there = prior.to("cpu", torch.float64)[queries]
    means = sums[queries] / total[queries, None]
    consensus = project_on_simplex(shrink(means, prior_there, noise_variance))
    weights = trust(consensus, prior_there, noise_variance.sqrt(), config)
    # Relative to the first choice, so that no power of it vanishes.
    sharpened = (consensus / consensus.amax(-1, keepdim=True)) ** config.sharpen
    sharpened = sharpened / sharpened.sum(-1, keepdim=True)
    return Targets(queries, sharpened.to(prior), weights.to(prior), prior[queries.to(prior.device)])


def trust(consensus: Tensor, prior: Tensor, noise_std: Tensor, config: ReverseConfig) -> Tensor:
    """1 where a target is worth learning, else 0, ``[query]``.

    Not learned: a consensus whose margin drowns in noise, and what the teacher already answers alike
    with ``confident`` probability.
    """
    best = consensus.topk(2, dim=-1).values
    clear = best[:, 0] - best[:, 1] >= config.margin * noise_std
    agrees = consensus.argmax(-1) == prior.argmax(-1)
    known = agrees & (prior.amax(-1) >= config.confident) & (config.confident < 1)
    return (clear & ~known).to(consensus.dtype)
