"""The curve: its grid, its cells in processes of their own, its table, its figures."""

import csv
import io
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cells as bodies
import numpy as np
import pytest
from evidence import audited, finding, rebuilt
from running import SMALL, StopAt
from typer.testing import CliRunner

from audits.estimators.rates import difference, mean_of, share
from audits.tradeoff.curve import CELLS, Curve, read_curve
from audits.tradeoff.figures import FIGURES, draw_figures
from audits.tradeoff.play import play_curve
from audits.tradeoff.points import ceiling_of, pareto_front, points_of
from audits.tradeoff.request import Cell, CurveRequest, command_of, request_of, request_tree
from audits.tradeoff.runner import Limits, run_cells
from audits.tradeoff.table import as_csv, rows_of
from audits.tradeoff.worker import DONE, is_done
from cli import app
from privkd.errors import ConfigError, RunError
from privkd.journal import Journal
from privkd.progress import Silent
from privkd.result import train
from privkd.runs.folder import RunFolder

OVERRIDES = tuple(s for s in SMALL if not s.startswith("channel.kind"))
PLENTY = Limits(jobs=2, memory=math.inf)


class Watching:
    """Notes what happens to which cell."""

    def __init__(self) -> None:
        self.begun: list[Cell] = []
        self.stages: list[str] = []
        self.reasons: dict[Cell, str | None] = {}
        self.most = 0

    def started(self, cell: Cell) -> None:
        self.begun.append(cell)
        self.most = max(self.most, len(self.begun) - len(self.reasons))

    def stage(self, cell: Cell, name: str) -> None:
        self.stages.append(name)

    def ended(self, cell: Cell, reason: str | None) -> None:
        self.reasons[cell] = reason


def small_request(**fields: Any) -> CurveRequest:
    given: dict[str, Any] = {"epsilons": (1.0,), "channels": ("plain",), "seeds": 1, "audits": ()}
    return CurveRequest(**given | {"overrides": OVERRIDES} | fields)


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """Two channels, two budgets, two seeds; the last cell failed. The audits are made up."""
    path = tmp_path_factory.mktemp("curve")
    request = small_request(epsilons=(1.0, math.inf), channels=("plain", "noised"), seeds=2)
    *done, lost = request.cells
    for cell in done:
        folder = path / CELLS / cell.folder
        with RunFolder.create(folder, cell.config()) as opened:
            train(opened.config, opened, Silent())
        gradient = (
            [] if math.isinf(cell.epsilon) else [finding("gradient", "canaries-many-trials", lower=0.8)]
        )
        audited(folder, finding("per_client_logits", "distillation-lira"), finding(lower=0.1), *gradient)
        (folder / DONE).write_text(json.dumps({"key": cell.key}))
    rebuilt(path / CELLS / done[0].folder)
    record = {"format": 1, "request": request_tree(request), "failed": {lost.folder: "out of luck"}}
    (path / "curve.json").write_text(json.dumps(record))
    return read_curve(path)


def test_a_grid_has_every_channel_epsilon_and_seed_once() -> None:
    cells = CurveRequest(epsilons=(1.0, math.inf), seeds=3).cells
    assert len({(cell.channel, cell.epsilon, cell.seed) for cell in cells}) == len(cells) == 2 * 3 * 3
    noised = next(cell for cell in cells if cell.channel == "noised").config()
    assert noised.privacy.device_epsilon == 8
    assert next(cell for cell in cells if cell.channel == "secure").config().privacy.device_epsilon is None


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
        CurveRequest(**fields)


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
        CurveRequest(overrides=(override,)).cells[0].config()


def test_settings_of_the_user_win_over_the_light_ones() -> None:
    cell = CurveRequest(overrides=("teacher.model={name='cnn'}", "controls=true")).cells[0]
    assert cell.config().teacher.model.name == "cnn"
    assert cell.config().controls
    assert CurveRequest().cells[0].config().teacher.model.name == "mlp"


def test_a_cell_is_known_by_what_determines_it() -> None:
    one = small_request().cells[0]
    assert one.folder == small_request(seeds=2).cells[0].folder
    assert one.folder != small_request(overrides=(*OVERRIDES, "rounds=1")).cells[0].folder
    more = small_request(audits=("membership",)).cells[0]
    assert (one.folder, one.key) != (more.folder, more.key)
    assert one.folder == more.folder


def test_a_request_survives_its_json() -> None:
    request = CurveRequest(
        epsilons=(0.5, math.inf), settings=(("data.source", "a b"),), overrides=("rounds=1",)
    )
    assert request_of(json.loads(json.dumps(request_tree(request)))) == request
    assert "--epsilons 0.5,inf" in command_of(request)
    assert "--set 'data.source=a b'" in command_of(request)


def test_a_cell_that_fails_is_killed_or_vanishes_leaves_the_rest_alone(tmp_path: Path) -> None:
    cells, watching = small_request(seeds=4).cells, Watching()
    failed = run_cells(cells, lambda _: tmp_path, PLENTY, watching, bodies.by_seed)
    assert watching.reasons[cells[0]] is None
    assert failed[cells[1]] == "no such data"
    assert "lack of memory" in failed[cells[2]]
    assert "exit code 7" in failed[cells[3]]
    assert watching.stages == ["at it"]
    assert watching.most == 2


@pytest.mark.parametrize(("memory", "most"), [(1.0, 1), (math.inf, 3)])
def test_cells_stay_within_the_memory(tmp_path: Path, memory: float, most: int) -> None:
    watching = Watching()
    limits = Limits(jobs=3, memory=memory)
    assert not run_cells(small_request(seeds=3).cells, lambda _: tmp_path, limits, watching, bodies.hungry)
    assert watching.most == most


