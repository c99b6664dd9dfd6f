"""What an audit proves of a run, to stand beside what the ledger promises."""

from dataclasses import dataclass

from privkd.events import Unit


@dataclass(frozen=True)
class LowerBound:
    """What an audit of the run's mechanisms proves: that it spends at least ``epsilon`` on ``unit``.

    It is wrong with probability ``1 - confidence`` at most, and rests on ``canaries`` trials; the delta and
    the neighbouring relation are those of the ledger's statement for the unit.
    """

    unit: Unit
    epsilon: float
    confidence: float
    canaries: int

    def alarm(self, epsilon_upper: float, delta: float) -> str | None:
        """The alarm in words, where the bound lies above the ledger's upper bound."""
        if self.epsilon <= epsilon_upper:
            return None
        words = crossed(self.unit, self.epsilon, epsilon_upper, confidence=self.confidence, delta=delta)
        return f"canaries through the run's own mechanism: {words}"


def crossed(unit: Unit, lower: float, upper: float, *, confidence: float, delta: float) -> str:
    """A lower bound above its upper bound, in words."""
    return (
        f"epsilon is at least {lower:.4g} per {unit} (confidence {100 * confidence:.4g} %), but the ledger "
        f"claims at most {upper:.4g} at delta {delta:g}"
    )
