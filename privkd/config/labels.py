"""How a class is spelt: labels are compared as text; what is a number by type, in its one form.

A label's form depends on that label alone, never on the others, so that no record renames another's class.
"""

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress

# The least whole number from which not every one is a float64.
_INEXACT = 2**53
_MISSING = frozenset(("", "na", "n/a", "#n/a", "#na", "<na>", "nan", "-nan", "nat", "null", "none", "?"))
_WHOLE = re.compile(r"(0|-?[1-9][0-9]*)(\.0*)?")


def canonical_number(text: str) -> str:
    """The label of a number: a whole one in decimal, without sign, zeros or point to spare.

    ``"3"``, ``"3.0"`` and ``"3e0"`` are all ``"3"``. What spells no whole number, such as ``"0.5"``, stays as
    it is written. For values that are numbers by type: a label that is text is left as it is, as ``"03"``
    and ``"3"`` may be codes of two groups.
    """
    text = text.strip()
    number = _whole(text)
    return text if number is None else str(number)


def is_missing(label: str) -> bool:
    """Whether tables mark by ``label``, in any case, that there is none: ``NA``, ``nan``, ``null``, ``?``."""
    return label.strip().lower() in _MISSING


def same_number(label: str) -> int | None:
    """The whole number that ``label`` spells plainly, point and zeros apart: ``3`` of ``"3"`` and ``"3.0"``.

    ``None`` of codes that a number would lose something of, such as ``"03"``, ``"+3"`` and ``"3e0"``, and of
    any other text.
    """
    found = _WHOLE.fullmatch(label)
    return None if found is None else _whole(found[1])


def numbers_of(classes: Iterable[str]) -> Mapping[str | int, int]:
    """What leads to each class's number: its name, and the whole number that it spells if it spells one."""
    names = tuple(classes)
    found: dict[str | int, int] = {name: number for number, name in enumerate(names)}
    values = {value: number for number, name in enumerate(names) if (value := same_number(name)) is not None}
    return found | dict(values)


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Different labels as a person sorts them: whole numbers by value, then text."""

    def key(label: str) -> tuple[bool, int, str]:
        number = _whole(label)
        return number is None, number or 0, label

    return tuple(sorted(set(labels), key=key))


def is_fraction(label: str) -> bool:
    """Whether a label spells a number, but no whole one: a fraction, ``nan`` or an infinity."""
    return is_number(label) and _whole(label) is None and "_" not in label


def is_number(text: str) -> bool:
    """Whether ``text`` spells a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _whole(text: str) -> int | None:
    # Python reads "1_0" as 10, but as classes they are two.
    if "_" in text or not is_number(text):
        return None
    with suppress(ValueError):
        return int(text)
    number = float(text)
    return int(number) if abs(number) < _INEXACT and number.is_integer() else None
