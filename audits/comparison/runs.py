"""Two runs: what differs in their settings, accuracies, ledgers and audits."""

from dataclasses import dataclass

from audits.estimators.rates import Interval, difference
from audits.evidence.command import settings_of
from audits.evidence.facts import Accuracies, RunFacts
from audits.verdict import Finding
from privkd.errors import InputError
from privkd.privacy.events import Unit
from privkd.privacy.ledger import Statement
from privkd.runs.binding import Binding

_NAMES = {
    "teacher": "teacher after the run",
    "before": "teacher before",
    "control": "control: teacher, zero devices",
    "students": "students, mean",
    "public_only": "students, public distillation only",
    "direct_private": "student trained directly, same budget",
    "direct": "student trained directly, no DP",
}

_PLAIN, _SHOWN = "sha256:", 12
_KEYED = "keyed by the run, so nobody can tell"
_UNKNOWN = "not noted, so nobody can tell"


@dataclass(frozen=True)
class Differing:
    """A setting, or something that a run rests on, and its two values; ``None`` is not set, or not there."""

    name: str
    first: str | None
    second: str | None


@dataclass(frozen=True)
class Shares:
    """One accuracy of both, and ``second - first`` with its interval."""

    name: str
    first: Interval
    second: Interval
    change: Interval


@dataclass(frozen=True)
class Ledgers:
    """One unit's row in both ledgers; ``None`` where nothing was charged."""

    unit: Unit
    first: Statement | None
    second: Statement | None


@dataclass(frozen=True)
class Leaks:
    """The strongest finding on one view in both; ``None`` where it was not audited."""

    view: str
    first: Finding | None
    second: Finding | None


@dataclass(frozen=True)
class RunComparison:
    """Two finished runs.

    Attributes:
        same_test: whether both were measured on the same records.
        provenance: data files, modules and versions that differ, or of which nobody can tell.
    """

    first: RunFacts
    second: RunFacts
    same_test: bool
    settings: tuple[Differing, ...]
    provenance: tuple[Differing, ...]
    accuracies: tuple[Shares, ...]
    gain: Shares
    ledgers: tuple[Ledgers, ...]
    leaks: tuple[Leaks, ...]


def compare_runs(first: RunFacts, second: RunFacts) -> RunComparison:
    """Both runs side by side.

    Raises:
        InputError: they are one, unfinished, or were measured on different data.
    """
    if first.path.resolve() == second.path.resolve():
        raise InputError(f"both are {first.path}: name two runs")
    one, other = _measured(first), _measured(second)
    settings = _differing(first, second)
    _check_same_data(first, second, same_test=one.digest == other.digest)
    return RunComparison(
        first,
        second,
        one.digest == other.digest,
        settings,
        _provenance(first, second),
        accuracies=tuple(_shares(one, other)),
        # Two differences: their intervals are joined as if independent, like those of shares.
        gain=Shares("gain over zero devices", one.gain, other.gain, difference(other.gain, one.gain)),
        ledgers=tuple(Ledgers(unit, first.statement(unit), second.statement(unit)) for unit in Unit),
        leaks=tuple(_leaks(first, second)),
    )


def _measured(facts: RunFacts) -> Accuracies:
    if not facts.finished:
        raise InputError(
            f"{facts.path} is unfinished ({facts.played} of {facts.config.rounds} rounds): "
            f"privkd train --resume {facts.path}"
        )
    if facts.accuracies is None:
        raise InputError(
            f"{facts.path} does not say how many test records it was measured on, so nothing can be compared"
        )
    return facts.accuracies


def _check_same_data(first: RunFacts, second: RunFacts, *, same_test: bool) -> None:
    """Raise unless accuracies of both mean the same."""
    one, other = first.config.data, second.config.data
    if one.source != other.source:
        raise InputError(
            f"{first.path} is on {one.source!r} and {second.path} on {other.source!r}: accuracies on "
            "different data sets cannot be compared"
        )
    if same_test:
        return
    same_draw = first.config.seed == second.config.seed and one == other
    if same_draw or one.data_dir != other.data_dir:
        raise InputError(
            f"{first.path} and {second.path} name {one.source!r}, but their test records differ: the data "
            "were changed in between, and accuracies on different data cannot be compared"
        )


def _differing(first: RunFacts, second: RunFacts) -> tuple[Differing, ...]:
    one, other = settings_of(first.config), settings_of(second.config)
    return tuple(
        Differing(name, one.get(name), other.get(name))
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
    )


def _provenance(first: RunFacts, second: RunFacts) -> tuple[Differing, ...]:
    one, other = dict(first.versions), dict(second.versions)
    versions = [
        Differing(f"version of {name}", one.get(name), other.get(name))
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
    ]
    if first.binding is None or second.binding is None:
        noted = [_UNKNOWN if facts.binding is None else "noted" for facts in (first, second)]
        return (Differing("data and code", *noted), *versions)
    mine, theirs = _digests(first.binding), _digests(second.binding)
    rows = [Differing(name, mine.get(name), theirs.get(name)) for name in dict.fromkeys([*mine, *theirs])]
    records = _records(first, first.binding), _records(second, second.binding)
    if records[0] != records[1] and first.config.seed == second.config.seed:
        rows.append(Differing("data, records as split", *records))
    return (*(row for row in rows if row.first != row.second or row.first == _KEYED), *versions)


def _records(facts: RunFacts, binding: Binding) -> str:
    """The digest of a simulation's records is keyed by its seed, so runs of one seed can be compared."""
    if facts.config.privacy.noise != "seeded":
        return _KEYED
    return binding.records.rpartition(":")[2][:_SHOWN]


def _digests(binding: Binding) -> dict[str, str]:
    """Digests by what they are of, shortened. A keyed one says nothing beside another run's."""
    named = {f"data, {name}": digest for name, digest in binding.data.items()}
    named |= {"classes": binding.classes}
    named |= {f"code, {name}": digest for name, digest in binding.code.items()}
    return {
        name: digest[: _SHOWN + len(_PLAIN)] if digest.startswith(_PLAIN) else _KEYED
        for name, digest in named.items()
    }


def _shares(one: Accuracies, other: Accuracies) -> list[Shares]:
    found = []
    for field, name in _NAMES.items():
        mine, theirs = getattr(one, field), getattr(other, field)
        if isinstance(mine, Interval) and isinstance(theirs, Interval):
            found.append(Shares(name, mine, theirs, difference(theirs, mine)))
    return found


def _leaks(first: RunFacts, second: RunFacts) -> list[Leaks]:
    audits = first.membership, second.membership
    views = dict.fromkeys(view for audit in audits if audit for view in audit.views)
    found = []
    for view in views:
        mine, theirs = (audit.strongest(view) if audit and view in audit.views else None for audit in audits)
        found.append(Leaks(view, mine, theirs))
    return found
