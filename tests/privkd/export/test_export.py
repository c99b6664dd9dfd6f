"""An exported student answers as the original does, and bad requests leave nothing behind."""

import importlib.util
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reading import read
from running import play, small
from torch import Tensor, nn

from cli import app
from privkd.controls import mean_accuracy
from privkd.errors import ModelError
from privkd.export import export as exporting
from privkd.export.artefact import TOLERANCE, Deployable, check_equal
from privkd.export.export import export_student
from privkd.export.formats import format_named, suffix_of
from privkd.prepared import finished, prepare
from privkd.progress import Silent
from privkd.runs.folder import RunFolder
from privkd.training.vectorised import cohort_answers

NEEDED = {"torch": "torch", "onnx": "onnxruntime", "executorch": "executorch"}


def needs(form: str) -> Any:
    """A format's tests, left out with the reason where its extra is not installed."""
    missing = importlib.util.find_spec(NEEDED[form]) is None
    reason = f"{NEEDED[form]} is not installed: pip install 'privkd[{form}]'"
    return pytest.param(form, marks=pytest.mark.skipif(missing, reason=reason))


ALL = [needs(form) for form in NEEDED]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "run"
    play(path)
    return path


def code_of(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        app([str(argument) for argument in arguments])
    return left.value.code if isinstance(left.value.code, int) else 0


def student_of(run: Path, device: int) -> nn.Module:
    with RunFolder.resume(run) as folder:
        game = prepare(folder.config)
        return game.personalised(finished(game, folder), [device], Silent())[0]


class TestAnswers:
    @pytest.mark.parametrize("form", ALL)
    @pytest.mark.parametrize("device", [0, 2])
    def test_equal_the_students(self, run: Path, tmp_path: Path, form: str, device: int) -> None:
        """Raw pixels to the file, scaled ones to the student: on records that the export did not check."""
        with RunFolder.resume(run) as folder:
            out = tmp_path / f"s{suffix_of(form)}"
            exported = export_student(folder, form, device, out)
            records = prepare(folder.config).scenario.test.inputs[:50]
        with torch.no_grad():
            answers = format_named(form).load(out)((records * 16).round())
        student = student_of(run, device)
        with torch.no_grad():
            original = student(records)
        assert torch.allclose(answers, original, rtol=TOLERANCE, atol=TOLERANCE)
        artefact = exported
        assert artefact.check.difference <= TOLERANCE
        assert artefact.size_bytes == out.stat().st_size > 4 * artefact.parameters
        assert (exported.device, exported.round, artefact.preprocessing) == (
            f"device-{device:04d}",
            2,
            "divided by 16",
        )
        assert artefact.latency_ms > 0

    def test_are_those_of_that_device(self, run: Path) -> None:
        """The students of two devices differ, so a swapped index would be seen."""
        records = torch.rand(8, 1, 8, 8)
        one, other = student_of(run, 0), student_of(run, 2)
        with torch.no_grad():
            assert not torch.allclose(one(records), other(records))

    def test_take_any_number_of_records(self, run: Path, tmp_path: Path) -> None:
        with RunFolder.resume(run) as folder:
            export_student(folder, "torch", 0, tmp_path / "s.pt2")
        answer = format_named("torch").load(tmp_path / "s.pt2")
        with torch.no_grad():
            assert [len(answer(torch.rand(n, 1, 8, 8))) for n in (1, 2, 37)] == [1, 2, 37]

    def test_nothing_is_pickled_and_no_path_told(self, run: Path, tmp_path: Path) -> None:
        with RunFolder.resume(run) as folder:
            export_student(folder, "torch", 0, tmp_path / "s.pt2")
        with zipfile.ZipFile(tmp_path / "s.pt2") as archive:
            texts = [archive.read(name) for name in archive.namelist()]
        assert not any(text.startswith((b"\x80", b"PK")) for text in texts)
        assert not any(b".py" in text for text in texts)


class TestExecutorch:
    def test_large_layers_are_summed_in_blocks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Otherwise rounding is seen to be several times larger."""
        executorch_format = pytest.importorskip("privkd.export.executorch_format")
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn((40, 4000), generator=generator)
        model = nn.Sequential(nn.Linear(4000, 10))
        before = model[0].weight.detach().clone()

        def error() -> float:
            form, path = executorch_format.ExecutorchFormat(), tmp_path / "s.pte"
            form.write(model, inputs[:2], path)
            exact = inputs.double() @ model[0].weight.double().T + model[0].bias.double()
            return float((form.load(path)(inputs) - exact).abs().max())

        with torch.no_grad():
            blocked = error()
            monkeypatch.setattr(executorch_format, "_in_blocks", lambda model: model)
            assert blocked < error() / 2
        assert torch.equal(model[0].weight, before)


class TestStudents:
    def test_trained_again_are_those_of_the_run(self, tmp_path: Path) -> None:
        """Their accuracy is what the run reported, whether a round starts from the teacher or their own."""
        for start in ("teacher", "own"):
            result = play(tmp_path / start, f"student.start={start}")
            with RunFolder.resume(tmp_path / start) as folder:
                game = prepare(folder.config)
                students = finished(game, folder).students
            assert mean_accuracy(students, game.scenario.test) == result.student.trained

    def test_were_the_ones_that_answered(self, run: Path) -> None:
        """Over the plain channel the last release is what the students of the last round said."""
        with RunFolder.resume(run) as folder:
            game = prepare(folder.config)
            state = finished(game, folder)
        release = state.state.releases[-1]
        answers = cohort_answers(state.students, game.scenario.proxy[release.queries]).softmax(-1)
        assert torch.allclose(answers, release.answers, atol=1e-4)


class TestPreprocessing:
    @pytest.mark.parametrize(
        ("values", "words"),
        [
            (np.arange(256, dtype=np.uint8).repeat(4).reshape(-1, 4), "divided by 255"),
            ((np.arange(400, dtype=np.uint8) % 2).reshape(-1, 4), "none"),
            (np.arange(400).reshape(-1, 4), "none"),
        ],
        ids=["bytes", "flags", "whole numbers"],
    )
    def test_is_what_the_source_did(self, tmp_path: Path, values: Any, words: str) -> None:
        np.savez(tmp_path / "own.npz", inputs=values, labels=np.arange(len(values)) % 2)
        source = read(tmp_path / "own.npz")
        assert source.constants.words == words
        raw = source.constants.raw(source.inputs)
        assert torch.equal(raw, torch.from_numpy(values).float())
        model = Deployable(nn.Identity(), source.constants.module(), ("a", "b"))
        assert torch.equal(model(raw), source.inputs)

    def test_survives_a_test_split(self, tmp_path: Path) -> None:
        pixels = np.arange(80, dtype=np.uint8).reshape(20, 4)
        labels = np.arange(20) % 2
        np.savez(tmp_path / "own.npz", inputs=pixels, labels=labels, test_inputs=pixels, test_labels=labels)
        assert read(tmp_path / "own.npz").constants.divisor == 255.0


class TestCheck:
    def test_refuses_what_answers_otherwise(self) -> None:
        records = torch.rand(5, 4)
        off = lambda raw: raw + 3 * TOLERANCE  # noqa: E731
        with pytest.raises(ModelError, match="differ"):
            check_equal(nn.Identity(), off, records, records)
        assert check_equal(nn.Identity(), lambda raw: raw + 1e-7, records, records).records == 5

    def test_refuses_nan_and_other_shapes(self) -> None:
        records = torch.rand(5, 4)
        with pytest.raises(ModelError, match="differ"):
            check_equal(nn.Identity(), lambda raw: raw * float("nan"), records, records)
        with pytest.raises(ModelError, match="shape"):
            check_equal(nn.Identity(), lambda raw: raw[:, :2], records, records)

    def test_a_refused_artefact_leaves_the_old_file(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "s.pt2"
        out.write_text("old")

        def wrong(*_: object, **__: object) -> Callable[[Tensor], Tensor]:
            return lambda raw: torch.zeros(len(raw), 10)

        monkeypatch.setattr(exporting, "written", wrong)
        with RunFolder.resume(run) as folder, pytest.raises(ModelError, match="differ"):
            export_student(folder, "torch", 0, out)
        assert [path.name for path in tmp_path.iterdir()] == ["s.pt2"]
        assert out.read_text() == "old"


class Branching(nn.Module):
    """Trains anywhere, but no exporter can follow it."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(int(np.prod(shape)), classes)

    def forward(self, x: Tensor) -> Tensor:
        rows = [row if bool((row > 0.5).any()) else row * 2 for row in x.flatten(1)]
        logits: Tensor = self.head(torch.stack(rows))
        return logits


class TestRefusals:
    def one_line(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
        capsys.readouterr()
        assert code_of("export", *arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        return captured.err

    def test_no_such_run(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert "not the folder of a run" in self.one_line(capsys, tmp_path / "nowhere")

    @pytest.mark.parametrize("device", [3, 10**12])
    def test_no_such_device(self, capsys: pytest.CaptureFixture[str], run: Path, device: int) -> None:
        assert "has 3 devices, 0 to 2" in self.one_line(capsys, run, "--device-index", device)

    def test_a_negative_device(self, capsys: pytest.CaptureFixture[str], run: Path) -> None:
        assert "numbered from 0" in self.one_line(capsys, run, "--device-index=-1")

    def test_an_unknown_format(self, capsys: pytest.CaptureFixture[str], run: Path) -> None:
        assert "expected one of ['executorch', 'onnx', 'torch']" in self.one_line(
            capsys, run, "--format", "pickle"
        )

    def test_a_file_of_another_kind(self, capsys: pytest.CaptureFixture[str], run: Path) -> None:
        assert ".pt2 file" in self.one_line(capsys, run, "--out", "student.onnx")

    def test_an_out_that_cannot_be(
        self, capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "s.pt2").mkdir()
        assert "name another --out" in self.one_line(capsys, run, "--out", tmp_path / "s.pt2")
        assert "name another --out" in self.one_line(capsys, run, "--out", run / "config.toml" / "s.pt2")

    @pytest.mark.parametrize("form", ["onnx", "executorch"])
    def test_a_missing_extra(
        self, capsys: pytest.CaptureFixture[str], run: Path, monkeypatch: pytest.MonkeyPatch, form: str
    ) -> None:
        monkeypatch.setattr("privkd.export.formats.importlib.util.find_spec", lambda name: None)
        assert f"pip install 'privkd[{form}]'" in self.one_line(capsys, run, "--format", form)

    def test_an_unfinished_run(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        RunFolder.create(tmp_path / "run", small()).close()
        assert "0 of 2 rounds are finished" in self.one_line(capsys, tmp_path / "run")

    def test_a_deployment(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        """Its students are on their devices, and its noise cannot be drawn again."""
        play(tmp_path / "run", "privacy.noise=system")
        assert "each is on its device alone" in self.one_line(capsys, tmp_path / "run")

    def test_a_student_no_exporter_follows(self, tmp_path: Path) -> None:
        play(tmp_path / "run", "student.models=['test_export:Branching']", "student.engine=opacus")
        with RunFolder.resume(tmp_path / "run") as folder, pytest.raises(ModelError, match="take another"):
            export_student(folder, "torch", 0, None)
        assert not list(tmp_path.rglob("*.pt2"))


class TestCommand:
    def test_answers_a_typo_before_it_loads_torch(self) -> None:
        code = (
            "import sys, atexit; atexit.register(lambda: print('torch' in sys.modules)); "
            "from cli import app; app(['export', 'run', '--format', 'pickle'])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 2
        assert done.stdout.strip() == "False"

    def test_says_it_all_as_json(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = {path: path.read_bytes() for path in run.rglob("*.json*") if "export" not in str(path)}
        capsys.readouterr()
        assert code_of("export", run, "--device-index", 1, "--json") == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["file"] == str(run / "export" / "device-0001.pt2")
        assert answer["check"]["difference"] <= TOLERANCE
        assert answer["size_bytes"] == Path(answer["file"]).stat().st_size
        kept = json.loads((run / "export" / "device-0001-torch.json").read_text())
        assert kept == answer
        assert before == {path: path.read_bytes() for path in before}, "the run was changed"

    def test_says_it_to_people(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        assert code_of("export", run) == 0
        out = capsys.readouterr().out
        assert "divided by 16" in out
        assert "device-0000.pt2" in out
