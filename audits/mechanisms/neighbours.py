"""Two worlds, with and without: many runs of a mechanism in each, and a bound on what tells them apart.

The adversary is fitted, not assumed: a normal law for each world on half of the runs, its likelihood ratio as
the score on the other half. So a bug need not be foreseen to be found: a noise that is too small, missing or
repeated, a scale that depends on who is there, an entry that nobody noised. Subsampled mechanisms are not
normal, so the ratios of two ways to draw batches stand beside the fitted one; which score is taken is settled
on the fitting half as well.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor, nn

from audits.estimators import (
    FixedThreshold,
    SplitThreshold,
    clopper_pearson,
    epsilon_lower_bound,
    gaussian,
)
from audits.estimators.validation import Floats
from audits.mechanisms.canaries import LOUD, log_ratio, noised_sums, probe, single_step
from privkd.config import DpSgdConfig, StudentConfig
from privkd.data.scenario import Device, LabelledSet
from privkd.engines.simulation import RandomnessOf, Simulation
from privkd.privacy.randomness import derive_seed
from privkd.training.dpsgd import Mechanism

_RIDGE = 1e-6
_TINY = 1e-12

Score: TypeAlias = Callable[[Floats], Floats]
"""From features ``[run, feature]`` to a score ``[run]``; higher means the canary is more likely there."""


@dataclass(frozen=True)
class Worlds:
    """What the adversary sees of each run.

    Attributes:
        without: float64 ``[run, feature]``.
        with_canary: as many runs, likewise.
        ratios: which features are log-likelihood ratios, each a score by itself.
    """

    without: Floats
    with_canary: Floats
    ratios: tuple[int, ...] = ()

    def __getitem__(self, runs: slice) -> "Worlds":
        return Worlds(self.without[runs], self.with_canary[runs], self.ratios)


@dataclass(frozen=True)
class Bounded:
    """A lower bound, and on how many runs of each world it rests."""

    epsilon: float
    runs: int


def bound_worlds(
    worlds: Worlds, *, gaussian_curve: bool, delta: float, confidence: float, seed: int
) -> Bounded:
    """Settle on a score with the first half of the runs, bound on the second.

    Args:
        worlds: the runs.
        gaussian_curve: the mechanism is claimed to be exactly Gaussian, which allows the sharper estimator;
            the threshold is then fixed at a ratio of 1.
        delta: of the bound.
        confidence: of the bound.
        seed: of the split that chooses the threshold otherwise.
    """

    def bound(score: Score, runs: Worlds) -> float:
        return epsilon_lower_bound(
            score(runs.with_canary),
            score(runs.without),
            rule=FixedThreshold(0.0) if gaussian_curve else SplitThreshold(seed, share=0.3),
            estimator=gaussian if gaussian_curve else clopper_pearson,
            delta=delta,
            confidence=confidence,
        )

    half = len(worlds.without) // 2
    score = _best_score(worlds[:half], bound)
    return Bounded(bound(score, worlds[half:]), len(worlds.without) - half)


def _best_score(worlds: Worlds, bound: Callable[[Score, Worlds], float]) -> Score:
    """The fitted ratio or one of ``worlds.ratios``: which bounds more on runs that nothing was fitted to."""
    if not worlds.ratios:
        return fitted_log_ratio(worlds.without, worlds.with_canary)
    half = len(worlds.without) // 2
    fitted = fitted_log_ratio(worlds.without[:half], worlds.with_canary[:half])
    scores: list[Score] = [fitted, *(partial(_column, number=number) for number in worlds.ratios)]
    return max(scores, key=lambda score: bound(score, worlds[half:]))


def _column(values: Floats, number: int) -> Floats:
    return values[:, number]


def fitted_log_ratio(without: Floats, with_canary: Floats) -> Callable[[Floats], Floats]:
    """Log-ratio of two normal laws fitted to samples ``[run, feature]``, as a function of such samples."""
    pooled = np.concatenate([without, with_canary])
    centre, spread = pooled.mean(axis=0), pooled.std(axis=0)
    scale = np.where(spread > _TINY, spread, 1.0)

    def law(sample: Floats) -> Callable[[Floats], Floats]:
        standard = (sample - centre) / scale
        mean = standard.mean(axis=0)
        covariance = np.atleast_2d(np.cov(standard, rowvar=False)) + _RIDGE * np.eye(standard.shape[1])
        precision, log_volume = np.linalg.inv(covariance), np.linalg.slogdet(covariance)[1]

        def log_density(values: Floats) -> Floats:
            away = (values - centre) / scale - mean
            return -0.5 * (np.einsum("rf,fg,rg->r", away, precision, away) + log_volume)

        return log_density

    inside, outside = law(with_canary), law(without)
    return lambda values: inside(values) - outside(values)


@dataclass(frozen=True)
class DpSgdGame:
    """One canary joins ``base`` records whose gradients all point the other way.

    Attributes:
        noise_multiplier: claimed.
        sampling_rate: claimed.
        steps: observed one by one.
        base: records that are always there.
        runs: of each world.
        clip_norm: public.
        features: of each record; all but the first are zero, so that only noise fills their weights.
        noise: the run's source of samples and noise.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int
    base: int
    runs: int
    clip_norm: float = 1.0
    features: int = 32
    noise: Literal["seeded", "system"] = "seeded"

    @property
    def mechanism(self) -> Mechanism:
        """One step, with the public normaliser of a full shard."""
        recipe = DpSgdConfig(sampling_rate=self.sampling_rate, clip_norm=self.clip_norm)
        expected = self.sampling_rate * (self.base + 1)
        return Mechanism(single_step(recipe), self.noise_multiplier, expected, 0.0, 1.0)


