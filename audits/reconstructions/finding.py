"""What a reconstruction attack achieved, beside chance and beside the most that the ledger allows."""

from collections.abc import Iterable
from dataclasses import dataclass

from audits.estimators import TprAtFpr
from audits.verdict import Refused, Verdict
from privkd.errors import AuditAlarm
from privkd.privacy.events import Unit


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

    estimate: float
    low: float
    high: float
    chance: float
    trials: int
    confidence: float


@dataclass(frozen=True)
class ImageScores:
    """Means over the trials of what the reconstruction has in common with its target.

    Attributes:
        ssim: structural similarity, 1 for equal images.
        psnr: peak signal-to-noise ratio in decibels.
        mse: mean squared error.
    """

    ssim: float
    psnr: float
    mse: float


@dataclass(frozen=True)
class PublicLikeness:
    """Whether the public data already looked like the target.

    Attributes:
        reconstruction_ssim: mean similarity of reconstruction and target.
        public_ssim: mean similarity of the target and the public image nearest to the reconstruction.
        explained: share of the trials in which the public image is at least as similar to the target as the
            reconstruction is, so that nothing was rebuilt that was not public before.
    """

    reconstruction_ssim: float
    public_ssim: float
    explained: float


@dataclass(frozen=True)
class AttributeScores:
    """Attributes of a record that were guessed right, and what the public marginals give away.

    Attributes:
        right: share of the attributes that the reconstruction has right.
        constant: share that the best constant guess has right, which the public records give.
        advantage: mean of ``right`` less ``constant`` over the trials; ``low`` and ``high`` are the ends of
            its two-sided Student interval.
    """

    right: float
    constant: float
    advantage: float
    low: float
    high: float


@dataclass(frozen=True)
class ReconstructionFinding:
    """One attack on one view.

    Attributes:
        view: what the adversary sees.
        attack: its name.
        target: what is rebuilt, in words.
        unit: of privacy, of the ceiling.
        prior: of the adversary, in words.
        success: of the re-identification.
        ceiling: most success that the ledger allows under the same prior (reconstruction robustness), 1 where
            it claims nothing.
        claimed: whether the ledger claims anything about this unit.
        images: ``None`` where there is no image.
        attributes: ``None`` where the records are images.
        tpr_at_fpr: true-positive rate of the reconstruction at a fixed false-positive rate.
        likeness: to the public data; ``None`` where there is no image.
        alarm_low: success is above this with the confidence of the report as a whole.
    """

    view: str
    attack: str
    target: str
    unit: Unit
    prior: str
    success: Success
    ceiling: float
    claimed: bool
    images: ImageScores | None
    attributes: AttributeScores | None
    tpr_at_fpr: TprAtFpr | Refused | None
    likeness: PublicLikeness | None
    alarm_low: float

    @property
    def verdict(self) -> Verdict:
        """Success above the ceiling, less its interval, is an alarm."""
        if not self.claimed:
            return "no bound claimed"
        return "ALARM" if self.alarm_low > self.ceiling else "within bound"


@dataclass(frozen=True)
class ReconstructionReport:
    """All findings of a run, and the picture grids that were drawn, by their names in the run's folder."""

    run: str
    channel: str
    findings: tuple[ReconstructionFinding, ...]
    grids: tuple[str, ...]
    notes: tuple[str, ...]


def raise_reconstruction_alarm(findings: Iterable[ReconstructionFinding]) -> None:
    """Do nothing, unless a finding is an alarm.

    Raises:
        AuditAlarm: it names the worst finding.
    """
    alarms = [finding for finding in findings if finding.verdict == "ALARM"]
    if not alarms:
        return
    worst = max(alarms, key=lambda finding: finding.alarm_low - finding.ceiling)
    raise AuditAlarm(
        f"view {worst.view}, attack {worst.attack}: the secret was picked in at least "
        f"{100 * worst.alarm_low:.3g} % of the trials ({worst.prior}), but the ledger allows at most "
        f"{100 * worst.ceiling:.3g} % per {worst.unit}; do not release, the mechanism or its accounting is "
        "broken"
    )
