"""The audit that every training run ends with: canaries through the very mechanisms that it used.

It meets what the run claims for a record and for a device with the worst case that the accountant assumes. It
looks at clipping, sampling and noise, not at data or models, so it takes seconds; `audits.membership` attacks
what the run really shows.
"""

import numpy as np
import torch
from torch import Tensor

from audits.gradient import (
    LOUD,
    DpSgdStep,
    Scores,
    bound_many_trials,
    dirac_scores,
    log_ratio,
    one_by_one,
)
from audits.processes import bound_canaries
from audits.release import Floats, per_client, ring_mean
from privkd.bounds import LowerBound
from privkd.cohort import train_cohort
from privkd.events import Unit
from privkd.federation import Game
from privkd.noise import NoiseRoot
from privkd.progress import Progress
from privkd.randomness import derive_seed, seeded_generator

CONFIDENCE = 0.999
"""Of all bounds of one run together: a sound run ends in an alarm with at most the rest."""
_MOST, _MOST_ONE_BY_ONE, _FEWEST = 20_000, 5_000, 2_000
"""Canaries; a long run has fewer, and a lower bound for it."""
_STEPS = 1_000
"""Of DP-SGD, beyond which a run is followed no longer."""
_CANARY_STEPS, _CANARY_RELEASES = 2_000_000, 100_000
_BLOCK, _DEVICES = 250, 500
"""Orthogonal records in one student, orthogonal devices in one release of the secure channel."""


def closing_audit(game: Game, progress: Progress) -> tuple[LowerBound, ...]:
    """A lower bound for each unit that the run protects; see `LowerBound`.

    There is none for a unit without protection, for votes, and for noise that the devices add together.
    Neighbouring relations are the ledger's: add or remove one record, zero out one device.
    """
    progress.stage("audit: canaries through the run's own mechanisms")
    seed = derive_seed(game.config.seed, "audit", "closing")
    plan, channel = game.plan, game.config.channel
    counted = plan.rho is not None and plan.votes is None and channel.noise_from == "aggregators"
    units = [Unit.RECORD] * (game.mechanism is not None) + [Unit.DEVICE] * counted
    confidence = 1 - (1 - CONFIDENCE) / max(1, len(units))
    bound = {Unit.RECORD: _record_bound, Unit.DEVICE: _device_bound}
    return tuple(bound[unit](game, confidence, seed) for unit in units)


def _record_bound(game: Game, confidence: float, seed: int) -> LowerBound:
    plan = game.plan
    scores = record_scores(game, seed)
    epsilon = bound_many_trials(
        scores, sampling_rate=plan.sampling_rate, delta=plan.delta, confidence=confidence, seed=seed
    )
    return LowerBound(Unit.RECORD, epsilon, confidence, len(scores.values))


def _device_bound(game: Game, confidence: float, seed: int) -> LowerBound:
    plan = game.plan
    scores = device_scores(game, seed)
    epsilon = bound_canaries(scores, delta=plan.delta, confidence=confidence)
    return LowerBound(Unit.DEVICE, epsilon, confidence, len(scores.values))


def record_scores(game: Game, seed: int) -> Scores:
    """Orthogonal records through DP-SGD steps of the run's engine, as many as it took in all its rounds."""
    mechanism, plan = game.mechanism, game.plan
    assert mechanism is not None
    steps = min(plan.steps * plan.rounds, _STEPS)
    canaries = _affordable(_CANARY_STEPS, steps)
    step: DpSgdStep = train_cohort
    if game.config.student.engine == "opacus":
        canaries, step = min(canaries, _MOST_ONE_BY_ONE), one_by_one
    return dirac_scores(step, mechanism, steps, canaries=canaries, block=_BLOCK, seed=seed)


def _affordable(work: int, times: int) -> int:
    return min(_MOST, max(_FEWEST, work // times))


def device_scores(game: Game, seed: int) -> Scores:
    """Devices whose answers are far too long, or zero, by a fair coin each, through all releases of the run.

    Each is seen alone: its answers lie in an entry of their own. All aggregators but one tell the adversary
    their noise.
    """
    canaries = _affordable(_CANARY_RELEASES, game.plan.rounds) // _DEVICES * _DEVICES
    coins = torch.rand(canaries, generator=seeded_generator(seed, "coins")) < 0.5
    released = _noised if game.config.channel.kind == "noised" else _summed
    seen, spread = released(game, coins, NoiseRoot.from_seed(seed))
    clip_norm = game.plan.clip_norm
    ratios = log_ratio(seen / clip_norm, spread / clip_norm, 1.0).sum(axis=0)
    return Scores(ratios, coins.numpy())


def _noised(game: Game, coins: Tensor, root: NoiseRoot) -> tuple[Floats, float]:
    """Each canary's noised entry ``[round, canary]``, and the noise's standard deviation."""
    blocks = (coins * (LOUD * game.plan.clip_norm))[:, None, None, None].expand(-1, game.plan.rounds, 1, 1)
    released = per_client(blocks, game.plan, root)
    return released.answers[:, :, 0, 0].T, released.noise_std


def _summed(game: Game, coins: Tensor, root: NoiseRoot) -> tuple[Floats, float]:
    """The same out of sums over ``_DEVICES`` canaries each."""
    plan, aggregators = game.plan, game.config.channel.aggregators
    loud = torch.eye(_DEVICES) * (LOUD * plan.clip_norm)
    spread, rounds = 0.0, []
    for round in range(plan.rounds):
        sums = []
        for number, present in enumerate(coins.reshape(-1, _DEVICES)):
            mean, noise_std = ring_mean(
                (loud * present[:, None])[:, :, None],
                plan.clip_norm,
                plan.rho,
                aggregators,
                NoiseRoot(root.subkey("closing", round, number)),
                colluding=aggregators - 1,
            )
            sums.append(mean[:, 0] * _DEVICES)
            spread = noise_std * _DEVICES
        rounds.append(np.concatenate(sums))
    return np.stack(rounds), spread
