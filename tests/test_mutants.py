"""Every mutant's run ends as the registry says, and the sound run of the same settings ends well.

False alarms: a sound run fails a check with at most `on_device.FALSE_ALARM` + `on_channel.FALSE_ALARM`, which
is 2e-6, and crosses a bound with at most 1 - `closing.CONFIDENCE`, which is 0.1 %. The sound runs of this
file, and those that go on with another computation, 25 in all, so raise an alarm in at most 2.5 % of all
seeds; the seeds are fixed.
Power: every mutant's `power`, in the registry. Canaries are cut to a quarter and less, which only takes power
away.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mutants.accusations import fewest
from mutants.mutant import Ends, Mutant
from mutants.parties import FAULTS, VARIABLE
from mutants.registry import MUTANTS
from mutants.settings import SETTINGS, SMALL, UNSOUND
from typer.testing import CliRunner

import audits.mechanisms.closing
import audits.mechanisms.on_device
import privkd.training.dpsgd
import privkd.training.vectorised.cohort
import privkd.training.vectorised.train
from cli import app

HERE = Path(__file__).resolve().parent
SOUND_QUICK = ("cohort",)


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, its words, and the names of the checks that failed."""

    code: int
    words: str
    failed: tuple[str, ...]


@pytest.fixture(autouse=True)
def found_afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was proved with a fault in place is nobody else's, and canaries take a second."""
    monkeypatch.setattr(audits.mechanisms.closing, "audit_releases", fewest)
    monkeypatch.setattr(audits.mechanisms.on_device, "_POOL", 12)
    monkeypatch.setattr(audits.mechanisms.on_device, "_MOST_DRAWS", 600_000)
    monkeypatch.setattr(audits.mechanisms.on_device, "_MOST_ONE_BY_ONE", 300)
    kept = (privkd.training.vectorised.cohort._found, privkd.training.dpsgd._fastest_mode)
    for cache in kept:
        cache.cache_clear()
    yield
    for cache in kept:
        cache.cache_clear()


def run(folder: Path, settings: str) -> Ended:
    """`privkd train` under these settings."""
    words = [word for setting in (*SMALL, *SETTINGS[settings]) for word in ("--set", setting)]
    shown = CliRunner().invoke(app, ["train", *words, "--out", str(folder / "run")])
    assert shown.exception is None or isinstance(shown.exception, SystemExit), shown.exception
    result = folder / "run" / "result.json"
    checks = json.loads(result.read_text())["checks"] if result.exists() else []
    failed = tuple(check["name"] for check in checks if not check["passed"])
    return Ended(shown.exit_code, " ".join(shown.output.split()), failed)


def put(mutant: Mutant, patch: pytest.MonkeyPatch) -> None:
    """Into this process, and into those of the aggregators that it will start."""
    mutant.put(lambda owner, name, value: patch.setattr(owner, name, value))
    if mutant.in_parties:
        folders = (
            str(HERE / "mutants" / "startup"),
            str(HERE),
            str(HERE / "support"),
            os.environ.get("PYTHONPATH", ""),
        )
        patch.setenv("PYTHONPATH", os.pathsep.join(folders))
        patch.setenv(VARIABLE, mutant.name)


def cases() -> Iterator[Any]:
    for mutant in MUTANTS.values():
        for number, settings in enumerate(mutant.settings):
            quick = mutant.quick and number == 0
            marks = () if quick else (pytest.mark.slow,)
            yield pytest.param(mutant, settings, marks=marks, id=f"{mutant.name}-{settings}")


@pytest.mark.parametrize(("mutant", "settings"), cases())
def test_a_fault_is_found(
    mutant: Mutant, settings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = modes_taken(monkeypatch)
    put(mutant, monkeypatch)
    ended = run(tmp_path, settings)
    if mutant.ends is Ends.CAUGHT:
        assert (ended.code, mutant.by in ended.failed) == (3, True), ended
        assert "do not release" in ended.words
    elif mutant.ends is Ends.REFUSED:
        assert (ended.code, mutant.by in ended.words) == (2, True), ended
    else:
        assert (ended.code, ended.failed) == (0, ()), ended
        assert modes, "it went on with the rejected computation"
        assert "ew" not in modes or settings.startswith("cohort")


def modes_taken(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Collects how devices by themselves compute their gradients from now on."""
    modes: set[str] = set()
    fastest = privkd.training.dpsgd.fastest_mode

    def noted(*arguments: Any) -> Any:
        modes.add(fastest(*arguments))
        return fastest(*arguments)

    monkeypatch.setattr(privkd.training.dpsgd, "fastest_mode", noted)
    return modes


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(name, marks=() if name in SOUND_QUICK else (pytest.mark.slow,))
        for name in SETTINGS
        if name not in UNSOUND
    ],
)
def test_the_sound_twin_passes(settings: str, tmp_path: Path) -> None:
    ended = run(tmp_path, settings)
    assert (ended.code, ended.failed) == (0, ()), ended


@pytest.mark.parametrize(("settings", "modes"), [("autograd", {"autograd"}), ("opacus", {"ew"})])
@pytest.mark.slow
def test_settings_take_the_computation_that_they_are_named_after(
    settings: str, modes: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = modes_taken(monkeypatch)
    run(tmp_path, settings)
    assert taken == modes


def test_every_fault_in_the_parties_is_known_to_both_sides() -> None:
    assert set(FAULTS) == {mutant.name for mutant in MUTANTS.values() if mutant.in_parties}
    assert {settings for mutant in MUTANTS.values() for settings in mutant.settings} <= set(SETTINGS)


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=list(MUTANTS))
def test_the_docs_have_its_row(mutant: Mutant) -> None:
    """In the registry's words, and nowhere else: the table is read by people who will not run this."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (HERE.parent / "docs" / "audits.md").read_text().splitlines()
        if line.startswith(f"| {mutant.name} |")
    ]
    finds = {Ends.CAUGHT: mutant.by, Ends.REFUSED: "refused", Ends.REPLACED: "the proof: replaced"}
    assert [row[-1] for row in rows] == [finds[mutant.ends]]
