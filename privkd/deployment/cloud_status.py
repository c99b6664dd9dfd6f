"""How a cloud is getting on: who is enrolled, who answered, who refused and why, and what ends soon."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from privkd.deployment.cloud import is_running, published_in, run_folder
from privkd.deployment.cloud_settings import CloudSettings, Roster
from privkd.deployment.remote import asked_in, delivered_in, witnesses_in
from privkd.deployment.wire import Reason
from privkd.errors import ConfigError
from privkd.journal import Journal
from privkd.privacy.events import PartyId
from privkd.records import Count, FileRecord, Real, Record, Value
from privkd.secure.certificates import days_left, load_certificate

_SOON = 30.0
"""Days."""


class Ending(Record):
    """A certificate that ends soon, has ended, or cannot be read (no ``days``)."""

    of: str
    path: Path
    days: Real | None


class CloudStatus(FileRecord, Value):
    """How a cloud is getting on.

    Attributes:
        run: the name of the published plan; ``None`` before there is one.
        engine: what carries questions.
        enrolled: the roster, in order.
        running: whether a process plays the run.
        rounds: of the run.
        done: how many were committed.
        finished: whether the run has its result.
        asked: the last round that devices were asked in, from 1; ``None`` before the first.
        answered: who answered in it.
        refused: who refused, and why.
        missing: from whom nothing came.
        witnesses: the digest of each device's own ledger that it told last.
        delivered: who has taken the last teacher.
        ending: certificates that end within 30 days.
    """

    run: str | None
    engine: str
    enrolled: tuple[PartyId, ...]
    running: bool
    rounds: Count
    done: Count
    finished: bool
    asked: Count | None
    answered: tuple[PartyId, ...]
    refused: dict[PartyId, Reason]
    missing: tuple[PartyId, ...]
    witnesses: dict[PartyId, str]
    delivered: tuple[PartyId, ...]
    ending: tuple[Ending, ...]

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One row a device."""
        days = {ending.of: ending.days for ending in self.ending}
        return [
            {
                "device": name,
                "last": self._last(name),
                "witness": self.witnesses.get(name),
                "delivered": name in self.delivered,
                "certificate_days": days.get(name),
            }
            for name in self.enrolled
        ]

    def __rich__(self) -> RenderableType:
        where = f"run {self.run[:12]}" if self.run else "nothing is published yet"
        state = "finished" if self.finished else "running" if self.running else "not running"
        title = f"{where}, {self.done} of {self.rounds} rounds, over {self.engine}: {state}"
        table = Table(title=title, title_justify="left")
        last = "last round" if self.asked is None else f"round {self.asked}"
        for name in ("device", last, "ledger seen", "last teacher"):
            table.add_column(name)
        for row in self.rows():
            delivered = "delivered" if row["delivered"] else "-"
            table.add_row(row["device"], row["last"], (row["witness"] or "-")[:20], delivered)
        return Group(table, *map(_ending, self.ending))

    def _last(self, name: PartyId) -> str:
        if name in self.refused:
            return f"refused: {self.refused[name].value}"
        if name in self.answered:
            return "answered"
        return "no answer" if name in self.missing else "-"


def status(path: Path) -> CloudStatus:
    """The status of the cloud of ``cloud.toml`` at ``path``; nothing is locked or changed.

    Raises:
        ConfigError: bad settings.
        RunError: the roster, the plan or the run's journal is damaged.
    """
    settings = CloudSettings.read(path)
    plan, roster = published_in(settings), Roster.at(settings.roster)
    folder = None if plan is None else run_folder(settings, plan)
    journal = None if folder is None else Journal(folder / "journal.jsonl")
    played = sum(row.get("step") == "round" for row in journal or ())
    asked = asked_in(journal) if journal is not None else []
    last = asked[-1] if asked else None
    return CloudStatus(
        run=plan.digest if plan else None,
        engine=settings.engine,
        enrolled=roster.names,
        running=folder is not None and is_running(folder),
        rounds=plan.config.rounds if plan else settings.run.rounds,
        done=max(0, played - 1),
        finished=folder is not None and (folder / "result.json").exists(),
        asked=last.round + 1 if last else None,
        answered=last.answered if last else (),
        refused=last.refused if last else {},
        missing=last.missing if last else (),
        witnesses={} if journal is None else witnesses_in(journal),
        delivered=() if journal is None else tuple(sorted(delivered_in(journal))),
        ending=tuple(_ending_soon(settings, roster)),
    )


def _ending_soon(settings: CloudSettings, roster: Roster) -> list[Ending]:
    parties = settings.aggregators
    known = {"authority": parties.ca, "cloud": parties.certificate}
    known |= {device.name: device.certificate for device in roster.devices}
    found = [Ending(of=of, path=path, days=_days_left(path)) for of, path in known.items() if path]
    return [ending for ending in found if ending.days is None or ending.days < _SOON]


def _days_left(path: Path) -> float | None:
    try:
        return days_left(load_certificate(path))
    except ConfigError:
        return None


def _ending(ending: Ending) -> Text:
    if ending.days is None:
        return Text(f"Certificate of {ending.of}: {ending.path} cannot be read.", style="bold red")
    when = f"ends in {ending.days:.0f} days" if ending.days > 0 else "has ended"
    return Text(f"Certificate of {ending.of} {when}: {ending.path}", style="bold red")
