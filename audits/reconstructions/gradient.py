"""Prior-aware matching in the gradient view: the accountant's worst case, through the DP-SGD step.

Each trial's candidates are records of a linear probe whose clipped gradients form a simplex, so that no
others of their norm are easier to tell apart. Trials move weights of their own, so they are independent;
the adversary sees the noised sum of every step. Neighbouring relation: add or remove one record.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from attacks.reconstruction.matching import match_gradients, simplex
from audits.mechanisms.canaries import LOUD, DpSgdStep, noised_sums, probe, single_step
from privkd.data.scenario import LabelledSet
from privkd.privacy.randomness import SeededRandomness, seeded_generator
from privkd.training.dpsgd import Mechanism

Floats = NDArray[np.float64]

_STUDENTS = 40


@dataclass(frozen=True)
class GradientGame:
    """How often, and among how many candidates: ``trials`` are rounded up to a multiple of 40."""

    trials: int
    candidates: int
    steps: int


def simplex_scores(
    step: DpSgdStep, mechanism: Mechanism, game: GradientGame, seed: int
) -> tuple[Floats, NDArray[np.int64]]:
    """Play the game through ``step``: log-likelihoods ``[trial, candidate]``, and the secrets ``[trial]``."""
    groups, kappa = -(-game.trials // _STUDENTS), game.candidates
    generator = seeded_generator(seed, "audit", "simplex")
    secrets = torch.randint(kappa, (_STUDENTS, groups), generator=generator)
    gradients = simplex(kappa)
    loud = torch.from_numpy(gradients).to(torch.float32) * (LOUD * mechanism.recipe.clip_norm)
    shards = [_records(loud[row]) for row in secrets]
    sources = [SeededRandomness(seed, "audit", "simplex", student) for student in range(_STUDENTS)]
    one = Mechanism(
        single_step(mechanism.recipe), mechanism.noise_multiplier, mechanism.expected_batch_size, 0.0, 1.0
    )
    seen = []
    for _ in range(game.steps):
        trained = step([probe(groups * kappa)] * _STUDENTS, shards, None, one, sources)
        sums = noised_sums(trained, one).reshape(_STUDENTS, 2, groups * kappa)
        seen.append(((sums[:, 1] - sums[:, 0]) / 2**0.5).reshape(-1, kappa).numpy())
    scores = match_gradients(
        np.stack(seen, axis=1),
        gradients,
        noise_multiplier=mechanism.noise_multiplier,
        sampling_rate=mechanism.recipe.sampling_rate,
    )
    return scores, secrets.reshape(-1).numpy()


def _records(chosen: torch.Tensor) -> LabelledSet:
    """One record a group ``[group, candidate]``, each with features of its own group alone."""
    groups, kappa = chosen.shape
    inputs = torch.zeros(groups, groups, kappa)
    inputs[torch.arange(groups), torch.arange(groups)] = chosen
    return LabelledSet(inputs.reshape(groups, -1), torch.zeros(groups, dtype=torch.int64))
