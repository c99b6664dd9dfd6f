"""A first look: the same devices with and without protection, and what the cloud finds out."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from audits.estimators import Auc, TprAtFpr
from audits.evidence import RunRecord, read_run
from audits.findings import Finding, alarm_of
from audits.membership_audit import membership
from audits.tables import MembershipReport
from audits.wording import epsilon_text, percent
from privkd.channels.registry import known
from privkd.config import Config, load_config
from privkd.privacy.events import Unit
from privkd.progress import Progress, Silent
from privkd.records import FileRecord, Real, Record, Value
from privkd.run import train

_FPR = 0.01
# Small enough for two minutes: one round, small models, and few shadows.
_BOTH = ("rounds=1", "controls=false", "teacher.model.name=mlp", "student.models=mlp", "data.gap=rare")
_SIDES: Mapping[str, tuple[str, ...]] = {
    "no protection": ("channel.kind=plain", "privacy.epsilon=inf"),
    "privkd": ("channel.kind=secure", "privacy.epsilon=3"),
}
_SHADOWS, _TARGETS = 16, 16


class Side(Record):
    """One of the two runs, and the best that the cloud did against it.

    Attributes:
        name: with or without protection.
        run: its folder.
        sees: what the cloud sees.
        before: accuracy of the teacher before any device; ``after`` likewise.
        after: see ``before``.
        epsilon: per record, over the run, at most; the ledger's.
        attack: of the cloud, the one that found most.
        auc: of that attack.
        found: true-positive rate at 1 % false positives; ``None`` where too few records would carry it.
        allowed: the most of it that the ledger allows any attack.
    """

    name: str
    run: str
    sees: str
    before: Real
    after: Real
    epsilon: Real
    attack: str
    auc: Auc
    found: TprAtFpr | None
    allowed: Real


class Demo(FileRecord, Value):
    """The two runs beside each other."""

    kind: Literal["demo"] = "demo"
    sides: tuple[Side, ...]
    alarms: tuple[str, ...] = ()

    @property
    def alarm(self) -> str | None:
        """Of the audits."""
        return self.alarms[0] if self.alarms else None

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One row a run."""
        return [
            side.model_dump(exclude={"auc", "found"})
            | {"auc": side.auc.estimate, "found": side.found.estimate if side.found else None}
            for side in self.sides
        ]

    def __rich__(self) -> RenderableType:
        table = Table(title="The same devices, twice", title_justify="left")
        table.add_column("")
        for side in self.sides:
            table.add_column(side.name)
        for name, cell in _ROWS.items():
            table.add_row(name, *map(cell, self.sides))
        protected = self.sides[-1].run
        commands = (
            "privkd train --epsilon 3                # the whole loop, with its controls and its own audit",
            f"privkd audit reconstruction {protected}",
            f"privkd report {protected}",
        )
        words = "One seed, small models, one round: a first look. What to try next:"
        return Group(table, Text(words), *(Text(line, no_wrap=True, overflow="ignore") for line in commands))


def demo(out: Path | str | None = None, *, progress: Progress | None = None) -> Demo:
    """Train on the embedded data without protection and with it, and attack what the cloud sees of each.

    Args:
        out: a folder for the two runs; a new one under ``runs/`` each by default.
        progress: told of each stage.

    Raises:
        PrivkdError: as `train` and `membership`.
    """
    told = progress or Silent()
    sides, alarms = [], []
    for number, (name, settings) in enumerate(_SIDES.items(), start=1):
        told.stage(f"run {number} of {len(_SIDES)}: {name}")
        config = load_config(None, (*_BOTH, *settings))
        folder = None if out is None else Path(out) / name.replace(" ", "-")
        run = train(config, out=folder, progress=told)
        view = known(config.channel.kind).views[0]
        found = membership(run, view=view, shadows=_SHADOWS, targets=_TARGETS, progress=told)
        sides.append(_side(name, config, read_run(run.path), found))
        alarms.append(alarm_of(found.findings))
    return Demo(sides=tuple(sides), alarms=tuple(filter(None, alarms)))


def _side(name: str, config: Config, facts: RunRecord, found: MembershipReport) -> Side:
    assert facts.result is not None
    best = max(found.findings, key=_strength)
    assert best.auc is not None
    return Side(
        name=name,
        run=str(facts.path),
        sees="the sum of all answers"
        if not known(config.channel.kind).shows_each
        else "each device's answers",
        before=facts.result.teacher.before,
        after=facts.result.teacher.after,
        epsilon=facts.spent(Unit.RECORD),
        attack=best.attack,
        auc=best.auc,
        found=best.rate(_FPR),
        allowed=facts.ceiling(Unit.RECORD, _FPR),
    )


def _strength(finding: Finding) -> tuple[float, float]:
    rate = finding.rate(_FPR)
    return rate.estimate if rate else 0.0, finding.auc.estimate if finding.auc else 0.0


def _taught(side: Side) -> str:
    return f"{100 * side.before:.1f} % -> {100 * side.after:.1f} %"


def _cost(side: Side) -> str:
    return f"at most {epsilon_text(side.epsilon)}" if math.isfinite(side.epsilon) else "no limit"


def _most(side: Side) -> str:
    return "too few records to say" if side.found is None else percent(side.found)


_ROWS: Mapping[str, Callable[[Side], str]] = {
    "what the devices taught the teacher": _taught,
    "what the cloud sees": lambda side: side.sees,
    "what it cost, epsilon per record": _cost,
    "members that the cloud finds at 1 % false alarms": _most,
    "the most that any attack may find": lambda side: f"{100 * side.allowed:.1f} %",
    "AUC of its best attack": lambda side: f"{side.auc.estimate:.3f} ({side.attack})",
}
