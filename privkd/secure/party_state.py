"""How a party's service is: as it says itself where it listens for operators, else as its files tell."""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privkd.errors import RunError
from privkd.journal import Journal
from privkd.records import Value
from privkd.secure.addresses import joined
from privkd.secure.certificates import load_certificate
from privkd.secure.party import PartyConfig, load_party

if TYPE_CHECKING:
    from rich.console import RenderableType

_SECONDS = 5.0
_DAY = 86_400


@dataclass(frozen=True)
class PartyState(Value):
    """One party's service, of what is public.

    Attributes:
        party: its name.
        answers: whether it said so itself; else it does not run, or has no ``[status]``.
        unready: why it takes no calls, if it takes none.
        rounds: how many it holds, by how far they are.
        uploads: how many it holds of rounds that are not released; unknown where it does not answer.
        worker: whether its worker is ``running``, and how many ``sessions`` it was in.
        certificate_seconds: until its certificate ends; none where it has none.
    """

    party: str
    answers: bool
    unready: str | None
    rounds: Mapping[str, int]
    uploads: int | None
    worker: Mapping[str, Any]
    certificate_seconds: float | None

    def tree(self) -> dict[str, Any]:
        """All of it."""
        return vars(self).copy()

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One row a number of rounds."""
        return [{"party": self.party, "rounds": state, "count": n} for state, n in self.rounds.items()]

    def __rich__(self) -> "RenderableType":
        from rich.table import Table

        table = Table(title=self.party, show_header=False)
        said = self.unready or "takes calls"
        table.add_row("service", said if self.answers else "not asked: it does not run, or has no [status]")
        table.add_row("rounds", ", ".join(f"{n} {state}" for state, n in self.rounds.items() if n) or "none")
        table.add_row("uploads", "unknown" if self.uploads is None else str(self.uploads))
        running = {True: "runs", False: "does not run", None: "unknown"}[self.worker["running"]]
        table.add_row("worker", f"{running}; {self.worker['sessions']} sessions so far")
        seconds = self.certificate_seconds
        table.add_row("certificate", "none" if seconds is None else f"ends in {seconds / _DAY:.1f} days")
        return table


def party_state(config: Path) -> PartyState:
    """How the party of this configuration is.

    Raises:
        ConfigError: the configuration is wrong.
        RunError: a journal is damaged, or something else answers at ``[status] listen``.
    """
    party = load_party(config)
    listener = party.status
    said = None if listener is None else _said(joined(*listener.address))
    if listener is None or said is None:
        return _read(party)
    try:
        names = ("party", "unready", "rounds", "uploads", "worker", "certificate_seconds")
        return PartyState(answers=True, **{name: said[name] for name in names})
    except (TypeError, KeyError):
        raise RunError(f"what listens at {listener.listen} is no party's service") from None


def _said(address: str) -> Any:
    """What the service says; none where nothing listens."""
    # Whatever proxy there is, it leads elsewhere.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}/status", timeout=_SECONDS) as answer:
            return json.load(answer)
    except ValueError:
        return {}
    except OSError as error:
        if isinstance(error, urllib.error.HTTPError):
            return {}
        return None


def _read(party: PartyConfig) -> PartyState:
    """What the files say, while nobody else need be asked."""
    far: dict[str, str] = {}
    names = {"opened": "open", "closed": "closing", "agreed": "closing", "posted": "released",
             "failed": "failed", "abandoned": "failed"}  # fmt: skip
    for record in Journal(party.directory / "journal.jsonl"):
        if record["event"] in names:
            far[record["round"]] = names[record["event"]]
    rounds = {state: list(far.values()).count(state) for state in dict.fromkeys(names.values())}
    until = None if party.tls is None else load_certificate(party.tls.certificate).not_valid_after_utc
    return PartyState(
        party=party.name,
        answers=False,
        unready=None,
        rounds=rounds,
        uploads=None,
        worker={"running": None, "sessions": sum(1 for _ in Journal(party.directory / "sessions.jsonl"))},
        certificate_seconds=None if until is None else (until - datetime.now(UTC)).total_seconds(),
    )
