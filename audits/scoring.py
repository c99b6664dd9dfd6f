"""From what a view shows to a score for each guess about a coin."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attacks.membership.registry import (
    SCORES,
    Evidence,
    Population,
    Shadows,
    quantile_regression,
    rescaled_logit,
)
from attacks.release import ReleaseStatistics, matched_filter_log_ratio, whitened_filter
from audits.estimators.validation import Floats
from audits.game import Pool
from privkd.data.scenario import LabelledSet
from privkd.training.fit import logits_of

_CHUNK_ENTRIES = 1 << 24
"""Candidates times released entries at a time: bounds the memory of the shadow statistics."""

ScoreAll = Callable[[], Floats]
"""Scores ``[target, candidate]``; higher means more likely in."""


@dataclass(frozen=True)
class Released:
    """One view of the channel.

    Attributes:
        view: its name.
        answers: what the adversary sees, float64 ``[model, round, query, class]``.
        noise_std: public standard deviation of the noise on each entry.
        clean: the same before the noise, as shadow statistics want it.
        resolution: how near to a device's real answers the encoding comes, noise apart.
    """

    view: str
    answers: Floats
    noise_std: float
    clean: Floats
    resolution: float


@dataclass(frozen=True)
class Signals:
    """Logits of targets and shadows on the records, and the shadows' coins.

    Attributes:
        targets: on the candidates ``[target, candidate, class]``.
        shadows: likewise ``[shadow, candidate, class]``.
        target_population: on the population ``[target, population, class]``.
        shadow_population: likewise ``[shadow, population, class]``.
        inside: bool ``[shadow, candidate]``.
    """

    targets: Floats
    shadows: Floats
    target_population: Floats
    shadow_population: Floats
    inside: NDArray[np.bool_]


@dataclass(frozen=True)
class Features:
    """What is public about the records, for a regression of the signal on it.

    Attributes:
        candidates: float64 ``[candidate, feature]``.
        population: likewise ``[population, feature]``.
    """

    candidates: Floats
    population: Floats

    @classmethod
    def of(cls, public: nn.Module, pool: Pool) -> "Features":
        """A ``public`` model's logits on the pool's records, the labels, and the signal of both."""

        def features(records: LabelledSet) -> Floats:
            logits = logits_of(public, records.inputs).to("cpu", torch.float64).numpy()
            labels = records.labels.cpu().numpy()
            signal = rescaled_logit(logits, labels)
            return np.column_stack([logits, np.eye(logits.shape[1])[labels], signal])

        return cls(features(pool.candidates), features(pool.population))


def quantile_scores(
    signals: Signals, features: Features, labels: NDArray[np.int64], population_labels: NDArray[np.int64]
) -> Floats:
    """The quantile-regression attack ``[target, candidate]``: a regression on the population each target."""
    seen = rescaled_logit(signals.targets, labels)
    known = rescaled_logit(signals.target_population, population_labels)
    return np.stack(
        [
            quantile_regression(
                phi, features.candidates, nonmember_target=there, nonmember_features=features.population
            )
            for phi, there in zip(seen, known, strict=True)
        ]
    )


def score_attacks(
    signals: Signals,
    labels: NDArray[np.int64],
    population_labels: NDArray[np.int64],
    names: Sequence[str] = tuple(SCORES),
) -> dict[str, ScoreAll]:
    """Every score of ``attacks.membership.registry`` on these signals, by its name."""
    shadows = Shadows(rescaled_logit(signals.shadows, labels), signals.inside)
    targets = rescaled_logit(signals.targets, labels)
    seen = rescaled_logit(signals.target_population, population_labels)
    references = rescaled_logit(signals.shadow_population, population_labels)

    def score(name: str) -> Floats:
        return np.stack(
            [
                SCORES[name](Evidence(target, shadows, Population(there, references)))
                for target, there in zip(targets, seen, strict=True)
            ]
        )

    return {name: partial(score, name) for name in names}


def whitened_filter_scores(targets: Tensor, shadows: Tensor, inside: NDArray[np.bool_]) -> Floats:
    """The whitened filter's log-ratio for each target and candidate ``[target, candidate]``.

    ``targets`` and ``shadows`` are what each one released, ``[model, ...]``; ``inside`` are the shadows'
    coins ``[shadow, candidate]``.
    """
    return whitened_filter(targets.flatten(1).numpy(), shadows.flatten(1).numpy(), inside)


def matched_filter_scores(targets: Released, shadows: Released, inside: NDArray[np.bool_]) -> Floats:
    """The matched filter's log-ratio for each target and candidate ``[target, candidate]``.

    ``inside`` are the shadows' coins ``[shadow, candidate]``.
    """
    entries = shadows.clean[0].size
    chunk = max(1, _CHUNK_ENTRIES // entries)
    parts = []
    for start in range(0, inside.shape[1], chunk):
        statistics = ReleaseStatistics.from_runs(shadows.clean, inside[:, start : start + chunk])
        parts.append(
            np.stack(
                [
                    matched_filter_log_ratio(seen, statistics, noise_std=targets.noise_std)
                    for seen in targets.answers
                ]
            )
        )
    return np.concatenate(parts, axis=1)
