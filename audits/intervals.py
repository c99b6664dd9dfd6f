"""Intervals of shares, of their differences, and of means."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from privkd.errors import InputError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and its two-sided interval at ``confidence``; ``n`` is what it rests on."""

    estimate: float
    low: float
    high: float
    n: int
    confidence: float = CONFIDENCE

    def within(self, least: float, most: float) -> "Interval":
        """The part in ``[least, most]``, outside of which the quantity cannot lie.

        Student's interval does not know that a share lies from 0 to 1; what is cut off costs no coverage.
        """
        # In this order NaN stays NaN.
        return replace(self, low=max(self.low, least), high=min(self.high, most))


def share(estimate: float, n: int) -> Interval:
    """Wilson's (1927) score interval of a share of ``n`` independent records.

    ``estimate`` may be a mean of several models' shares on the same records: a record's mean correctness
    varies at most as much as one coin, so the interval is then too wide rather than too narrow.

    Raises:
        InputError: ``estimate`` is no share, or ``n`` is not positive.
    """
    if not 0 <= estimate <= 1 or n < 1:
        raise InputError(f"share {estimate!r} of {n!r} records: expected a number of 0 to 1 of at least one")
    z = float(ndtri((1 + CONFIDENCE) / 2))
    centre = (estimate + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(estimate * (1 - estimate) / n + z * z / (4 * n * n))
    # Rounding must not part the interval from its estimate at 0 and 1.
    return Interval(estimate, min(estimate, max(0.0, centre - reach)), max(estimate, centre + reach), n)


def difference(first: Interval, second: Interval) -> Interval:
    """``first - second`` of two shares, by Newcombe's (1998) method 10 from their Wilson intervals.

    It takes the two samples as independent. Shares on the same records are correlated, nearly always
    positively; the interval is then wider than it need be.
    """
    apart = first.estimate - second.estimate
    down = math.hypot(first.estimate - first.low, second.high - second.estimate)
    up = math.hypot(first.high - first.estimate, second.estimate - second.low)
    return Interval(apart, apart - down, apart + up, min(first.n, second.n), first.confidence)


def mean_of(values: Sequence[float] | NDArray[np.float64]) -> Interval:
    """Student's t interval of the mean of ``[sample]``, normal errors assumed.

    It is unbounded for a single value, which tells nothing of others; one that is NaN makes all of it NaN.

    Raises:
        InputError: no value.
    """
    if not len(values):
        raise InputError("no value: there is no mean")
    sample = np.asarray(values, dtype=np.float64)
    mean, n = float(sample.mean()), len(sample)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, n)
    reach = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * float(sample.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - reach, mean + reach, n)
