"""The red team: what a run gives away, by attack, beside what its ledger allows.

Each function here takes a run or its folder (the latest one by default) and gives a value that knows its
record (``tree()``), its data frame (``to_frame()``), its table (in a terminal and in a notebook) and its
``alarm``. Rooms are named otherwise than the functions, so that importing one never hides the other.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from privkd.plugins import load_siblings

load_siblings("attacks")

if TYPE_CHECKING:
    from audits.beside import demo
    from audits.comparison import compare
    from audits.mechanism_audit import mechanism
    from audits.membership_audit import membership
    from audits.model_audit import model
    from audits.reconstructions.audit import reconstruction
    from audits.reports.compose import report
    from audits.scores_audit import scores
    from audits.sweeps.sweep import sweep
    from privkd.federation import Federation
    from privkd.privacy.bounds import Audited
    from privkd.progress import Progress
    from privkd.runs.checkpoint import State

__all__ = [
    "closing_audit",
    "compare",
    "demo",
    "mechanism",
    "membership",
    "model",
    "reconstruction",
    "report",
    "scores",
    "sweep",
]

_ROOMS = {
    "compare": "audits.comparison",
    "demo": "audits.beside",
    "mechanism": "audits.mechanism_audit",
    "membership": "audits.membership_audit",
    "model": "audits.model_audit",
    "reconstruction": "audits.reconstructions.audit",
    "report": "audits.reports.compose",
    "scores": "audits.scores_audit",
    "sweep": "audits.sweeps.sweep",
}


def __getattr__(name: str) -> Any:
    """A function from its room, which is loaded now: most of them need torch."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'audits' has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def closing_audit(federation: "Federation", state: "State", progress: "Progress") -> "Audited":
    """What a run ends with: see `audits.mechanisms.closing`, which is loaded when it is called."""
    from audits.mechanisms.closing import closing_audit as audit

    return audit(federation, state, progress)
