"""The mean over seeds, and how sure it is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with Student's interval; ``low`` and ``high`` are ``None`` for fewer than two."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def clear_of_zero(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def t_interval(values: Sequence[float]) -> Estimate:
    """The mean of ``values`` ``[seed]`` and its two-sided 95 % t-interval, normal errors assumed.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("a mean of no values")
    mean = math.fsum(values) / len(values)
    if len(values) < 2 or math.isnan(mean):
        return Estimate(mean, None, None, len(values))
    from scipy.stats import t

    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * math.sqrt(variance / len(values))
    return Estimate(mean, mean - half, mean + half, len(values))
