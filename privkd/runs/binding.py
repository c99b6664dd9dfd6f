"""The note of what a run is bound to. Light to import; `bound` makes and checks it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privkd.errors import RunError

STEP = "bound"
"""The note's step in the journal."""


@dataclass(frozen=True)
class Binding:
    """What a run is bound to, as the journal notes it. For how digests are made see `fingerprints`.

    Attributes:
        data: digests of the files of the data set, by name.
        records: digest of the records as they were split, always a keyed one.
        classes: digest of the label space.
        code: digests of the user's own modules, by file name.
        folders: where those were imported from, and marks to know them again: see `userscode.OwnCode`.
        versions: of the libraries that matter, by name.
        encoders: digests of the frozen encoders, by name.
    """

    data: Mapping[str, str]
    records: str
    classes: str
    code: Mapping[str, str]
    folders: Mapping[str, str]
    versions: Mapping[str, str]
    encoders: Mapping[str, str]


def binding_of(journal: Iterable[Mapping[str, Any]], path: Path) -> Binding | None:
    """What the journal in ``path`` says; ``None`` of a run that was not bound, or not yet.

    Raises:
        RunError: the note is not of this version's form.
    """
    row = next((row for row in journal if row.get("step") == STEP), None)
    if row is None:
        return None
    try:
        return Binding(
            data=_texts(row["data"]),
            records=str(row["records"]),
            classes=str(row["classes"]),
            code=_texts(row["code"]),
            folders=_texts(row["folders"]),
            versions=_texts(row["versions"]),
            encoders=_texts(row.get("encoders", {})),
        )
    except (AttributeError, LookupError, TypeError) as error:
        raise RunError(f"{path} is not of this version's form ({error!r}): restore it from a copy") from None


def _texts(row: Mapping[str, Any]) -> dict[str, str]:
    return {str(name): str(text) for name, text in row.items()}
