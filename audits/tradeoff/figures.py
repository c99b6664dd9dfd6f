"""The three pictures of a curve: what it gains, what it leaks for that, and how theory holds."""

from collections.abc import Mapping

from audits.tradeoff.curve import Curve
from audits.tradeoff.leak import draw_leak
from audits.tradeoff.points import points_of
from audits.tradeoff.theory import draw_theory
from audits.tradeoff.utility import draw_utility

FIGURES = {
    "utility": "Accuracy of teacher and students against the record-level budget, beside control and ceiling",
    "leak": "What attacks find against the accuracy that the teacher gains, by channel and budget",
    "theory": "Lower bounds from attacks against the ledger's upper bound, by view; one mark is one run",
}


def draw_figures(curve: Curve) -> Mapping[str, Mapping[str, bytes]]:
    """Each figure of ``FIGURES`` that the finished cells allow, as ``{"svg": ..., "png": ...}``."""
    points = [point for point in points_of(curve) if point.gain is not None]
    if not points:
        return {}
    found = {"utility": draw_utility(curve, points)}
    if curve.views:
        found |= {"leak": draw_leak(curve, points), "theory": draw_theory(curve)}
    return found
