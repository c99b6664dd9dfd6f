"""The teacher's view: the teacher after it learned from a release, replayed once for each model."""

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audits.canaries import Pool
from audits.game import DeviceSide, Report
from audits.release import Floats, Released
from audits.traces import Cache
from privkd.aggregation import aggregate
from privkd.fitting import logits_of
from privkd.randomness import seeded_generator
from privkd.reverse import Knowledge, targets_of
from privkd.teacher import absorb


def absorbed_logits(
    side: DeviceSide, released: Released, others: Floats, pool: Pool, cache: Cache, role: str, report: Report
) -> tuple[Floats, Floats]:
    """Logits of each model's teacher after the last round ``[model, record, class]``.

    Each teacher is the one that the run published in its last round, after it absorbed that round's
    release of the replayed device and of the others, with the run's releases of the rounds before in its
    memory. The teacher before is the same for all models and public. ``others`` are what the other devices
    released on their own ``[other, round, query, class]``, if the channel shows that.

    Returns:
        On the candidates and on the population.
    """

    def compute() -> dict[str, Tensor]:
        candidates, population = [], []
        for model in range(len(released.answers)):
            teacher = _absorb(side, _knowledge(side, released, others, model))
            candidates.append(logits_of(teacher, pool.candidates.inputs).cpu())
            population.append(logits_of(teacher, pool.population.inputs).cpu())
            report(model + 1, len(released.answers))
        return {"candidates": torch.stack(candidates), "population": torch.stack(population)}

    found = cache.tensors({"what": f"teacher-{role}", "models": len(released.answers)}, compute)
    return _floats(found["candidates"]), _floats(found["population"])


def _floats(values: Tensor) -> Floats:
    return np.asarray(values.to(torch.float64).numpy(), dtype=np.float64)


def _absorb(side: DeviceSide, knowledge: Knowledge) -> nn.Module:
    game, last = side.game, side.rounds - 1
    teacher = copy.deepcopy(side.transcript.exchanges[last].teacher)
    buffer = [*(_published(side, round) for round in range(last)), knowledge]
    prior = F.softmax(logits_of(teacher, game.scenario.proxy), dim=-1)
    targets = targets_of(buffer, prior, game.config.reverse)
    generator = seeded_generator(game.config.seed, "absorb", last)
    return absorb(teacher, targets, game.data, game.config.reverse, generator).teacher


def _knowledge(side: DeviceSide, released: Released, others: Floats, model: int) -> Knowledge:
    last = side.rounds - 1
    answers = released.answers[model, last]
    if released.view == "per_client_logits":
        answers = np.concatenate([answers[None], others[:, last]])
    return _learned(side, last, torch.from_numpy(answers), released.noise_std)


def _published(side: DeviceSide, round: int) -> Knowledge:
    """The run's own release of an earlier round."""
    exchange = side.transcript.exchanges[round]
    return _learned(side, round, exchange.answers, exchange.noise_std)


def _learned(side: DeviceSide, round: int, answers: Tensor, noise_std: float) -> Knowledge:
    found = aggregate(answers + _baseline(side, round), noise_std, side.game.config.reverse.aggregation)
    return Knowledge(side.transcript.exchanges[round].queries, found.answers, found.noise_std)


def _baseline(side: DeviceSide, round: int) -> Tensor:
    baseline = side.baseline(round).cpu()
    return baseline if side.game.config.channel.answers == "residuals" else torch.zeros_like(baseline)
