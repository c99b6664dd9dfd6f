"""The curve: its grid, its trials in processes of their own, its table, its figures."""

import csv
import io
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trials as bodies
from evidence import audited, finding, rebuilt
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from running import SMALL, StopAt
from typer.testing import CliRunner

from audits.estimators.rates import difference, mean_of, share
from audits.sweeps.figures import FIGURES, ceiling_of, clusters, draw_figures, pareto_front
from audits.sweeps.grid import DONE, TRIALS, Grid, Record, Trial, is_done, read_record
from audits.sweeps.runner import Failed, Limits, Message, Stage, play, run_trials
from audits.sweeps.sweep import Sweep, TrialRow, read_sweep, sweep, trial_rows, write_files
from cli import app
from privkd.config import load_config
from privkd.errors import ConfigError, InputError, RunError
from privkd.journal import Journal
from privkd.progress import Silent
from privkd.run import train_in
from privkd.runs.folder import RunFolder

OVERRIDES = tuple(s for s in SMALL if not s.startswith("channel.kind"))
PLENTY = Limits(jobs=2, memory=math.inf)


class Watching:
    """Notes what happens to which trial."""

    def __init__(self) -> None:
        self.begun: list[Trial] = []
        self.stages: list[str] = []
        self.reasons: dict[Trial, str | None] = {}
        self.most = 0

    def __call__(self, trial: Trial, message: Message) -> None:
        if message == Stage("starting"):
            self.begun.append(trial)
            self.most = max(self.most, len(self.begun) - len(self.reasons))
        elif isinstance(message, Stage):
            self.stages.append(message.name)
        else:
            self.reasons[trial] = message.reason if isinstance(message, Failed) else None


