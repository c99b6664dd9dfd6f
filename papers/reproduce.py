"""Runs a study's claims, or what is left of them, and sets what it found beside what was published."""

import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, PlainSerializer

from audits.estimators.rates import Interval, mean_of
from audits.sweeps.grid import digest_of
from audits.sweeps.runner import trained
from audits.sweeps.sweep import Value
from papers.catalogue import study_named
from papers.measurements import Effort, Measurement
from papers.study import Case, Claim, Figures, Scale, Study, scale_named
from privkd.config import Config, load_config
from privkd.errors import ConfigError, RunError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from privkd.progress import Progress
    from privkd.runs.folder import RunFolder

_MOST_SEEDS = 1000
_QUICK = "quick"
_ALARM = ".alarm"


@dataclass(frozen=True)
class Answer:
    """A claim and our estimate of its quantity."""

    claim: Claim
    ours: Interval

    @property
    def shown(self) -> str:
        """Our estimate in the claim's unit."""
        mean = _number(self.ours.estimate, self.claim.unit)
        if self.ours.n < 2 or math.isnan(self.ours.estimate):
            return mean
        low, high = (_number(value, self.claim.unit, bare=True) for value in (self.ours.low, self.ours.high))
        return f"{mean} [{low}, {high}]"


def _number(value: float, unit: str, *, bare: bool = False) -> str:
    if math.isnan(value):
        return "-"
    if unit not in ("%", "points"):
        return f"{value:.3f}"
    if bare:
        return f"{100 * value:.2f}"
    return f"{100 * value:+.2f} points" if unit == "points" else f"{100 * value:.2f} %"


