"""The note of where a run's devices are, if not in its own process. Light to import."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from privkd.privacy.events import PartyId
from privkd.records import Record, record_of

_STEP: Final = "elsewhere"


class Elsewhere(Record):
    """Who really ran where, in a run whose devices are other processes, on machines of their own.

    Attributes:
        run: SHA-256 of the published plan, by which devices know the run.
        roster: the devices by name; a device's number is its place.
        engine: what carries questions to them.
        aggregators: where the parties of the secure channel are; none over another channel.
    """

    step: Literal["elsewhere"] = _STEP
    run: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    roster: Annotated[tuple[PartyId, ...], Field(min_length=1)]
    engine: str
    aggregators: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """In one line."""
        parties = f"; aggregators at {', '.join(self.aggregators)}" if self.aggregators else ""
        return f"{len(self.roster)} devices elsewhere, over {self.engine}{parties}"


def elsewhere_of(journal: Iterable[Mapping[str, Any]], path: Path) -> Elsewhere | None:
    """What the journal at ``path`` says; ``None`` of a run that plays its devices itself.

    Raises:
        RunError: the note is not of this version's form.
    """
    row = next((row for row in journal if row.get("step") == _STEP), None)
    return None if row is None else record_of(Elsewhere, row, path)
