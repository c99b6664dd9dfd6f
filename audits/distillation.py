"""Distillation LiRA: the target record is never queried, only a surrogate distilled from the releases is.

Jagielski et al. 2023 (arXiv 2303.03446), Shi 2025 (arXiv 2502.08001).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from audits.game import DeviceSide
from audits.release import Released
from privkd.cohort import cohort_answers, fit_cohort
from privkd.config import FitConfig
from privkd.data.scenario import LabelledSet
from privkd.randomness import seeded_generator
from privkd.reverse import project_on_simplex

_FIT = FitConfig(steps=300, batch_size=64, learning_rate=5e-3)
_NOISY_FIT = _FIT.model_copy(update={"steps": 100})
"""Longer, a surrogate learns the noise."""
_MATCHING = 5.0
"""Temperature at which answers without noise are learned: hot enough that a surrogate matches all logits,
those of small probabilities included, which tell most about a record (Hinton et al. 2015, section 2.1)."""
FLOOR = 1e-4
"""A released probability below this is taken as this where its logarithm would tell of noise alone."""


def surrogate_logits(
    side: DeviceSide, released: Released, inputs: Tensor, seed: int, report: Callable[[int], None]
) -> Tensor:
    """Logits of one surrogate for each model ``[model, record, class]`` on ``inputs``, float32 on the CPU.

    Each surrogate starts from the public student of the last round and learns the released answers by
    ``KL(released || surrogate)``. All are trained as one vectorised program. Without noise it learns the last
    round's answers alone, which are one student's; noise is worth averaging over the students of all rounds.
    """
    start = side.starts[-1][0]
    noisy = released.noise_std > 0
    rounds = range(side.rounds) if noisy else range(side.rounds - 1, side.rounds)
    queries = torch.cat([side.queries(round) for round in rounds])
    unlabelled = torch.zeros(len(queries), dtype=torch.int64, device=inputs.device)
    logs = log_probabilities(side, released, FLOOR if noisy else released.resolution)
    targets = list(logs[:, list(rounds)].flatten(1, 2).to(inputs.device, torch.float32))
    models: list[nn.Module] = fit_cohort(
        [start] * len(targets),
        [LabelledSet(queries, unlabelled)] * len(targets),
        targets,
        _NOISY_FIT if noisy else _FIT,
        [seeded_generator(seed, "audit", "surrogate", model) for model in range(len(targets))],
        alpha=1.0,
        temperature=1.0 if noisy else _MATCHING,
        progress=report,
    )
    return cohort_answers(models, inputs).cpu()


def log_probabilities(side: DeviceSide, released: Released, floor: float) -> Tensor:
    """The releases' log-probabilities, at least ``log(floor)``: float64 ``[model, round, query, class]``."""
    answers = torch.from_numpy(released.answers)
    if side.game.config.channel.answers == "residuals":
        answers = answers + torch.stack([side.baseline(round).cpu() for round in range(side.rounds)])
    return project_on_simplex(answers).clamp_min(floor).log()
