"""Membership scores by name, each a function of one evidence: the matrices that an attack may look at.

Higher always means more likely a member. To add a score, write it as a function of matrices and name it here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from attacks.membership.baseline import attack_p, attack_r, global_loss
from attacks.membership.bavaria import bavaria_offline, bavaria_online
from attacks.membership.lira import lira_offline, lira_online
from attacks.membership.quantile import quantile_regression
from attacks.membership.rmia import rmia_offline, rmia_online
from attacks.membership.shadows import (
    Population,
    Shadows,
    rescaled_logit,
    rescaled_logit_of_log_probabilities,
)


@dataclass(frozen=True)
class Evidence:
    """All that the scores of ``SCORES`` read.

    Attributes:
        target: float64 ``[sample]``, the target model's rescaled logits on the candidates.
        shadows: the shadow models' on the same candidates, and which they were trained on.
        population: both models' on further non-members.
    """

    target: NDArray[np.float64]
    shadows: Shadows
    population: Population


MembershipScore: TypeAlias = Callable[[Evidence], NDArray[np.float64]]
"""Scores ``[sample]``; raises InputError where the evidence does not carry them."""

SCORES: Mapping[str, MembershipScore] = MappingProxyType(
    {
        "lira-online": lambda e: lira_online(e.target, e.shadows),
        "lira-offline": lambda e: lira_offline(e.target, e.shadows),
        "rmia-online": lambda e: rmia_online(e.target, e.shadows, e.population),
        "rmia-offline": lambda e: rmia_offline(e.target, e.shadows, e.population),
        "bavaria-online": lambda e: bavaria_online(e.target, e.shadows),
        "bavaria-offline": lambda e: bavaria_offline(e.target, e.shadows),
        "attack-p": lambda e: attack_p(e.target, e.population.target),
        "attack-r": lambda e: attack_r(e.target, e.shadows),
        "global-loss": lambda e: global_loss(e.target),
    }
)
"""Quantile regression is not among them: it reads features of the records, see ``quantile_regression``."""

__all__ = [
    "SCORES",
    "Evidence",
    "MembershipScore",
    "Population",
    "Shadows",
    "attack_p",
    "attack_r",
    "bavaria_offline",
    "bavaria_online",
    "global_loss",
    "lira_offline",
    "lira_online",
    "quantile_regression",
    "rescaled_logit",
    "rescaled_logit_of_log_probabilities",
    "rmia_offline",
    "rmia_online",
]
