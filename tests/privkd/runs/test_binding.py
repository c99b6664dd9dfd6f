"""A run goes on, is exported and audited on the data and the code that it was started with, or not at all."""

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import Answer, Commands
from PIL import Image
from running import SMALL, StopAt, play, resume, same, small

import privkd.federation
import privkd.runs.fingerprints
from audits.membership_audit import audit_membership
from audits.reconstructions.audit import audit_reconstruction
from audits.requests import MembershipRequest, ReconstructionRequest
from papers.measurements import FULL, Latency, Personal
from privkd.config import DataConfig
from privkd.data.sources import data_files
from privkd.errors import RunError
from privkd.export.export import export_student
from privkd.journal import Journal
from privkd.plugins import own_code
from privkd.prepared import prepare
from privkd.privacy.noise import NoiseRoot
from privkd.progress import Silent
from privkd.runs.binding import Binding, binding_of
from privkd.runs.fingerprints import Fingerprints, bind, check_bound
from privkd.runs.folder import RunFolder

TINY = (*SMALL, "rounds=1", "data.device_test_records=2", "data.public_records=30",
        "data.validation_records=20")  # fmt: skip
IN_ROUND_TWO = 6
CHANGED = "the data changed since the run was started"


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with Commands(tmp_path_factory.mktemp("commands")) as server:
        yield server


def typed(*settings: str) -> list[str]:
    return [word for setting in (*TINY, *settings) for word in ("--set", setting)]


def table(path: Path, *, seed: int = 0) -> str:
    """A CSV file as the data of a run."""
    rng = np.random.default_rng(seed)
    rows = [",".join(f"{x:.3f}" for x in rng.random(4)) + f",{k % 3}" for k in range(400)]
    path.write_text("a,b,c,d,label\n" + "\n".join(rows) + "\n")
    return f"data.source={path}"


def binding(path: Path) -> Binding:
    found = binding_of(Journal(path / "journal.jsonl"), path)
    assert found is not None
    return found


def exported(folder: RunFolder) -> object:
    return export_student(folder, "torch", 0, None)


def guessed(folder: RunFolder) -> object:
    request = MembershipRequest(view="student", attack="lira-online", shadows=8, targets=1)
    return audit_membership(folder, request, Silent())


def rebuilt(folder: RunFolder) -> object:
    return audit_reconstruction(folder, ReconstructionRequest(), Silent())


RETRAIN: dict[str, Callable[[RunFolder], object]] = {
    "export": exported,
    "audit membership": guessed,
    "audit reconstruction": rebuilt,
    "papers, personal": lambda folder: Personal().measure(folder, Silent(), FULL),
    "papers, latency": lambda folder: Latency("torch").measure(folder, Silent(), FULL),
}
"""Whatever trains the students of a finished run again, or replays them."""


