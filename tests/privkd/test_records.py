"""Records come back as they were written, and nothing else is taken for one; values show themselves."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from evidence import audited, finding, rebuilt
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError, computed_field
from running import play

import audits
from audits.evidence import read_run
from audits.findings import Finding
from audits.tables import MechanismReport, MembershipReport, ReconstructionReport
from privkd.errors import InputError, RunError
from privkd.journal import Journal
from privkd.privacy.bounds import Check
from privkd.privacy.events import Batch, Charge, DpSgd, NoPrivacy, PostProcessing, PrivacyEvent, Unit, ZCdp
from privkd.records import Count, FileRecord, Measured, Real, Value
from privkd.runs.result import Result, RoundFigures, RoundRecord


@dataclass(frozen=True)
class Part:
    real: Real
    measured: Measured
    count: Count


class Whole(FileRecord):
    parts: tuple[Part, ...]
    maybe: Measured | None = None

    @computed_field
    @property
    def total(self) -> int:
        return sum(part.count for part in self.parts)


def written(path: Path, tree: Any) -> Path:
    path.write_text(json.dumps(tree, allow_nan=False))
    return path


class TestRecord:
    @given(st.floats(allow_nan=False), st.floats(), st.integers(0, 2**40))
    def test_comes_back_as_it_was(self, real: float, measured: float, count: int) -> None:
        whole = Whole(parts=(Part(real, measured, count),))
        tree = json.loads(json.dumps(whole.tree(), allow_nan=False))
        again = Whole.model_validate(tree)
        assert again.tree() == tree
        (part,) = again.parts
        assert (part.real, part.count) == (real, count)
        assert part.measured == measured or (math.isnan(part.measured) and math.isnan(measured))

    def test_spells_what_json_lacks(self) -> None:
        tree = Whole(parts=(Part(math.inf, math.nan, 1), Part(-math.inf, math.inf, 2))).tree()
        assert tree == {
            "version": 1,
            "parts": [
                {"real": "inf", "measured": None, "count": 1},
                {"real": "-inf", "measured": "inf", "count": 2},
            ],
            "maybe": None,
            "total": 3,
        }

    @pytest.mark.parametrize("value", ["3", True, None, [], "nan", math.nan, "Infinity"])
    def test_takes_no_lookalike_for_a_number(self, value: Any) -> None:
        with pytest.raises(ValidationError):
            Whole.model_validate({"parts": [{"real": value, "measured": 0.0, "count": 1}]})

    @pytest.mark.parametrize("value", ["1", True, -1, 1.5, None])
    def test_nor_for_a_count(self, value: Any) -> None:
        with pytest.raises(ValidationError):
            Whole.model_validate({"parts": [{"real": 0.0, "measured": 0.0, "count": value}]})

    def test_does_not_believe_what_follows(self) -> None:
        assert Whole.model_validate({"parts": [], "total": 7}).total == 0

    def test_names_a_version_that_it_does_not_read(self, tmp_path: Path) -> None:
        path = written(tmp_path / "w.json", {"version": 2, "parts": []})
        with pytest.raises(RunError, match=r"w\.json is of version 2; this privkd reads version 1"):
            Whole.read(path)

    @pytest.mark.parametrize("tree", [None, [], {}, {"parts": [], "more": 1}, {"parts": [{}]}], ids=str)
    def test_damage_is_one_line_that_names_the_file(self, tmp_path: Path, tree: Any) -> None:
        with pytest.raises(RunError, match=r"^.*w\.json is damaged or was changed \(.*\): restore it"):
            Whole.read(written(tmp_path / "w.json", tree))
        with pytest.raises(RunError, match=r"w\.json"):
            Whole.read(tmp_path / "none" / "w.json")


@pytest.mark.parametrize(
    ("event", "spelt"),
    [
        (
            DpSgd(math.inf, 0.5, 3),
            {"kind": "dp_sgd", "noise_multiplier": "inf", "sampling_rate": 0.5, "steps": 3},
        ),
        (ZCdp(0.25), {"kind": "zcdp", "rho": 0.25}),
        (PostProcessing("DP-SGD"), {"kind": "post_processing", "of": "DP-SGD"}),
        (NoPrivacy("plain"), {"kind": "no_privacy", "reason": "plain"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_ledger_spells_charges_as_it_always_did(event: PrivacyEvent, spelt: dict[str, Any]) -> None:
    charge = Charge(Unit.RECORD, "device-0000", event, 2)
    label = f"{spelt['kind']}: DP-SGD" if isinstance(event, PostProcessing) else spelt["kind"]
    row = {"unit": "record", "party": "device-0000", "round": 2, "label": label, "event": spelt}
    assert Batch(charges=(charge,)).tree() == {"charges": [row]}
    assert Batch.model_validate({"charges": [row]}).charges == (charge,)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished and audited run."""
    path = tmp_path_factory.mktemp("records") / "run"
    play(path, "channel.kind=noised", "privacy.device_epsilon=8", "rounds=1")
    audited(path, finding(), finding("gradient", "canaries-many-trials", lower=1.5), labels=True)
    rebuilt(path)
    (path / "audit" / "roc.png").write_bytes((path / "audit" / "grid.png").read_bytes())
    return path


