"""The attacks, as functions of arrays: none of them reads a run.

``attacks.lira_online`` and its like score membership, higher for members; `register` adds an attack of your
own, by a function of one `Evidence` or, on what crosses the channel, of one `ChannelEvidence`. `ATTACKS` has
them all by the names that ``privkd audit membership --attack`` takes. Everything is loaded when it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attacks.channel import distillation_lira, matched_filter_attack, whitened_filter_attack
    from attacks.evidence import ChannelEvidence, Evidence, Features
    from attacks.membership.baseline import attack_p, attack_r, global_loss
    from attacks.membership.bavaria import bavaria_offline, bavaria_online
    from attacks.membership.lira import lira_offline, lira_online
    from attacks.membership.quantile import quantile_regression
    from attacks.membership.rmia import rmia_offline, rmia_online
    from attacks.membership.shadows import Population, Shadows, rescaled_logit
    from attacks.reconstruction.inversion import (
        PairedAnswers,
        class_prototypes,
        paired_logits_inversion,
        training_based_inversion,
    )
    from attacks.reconstruction.matching import match_candidates, match_gradients, rebuild_records
    from attacks.registry import ATTACKS, Attack, register
    from attacks.release import label_distribution, matched_filter, whitened_filter

_HOMES = {
    "channel": ("distillation_lira", "matched_filter_attack", "whitened_filter_attack"),
    "evidence": ("ChannelEvidence", "Evidence", "Features"),
    "membership.baseline": ("attack_p", "attack_r", "global_loss"),
    "membership.bavaria": ("bavaria_offline", "bavaria_online"),
    "membership.lira": ("lira_offline", "lira_online"),
    "membership.quantile": ("quantile_regression",),
    "membership.rmia": ("rmia_offline", "rmia_online"),
    "membership.shadows": ("Population", "Shadows", "rescaled_logit"),
    "reconstruction.inversion": (
        "PairedAnswers",
        "class_prototypes",
        "paired_logits_inversion",
        "training_based_inversion",
    ),
    "reconstruction.matching": ("match_candidates", "match_gradients", "rebuild_records"),
    "registry": ("ATTACKS", "Attack", "register"),
    "release": ("label_distribution", "matched_filter", "whitened_filter"),
}
_HOME_OF = {name: f"attacks.{home}" for home, names in _HOMES.items() for name in names}

__all__ = [
    "ATTACKS",
    "Attack",
    "ChannelEvidence",
    "Evidence",
    "Features",
    "PairedAnswers",
    "Population",
    "Shadows",
    "attack_p",
    "attack_r",
    "bavaria_offline",
    "bavaria_online",
    "class_prototypes",
    "distillation_lira",
    "global_loss",
    "label_distribution",
    "lira_offline",
    "lira_online",
    "match_candidates",
    "match_gradients",
    "matched_filter",
    "matched_filter_attack",
    "paired_logits_inversion",
    "quantile_regression",
    "rebuild_records",
    "register",
    "rescaled_logit",
    "rmia_offline",
    "rmia_online",
    "training_based_inversion",
    "whitened_filter",
    "whitened_filter_attack",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'attacks' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
