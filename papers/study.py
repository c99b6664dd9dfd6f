"""A paper's claims as declarations: which runs, which figures of them, and what was published."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Literal, TypeAlias

from papers.measurements import FULL, Effort, Measurement
from privkd.errors import ConfigError, RunError

Figures: TypeAlias = Mapping[str, Mapping[str, float]]
"""One seed's figures: by case, then by their dotted names, such as ``teacher.after``."""
Unit: TypeAlias = Literal["%", "points", "share", "similarity", "epsilon"]
"""How a quantity is printed: a share or a change in per cent, a difference in points, or as it is."""
_RANGES = {"share": (0.0, 1.0), "similarity": (-1.0, 1.0), "epsilon": (0.0, math.inf)}


@dataclass(frozen=True)
class Figure:
    """The figure ``name`` of the run of ``case``."""

    case: str
    name: str

    def of(self, figures: Figures) -> float:
        """Its value for one seed.

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
class Share:
    """Which share of ``other`` ``one`` is, seed by seed."""

    one: "Quantity"
    other: "Quantity"

    def of(self, figures: Figures) -> float:
        """Its value for one seed; NaN where ``other`` is zero."""
        base = self.other.of(figures)
        return self.one.of(figures) / base if base else math.nan


@dataclass(frozen=True)
class Change:
    """By which share of ``other`` ``one`` differs from it, seed by seed."""

    one: "Quantity"
    other: "Quantity"

    def of(self, figures: Figures) -> float:
        """Its value for one seed; NaN where ``other`` is zero."""
        return Share(self.one, self.other).of(figures) - 1


Quantity: TypeAlias = Figure | Difference | Share | Change


@dataclass(frozen=True)
class Scale:
    """On which data, and how large, a study runs.

    Attributes:
        name: what ``--scale`` calls it.
        about: the sizes in words.
        settings: as ``a.b=value``, shared by all cases.
        seeds: how many runs a case gets; seeds are numbered from 0.
        effort: of the audits.
    """

    name: str
    about: str
    settings: tuple[str, ...]
    seeds: int = 5
    effort: Effort = FULL


@dataclass(frozen=True)
class Case:
    """One way to run a study.

    Attributes:
        name: as quantities call it.
        settings: as ``a.b=value``, over those of the scale.
        on: further settings by the scale's name.
        measurements: what is measured on the finished run, beyond its own figures.
    """

    name: str
    settings: tuple[str, ...] = ()
    on: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()

    def settings_on(self, scale: Scale) -> tuple[str, ...]:
        """All settings of its run at ``scale``; later ones win."""
        return (*scale.settings, *self.settings, *self.on.get(scale.name, ()))


@dataclass(frozen=True)
class Claim:
    """One claim: what the source says, in its own words, and the quantity that answers it."""

    text: str
    published: str
    quantity: Quantity
    unit: Unit

    @property
    def range(self) -> tuple[float, float]:
        """The least and the most that its quantity can be."""
        is_share = self.unit == "%" and isinstance(self.quantity, Figure)
        return _RANGES.get("share" if is_share else self.unit, (-math.inf, math.inf))


@dataclass(frozen=True)
class Study:
    """A paper's page as something to run.

    Attributes:
        name: what the command line calls it.
        title: author and year.
        scales: the first is run unless another is named; ``quick`` is there for continuous integration.
        cases: the runs.
        claims: what is printed, published beside ours.
    """

    name: str
    title: str
    scales: tuple[Scale, ...]
    cases: tuple[Case, ...]
    claims: tuple[Claim, ...]

    @property
    def page(self) -> str:
        """The page, as Markdown."""
        return (files("papers") / "pages" / f"{self.name}.md").read_text(encoding="utf-8")


def scale_named(study: Study, name: str | None) -> Scale:
    """A scale of ``study`` by name; the first for ``None``.

    Raises:
        ConfigError: it has none of that name.
    """
    if name is None:
        return study.scales[0]
    found = next((scale for scale in study.scales if scale.name == name), None)
    if found is None:
        known = ", ".join(scale.name for scale in study.scales)
        raise ConfigError(f"scale {name!r}: {study.name} has {known}")
    return found