class TestData:
    @pytest.fixture(scope="class")
    def finished(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        place = tmp_path_factory.mktemp("data")
        play(place / "run", "rounds=1", table(place / "t.csv"))
        return place

    def test_is_noted_in_one_line_before_anything_is_spent(self, finished: Path) -> None:
        steps = [row["step"] for row in Journal(finished / "run" / "journal.jsonl")]
        assert steps[:2] == ["started", "bound"]
        assert steps.count("bound") == 1
        noted = binding(finished / "run")
        digest = hashlib.sha256((finished / "t.csv").read_bytes()).hexdigest()
        assert noted.data == {"t.csv": f"sha256:{digest}"}
        assert noted.code == {}
        assert set(noted.versions) == {"privkd", "torch", "opacus", "numpy", "crypten", "dp-accounting"}

    @pytest.mark.parametrize("what", RETRAIN)
    def test_that_changed_is_named_by_whatever_trains_again(
        self, finished: Path, tmp_path: Path, what: str
    ) -> None:
        table(finished / "t.csv", seed=1)
        before = sorted(path.name for path in (finished / "run").rglob("*"))
        with RunFolder.resume(finished / "run") as folder, pytest.raises(RunError) as refused:
            RETRAIN[what](folder)
        table(finished / "t.csv")
        assert f"{CHANGED}: t.csv was changed; bring back" in str(refused.value)
        assert sorted(path.name for path in (finished / "run").rglob("*")) == before, "nothing was written"

    @pytest.mark.parametrize("what", ["export", "audit membership"])
    def test_that_is_the_same_is_trained_on_again(self, finished: Path, what: str) -> None:
        with RunFolder.resume(finished / "run") as folder:
            RETRAIN[what](folder)

    @pytest.mark.parametrize("rounds", [1, 2], ids=["finished", "unfinished"])
    def test_that_changed_is_not_resumed_on(self, tmp_path: Path, rounds: int) -> None:
        data = table(tmp_path / "t.csv")
        if rounds == 1:
            play(tmp_path / "run", data, "rounds=1")
        else:
            with pytest.raises(KeyboardInterrupt):
                play(tmp_path / "run", data, progress=StopAt(IN_ROUND_TWO))
        text = (tmp_path / "t.csv").read_text()
        (tmp_path / "t.csv").write_text(text.replace("0.", "1.", 1))
        with pytest.raises(RunError, match=rf"{CHANGED}: t\.csv was changed"):
            resume(tmp_path / "run")
        (tmp_path / "t.csv").unlink()
        with pytest.raises(RunError, match=rf"{CHANGED}: t\.csv is gone"):
            resume(tmp_path / "run")
        (tmp_path / "t.csv").write_text(text)
        resume(tmp_path / "run")

    def test_that_cannot_be_read_any_more_is_still_named(self, tmp_path: Path) -> None:
        data = table(tmp_path / "t.csv")
        play(tmp_path / "run", data, "rounds=1")
        (tmp_path / "t.csv").write_text("no table\n")
        with pytest.raises(RunError, match=rf"{CHANGED}: t\.csv was changed"):
            resume(tmp_path / "run")

    def test_of_a_function_is_known_by_its_records(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "drawn.py").write_text(
            "import os\nimport numpy as np\ndef records():\n"
            "    rng = np.random.default_rng(int(os.environ['DRAWN']))\n"
            "    return rng.random((400, 4), dtype=np.float32), np.arange(400) % 3\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("DRAWN", "0")
        play(tmp_path / "run", "data.source=drawn:records", "rounds=1")
        monkeypatch.setenv("DRAWN", "1")
        with pytest.raises(RunError, match=rf"{CHANGED}: the records are others"):
            resume(tmp_path / "run")
        with (
            RunFolder.resume(tmp_path / "run") as folder,
            pytest.raises(RunError, match="records are others"),
        ):
            exported(folder)


FEW = ("data.devices=2", "data.records_per_device=8", "data.public_records=12",
       "data.validation_records=6", "data.proxy_records=6", "data.device_test_records=1")  # fmt: skip


def pictures(folder: Path) -> None:
    """A folder of 99 images in three classes."""
    rng = np.random.default_rng(0)
    for number in range(99):
        path = folder / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)


class TestFiles:
    """Which files a data set is known by."""

    def files(self, source: object, data_dir: Path | None = None) -> list[str]:
        return list(data_files(DataConfig(source=str(source), data_dir=data_dir)))

    def test_of_idx(self, tmp_path: Path) -> None:
        place = tmp_path / "MNIST" / "raw"
        place.mkdir(parents=True)
        names = ["t10k-images-idx3-ubyte.gz", "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"]
        for name in (*names, "notes.txt"):
            (place / name).touch()
        assert self.files("mnist", tmp_path) == self.files(place) == names

    def test_of_parquet_in_one_piece_and_in_shards(self, tmp_path: Path) -> None:
        (tmp_path / "cifar10").mkdir()
        for name in ("train.parquet", "test.parquet", "README.md"):
            (tmp_path / "cifar10" / name).touch()
        assert self.files("cifar10", tmp_path) == ["test.parquet", "train.parquet"]
        shards = tmp_path / "shards" / "data"
        shards.mkdir(parents=True)
        for number in range(2):
            (shards / f"train-{number}-of-2.parquet").touch()
        assert self.files(shards.parent) == ["data/train-0-of-2.parquet", "data/train-1-of-2.parquet"]

    def test_of_images_by_class(self, tmp_path: Path) -> None:
        for name in ("b/1.png", "a/2.png", "a/.hidden.png", ".thumbs/x.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        assert self.files(tmp_path) == ["a/2.png", "b/1.png"]

    def test_of_a_file_below_the_data_dir(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").touch()
        assert self.files("t.csv", tmp_path) == self.files(tmp_path / "t.csv") == ["t.csv"]

    def test_of_what_has_none(self, tmp_path: Path) -> None:
        assert self.files("digits") == self.files("a.b:c") == self.files(tmp_path / "gone") == []
        assert self.files("mnist", tmp_path) == []

    def test_many_have_a_digest_for_each_folder(self, tmp_path: Path) -> None:
        for number in range(120):
            path = tmp_path / ("even" if number % 2 == 0 else "odd") / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_text(str(number))
        config, plain = DataConfig(source=str(tmp_path)), Fingerprints(None)
        before = plain.of_data(config)
        assert list(before) == ["even/", "odd/"]
        (tmp_path / "odd" / "7.png").rename(tmp_path / "odd" / "8.png")
        after = plain.of_data(config)
        assert [before[name] == after[name] for name in before] == [True, False]

    def test_an_image_more_or_less_is_named(self, tmp_path: Path) -> None:
        pictures(tmp_path / "images")
        play(tmp_path / "run", f"data.source={tmp_path / 'images'}", "rounds=1", *FEW)
        extra = tmp_path / "images" / "class0" / "extra.png"
        shutil.copy(tmp_path / "images" / "class0" / "0.png", extra)
        with pytest.raises(RunError, match=rf"{CHANGED}: class0/extra\.png is new"):
            resume(tmp_path / "run")
        extra.unlink()
        (tmp_path / "images" / "class1" / "1.png").unlink()
        with pytest.raises(RunError, match=rf"{CHANGED}: class1/1\.png is gone"):
            resume(tmp_path / "run")


OWN = """
from torch import nn
from parts.layers import activation
def student(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), activation(), nn.Linear(8, classes))
"""

FUNCTION = """
import numpy as np
def records():
    rng = np.random.default_rng(0)
    return rng.random((400, 4), dtype=np.float32), np.arange(400) % 3
"""
ALONE = OWN.replace("from parts.layers import activation", "activation = nn.Tanh")


class TestCode:
    """Through the command, each in a process of its own: modules stay loaded in one."""

    @pytest.fixture(scope="class")
    def place(self, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A finished run of a model of one's own, which imports a package beside it."""
        place = tmp_path_factory.mktemp("code")
        (place / "parts").mkdir()
        (place / "own.py").write_text(OWN)
        (place / "parts" / "__init__.py").touch()
        (place / "parts" / "layers.py").write_text("from torch.nn import Tanh as activation\n")
        (place / "unused.py").touch()
        answer = self.trained(commands, place)
        assert answer.code == 0, answer.err
        return place

    def trained(self, commands: Commands, place: Path, *more: str) -> Answer:
        words = typed("student.models=['own:student']")
        return commands.run("train", *words, "--out", "run", *more, cwd=place)

    def test_is_noted_with_what_it_imported(self, place: Path) -> None:
        noted = binding(place / "run")
        assert list(noted.code) == ["own.py", "parts/__init__.py", "parts/layers.py"]
        assert list(noted.folders) == [str(place.resolve())]
        digest = hashlib.sha256((place / "own.py").read_bytes()).hexdigest()
        assert noted.code["own.py"] == f"sha256:{digest}"

    @pytest.mark.parametrize("file", ["own.py", "parts/layers.py"])
    @pytest.mark.parametrize(
        "words",
        [("export",), ("audit", "membership"), ("train", "--resume")],
        ids=lambda words: " ".join(words),
    )
    def test_that_changed_is_named(
        self, commands: Commands, place: Path, file: str, words: tuple[str, ...]
    ) -> None:
        text = (place / file).read_text()
        (place / file).write_text(text.replace("Tanh", "ReLU").replace("8", "9"))
        answer = commands.run(*words, "run", cwd=place)
        (place / file).write_text(text)
        assert answer.code == 2
        line = f"the code changed since the run was started: {file} was changed; bring back the old code"
        assert line in " ".join(answer.err.split())

    def test_that_is_broken_or_gone_is_named_before_it_is_run(self, commands: Commands, place: Path) -> None:
        (place / "own.py").write_text("raise SystemExit('ran')\n")
        assert "own.py was changed" in commands.run("export", "run", cwd=place).err
        (place / "own.py").unlink()
        answer = commands.run("export", "run", cwd=place)
        (place / "own.py").write_text(OWN)
        assert "own.py is gone" in answer.err
        assert answer.code == 2

    def test_that_nobody_imported_may_change(self, commands: Commands, place: Path) -> None:
        (place / "unused.py").write_text("x = 1\n")
        answer = commands.run("export", "run", cwd=place)
        assert answer.code == 0, answer.err

    def test_is_found_from_another_folder(self, commands: Commands, tmp_path: Path) -> None:
        """Another module of the same name there is not taken for it."""
        home, away = tmp_path / "home", tmp_path / "away"
        for place in (home, away):
            place.mkdir()
        (home / "own.py").write_text(ALONE)
        (away / "own.py").write_text("raise SystemExit('the wrong one')\n")
        assert self.trained(commands, home).code == 0
        answer = commands.run("export", home / "run", cwd=away)
        assert answer.code == 0, answer.err

    def test_of_a_folder_that_a_stranger_names_is_not_run(self, commands: Commands, tmp_path: Path) -> None:
        """Whoever makes up a run folder can name any folder, and vouch for the module that lies there."""
        home, away = tmp_path / "home", tmp_path / "away"
        for place in (home, away):
            place.mkdir()
        (home / "own.py").write_text(ALONE)
        assert self.trained(commands, home).code == 0
        rebound(home / "run", lambda row: row.update(folders={str(home): "own.py 1-2"}))
        for other in ("", "raise SystemExit('the wrong one')\n"):
            if other:
                (away / "own.py").write_text(other)
            answer = commands.run("export", home / "run", cwd=away)
            assert answer.code == 2
            assert f"its modules were imported from {home}: go on from there" in answer.err
        answer = commands.run("export", "run", cwd=home)
        assert answer.code == 0, answer.err

    def test_may_move_with_its_run(self, commands: Commands, place: Path, tmp_path: Path) -> None:
        for name in ("own.py", "parts", "run"):
            copy = shutil.copytree if (place / name).is_dir() else shutil.copy
            copy(place / name, tmp_path / name)
        hidden = place.with_name("hidden")
        place.rename(hidden)
        answer = commands.run("export", "run", cwd=tmp_path)
        hidden.rename(place)
        assert answer.code == 0, answer.err

    def test_of_a_data_function_is_its_code_too(self, commands: Commands, tmp_path: Path) -> None:
        (tmp_path / "mine.py").write_text(FUNCTION)
        settings = typed("data.source=mine:records")
        assert commands.run("train", *settings, "--out", "run", cwd=tmp_path).code == 0
        (tmp_path / "mine.py").write_text(FUNCTION + "# the same records\n")
        answer = commands.run("export", "run", cwd=tmp_path)
        assert "mine.py was changed" in answer.err


class TestOwnCode:
    def test_leaves_out_what_is_installed_and_what_is_ours(self) -> None:
        assert own_code(["mlp", "auto"]) == own_code([])
        found = own_code(["torch.nn:Linear"])
        assert found.files
        assert all(name.startswith("torch/") for name in found.files)
        here = own_code([f"{__name__}:binding"])
        assert f"{__name__}.py" in here.files
        assert list(here.folders) == [str(Path(__file__).resolve().parent)]
        assert not any(name.startswith(("privkd", "audits")) for name in here.files)

    def test_of_what_was_not_imported_is_nothing(self) -> None:
        assert own_code(["no_such_module_at_all:f"]).files == {}


class TestDeployment:
    SYSTEM = (
        "privacy.noise=system", "data.classes=0,1,2", "data.public_records=40", "data.validation_records=20",
        "data.test_records=40",
    )  # fmt: skip

    def test_shows_no_plain_digest_of_its_data_and_no_count_of_its_files(self, tmp_path: Path) -> None:
        data = table(tmp_path / "t.csv")
        with pytest.raises(KeyboardInterrupt):
            play(tmp_path / "run", data, *self.SYSTEM, progress=StopAt(IN_ROUND_TWO))
        noted = binding(tmp_path / "run")
        digests = [*noted.data.values(), noted.records, noted.classes]
        assert all(digest.startswith("hmac-sha256:") for digest in digests)
        plain = Fingerprints(None)
        scenario = prepare(small(data)).scenario
        known = [*plain.of_data(DataConfig(source=str(tmp_path / "t.csv"))).values()]
        known += [plain.of_classes(scenario), plain.of_records(scenario)]
        text = (tmp_path / "run" / "journal.jsonl").read_text()
        assert not any(digest.rpartition(":")[2] in text for digest in known)
        assert list(noted.data) == ["t.csv"]

    def test_two_runs_on_the_same_data_have_nothing_in_common(self, tmp_path: Path) -> None:
        data = table(tmp_path / "t.csv")
        for name in ("one", "two"):
            play(tmp_path / name, data, *self.SYSTEM, "rounds=1")
        one, two = binding(tmp_path / "one"), binding(tmp_path / "two")
        assert one.versions == two.versions
        for name in ("data", "records", "classes"):
            assert getattr(one, name) != getattr(two, name)

    def test_is_checked_while_its_secret_is_there(self, tmp_path: Path) -> None:
        data = table(tmp_path / "t.csv")
        with pytest.raises(KeyboardInterrupt):
            play(tmp_path / "run", data, *self.SYSTEM, progress=StopAt(IN_ROUND_TWO))
        table(tmp_path / "t.csv", seed=1)
        with pytest.raises(RunError, match=rf"{CHANGED}: t\.csv was changed"):
            resume(tmp_path / "run")
        table(tmp_path / "t.csv")
        resume(tmp_path / "run")

    def test_a_folder_of_files_is_one_digest(self, tmp_path: Path) -> None:
        for name in ("jane", "john"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "1.png").write_text(name)
        keyed = Fingerprints(bytes(32))
        before = keyed.of_data(DataConfig(source=str(tmp_path)))
        assert list(before) == [tmp_path.name]
        (tmp_path / "jane" / "1.png").rename(tmp_path / "jane" / "2.png")
        assert keyed.of_data(DataConfig(source=str(tmp_path))) != before

    def test_a_folder_may_be_named_by_where_one_stands(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pictures(tmp_path / "images")
        monkeypatch.chdir(tmp_path / "images")
        few = ("data.source=.", "data.classes=class0,class1,class2", "data.test_records=12", *FEW)
        with pytest.raises(KeyboardInterrupt):
            play(tmp_path / "run", *self.SYSTEM, *few, progress=StopAt(IN_ROUND_TWO))
        monkeypatch.chdir(tmp_path)
        assert list(binding(tmp_path / "run").data) == ["images"]
        resume(tmp_path / "run")

    def test_the_code_of_a_data_function_is_keyed_like_its_data(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It may hold the records itself."""
        file = tmp_path / "kept.py"
        file.write_text(FUNCTION)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            play(tmp_path / "run", "data.source=kept:records", *self.SYSTEM, progress=StopAt(IN_ROUND_TWO))
        assert binding(tmp_path / "run").code["kept.py"].startswith("hmac-sha256:")
        plain = hashlib.sha256(file.read_bytes()).hexdigest()
        assert plain not in (tmp_path / "run" / "journal.jsonl").read_text()
        file.write_text(FUNCTION + "# the same records\n")
        with pytest.raises(
            RunError, match=r"the code changed since the run was started: kept\.py was changed"
        ):
            resume(tmp_path / "run")
        file.write_text(FUNCTION)
        resume(tmp_path / "run")

    @pytest.mark.parametrize("what", RETRAIN)
    def test_is_neither_audited_nor_exported(self, tmp_path: Path, what: str) -> None:
        play(tmp_path / "run", "privacy.noise=system", "rounds=1")
        before = sorted(tmp_path.rglob("*"))
        with RunFolder.resume(tmp_path / "run") as folder, pytest.raises(RunError) as refused:
            RETRAIN[what](folder)
        assert "is a deployment (privacy.noise='system')" in str(refused.value)
        assert refused.value.exit_code == 2
        assert sorted(tmp_path.rglob("*")) == before, "no answer of a device was written"

    @pytest.mark.parametrize("audit", ["membership", "reconstruction"])
    def test_the_command_says_so_in_one_line(self, commands: Commands, tmp_path: Path, audit: str) -> None:
        play(tmp_path / "run", "privacy.noise=system", "rounds=1")
        answer = commands.run("audit", audit, "run", cwd=tmp_path)
        assert answer.code == 2
        assert answer.out == ""
        assert answer.err.count("\n") == 1
        assert "run is a deployment (privacy.noise='system') and is not audited" in answer.err
        assert "privkd audit mechanism" in answer.err


class TestVersions:
    def test_another_library_is_named_on_stderr_and_the_run_goes_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(KeyboardInterrupt):
            play(tmp_path / "run", progress=StopAt(IN_ROUND_TWO))
        found = privkd.runs.fingerprints.versions()
        monkeypatch.setattr(privkd.runs.fingerprints, "versions", lambda: found | {"opacus": "99.0"})
        with caplog.at_level(logging.WARNING):
            resume(tmp_path / "run")
        said = [record.getMessage() for record in caplog.records if "privkd: warning" in record.getMessage()]
        assert len(said) == 1
        assert f"was started with opacus {found['opacus']} and goes on with opacus 99.0" in said[0]

    def test_through_the_command(self, commands: Commands, tmp_path: Path) -> None:
        assert commands.run("train", *typed(), "--out", "run", cwd=tmp_path).code == 0
        rebound(tmp_path / "run", lambda row: row["versions"].update(torch="0.1"))
        answer = commands.run("export", "run", cwd=tmp_path)
        assert answer.code == 0
        assert f"run was started with torch 0.1 and goes on with torch {torch.__version__}" in answer.err


def rebound(path: Path, edit: Callable[[dict[str, Any]], object], step: str = "bound") -> None:
    """Write the journal anew, with its note edited: as a run of another time would have left it."""
    journal = path / "journal.jsonl"
    rows = list(Journal(journal))
    journal.unlink()
    for row in rows:
        if row["step"] == step:
            edit(row)
        if row:
            Journal(journal).append(row)


def as_before(row: dict[str, Any]) -> None:
    """What versions noted that bound a run to its records alone."""
    digest = row["records"].removeprefix("hmac-sha256:")
    row.clear()
    row.update(step="records", hmac=digest)


class TestUnbound:
    """Runs of versions that noted less."""

    def test_one_that_knows_its_records_goes_on_with_a_warning(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(KeyboardInterrupt):
            play(tmp_path / "run", progress=StopAt(IN_ROUND_TWO))
        play(tmp_path / "whole")
        rebound(tmp_path / "run", as_before)
        with caplog.at_level(logging.WARNING):
            resume(tmp_path / "run")
        assert "did not bind runs to their code" in caplog.text
        assert same(tmp_path / "run", tmp_path / "whole")

    def test_and_is_refused_on_others(self, tmp_path: Path) -> None:
        play(tmp_path / "run", table(tmp_path / "t.csv"), "rounds=1")
        rebound(tmp_path / "run", as_before)
        table(tmp_path / "t.csv", seed=1)
        with pytest.raises(RunError, match=rf"{CHANGED}: the records are others"):
            resume(tmp_path / "run")

    def test_one_that_knows_nothing_is_refused(self, tmp_path: Path) -> None:
        play(tmp_path / "run", "rounds=1")
        rebound(tmp_path / "run", dict.clear)
        with pytest.raises(RunError, match="did not bind runs to their data"):
            resume(tmp_path / "run")

    def test_one_that_did_not_begin_is_bound_now(self, tmp_path: Path) -> None:
        config = small("rounds=1")
        with RunFolder.create(tmp_path / "run", config) as folder:
            game = prepare(config)
            check_bound(folder, game.scenario)
            bind(folder, game.scenario, NoiseRoot.from_seed(0))
            assert binding(tmp_path / "run").data == {}


@pytest.mark.parametrize(
    "note",
    [{}, {"data": 3}, {"data": {}, "code": [], "versions": {}}, {"data": {}, "code": {}, "versions": None}],
)
def test_a_note_of_another_form_is_one_line(tmp_path: Path, note: dict[str, Any]) -> None:
    with RunFolder.create(tmp_path / "run", small()) as folder:
        folder.journal.append({"step": "bound", "records": "", "classes": "", "folders": {}, **note})
        with pytest.raises(RunError, match="is not of this version's form"):
            binding_of(folder.journal, folder.path)


def test_a_note_survives_its_way_through_the_journal(tmp_path: Path) -> None:
    noted = Binding(
        {"a": "sha256:1"}, "r", "c", {"b.py": "sha256:2"}, {"/x": "b.py 1-2"}, {"torch": "2"}, {"e": "f"}
    )
    with RunFolder.create(tmp_path / "run", small()) as folder:
        folder.note("bound", **asdict(noted))
    assert binding(tmp_path / "run") == noted
