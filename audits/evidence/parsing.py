"""Values read from files that anybody may have written to."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from privkd.errors import InputError, RunError


def read_json(path: Path) -> Any:
    """A JSON file's value.

    Raises:
        RunError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not JSON ({error}): restore it, or make it anew") from None


@contextmanager
def well_formed(path: Path) -> Iterator[None]:
    """Turn what a record of another form leads to into one line."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, InputError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{path} is damaged or was changed ({error!r}): restore it, or make it anew") from None


def number(value: Any) -> float:
    """A number, or the infinity that JSON spells out; never NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is no number")
    if isinstance(value, str) and value != "inf":
        raise ValueError(f"{value!r} is no number")
    found = float(value)
    if math.isnan(found):
        raise ValueError("NaN is no figure")
    return found


def count(value: Any) -> int:
    """A whole number, not negative."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
