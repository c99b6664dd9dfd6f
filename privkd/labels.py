"""How a class is spelt: labels are compared as text, whole numbers in their one form.

A label's form depends on that label alone, never on the others, so that no record renames another's class.
"""

from collections.abc import Iterable
from contextlib import suppress

# The least whole number from which not every one is a float64.
_INEXACT = 2**53


def canonical_label(text: str) -> str:
    """``text`` without the space around it; a whole number in decimal, without sign, zeros or point to spare.

    ``"3"``, ``" 03"``, ``"3.0"`` and ``"3e0"`` are all ``"3"``. What spells no whole number, such as
    ``"0.5"``, stays as it is written.
    """
    text = text.strip()
    number = _whole(text)
    return text if number is None else str(number)


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Different canonical labels as a person sorts them: whole numbers by value, then text."""

    def key(label: str) -> tuple[bool, int, str]:
        number = _whole(label)
        return number is None, number or 0, label

    return tuple(sorted(set(labels), key=key))


def is_fraction(label: str) -> bool:
    """Whether a canonical label spells a number, but no whole one: a fraction, ``nan`` or an infinity."""
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
