"""What a mutant is."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

Put = Callable[[object, str, object], None]
"""``put(owner, name, value)`` sets an attribute: `pytest.MonkeyPatch.setattr`, or `setattr` in a process that
ends with its fault."""

Fault = Callable[[Put], None]


class Ends(Enum):
    """How the run of a mutant must end."""

    CAUGHT = "exit code 3: the audit finds it"
    REFUSED = "exit code 2: refused before anything is spent"
    REPLACED = "exit code 0: the proof rejects the computation, and another one is used, which is sound"


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: by which tests, and a party's process, know it.
        fault: in words.
        put: puts it into this process.
        settings: the names of those under which it matters, of `mutants.settings.SETTINGS`; one run each.
        by: the check that must fail where it is caught, or words of the refusal.
        power: how far what the check looks at is away from what is sound, where that can be computed.
        ends: how its run must end.
        in_parties: whether `mutants.parties` has it too, for the aggregators' own processes.
        quick: whether its run under the first settings is one of the fast tests.
    """

    name: str
    fault: str
    put: Fault
    settings: tuple[str, ...]
    by: str
    power: str
    ends: Ends = Ends.CAUGHT
    in_parties: bool = False
    quick: bool = False


def nowhere(put: Put) -> None:
    """The fault is in other processes alone."""


def variance_away(share: float, draws: int) -> str:
    """How far a ``share`` of the claimed variance is off, in standard deviations of a mean square."""
    off = abs(share - 1) / math.sqrt(2 / draws)
    return f"{share:.3g} of the variance over {draws:,} draws: {off:.0f} standard deviations"
