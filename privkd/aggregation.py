"""From what each device sent to one answer a query: rules that a hostile device cannot move far.

The cloud holds these blocks already, so aggregating them is post-processing and costs nothing. A device that
follows the protocol sends rows of probabilities, of L2 norm at most 1, and perhaps noise on them; a hostile
one sends anything. A block with an entry that is not finite counts for nothing, under every rule.

Of ``n`` devices, a hostile one moves an entry of the ``mean`` at will, of the ``clipped_mean`` (each row
clipped to the longest honest norm) by at most ``2 / n`` where there is no noise, and a share of the ``votes``
by at most ``1 / n``. The coordinate-wise ``median`` (Yin et al. 2018) stays between honest answers as long as
fewer than half of the devices are hostile.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from privkd.errors import ChannelError

Rule: TypeAlias = Literal["mean", "clipped_mean", "median", "votes"]

_TAIL = 6.0
"""An honest row's noise is longer than ``sqrt(classes) + 6`` standard deviations with probability 2e-8."""

_MEDIAN_LOSS = math.sqrt(math.pi / 2)
"""Standard deviation of the median over that of the mean, for many normals; it is smaller for few."""


@dataclass(frozen=True)
class Aggregate:
    """One answer a query, float64 ``[query, class]``, and a bound on the standard deviation of the known
    noise on each entry."""

    answers: Tensor
    noise_std: float


def aggregate(answers: Tensor, noise_std: float, rule: Rule) -> Aggregate:
    """What the devices answer together.

    Args:
        answers: probabilities as they were received, ``[device, query, class]``; or ``[query, class]`` where
            the channel itself took the mean, which is then taken as it is.
        noise_std: known standard deviation of the noise on each entry.
        rule: see above.

    Raises:
        ChannelError: no device sent finite answers.
    """
    answers = answers.detach().to("cpu", torch.float64)
    if answers.ndim == 2:
        if not bool(answers.isfinite().all()):
            raise ChannelError("the released mean is not finite: nothing can be learned from it")
        return Aggregate(answers, noise_std)
    finite = answers[answers.flatten(1).isfinite().all(1)]
    if not len(finite):
        raise ChannelError("no device sent finite answers: nothing can be learned from this round")
    return _RULES[rule](finite, noise_std)


def _mean(answers: Tensor, noise_std: float) -> Aggregate:
    return Aggregate(answers.mean(0), noise_std / len(answers) ** 0.5)


def _clipped_mean(answers: Tensor, noise_std: float) -> Aggregate:
    bound = 1 + noise_std * (math.sqrt(answers.shape[-1]) + _TAIL)
    norms = torch.linalg.vector_norm(answers, dim=-1, keepdim=True)
    return _mean(answers * (bound / norms.clamp(min=bound)), noise_std)


def _median(answers: Tensor, noise_std: float) -> Aggregate:
    loss = _MEDIAN_LOSS if len(answers) > 2 else 1.0
    ordered, n = answers.sort(dim=0).values, len(answers)
    return Aggregate((ordered[(n - 1) // 2] + ordered[n // 2]) / 2, loss * noise_std / n**0.5)


def _votes(answers: Tensor, noise_std: float) -> Aggregate:
    """Noise may turn any vote: the standard deviation of their share is then at most ``0.5 / sqrt(n)``."""
    votes = F.one_hot(answers.argmax(-1), answers.shape[-1]).to(torch.float64)
    return Aggregate(votes.mean(0), 0.5 / len(answers) ** 0.5 if noise_std else 0.0)


_RULES: Mapping[Rule, Callable[[Tensor, float], Aggregate]] = {
    "mean": _mean,
    "clipped_mean": _clipped_mean,
    "median": _median,
    "votes": _votes,
}
