"""What a claim is about: a figure of a run, or a difference or ratio of such."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from privkd.errors import RunError

Figures: TypeAlias = Mapping[str, Mapping[str, float]]
"""One seed's figures: by case, then by their dotted names, such as ``teacher.after``."""


@dataclass(frozen=True)
class Figure:
    """The figure ``name`` of the run of ``case``."""

    case: str
    name: str

    def of(self, figures: Figures) -> float:
        """Its value.

        Raises:
            RunError: the run does not have it.
        """
        found = figures[self.case].get(self.name)
        if found is None:
            raise RunError(f"the run of case {self.case!r} has no figure {self.name!r}")
        return found


@dataclass(frozen=True)
class Difference:
    """``one`` less ``other``, seed by seed."""

    one: "Quantity"
    other: "Quantity"

    def of(self, figures: Figures) -> float:
        """Its value for one seed."""
        return self.one.of(figures) - self.other.of(figures)


@dataclass(frozen=True)
class Change:
    """By which share of ``other`` ``one`` differs from it, seed by seed."""

    one: "Quantity"
    other: "Quantity"

    def of(self, figures: Figures) -> float:
        """Its value for one seed; NaN where ``other`` is zero."""
        base = self.other.of(figures)
        return self.one.of(figures) / base - 1 if base else float("nan")


@dataclass(frozen=True)
class Share:
    """Which share of ``other`` ``one`` is, seed by seed."""

    one: "Quantity"
    other: "Quantity"

    def of(self, figures: Figures) -> float:
        """Its value for one seed; NaN where ``other`` is zero."""
        base = self.other.of(figures)
        return self.one.of(figures) / base if base else float("nan")


Quantity: TypeAlias = Figure | Difference | Change | Share
