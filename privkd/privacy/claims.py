"""What an epsilon and a delta are worth, said where they are worth little.

Every sentence here is spelled once; the plan carries it, and whoever shows a plan or a result shows it.
"""

import math

from privkd.errors import ConfigError
from privkd.privacy.events import Unit

LARGEST_DELTA = 0.01
"""Above it a delta must be allowed by name."""
LARGEST_EPSILON = 20.0
"""Above it an epsilon is called what it is."""

_DECIMALS = 10


def check_delta(delta: float, *, allowed: bool) -> None:
    """Do nothing where ``delta`` is small, or its size was ``allowed``.

    Raises:
        ConfigError: it is above `LARGEST_DELTA`.
    """
    if delta > LARGEST_DELTA and not allowed:
        raise ConfigError(
            f"privacy.delta={delta:g}: above {LARGEST_DELTA:g} it promises next to nothing, as publishing "
            f"each record with probability {delta:g} would satisfy it; take 1e-5, or allow it with "
            "--set privacy.allow_large_delta=true"
        )


def warnings_on(unit: Unit, epsilon: float, delta: float, population: int) -> tuple[str, ...]:
    """What must be said of a claim of (``epsilon``, ``delta``) differential privacy; mostly nothing.

    An infinite epsilon claims nothing, so nothing is said of it here.

    Args:
        unit: of privacy; its neighbouring relation is `Unit.neighbouring_relation`.
        epsilon: the upper bound of the whole run.
        delta: likewise.
        population: how many records or persons a device holds, nominally, or how many devices there are. A
            delta above its inverse allows a mechanism that publishes one of them at random, whole (Dwork and
            Roth 2014, section 2.3).
    """
    if math.isinf(epsilon):
        return ()
    said = []
    whose = "devices" if unit is Unit.DEVICE else f"{unit.value}s of a device"
    if delta * population > 1:
        said.append(
            f"delta {delta:g} per {unit} is too large: above 1/n = {1 / population:.3g} (n = {population:,} "
            f"{whose}) it allows a mechanism that publishes one {unit} whole; take one far below, such as "
            f"{1 / (100 * population):.0e}"
        )
    if epsilon > LARGEST_EPSILON:
        said.append(
            f"epsilon {epsilon:.4g} per {unit} is hardly a promise: an attacker who held the {unit} to be as "
            f"likely in as out could become {certainty(epsilon)} sure; take one of a few units"
        )
    return tuple(said)


def certainty(epsilon: float) -> str:
    """What an epsilon lets an adversary be certain of, who held a fact to be as likely true as not.

    ``e^epsilon / (1 + e^epsilon)`` in percent (Wasserman and Zhou 2010), with as many digits as it takes to
    tell it from certainty.
    """
    doubt = 1 / (1 + math.exp(min(epsilon, 700.0)))
    decimals = math.ceil(-math.log10(100 * doubt))
    if decimals < 1:
        return f"{100 * (1 - doubt):.3g} %"
    if decimals > _DECIMALS:
        return f"more than 99.{'9' * _DECIMALS} %"
    return f"{100 * (1 - doubt):.{decimals}f} %"
