"""The names of classes travel from the data to results, reports, figures and exported students."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from running import play
from typer.testing import CliRunner

from audits.reconstructions import audit
from audits.reconstructions.drawings import Drawn
from cli import app
from privkd.controls import class_accuracies
from privkd.data.scenario import LabelledSet
from privkd.export.export import export
from privkd.runs.result import Result

NAMES = ("ash", "beech", "cedar")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three kinds of trees, told apart by one of two features."""
    folder = tmp_path_factory.mktemp("named")
    rows = [f"{number % 3 + number % 7 / 50},{number % 5},{NAMES[number % 3]}" for number in range(400)]
    (folder / "trees.csv").write_text("\n".join(["height,girth,label", *rows]))
    play(folder / "run", f"data.source={folder / 'trees.csv'}", "data.gap=none", "rounds=1")
    return folder / "run"


class TestResult:
    def test_has_each_class_by_name(self, run: Path) -> None:
        result = Result.read(run / "result.json")
        assert result.class_names == NAMES
        records = [row.records for row in result.classes]
        assert sum(records) == result.test.records
        whole = sum(row.after * row.records for row in result.classes) / sum(records)
        assert whole == pytest.approx(result.teacher.after)
        whole = sum(row.before * row.records for row in result.classes) / sum(records)
        assert whole == pytest.approx(result.teacher.before)

    def test_of_an_old_run_is_still_read(self, run: Path, tmp_path: Path) -> None:
        tree = json.loads((run / "result.json").read_text())
        del tree["classes"]
        (tmp_path / "result.json").write_text(json.dumps(tree))
        assert Result.read(tmp_path / "result.json").class_names == ()

    def test_a_class_without_test_records_has_no_accuracy(self) -> None:
        test = LabelledSet(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 1, 0]))
        found = class_accuracies(torch.nn.Identity(), test, 3)
        assert found[:2] == [1.0, 0.5]
        assert np.isnan(found[2])


class TestShown:
    def test_in_the_report(self, run: Path) -> None:
        assert CliRunner().invoke(app, ["report", str(run)]).exit_code == 0
        assert [row["name"] for row in json.loads((run / "report.json").read_text())["classes"]] == [*NAMES]
        written = (run / "report.md").read_text()
        assert "The teacher by class" in written
        assert all(f"| {name} |" in written for name in NAMES)

    def test_under_pictures(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shown: list[str] = []
        monkeypatch.setattr(audit, "_rendered", lambda pictures, captions, title: shown.extend(captions))
        images = np.random.default_rng(0).random((4, 1, 8, 8))
        names = ("ash", "a very long name of a tree", "$x$", "oak")
        drawn = Drawn(images, images, np.eye(4), np.arange(4), names)

        class Finding:
            view, attack = "student", "x"

            class success:  # noqa: N801
                estimate, trials, chance = 1.0, 4, 0.25

        audit.draw_grid(Finding(), drawn, images)  # type: ignore[arg-type]
        first = [caption.split("\n")[0] for caption in shown]
        assert first == ["ash", "a very long n…", r"\$x\$", "oak"]


class TestExported:
    @pytest.mark.parametrize("form", ["torch", "onnx"])
    def test_in_the_record_and_in_the_file(self, run: Path, tmp_path: Path, form: str) -> None:
        if form == "onnx" and importlib.util.find_spec("onnxruntime") is None:
            pytest.skip("onnxruntime is not installed: pip install 'privkd[onnx]'")
        path = tmp_path / ("s.pt2" if form == "torch" else "s.onnx")
        exported = export(run, form, 0, path)
        assert exported.class_names == NAMES
        assert exported.classes == len(NAMES)
        if form == "torch":
            extra = {"classes": ""}
            torch.export.load(path, extra_files=extra)
            kept = extra["classes"]
        else:
            import onnxruntime

            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            kept = session.get_modelmeta().custom_metadata_map["classes"]
        assert tuple(json.loads(kept)) == NAMES
