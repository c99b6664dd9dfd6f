"""``privkd audit mechanism``: worst-case inputs through the installed channels and the installed DP-SGD step.

Each mechanism claims an event; the ledger's price of that event is the upper bound that the audit sets its
lower bound beside. A sound mechanism comes near it from below; a broken one goes above.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from audits.gradient import DpSgdStep, bound_many_trials, dirac_scores, one_by_one
from audits.processes import (
    AGGREGATORS,
    CLIP_NORM,
    RHO,
    OpenChannel,
    RunningChannel,
    bound_canaries,
    secure_channel,
)
from audits.release import Floats, ring_mean
from audits.verdict import Finding
from audits.worlds import (
    Bounded,
    DpSgdGame,
    ObserveSums,
    ReleaseMany,
    bound_worlds,
    channel_worlds,
    dp_sgd_worlds,
    observed,
)
from privkd.accounting import price
from privkd.bounds import Check
from privkd.channel import NoisedChannel
from privkd.cohort import train_cohort
from privkd.config import DpSgdConfig
from privkd.events import DpSgd, PrivacyEvent, Unit, ZCdp
from privkd.noise import NoiseRoot
from privkd.progress import Progress
from privkd.randomness import derive_seed
from privkd.student import Mechanism

_DELTA = 1e-5
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Level:
    """How sure a bound must be: at ``delta``, with probability ``confidence``."""

    delta: float = _DELTA
    confidence: float = _CONFIDENCE


@dataclass(frozen=True)
class MechanismReport:
    """All lower bounds beside the ledger's prices, and what the running secure channel was asked."""

    findings: tuple[Finding, ...]
    checks: tuple[Check, ...]


def audit_mechanisms(seed: int, progress: Progress, opened: OpenChannel = secure_channel) -> MechanismReport:
    """Audit all mechanisms as they are installed. All lower bounds hold together with 95 % confidence.

    ``opened`` is the secure channel with its processes, which start while the rest is audited.
    """
    running = RunningChannel(opened, seed)
    checks: list[Callable[[Level], Finding]] = [
        lambda level: audit_dirac(train_cohort, "DP-SGD, cohort", level, seed, canaries=100_000),
        lambda level: audit_dirac(one_by_one, "DP-SGD, Opacus", level, seed, canaries=10_000),
        *(partial(_audit_cohort, game, seed=seed) for game in GAMES),
        lambda level: audit_channel(noised_release(RHO, seed), "noised channel", level, seed, runs=20_000),
        lambda level: audit_channel(
            secure_release(RHO, seed), "secure channel, ring", level, seed, runs=4_000
        ),
        lambda level: audit_running(running, level),
    ]
    level = Level(confidence=1 - (1 - _CONFIDENCE) / len(checks))
    findings = []
    try:
        for number, check in enumerate(checks):
            progress.stage(f"mechanism audit {number + 1} of {len(checks)}")
            findings.append(check(level))
        return MechanismReport(tuple(findings), running.checks())
    finally:
        running.close()


FULL_BATCH = DpSgdGame(noise_multiplier=2.0, sampling_rate=1.0, steps=4, base=4, runs=3000)
"""Exactly Gaussian: mu = sqrt(steps) / noise multiplier = 1."""

SUBSAMPLED = DpSgdGame(noise_multiplier=2.0, sampling_rate=0.5, steps=8, base=0, runs=3000)
GAMES = (FULL_BATCH, replace(FULL_BATCH, base=1), SUBSAMPLED)
"""One other record, which the canary just outweighs, shows what is clipped after the average."""


def _audit_cohort(game: DpSgdGame, level: Level, *, seed: int) -> Finding:
    return audit_dp_sgd(observed(train_cohort), game, "DP-SGD, cohort", level, seed)


