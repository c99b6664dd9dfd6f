"""From what a view shows to a score for each guess about a coin."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from attacks.channel import ReleaseStatistics, matched_filter_log_ratio
from attacks.scores import SCORES, Evidence, Population, Shadows, rescaled_logit
from attacks.whitened import whitened_filter
from audits.release import Floats, Released

_CHUNK_ENTRIES = 1 << 24
"""Candidates times released entries at a time: bounds the memory of the shadow statistics."""

ScoreAll = Callable[[], Floats]
"""Scores ``[target, candidate]``; higher means more likely in."""


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


def score_attacks(
    signals: Signals,
    labels: NDArray[np.int64],
    population_labels: NDArray[np.int64],
    names: Sequence[str] = tuple(SCORES),
    prefix: str = "",
) -> dict[str, ScoreAll]:
    """Every score of ``attacks.scores`` on these signals, by ``prefix`` and its name."""
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

    return {prefix + name: partial(score, name) for name in names}


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