def test_an_interruption_leaves_no_process_behind(tmp_path: Path) -> None:
    class Interrupting(Watching):
        def stage(self, cell: Cell, name: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cells(small_request().cells, lambda _: tmp_path, PLENTY, Interrupting(), bodies.lasting)
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


def test_cells_are_resumed_and_never_played_twice(tmp_path: Path) -> None:
    request, watching = small_request(seeds=1), Watching()
    (cell,) = request.cells
    folder = tmp_path / CELLS / cell.folder
    with pytest.raises(KeyboardInterrupt), RunFolder.create(folder, cell.config()) as opened:
        train(opened.config, opened, StopAt(6))
    found = play_curve(tmp_path, request, PLENTY, watching)
    assert len(found.done) == 1
    steps = [record["step"] for record in Journal(folder / "journal.jsonl")]
    assert steps.count("started") == steps.count("finished") == 1
    assert is_done(cell, folder)
    again = Watching()
    assert len(play_curve(tmp_path, request, PLENTY, again).done) == 1
    assert again.begun == []


def test_done_cells_on_other_data_are_not_set_beside_new_ones(tmp_path: Path) -> None:
    data = tmp_path / "t.csv"
    lines = [f"{k % 7},{k % 5},{k % 3}\n" for k in range(300)]
    data.write_text("".join(lines))
    request = small_request(seeds=1, overrides=(*OVERRIDES, f"data.source={data}"))
    assert play_curve(tmp_path / "curve", request, PLENTY, Watching()).failed == ()
    data.write_text("".join(reversed(lines)))
    wider, watching = replace(request, seeds=2), Watching()
    with pytest.raises(RunError, match=r"the data changed since the run was started: t\.csv was changed"):
        play_curve(tmp_path / "curve", wider, PLENTY, watching)
    assert watching.begun == []


def test_a_cell_without_data(tmp_path: Path) -> None:
    request = small_request(overrides=(*OVERRIDES, "data.source=nowhere.npz"))
    (row,) = play_curve(tmp_path, request, PLENTY, Watching()).failed
    assert "nowhere.npz" in row.reason


def test_the_table_has_a_row_a_cell_and_all_its_bounds(curve: Curve) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(rows_of(curve)))))
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


def test_a_damaged_cell_costs_no_other(curve: Curve, tmp_path: Path) -> None:
    path = Path(shutil.copytree(curve.path, tmp_path / "copy"))
    ledger = path / CELLS / curve.rows[0].cell.folder / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace("dp_sgd", "dp_sgx", 1))
    found = read_curve(path)
    assert len(found.done) == len(curve.done) - 1
    assert "ledger.jsonl" in found.failed[0].reason


def test_points_join_seeds(curve: Curve) -> None:
    points = points_of(curve)
    assert [point.seeds for point in points] == [2, 2, 2, 1]
    assert ceiling_of(points) == points[1]
    gain = points[0].gain
    assert gain is not None
    measured = [row.facts.accuracies for row in points[0].rows if row.facts]
    gains = [one.teacher.estimate - one.control.estimate for one in measured if one]
    assert gain.estimate == pytest.approx(np.mean(gains))
    assert points[3].gain == points[3].rows[0].facts.accuracies.gain  # type: ignore[union-attr]


def test_all_three_figures_are_drawn_and_equal_curves_give_equal_files(curve: Curve) -> None:
    drawn = draw_figures(curve)
    assert drawn.keys() == FIGURES.keys()
    for kinds in drawn.values():
        assert kinds["png"].startswith(b"\x89PNG")
        assert b"<svg" in kinds["svg"]
        assert len(kinds["png"]) < 150_000
    assert draw_figures(curve) == drawn
    assert draw_figures(Curve(curve.path, curve.request, curve.failed)) == {}


def _front_by_hand(gains: Sequence[float], leaks: Sequence[float]) -> set[tuple[float, float]]:
    marks = set(zip(gains, leaks, strict=True))
    return {
        (gain, leak)
        for gain, leak in marks
        if not any(g >= gain and x <= leak and (g, x) != (gain, leak) for g, x in marks)
    }


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


def test_the_command_goes_on_with_a_curve(curve: Curve, tmp_path: Path) -> None:
    """Every cell but the lost one is there, and so is that one in a narrower grid."""
    arguments = ["curve", "--resume", "--out", str(curve.path), "--seeds", "1", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["done"], found["failed"]) == (4, 0)
    assert {*found["files"]} >= {"curve.csv", "figures/leak.svg", "figures/theory.png", "figures/utility.svg"}
    assert all((curve.path / name).exists() for name in found["files"])


def test_an_alarm_in_a_cell_ends_in_exit_code_3(tmp_path: Path) -> None:
    request = small_request()
    (cell,) = request.cells
    folder = tmp_path / "alarmed" / CELLS / cell.folder
    with RunFolder.create(folder, cell.config()) as opened:
        train(opened.config, opened, Silent())
    audited(folder, finding(lower=1.5))
    (folder / DONE).write_text(json.dumps({"key": cell.key}))
    (tmp_path / "alarmed" / "curve.json").write_text(
        json.dumps({"format": 1, "request": request_tree(request), "failed": {}})
    )
    result = CliRunner().invoke(app, ["curve", "--resume", "--out", str(tmp_path / "alarmed")])
    assert result.exit_code == 3
    assert "do not release" in result.stderr
