"""The notebooks, as a user runs them: every cell, in order, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT

FIRST_RUN, PLUG_IN, SIGN = NAMES = ("first_run", "plug_in_your_own", "sign_a_report")
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MOST_LINES = 25
SHOWN = """
import ast, json, sys
import matplotlib.pyplot as plt
for cell in json.load(sys.stdin):
    *before, last = ast.parse(cell).body
    exec(compile(ast.Module(before, []), "cell", "exec"))
    if isinstance(last, ast.Expr):
        shown = eval(compile(ast.Expression(last.value), "cell", "eval"))
        print(type(shown).__name__, len(getattr(shown, "_repr_html_", str)()))
    else:
        exec(compile(ast.Module([last], []), "cell", "exec"))
print(*(row["attack"] for row in audit.rows()))
"""
"""As a notebook does: the last expression of a cell is shown."""


def cells(notebook: Path, kind: str = "code") -> list[dict[str, Any]]:
    found = json.loads(notebook.read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def shown_by(name: str, folder: Path, then: str) -> list[str]:
    """What each cell of the notebook ``name`` showed, run in ``folder``; at the end, what ``then`` prints."""
    pytest.importorskip("pandas")
    written = [source(cell) for cell in cells(ROOT / "examples" / f"{name}.ipynb")]
    done = subprocess.run(
        [sys.executable, "-c", SHOWN + then], input=json.dumps(written),
        capture_output=True, text=True, check=False, timeout=300, cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]), "MPLBACKEND": "agg"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_they_are_these() -> None:
    assert [notebook.stem for notebook in NOTEBOOKS] == list(NAMES)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
class TestNotebook:
    def test_is_short(self, notebook: Path) -> None:
        lines = [line for cell in cells(notebook) for line in source(cell).splitlines() if line.strip()]
        assert len(lines) <= MOST_LINES

    def test_is_kept_without_what_it_showed(self, notebook: Path) -> None:
        for cell in cells(notebook):
            assert (cell["outputs"], cell["execution_count"]) == ([], None)

    def test_says_what_each_cell_does(self, notebook: Path) -> None:
        kinds = [cell["cell_type"] for cell in json.loads(notebook.read_text())["cells"]]
        assert kinds[:2] == ["markdown", "code"]
        assert kinds[2:] == ["markdown", "code"] * (len(kinds[2:]) // 2)


def test_the_first_run_trains_audits_and_draws(tmp_path: Path) -> None:
    patches = "print(*(len(plt.figure(number).axes[0].patches) for number in plt.get_fignums()))"
    run, audit, plot, attacked, drawn = shown_by(FIRST_RUN, tmp_path, patches)
    assert (run.split()[0], audit.split()[0]) == ("Run", "MembershipReport")
    assert all(int(line.split()[1]) > 1000 for line in (run, audit)), "tables of a notebook"
    assert plot.startswith("Axes ")
    assert {"surer", "lira-online"} <= set(attacked.split())
    assert drawn.split() == ["4", str(len(attacked.split()))], "two rounds by two curves, and a bar an attack"
    (kept,) = (tmp_path / "runs").iterdir()
    assert (kept / "result.json").is_file()


def test_all_that_is_plugged_in_is_used(tmp_path: Path) -> None:
    used = "print(run.config.reverse.aggregation, run.config.student.models[0].name, run.alarm)"
    run, audit, attacked, plugged = shown_by(PLUG_IN, tmp_path, used)
    assert (run.split()[0], audit.split()[0]) == ("Run", "MembershipReport")
    assert {"surplus", "lira-online"} <= set(attacked.split())
    rule, student, alarm = plugged.split()
    assert (rule, alarm) == ("middle", "None")
    assert student.endswith("small")


def test_a_signature_lapses_when_what_is_stated_changes(tmp_path: Path) -> None:
    answers = "print(shown, *(verdict.word for verdict in signed.verdicts))"
    report, signature, _, _, verdicts = shown_by(SIGN, tmp_path, answers)
    assert report.startswith("RunReport ")
    assert signature.startswith("Signature ")
    assert verdicts.split() == ["False", "No", "Yes"], "still holds, fit for release, consistent"
    signed = (tmp_path / "runs" / "signed" / "signature.toml").read_text()
    assert "A. Reader, officer for this notebook" in signed
