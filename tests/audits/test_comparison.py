"""Two runs or two curves side by side, and what cannot be compared."""

import json
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from evidence import audited, finding
from running import SMALL, StopAt, play
from typer.testing import CliRunner, Result

from audits.comparison import CurveComparison, RunComparison, compare_curves, compare_runs
from audits.estimators.rates import mean_of
from audits.evidence import RunRecord, read_run
from audits.sweeps.grid import DONE, TRIALS, Grid, Record
from audits.sweeps.sweep import read_sweep
from cli import app
from privkd.journal import Journal
from privkd.privacy.events import Unit
from privkd.progress import Silent
from privkd.run import train_in
from privkd.runs.folder import RunFolder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: two of one seed, which differ in their budget, and one of another seed."""
    root = tmp_path_factory.mktemp("runs")
    play(root / "one", "privacy.epsilon=1")
    play(root / "eight", "privacy.epsilon=8")
    play(root / "other", "seed=1")
    return root


def compare(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_two_runs_side_by_side(runs: Path) -> None:
    found = compare_runs(read_run(runs / "one"), read_run(runs / "eight"))
    assert [(row.name, row.first, row.second) for row in found.settings] == [
        ("privacy.epsilon", "1.0", "8.0")
    ]
    assert found.same_test
    teacher = found.accuracies[0]
    assert teacher.change.estimate == pytest.approx(teacher.second.estimate - teacher.first.estimate)
    assert teacher.change.low < teacher.change.estimate < teacher.change.high
    assert [row.unit for row in found.ledgers] == [Unit.RECORD, Unit.DEVICE]
    one, eight = (row.epsilon.high for row in (found.ledgers[0].first, found.ledgers[0].second) if row)
    assert one <= 1 < eight <= 8
    assert found.leaks == ()


def test_a_change_and_its_opposite_agree(runs: Path) -> None:
    one, eight = read_run(runs / "one"), read_run(runs / "eight")
    forth, back = compare_runs(one, eight), compare_runs(eight, one)
    for there, again in zip(forth.accuracies, back.accuracies, strict=True):
        assert there.change.estimate == -again.change.estimate
        assert there.change.low == pytest.approx(-again.change.high)


def test_the_command_prints_it(runs: Path, tmp_path: Path) -> None:
    first = Path(shutil.copytree(runs / "one", tmp_path / "one"))
    audited(first, finding(lower=0.4))
    printed = compare(first, runs / "eight")
    assert printed.exit_code == 0, printed.output
    for words in ("privacy.epsilon", "B - A", "points [", "not audited", ">= 0.40", "never added"):
        assert words in printed.stdout
    tree = json.loads(compare(first, runs / "eight", "--json").stdout)
    assert tree["same_test_records"]
    assert tree["leaks"][0]["second"] is None
    assert tree["ledger"][1]["first"]["epsilon"] == "inf"
    assert RunComparison.model_validate(tree).tree() == tree
    assert tree["accuracy"][0]["change"]["low"] < tree["accuracy"][0]["change"]["high"]


def noted(path: Path, **other: Any) -> RunRecord:
    """The facts of a run, were it bound to ``other`` things."""
    facts = read_run(path)
    assert facts.binding is not None
    return replace(facts, binding=replace(facts.binding, **other))


def test_data_code_and_versions_that_differ_are_listed(runs: Path) -> None:
    one, two = runs / "one", read_run(runs / "eight")
    assert compare_runs(read_run(one), two).provenance == ()
    first = noted(one, data={"t.csv": "sha256:" + "a" * 64}, code={"own.py": "sha256:" + "b" * 64})
    first = replace(first, versions=(*first.versions, ("torch", "0.1")))
    second = noted(two.path, data={"t.csv": "sha256:" + "c" * 64})
    found = {row.name: (row.first, row.second) for row in compare_runs(first, second).provenance}
    assert found["data, t.csv"] == ("sha256:" + "a" * 12, "sha256:" + "c" * 12)
    assert found["code, own.py"] == ("sha256:" + "b" * 12, None)
    assert found["version of torch"][0] == "0.1"
    records = compare_runs(noted(one, records="hmac-sha256:0"), two).provenance
    assert [row.name for row in records] == ["data, records as split"]


def test_nothing_is_told_of_what_only_its_own_run_can_know(runs: Path) -> None:
    keyed = {"data": {"t.csv": "hmac-sha256:" + "a" * 64}}
    rows = compare_runs(noted(runs / "one", **keyed), noted(runs / "eight", **keyed)).provenance
    assert [row.name for row in rows] == ["data, t.csv"]
    assert "nobody can tell" in str(rows[0].first)
    unbound = replace(read_run(runs / "one"), binding=None)
    rows = compare_runs(unbound, read_run(runs / "eight")).provenance
    assert [(row.name, row.second) for row in rows] == [("data and code", "noted")]


def test_what_differs_is_printed(runs: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(runs / "one", tmp_path / "one"))
    versions = json.loads((changed / "versions.json").read_text())
    (changed / "versions.json").write_text(json.dumps(versions | {"torch": "0.1"}))
    printed = compare(changed, runs / "eight").stdout
    assert "Data, code and versions that differ" in printed
    assert "version of torch" in printed
    tree = json.loads(compare(changed, runs / "eight", "--json").stdout)
    assert [row["name"] for row in tree["provenance"]] == ["version of torch"]
    assert "No data, code or version differs" in compare(runs / "one", runs / "eight").stdout


def test_another_seed_is_another_sample_of_one_source(runs: Path) -> None:
    printed = compare(runs / "one", runs / "other")
    assert printed.exit_code == 0
    assert "two independent samples" in " ".join(printed.stdout.split())


def _refusal(first: Path, second: Path) -> str:
    result = compare(first, second)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_nonsense_is_refused(runs: Path, tmp_path: Path) -> None:
    one = runs / "one"
    assert "name two runs" in _refusal(one, one)
    assert "not the folder of a run" in _refusal(one, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path / "half", progress=StopAt(8))
    assert "unfinished" in _refusal(one, tmp_path / "half")


def _edited(run: Path, name: str, before: str, after: str) -> None:
    """Change a file of a run, and the journal's digests as if it had always been so."""
    file = run / name
    old = file.read_text()
    assert before in old
    file.write_text(old.replace(before, after))
    records = list(Journal(run / "journal.jsonl"))
    (run / "journal.jsonl").unlink()
    journal = Journal(run / "journal.jsonl")
    step, key = {"config.toml": ("started", "config"), "result.json": ("finished", "result")}[name]
    for record in records:
        if record.get("step") == step:
            record[key] = sha256(file.read_bytes()).hexdigest()
        journal.append(record)


