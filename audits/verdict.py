"""What an attack found, beside what the ledger allows: the same unit, view and neighbouring relation."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from audits.estimators import Auc, TprAtFpr
from privkd.errors import AuditAlarm
from privkd.privacy.bounds import crossed
from privkd.privacy.events import Unit

Verdict: TypeAlias = Literal["within bound", "no bound claimed", "ALARM"]


@dataclass(frozen=True)
class Refused:
    """A true-positive rate that too few non-members would carry, and why."""

    fpr: float
    reason: str


@dataclass(frozen=True)
class Finding:
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
    """

    view: str
    attack: str
    unit: Unit
    auc: Auc | None
    tpr_at_fpr: tuple[TprAtFpr | Refused, ...]
    epsilon_lower: float
    epsilon_upper: float
    delta: float
    confidence: float
    members: int
    nonmembers: int
    estimator: str

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

    def against(self, epsilon_upper: float) -> "Finding":
        """The same finding beside another upper bound."""
        return replace(self, epsilon_upper=epsilon_upper)


def raise_alarm(findings: Iterable[Finding]) -> None:
    """Do nothing, unless a finding is an alarm.

    Raises:
        AuditAlarm: it names the worst finding.
    """
    alarms = [finding for finding in findings if finding.verdict == "ALARM"]
    if not alarms:
        return
    worst = max(alarms, key=lambda finding: finding.epsilon_lower - finding.epsilon_upper)
    raise AuditAlarm(f"{worst.alarm_words}; do not release, the mechanism or its accounting is broken")