def small_grid(**fields: Any) -> Grid:
    given: dict[str, Any] = {"epsilons": (1.0,), "channels": ("plain",), "seeds": 1, "audits": ()}
    return Grid(**given | {"overrides": OVERRIDES} | fields)


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Two channels, two budgets, two seeds; the last trial failed. The audits are made up."""
    path = tmp_path_factory.mktemp("curve")
    grid = small_grid(epsilons=(1.0, math.inf), channels=("plain", "noised"), seeds=2)
    *done, lost = grid.trials
    for trial in done:
        folder = path / TRIALS / trial.folder
        with RunFolder.create(folder, trial.config()) as opened:
            train_in(opened.config, opened, Silent())
        gradient = (
            [] if math.isinf(trial.epsilon) else [finding("gradient", "canaries-many-trials", lower=0.8)]
        )
        audited(folder, finding("per_client_logits", "distillation-lira"), finding(lower=0.1), *gradient)
        (folder / DONE).write_text(json.dumps({"key": trial.key}))
    rebuilt(path / TRIALS / done[0].folder)
    record = Record(request=grid, failed={lost.folder: "out of luck"})
    (path / "curve.json").write_text(record.model_dump_json())
    return read_sweep(path)


def played(path: Path, grid: Grid, watching: Watching) -> Sweep:
    play(path, grid, PLENTY, watching)
    return read_sweep(path)


def test_a_grid_has_every_channel_epsilon_and_seed_once() -> None:
    trials = Grid(epsilons=(1.0, math.inf), seeds=3).trials
    assert len({(trial.channel, trial.epsilon, trial.seed) for trial in trials}) == len(trials) == 2 * 3 * 3
    noised = next(trial for trial in trials if trial.channel == "noised").config()
    assert noised.privacy.device_epsilon == 8
    assert (
        next(trial for trial in trials if trial.channel == "secure").config().privacy.device_epsilon is None
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"channels": ("noisy",)}, "expected one of"),
        ({"channels": ()}, "at least one channel"),
        ({"epsilons": (0.0,)}, "above 0"),
        ({"epsilons": (math.nan,)}, "above 0"),
        ({"epsilons": (1.0, 1.0)}, "once"),
        ({"audits": ("all",)}, "expected one of"),
        ({"seeds": 0}, "at least 1"),
        ({"seeds": 10**6}, "cells"),
        ({"device_epsilon": -1.0}, "above 0"),
        ({"shadows": 2}, "at least 8"),
    ],
)
def test_bad_grids_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Grid(**fields)


@pytest.mark.parametrize(
    "override",
    [
        "seed=3",
        "privacy.epsilon=2",
        "privacy={epsilon=2}",
        "epsilon=2",
        "channel.kind='plain'",
        "channel=plain",
    ],
)
def test_what_a_curve_varies_cannot_be_set(override: str) -> None:
    with pytest.raises(ConfigError, match="a curve varies it"):
        Grid(overrides=(override,)).trials[0].config()


def test_settings_of_the_user_win_over_the_light_ones() -> None:
    trial = Grid(overrides=("teacher.model={name='cnn'}", "controls=true")).trials[0]
    assert trial.config().teacher.model.name == "cnn"
    assert trial.config().controls
    assert Grid().trials[0].config().teacher.model.name == "mlp"


def test_a_trial_is_known_by_what_determines_it() -> None:
    one = small_grid().trials[0]
    assert one.folder == small_grid(seeds=2).trials[0].folder
    assert one.folder != small_grid(overrides=(*OVERRIDES, "rounds=1")).trials[0].folder
    more = small_grid(audits=("membership",)).trials[0]
    assert (one.folder, one.key) != (more.folder, more.key)
    assert one.folder == more.folder


def test_a_grid_survives_its_file(tmp_path: Path) -> None:
    grid = Grid(
        epsilons=(0.5, 1.2345678, math.inf), settings=(("data.source", "a b"),), overrides=("rounds=1",)
    )
    (tmp_path / "curve.json").write_text(Record(request=grid, failed={"a": "b"}).model_dump_json())
    assert read_record(tmp_path) == Record(request=grid, failed={"a": "b"})
    assert "--epsilons 0.5,1.2345678,inf" in grid.command
    assert "--set 'data.source=a b'" in grid.command


@pytest.mark.parametrize(
    ("old", "new"), [("{", ""), ('"format":1', '"format":2'), ('"seeds":3', '"seeds":0'), ('"seeds"', '"s"')]
)
def test_a_damaged_record_is_named_in_one_line(tmp_path: Path, old: str, new: str) -> None:
    text = Record(request=Grid()).model_dump_json()
    assert old in text
    (tmp_path / "curve.json").write_text(text.replace(old, new, 1))
    with pytest.raises(RunError, match=r"curve\.json is damaged[^\n]*$"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("rounds=2", "controls=false", "student.models=[{name='cnn', width=9}, {name='mlp'}]"),
        ("privacy.epsilon=5", "privacy.device_epsilon=2", "channel.kind=noised", "seed=3"),
        ("student.dp={part='all', steps=7}", "data.source='a b.csv'", "teacher.model.name=cnn"),
    ],
)
def test_a_grid_over_settings_plays_these(overrides: tuple[str, ...]) -> None:
    config = load_config(None, overrides)
    grid = Grid(channels=("plain",), seeds=1, epsilons=(2.0,)).on(config)
    varied = {"channel.kind": "plain", "privacy.epsilon": 2.0, "privacy.device_epsilon": None, "seed": 0}
    assert grid.trials[0].config() == load_config(None, overrides, varied)
    assert grid.device_epsilon == (config.privacy.device_epsilon or 8)


def test_a_trial_that_fails_is_killed_or_vanishes_leaves_the_rest_alone(tmp_path: Path) -> None:
    trials, watching = small_grid(seeds=4).trials, Watching()
    failed = run_trials(trials, lambda _: tmp_path, PLENTY, watching, bodies.by_seed)
    assert watching.reasons[trials[0]] is None
    assert failed[trials[1]] == "no such data"
    assert "lack of memory" in failed[trials[2]]
    assert "exit code 7" in failed[trials[3]]
    assert watching.stages == ["at it"]
    assert watching.most == 2


@pytest.mark.parametrize(("memory", "most"), [(1.0, 1), (math.inf, 3)])
def test_trials_stay_within_the_memory(tmp_path: Path, memory: float, most: int) -> None:
    watching = Watching()
    limits = Limits(jobs=3, memory=memory)
    assert not run_trials(small_grid(seeds=3).trials, lambda _: tmp_path, limits, watching, bodies.hungry)
    assert watching.most == most


def test_an_interruption_leaves_no_process_behind(tmp_path: Path) -> None:
    class Interrupting(Watching):
        def __call__(self, trial: Trial, message: Message) -> None:
            if message == Stage("started"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trials(small_grid().trials, lambda _: tmp_path, PLENTY, Interrupting(), bodies.lasting)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    deadline = time.monotonic() + 20
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, pids))


def _alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads the states of processes from /proc")
def test_this_process_is_seen_to_be_alive() -> None:
    assert _alive(os.getpid())


def test_trials_are_resumed_and_never_played_twice(tmp_path: Path) -> None:
    grid, watching = small_grid(seeds=1), Watching()
    (trial,) = grid.trials
    folder = tmp_path / TRIALS / trial.folder
    with pytest.raises(KeyboardInterrupt), RunFolder.create(folder, trial.config()) as opened:
        train_in(opened.config, opened, StopAt(6))
    found = played(tmp_path, grid, watching)
    assert len(found.done) == 1
    steps = [record["step"] for record in Journal(folder / "journal.jsonl")]
    assert steps.count("started") == steps.count("finished") == 1
    assert is_done(trial, folder)
    again = Watching()
    assert len(played(tmp_path, grid, again).done) == 1
    assert again.begun == []


def test_done_trials_on_other_data_are_not_set_beside_new_ones(tmp_path: Path) -> None:
    data = tmp_path / "t.csv"
    lines = [f"{k % 7},{k % 5},{k % 3}\n" for k in range(300)]
    data.write_text("".join(lines))
    grid = small_grid(seeds=1, overrides=(*OVERRIDES, f"data.source={data}"))
    assert played(tmp_path / "curve", grid, Watching()).failed == ()
    data.write_text("".join(reversed(lines)))
    wider, watching = grid.changed(seeds=2), Watching()
    with pytest.raises(RunError, match=r"the data changed since the run was started: t\.csv was changed"):
        played(tmp_path / "curve", wider, watching)
    assert watching.begun == []


def test_a_trial_without_data(tmp_path: Path) -> None:
    grid = small_grid(overrides=(*OVERRIDES, "data.source=nowhere.npz"))
    (row,) = played(tmp_path, grid, Watching()).failed
    assert "nowhere.npz" in row.reason


def test_the_table_has_a_row_a_trial_and_all_its_bounds(curve: Sweep) -> None:
    write_files(curve)
    rows = list(csv.DictReader(io.StringIO((curve.path / "curve.csv").read_text())))
    assert [TrialRow.model_validate(row) for row in rows] == trial_rows(curve.outcomes)
    assert [row["status"] for row in rows] == 7 * ["done"] + ["failed"]
    assert rows[-1]["reason"] == "out of luck"
    first = rows[0]
    assert float(first["record_epsilon_upper"]) <= 1
    assert first["device_epsilon_upper"] == "inf"
    assert first["record_neighbouring_relation"] == "add or remove one record of one device"
    low, mid, high = (float(first[f"accuracy_teacher{end}"]) for end in ("_low", "", "_high"))
    assert low < mid < high
    assert float(first["student_epsilon_lower"]) == 0.1
    assert first["per_client_logits_tpr_at_fpr_0.01"] == "0.02"
    assert first["secure_sum_picked"] == "0.12"
    assert first["secure_sum_picked_ceiling"] == "0.8"
    assert rows[1]["secure_sum_picked"] == ""
    assert all(len(row) == len(first) for row in rows)


def test_a_damaged_trial_costs_no_other(curve: Sweep, tmp_path: Path) -> None:
    path = Path(shutil.copytree(curve.path, tmp_path / "copy"))
    ledger = path / TRIALS / curve.outcomes[0].trial.folder / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace("dp_sgd", "dp_sgx", 1))
    found = read_sweep(path)
    assert len(found.done) == len(curve.done) - 1
    assert "ledger.jsonl" in found.failed[0].reason


def test_points_join_seeds(curve: Sweep) -> None:
    points = curve.points
    assert [point.seeds for point in points] == [2, 2, 2, 1]
    assert ceiling_of(points) == points[1]
    gain = points[0].gain
    assert gain is not None
    measured = [row.facts.accuracies for row in points[0].outcomes if row.facts]
    gains = [one.teacher.estimate - one.control.estimate for one in measured if one]
    assert gain.estimate == pytest.approx(np.mean(gains))
    assert points[3].gain == points[3].outcomes[0].facts.accuracies.gain  # type: ignore[union-attr]


def test_all_three_figures_are_drawn_and_equal_curves_give_equal_files(curve: Sweep) -> None:
    drawn = draw_figures(curve.grid, curve.outcomes)
    assert drawn.keys() == FIGURES.keys()
    for kinds in drawn.values():
        assert kinds["png"].startswith(b"\x89PNG")
        assert b"<svg" in kinds["svg"]
        assert len(kinds["png"]) < 150_000
    assert draw_figures(curve.grid, curve.outcomes) == drawn
    assert draw_figures(curve.grid, curve.failed) == {}


def _front_by_hand(gains: Sequence[float], leaks: Sequence[float]) -> set[tuple[float, float]]:
    marks = set(zip(gains, leaks, strict=True))
    return {
        (gain, leak)
        for gain, leak in marks
        if not any(g >= gain and x <= leak and (g, x) != (gain, leak) for g, x in marks)
    }


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=12), st.floats(0.01, 0.5))
def test_marks_that_lie_together_have_one_label(places: list[tuple[float, float]], apart: float) -> None:
    """Two labels never start nearer to each other than ``apart``, and none is lost."""
    found = clusters(places, apart)
    assert sorted(one for group in found for one in group) == list(range(len(places)))
    for group in found:
        for one in group:
            others = [other for other in range(len(places)) if other not in group]
            assert all(math.dist(places[one], places[other]) >= apart for other in others)
    assert clusters([(0, 0), (0.04, 0), (0.08, 0), (0.5, 0)], 0.05) == [[0, 1, 2], [3]]


def test_the_front_is_what_no_other_point_beats() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        gains, leaks = rng.integers(0, 5, (2, 6)).astype(float).tolist()
        front = pareto_front(gains, leaks)
        assert {(gains[one], leaks[one]) for one in front} == _front_by_hand(gains, leaks)
        assert [gains[one] for one in front] == sorted({gains[one] for one in front})


def test_intervals_are_the_textbook_s() -> None:
    wilson = share(0.5, 10)
    assert (wilson.low, wilson.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert share(0.0, 10).low == 0
    assert share(1.0, 10).high == 1
    # Newcombe 1998, Table II, example (a), method 10: 56/70 - 48/80.
    apart = difference(share(56 / 70, 70), share(48 / 80, 80))
    assert (apart.low, apart.high) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    student = mean_of([1.0, 2.0, 3.0])
    assert (student.low, student.high) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-4)
    assert math.isinf(mean_of([1.0]).high)


def test_the_command_checks_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    for arguments, words in (
        (["--epsilons", "1,many"], "many"),
        (["--epsilons", ""], "at least one"),
        (["--set", "rounds=none"], "rounds"),
        (["--set", "seed=1"], "varies"),
        (["--device-epsilon", "x"], "device-epsilon"),
        (["--jobs", "0"], "above 0"),
        (["--resume"], "no curve"),
        (["--out", "full"], "not empty"),
    ):
        result = CliRunner().invoke(app, ["curve", *arguments])
        assert result.exit_code == 2, result.output
        assert words in result.stderr
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_the_command_goes_on_with_a_curve(curve: Sweep, tmp_path: Path) -> None:
    """Every trial but the lost one is there, and so is that one in a narrower grid."""
    arguments = ["curve", "--resume", "--out", str(curve.path), "--seeds", "1", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["done"], found["failed"]) == (4, 0)
    assert {*found["files"]} >= {"curve.csv", "figures/leak.svg", "figures/theory.png", "figures/utility.svg"}
    assert all((curve.path / name).exists() for name in found["files"])


def test_an_alarm_in_a_trial_ends_in_exit_code_3(tmp_path: Path) -> None:
    grid = small_grid()
    (trial,) = grid.trials
    folder = tmp_path / "alarmed" / TRIALS / trial.folder
    with RunFolder.create(folder, trial.config()) as opened:
        train_in(opened.config, opened, Silent())
    audited(folder, finding(lower=1.5))
    (folder / DONE).write_text(json.dumps({"key": trial.key}))
    (tmp_path / "alarmed" / "curve.json").write_text(Record(request=grid).model_dump_json())
    result = CliRunner().invoke(app, ["curve", "--resume", "--out", str(tmp_path / "alarmed")])
    assert result.exit_code == 3
    assert "do not release" in result.stderr
    alarm = read_sweep(tmp_path / "alarmed").alarm
    assert alarm is not None
    assert alarm in result.stderr


class TestValue:
    def test_prints_what_the_command_prints(self, curve: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
        Console(width=80).print(replace(curve, files=("curve.csv",)), crop=False)
        out = capsys.readouterr().out
        assert "Privacy against utility" in out
        assert f"failed: {curve.failed[0].trial.label}: out of luck\n" in out
        assert out.endswith(f"{curve.path}/curve.csv\n")

    def test_is_a_table_in_a_notebook(self, curve: Sweep) -> None:
        html = curve._repr_html_()
        assert html.startswith("<pre")
        assert "Privacy against utility" in html

    def test_names_what_a_frame_needs(self, curve: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pandas", None)
        with pytest.raises(InputError, match=r"^a data frame needs pandas.*pip install"):
            curve.to_frame()

    def test_frame_has_a_row_a_trial(self, curve: Sweep) -> None:
        pytest.importorskip("pandas")
        frame = curve.to_frame()
        assert list(frame["channel"]) == [one.trial.channel for one in curve.outcomes]

    def test_has_no_alarm_within_bounds(self, curve: Sweep) -> None:
        assert curve.alarm is None
        assert (curve.failure or "").startswith("1 of 8 cells failed, such as noised")


def test_from_python_relative_paths_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("".join(f"{k % 7},{k % 5},{k % 3}\n" for k in range(300)))
    config = load_config(None, (*SMALL, "data.source=t.csv"))
    small: dict[str, Any] = {
        "epsilons": [1.0],
        "channels": ["plain"],
        "seeds": 1,
        "audits": [],
        "out": "curve",
    }
    found = sweep(config, **small)
    assert (len(found.done), found.failed) == (1, ())
    with pytest.raises(RunError, match="not empty"):
        sweep(config, **small)
    again = sweep(out="curve", resume=True)
    assert again.rows() == found.rows()
