"""Runs a study and sets what it found beside what was published."""

from dataclasses import dataclass

from audits.estimators.rates import Interval, mean_of
from papers.player import Player
from papers.quantity import Figures
from papers.study import Claim, Scale, Study
from privkd.result import plain


@dataclass(frozen=True)
class Answer:
    """A claim and our estimate of its quantity."""

    claim: Claim
    ours: Interval


@dataclass(frozen=True)
class Reproduction:
    """A study at one scale: its answers, in the order of its claims."""

    study: Study
    scale: Scale
    answers: tuple[Answer, ...]


def reproduce(study: Study, scale: Scale, seeds: int, player: Player) -> Reproduction:
    """Play every case of ``study`` for seeds ``0 .. seeds - 1`` and answer its claims.

    Raises:
        PrivkdError: as training and auditing do; runs that were finished are kept.
    """
    played: list[Figures] = [
        {case.name: player.figures(case, scale, seed) for case in study.cases} for seed in range(seeds)
    ]
    answers = [
        Answer(claim, mean_of([claim.quantity.of(figures) for figures in played]).within(*claim.range))
        for claim in study.claims
    ]
    return Reproduction(study, scale, tuple(answers))


def reproduction_tree(found: Reproduction) -> dict[str, object]:
    """What ``privkd papers run --json`` prints."""
    rows = [
        {
            "claim": answer.claim.text,
            "published": answer.claim.published,
            "ours": answer.ours.estimate,
            "low": answer.ours.low if answer.ours.n > 1 else None,
            "high": answer.ours.high if answer.ours.n > 1 else None,
            "seeds": answer.ours.n,
            "unit": answer.claim.unit,
        }
        for answer in found.answers
    ]
    return {
        "paper": found.study.name,
        "title": found.study.title,
        "scale": found.scale.name,
        "about": found.scale.about,
        "claims": plain(rows),
    }
