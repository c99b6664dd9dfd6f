"""From what a view shows to a score for each guess about a coin."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from attacks.evidence import ChannelEvidence, Evidence, Features
from attacks.membership.shadows import Population, Shadows, rescaled_logit
from attacks.registry import ATTACKS
from audits.estimators.validation import Floats
from audits.game import Pool
from privkd.data.scenario import LabelledSet
from privkd.training.fit import logits_of


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


def features_of(public: nn.Module, pool: Pool) -> Features:
    """A ``public`` model's logits on the pool's records, the labels, and the signal of both."""

    def features(records: LabelledSet) -> Floats:
        logits = logits_of(public, records.inputs).to("cpu", torch.float64).numpy()
        labels = records.labels.cpu().numpy()
        signal = rescaled_logit(logits, labels)
        return np.column_stack([logits, np.eye(logits.shape[1])[labels], signal])

    return Features(features(pool.candidates), features(pool.population))


def evidence_on_models(signals: Signals, pool: Pool, public: nn.Module) -> tuple[Evidence, ...]:
    """What the scores of models look at, of each target; ``public`` is a model that anybody may query."""
    labels, elsewhere = pool.candidates.labels.cpu().numpy(), pool.population.labels.cpu().numpy()
    shadows = Shadows(rescaled_logit(signals.shadows, labels), signals.inside)
    targets = rescaled_logit(signals.targets, labels)
    seen = rescaled_logit(signals.target_population, elsewhere)
    references = rescaled_logit(signals.shadow_population, elsewhere)
    features = features_of(public, pool)
    return tuple(
        Evidence(target, shadows, Population(there, references), features)
        for target, there in zip(targets, seen, strict=True)
    )


def scores_of(attack: str, evidence: tuple[Evidence, ...] | ChannelEvidence) -> Floats:
    """The attack's scores ``[target, candidate]``, of ``attacks.registry`` by name.

    Raises:
        ConfigError: there is no attack of this name.
        InputError: it fails, or returns something else.
    """
    found = ATTACKS[attack]
    with ATTACKS.guarded(attack):
        return found.scores(evidence)
