"""The bibliography: its pages hold what they say, and its command plays, keeps and reuses runs."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pages import ROOT, commands_of, files_named, parsed
from rich.console import Console
from running import SMALL

from audits.estimators.rates import Interval, mean_of
from cli import app
from papers.catalogue import STUDIES, study_named
from papers.measurements import Effort, Latency, Membership, Personal
from papers.reproduce import Answer, Reproduction, Runner, config_of, flat, folder_name
from papers.study import Case, Change, Claim, Difference, Figure, Scale, Share, Study, scale_named
from privkd.errors import ConfigError, InputError, RunError
from privkd.progress import Progress, Silent
from privkd.runs.folder import RunFolder

TINY = Scale("tiny", "made up", SMALL, seeds=2)
GAIN = Difference(Figure("open", "teacher.after"), Figure("open", "teacher.control"))
MADE_UP = Study(
    name="made-up",
    title="A paper",
    scales=(TINY,),
    cases=(Case("open", ("privacy.epsilon=inf",), measurements=(Personal(),)),),
    claims=(
        Claim("teacher over control", "better", GAIN, "points"),
        Claim("own student", "-", Figure("open", "personal.student"), "%"),
    ),
)


class Counting:
    """Counts the runs and measurements that are played."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def advance(self, done: int, total: int) -> None: ...

    def figures(self, **figures: float) -> None: ...


