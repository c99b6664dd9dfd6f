"""Every attack on membership by its name, with the views that it reads. Higher scores mean members.

An attack on a model is a function of one `Evidence` and gives ``[sample]``; one on the channel is a function
of one `ChannelEvidence` and gives ``[target, candidate]``. `register` adds a user's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar, cast, overload

import numpy as np

from attacks.channel import distillation_lira, matched_filter_attack, whitened_filter_attack
from attacks.evidence import ChannelEvidence, Evidence, Floats
from attacks.membership.baseline import attack_p, attack_r, global_loss
from attacks.membership.bavaria import bavaria_offline, bavaria_online
from attacks.membership.lira import lira_offline, lira_online
from attacks.membership.quantile import quantile_regression
from attacks.membership.rmia import rmia_offline, rmia_online
from privkd.errors import InputError
from privkd.plugins import Registry

MembershipScore: TypeAlias = Callable[[Evidence], Floats]
"""Scores ``[sample]``; raises InputError where the evidence does not carry them."""
ChannelAttack: TypeAlias = Callable[[ChannelEvidence], Floats]
"""Scores ``[target, candidate]``; raises InputError where the evidence does not carry them."""
Score = TypeVar("Score", bound=MembershipScore)
OnChannel = TypeVar("OnChannel", bound=ChannelAttack)

MODEL_VIEWS = ("teacher", "student")
LABELS = "label-distribution"
"""Of the channel's views: it guesses a device's class histogram, not who is in its records."""
ONE_RUN = "canaries-one-run"
GRADIENT_ATTACKS = (ONE_RUN, "canaries-many-trials")
"""Canaries of the audit's own, which no function of arrays could play."""


@dataclass(frozen=True)
class Attack:
    """An attack and what it reads.

    Attributes:
        on: ``model``: ``score`` is a `MembershipScore`; ``channel``: it is a `ChannelAttack`.
        score: the function.
        views: of the models or of the channel; ``None``: all of them.
    """

    on: Literal["model", "channel"]
    score: MembershipScore | ChannelAttack
    views: tuple[str, ...] | None = None

    def reads(self, view: str) -> bool:
        """Whether ``view``, which is not that of the gradients, is one of its own."""
        of_kind = (view in MODEL_VIEWS) == (self.on == "model")
        return of_kind and (self.views is None or view in self.views)

    def scores(self, evidence: tuple[Evidence, ...] | ChannelEvidence) -> Floats:
        """The scores ``[target, candidate]`` on evidence of the attack's kind: one of each target, or of all.

        Raises:
            InputError: the function does not return a finite number for each of them.
        """
        if isinstance(evidence, ChannelEvidence):
            found = cast(ChannelAttack, self.score)(evidence)
            shape = (len(evidence.released), evidence.inside.shape[1])
        else:
            found = np.stack([cast(MembershipScore, self.score)(each) for each in evidence])
            shape = (len(evidence), len(evidence[0].target))
        scores = np.asarray(found, dtype=np.float64)
        if scores.shape != shape or not np.isfinite(scores).all():
            one = shape if self.on == "channel" else shape[1:]
            raise InputError(f"the attack's scores must be finite numbers of shape {one}")
        return scores


def _quantile(evidence: Evidence) -> Floats:
    return quantile_regression(
        evidence.target,
        evidence.features.candidates,
        nonmember_target=evidence.population.target,
        nonmember_features=evidence.features.population,
    )


ATTACKS: Registry[Attack] = Registry(
    "attack",
    {
        "lira-online": Attack("model", lambda e: lira_online(e.target, e.shadows)),
        "lira-offline": Attack("model", lambda e: lira_offline(e.target, e.shadows)),
        "rmia-online": Attack("model", lambda e: rmia_online(e.target, e.shadows, e.population)),
        "rmia-offline": Attack("model", lambda e: rmia_offline(e.target, e.shadows, e.population)),
        "bavaria-online": Attack("model", lambda e: bavaria_online(e.target, e.shadows)),
        "bavaria-offline": Attack("model", lambda e: bavaria_offline(e.target, e.shadows)),
        "attack-p": Attack("model", lambda e: attack_p(e.target, e.population.target)),
        "attack-r": Attack("model", lambda e: attack_r(e.target, e.shadows)),
        "global-loss": Attack("model", lambda e: global_loss(e.target)),
        "quantile-regression": Attack("model", _quantile),
        "matched-filter": Attack("channel", matched_filter_attack),
        "whitened-filter": Attack("channel", whitened_filter_attack),
        "distillation-lira": Attack("channel", distillation_lira),
    },
    reserved=("all", LABELS, *GRADIENT_ATTACKS),
)
"""Every attack by its name, in the order in which an audit makes them."""


@overload
def register(
    name: str, *, views: tuple[str, ...] | None = None, on: Literal["model"] = "model"
) -> Callable[[Score], Score]: ...
@overload
def register(
    name: str, *, views: tuple[str, ...] | None = None, on: Literal["channel"]
) -> Callable[[OnChannel], OnChannel]: ...
def register(
    name: str, *, views: tuple[str, ...] | None = None, on: Literal["model", "channel"] = "model"
) -> Callable[[Callable[..., Floats]], Callable[..., Floats]]:
    """Add the decorated function to `ATTACKS`, where ``privkd audit membership`` finds it.

    Args:
        name: of the attack: letters, digits, ``-`` and ``_``.
        views: that it reads, of `MODEL_VIEWS` or of the channel's. ``None``: all of them.
        on: what it attacks: see `Attack`.

    Raises:
        ConfigError: the name is taken.
        InputError: a view of models was given for an attack on the channel, or the other way round.
    """
    wrong = [view for view in views or () if (view in MODEL_VIEWS) != (on == "model")]
    if wrong:
        other = "channel" if on == "model" else "model"
        raise InputError(
            f"attack {name!r}: {wrong[0]!r} is no view of a {on}: give on={other!r}, or another view"
        )

    def enter(score: Callable[..., Floats]) -> Callable[..., Floats]:
        ATTACKS.add(name, Attack(on, score, views), score)
        return score

    return enter
