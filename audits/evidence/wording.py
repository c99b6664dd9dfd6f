"""How figures are spelt for people: always with their unit or interval."""

import math

from audits.estimators.rates import Interval
from privkd.privacy.events import DpSgd, NoPrivacy, PostProcessing, PrivacyEvent, ZCdp


def epsilon_text(value: float) -> str:
    """An epsilon, to four digits."""
    return "inf" if math.isinf(value) else f"{value:.4g}"


def counted(number: int, thing: str) -> str:
    """A number of things: ``1 round``, ``1,000 devices``."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def percent(interval: Interval) -> str:
    """A share with its interval."""
    low, high = 100 * interval.low, 100 * interval.high
    return f"{100 * interval.estimate:.1f} % [{_end(low)}, {_end(high)}]"


def points(interval: Interval) -> str:
    """A difference of two shares with its interval."""
    low, high = 100 * interval.low, 100 * interval.high
    return f"{100 * interval.estimate:+.1f} points [{_end(low, '+')}, {_end(high, '+')}]"


def event_text(event: PrivacyEvent) -> str:
    """What was done, with its public parameters."""
    match event:
        case DpSgd(noise, rate, steps):
            return f"DP-SGD: {steps} steps, noise multiplier {noise:.4g}, sampling rate {rate:g}"
        case ZCdp(rho):
            return f"noised release, {rho:.4g}-zCDP"
        case PostProcessing(of):
            return f"free: post-processing of {of}"
        case NoPrivacy(reason):
            return f"no guarantee: {reason}"


def _end(value: float, sign: str = "") -> str:
    if math.isinf(value):
        return "-inf" if value < 0 else "inf"
    return f"{value:{sign}.1f}"
