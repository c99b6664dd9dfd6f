"""What the tests of reliability tried and how it ended, for the summary at the end of a test run."""

from collections import Counter

counts: Counter[tuple[str, str]] = Counter()
"""By what was tried and how it ended."""


def note(tried: str, ended: str) -> None:
    """One fault injected, or one hostile input."""
    counts[tried, ended] += 1


def lines() -> list[str]:
    """One for each kind of what was tried."""
    found = []
    for tried in dict.fromkeys(tried for tried, _ in counts):
        ends = {ended: number for (name, ended), number in counts.items() if name == tried}
        told = ", ".join(f"{number:,} {ended}" for ended, number in sorted(ends.items()))
        found.append(f"{tried}: {sum(ends.values()):,} tried, {told}")
    return found
