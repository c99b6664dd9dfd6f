"""Scores of members and non-members as people keep them: a table, or an archive with a matrix."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from audits.estimators.validation import Floats
from privkd.data.dataset import Array
from privkd.data.parquet import read_columns
from privkd.data.tabular import read_arrays
from privkd.errors import DataError, one_line

_COLUMNS = ("score", "member")
_ARRAYS = ("scores", "member")
_OPTIONAL = ("population", "targets")
_TRUTH = {"0": False, "false": False, "0.0": False, "1": True, "true": True, "1.0": True}
_LEAST = 2


@dataclass(frozen=True)
class ScoreSet:
    """Scores, and who is a member.

    Attributes:
        scores: float64 ``[model, sample]``, finite; higher means more likely a member.
        member: bool, likewise.
        population: float64 ``[model, other]``, of samples that no model was trained on; ``None`` without.
        targets: the first so many models are audited; the others are their shadows.
    """

    scores: Floats
    member: NDArray[np.bool_]
    population: Floats | None = None
    targets: int = 1

    @property
    def shadows(self) -> int:
        """Models that the attacks learn from."""
        return len(self.scores) - self.targets


def score_set(
    scores: ArrayLike,
    member: ArrayLike,
    *,
    population: ArrayLike | None = None,
    targets: int | None = None,
    origin: str = "scores",
) -> ScoreSet:
    """Check arrays: vectors ``[sample]``, or matrices ``[model, sample]``.

    Args:
        scores: higher means more likely a member.
        member: 0, 1, or truth values, of the same shape.
        population: ``[model, other]``, or ``[other]`` beside vectors.
        targets: how many of the first models are audited; by default one.
        origin: what messages call them.

    Raises:
        DataError: a shape or type is wrong, a value is no finite number, or the audited models have members
            alone or none.
    """
    values = _numbers(np.asarray(scores), f"{origin}: the scores")
    inside = _truth(np.asarray(member), f"{origin}: member")
    if inside.shape != values.shape:
        raise DataError(
            f"{origin}: member has shape {inside.shape}, the scores {values.shape}; give one each"
        )
    if values.size == 0:
        raise DataError(f"{origin}: no scores; give at least {_LEAST} of members and {_LEAST} of others")
    if values.ndim > 2 or values.ndim == 0:
        raise DataError(f"{origin}: the scores have shape {values.shape}; give [sample] or [model, sample]")
    values, inside = np.atleast_2d(values), np.atleast_2d(inside)
    audited = 1 if targets is None else targets
    if not 1 <= audited <= len(values):
        raise DataError(f"{origin}: targets={audited}; give 1 to {len(values)}, one for each audited model")
    others = None
    if population is not None:
        others = np.atleast_2d(_numbers(np.asarray(population), f"{origin}: the population"))
        if others.ndim != 2 or len(others) != len(values) or others.size == 0:
            raise DataError(
                f"{origin}: the population has shape {others.shape}; give ({len(values)}, others)"
            )
    _check_sides(inside[:audited], origin)
    return ScoreSet(values, inside, others, audited)


def read_scores(path: Path) -> ScoreSet:
    """The scores in a file: ``.csv`` or ``.parquet`` with columns ``score`` and ``member``, or ``.npz``.

    An archive has ``scores`` and ``member``, and may have ``population`` and ``targets``: see `score_set`.

    Raises:
        DataError: it is missing, damaged, of another format, or as `score_set`.
    """
    kind = path.suffix.lower()
    if kind not in (".csv", ".parquet", ".npz"):
        raise DataError(f"{path}: unknown format {path.suffix!r}; expected .csv, .parquet or .npz")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if kind == ".npz":
        return _of_archive(path)
    columns = _csv_columns(path) if kind == ".csv" else read_columns(path, _COLUMNS)
    return score_set(*(columns[name] for name in _COLUMNS), origin=str(path))


def _of_archive(path: Path) -> ScoreSet:
    arrays = read_arrays(path)
    for name in _ARRAYS:
        if name not in arrays:
            raise DataError(f"{path}: array {name!r} is missing; it has {', '.join(arrays) or 'none'}")
    if unknown := sorted(set(arrays) - {*_ARRAYS, *_OPTIONAL}):
        raise DataError(
            f"{path}: array {unknown[0]!r} is unknown; expected {', '.join((*_ARRAYS, *_OPTIONAL))}"
        )
    targets = arrays.get("targets")
    if targets is not None and (targets.ndim != 0 or targets.dtype.kind not in "iu"):
        raise DataError(
            f"{path}: targets has dtype {targets.dtype} and shape {targets.shape}; give one number"
        )
    return score_set(
        arrays["scores"],
        arrays["member"],
        population=arrays.get("population"),
        targets=None if targets is None else int(targets),
        origin=str(path),
    )


def _csv_columns(path: Path) -> dict[str, Array]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [cells for cells in csv.reader(file, strict=True) if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not readable as CSV ({one_line(error)}); save it as UTF-8 text") from error
    header = [cell.strip() for cell in lines[0]] if lines else []
    places = [_place(header, name, path) for name in _COLUMNS]
    rows = lines[1:]
    if wrong := next((row for row in rows if len(row) != len(header)), None):
        number = lines.index(wrong) + 1
        raise DataError(
            f"{path}: record {number} has {len(wrong)} cells, the first line {len(header)}; mend it"
        )
    return {
        name: np.array([row[place].strip() for row in rows], dtype=np.str_)
        for name, place in zip(_COLUMNS, places, strict=True)
    }


def _place(header: Sequence[str], name: str, path: Path) -> int:
    if header.count(name) == 1:
        return header.index(name)
    if name in header:
        raise DataError(f"{path}: column {name!r} is there twice; keep one")
    shown = ", ".join(header)[:80] or "nothing"
    raise DataError(f"{path}: column {name!r} is missing; the first line names the columns, and has {shown}")


def _numbers(values: Array, what: str) -> Floats:
    if values.dtype.kind not in "iufU":
        raise DataError(f"{what} are of type {values.dtype}; give numbers")
    try:
        floats = values.astype(np.float64)
    except (ValueError, OverflowError) as error:
        raise DataError(f"{what} are not all numbers ({one_line(error)})") from None
    if missing := int((~np.isfinite(floats)).sum()):
        raise DataError(f"{what}: {missing} of {floats.size} are not finite; score every sample")
    return floats


def _truth(values: Array, what: str) -> NDArray[np.bool_]:
    if values.dtype.kind == "b":
        return values.astype(np.bool_)
    if values.dtype.kind == "U":
        kinds, place = np.unique(values, return_inverse=True)
        known = [_TRUTH.get(kind.lower()) for kind in kinds.tolist()]
        if None in known:
            wrong = kinds[known.index(None)]
            raise DataError(f"{what}: {str(wrong)[:40]!r} is none of 0, 1, true, false")
        return np.array(known, dtype=np.bool_)[place].reshape(values.shape)
    if values.dtype.kind not in "iuf" or not np.isin(values, (0, 1)).all():
        raise DataError(f"{what}: values of type {values.dtype} other than 0 and 1; give 0, 1, true or false")
    return values.astype(np.bool_)


def _check_sides(inside: NDArray[np.bool_], origin: str) -> None:
    members = int(inside.sum())
    for count, name in ((members, "members"), (inside.size - members, "non-members")):
        if count < _LEAST:
            raise DataError(
                f"{origin}: {count} {name} among the audited scores; give at least {_LEAST} of each"
            )
