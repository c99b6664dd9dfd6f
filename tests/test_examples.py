"""The notebooks, as a user runs them: every cell, in order, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MOST_LINES = 15
SHOWN = """
for cell in json.load(sys.stdin):
    *before, last = ast.parse(cell).body
    exec(compile(ast.Module(before, []), "cell", "exec"))
    if isinstance(last, ast.Expr):
        shown = eval(compile(ast.Expression(last.value), "cell", "eval"))
        print(type(shown).__name__, len(getattr(shown, "_repr_html_", str)()))
    else:
        exec(compile(ast.Module([last], []), "cell", "exec"))
print(*(row["attack"] for row in audit.rows()))
print(*(len(plt.figure(number).axes[0].patches) for number in plt.get_fignums()))
"""
"""As a notebook does: the last expression of a cell is shown."""


def cells(notebook: Path, kind: str = "code") -> list[dict[str, Any]]:
    found = json.loads(notebook.read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_there_is_one() -> None:
    assert [notebook.name for notebook in NOTEBOOKS] == ["first_run.ipynb"]


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
    pytest.importorskip("pandas")
    code = f"import ast, json, sys\nimport matplotlib.pyplot as plt\n{SHOWN}"
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps([source(cell) for cell in cells(NOTEBOOKS[0])]),
        capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]), "MPLBACKEND": "agg"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run, audit, plot, attacked, drawn = done.stdout.splitlines()
    assert (run.split()[0], audit.split()[0]) == ("Run", "MembershipReport")
    assert all(int(line.split()[1]) > 1000 for line in (run, audit)), "tables of a notebook"
    assert plot.startswith("Axes ")
    assert {"surer", "lira-online"} <= set(attacked.split())
    assert drawn.split() == ["4", str(len(attacked.split()))], "two rounds by two curves, and a bar an attack"
    (kept,) = (tmp_path / "runs").iterdir()
    assert (kept / "result.json").is_file()
