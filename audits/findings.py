"""What an attack found, beside what the ledger allows: the same unit, view and neighbouring relation."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias

from pydantic import Field, StrictBool, computed_field, model_validator

from attacks.registry import LABELS
from audits.estimators import Auc, TprAtFpr
from audits.estimators.rates import Interval
from privkd.privacy.bounds import crossed
from privkd.privacy.events import Unit
from privkd.records import Count, Measured, Real, Record

Verdict: TypeAlias = Literal["within bound", "no bound claimed", "ALARM"]
RECONSTRUCTION_FPR = 0.05
"""The false-positive rate at which a reconstruction's true-positive rate is stated."""


@dataclass(frozen=True)
class Refused:
    """A true-positive rate that too few non-members would carry, and why."""

    fpr: Real
    reason: str


@dataclass(frozen=True)
class Bound:
    """What one estimator proves of an attack's scores.

    Attributes:
        estimator: its name.
        assumes: what it takes for given, in words.
        epsilon_lower: ``None`` where it refuses the scores.
        counts: whether what it assumes is known of these scores, so that it may stand against a claim.
        reason: why it refuses, or what its own tests of the assumption found.
    """

    estimator: str
    assumes: str
    epsilon_lower: Real | None
    counts: StrictBool
    reason: str | None = None


class Finding(Record):
    """One attack on one view.

    Attributes:
        view: what the adversary sees.
        attack: its name.
        unit: of privacy, the same for both bounds.
        auc: with its interval; ``None`` where the attack gives guesses but no ranking.
        tpr_at_fpr: true-positive rates at fixed false-positive rates, or why one is refused.
        epsilon_lower: holds with probability ``confidence``, together with all others of its report.
        epsilon_upper: the ledger's.
        delta: of both.
        confidence: that all lower bounds of the report hold at once.
        members: scores of members.
        nonmembers: scores of non-members.
        estimator: that gave ``epsilon_lower``.
        balanced_accuracy: at the best threshold; ``None`` where nobody asked.
        bounds: what other estimators find, each under an assumption of its own.
    """

    view: str
    attack: str
    unit: Unit
    auc: Auc | None
    tpr_at_fpr: tuple[TprAtFpr | Refused, ...]
    epsilon_lower: Real
    epsilon_upper: Real
    delta: Real
    confidence: Real
    members: Count
    nonmembers: Count
    estimator: str
    balanced_accuracy: Interval | None = None
    bounds: tuple[Bound, ...] = ()

    @computed_field
    @property
    def neighbouring_relation(self) -> str:
        """In words."""
        return self.unit.neighbouring_relation

    @computed_field
    @property
    def verdict(self) -> Verdict:
        """A lower bound above the upper one is an alarm; an infinite upper bound claims nothing."""
        if math.isinf(self.epsilon_upper):
            return "no bound claimed"
        return "ALARM" if self.epsilon_lower > self.epsilon_upper else "within bound"

    @property
    def alarm_words(self) -> str:
        """How its bounds contradict each other."""
        words = crossed(
            self.unit,
            self.epsilon_lower,
            self.epsilon_upper,
            confidence=self.confidence,
            delta=self.delta,
        )
        return f"view {self.view}, attack {self.attack}: {words}"

    def against(self, epsilon_upper: float) -> Self:
        """The same finding beside another upper bound."""
        return self.model_copy(update={"epsilon_upper": epsilon_upper})

    def rate(self, fpr: float) -> TprAtFpr | None:
        """The true-positive rate at ``fpr``; ``None`` where it was not measured or refused."""
        measured = (rate for rate in self.tpr_at_fpr if isinstance(rate, TprAtFpr))
        return next((rate for rate in measured if math.isclose(rate.fpr, fpr)), None)

    def row(self) -> Mapping[str, Any]:
        """Its figures side by side; ``None`` is what was not measured or refused."""
        found: dict[str, Any] = {"view": self.view, "attack": self.attack, "unit": self.unit.value}
        measured: dict[str, Auc | TprAtFpr | None] = {"auc": self.auc}
        for rate in self.tpr_at_fpr:
            measured[f"tpr_at_fpr_{rate.fpr:g}"] = rate if isinstance(rate, TprAtFpr) else None
        for name, one in measured.items():
            found[name] = one.estimate if one else None
            found[f"{name}_low"] = one.low if one else None
            found[f"{name}_high"] = one.high if one else None
        kept = ("epsilon_lower", "epsilon_upper", "delta", "confidence", "members", "nonmembers", "estimator")
        return found | {name: getattr(self, name) for name in (*kept, "verdict")}


class LabelFinding(Record):
    """How much nearer a view brings the adversary to devices' class histograms: a matter of the device.

    Attributes:
        view: what the adversary sees.
        divergence: KL(true || guess) in nats, mean over the devices.
        blind: the same of the best guess without any answer, which is even.
        gain: mean of what the answers save of it, at most ``blind``; ``low`` and ``high`` are the ends of its
            interval by Student's t.
        low: see ``gain``.
        high: see ``gain``.
        confidence: of the interval.
        devices: attacked.
        epsilon_upper: the ledger's, of one device's whole contribution.
    """

    view: str
    divergence: Measured
    blind: Real
    gain: Real
    low: Real
    high: Real
    confidence: Real
    devices: Count
    epsilon_upper: Real

    @computed_field
    @property
    def attack(self) -> str:
        """Its name."""
        return LABELS

    @computed_field
    @property
    def unit(self) -> Unit:
        """Of privacy, of the upper bound."""
        return Unit.DEVICE

    @computed_field
    @property
    def reveals(self) -> bool:
        """Whether the interval of the gain lies above zero."""
        return self.low > 0