ObserveSums: TypeAlias = Callable[[LabelledSet, DpSgdGame, int], Tensor]
"""All runs of one world, given its records, the game and a seed: the noised sums of every step in clip norms,
``[run, step, parameter]``."""


def observed(randomness_of: Callable[[int], RandomnessOf]) -> ObserveSums:
    """What the call leaves that trains a run's devices, ``game.steps`` times in each run, from zero weights.

    ``randomness_of`` is that of `federation.Game`; a world is a round of its own.
    """

    def observe(shard: LabelledSet, game: DpSgdGame, seed: int) -> Tensor:
        names, source = [f"audit-{run:05d}" for run in range(game.runs)], randomness_of(seed)
        # One source for all steps of a run, as on a device in one round.
        sources = {name: source(name) for name in names}
        simulation = Simulation(tuple(Device(name, shard, shard) for name in names), StudentConfig())
        models: list[nn.Module] = [probe(game.features)] * game.runs
        sums = []
        for _ in range(game.steps):
            trained = simulation.train_private(
                models, None, game.mechanism, sources.__getitem__, lambda done: None
            )
            sums.append(noised_sums(trained, game.mechanism))
        return torch.stack(sums, dim=1)

    return observe


def dp_sgd_worlds(observe: ObserveSums, game: DpSgdGame, seed: int) -> Worlds:
    """Both worlds of one mechanism, seen through ``observe``."""
    records = torch.zeros(game.base + 1, game.features)
    records[:, 0] = LOUD * game.clip_norm
    records[-1, 0] *= -1
    labels = torch.zeros(game.base + 1, dtype=torch.int64)
    shards = [LabelledSet(records[: game.base], labels[: game.base]), LabelledSet(records, labels)]
    without, with_canary = (
        _dp_sgd_features(observe(shard, game, derive_seed(seed, "audit", "world", world)), game)
        for world, shard in enumerate(shards)
    )
    # The last two features are ratios; full batches leave nothing to draw, and the fitted one is exact.
    ratios = () if game.sampling_rate == 1 else (-2, -1)
    return Worlds(without, with_canary, ratios)


def _dp_sgd_features(sums: Tensor, game: DpSgdGame) -> Floats:
    """Features of the noised sums ``[run, step, parameter]``, in clip norms.

    The canary's component, summed by the step's place in an epoch of ``1 / q`` steps, how far it spreads over
    the steps, how large all other components are, which only noise should fill, and its ratios under Poisson
    sampling and under shuffling.
    """
    rows = sums.numpy().reshape(*sums.shape[:2], 2, game.features)
    along = ((rows[:, :, 0, 0] - rows[:, :, 1, 0]) / 2**0.5).astype(np.float64)
    across = rows[:, :, :, 1:].reshape(len(rows), -1)
    epoch = round(1 / game.sampling_rate)
    poisson = log_ratio(
        along + game.base * (game.sampling_rate == 1), game.noise_multiplier, game.sampling_rate
    ).sum(axis=1)
    columns = [
        _log(along.std(axis=1)),
        _log(np.linalg.norm(across, axis=1)),
        poisson,
        _shuffled_log_ratio(along, epoch, game),
    ]
    return np.concatenate([_by_place(along, epoch), np.stack(columns, axis=1)], axis=1)


def _shuffled_log_ratio(values: Floats, epoch: int, game: DpSgdGame) -> Floats:
    """Log-ratio of values ``[run, step]`` if every epoch deals each record to one batch of a fixed size.

    The others fill every place of every batch with -1 but one, which is empty or holds the canary, a 1; all
    steps of the epoch are as likely to have it (the worst case of Chua et al. 2024 for shuffling). Steps
    beyond the last whole epoch are not looked at.
    """
    epochs = values.shape[1] // epoch
    full = game.sampling_rate * (game.base + 1)
    above = values[:, : epochs * epoch].reshape(len(values), epochs, epoch) + full
    variance = game.noise_multiplier**2
    with_canary = logsumexp((2 * above - 2) / variance, axis=2)
    without = logsumexp((above - 0.5) / variance, axis=2)
    return np.asarray((with_canary - without).sum(axis=1), dtype=np.float64)


def _by_place(values: Floats, epoch: int) -> Floats:
    """Values ``[run, step]`` summed over epochs ``[run, place]``: what a fixed order of batches betrays."""
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % epoch)))
    return padded.reshape(len(values), -1, epoch).sum(axis=1)


ReleaseMany: TypeAlias = Callable[[Tensor], Floats]
"""A channel's releases of one device's blocks ``[run, query, class]``, each by itself: ``[run, ...]``."""


def channel_worlds(release: ReleaseMany, *, clip_norm: float, runs: int) -> Worlds:
    """One device's block is far too long and all along one entry, or all zero."""
    loud = torch.zeros(runs, 2, 3)
    loud[:, 0, 0] = LOUD * clip_norm

    def features(blocks: Tensor) -> Floats:
        seen = release(blocks).reshape(runs, -1).astype(np.float64)
        rest = _log(np.linalg.norm(seen[:, 1:], axis=1))
        return np.concatenate([seen, rest[:, None]], axis=1)

    return Worlds(features(torch.zeros_like(loud)), features(loud))


def _log(values: Floats) -> Floats:
    return np.log(np.maximum(values, _TINY))
