"""Tables as people have them: what separates cells, text, truth values, dates, ids, and what is missing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from reading import read
from running import SMALL, play
from typer.testing import CliRunner

from cli import app
from privkd.config import Config, DataConfig
from privkd.data import build_scenario, load
from privkd.data.constants import Constants
from privkd.data.dataset import Words
from privkd.data.encoding import codes_of
from privkd.data.partition import split_indices
from privkd.data.preprocessing import Column
from privkd.deployment.own_records import own_records
from privkd.deployment.owner import RecordsConfig
from privkd.deployment.published import PLAN_FILE, PublishedPlan
from privkd.errors import ConfigError, DataError, RunError
from privkd.plan import facts_of, make_plan

COLOURS = ("amber", "blue", "cyan")
SIZES = {"records_per_device": 30, "public_records": 40, "validation_records": 20, "proxy_records": 40,
         "test_records": 40, "device_test_records": 4, "devices": 2, "gap": "none"}  # fmt: skip


def rows_of(records: int = 40) -> list[list[str]]:
    return [
        [f"{280 + 3 * (n % 7)}.5", COLOURS[n % 3], ["no", "Yes"][n % 2], str(n % 2)] for n in range(records)
    ]


HEADER = ["kelvin", "colour", "wet", "label"]


def written(
    path: Path, rows: Sequence[Sequence[str]], delimiter: str = ",", header: Sequence[str] = HEADER
) -> Path:
    path.write_text("\n".join(delimiter.join(row) for row in [header, *rows]))
    return path


def refused(path: Path, *words: str, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def taken(path: Path, **settings: Any) -> dict[str, str]:
    return dict(load(DataConfig(source=str(path), **settings)).taken)


class TestDelimiter:
    @pytest.mark.parametrize(
        ("name", "delimiter", "settings", "said"),
        [
            ("t.csv", ",", {}, None),
            ("t.tsv", "\t", {}, "between tabs"),
            ("t.tab", "\t", {}, "between tabs"),
            ("t.csv", ";", {"delimiter": "semicolon"}, "between semicolons"),
            ("t.csv", "\t", {"delimiter": "tab"}, "between tabs"),
            ("t.tsv", ",", {"delimiter": "comma"}, None),
        ],
    )
    def test_is_the_names_or_the_one_set(
        self, tmp_path: Path, name: str, delimiter: str, settings: dict[str, Any], said: str | None
    ) -> None:
        plain = read(written(tmp_path / "plain.csv", rows_of()))
        path = written(tmp_path / name, rows_of(), delimiter)
        assert torch.equal(read(path, **settings).inputs, plain.inputs)
        assert taken(path, **settings).get("cells") == said

    @pytest.mark.parametrize(
        ("name", "delimiter", "other"),
        [
            ("t.csv", ";", "semicolon"),
            ("t.csv", "\t", "tab"),
            ("t.tsv", ",", "comma"),
            ("t.tsv", ";", "semicolon"),
        ],
    )
    def test_is_asked_where_the_first_line_denies_it(
        self, tmp_path: Path, name: str, delimiter: str, other: str
    ) -> None:
        path = written(tmp_path / name, rows_of(), delimiter)
        refused(path, "its first line has 4 cells by", f"--set data.delimiter={other}")

    def test_in_quotes_is_none(self, tmp_path: Path) -> None:
        path = tmp_path / "t.csv"
        path.write_text('"a;b","c;d",label\n1,2,0\n3,4,1\n')
        assert read(path).inputs.tolist() == [[1, 2], [3, 4]]

    def test_decimal_commas_are_asked_about_or_read(self, tmp_path: Path) -> None:
        rows = [[row[0].replace(".", ","), *row[1:]] for row in rows_of()]
        path = written(tmp_path / "t.csv", rows, ";")
        refused(path, "'kelvin' holds '280,5'", "--set data.decimal=comma", delimiter="semicolon")
        found = read(path, delimiter="semicolon", decimal="comma")
        assert torch.equal(found.inputs, read(written(tmp_path / "p.csv", rows_of())).inputs)

    def test_a_point_among_decimal_commas_is_no_number(self, tmp_path: Path) -> None:
        path = written(tmp_path / "t.csv", [["1,5", "0"], ["1.500", "1"]], ";", ["a", "label"])
        refused(path, "line 3, 'a': '1.500' is not a number", delimiter="semicolon", decimal="comma")


class TestText:
    def test_is_one_input_for_each_public_value(self, tmp_path: Path) -> None:
        found = read(written(tmp_path / "t.csv", rows_of()))
        assert found.inputs[:3].tolist() == [[280.5, 1, 0, 0, 0], [283.5, 0, 1, 0, 1], [286.5, 0, 0, 1, 0]]
        assert [column.vocabulary for column in found.constants.columns] == [(), COLOURS, ("no", "yes")]
        assert "'colour', 'wet' as categories, of 5 known values" in found.constants.said

    def test_parquet_likewise(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        kelvin, colour, wet, label = zip(*rows_of(), strict=True)
        colours = pyarrow.array(colour).dictionary_encode()
        columns = {
            "kelvin": [*map(float, kelvin)],
            "colour": colours,
            "wet": wet,
            "label": [*map(int, label)],
        }
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), tmp_path / "t.parquet")
        plain = read(written(tmp_path / "t.csv", rows_of()))
        assert torch.equal(read(tmp_path / "t.parquet").inputs, plain.inputs)

    @pytest.mark.parametrize("pair", [("FALSE", "True"), ("n", "Y"), ("No", "yes")])
    def test_truth_values_are_flags_in_any_case(self, tmp_path: Path, pair: tuple[str, str]) -> None:
        rows = [[pair[n % 2], str(n), str(n % 2)] for n in range(8)]
        found = read(written(tmp_path / "t.csv", rows, header=["wet", "a", "label"]))
        assert found.inputs[:, 0].tolist() == [0, 1] * 4

    def test_numbers_may_be_names_if_it_is_said(self, tmp_path: Path) -> None:
        rows = [[["01", "1", "2"][n % 3], str(n), str(n % 2)] for n in range(9)]
        path = written(tmp_path / "t.csv", rows, header=["zip", "a", "label"])
        assert read(path).inputs.shape == (9, 2)
        found = read(path, categorical="zip")
        assert found.constants.columns[0].vocabulary == ("01", "1", "2")
        assert found.inputs[:, :3].sum(1).tolist() == [1] * 9

    @pytest.mark.parametrize("name", ["label", "nowhere"])
    def test_said_of_no_feature_is_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ConfigError, match=rf"data\.categorical: '{name}'"):
            read(written(tmp_path / "t.csv", rows_of()), categorical=name)

    def test_among_numbers_is_asked_about(self, tmp_path: Path) -> None:
        rows = [[str(n), str(n % 2)] for n in range(5000)] + [["many", "1"]]
        path = written(tmp_path / "t.csv", rows, header=["a", "label"])
        refused(path, "line 5002, 'a': 'many' is not a number", "--drop", "--label", "data.categorical=a")
        rows = [["many", "1"]] + [[str(n), str(n % 2)] for n in range(5)]
        refused(written(path, rows, header=["a", "label"]), "line 2, 'a': 'many' is not a number")

    @pytest.mark.parametrize("column", ["name", "remark"])
    def test_that_is_free_or_names_is_refused(self, tmp_path: Path, column: str) -> None:
        rows = [[f"Mx {n:03d}", str(n % 5), str(n % 2)] for n in range(200)]
        path = written(tmp_path / "t.csv", rows, header=[column, "a", "label"])
        refused(path, f"'{column}' holds text, 'Mx 000', of 200 different values", "--drop", "--group")
        assert read(path, drop=column).inputs.shape == (200, 1)
        assert read(path, categorical=column).inputs.shape == (200, 201)

    @given(st.lists(st.text(max_size=4), min_size=1, max_size=6, unique=True), st.data())
    def test_codes_are_places_in_the_vocabulary(self, values: list[str], data: st.DataObject) -> None:
        """The slow twin: one record after the other."""
        vocabulary = data.draw(st.lists(st.sampled_from([*values, "other"]), unique=True))
        held = data.draw(st.lists(st.integers(-1, len(values) - 1), max_size=9))
        found = codes_of(Words(tuple(values), np.array(held, dtype=np.int32)), vocabulary)
        for code, place in zip(found.tolist(), held, strict=True):
            if place < 0:
                assert np.isnan(code)
            elif tuple(vocabulary) not in (("false", "true"), ("no", "yes"), ("n", "y")):
                assert code == (vocabulary.index(values[place]) if values[place] in vocabulary else -1)


class TestWhatIsNoFeature:
    @pytest.mark.parametrize("day", ["2024-01-{:02d}", "2024-01-{:02d} 12:30", "{:02d}.01.2024", "1/{}/24"])
    def test_dates_are_refused_by_name(self, tmp_path: Path, day: str) -> None:
        rows = [[day.format(n % 28 + 1), str(n % 5), str(n % 2)] for n in range(200)]
        path = written(tmp_path / "t.csv", rows, header=["visit_date", "a", "label"])
        refused(path, f"'visit_date' holds dates, {day.format(1)}", "days since", "--drop")

    def test_dates_of_parquet_likewise(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        days = np.arange("2024-01-01", "2024-01-09", dtype="datetime64[D]")
        table = pyarrow.table({"day": days, "a": np.arange(8), "label": np.arange(8) % 2})
        pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "t.parquet")
        refused(tmp_path / "t.parquet", "'day' holds dates, 2024-01-01", "--drop")

    @pytest.mark.parametrize("name", ["id", "ID", "user_id", "userId", "customerID", "Patient No", "index"])
    def test_what_numbers_the_records_is_asked_about(self, tmp_path: Path, name: str) -> None:
        rows = [[str(1000 + n), str(n % 5), str(n % 2)] for n in range(60)]
        path = written(tmp_path / "t.csv", rows, header=[name, "a", "label"])
        refused(path, f"'{name}' holds 60 different values in 60 public records", "--drop", "--group")
        assert read(path, drop=name).inputs.shape == (60, 1)
        assert read(path, group=name).inputs.shape == (60, 1)

    @pytest.mark.parametrize("name", ["humid", "paid", "age", "width"])
    def test_what_is_called_otherwise_is_not(self, tmp_path: Path, name: str) -> None:
        rows = [[str(1000 + n), str(n % 5), str(n % 2)] for n in range(60)]
        assert read(written(tmp_path / "t.csv", rows, header=[name, "a", "label"])).inputs.shape == (60, 2)


class TestMissing:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        rows = rows_of()
        rows[3][0], rows[4][1], rows[5][2], rows[6][0] = "NA", "?", "", "nan"
        return written(tmp_path / "t.csv", rows)

    def test_is_refused_by_name_and_count(self, path: Path) -> None:
        refused(path, "'kelvin' (2, first in record 3), 'colour' (1, first in record 4)", "--missing")

    def test_is_filled_by_the_public_mean_or_the_most_frequent(self, path: Path) -> None:
        whole = [float(row[0]) for n, row in enumerate(rows_of()) if n not in (3, 6)]
        found = read(path, missing="mean")
        assert found.inputs[3, 0].item() == pytest.approx(np.mean(whole))
        assert found.inputs[4, 1:4].tolist() == [1, 0, 0], "amber is the first of the most frequent"
        values, counts = np.unique(whole, return_counts=True)
        likely = read(path, missing="most-frequent")
        assert likely.inputs[3, 0].item() == values[np.argmax(counts)]
        assert "missing values filled" in found.constants.said
        assert "mean of the public" in taken(path, missing="mean")["missing values"]

    def test_or_its_records_are_left_out(self, path: Path) -> None:
        kept = [n for n in range(40) if n not in (3, 4, 5, 6)]
        whole = read(written(path.with_name("whole.csv"), rows_of()))
        assert torch.equal(read(path, missing="drop").inputs, whole.inputs[kept])
        assert "left out" in taken(path, missing="drop")["missing values"]

    def test_everywhere_is_refused(self, tmp_path: Path) -> None:
        path = written(tmp_path / "t.csv", [["", "1", "0"], ["", "2", "1"]], header=["a", "b", "label"])
        refused(path, "'a' has no value in the public records", missing="mean")
        refused(path, "in every record", missing="drop")

    def test_of_parquet_is_null(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        columns = {"a": [1, None, 3], "b": ["u", "v", None], "label": [0, 1, 0]}
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), tmp_path / "t.parquet")
        refused(tmp_path / "t.parquet", "'a' (1, first in record 1), 'b' (1, first in record 2)")
        found = read(tmp_path / "t.parquet", missing="mean")
        assert found.inputs.tolist() == [[1, 1, 0], [2, 0, 1], [3, 1, 0]]

    def test_by_the_flag(self, path: Path) -> None:
        options = ["train", *(word for one in SMALL for word in ("--set", one)), "--data", str(path)]
        found = CliRunner().invoke(app, [*options, "--missing", "nonsense"])
        assert found.exit_code == 2

    def test_in_what_is_no_table_is_not_a_setting(self) -> None:
        with pytest.raises(ConfigError, match=r"data\.missing: source 'digits' has no columns"):
            load(DataConfig(missing="mean"))


class TestPrivateRecords:
    """What one of them holds changes nothing public, and never stops what was settled by the public ones."""

    def private_row(self, path: Path, **settings: Any) -> int:
        config = DataConfig(source=str(path), **SIZES, **settings)
        source = load(config)
        split = split_indices(source.records.labels.astype(int), config, 0, classes=2, names=source.names)
        place = int(split.device_train[0][2])
        return place if source.records.rows is None else int(source.records.rows[place])

    def view(self, path: Path, **settings: Any) -> tuple[Any, ...]:
        found = build_scenario(DataConfig(source=str(path), **SIZES, **settings), 0)
        sets = (found.public, found.validation, found.test)
        return (
            found.constants,
            [part.inputs.tolist() for part in sets],
            found.proxy.tolist(),
            found.input_shape,
        )

    @pytest.mark.parametrize(
        "change",
        [
            {1: "crimson"},
            {2: "perhaps"},
            {0: "1e30"},
            {0: "-1e30", 1: "2024-01-01", 2: "free text of its own"},
        ],
    )
    def test_a_foreign_value(self, tmp_path: Path, change: dict[int, str]) -> None:
        rows = rows_of(400)
        before = self.view(written(tmp_path / "t.csv", rows))
        row = rows[self.private_row(tmp_path / "t.csv")]
        for place, cell in change.items():
            row[place] = cell
        assert self.view(written(tmp_path / "t.csv", rows)) == before

    @pytest.mark.parametrize("missing", ["mean", "drop"])
    def test_a_missing_one(self, tmp_path: Path, missing: str) -> None:
        rows = rows_of(400)
        before = self.view(written(tmp_path / "t.csv", rows), missing=missing)
        row = rows[self.private_row(tmp_path / "t.csv", missing=missing)]
        row[0], row[1] = "NA", ""
        assert self.view(written(tmp_path / "t.csv", rows), missing=missing) == before


class TestModule:
    COLUMNS = (
        Column(name="kelvin", mean=280.0, scale=4.0, fill=284.0),
        Column(name="colour", vocabulary=COLOURS, fill=2.0),
        Column(name="wet", vocabulary=("no", "yes"), fill=1.0),
        Column(name="size", vocabulary=("l", "s"), fill=0.0),
    )

    def made(self, raw: list[list[float]]) -> list[list[float]]:
        constants = Constants(1.0, None, None, "", self.COLUMNS, 5.0)
        return constants.features(np.array(raw, dtype=np.float32)).tolist()

    def test_takes_places_in_vocabularies(self) -> None:
        assert self.made([[284, 0, 0, 1], [1e9, 2, 1, 0]]) == [[1, 1, 0, 0, 0, 0, 1], [5, 0, 0, 1, 1, 1, 0]]

    def test_fills_what_is_missing_and_knows_no_others(self) -> None:
        gone = float("nan")
        assert self.made([[gone] * 4, [280, -1, -1, -1]]) == [[1, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]]

    def test_has_an_inverse(self) -> None:
        constants = Constants(1.0, None, None, "", self.COLUMNS, 5.0)
        raw = np.array([[284, 0, 0, 1], [276, 2, 1, 0], [280, -1, 0, -1]], dtype=np.float32)
        assert constants.raw(constants.features(raw)).tolist() == raw.tolist()

    @pytest.mark.parametrize(
        "column",
        [
            {"vocabulary": ["a", "a"]},
            {"vocabulary": ["a", "b"], "mean": 1.0},
            {"vocabulary": ["a", "b"], "fill": 2.0},
            {"vocabulary": ["a", "b"], "fill": 0.5},
            {"vocabulary": [str(number) for number in range(1025)]},
            {"vocabulary": [3]},
            {"fill": float("nan")},
        ],
    )
    def test_of_absurd_columns_there_is_none(self, column: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            Column.model_validate({"name": "c", **column})


def raw_rows(inputs: NDArray[Any], rows: Sequence[Sequence[str]]) -> None:
    """Write into ``inputs`` the raw features of ``rows`` as an application does."""
    for record, row in zip(inputs, rows, strict=True):
        record[:] = [float(row[0]), COLOURS.index(row[1]), ["no", "yes"].index(row[2].lower())]


class TestWalk:
    """Train, export, and put rows of the table to the file by what is written beside it."""

    @pytest.mark.parametrize("form", ["torch", "onnx"])
    def test_an_exported_student_takes_raw_rows(self, tmp_path: Path, form: str) -> None:
        if form == "onnx":
            pytest.importorskip("onnxruntime")
        from privkd.export.export import export_student
        from privkd.export.formats import format_named, suffix_of
        from privkd.prepared import HELD_BY_DEVICES, finished, reopen_simulation
        from privkd.progress import Silent
        from privkd.runs.folder import RunFolder

        path = written(tmp_path / "t.csv", rows_of(400))
        play(tmp_path / "run", f"data.source={path}", "data.missing=mean", "rounds=1")
        out = tmp_path / f"s{suffix_of(form)}"
        with RunFolder.resume(tmp_path / "run") as folder:
            export_student(folder, form, 0, out)
            prepared = reopen_simulation(folder, HELD_BY_DEVICES)
            student = prepared.personalised(finished(prepared, folder), [0], Silent())[0]
        told = json.loads((tmp_path / f"{out.name}.columns").read_text())["columns"]
        assert [(column["name"], tuple(column["vocabulary"])) for column in told] == [
            ("kelvin", ()), ("colour", COLOURS), ("wet", ("no", "yes")),
        ]  # fmt: skip
        raw = np.zeros((30, 3), dtype=np.float32)
        raw_rows(raw, rows_of(30))
        raw[7] = np.nan
        with torch.no_grad():
            ours = student(prepared.scenario.constants.features(raw))
            theirs = format_named(form).load(out)(torch.from_numpy(raw))
        assert bool(ours.isfinite().all())
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


class TestPublished:
    @pytest.fixture
    def plan(self, tmp_path: Path) -> PublishedPlan:
        source = str(written(tmp_path / "cloud.csv", rows_of(400)))
        config = Config(data={"source": source, "missing": "mean", **SIZES})
        scenario = build_scenario(config.data, 0)
        names = tuple(f"device-{number}" for number in range(2))
        plan = PublishedPlan.of(config, scenario, make_plan(config, facts_of(scenario)), names, 1.0)
        (tmp_path / "plan").mkdir()
        plan.write(tmp_path / "plan", scenario.proxy)
        return PublishedPlan.load(tmp_path / "plan")[0]

    def test_a_device_reads_its_own_table_by_it(self, plan: PublishedPlan, tmp_path: Path) -> None:
        rows = [["NA", "crimson", "YES", "1"], ["280", "", "maybe", "0"]]
        found = own_records(RecordsConfig(source=str(written(tmp_path / "own.csv", rows))), plan)
        kelvin = plan.scale.columns[0]
        assert found.inputs[0].tolist() == pytest.approx([0, 0, 0, 0, 1], abs=1e-6)
        assert found.inputs[1, 1:].tolist() == [1, 0, 0, 0]
        assert found.inputs[1, 0].item() == pytest.approx((280 - kelvin.mean) / kelvin.scale, rel=1e-4)

    def test_names_that_look_like_numbers_are_names(self, plan: PublishedPlan, tmp_path: Path) -> None:
        path = written(tmp_path / "own.csv", [["280", "7", "1", "1"], ["281", "8", "0", "0"]])
        assert own_records(RecordsConfig(source=str(path)), plan).inputs[:, 1:].abs().sum() == 0

    def test_text_where_the_plan_has_numbers_is_refused(self, plan: PublishedPlan, tmp_path: Path) -> None:
        path = written(tmp_path / "own.csv", [["warm", "blue", "no", "1"], ["cold", "blue", "no", "0"]])
        with pytest.raises(DataError, match="'kelvin' holds text, 'warm', where numbers are known"):
            own_records(RecordsConfig(source=str(path)), plan)

    @pytest.mark.parametrize(
        "change", [{"vocabulary": ["a", "a"]}, {"vocabulary": []}, {"fill": 9.0}], ids=str
    )
    def test_an_absurd_vocabulary_is_refused(
        self, plan: PublishedPlan, tmp_path: Path, change: dict[str, Any]
    ) -> None:
        tree = plan.tree()
        tree["scale"]["columns"][1] |= change
        (tmp_path / "plan" / PLAN_FILE).write_text(json.dumps(tree, sort_keys=True, separators=(",", ":")))
        with pytest.raises(RunError, match=r"scale\.columns\.1|do not make inputs of shape"):
            PublishedPlan.load(tmp_path / "plan")


def test_missing_values_without_a_rule_of_the_plan_are_refused_or_dropped(tmp_path: Path) -> None:
    source = str(written(tmp_path / "cloud.csv", rows_of(400)))
    config = Config(data={"source": source, **SIZES})
    scenario = build_scenario(config.data, 0)
    facts = make_plan(config, facts_of(scenario))
    plan = PublishedPlan.of(config, scenario, facts, ("device-0", "device-1"), 1.0)
    path = written(tmp_path / "own.csv", [["NA", "blue", "no", "1"], ["281", "blue", "no", "0"]])
    with pytest.raises(DataError, match="missing in 'kelvin' \\(1, first in record 0\\)"):
        own_records(RecordsConfig(source=str(path)), plan)
    assert len(own_records(RecordsConfig(source=str(path), missing="drop"), plan)) == 1