@dataclass(frozen=True)
class Reproduction(Value):
    """A study at one scale.

    Attributes:
        study: the paper's page.
        scale: its data and sizes.
        answers: in the order of its claims.
        alarms: each audit of which the ledger rules out what it found, in words.
    """

    study: Study
    scale: Scale
    answers: tuple[Answer, ...]
    alarms: tuple[str, ...] = ()

    @property
    def alarm(self) -> str | None:
        """The first of the alarms, if there are any."""
        return f"{len(self.alarms)} alarms; {self.alarms[0]}; do not release" if self.alarms else None

    def rows(self) -> list[dict[str, Any]]:
        """One mapping a claim; a single seed has no interval."""
        return [
            {
                "claim": answer.claim.text,
                "published": answer.claim.published,
                "ours": answer.ours.estimate,
                "low": answer.ours.low if answer.ours.n > 1 else None,
                "high": answer.ours.high if answer.ours.n > 1 else None,
                "seeds": answer.ours.n,
                "unit": answer.claim.unit,
            }
            for answer in self.answers
        ]

    def tree(self) -> dict[str, Any]:
        """The JSON form."""
        from privkd.records import plain

        return {
            "paper": self.study.name,
            "title": self.study.title,
            "scale": self.scale.name,
            "about": self.scale.about,
            "claims": plain(self.rows()),
        }

    def __rich__(self) -> "RenderableType":
        """One row for each claim, and what the estimates rest on."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"{self.study.title}, scale {self.scale.name}", title_justify="left")
        table.add_column("claim")
        table.add_column("published", justify="right")
        table.add_column("ours", justify="right")
        for answer in self.answers:
            table.add_row(answer.claim.text, answer.claim.published, answer.shown)
        seeds = self.answers[0].ours.n
        notes = [f"Ours: {self.scale.about}."]
        if any(math.isnan(answer.ours.estimate) for answer in self.answers):
            notes.append("-: undefined, or refused, at this scale.")
        notes.append(
            "One seed: no interval."
            if seeds < 2
            else f"Means over {seeds} seeds with 95 % t-intervals; differences and ratios seed by seed."
        )
        return Group(table, *(Text(note, no_wrap=True, overflow="ignore") for note in notes))


def reproduce(
    name: str,
    *,
    scale: str | None = None,
    quick: bool = False,
    seeds: int | None = None,
    data_dir: Path | str | None = None,
    out: Path | str = "runs/papers",
    progress: bool = False,
) -> Reproduction:
    """Run the study that ``name`` names, or what of it ``out`` does not hold yet.

    Args:
        scale: of the study, its first by default; ``quick`` means the one of that name.
        seeds: how many runs each case gets, as the scale says by default.
        data_dir: base of the data, as ``--data-dir``.
        out: where runs are kept, those of all studies together.
        progress: whether to tell on stderr how the runs get on.

    Raises:
        ConfigError: no such study or scale, or a bad number of seeds.
        PrivkdError: otherwise as training and auditing do; runs that were finished are kept.
    """
    study = study_named(name)
    if seeds is not None and not 1 <= seeds <= _MOST_SEEDS:
        raise ConfigError(f"seeds={seeds}: expected 1 to {_MOST_SEEDS}")
    if quick and scale not in (None, _QUICK):
        raise ConfigError(f"--quick and --scale {scale}: give one of the two")
    sized = scale_named(study, _QUICK if quick else scale)
    base = None if data_dir is None else Path(data_dir)
    from privkd.progress import Silent
    from privkd.terminal import progress_on_stderr

    with progress_on_stderr() if progress else nullcontext(Silent()) as told:
        return Runner(Path(out), base, told).reproduction(study, sized, seeds or sized.seeds)


@dataclass(frozen=True)
class Runner:
    """Where runs lie, where data lie, and who is told.

    Attributes:
        out: the folder of all runs. A run's folder there is named by a digest of its settings, so that
            studies share equal runs and other settings never meet an old result.
        data_dir: base of the data, as ``--data-dir``.
        progress: told of each run.
    """

    out: Path
    data_dir: Path | None
    progress: "Progress"

    def reproduction(self, study: Study, scale: Scale, seeds: int) -> Reproduction:
        """Play every case of ``study`` for seeds ``0 .. seeds - 1`` and answer its claims.

        Raises:
            PrivkdError: as training and auditing do; runs that were finished are kept.
        """
        played: list[Figures] = [
            {case.name: self.figures(case, scale, seed) for case in study.cases} for seed in range(seeds)
        ]
        answers = [
            Answer(claim, mean_of([claim.quantity.of(figures) for figures in played]).within(*claim.range))
            for claim in study.claims
        ]
        alarms = [
            f"case {case}, seed {seed}: {name.removesuffix(_ALARM)} found more than the ledger allows"
            for seed, figures in enumerate(played)
            for case, found in figures.items()
            for name, value in found.items()
            if name.endswith(_ALARM) and value
        ]
        return Reproduction(study, scale, tuple(answers), tuple(alarms))

    def figures(self, case: Case, scale: Scale, seed: int) -> Mapping[str, float]:
        """The figures of one run by their dotted names, played or resumed where it is not finished yet.

        Raises:
            RunError: the data or the code of a run that is kept changed since.
            PrivkdError: otherwise as training and auditing do.
        """
        config = config_of(case, scale, seed, self.data_dir)
        stage = f"papers: case {case.name}, seed {seed}"
        with trained(self.out / folder_name(config), config, self.progress, stage) as folder:
            found = dict(flat(json.loads((folder.path / "result.json").read_text())))
            for measurement in case.measurements:
                found |= self._measured(folder, measurement, scale.effort)
            return found

    def _measured(self, folder: "RunFolder", measurement: Measurement, effort: Effort) -> Mapping[str, float]:
        """What is measured, kept in the run's folder beside the result it belongs to."""
        name, result = f"papers/{measurement.name(effort)}.json", folder.digest("result.json")
        path = folder.path / name
        try:
            kept = Kept.model_validate_json(path.read_bytes()) if path.is_file() else None
        except (OSError, ValueError) as error:
            words = " ".join(str(error).split())
            raise RunError(f"{path} cannot be read ({words}): remove it and run again") from None
        if kept is None or kept.result != result:
            kept = Kept(result=result, figures=dict(measurement.measure(folder, self.progress, effort)))
            folder.write_json(name, kept.model_dump(mode="json"))
        return kept.figures


def _spelt(value: float) -> float | str | None:
    return value if math.isfinite(value) else None if math.isnan(value) else str(value)


Number = Annotated[
    float, BeforeValidator(lambda value: math.nan if value is None else value), PlainSerializer(_spelt)
]
"""In JSON infinity is ``"inf"`` and NaN ``null``."""


class Kept(BaseModel):
    """A measurement's figures by their dotted names, and the SHA-256 of the result that it was made on."""

    result: str
    figures: dict[str, Number]


def config_of(case: Case, scale: Scale, seed: int, data_dir: Path | None) -> Config:
    """The settings of one run.

    Raises:
        ConfigError: they do not go together.
    """
    settings: dict[str, Any] = {"seed": seed}
    if data_dir is not None:
        settings["data.data_dir"] = str(data_dir.absolute())
    return load_config(None, case.settings_on(scale), settings)


def folder_name(config: Config) -> str:
    """A name that equal settings share."""
    return f"{Path(config.data.source).name}-seed{config.seed}-{digest_of(config)[:12]}"


def flat(tree: Any, prefix: str = "") -> Mapping[str, float]:
    """The numbers among nested JSON values by dotted names; the rest is left out.

    As `privkd.runs.result.plain` spells them: ``"inf"`` is infinity, ``null`` NaN.
    """
    if isinstance(tree, Mapping | list):
        found: dict[str, float] = {}
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
        return found
    if tree is None:
        return {prefix: math.nan}
    if tree == "inf" or (isinstance(tree, int | float) and not isinstance(tree, bool)):
        return {prefix: float(tree)}
    return {}
