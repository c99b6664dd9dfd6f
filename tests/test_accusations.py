"""Sound runs are hardly ever accused by the closing audit, and broken ones always.

False alarms: `most_accused` is exceeded with probability 1e-4 at most, if each sound run is accused with at
most `SOUND`, about 0.1 %. The seeds are fixed.
"""

import pytest
from mutants.accusations import KINDS, Opened, count, cut_short, most_accused
from mutants.registry import MUTANTS

RUNS = 30


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_short(monkeypatch.setattr)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sound_runs_are_left_alone(kind: str) -> None:
    accused = [said for said in count(kind, RUNS, lambda seed, said: None) if said]
    assert len(accused) <= most_accused(RUNS, chance=1e-4), accused


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_with_half_of_the_noise_they_are_accused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin: a quarter of the variance, which each of these shorter audits sees as well."""
    MUTANTS["noise halved"].put(monkeypatch.setattr)
    opened = Opened.of(*KINDS[kind])
    for seed in range(5):
        assert "noise has the claimed variance" in set(opened.accusations(seed))