VALUES = ["result", "membership", "reconstruction", "mechanism", "report", "comparison"]


@pytest.fixture(scope="module")
def values(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Value]:
    """One of each kind."""
    other = tmp_path_factory.mktemp("records") / "other"
    play(other, "rounds=1")
    facts = read_run(run)
    assert facts.result is not None
    assert facts.membership is not None
    assert facts.reconstruction is not None
    checks = (Check("student, lira-online: noise is fresh", True, "all differ"),)
    return {
        "result": facts.result,
        "membership": facts.membership,
        "reconstruction": facts.reconstruction,
        "mechanism": MechanismReport(findings=(finding(),), checks=checks, false_alarm=1e-6),
        "report": audits.report(run),
        "comparison": audits.compare(run, other),
    }


class TestValue:
    @pytest.mark.parametrize("name", VALUES)
    def test_is_read_by_the_class_that_wrote_it(self, values: dict[str, Value], name: str) -> None:
        value = values[name]
        tree = json.loads(json.dumps(value.tree(), allow_nan=False))
        assert type(value).model_validate(tree).tree() == tree

    @pytest.mark.parametrize("name", VALUES)
    def test_has_a_row_for_each_of_its_parts(self, values: dict[str, Value], name: str) -> None:
        rows = values[name].rows()
        assert rows
        assert len({tuple(row) for row in rows}) == 1, "all with the same keys"

    @pytest.mark.parametrize("name", VALUES)
    def test_is_a_data_frame(self, values: dict[str, Value], name: str) -> None:
        pytest.importorskip("pandas")
        frame = values[name].to_frame()
        assert list(frame.columns) == list(values[name].rows()[0])
        assert len(frame) == len(values[name].rows())

    def test_a_figure_that_there_is_not_is_nan(self, values: dict[str, Value]) -> None:
        pytest.importorskip("pandas")
        frame = values["membership"].to_frame()
        assert values["membership"].rows()[0]["tpr_at_fpr_0.001"] is None
        assert (frame["tpr_at_fpr_0.001"].dtype, frame["tpr_at_fpr_0.001"].isna().all()) == (float, True)

    @pytest.mark.parametrize("name", VALUES)
    def test_shows_its_table_in_a_notebook(self, values: dict[str, Value], name: str) -> None:
        shown = values[name]._repr_html_()
        assert shown.startswith("<pre")
        assert len(shown) > 200
        assert {"result": "Epsilon spent", "membership": "lira-online", "report": "report.html"}.get(
            name, ""
        ) in shown

    def test_is_shown_once_in_a_notebook(
        self, values: dict[str, Value], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        display = pytest.importorskip("IPython.display")
        monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
        monkeypatch.setattr(display, "display", lambda *shown: pytest.fail("what is returned is shown"))
        assert values["result"]._repr_html_().startswith("<pre")

    def test_without_pandas_it_says_what_to_install(
        self, values: dict[str, Value], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "pandas", None)
        with pytest.raises(InputError, match=r"pip install 'privkd\[notebook\]'$"):
            values["result"].to_frame()

    def test_has_no_alarm_unless_a_bound_is_crossed(self, values: dict[str, Value]) -> None:
        assert [values[name].alarm for name in VALUES] == [None] * len(VALUES)
        membership = values["membership"]
        assert isinstance(membership, MembershipReport)
        crossed = membership.model_copy(update={"findings": (finding(lower=9.0),)})
        assert "do not release" in str(crossed.alarm)
        failed = MechanismReport(
            findings=(finding(),), checks=(Check("noise", False, "none"),), false_alarm=0.0
        )
        assert "the check 'noise' fails: none" in str(failed.alarm)


def _older(run: Path) -> None:
    """Make a run's folder what version 0.1.0 left: no versions, no units in statements, no ``alarm_low``."""
    result = json.loads((run / "result.json").read_text())
    del result["version"]
    for row in result["ledger"].values():
        del row["unit"]
        del (row["lower_bound"] or {"unit": None})["unit"]
    written(run / "result.json", result)
    for name in ("membership", "reconstruction"):
        tree = json.loads((run / "audit" / f"{name}.json").read_text())
        del tree["version"]
        for row in tree["views"]:
            row.pop("alarm_low", None)
        written(run / "audit" / f"{name}.json", tree)
    records = list(Journal(run / "journal.jsonl"))
    (run / "journal.jsonl").unlink()
    journal = Journal(run / "journal.jsonl")
    for record in records:
        if record["step"] == "finished":
            record["result"] = sha256((run / "result.json").read_bytes()).hexdigest()
        journal.append(record)


def test_a_run_of_version_0_1_0_is_read(tmp_path: Path) -> None:
    play(tmp_path / "run", "rounds=1", "privacy.device_epsilon=8", "channel.kind=noised")
    audited(tmp_path / "run", finding())
    rebuilt(tmp_path / "run")
    new = read_run(tmp_path / "run")
    _older(tmp_path / "run")
    old = read_run(tmp_path / "run")
    assert old.result == new.result
    assert old.membership == new.membership
    assert old.reconstruction is not None
    assert [row.verdict for row in old.reconstruction.findings] == ["within bound"]
    assert old.statements == new.statements


def test_a_journal_of_version_0_1_0_spelt_nan_as_text() -> None:
    names = {field.name for field in fields(RoundFigures)} - {"devices"}
    figures = dict.fromkeys(names, 0.5) | {"students": "nan", "epsilon_device": "inf"}
    row = {"step": "round", "round": 0, "files": {"cloud": "0"}, "figures": figures, "ledger": None}
    record = RoundRecord.model_validate(row)
    assert math.isnan(record.figures.students)
    assert record.figures.epsilon_device == math.inf
    assert record.tree()["figures"]["students"] is None
    with pytest.raises(ValidationError):
        RoundRecord.model_validate(row | {"figures": figures | {"more": 0.0}})


def test_an_alarm_of_version_0_1_0_is_still_one(tmp_path: Path) -> None:
    (tmp_path / "audit").mkdir()
    rebuilt(tmp_path)
    file = tmp_path / "audit" / "reconstruction.json"
    tree = json.loads(file.read_text())
    del tree["views"][0]["alarm_low"]
    tree["views"][0]["verdict"] = "ALARM"
    assert ReconstructionReport.read(written(file, tree)).alarm is not None


def test_a_verdict_follows_from_its_bounds() -> None:
    tree = finding(lower=9.0).tree() | {"verdict": "within bound"}
    assert Finding.model_validate(tree).verdict == "ALARM"


def test_a_result_of_another_version_is_named(run: Path, tmp_path: Path) -> None:
    tree = json.loads((run / "result.json").read_text()) | {"version": 7}
    with pytest.raises(RunError, match="is of version 7"):
        Result.read(written(tmp_path / "result.json", tree))


class TestFrontDoor:
    def test_every_name_is_a_function_whatever_was_imported(self) -> None:
        """A room of the same name would take its place as soon as it is imported."""
        code = (
            "import audits, importlib, pkgutil, types\n"
            "rooms = [room.name for room in pkgutil.walk_packages(audits.__path__, 'audits.')]\n"
            "assert not {room.removeprefix('audits.') for room in rooms} & set(audits.__all__)\n"
            "for room in rooms: importlib.import_module(room)\n"
            "assert all(isinstance(getattr(audits, name), types.FunctionType) for name in audits.__all__)\n"
            "assert set(audits.__all__) <= set(dir(audits))"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

    def test_importing_it_loads_nothing_heavy(self) -> None:
        code = (
            "import audits, sys; print(*({'torch', 'dp_accounting', 'scipy', 'pydantic'} & set(sys.modules)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True
        )
        assert done.stdout.strip() == ""

    def test_an_unknown_name_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="no attribute 'membreship'"):
            _ = audits.membreship  # type: ignore[attr-defined]
