"""Who reads a run folder, finished or interrupted, finds neither private records nor what devices keep.

Each search is shown to find what is there: in a plain twin's folder, or in planted bytes.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from running import StopAt, Trained, Watching, play, resume, small
from sklearn.datasets import load_digits
from torch import Tensor

from privkd.data import build_scenario
from privkd.runs.folder import RunFolder
from privkd.secure.fixedpoint import FixedPoint

SYSTEM = "privacy.noise=system"


def everything(folder: Path) -> bytes:
    """All bytes of all files."""
    return b"\0\0\0".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


def spelt(values: np.ndarray, *, scales: Iterable[float]) -> list[bytes]:
    """An array as it may lie on a disk: floats, integers at each scale, and text."""
    kinds = (np.float16, np.float32, np.float64)
    found = [values.astype(kind).tobytes() for kind in kinds]
    for scale in scales:
        whole = np.round(values.astype(np.float64) * scale)
        fitting = [kind for kind in (np.uint8, np.int16, np.int32, np.int64) if _fits(whole, kind)]
        found += [whole.astype(kind).tobytes() for kind in fitting]
    return [*found, json.dumps(values.astype(np.float64).ravel().tolist()).encode()[1:-1]]


def _fits(whole: np.ndarray, kind: type[np.integer]) -> bool:
    return bool(np.iinfo(kind).min <= whole.min() and whole.max() <= np.iinfo(kind).max)


class TestRecords:
    @pytest.mark.parametrize("kind", ["plain", "noised", "secure"])
    def test_are_nowhere(self, tmp_path: Path, kind: str) -> None:
        """Raw as the source has them, scaled, and encoded in integers: every record of every device."""
        config = small()
        play(tmp_path / "run", f"channel.kind={kind}", "rounds=1")
        scenario, raw = build_scenario(config.data, config.seed), load_digits().images
        records = [r for d in scenario.devices for r in (*d.train.inputs, *d.test.inputs)]
        assert all((r.numpy()[0] * 16 == raw).all((1, 2)).any() for r in records), "16 is the raw scale"
        bits = FixedPoint.for_clip_norm(8.0).fraction_bits
        forms = [form for r in records for form in spelt(r.numpy(), scales=(16, 255, 2**bits))]
        held = everything(tmp_path / "run")
        assert len(records) == 3 * 34
        assert not [form for form in forms if form in held]
        for form in forms[:: len(forms) // 20]:
            assert form in held + form, "the search finds what is there"

    def test_nor_labels_in_their_order(self, tmp_path: Path) -> None:
        config = small()
        play(tmp_path / "run", "rounds=1")
        held = everything(tmp_path / "run")
        for device in build_scenario(config.data, config.seed).devices:
            labels = device.train.labels.numpy()
            forms = [labels.astype(kind).tobytes() for kind in (np.uint8, np.int32, np.int64, np.float32)]
            forms.append(json.dumps(labels.tolist()).encode()[1:-1])
            assert not [form for form in forms if form in held]


def rows_found(folder: Path, answers: Tensor) -> int:
    """How many rows of per-device answers ``[device, query, class]`` lie in a folder, in any spelling."""
    held = everything(folder)
    bits = FixedPoint.for_clip_norm(answers.shape[1] ** 0.5).fraction_bits
    rows = [row.numpy() for device in answers for row in device]
    return sum(any(form in held for form in spelt(row, scales=(2**bits,))) for row in rows)


class TestAnswers:
    def test_of_a_device_are_nowhere_under_the_secure_channel(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The plain twin sends the same answers, and its folder holds every row of them."""
        watching = Watching(tmp_path / "plain", monkeypatch)
        play(tmp_path / "plain", "rounds=1")
        play(tmp_path / "secure", "rounds=1", "channel.kind=secure")
        answers = watching.answers[0]
        assert rows_found(tmp_path / "plain", answers) == answers.shape[0] * answers.shape[1]
        assert rows_found(tmp_path / "secure", answers) == 0


class TestStudents:
    """From a student's weights and the public queries anybody computes what its device answered."""

    def found(self, folder: Path, trained: Trained) -> list[str]:
        held = everything(folder)
        return [
            name
            for students in trained.rounds
            for student in students
            for name, tensor in student.items()
            if tensor.numel() > 3 and any(form in held for form in spelt(tensor.numpy(), scales=()))
        ]

    @pytest.mark.parametrize("noise", ["seeded", "system"])
    @pytest.mark.parametrize("start", ["teacher", "own"])
    def test_are_nowhere_in_a_finished_or_interrupted_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str, noise: str
    ) -> None:
        trained = Trained(monkeypatch)
        settings = (f"student.start={start}", f"privacy.noise={noise}", "rounds=3")
        for stage in (4, 8, 12):
            with pytest.raises(KeyboardInterrupt):
                play(tmp_path / f"{stage}", *settings, progress=StopAt(stage))
            assert self.found(tmp_path / f"{stage}", trained) == []
        resume(tmp_path / "12")
        assert self.found(tmp_path / "12", trained) == []
        assert not list((tmp_path / "12").rglob("*student*"))

    def test_would_be_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trained = Trained(monkeypatch)
        play(tmp_path / "run", "rounds=1")
        with RunFolder.resume(tmp_path / "run") as folder:
            folder.save("planted.safetensors", trained.rounds[0][1])
        assert len(self.found(tmp_path / "run", trained)) >= len(trained.rounds[0][1]) - 1


class TestFigures:
    def test_of_a_deployment_tell_nothing_of_private_students(self, tmp_path: Path) -> None:
        """No budget of a device covers their accuracy."""
        play(tmp_path / "run", SYSTEM, "rounds=1")
        result = json.loads((tmp_path / "run" / "result.json").read_text())
        assert [figures["students"] is None for figures in result["rounds"]] == [False, True]
        assert all(figures["personal"] is None for figures in result["rounds"])
        assert result["student"]["mean"] is None
        assert torch.isfinite(torch.tensor([figures["teacher"] for figures in result["rounds"]])).all()
