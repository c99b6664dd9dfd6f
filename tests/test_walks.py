"""Pages that are followed as they stand: their commands, in their order, in an empty folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, commands_of


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def command(folder: Path, *words: str) -> str:
    """What ``privkd`` with these ``words`` prints in ``folder``."""
    done = subprocess.run(
        [sys.executable, "-m", "privkd", *words],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def changed(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.mark.slow
def test_from_nothing_to_a_signed_report(tmp_path: Path) -> None:
    (stated,) = blocks("start.md", "toml")
    shown = [words[1:] for words in commands_of((ROOT / "docs/start.md").read_text()) if words[0] == "privkd"]
    followed = [words for words in shown if words[0] != "doctor"]
    assert [words[0] for words in followed] == ["train", "train", "audit", "report", "report"]
    for words in followed[:-1]:
        command(tmp_path, *words)
    (tmp_path / "runs/first/about.toml").write_text(stated)
    signed = command(tmp_path, *followed[-1])
    assert "Is this fit for release? No" in signed
    assert "Is the evidence consistent? Yes" in signed
    assert "Not stated" not in signed
    assert 'name = "A. Reader, officer for this page"' in (tmp_path / "runs/first/signature.toml").read_text()


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    written = blocks("models.md", "python")[0]
    assert written.startswith('"""mymodels.py"""')
    (tmp_path / "mymodels.py").write_text(written)
    first = commands_of((ROOT / "docs/models.md").read_text())[0]
    assert "--dry-run" in first
    plan = json.loads(command(tmp_path, *first[1:], "--json"))
    assert plan["parameters"] == (64 * 24 + 24) + (24 * 10 + 10)


@pytest.mark.slow
def test_a_curve_on_a_cluster(tmp_path: Path) -> None:
    task, join = blocks("slurm.md", "bash")
    task = changed(task, {
        "(plain noised secure)": "(plain noised)", "(1 3 inf)": "(3 inf)", "% 3]": "% 2]", "/ 3]": "/ 2]",
        "--seeds 3": "--seeds 1 --audit none --set rounds=1",
    })  # fmt: skip
    join = changed(join, {"plain,noised,secure": "plain,noised", "1,3,inf": "3,inf"})
    (tmp_path / "privkd").write_text(f'#!/bin/sh\nexec {sys.executable} -m privkd "$@"\n')
    (tmp_path / "privkd").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    here = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path, "SLURM_CPUS_PER_TASK": "1"}
    for number in "0123":
        given = here | {"SLURM_ARRAY_TASK_ID": number}
        subprocess.run(["bash", "-c", task], cwd=tmp_path, env=given, check=True, timeout=300)
    played = {
        path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("curves/*/cells/*/cell.json")
    }
    subprocess.run(["bash", "-c", join], cwd=tmp_path, env=here, check=True, timeout=300)
    joined = {
        path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("curves/whole/cells/*/cell.json")
    }
    assert joined == played, "nothing was played twice"
    rows = (tmp_path / "curves/whole/curve.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == ["done"] * 4


WALKS = re.split(r"^## ", (ROOT / "docs/walks.md").read_text(), flags=re.MULTILINE)[1:]
TABLE, PHOTOS, TEXT, ENCODED = WALKS


def followed(walk: str, folder: Path) -> dict[str, str]:
    """All blocks of a walk in their order; what each file of Python printed, by its name."""
    said = {}
    for language, block in re.findall(r"```(python|sh)\n(.*?)```", walk, flags=re.DOTALL):
        if language == "sh":
            for words in commands_of(f"```sh\n{block}```"):
                command(folder, *words[1:])
            continue
        name = re.findall(r'^"""(\w+\.py)', block)[0]
        (folder / name).write_text(block)
        done = subprocess.run(
            [sys.executable, name], cwd=folder, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        said[name] = done.stdout
    return said


def figures(run: Path) -> tuple[float, float, float]:
    """Accuracies in percent: the teacher before and after, and the students."""
    result = json.loads((run / "result.json").read_text())
    teacher, students = result["teacher"], result["student"]["mean"]
    assert teacher["after"] > teacher["control"] + 0.03, "the devices taught it something"
    return 100 * teacher["before"], 100 * teacher["after"], 100 * students


def shown(walk: str) -> list[float]:
    """The page's own figures: before, after, control and students."""
    return [
        float(number)
        for number in re.findall(r"\b([0-9]{2}\.[0-9])\b", re.sub(r"```.*?```", "", walk, flags=re.DOTALL))
    ]


def test_a_table(tmp_path: Path) -> None:
    said = followed(TABLE, tmp_path)
    assert re.fullmatch(r"taken for \w+ and is zero\n", said["use_table.py"])
    before, after, students = figures(tmp_path / "runs/table")
    found = shown(TABLE)
    assert [before, after, students] == pytest.approx([found[0], found[1], found[3]], abs=1)
    assert "somebody with" in (tmp_path / "runs/table/report.md").read_text()


def test_photos(tmp_path: Path) -> None:
    said = followed(PHOTOS, tmp_path)
    assert re.fullmatch(r"taken for \w+ and is three\n", said["use_photos.py"])
    before, after, students = figures(tmp_path / "runs/photos")
    found = shown(PHOTOS)
    assert [before, after, students] == pytest.approx([found[0], found[1], found[3]], abs=1)


@pytest.mark.slow
def test_text(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    said = followed(TEXT, tmp_path)
    assert re.fullmatch(r"taken for \w+\n", said["use_text.py"])
    figures(tmp_path / "runs/text")


@pytest.mark.slow
def test_text_on_a_frozen_encoder(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    pytest.importorskip("static_model")
    followed(ENCODED, tmp_path)
    figures(tmp_path / "runs/encoded")
