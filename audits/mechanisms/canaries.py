"""Canaries in the gradient: the worst case that the accountant assumes, through the actual DP-SGD step.

The canaries are records of a linear probe whose clipped gradients are orthogonal (each moves two weights of
its own, a Dirac canary in the manner of Steinke, Nasr and Jagielski 2023), and whose norm before clipping is
far above the clip norm. The adversary sees the noised sum of every step. Neighbouring relation: add or remove
one canary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from audits.estimators import (
    BonferroniGuesses,
    FixedThreshold,
    SplitThreshold,
    clopper_pearson,
    epsilon_lower_bound,
    epsilon_lower_bound_one_run,
    f_dp_one_run,
    gaussian,
    one_run,
)
from audits.estimators.validation import Floats
from privkd.config import DpSgdConfig
from privkd.data.scenario import LabelledSet
from privkd.privacy.randomness import Randomness, SeededRandomness, seeded_generator
from privkd.training.dpsgd import Mechanism

DpSgdStep: TypeAlias = Callable[
    [Sequence[nn.Module], Sequence[LabelledSet], None, Mechanism, Sequence[Randomness]], Sequence[nn.Module]
]
"""An implementation of DP-SGD for many students, with the signature of `train_cohort`."""


LOUD = 1e3
"""Norm of a canary's gradient before clipping, in clip norms."""


@dataclass(frozen=True)
class Scores:
    """Scores of canaries, and which way each one's coin fell: float64 and bool ``[canary]``."""

    values: Floats
    inside: NDArray[np.bool_]

    @property
    def members(self) -> Floats:
        """Of the canaries that were in."""
        return self.values[self.inside]

    @property
    def nonmembers(self) -> Floats:
        """Of those that were out."""
        return self.values[~self.inside]


def probe(features: int) -> nn.Module:
    """The linear probe ``features -> 2 classes`` at zero, where every gradient's direction is known."""
    model = nn.Linear(features, 2, bias=False)
    nn.init.zeros_(model.weight)
    return model


def single_step(recipe: DpSgdConfig) -> DpSgdConfig:
    """One plain step of the recipe: what the weights become is the noised sum, up to public factors."""
    return recipe.model_copy(
        update={
            "steps": 1,
            "learning_rate": 1.0,
            "momentum": 0.0,
            "optimizer": "sgd",
            "part": "all",
            "averaging": 0.0,
        }
    )


def noised_sums(models: Sequence[nn.Module], mechanism: Mechanism) -> Tensor:
    """The noised gradient sums of one step from zero ``[model, parameter]``, in clip norms."""
    weights = torch.stack([next(model.parameters()).detach().flatten() for model in models])
    return -weights.double() * mechanism.expected_batch_size / mechanism.recipe.clip_norm


def dirac_scores(
    step: DpSgdStep, mechanism: Mechanism, steps: int, *, canaries: int, block: int, seed: int
) -> Scores:
    """Play the game once with ``canaries`` orthogonal canaries, spread over students of ``block`` each.

    The score is the log-likelihood ratio of a Poisson-sampled Gaussian mechanism, summed over ``steps``
    steps: the most powerful there is. Students hold disjoint canaries, so together they are one mechanism
    with the privacy of each.
    """
    students = -(-canaries // block)
    inside = torch.rand((students, block), generator=seeded_generator(seed, "audit", "dirac")) < 0.5
    loud = torch.eye(block) * (LOUD * mechanism.recipe.clip_norm)
    shards = [LabelledSet(loud[row], torch.zeros(int(row.sum()), dtype=torch.int64)) for row in inside]
    sources = [SeededRandomness(seed, "audit", "dirac", student) for student in range(students)]
    one = Mechanism(
        single_step(mechanism.recipe), mechanism.noise_multiplier, mechanism.expected_batch_size, 0.0, 1.0
    )
    scores = np.zeros((students, block))
    for _ in range(steps):
        trained = step([probe(block)] * students, shards, None, one, sources)
        sums = noised_sums(trained, one).reshape(students, 2, block)
        seen = ((sums[:, 1] - sums[:, 0]) / 2**0.5).numpy()
        scores += log_ratio(seen, mechanism.noise_multiplier, mechanism.recipe.sampling_rate)
    kept = np.arange(students * block) < canaries
    return Scores(scores.reshape(-1)[kept], inside.numpy().reshape(-1)[kept])


def log_ratio(seen: Floats, noise_multiplier: float, sampling_rate: float) -> Floats:
    """log of ``(1 - q) + q N(1, s) / N(0, s)`` at ``seen``, a noised sum in clip norms."""
    exponent = (2 * seen - 1) / (2 * noise_multiplier**2)
    if sampling_rate == 1:
        return exponent
    return np.logaddexp(np.log1p(-sampling_rate), np.log(sampling_rate) + exponent)


def bound_one_run(scores: Scores, *, sampling_rate: float, delta: float, confidence: float) -> float:
    """Lower bound from one run. Full batches are Gaussian, so they take the sharper f-DP estimator."""
    m = len(scores.values)
    rule = BonferroniGuesses(tuple(sorted({max(2, m // 50), max(2, m // 10), max(2, m // 3)})))
    return epsilon_lower_bound_one_run(
        scores.values,
        scores.inside,
        rule=rule,
        estimator=f_dp_one_run if sampling_rate == 1 else one_run,
        delta=delta,
        confidence=confidence,
    )


def bound_many_trials(
    scores: Scores, *, sampling_rate: float, delta: float, confidence: float, seed: int
) -> float:
    """Lower bound that takes each canary as a trial of its own, which orthogonal ones are.

    Full batches are exactly Gaussian, and the ratio's threshold is fixed at 0, where both errors are equal.
    Subsampled ones are not Gaussian: Clopper and Pearson's bound holds for any mechanism.
    """
    full = sampling_rate == 1
    return epsilon_lower_bound(
        scores.members,
        scores.nonmembers,
        rule=FixedThreshold(0.0) if full else SplitThreshold(seed),
        estimator=gaussian if full else clopper_pearson,
        delta=delta,
        confidence=confidence,
    )