@dataclass(frozen=True)
class Success:
    """How often the attack picked the true candidate.

    Attributes:
        estimate: share of the trials.
        low: lower end of its two-sided Clopper-Pearson interval; ``high`` the upper end.
        chance: of an attack that sees nothing, under the same prior.
        trials: independent ones.
        confidence: of the interval.
    """

    estimate: Real
    low: Real
    high: Real
    chance: Real
    trials: Count
    confidence: Real


@dataclass(frozen=True)
class ImageScores:
    """Means over the trials of what the reconstruction has in common with its target.

    Attributes:
        ssim: structural similarity, 1 for equal images.
        psnr: peak signal-to-noise ratio in decibels.
        mse: mean squared error.
    """

    ssim: Measured
    psnr: Measured
    mse: Measured


@dataclass(frozen=True)
class PublicLikeness:
    """Whether the public data already looked like the target.

    Attributes:
        reconstruction_ssim: mean similarity of reconstruction and target.
        public_ssim: mean similarity of the target and the public image nearest to the reconstruction.
        explained: share of the trials in which the public image is at least as similar to the target as the
            reconstruction is, so that nothing was rebuilt that was not public before.
    """

    reconstruction_ssim: Measured
    public_ssim: Measured
    explained: Measured


@dataclass(frozen=True)
class AttributeScores:
    """Attributes of a record that were guessed right, and what the public marginals give away.

    Attributes:
        right: share of the attributes that the reconstruction has right.
        constant: share that the best constant guess has right, which the public records give.
        advantage: mean of ``right`` less ``constant`` over the trials; ``low`` and ``high`` are the ends of
            its two-sided Student interval.
    """

    right: Measured
    constant: Measured
    advantage: Measured
    low: Measured
    high: Measured


class ReconstructionFinding(Record):
    """One attack on one view.

    Attributes:
        view: what the adversary sees.
        attack: its name.
        target: what is rebuilt, in words.
        unit: of privacy, of the ceiling.
        prior: of the adversary, in words.
        success: of the re-identification.
        ceiling: most success that the ledger allows under the same prior (reconstruction robustness);
            ``None`` where it claims nothing about this unit.
        ssim: see `ImageScores`; so are ``psnr`` and ``mse``. ``None`` where there is no image.
        attributes: ``None`` where the records are images.
        tpr_at_fpr: true-positive rate of the reconstruction at `RECONSTRUCTION_FPR`.
        likeness: to the public data; ``None`` where there is no image.
        alarm_low: success is above this with the confidence of the report as a whole; ``None`` in records of
            version 0.1.0, which have its ``verdict`` alone.
        verdict: success above the ceiling, less its interval, is an alarm.
    """

    view: str
    attack: str
    target: str
    unit: Unit
    prior: str
    success: Success = Field(alias="reidentification")
    ceiling: Real | None
    ssim: Measured | None = None
    psnr: Measured | None = None
    mse: Measured | None = None
    attributes: AttributeScores | None = None
    tpr_at_fpr: TprAtFpr | Refused | None = None
    likeness: PublicLikeness | None = Field(default=None, alias="public_already_looks_like_this")
    alarm_low: Real | None = None
    verdict: Verdict = "no bound claimed"

    @model_validator(mode="before")
    @classmethod
    def _judged(cls, given: Any) -> Any:
        """The verdict follows from the figures, where these are there."""
        if not isinstance(given, dict) or not isinstance(given.get("alarm_low"), float):
            return given
        ceiling = given.get("ceiling")
        if ceiling is None:
            return given | {"verdict": "no bound claimed"}
        return given | {"verdict": "ALARM" if given["alarm_low"] > ceiling else "within bound"}

    @computed_field
    @property
    def neighbouring_relation(self) -> str:
        """In words."""
        return self.unit.neighbouring_relation

    @property
    def alarm_words(self) -> str:
        """How its success contradicts the ledger."""
        least = self.success.low if self.alarm_low is None else self.alarm_low
        ceiling = 1.0 if self.ceiling is None else self.ceiling
        return (
            f"view {self.view}, attack {self.attack}: the secret was picked in at least {100 * least:.3g} % "
            f"of the trials ({self.prior}), but the ledger allows at most {100 * ceiling:.3g} % per "
            f"{self.unit}"
        )

    def row(self) -> Mapping[str, Any]:
        """Its figures side by side; ``None`` is what was not measured."""
        success = self.success
        return {
            "view": self.view,
            "attack": self.attack,
            "target": self.target,
            "unit": self.unit.value,
            "prior": self.prior,
            "picked": success.estimate,
            "picked_low": success.low,
            "picked_high": success.high,
            "chance": success.chance,
            "trials": success.trials,
            "confidence": success.confidence,
            "ceiling": self.ceiling,
            "ssim": self.ssim,
            "psnr": self.psnr,
            "mse": self.mse,
            "attributes_right": self.attributes and self.attributes.right,
            "attributes_constant": self.attributes and self.attributes.constant,
            "verdict": self.verdict,
        }


def alarm_of(findings: Iterable[Finding | ReconstructionFinding]) -> str | None:
    """The worst of the findings that are alarms, if any is, in words."""
    alarms = [finding for finding in findings if finding.verdict == "ALARM"]
    if not alarms:
        return None
    worst = max(alarms, key=_excess)
    return f"{worst.alarm_words}; do not release, the mechanism or its accounting is broken"


def _excess(finding: Finding | ReconstructionFinding) -> float:
    if isinstance(finding, Finding):
        return finding.epsilon_lower - finding.epsilon_upper
    return (finding.alarm_low or finding.success.low) - (finding.ceiling or 0.0)