def test_other_data_are_refused(runs: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(runs / "eight", tmp_path / "moved"))
    _edited(moved, "config.toml", 'source = "digits"', 'source = "mnist"')
    assert "different data sets" in " ".join(_refusal(runs / "one", moved).split())
    changed = Path(shutil.copytree(runs / "eight", tmp_path / "changed"))
    digest = json.loads((changed / "result.json").read_text())["test"]["digest"]
    _edited(changed, "result.json", digest, "0" * 64)
    assert "test records differ" in _refusal(runs / "one", changed)


def _curve(path: Path, *overrides: str, seeds: int = 2) -> Path:
    settings = tuple(s for s in SMALL if not s.startswith("channel.kind"))
    grid = Grid(
        epsilons=(1.0,), channels=("plain",), seeds=seeds, audits=(), overrides=(*settings, *overrides)
    )
    for trial in grid.trials:
        folder = path / TRIALS / trial.folder
        with RunFolder.create(folder, trial.config()) as opened:
            train_in(opened.config, opened, Silent())
        (folder / DONE).write_text(json.dumps({"key": trial.key}))
    (path / "curve.json").write_text(Record(request=grid).model_dump_json())
    return path


def test_two_curves_are_paired_over_seeds(tmp_path: Path) -> None:
    first, second = _curve(tmp_path / "a"), _curve(tmp_path / "b", "reverse.trust=4.0")
    (point,) = compare_curves(read_sweep(first), read_sweep(second)).points
    changes = [run.accuracies[0].change.estimate for run in point.runs]
    assert point.seeds == 2
    assert point.teacher == mean_of(changes)
    printed = compare(first, second)
    assert printed.exit_code == 0, printed.output
    assert "paired over common seeds" in printed.stdout
    tree = json.loads(compare(first, second, "--json").stdout)
    assert tree["points"][0]["seeds"] == 2
    assert CurveComparison.model_validate(tree).tree() == tree
    assert "one is a curve" in _refusal(first, next((first / TRIALS).iterdir()))
    assert "name two curves" in _refusal(first, first)
