"""Tables become inputs by their public records alone, in a run and in what is exported of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from running import SMALL, play
from typer.testing import CliRunner

from cli import app
from privkd.config import Config, DataConfig
from privkd.data import build_scenario, load, scenario_from
from privkd.data.constants import AS_THEY_CAME, Constants, find_constants
from privkd.data.dataset import RawSet, make_source
from privkd.data.partition import split_indices
from privkd.data.preprocessing import BOUND, Column, standards
from privkd.deployment.own_records import own_records
from privkd.deployment.owner import RecordsConfig
from privkd.deployment.published import PLAN_FILE, PublishedPlan
from privkd.errors import ConfigError, DataError, RunError
from privkd.export.formats import format_named
from privkd.plan import facts_of, make_plan

LABELS = np.arange(40) % 2
FINITE = st.floats(-1e6, 1e6, width=32)


def source_of(inputs: NDArray[Any], **more: Any) -> Any:
    return make_source("own", RawSet(inputs, np.arange(len(inputs)) % 2), **more)


def of(inputs: NDArray[Any], *, public: int | None = None, **settings: Any) -> Constants:
    """The constants where the first ``public`` records are."""
    source = source_of(inputs)
    return find_constants(source, np.arange(public or len(inputs)), DataConfig(source="own", **settings))


def mixed(records: int = 40, seed: int = 0) -> NDArray[np.float64]:
    """Columns in four units: kelvins, grammes, a flag, one that never varies."""
    rng = np.random.default_rng(seed)
    kelvin, grammes = rng.normal(290, 8, records), rng.lognormal(10, 1, records)
    return np.stack([kelvin, grammes, rng.integers(0, 2, records), np.full(records, 7.5)], axis=1)


@st.composite
def columns(draw: st.DrawFn) -> tuple[Column, ...]:
    scale = st.floats(2**-10, 2**20, width=32)
    pairs = draw(st.lists(st.tuples(FINITE, scale), min_size=1, max_size=5))
    return tuple(Column(name=f"c{n}", mean=mean, scale=scale) for n, (mean, scale) in enumerate(pairs))


class TestStandards:
    def test_are_public_means_and_deviations(self) -> None:
        values = mixed().astype(np.float32)
        kelvin, grammes, flag, constant = standards(["k", "g", "f", "c"], [values[:25], values[25:]])
        for column, name, own in ((kelvin, "k", values[:, 0]), (grammes, "g", values[:, 1])):
            assert column.name == name
            assert column.mean == pytest.approx(own.mean(dtype=np.float64), rel=1e-6)
            assert column.scale == pytest.approx(own.std(dtype=np.float64), rel=1e-6)
        assert flag.as_it_came
        assert (constant.mean, constant.scale) == (7.5, 1)

    @pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-45, 3e38, 16_777_217.0])
    def test_a_column_that_never_varies_keeps_its_unit(self, value: float) -> None:
        (column,) = standards(["c"], [np.full((9, 1), value, dtype=np.float32)])
        assert column.scale == 1

    @given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9))
    def test_are_what_a_plan_may_publish(self, values: list[float]) -> None:
        (column,) = standards(["c"], [np.array(values, dtype=np.float32)[:, None]])
        assert Column.model_validate(json.loads(column.model_dump_json())) == column
        made = Constants(1.0, None, None, "", (column,), BOUND).features(np.array(values)[:, None])
        assert bool((made.abs() <= BOUND).all())

    def test_of_many_columns_are_those_of_each(self) -> None:
        values = np.random.default_rng(0).normal(size=(11, 600)).astype(np.float32)
        names = [f"c{number}" for number in range(600)]
        alone = [standards([name], [values[:, [n]]])[0] for n, name in enumerate(names)]
        assert standards(names, [values]) == tuple(alone)


class TestWhatIsStandardised:
    @pytest.mark.parametrize(
        ("inputs", "setting", "done"),
        [
            (mixed(), "auto", True),
            (mixed(), "no", False),
            (np.arange(80).reshape(40, 2), "auto", False),
            (np.arange(80).reshape(40, 2), "yes", True),
            (np.arange(80, dtype=np.uint8).reshape(40, 2), "auto", False),
            (np.random.default_rng(0).integers(0, 2, (40, 9)).astype(float), "auto", False),
            (np.random.default_rng(0).random((40, 1, 3, 3)), "auto", False),
            (np.random.default_rng(0).random((40, 3, 3)), "auto", False),
        ],
        ids=["fractions", "not", "tokens", "whole", "bytes", "flags", "images", "sequences"],
    )
    def test_by_kind_and_setting(self, inputs: NDArray[Any], setting: Any, done: bool) -> None:
        constants = of(inputs, standardise=setting)
        assert bool(constants.columns) is done
        if not done and inputs.dtype != np.uint8:
            assert torch.equal(constants.features(inputs), torch.from_numpy(inputs).float())

    @pytest.mark.parametrize(
        ("inputs", "settings", "why"),
        [
            (np.zeros((4, 3, 3)), {}, "no table of numbers"),
            (np.zeros((4, 3), np.uint8), {}, "no table of numbers"),
            (np.zeros((4, 3), np.int64), {"scale": 3}, "data.scale divides them"),
        ],
    )
    def test_asked_of_anything_else_is_refused(
        self, inputs: NDArray[Any], settings: dict[str, Any], why: str
    ) -> None:
        with pytest.raises(ConfigError, match=why):
            of(inputs, standardise="yes", **settings)

    def test_of_the_embedded_digits_is_refused_and_not_done(self) -> None:
        with pytest.raises(ConfigError, match="standardise"):
            build_scenario(DataConfig(standardise="yes"), 0)
        assert build_scenario(DataConfig(), 0).constants.columns == ()

    @pytest.mark.parametrize("form", ["csv", "parquet"])
    def test_whole_numbers_of_a_table_are(self, tmp_path: Path, form: str) -> None:
        path = tmp_path / f"t.{form}"
        ages, incomes = np.arange(20, 60), 1000 * np.arange(40)
        if form == "csv":
            lines = [
                f"{age},{income},{n % 2}" for n, (age, income) in enumerate(zip(ages, incomes, strict=True))
            ]
            path.write_text("\n".join(["age,income,label", *lines]))
        else:
            pyarrow = pytest.importorskip("pyarrow")
            table = pyarrow.table({"age": ages, "income": incomes, "label": LABELS})
            pytest.importorskip("pyarrow.parquet").write_table(table, path)
        config = DataConfig(source=str(path))
        source = load(config)
        found = find_constants(source, np.arange(40), config)
        assert [column.name for column in found.columns] == ["age", "income"]
        inputs = found.features(source.records.inputs)
        assert torch.allclose(inputs.mean(0), torch.zeros(2), atol=1e-6)
        assert torch.allclose(inputs.std(0, correction=0), torch.ones(2), atol=1e-6)


class TestModule:
    @given(columns(), st.sampled_from([None, 1.0, 5.0]), st.data())
    def test_is_the_formula_of_each_column(
        self, given: tuple[Column, ...], bound: float | None, data: st.DataObject
    ) -> None:
        """The slow twin: one value after the other, in double precision."""
        row = st.lists(FINITE, min_size=len(given), max_size=len(given))
        raw = np.array(data.draw(st.lists(row, min_size=1, max_size=4)), dtype=np.float32)
        constants = Constants(1.0, None, None, "", given, bound)
        found = constants.features(raw)
        most = np.inf if bound is None else bound
        for record, values in zip(found, raw, strict=True):
            for value, number, column in zip(record.tolist(), values.tolist(), given, strict=True):
                exact = min(max((number - column.mean) / column.scale, -most), most)
                slack = 1e-6 * (abs(exact) + (abs(number) + abs(column.mean)) / column.scale) + 1e-37
                assert value == pytest.approx(exact, abs=slack)
        assert torch.equal(constants.module()(torch.from_numpy(raw)), found)

    @given(columns(), st.data())
    def test_undoes_its_inverse(self, given: tuple[Column, ...], data: st.DataObject) -> None:
        inputs = torch.tensor([data.draw(st.lists(st.floats(-5, 5, width=32), min_size=len(given),
                                                  max_size=len(given)))])  # fmt: skip
        constants = Constants(1.0, None, None, "", given, 5.0)
        again = constants.features(constants.raw(inputs).numpy())
        slack = torch.tensor([1e-6 * (5 + abs(column.mean) / column.scale) for column in given])
        assert bool(((again - inputs).abs() <= slack).all())

    @pytest.mark.parametrize(
        "constants",
        [
            AS_THEY_CAME,
            Constants(255.0, None, None, ""),
            Constants(1.0, 1.0, None, ""),
            Constants(255.0, None, 1, ""),
            Constants(65535.0, 65535.0, 3, ""),
        ],
    )
    def test_makes_features_of_more_records_than_a_block(self, constants: Constants) -> None:
        raw = np.random.default_rng(0).integers(0, 256, (1100, 3, 2, 2), dtype=np.uint8)
        whole = constants.features(raw)
        assert torch.equal(whole, torch.cat([constants.features(raw[[n]]) for n in range(len(raw))]))
        assert torch.equal(constants.features(raw[:0]), whole[:0])
        if constants.channels is None and constants.largest is None:
            assert torch.equal(whole, torch.from_numpy(raw).float() / constants.divisor)

    def test_says_what_it_does(self) -> None:
        assert of(mixed()).words == (
            "3 columns standardised to mean 0 and deviation 1, clipped at 5 deviations; "
            "1 as they are, 0/1 flags"
        )


class TestAScenario:
    def test_one_private_outlier_stays_its_own(self) -> None:
        """It is clipped where everybody can know it, and moves neither the public nor another record."""
        sizes = {"public_records": 20, "validation_records": 10, "proxy_records": 20, "test_records": 20}
        config = DataConfig(source="own", devices=2, records_per_device=20, gap="none", **sizes)
        values = mixed(200)
        place = split_indices(np.arange(200) % 2, config, 0, classes=2).device_train[0][3]
        before = scenario_from(source_of(values), config, 0)
        values[place] = [1e30, -1e30, 9, -8]
        after = scenario_from(source_of(values), config, 0)
        assert after.constants == before.constants
        for name in ("public", "validation", "test"):
            assert torch.equal(getattr(after, name).inputs, getattr(before, name).inputs)
        one, other = after.devices[0].train.inputs, before.devices[0].train.inputs
        assert one[3].tolist() == [BOUND, -BOUND, BOUND, -BOUND]
        assert torch.equal(one[torch.arange(len(one)) != 3], other[torch.arange(len(other)) != 3])

    def test_a_test_split_that_came_with_the_data_is_public(self) -> None:
        values = mixed()
        source = source_of(values[:20], test=RawSet(values[20:], LABELS[20:]))
        found = find_constants(source, np.arange(5), DataConfig(source="own"))
        public = np.concatenate([values[:5], values[20:]]).astype(np.float32)
        assert found.columns == standards([f"feature {number}" for number in range(1, 5)], [public])


def table(path: Path, records: int = 400, *, header: str = "kelvin,grammes,wet,label") -> Path:
    rows = mixed(records, seed=1)[:, :3]
    lines = [f"{k},{g},{f:g},{n % 3}" for n, (k, g, f) in enumerate(rows.tolist())]
    path.write_text("\n".join([header, *lines]))
    return path


class TestExported:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("table")
        play(path / "run", f"data.source={table(path / 't.csv')}", "rounds=1")
        return path / "run"

    @pytest.mark.parametrize("form", ["torch", "onnx"])
    def test_takes_raw_units(self, run: Path, tmp_path: Path, form: str) -> None:
        """The file answers records of the table as the student answers its inputs."""
        if form == "onnx":
            pytest.importorskip("onnxruntime")
        from privkd.export.export import export_student
        from privkd.prepared import HELD_BY_DEVICES, finished, reopen_simulation
        from privkd.progress import Silent
        from privkd.runs.folder import RunFolder

        out = tmp_path / {"torch": "s.pt2", "onnx": "s.onnx"}[form]
        with RunFolder.resume(run) as folder:
            exported = export_student(folder, form, 0, out)
            prepared = reopen_simulation(folder, HELD_BY_DEVICES)
            student = prepared.personalised(finished(prepared, folder), [0], Silent())[0]
        raw = load(DataConfig(source=str(run.parent / "t.csv"))).records.inputs[:50]
        with torch.no_grad():
            ours = student(prepared.scenario.constants.features(raw))
            theirs = format_named(form).load(out)(torch.from_numpy(raw))
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
            assert not torch.allclose(student(torch.from_numpy(raw)), ours, atol=0.1), "scaling matters"
        assert [column["name"] for column in exported.columns] == ["kelvin", "grammes", "wet"]
        assert exported.preprocessing.startswith("2 columns standardised")
        assert exported.input_shape == (3,)

    def test_is_kept_with_its_columns(self, run: Path) -> None:
        answer = CliRunner().invoke(app, ["export", str(run)])
        assert answer.exit_code == 0, answer.output
        assert "2 columns standardised" in " ".join(answer.stdout.split())
        kept = json.loads((run / "export" / "device-0000-torch.json").read_text())
        assert kept["columns"][2] == {
            "name": "wet",
            "mean": 0.0,
            "scale": 1.0,
            "fill": None,
            "vocabulary": [],
        }

    def test_of_a_run_that_knew_a_divisor_is_read_still(self) -> None:
        from privkd.export.record import Artefact

        old = {"format": "torch", "file": "s.pt2", "size_bytes": 1, "parameters": 1, "input_shape": [1],
               "divisor": 255.0, "classes": 2, "check": {"records": 1, "difference": 0.0}, "latency_ms": 1.0,
               "original_ms": 1.0}  # fmt: skip
        assert Artefact.model_validate(old).preprocessing == "divided by 255.0"


class TestPublished:
    @pytest.fixture
    def plan(self, tmp_path: Path) -> PublishedPlan:
        source = str(table(tmp_path / "cloud.csv"))
        config = Config(data={"source": source, "records_per_device": 20, "device_test_records": 4})
        scenario = build_scenario(config.data, 0)
        names = tuple(f"device-{number}" for number in range(5))
        plan = PublishedPlan.of(config, scenario, make_plan(config, facts_of(scenario)), names, 1.0)
        (tmp_path / "plan").mkdir()
        plan.write(tmp_path / "plan", scenario.proxy)
        assert plan.constants.columns == scenario.constants.columns
        return plan

    def test_devices_apply_its_values_and_not_their_own(self, plan: PublishedPlan, tmp_path: Path) -> None:
        again, _ = PublishedPlan.load(tmp_path / "plan")
        path = table(tmp_path / "own.csv", 9)
        found = own_records(RecordsConfig(source=str(path)), again)
        raw = load(DataConfig(source=str(path), classes=plan.classes)).records.inputs
        assert torch.equal(found.inputs, plan.constants.features(raw))
        assert float(found.inputs[:, 0].mean().abs()) > 1e-3, "they are not their own mean"

    def test_a_table_of_other_columns_is_refused(self, plan: PublishedPlan, tmp_path: Path) -> None:
        path = table(tmp_path / "own.csv", 9, header="grammes,kelvin,wet,label")
        with pytest.raises(DataError, match="'grammes' stands where the plan has 'kelvin'"):
            own_records(RecordsConfig(source=str(path)), plan)

    def test_another_width_is_refused(self, plan: PublishedPlan, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"records of shape \[2\], but the plan is about 3 columns"):
            own_records(RecordsConfig(source=str(table(tmp_path / "own.csv", 9)), drop=("wet",)), plan)

    @pytest.mark.parametrize(
        "change",
        [
            {"scale": 0.0},
            {"scale": -1.0},
            {"scale": 1e-60},
            {"scale": "inf"},
            {"scale": None},
            {"mean": "nan"},
            {"mean": 1e300},
            {"mean": True},
            {"sneaked": 1},
        ],
        ids=str,
    )
    def test_absurd_values_are_refused(
        self, plan: PublishedPlan, tmp_path: Path, change: dict[str, Any]
    ) -> None:
        tree = plan.tree()
        tree["scale"]["columns"][1] |= change
        (tmp_path / "plan" / PLAN_FILE).write_text(json.dumps(tree, sort_keys=True, separators=(",", ":")))
        with pytest.raises(RunError, match=r"scale\.columns\.1"):
            PublishedPlan.load(tmp_path / "plan")

    @pytest.mark.parametrize("length", [1, 2, 4])
    def test_a_wrong_number_of_columns_is_refused(
        self, plan: PublishedPlan, tmp_path: Path, length: int
    ) -> None:
        tree = plan.tree()
        tree["scale"]["columns"] = (tree["scale"]["columns"] * 2)[:length]
        (tmp_path / "plan" / PLAN_FILE).write_text(json.dumps(tree, sort_keys=True, separators=(",", ":")))
        with pytest.raises(RunError, match=f"{length} columns do not make inputs of shape"):
            PublishedPlan.load(tmp_path / "plan")


def test_a_dry_run_says_it(tmp_path: Path) -> None:
    words = [word for override in SMALL for word in ("--set", override)]
    options = ["train", *words, "--data", str(table(tmp_path / "t.csv")), "--dry-run"]
    said = "data, scale: 2 columns standardised to mean 0 and deviation 1, clipped at 5 deviations; 1 as"
    assert said in CliRunner().invoke(app, options).stdout
    plain = CliRunner().invoke(app, [*options, "--set", "data.standardise=no"]).stdout
    assert "data, scale: as they are" in plain