def audit_dp_sgd(observe: ObserveSums, game: DpSgdGame, name: str, level: Level, seed: int) -> Finding:
    """One canary joins other records, or does not; see `dp_sgd_worlds`."""
    worlds = dp_sgd_worlds(observe, game, derive_seed(seed, "mechanism", name))
    full = game.sampling_rate == 1
    bounded = bound_worlds(
        worlds, gaussian_curve=full, delta=level.delta, confidence=level.confidence, seed=seed
    )
    claim = DpSgd(game.noise_multiplier, game.sampling_rate, game.steps)
    others = "1 record" if game.base == 1 else f"{game.base} records"
    label = f"canary and {others}, q={game.sampling_rate:g}"
    return _finding(name, label, claim, bounded, level, "gaussian" if full else "clopper_pearson")


def audit_dirac(step: DpSgdStep, name: str, level: Level, seed: int, *, canaries: int) -> Finding:
    """Orthogonal canaries in full batches, each a trial of its own; see `dirac_scores`."""
    multiplier, steps = 1.0, 1
    mechanism = Mechanism(DpSgdConfig(sampling_rate=1.0), multiplier, 100.0, 0.0, 1.0)
    scores = dirac_scores(
        step, mechanism, steps, canaries=canaries, block=250, seed=derive_seed(seed, "dirac", name)
    )
    lower = bound_many_trials(
        scores, sampling_rate=1.0, delta=level.delta, confidence=level.confidence, seed=seed
    )
    bounded = Bounded(lower, min(len(scores.members), len(scores.nonmembers)))
    claim = DpSgd(multiplier, 1.0, steps)
    return _finding(name, "orthogonal canaries", claim, bounded, level, "gaussian")


def audit_channel(
    release: ReleaseMany, name: str, level: Level, seed: int, *, runs: int, rho: float = RHO
) -> Finding:
    """One device's block is far too long, or zero; see `channel_worlds`."""
    worlds = channel_worlds(release, clip_norm=CLIP_NORM, runs=runs)
    bounded = bound_worlds(
        worlds, gaussian_curve=True, delta=level.delta, confidence=level.confidence, seed=seed
    )
    return _finding(name, "huge block or none", ZCdp(rho), bounded, level, "gaussian")


def audit_running(running: RunningChannel, level: Level) -> Finding:
    """Orthogonal devices through the secure channel's processes, for a cloud that no aggregator helps."""
    scores = running.canaries()
    lower = bound_canaries(scores, delta=level.delta, confidence=level.confidence)
    bounded = Bounded(lower, min(len(scores.members), len(scores.nonmembers)))
    return _finding("secure channel, running", "orthogonal devices", ZCdp(RHO), bounded, level, "gaussian")


def noised_release(rho: float | None, seed: int) -> ReleaseMany:
    """The noised channel's own code; each run is a device of its own, which draws noise of its own."""
    channel = NoisedChannel(CLIP_NORM, rho, NoiseRoot.from_seed(seed))

    def release(blocks: Tensor) -> Floats:
        names = [f"run-{number}" for number in range(len(blocks))]
        return channel.release(blocks, devices=names, round=0).answers.numpy().astype(np.float64)

    return release


def secure_release(rho: float | None, seed: int) -> ReleaseMany:
    """The secure channel's own arithmetic in the ring: two devices, of which one sends nothing.

    One honest aggregator must be enough, so all others tell the adversary their noise.
    """
    root = NoiseRoot.from_seed(seed)

    def release(blocks: Tensor) -> Floats:
        return np.stack(
            [
                ring_mean(
                    torch.stack([block, torch.zeros_like(block)]),
                    CLIP_NORM,
                    rho,
                    AGGREGATORS,
                    NoiseRoot(root.subkey("run", run, float(block.sum()).hex())),
                    colluding=AGGREGATORS - 1,
                )[0]
                for run, block in enumerate(blocks)
            ]
        )

    return release


def _finding(
    name: str, game: str, claim: PrivacyEvent, bounded: Bounded, level: Level, estimator: str
) -> Finding:
    return Finding(
        view=name,
        attack=game,
        unit=Unit.DEVICE if isinstance(claim, ZCdp) else Unit.RECORD,
        auc=None,
        tpr_at_fpr=(),
        epsilon_lower=bounded.epsilon,
        epsilon_upper=price([claim], level.delta).high,
        delta=level.delta,
        confidence=_CONFIDENCE,
        members=bounded.runs,
        nonmembers=bounded.runs,
        estimator=estimator,
    )
