"""Run folders: whole or not at all, one process at a time, and a clear line where the disk fails."""

import dataclasses
import json
import os
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from privkd.config import Config, load_config
from privkd.errors import RunError
from privkd.journal import Journal
from privkd.privacy.noise import NoiseRoot
from privkd.runs.checkpoint import RoundFigures, load_transcript, saved
from privkd.runs.folder import RunFolder, default_folder, prefixed, restore, versions

CONFIG = load_config(None, ["data.devices=3"])


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        yield folder


def in_another_process(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


class TestStart:
    def test_what_a_new_run_holds(self, run: RunFolder) -> None:
        assert run.config == CONFIG
        assert {entry.name for entry in run.path.iterdir()} == {
            ".lock", "config.toml", "journal.jsonl", "versions.json",
        }  # fmt: skip
        found = json.loads((run.path / "versions.json").read_text())
        assert found["torch"] == torch.__version__
        assert set(found) == set(versions())

    def test_parents_are_made(self, tmp_path: Path) -> None:
        RunFolder.create(tmp_path / "a" / "b" / "c", CONFIG).close()
        assert (tmp_path / "a" / "b" / "c" / "journal.jsonl").is_file()

    def test_an_empty_folder_will_do(self, tmp_path: Path) -> None:
        RunFolder.create(tmp_path, CONFIG).close()

    @pytest.mark.parametrize("name", ["data.csv", "config.toml", "versions.json", "rounds", ".hidden"])
    def test_a_folder_with_anything_of_somebody_else_will_not(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("mine")
        with pytest.raises(RunError, match="is not empty: name another --out"):
            RunFolder.create(tmp_path, CONFIG)
        assert (tmp_path / name).read_text() == "mine"
        assert [entry.name for entry in tmp_path.iterdir()] == [name], "nothing was left in it"

    def test_nor_one_with_a_run(self, run: RunFolder) -> None:
        run.close()
        with pytest.raises(RunError, match=f"holds a run: resume it with --resume {run.path}"):
            RunFolder.create(run.path, CONFIG)
        RunFolder.resume(run.path)

    @pytest.mark.parametrize(
        "left", [[], ["config.toml"], ["config.toml", "versions.json"], [".config.toml.x1"]]
    )
    def test_a_start_that_was_cut_short_can_be_made_again(self, tmp_path: Path, left: list[str]) -> None:
        (tmp_path / ".lock").touch()
        for name in left:
            (tmp_path / name).write_text("half")
        with pytest.raises(RunError, match="is not the folder of a run"):
            RunFolder.resume(tmp_path)
        with RunFolder.create(tmp_path, CONFIG) as folder:
            assert folder.config == CONFIG

    def test_a_file_in_its_place(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("mine")
        for place in (path, path / "below"):
            with pytest.raises(RunError, match="name another --out"):
                RunFolder.create(place, CONFIG)

    @pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/y"])
    def test_names_too_long(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(RunError, match="name another --out"):
            RunFolder.create(tmp_path / name, CONFIG)
        with pytest.raises(RunError, match="is not the folder of a run"):
            RunFolder.resume(tmp_path / name)

    def test_default_folders_are_never_shared(self, tmp_path: Path) -> None:
        made = {default_folder(tmp_path / "runs") for _ in range(20)}
        assert len(made) == 20
        for path in made:
            assert path.is_dir()
            RunFolder.create(path, CONFIG).close()

    def test_default_folder_under_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "runs").write_text("mine")
        with pytest.raises(RunError, match="name a folder with --out"):
            default_folder(tmp_path / "runs")


class TestLock:
    def test_another_process_is_refused_until_the_first_is_gone_even_by_kill(self, run: RunFolder) -> None:
        run.close()
        code = (
            "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX);"
            "print('held', flush=True); sys.stdin.read()"
        )
        command = [sys.executable, "-c", code, str(run.path / ".lock")]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(RunError, match="is in use by another process"):
                RunFolder.resume(run.path)
            holder.kill()
        RunFolder.resume(run.path).close()

    @pytest.mark.slow
    def test_through_two_of_our_own(self, run: RunFolder) -> None:
        code = """
            import sys
            from pathlib import Path
            from privkd.errors import RunError
            from privkd.runs.folder import RunFolder
            try:
                RunFolder.resume(Path(sys.argv[1]))
            except RunError as error:
                print(error)
                sys.exit(2)
        """
        refused = in_another_process(code, run.path)
        assert refused.returncode == 2, refused.stderr
        assert "is in use by another process" in refused.stdout
        run.close()
        assert in_another_process(code, run.path).returncode == 0

    def test_starting_in_it_is_refused_too(self, tmp_path: Path) -> None:
        """Two starts at once: whoever comes second finds the lock held, and leaves all as it is."""
        path = tmp_path / "run"
        path.mkdir()
        first = RunFolder(path)
        with pytest.raises(RunError, match="in use by another process"):
            RunFolder.create(path, CONFIG)
        first.close()

    def test_a_refused_folder_is_let_go(self, run: RunFolder) -> None:
        """An error while opening must not keep the lock."""
        run.close()
        text = (run.path / "config.toml").read_text()
        (run.path / "config.toml").write_text(text + "\n")
        for _ in range(2):
            with pytest.raises(RunError, match=r"config\.toml was changed since"):
                RunFolder.resume(run.path)
        (run.path / "config.toml").write_text(text)
        journal = (run.path / "journal.jsonl").read_bytes()
        (run.path / "journal.jsonl").write_bytes(b"x" + journal)
        for _ in range(2):
            with pytest.raises(RunError, match="line 1"):
                RunFolder.resume(run.path)
        (run.path / "journal.jsonl").write_bytes(journal)
        RunFolder.resume(run.path).close()


class TestResume:
    def test_settings_survive(self, run: RunFolder) -> None:
        run.close()
        with RunFolder.resume(run.path) as again:
            assert again.config == CONFIG

    @pytest.mark.parametrize("missing", ["config.toml", "journal.jsonl"])
    def test_not_a_run(self, run: RunFolder, missing: str) -> None:
        run.close()
        (run.path / missing).unlink()
        with pytest.raises(RunError, match="is not the folder of a run"):
            RunFolder.resume(run.path)

    def test_nowhere_and_elsewhere(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for path in (tmp_path / "none", tmp_path / "file", tmp_path):
            with pytest.raises(RunError, match="is not the folder of a run"):
                RunFolder.resume(path)
        assert not (tmp_path / ".lock").exists()

    def test_a_tail_that_a_crash_left_is_cut_off(self, run: RunFolder) -> None:
        run.close()
        with (run.path / "journal.jsonl").open("ab") as file:
            file.write(b'{"chain":"half')
        with RunFolder.resume(run.path) as again:
            again.journal.append({"step": "on"})
        assert [record["step"] for record in Journal(run.path / "journal.jsonl")] == ["started", "on"]


class TestWrites:
    def test_whole(self, run: RunFolder) -> None:
        run.write_text("a/b.txt", "ü")
        assert (run.path / "a" / "b.txt").read_text() == "ü"
        run.write_json("c.json", {"x": [1, 2]})
        assert json.loads((run.path / "c.json").read_text()) == {"x": [1, 2]}
        with pytest.raises(ValueError, match="Out of range float values"):
            run.write_json("c.json", {"x": float("inf")})
        assert json.loads((run.path / "c.json").read_text()) == {"x": [1, 2]}

    @pytest.mark.parametrize("where", ["replace", "fsync"])
    def test_or_not_at_all(self, run: RunFolder, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
        """Whatever fails, the old file stands, and no half of the new one is left beside it."""
        run.write_text("a.txt", "old")
        before = sorted(entry.name for entry in run.path.iterdir())

        def fail(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(*((Path, "replace") if where == "replace" else (os, "fsync")), fail)
            with pytest.raises(RunError, match=r"a\.txt: No space left on device; the run is kept"):
                run.write_text("a.txt", "new")
        assert (run.path / "a.txt").read_text() == "old"
        assert sorted(entry.name for entry in run.path.iterdir()) == before

    def test_interrupted(self, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        before = sorted(entry.name for entry in run.path.iterdir())

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", interrupt)
            with pytest.raises(KeyboardInterrupt):
                run.write_text("a.txt", "new")
        assert sorted(entry.name for entry in run.path.iterdir()) == before


class TestDiskFailures:
    """Through a real process whose files cannot grow: the kernel itself refuses."""

    CODE = """
        import resource, signal, sys
        from pathlib import Path
        import torch
        from privkd.config import Config
        from privkd.errors import RunError
        from privkd.runs.folder import RunFolder
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        folder = RunFolder.create(Path(sys.argv[1]), Config())
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
        def attempt(step):
            try:
                step()
            except RunError as error:
                print(error)
        attempt(lambda: folder.save("rounds/000/cloud.safetensors", {"x": torch.zeros(10_000)}))
        attempt(lambda: folder.journal.append({"step": "round", "x": "y" * 5000}))
        attempt(lambda: RunFolder.create(Path(sys.argv[1] + "2"), Config(data={"source": "x" * 5000})))
    """

    def test_a_full_disk(self, tmp_path: Path) -> None:
        path = tmp_path / "run"
        done = in_another_process(self.CODE, path)
        assert done.returncode == 0, done.stderr
        saving, journal, starting = done.stdout.splitlines()
        assert saving.endswith("cloud.safetensors: File too large; the run is kept, resume it later")
        assert journal.endswith("journal.jsonl: File too large; nothing was recorded")
        assert "config.toml: File too large" in starting
        with RunFolder.resume(path) as kept:
            assert [record["step"] for record in kept.journal] == ["started"]
        assert not any("cloud" in entry.name for entry in path.rglob("*"))

    def test_a_folder_that_cannot_be_written(self, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        """Root may write anywhere, so the refusal is put in by hand, at each way in."""
        run.close()

        def refuse(*_: object, **__: object) -> int:
            raise PermissionError(13, "Permission denied")

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            with pytest.raises(RunError, match="Permission denied"):
                RunFolder.resume(run.path)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", refuse)
            with pytest.raises(RunError, match="Permission denied; name another --out"):
                RunFolder.create(run.path.parent / "other", CONFIG)
            with pytest.raises(RunError, match="Permission denied; name a folder with --out"):
                default_folder(run.path.parent)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_read_only_folder(self, run: RunFolder) -> None:
        run.close()
        run.path.chmod(0o500)
        try:
            with RunFolder.resume(run.path) as again, pytest.raises(RunError, match="Permission denied"):
                again.write_text("a.txt", "x")
        finally:
            run.path.chmod(0o700)


class TestTensors:
    def test_bit_for_bit(self, run: RunFolder) -> None:
        tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.tensor(0.1, dtype=torch.float64)}
        back = run.load("x.safetensors", run.save("x.safetensors", tensors))
        assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
        assert all(back[name].dtype == tensor.dtype for name, tensor in tensors.items())

    def test_views_and_shared_memory(self, run: RunFolder) -> None:
        base = torch.randn(4, 4)
        tensors = {"whole": base, "part": base[1:, ::2], "turned": base.t()}
        back = run.load("x.safetensors", run.save("x.safetensors", tensors))
        assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())

    @pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped", "appended", "other"])
    def test_damage_is_one_clear_error(self, run: RunFolder, damage: str) -> None:
        path = run.path / "x.safetensors"
        digest = run.save("x.safetensors", {"a": torch.randn(30)})
        data = path.read_bytes()
        changed = {
            "empty": b"", "truncated": data[:-1], "appended": data + b"\0",
            "flipped": data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
            "other": b"not safetensors at all",
        }  # fmt: skip
        path.unlink() if damage == "missing" else path.write_bytes(changed[damage])
        with pytest.raises(RunError, match=r"x\.safetensors"):
            run.load("x.safetensors", digest)

    @given(st.binary(max_size=200))
    @settings(max_examples=50)
    def test_bytes_that_are_no_tensors(self, tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
        """Even where the digest was forged to fit: never a traceback, and never a pickle."""
        with RunFolder.create(tmp_path_factory.mktemp("run"), CONFIG) as folder:
            (folder.path / "x.safetensors").write_bytes(data)
            with pytest.raises(RunError, match="is not safetensors"):
                folder.load("x.safetensors", folder.digest("x.safetensors"))

    def test_models(self, run: RunFolder) -> None:
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
        tensors = run.load("m.safetensors", run.save("m.safetensors", prefixed("teacher", model)))
        other = restore(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).train(), tensors, "teacher")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        assert not other.training
        with pytest.raises(RunError, match="weights 'teacher' do not fit their model"):
            restore(nn.Linear(3, 2), tensors, "teacher")
        with pytest.raises(RunError, match="weights 'student' do not fit"):
            restore(model, tensors, "student")


class TestSecrets:
    def test_kept_apart_and_only_for_the_owner(self, run: RunFolder) -> None:
        key = NoiseRoot.from_system().key
        assert run.secret("noise.key", key) == key
        path = run.path / "secrets" / "noise.key"
        assert path.read_bytes() == key
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700

    def test_the_first_one_is_kept(self, run: RunFolder) -> None:
        first = run.secret("noise.key", b"a" * 32)
        assert run.secret("noise.key", b"b" * 32) == first
        run.close()
        with RunFolder.resume(run.path) as again:
            assert again.secret("noise.key", b"c" * 32) == first

    @pytest.mark.parametrize("damage", [None, b"", b"a" * 31, b"b" * 32])
    def test_without_the_first_one_the_run_stops(self, run: RunFolder, damage: bytes | None) -> None:
        """A fresh key would repeat an interrupted release under other noise: two draws for one charge."""
        run.secret("noise.key", b"a" * 32)
        path = run.path / "secrets" / "noise.key"
        path.unlink() if damage is None else path.write_bytes(damage)
        run.close()
        with RunFolder.resume(run.path) as again, pytest.raises(RunError, match=r"noise\.key"):
            again.secret("noise.key", b"c" * 32)

    def test_cut_short_between_key_and_journal(self, run: RunFolder) -> None:
        """A key that was never journalled was never used either."""
        (run.path / "secrets").mkdir()
        (run.path / "secrets" / "noise.key").write_bytes(b"a" * 32)
        assert run.secret("noise.key", b"b" * 32) == b"b" * 32

    def test_forgotten_at_the_end(self, run: RunFolder) -> None:
        run.secret("noise.key", b"a" * 32)
        (run.path / "secrets" / ".noise.key.half").write_bytes(b"left by a crash")
        run.forget_secrets()
        assert not (run.path / "secrets").exists()
        run.forget_secrets()

    def test_the_journal_does_not_tell(self, run: RunFolder) -> None:
        key = NoiseRoot.from_system().key
        run.secret("noise.key", key)
        text = (run.path / "journal.jsonl").read_bytes()
        assert key not in text
        assert key.hex().encode() not in text


class TestNotes:
    def test_the_first_counts(self, run: RunFolder) -> None:
        assert run.note("records", hmac="1") == {"hmac": "1"}
        assert run.note("records", hmac="2")["hmac"] == "1"
        run.close()
        with RunFolder.resume(run.path) as again:
            assert again.note("records", hmac="3")["hmac"] == "1"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


class TestForgedJournals:
    """A journal whose chain was recomputed by whoever changed it: no secret protects it, so all is read
    with care."""

    @given(record=st.fixed_dictionaries(
        {"step": st.just("round"), "round": st.just(0) | JSON},
        optional={"files": JSON | st.fixed_dictionaries({"cloud": JSON}),
                  "figures": JSON, "ledger": JSON, "devices": JSON},
    ))  # fmt: skip
    @settings(max_examples=100)
    def test_any_record(self, tmp_path_factory: pytest.TempPathFactory, record: dict[str, object]) -> None:
        with RunFolder.create(tmp_path_factory.mktemp("run"), CONFIG) as folder:
            folder.journal.append(json.loads(json.dumps(record).replace("Infinity", "0")))
            with pytest.raises(RunError):
                load_transcript(folder, nn.Linear(2, 2))

    def test_rounds_out_of_order(self, run: RunFolder) -> None:
        names = {field.name for field in dataclasses.fields(RoundFigures)} - {"devices"}
        figures = dict.fromkeys(names, 0.5)
        row = {"step": "round", "round": 1, "files": {"cloud": "", "wire": ""},
               "devices": [], "figures": figures, "ledger": None}  # fmt: skip
        run.journal.append(row)
        with pytest.raises(RunError, match="rounds are missing"):
            saved(run)

    def test_a_configuration_of_another_kind(self, run: RunFolder) -> None:
        (run.path / "config.toml").write_text("rounds = 0\n")
        run.close()
        with pytest.raises(RunError, match="was changed since"):
            RunFolder.resume(run.path)

    def test_no_round_no_transcript(self, run: RunFolder) -> None:
        with pytest.raises(RunError, match="no round was finished; resume it"):
            load_transcript(run, nn.Linear(2, 2))

    def test_defaults_are_written_out(self, tmp_path: Path) -> None:
        """A run is resumed with the settings it had, whatever the defaults of a later version."""
        with RunFolder.create(tmp_path / "run", Config()) as folder:
            text = (folder.path / "config.toml").read_text()
        for name in ("rounds", "epsilon", "learning_rate", "sampling_rate", "clip_norm", "memory"):
            assert f"{name} = " in text
