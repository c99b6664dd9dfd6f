"""What the tests of reliability tried and how it ended, for the summary at the end of a test run."""

from collections import Counter
from collections.abc import Iterable

counts: Counter[tuple[str, str]] = Counter()
"""By what was tried and how it ended."""


def note(tried: str, ended: str) -> None:
    """One fault injected, or one hostile input."""
    counts[tried, ended] += 1


def packed() -> list[tuple[str, str, int]]:
    """All counts, for another process to `add`."""
    return [(tried, ended, number) for (tried, ended), number in counts.items()]


def add(more: Iterable[tuple[str, str, int]]) -> None:
    """What another process counted."""
    for tried, ended, number in more:
        counts[tried, ended] += number


def lines() -> list[str]:
    """One for each kind of what was tried."""
    found = []
    for tried in dict.fromkeys(tried for tried, _ in counts):
        ends = {ended: number for (name, ended), number in counts.items() if name == tried}
        told = ", ".join(f"{number:,} {ended}" for ended, number in sorted(ends.items()))
        found.append(f"{tried}: {sum(ends.values()):,} tried, {told}")
    return found