def code_of(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        app([str(argument) for argument in arguments])
    return left.value.code if isinstance(left.value.code, int) else 0


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
class TestPages:
    def test_have_their_parts(self, study: Study) -> None:
        headings = re.findall(r"^## (.*)$", study.page, flags=re.MULTILINE)
        assert headings == ["Claims", "Symbols", "Command", "Figures", "Why they differ"]
        assert study.page.startswith("# ")
        assert "@@" not in study.page

    def test_every_file_they_name_exists(self, study: Study) -> None:
        named = files_named(study.page)
        assert named
        assert [name for name in named if not (ROOT / name).is_file()] == []

    def test_every_symbol_in_the_table_is_in_its_file(self, study: Study) -> None:
        for line in study.page.splitlines():
            cells = [cell.strip() for cell in line.split("|")]
            files = re.findall(r"`([\w./]+\.py)`", cells[-2]) if len(cells) == 5 else []
            text = "".join((ROOT / name).read_text() for name in files)
            for name in re.findall(r"`([\w.=]+)`", cells[2]) if files else []:
                last = name.partition("=")[0].rpartition(".")[2]
                assert last in text, f"{name} is not in {files}"

    def test_every_command_parses(self, study: Study) -> None:
        found = commands_of(study.page)
        assert ["privkd", "papers", "run", study.name, "--quick"] in found
        for words in found:
            assert words[0] == "privkd"
            parsed(words[1:])
            if words[1:3] == ["papers", "run"]:
                assert study_named(words[3]) is study
                if "--scale" in words:
                    scale_named(study, words[words.index("--scale") + 1])

    def test_every_run_has_settings_that_go_together(self, study: Study) -> None:
        for scale in study.scales:
            for case in study.cases:
                assert config_of(case, scale, 1, None).seed == 1
        assert "quick" in [scale.name for scale in study.scales]
        assert len({case.name for case in study.cases}) == len(study.cases)


class TestQuantities:
    FIGURES = {"a": {"x": 3.0, "zero": 0.0}, "b": {"x": 2.0}}  # noqa: RUF012
    A, B, ZERO = Figure("a", "x"), Figure("b", "x"), Figure("a", "zero")

    def test_are_what_they_say(self) -> None:
        assert Difference(self.A, self.B).of(self.FIGURES) == 1
        assert Change(self.A, self.B).of(self.FIGURES) == 0.5
        assert Share(Difference(self.A, self.B), self.B).of(self.FIGURES) == 0.5

    def test_of_zero_are_no_number(self) -> None:
        assert math.isnan(Share(self.A, self.ZERO).of(self.FIGURES))
        assert math.isnan(Change(self.A, self.ZERO).of(self.FIGURES))

    def test_that_a_run_lacks_are_refused(self) -> None:
        with pytest.raises(RunError, match="no figure 'y'"):
            Figure("a", "y").of(self.FIGURES)


class TestIntervals:
    def test_students(self) -> None:
        """Textbook: t(0.975, 4) = 2.776445."""
        found = mean_of([1.0, 2.0, 3.0, 4.0, 5.0])
        half = 2.7764451 * math.sqrt(2.5 / 5)
        assert found.estimate == 3
        assert found.low == pytest.approx(3 - half)
        assert found.high == pytest.approx(3 + half)

    def test_of_one_seed_tells_nothing_of_others(self) -> None:
        assert mean_of([0.5]) == Interval(0.5, -math.inf, math.inf, 1)
        assert Answer(replace(MADE_UP.claims[0], unit="%"), mean_of([0.5])).shown == "50.00 %"

    def test_end_where_the_quantity_does(self) -> None:
        """A share ends at 0 and 1, a bound on epsilon begins at 0, a difference ends nowhere."""
        gain, share = MADE_UP.claims
        assert mean_of([0.9, 1.0]).high > 1
        assert mean_of([0.9, 1.0]).within(*share.range).high == 1
        assert mean_of([0.0, 0.1]).within(*share.range).low == 0
        assert mean_of([0.0, 3.0]).within(*replace(share, unit="epsilon").range).low == 0
        assert mean_of([0.0, 3.0]).within(*replace(share, unit="epsilon").range).high > 3
        assert mean_of([0.0, 0.1]).within(*gain.range) == mean_of([0.0, 0.1])
        change = replace(share, quantity=Share(share.quantity, share.quantity))
        assert mean_of([0.9, 1.0]).within(*change.range).high > 1

    def test_of_what_was_refused_are_none(self) -> None:
        claim = MADE_UP.claims[1]
        refused = mean_of([math.nan, 0.5]).within(*claim.range)
        assert math.isnan(refused.low)
        assert Answer(claim, refused).shown == "-"

    def test_cover_in_19_of_20_cases(self) -> None:
        """2,000 means of 3 normal draws: outside [0.93, 0.97] with probability below 1e-4."""
        import numpy as np

        draws = np.random.default_rng(0).normal(1.0, 2.0, size=(2000, 3))
        covered = [low <= 1 <= high for low, high in map(bounds, draws)]
        assert 0.93 < sum(covered) / len(covered) < 0.97

    def test_are_shown_in_the_claims_unit(self) -> None:
        claim = MADE_UP.claims[0]
        assert Answer(claim, Interval(0.051, 0.04, 0.062, 3)).shown == "+5.10 points [4.00, 6.20]"
        percent = replace(claim, unit="%")
        assert Answer(percent, mean_of([0.951])).shown == "95.10 %"
        assert Answer(percent, mean_of([math.nan])).shown == "-"
        assert Answer(replace(claim, unit="epsilon"), Interval(2.5, 2, 3, 3)).shown == "2.500 [2.000, 3.000]"


def bounds(values: object) -> tuple[float, float]:
    found = mean_of(list(values))  # type: ignore[call-overload]
    return found.low, found.high


class TestRuns:
    def test_are_played_once(self, tmp_path: Path) -> None:
        first, second = Counting(), Counting()
        found = Runner(tmp_path, None, first).reproduction(MADE_UP, TINY, 2)
        again = Runner(tmp_path, None, second).reproduction(MADE_UP, TINY, 2)
        assert found.tree() == again.tree()
        assert first.stages
        assert not second.stages, "a finished run was played again"
        assert len(list(tmp_path.iterdir())) == 2
        assert found.answers[0].ours.n == 2

    def test_are_resumed_where_they_were_cut_short(self, tmp_path: Path) -> None:
        case = MADE_UP.cases[0]
        whole = Runner(tmp_path / "whole", None, Silent()).figures(case, TINY, 0)
        with pytest.raises(KeyboardInterrupt):
            Runner(tmp_path / "cut", None, StopAfter("round 2")).figures(case, TINY, 0)
        told = Counting()
        resumed = Runner(tmp_path / "cut", None, told).figures(case, TINY, 0)
        assert not any(stage.startswith("round 1") for stage in told.stages)
        kept = {name for name in whole if "latency" not in name and name != "seconds"}
        assert {name: whole[name] for name in kept} == {name: resumed[name] for name in kept}

    def test_of_other_settings_lie_apart(self) -> None:
        case = MADE_UP.cases[0]
        other = replace(case, settings=("privacy.epsilon=3",))
        names = {folder_name(config_of(c, TINY, seed, None)) for c in (case, other) for seed in (0, 1)}
        assert len(names) == 4

    def test_a_changed_result_is_played_again(self, tmp_path: Path) -> None:
        runner = Runner(tmp_path, None, Silent())
        honest = runner.figures(MADE_UP.cases[0], TINY, 0)
        result = next(tmp_path.rglob("result.json"))
        result.write_text(result.read_text().replace('"teacher"', '"teacher "', 1))
        assert runner.figures(MADE_UP.cases[0], TINY, 0)["teacher.after"] == honest["teacher.after"]

    def test_on_other_data_are_not_taken_for_these(self, tmp_path: Path) -> None:
        data = tmp_path / "t.csv"
        lines = [f"{k % 7},{k % 5},{k % 3}\n" for k in range(300)]
        data.write_text("".join(lines))
        case = replace(MADE_UP.cases[0], settings=(f"data.source={data}",), measurements=())
        runner = Runner(tmp_path / "runs", None, Silent())
        runner.figures(case, TINY, 0)
        data.write_text("".join(reversed(lines)))
        with pytest.raises(RunError, match=r"t\.csv was changed"):
            runner.figures(case, TINY, 0)

    def test_bad_data_leave_no_folder(self, tmp_path: Path) -> None:
        case = Case("open", ("data.source=mnist",))
        with pytest.raises(ConfigError):
            Runner(tmp_path / "runs", None, Silent()).figures(replace(case, settings=("no.such=1",)), TINY, 0)
        with pytest.raises(Exception, match="mnist"):
            Runner(tmp_path / "runs", tmp_path, Silent()).figures(case, TINY, 0)
        assert not (tmp_path / "runs").exists()


class Alarming:
    """A measurement that finds what the ledger rules out."""

    def name(self, effort: Effort) -> str:
        return "alarming"

    def measure(self, folder: RunFolder, progress: Progress, effort: Effort) -> dict[str, float]:
        return {
            "student.lira-online.alarm": 1.0,
            "gradient.canaries.alarm": 0.0,
            "a": math.inf,
            "b": math.nan,
        }


class TestReproduction:
    @pytest.fixture(scope="class")
    def runs(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("reproduction")

    @pytest.fixture(scope="class")
    def found(self, runs: Path) -> Reproduction:
        return Runner(runs, None, Silent()).reproduction(MADE_UP, TINY, 2)

    def test_is_a_table_here_and_in_a_notebook(
        self, found: Reproduction, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Console(width=90).print(found, crop=False)
        out = capsys.readouterr().out
        assert "A paper, scale tiny" in out
        assert "Means over 2 seeds" in out
        assert "A paper, scale tiny" in found._repr_html_()

    def test_names_what_a_frame_needs(self, found: Reproduction, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pandas", None)
        with pytest.raises(InputError, match="a data frame needs pandas"):
            found.to_frame()
        assert [row["claim"] for row in found.rows()] == [claim.text for claim in MADE_UP.claims]

    def test_knows_an_audit_s_alarm(
        self, found: Reproduction, runs: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert found.alarm is None
        case = replace(MADE_UP.cases[0], measurements=(Personal(), Alarming()))
        alarmed = Runner(runs, None, Silent()).reproduction(replace(MADE_UP, cases=(case,)), TINY, 1)
        assert alarmed.alarms == ("case open, seed 0: student.lira-online found more than the ledger allows",)
        monkeypatch.setattr("papers.reproduce.reproduce", lambda *_, **__: alarmed)
        assert code_of("papers", "run", "du2022") == 3

    def test_keeps_what_was_measured_as_it_was(self, found: Reproduction, runs: Path) -> None:
        case = replace(MADE_UP.cases[0], measurements=(Alarming(),))
        player = Runner(runs, None, Silent())
        for figures in (player.figures(case, TINY, 1), player.figures(case, TINY, 1)):
            assert (figures["a"], math.isnan(figures["b"])) == (math.inf, True)
        kept = next(path for path in runs.rglob("alarming.json") if "seed1" in str(path))
        assert json.loads(kept.read_text())["figures"]["a"] == "inf"
        kept.write_text("{")
        with pytest.raises(RunError, match=r"alarming\.json cannot be read"):
            player.figures(case, TINY, 1)


class StopAfter(Counting):
    """Interrupts a run where a stage begins."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self._start = start

    def stage(self, name: str) -> None:
        if name.startswith(self._start):
            raise KeyboardInterrupt


class TestMeasurements:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        out = tmp_path_factory.mktemp("papers")
        Runner(out, None, Silent()).figures(replace(MADE_UP.cases[0], measurements=()), TINY, 0)
        return next(out.iterdir())

    def test_personal_is_what_the_run_reports(self, run: Path) -> None:
        with RunFolder.resume(run) as folder:
            found = Personal().measure(folder, Silent(), Effort())
        told = flat(json.loads((run / "result.json").read_text()))
        assert found["personal.student"] == pytest.approx(told["student.personal"])
        assert found["personal.worst"] <= found["personal.student"]
        assert all(0 <= value <= 1 for value in found.values())

    def test_a_refused_rate_is_nan(self, run: Path) -> None:
        with RunFolder.resume(run) as folder:
            found = Membership("student", "attack-p").measure(folder, Silent(), Effort(shadows=8, targets=2))
        assert math.isnan(found["student.attack-p.tpr_at_0.001"])
        assert 0 <= found["student.attack-p.auc"] <= 1
        assert found["student.attack-p.epsilon_lower"] <= found["student.attack-p.epsilon_upper"]

    def test_latency_measures_both(self, run: Path) -> None:
        with RunFolder.resume(run) as folder:
            found = Latency("torch").measure(folder, Silent(), Effort())
        assert set(found) == {
            f"export.{who}_{what}" for who in ("student", "teacher") for what in ("ms", "bytes")
        }
        assert all(value > 0 for value in found.values())


def test_flat_spells_infinity_and_nan_and_leaves_out_text() -> None:
    tree = {"a": [1, {"b": "inf"}], "c": None, "d": "words", "e": True, "f": {"g": 0.5}}
    assert flat(tree) == pytest.approx(
        {"a.0": 1.0, "a.1.b": math.inf, "c": math.nan, "f.g": 0.5}, nan_ok=True
    )


class TestCommand:
    def test_lists_every_paper(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert code_of("papers", "list") == 0
        out = capsys.readouterr().out
        assert all(study.name in out for study in STUDIES)
        assert code_of("papers", "list", "--json") == 0
        rows = json.loads(capsys.readouterr().out)["papers"]
        assert [row["name"] for row in rows] == [study.name for study in STUDIES]

    def test_shows_a_page(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert code_of("papers", "show", "du2022") == 0
        assert capsys.readouterr().out == study_named("du2022").page

    def test_runs_quickly(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "runs"
        assert code_of("papers", "run", "du2022", "--quick", "--seeds", 1, "--out", out, "--json") == 0
        answer = json.loads(capsys.readouterr().out)
        assert (answer["paper"], answer["scale"]) == ("du2022", "quick")
        assert len(answer["claims"]) == len(study_named("du2022").claims)
        assert all(row["seeds"] == 1 and row["low"] is None for row in answer["claims"])
        assert answer["claims"][0]["published"] == "+17.01 %"
        assert code_of("papers", "run", "du2022", "--quick", "--seeds", 1, "--out", out) == 0
        table = capsys.readouterr().out
        assert "+17.01 %" in table
        assert "One seed: no interval." in table

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["show", "du2021"], "did you mean 'du2022'?"),
            (["run", "du2021"], "did you mean 'du2022'?"),
            (["run", "du2022", "--scale", "imagenet"], "du2022 has mnist, digits, cifar10, quick"),
            (["run", "du2022", "--seeds", "0"], "expected 1 to 1000"),
            (["run", "du2022", "--quick", "--scale", "mnist"], "one of the two"),
            (["run", "du2022", "--data-dir", "nowhere"], "source 'mnist'"),
        ],
    )
    def test_refuses_in_one_line(
        self,
        arguments: list[str],
        words: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        assert code_of("papers", *arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert words in captured.err.splitlines()[-1]
        assert list(tmp_path.iterdir()) == []
