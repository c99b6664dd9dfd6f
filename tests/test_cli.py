"""The command line: what it answers, what it refuses, and in how many lines."""

import io
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from running import SMALL, StopAt, play, same

import privkd.doctor
import privkd.prepared
from audits.wording import command_of
from cli import app
from privkd.config import Config, load_config
from privkd.errors import ChannelError
from privkd.options import OPTIONS
from privkd.terminal import LiveProgress, progress_on_stderr

SMALL_RUN = [word for setting in SMALL for word in ("--set", setting)]


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


Command = Callable[..., Answer]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command line in this process, in an empty working directory."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            app([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = left.value.code
        return Answer(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter holds after ``statement``, which may exit."""
    code = f"import sys, atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); {statement}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    return set(done.stderr.split())


class TestHelp:
    def test_loads_nothing_heavy(self) -> None:
        modules = loaded_by("from cli import app; app(['train', '--help'])")
        assert "typer" in modules
        assert not modules & {
            "torch",
            "numpy",
            "scipy",
            "opacus",
            "dp_accounting",
            "sklearn",
            "crypten",
        }

    def test_nor_does_a_typo(self) -> None:
        """A mistake in a setting is answered before the heavy libraries are loaded."""
        modules = loaded_by("from cli import app; app(['train', '--set', 'privacy.epsilom=3'])")
        assert "pydantic" in modules
        assert not modules & {"torch", "opacus", "dp_accounting", "sklearn", "crypten"}

    @pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "--help"], ["doctor", "--help"]])
    def test_is_there(self, command: Command, arguments: list[str]) -> None:
        answer = command(*arguments)
        assert answer.code == 0
        assert "Usage:" in answer.out
        assert answer.err == ""

    def test_names_every_option_of_the_readme(self, command: Command) -> None:
        out = command("train", "--help").out
        for option in (
            "--epsilon", "--delta", "--device-epsilon", "--data", "--data-dir", "--devices", "--rounds",
            "--channel", "--aggregators", "--student", "--teacher", "--partition", "--seed", "--device",
            "--config", "--set", "--out", "--resume", "--dry-run", "--json",
        ):  # fmt: skip
            assert option in out


class TestOptionsAreSettings:
    @pytest.mark.parametrize(
        ("name", "place", "shared"),
        [
            ("train", "privkd.config.load_config", list(OPTIONS)),
            ("curve", "audits.sweeps.sweep.sweep", ["data", "data_dir", "label", "drop", "devices"]),
        ],
    )
    def test_each_gives_its_own(
        self, command: Command, monkeypatch: pytest.MonkeyPatch, name: str, place: str, shared: list[str]
    ) -> None:
        asked: list[Any] = []

        def called(*requests: Any, **named: Any) -> None:
            asked.append(requests[2] if requests else named["settings"])
            raise SystemExit(0)

        monkeypatch.setattr(place, called)
        for option in map(OPTIONS.__getitem__, shared):
            command(name, option.flag, "x")
            assert asked.pop() == {option.setting: ["x"] if option.many else "x"}
        command(name)
        assert asked.pop() == {}

    def test_the_command_of_settings_gives_them(
        self, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = Config(
            data="a b.csv", data_dir="d", label="3", drop=["a", "b"], devices=3, rounds=2,
            partition="classes", epsilon="inf", delta=1e-6, device_epsilon=9, aggregators=3, dropout=0.0,
            aggregation="votes", aggregator_url=["http://a", "http://b"], student="mlp,cnn",
            teacher="cnn", seed=4, device="cpu", reverse={"queries": 7},
        )  # fmt: skip
        asked: list[Any] = []

        def called(*request: Any) -> None:
            asked.append(request)
            raise SystemExit(0)

        monkeypatch.setattr("privkd.config.load_config", called)
        _, *words = shlex.split(command_of(config))
        assert command(*words).code == 0
        assert load_config(*asked[0]) == config

    def test_completion_knows_them(self, tmp_path: Path) -> None:
        environment = os.environ | {
            "_PRIVKD_COMPLETE": "complete_bash", "COMP_WORDS": "privkd train --agg", "COMP_CWORD": "2",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "privkd"], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == ["--aggregators", "--aggregation", "--aggregator-url"]


def damaged(folder: Path) -> None:
    """Bad input of every kind, by name."""
    (folder / "text.npz").write_text("not a zip")
    (folder / "half.csv").write_text("a,b,label\n1,2,0\n1,x,1\n")
    (folder / "picture.bmp").write_bytes(b"BM")
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("mine")
    (folder / "bad.toml").write_text("rounds = \n")
    (folder / "unknown.toml").write_text("[privacy]\nepsilom = 3\n")
    (folder / "value.toml").write_text("[privacy]\nepsilon = -3\n")
    inputs = np.zeros((400, 4), np.float32)
    np.savez(folder / "one_class.npz", inputs=inputs, labels=np.zeros(400, int))
    np.savez(folder / "lengths.npz", inputs=inputs, labels=np.zeros(399, int))
    inputs[3, 2] = np.nan
    np.savez(folder / "nan.npz", inputs=inputs, labels=np.arange(400) % 2)
    np.savez(folder / "few.npz", inputs=inputs[:3] * 0, labels=np.arange(3) % 2)
    np.savez(folder / "pickled.npz", inputs=np.array([{}], dtype=object), labels=np.zeros(1, int))
    (folder / "broken_factory.py").write_text("def factory(shape, classes):\n    raise RuntimeError('no')\n")


BAD: list[tuple[list[str], str]] = [
    (["nonsense"], "No such command 'nonsense'"),
    (["train", "--nonsense"], "No such option: --nonsense"),
    (["train", "stray"], "unexpected extra argument"),
    (["train", "--epsilon"], "requires an argument"),
    *((["train", "--epsilon", value], f"privacy.epsilon='{value}'") for value in ("0", "-1", "nan", "x", "")),
    (["train", "--delta", "1"], "privacy.delta='1': expected less than 1"),
    (["train", "--delta", "0"], "privacy.delta='0': expected greater than 0"),
    (["train", "--device-epsilon", "-2"], "privacy.device_epsilon='-2'"),
    (["train", "--device-epsilon", "2", "--channel", "plain"], "privacy.device_epsilon needs noise"),
    (["train", "--devices", "0"], "data.devices='0'"),
    (["train", "--devices", "2.5"], "data.devices='2.5'"),
    (["train", "--devices", "1000000"], "too few"),
    (["train", "--rounds", "0"], "rounds='0'"),
    (["train", "--channel", "nosied"], "channel.kind='nosied': expected one of ['noised', 'plain', "),
    (["train", "--aggregators", "1"], "channel.aggregators='1'"),
    (["train", "--partition", "even"], "data.partition='even'"),
    (["train", "--seed", "-1"], "seed='-1'"),
    (["train", "--device", "tpu"], "device='tpu'"),
    (["train", "--student", "mpl"], "model 'mpl': expected one of auto, cnn, linear, mlp, resnet"),
    (["train", "--student", "mlp,"], "student.models.1.name=''"),
    (["train", "--student", "no_such_module:factory"], "'no_such_module:factory': cannot be imported"),
    (["train", "--teacher", "broken_factory:factory"], "failed: no"),
    (["train", "--teacher", "cnn", "--data", "few.npz"], "few.npz"),
    (["train", "--data", "missing.npz"], "no such file or folder"),
    (["train", "--data", "text.npz"], "text.npz"),
    (["train", "--data", "half.csv"], "half.csv"),
    (["train", "--data", "picture.bmp"], "unknown format '.bmp'"),
    (["train", "--data", "empty"], "empty"),
    (["train", "--data", "one_class.npz"], "at least two classes"),
    (["train", "--data", "lengths.npz"], "400 inputs but 399 labels"),
    (["train", "--data", "nan.npz"], "not a finite float32"),
    (["train", "--data", "pickled.npz"], "pickled.npz"),
    (["train", "--data", "mnist", "--data-dir", "empty"], "no train-images IDX file"),
    (["train", "--data", "broken_factory:nothing"], "cannot be imported"),
    (["train", "--config", "missing.toml"], "configuration missing.toml: No such file"),
    (["train", "--config", "bad.toml"], "configuration bad.toml is not TOML"),
    (["train", "--config", "unknown.toml"], "privacy.epsilom: unknown setting; did you mean 'epsilon'?"),
    (["train", "--config", "value.toml"], "privacy.epsilon=-3"),
    (["train", "--config", "empty"], "configuration empty: Is a directory"),
    (["train", "--set", "privacy.epsilom=3"], "privacy.epsilom: unknown setting; did you mean 'epsilon'?"),
    (["train", "--set", "rounds"], "--set 'rounds': expected name=value"),
    (["train", "--set", "data.proxy_records=0"], "the proxy set is empty"),
    (["train", "--set", "data.gap_classes=[77]"], "gap_classes=[77]"),
    (["train", "--set", "student.dp.steps=1000000000", "--epsilon", "1e-9"], "raise epsilon"),
    (["train", "--out", "full"], "full is not empty: name another --out"),
    (["train", "--out", "full/mine.txt"], "name another --out"),
    (["train", "--resume", "missing"], "missing is not the folder of a run"),
    (["train", "--resume", "full"], "full is not the folder of a run"),
    (["train", "--resume", "full", "--epsilon", "4"], "a run goes on with the settings it was started with"),
    (["train", "--resume", "full", "--set", "rounds=3"], "a run goes on with the settings"),
    (["train", "--resume", "full", "--out", "other"], "a run goes on with the settings"),
    (["train", "--resume", "full", "--dry-run"], "a run goes on with the settings"),
    (["train", "--resume", "full", "--config", "bad.toml"], "a run goes on with the settings"),
    (["train", "--resume", "x" * 300], "is not the folder of a run"),
    (["train", "--out", "x" * 300], "File name too long; name another --out"),
    (["doctor", "--nonsense"], "No such option"),
]  # fmt: skip


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "expected"), BAD, ids=[" ".join(arguments)[:60] for arguments, _ in BAD]
    )
    def test_is_one_line_on_stderr_and_exit_code_2(
        self, command: Command, arguments: list[str], expected: str
    ) -> None:
        damaged(Path.cwd())
        before = sorted(Path.cwd().rglob("*"))
        answer = command(*arguments)
        assert answer.code == 2
        assert answer.out == ""
        assert len(answer.err.splitlines()) == 1, answer.err
        assert answer.err.startswith("privkd: ")
        assert expected in answer.err
        left = [path for path in Path.cwd().rglob("*") if "__pycache__" not in path.parts]
        assert sorted(left) == before, "nothing was made, and no run folder"

    @pytest.mark.parametrize("arguments", [["--json"], ["--dry-run"], ["--dry-run", "--json"]])
    def test_likewise_with_json_and_dry_run(self, command: Command, arguments: list[str]) -> None:
        answer = command("train", "--epsilon", "-1", *arguments)
        assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1)

    def test_through_a_real_process(self, tmp_path: Path) -> None:
        """No library warns before the line, not even one that is loaded to build and try the models."""
        (tmp_path / "mine").touch()
        command = [sys.executable, "-c", "from cli import app; app()", "train", "--out", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1, done.stderr


def run_of(answer: Answer) -> dict[str, Any]:
    """The one JSON object on stdout."""
    found: dict[str, Any] = json.loads(answer.out)
    assert answer.out.count("\n") == 1
    return found


class TestTrain:
    def test_json_is_alone_on_stdout_with_every_key(self, command: Command) -> None:
        answer = command("train", *SMALL_RUN, "--set", "controls=true", "--json", "--out", "run")
        assert answer.code == 0, answer.err
        found = run_of(answer)
        for key in (
            "run", "teacher.before", "teacher.after", "teacher.control", "teacher.self_distilled",
            "teacher.labels_only", "teacher.latency_ms", "student.mean",
            "student.direct", "student.direct_private", "student.public_only", "student.latency_ms",
            "ledger.record.epsilon", "ledger.record.delta", "ledger.device.epsilon", "ledger.device.delta",
            "channel", "seconds",
        ):  # fmt: skip
            value: Any = found
            for step in key.split("."):
                value = value[step]
            assert value is not None, key
        teacher = found["teacher"]
        assert teacher["control"] == max(teacher["self_distilled"], teacher["labels_only"])
        assert found["run"] == "run"
        assert found["channel"] == "plain"
        assert 2.9 < found["ledger"]["record"]["epsilon"] <= 3.0
        assert found["ledger"]["device"]["epsilon"] == "inf"
        assert found == json.loads(Path("run/result.json").read_text())
        assert "Infinity" not in answer.out
        assert "NaN" not in answer.out

    def test_the_table_shows_each_control_beside_the_result(self, command: Command) -> None:
        answer = command("train", *SMALL_RUN, "--set", "controls=true", "--rounds", "1")
        assert answer.code == 0
        for words in ("the teacher before", "self-distilled with zero devices",
                      "public labels alone, zero devices", "public distillation only",
                      "trained directly, same budget", "trained directly, no DP", "record", "device",
                      "plain channel: the cloud sees each", "not covered by the ledger"):  # fmt: skip
            assert words in answer.out
        folders = list(Path("runs").iterdir())
        assert len(folders) == 1
        assert str(folders[0]) in answer.out
        assert answer.err.splitlines()[0] == f"run folder: {folders[0]}"
        assert "epsilon/record" in answer.err, "progress tells what was spent"

    def test_no_dp_is_said_in_red(self, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        warning = "\x1b[1;31mNo differential privacy"
        assert warning in command("train", *SMALL_RUN, "--epsilon", "inf", "--rounds", "1").out
        assert warning in command("train", *SMALL_RUN, "--epsilon", "inf", "--dry-run").out
        assert warning not in command("train", *SMALL_RUN, "--dry-run").out

    def test_options_reach_the_run(self, command: Command) -> None:
        answer = command(
            "train", *SMALL_RUN, "--epsilon", "2", "--delta", "1e-4", "--device-epsilon", "9",
            "--devices", "2", "--rounds", "1", "--channel", "noised", "--student", "mlp,cnn",
            "--teacher", "mlp", "--partition", "dirichlet", "--seed", "5", "--device", "cpu", "--out", "run",
            "--json",
        )  # fmt: skip
        found = run_of(answer)
        assert found["seed"] == 5
        assert found["ledger"]["record"]["budget"] == 2.0
        assert found["ledger"]["record"]["delta"] == 1e-4
        assert found["ledger"]["record"]["parties"] == 2
        assert 8.8 < found["ledger"]["device"]["epsilon"] <= 9.0
        text = Path("run/config.toml").read_text()
        for line in ('partition = "dirichlet"', 'name = "cnn"', 'device = "cpu"', 'kind = "noised"'):
            assert line in text

    def test_a_file_and_the_options_over_it(self, command: Command) -> None:
        Path("run.toml").write_text("[privacy]\nepsilon = 5.0\ndelta = 1e-6\n")
        answer = command(
            "train", *SMALL_RUN, "--config", "run.toml", "--epsilon", "1", "--rounds", "1", "--json"
        )
        record = run_of(answer)["ledger"]["record"]
        assert (record["budget"], record["delta"]) == (1.0, 1e-6)

    def test_resume(self, command: Command) -> None:
        with pytest.raises(KeyboardInterrupt):
            play(Path("run"), progress=StopAt(6))
        assert command("train", *SMALL_RUN, "--out", "whole").code == 0
        answer = command("train", "--resume", "run", "--json")
        assert answer.code == 0
        assert run_of(answer)["run"] == "run"
        assert same(Path("run"), Path("whole"))

    def test_stopped_by_hand(self, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        def stop(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("privkd.federation.Federation.play", stop)
        answer = command("train", *SMALL_RUN, "--out", "run")
        assert answer.code == 130
        assert answer.err.splitlines()[0] == "run folder: run"
        assert answer.err.splitlines()[-1].startswith("privkd: stopped")
        assert "Traceback" not in answer.err

    def test_a_channel_that_fails(self, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise ChannelError("aggregator-1 was killed by SIGKILL; nothing was released")

        monkeypatch.setattr("privkd.federation.Federation.play", fail)
        answer = command("train", *SMALL_RUN, "--out", "run")
        assert answer.code == 1
        assert answer.err.splitlines()[-1].startswith("privkd: aggregator-1 was killed by SIGKILL")

    def test_a_folder_in_use_is_refused(self, command: Command) -> None:
        from privkd.runs.folder import RunFolder

        play(Path("run"), "rounds=1")
        with RunFolder.resume(Path("run")):
            answer = command("train", "--resume", "run")
        assert (answer.code, len(answer.err.splitlines())) == (2, 1)
        assert "in use by another process" in answer.err


class TestDryRun:
    def test_prints_what_it_would_cost_and_does_nothing(self, command: Command) -> None:
        answer = command("train", *SMALL_RUN, "--device-epsilon", "8", "--channel", "noised", "--dry-run")
        assert answer.code == 0
        for words in (
            "noise multiplier", "DP-SGD steps a round", "epsilon per record, whole run", "sampling rate",
            "epsilon per device, whole run", "queries a round", "upload per device and round",
            "student parameters", "private training",
        ):  # fmt: skip
            assert words in answer.out
        assert answer.err == ""
        assert list(Path.cwd().iterdir()) == []

    def test_json(self, command: Command) -> None:
        answer = command("train", *SMALL_RUN, "--dry-run", "--json")
        plan = run_of(answer)["plan"]
        assert plan["noise_multiplier"] > 0
        assert 2.9 < plan["training"]["high"] <= 3.0
        assert plan["device"]["high"] == "inf"
        assert list(Path.cwd().iterdir()) == []

    def test_with_an_out_that_holds_something(self, command: Command) -> None:
        """Nothing is written, so nothing can be in the way."""
        Path("full").mkdir()
        (Path("full") / "mine").touch()
        assert command("train", *SMALL_RUN, "--dry-run", "--out", "full").code == 0
        assert [path.name for path in Path("full").iterdir()] == ["mine"]


class TestDoctor:
    def test_all_is_well_here(self, command: Command) -> None:
        answer = command("doctor")
        assert answer.code == 0
        assert "All that is needed is here" in answer.out

    def test_says_what_is_missing_and_the_command_that_mends_it(
        self, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inner = privkd.doctor.importlib.import_module

        def without(name: str) -> Any:
            if name in ("opacus", "pyarrow"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name == "dp_accounting":
                raise OSError("libfoo.so:\ncannot open shared object file")
            return inner(name)

        monkeypatch.setattr("privkd.doctor.importlib.import_module", without)
        monkeypatch.setattr("privkd.doctor.importlib.util.find_spec", lambda name: None)
        answer = command("doctor")
        assert answer.code == 1
        assert "pip install opacus" in answer.out
        assert "pip install --no-deps crypten==0.4.1" in answer.out
        assert "pip install 'privkd[parquet]'" in answer.out
        assert "libfoo.so: cannot open shared object file" in answer.out
        assert "Something is missing" in answer.out

    def test_what_is_optional_does_not_fail_it(
        self, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inner = privkd.doctor.importlib.import_module

        def without(name: str) -> Any:
            if name == "pyarrow":
                raise ModuleNotFoundError("No module named 'pyarrow'", name=name)
            return inner(name)

        monkeypatch.setattr("privkd.doctor.importlib.import_module", without)
        answer = command("doctor")
        assert answer.code == 0
        assert "optional" in answer.out


class TestProgress:
    def test_in_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        screen = io.StringIO()

        def terminal(**_: object) -> Console:
            return Console(file=screen, force_terminal=True, width=80)

        monkeypatch.setattr("privkd.terminal.Console", terminal)
        with progress_on_stderr() as progress:
            assert isinstance(progress, LiveProgress)
            progress.stage("round 1 of 2: devices")
            progress.advance(3, 5)
            progress.figures(teacher=0.5, epsilon_record=1.25, epsilon_device=math.inf)
            progress._bars.refresh()
            progress.stage("round 1 of 2: plain channel")
            progress._bars.refresh()
        shown = screen.getvalue()
        assert "3/5" in shown
        assert "epsilon/record 1.25" in shown
        assert "epsilon/device inf" in shown
        last = shown[shown.rindex("plain channel") :]
        assert "/5" not in last, "a stage does not inherit the last one's total"

    def test_elsewhere(self, capsys: pytest.CaptureFixture[str]) -> None:
        with progress_on_stderr() as progress:
            progress.stage("round 1 of 2: devices")
            progress.advance(3, 5)
            progress.figures(**{f"name{i}": 0.5 for i in range(12)}, epsilon_record=1.25)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert len(captured.err.splitlines()) == 2, "a line each, however long"


def test_the_data_are_read_once_a_start(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[object] = []
    real = privkd.prepared.build_scenario

    def counted(*given: Any, **named: Any) -> Any:
        reads.append(given)
        return real(*given, **named)

    monkeypatch.setattr(privkd.prepared, "build_scenario", counted)
    assert command("train", *SMALL_RUN, "--out", "run").code == 0
    assert len(reads) == 1
