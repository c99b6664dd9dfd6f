"""``privkd audit scores``: what scores of members and non-members prove, whatever they come from."""

from collections.abc import Sequence
from pathlib import Path

from numpy.typing import ArrayLike

from attacks.evidence import Evidence
from attacks.membership.shadows import Population, Shadows
from attacks.registry import ATTACKS
from audits.bounding import Claim, bounds_of, claimed, counting, rate_or_refusal
from audits.estimators import auc, balanced_accuracy
from audits.findings import Finding
from audits.score_files import ScoreSet, read_scores, score_set
from audits.score_outputs import write_scores
from audits.tables import Scored, ScoresReport
from privkd.errors import InputError
from privkd.privacy.events import Unit

VIEW = "scores"
_RATES = (0.01, 0.001)
_STUDENT = "student"
"""A view of models: what reads it reads any model's signals."""


def scores(
    scores: ArrayLike,
    member: ArrayLike,
    *,
    epsilon: float | None = None,
    delta: float | None = None,
    independent: bool = False,
    gaussian: bool = False,
    confidence: float = 0.95,
    population: ArrayLike | None = None,
    targets: int | None = None,
    out: str | Path | None = None,
) -> ScoresReport:
    """Audit scores of members and non-members of any training.

    Args:
        scores: ``[sample]``, higher means more likely a member; or ``[model, sample]``, signals of models
            such as rescaled logits, on which all attacks on models are played.
        member: of the same shape: 0, 1 or truth values.
        epsilon: claimed, per record; by default nothing is.
        delta: of the claim; 1e-5 where nothing is claimed.
        independent: see `Claim`; so are ``gaussian`` and ``confidence``.
        gaussian: see `Claim`.
        confidence: see `Claim`.
        population: ``[model, other]``, signals of samples that no model was trained on.
        targets: how many of the first models are audited, by default one; the others are shadows.
        out: folder for the report, tables and figures.

    Raises:
        DataError: as `score_set`.
        RunError: a file cannot be written.
        InputError: as `Claim`, or an ``epsilon`` without its ``delta``.
    """
    claim = claimed(epsilon, delta, independent=independent, gaussian=gaussian, confidence=confidence)
    given = score_set(scores, member, population=population, targets=targets)
    found = audit_scores(given, claim, "arrays")
    return found if out is None else write_scores(found, Path(out))


def scores_of_file(path: Path, claim: Claim, *, out: Path | None = None) -> ScoresReport:
    """Audit the scores in a file, and write what was found to the folder ``out`` if there is one.

    Raises:
        DataError: as `read_scores`.
        RunError: a file cannot be written.
    """
    found = audit_scores(read_scores(path), claim, str(path))
    return found if out is None else write_scores(found, out)


def audit_scores(given: ScoreSet, claim: Claim, source: str, target: str | None = None) -> ScoresReport:
    """All attacks that apply to the scores, and all bounds that they give.

    Args:
        given: the scores.
        claim: what they are held against.
        source: where they come from.
        target: what was attacked, in words.
    """
    scored, refused = _attacked(given)
    each = 1 - (1 - claim.confidence) / (counting(claim) * len(scored))
    return ScoresReport(
        source=source,
        target=target or _words(given),
        epsilon_upper=claim.epsilon,
        delta=claim.delta,
        confidence=claim.confidence,
        independent=claim.independent,
        gaussian=claim.gaussian,
        findings=tuple(_finding(one, claim, each) for one in scored),
        refused=tuple(refused),
        scored=tuple(scored),
    )


def _words(given: ScoreSet) -> str:
    models = "model" if given.targets == 1 else "models"
    shadows = f", {given.shadows:,} shadow models" if given.shadows else ""
    return f"{given.targets:,} audited {models}{shadows}, {given.scores.shape[1]:,} samples each."


def _attacked(given: ScoreSet) -> tuple[Sequence[Scored], Sequence[str]]:
    """Each attack's scores over all audited models; of those that the matrix does not carry, the reasons."""
    inside = given.member[: given.targets].reshape(-1)
    if not given.shadows:
        return [Scored(VIEW, "score", given.scores.reshape(-1), inside)], []
    evidence, found, refused = _evidence(given), [], []
    for name in ATTACKS:
        if not ATTACKS[name].reads(_STUDENT):
            continue
        try:
            with ATTACKS.guarded(name):
                values = ATTACKS[name].scores(evidence)
        except InputError as error:
            refused.append(f"{name}: {error}")
        else:
            found.append(Scored(VIEW, name, values.reshape(-1), inside))
    return found, refused


def _evidence(given: ScoreSet) -> tuple[Evidence, ...]:
    shadows = Shadows(given.scores[given.targets :], given.member[given.targets :])
    others: Sequence[Population | None] = [None] * given.targets
    if given.population is not None:
        references = given.population[given.targets :]
        others = [Population(row, references) for row in given.population[: given.targets]]
    return tuple(
        Evidence(row, shadows, there)
        for row, there in zip(given.scores[: given.targets], others, strict=True)
    )


def _finding(scored: Scored, claim: Claim, each: float) -> Finding:
    """The highest of the bounds that count stands against the claim; 0 where none does."""
    members, nonmembers, bounds = scored.members, scored.nonmembers, bounds_of(scored, claim, each)
    known = [(bound.epsilon_lower, bound.estimator) for bound in bounds if bound.counts]
    told = [(epsilon, name) for epsilon, name in known if epsilon is not None]
    epsilon_lower, estimator = max(told, default=(0.0, "none"))
    return Finding(
        view=scored.view,
        attack=scored.attack,
        unit=Unit.RECORD,
        auc=auc(members, nonmembers),
        tpr_at_fpr=tuple(rate_or_refusal(scored, fpr) for fpr in _RATES),
        epsilon_lower=epsilon_lower,
        epsilon_upper=claim.epsilon,
        delta=claim.delta,
        confidence=claim.confidence,
        members=len(members),
        nonmembers=len(nonmembers),
        estimator=estimator,
        balanced_accuracy=balanced_accuracy(members, nonmembers),
        bounds=bounds,
    )
