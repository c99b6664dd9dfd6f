"""What ``audit/reconstruction.json`` and the picture grids beside it say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

from audits.estimators.rates import Interval
from audits.evidence.facts import RebuiltFacts, ReconstructionFacts
from audits.evidence.parsing import count, number, well_formed
from audits.verdict import Verdict
from privkd.errors import RunError
from privkd.privacy.events import Unit

RECONSTRUCTION = "audit/reconstruction.json"
_PNG = b"\x89PNG\r\n\x1a\n"


def read_reconstruction(path: Path, tree: Mapping[str, Any] | None) -> ReconstructionFacts | None:
    """The facts in the audit's ``tree``, if there is one, of the run in ``path``.

    Raises:
        RunError: it is not of the audit's form, or names a picture outside of the run.
    """
    if tree is None:
        return None
    with well_formed(path / RECONSTRUCTION):
        return ReconstructionFacts(
            findings=tuple(_finding(row) for row in tree["views"]),
            notes=tuple(str(note) for note in tree["notes"]),
            grids=tuple((str(name), read_picture(path, str(name))) for name in tree["grids"]),
        )


def _finding(row: Mapping[str, Any]) -> RebuiltFacts:
    found, verdict = row["reidentification"], row["verdict"]
    if verdict not in get_args(Verdict):
        raise ValueError(f"verdict {verdict!r}")
    return RebuiltFacts(
        view=str(row["view"]),
        attack=str(row["attack"]),
        unit=Unit(row["unit"]),
        target=str(row["target"]),
        prior=str(row["prior"]),
        success=Interval(
            estimate=number(found["estimate"]),
            low=number(found["low"]),
            high=number(found["high"]),
            n=count(found["trials"]),
            confidence=number(found["confidence"]),
        ),
        chance=number(found["chance"]),
        ceiling=None if row["ceiling"] is None else number(row["ceiling"]),
        verdict=cast(Verdict, verdict),
    )


def read_picture(path: Path, name: str) -> bytes:
    """A PNG in the folder ``path``; a name that leads out of it is refused, for a report is passed on.

    Raises:
        RunError: it cannot be read.
        ValueError: it lies elsewhere, or is no PNG.
    """
    file = (path / name).resolve()
    if not file.is_relative_to(path.resolve()):
        raise ValueError(f"picture {name!r} lies outside of the run")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise RunError(f"{path / name}: {error.strerror or error}; make the audit anew") from None
    if not data.startswith(_PNG):
        raise ValueError(f"picture {name!r} is no PNG")
    return data
