"""Public records, proxy inputs and a test set of the user's own, in place of parts of the data."""

import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from running import play
from typer.testing import CliRunner

from cli import app
from privkd.config import Config, DataConfig, load_config
from privkd.data import Scenario, build_scenario
from privkd.data.scenario import public_scenario
from privkd.data.sources import data_files, located
from privkd.deployment.published import PublishedPlan
from privkd.errors import ConfigError, DataError, InputError, RunError
from privkd.prepared import prepare, reopen
from privkd.runs.folder import RunFolder

RNG = np.random.default_rng(0)
NAMES = ("a", "b", "outcome")


def table(
    path: Path, records: int, *, names: tuple[str, ...] = NAMES, first: int = 0, separator: str = ","
) -> str:
    """A CSV file whose ``a`` tells each record apart, from ``first`` on."""
    columns: dict[str, list[Any]] = {
        "a": [first + number for number in range(records)],
        "b": [number % 2 / 2 for number in range(records)],
        "outcome": ["yes" if number % 3 else "no" for number in range(records)],
        "who": [f"w{number % 9}" for number in range(records)],
        "note": list(range(records)),
    }
    rows = [names, *zip(*(columns[name] for name in names), strict=True)]
    path.write_text("".join(separator.join(map(str, row)) + "\n" for row in rows))
    return str(path)


def settings(folder: Path, **more: Any) -> DataConfig:
    """90 private records from 0 on, 60 public ones from 1000, 20 proxies from 2000, 30 tests from 3000."""
    given = {
        "source": table(folder / "own.csv", 90),
        "public": table(folder / "public.csv", 60, names=("outcome", "b", "a"), first=1000),
        "proxy": table(folder / "proxy.csv", 20, names=("b", "a"), first=2000),
        "test": table(folder / "test.csv", 30, names=("a", "outcome", "b"), first=3000),
        "label": "outcome",
        "devices": 3,
        "device_test_records": 0,
    }
    return DataConfig(**{name: value for name, value in (given | more).items() if value is not None})


def firsts(inputs: Any) -> list[int]:
    """The values of ``a`` of raw inputs, sorted: who is there."""
    return sorted(inputs.reshape(len(inputs), -1)[:, 0].round().int().tolist())


@pytest.fixture
def raw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features stay as they came."""
    from privkd.data import scenario
    from privkd.data.constants import AS_THEY_CAME

    monkeypatch.setattr(scenario, "find_constants", lambda *_: AS_THEY_CAME)


@pytest.mark.usefixtures("raw")
class TestRoles:
    def test_each_file_plays_its_own(self, tmp_path: Path) -> None:
        found = build_scenario(settings(tmp_path), 0)
        held = [record for device in found.devices for record in firsts(device.train.inputs)]
        assert sorted(held) == list(range(90))
        shown = firsts(found.public.inputs) + firsts(found.validation.inputs)
        assert sorted(shown) == list(range(1000, 1060))
        assert len(found.validation) == 6
        assert found.proxy.tolist() == [[2000 + number, number % 2 / 2] for number in range(20)]
        assert found.test.inputs.tolist() == [[3000 + number, number % 2 / 2] for number in range(30)]
        assert found.test.labels.tolist() == [int(number % 3 > 0) for number in range(30)]
        assert found.labels == ("no", "yes")
        assert found.inferred == ("records per device",)
        assert found.gap_classes == ()

    def test_what_is_not_given_is_drawn_from_the_public_file(self, tmp_path: Path) -> None:
        found = build_scenario(settings(tmp_path, proxy=None, test=None), 0)
        sets = (found.public.inputs, found.validation.inputs, found.proxy, found.test.inputs)
        assert sorted(itertools.chain(*map(firsts, sets))) == list(range(1000, 1060))
        assert [len(each) for each in sets] == [30, 6, 12, 12]
        assert found.taken["test split"] == "drawn from 'public.csv'"

    def test_proxy_and_test_alone_leave_their_records_to_devices(self, tmp_path: Path) -> None:
        found = build_scenario(settings(tmp_path, public=None, gap="none"), 0)
        assert firsts(found.proxy) == list(range(2000, 2020))
        assert firsts(found.test.inputs) == list(range(3000, 3030))
        shown = firsts(found.public.inputs) + firsts(found.validation.inputs)
        held = [record for device in found.devices for record in firsts(device.train.inputs)]
        assert len(shown) == 13
        assert len(held) == 75  # of 77, three shards of one size
        assert set(held) <= set(range(90)) - set(shown)
        assert found.inferred == ("classes", "records per device", "public records", "validation records")

    def test_a_split_that_the_public_file_brings_is_the_test(self, tmp_path: Path) -> None:
        x, y = np.arange(60.0)[:, None] + 1000, np.arange(60) % 2
        arrays = {"x_train": x[:40], "y_train": y[:40], "x_test": x[40:], "y_test": y[40:]}
        np.savez(tmp_path / "public.npz", **arrays)
        np.savez(tmp_path / "own.npz", x=np.arange(90.0)[:, None], y=np.arange(90) % 2)
        config = DataConfig(source=str(tmp_path / "own.npz"), public=str(tmp_path / "public.npz"), devices=2)
        found = build_scenario(config, 0)
        assert firsts(found.test.inputs) == list(range(1040, 1060))
        assert found.taken["test split"] == "that of 'public.npz', arrays 'x_test' and 'y_test'"

    def test_natural_partition_of_the_private_file_alone(self, tmp_path: Path) -> None:
        own = table(tmp_path / "grouped.csv", 90, names=("who", "note", *NAMES))
        with_note = table(tmp_path / "with.csv", 60, names=("note", *NAMES), first=1000)
        config = settings(
            tmp_path, source=own, public=with_note, group="who", drop=("note",), records_per_device=20
        )
        found = build_scenario(config, 0)
        for device in found.devices:
            whose = Counter(record % 9 for record in firsts(device.train.inputs))
            assert set(whose.values()) == {10}
        assert found.input_shape == (2,)

    def test_no_private_record_moves_a_public_one(self, tmp_path: Path) -> None:
        def shown(found: Scenario) -> list[Any]:
            sets = (found.public, found.validation, found.test)
            return [each.inputs.tolist() for each in sets] + [found.proxy.tolist()]

        first = build_scenario(settings(tmp_path, proxy=None), 0)
        table(tmp_path / "other.csv", 70, first=500)
        config = settings(tmp_path, source=str(tmp_path / "other.csv"), proxy=None)
        assert shown(build_scenario(config, 0)) == shown(first)


class TestConstants:
    def images(self, path: Path, most: int, *, labels: int = 2) -> str:
        images = RNG.integers(0, most, (60, 1, 4, 4), dtype=np.int64)
        np.savez(path, x=images, y=np.arange(60) % labels)
        return str(path)

    def test_come_from_the_public_file(self, tmp_path: Path) -> None:
        own, public = self.images(tmp_path / "own.npz", 60_000), self.images(tmp_path / "public.npz", 256)
        found = build_scenario(DataConfig(source=own, public=public, devices=2), 0)
        assert found.constants.divisor == 255
        assert float(found.devices[0].train.inputs.max()) == 1.0

    def test_classes_are_those_of_the_public_file(self, tmp_path: Path) -> None:
        own = self.images(tmp_path / "own.npz", 256, labels=3)
        public = self.images(tmp_path / "public.npz", 256)
        found = build_scenario(DataConfig(source=own, public=public, devices=2), 0)
        assert found.labels == ("0", "1")
        assert sum(len(device.train) + len(device.test) for device in found.devices) == 40
        all_three = DataConfig(source=own, public=public, devices=2, classes=("0", "1", "2"))
        found = build_scenario(all_three, 0)
        assert found.gap_classes == (2,)
        assert sum(len(device.train) + len(device.test) for device in found.devices) == 60

    def test_labels_of_which_the_public_file_has_none(self, tmp_path: Path) -> None:
        own, public = self.images(tmp_path / "own.npz", 9), tmp_path / "public.npz"
        np.savez(public, x=np.zeros((60, 1, 4, 4), np.int64), y=np.array(["a", "b"] * 30))
        with pytest.raises(DataError, match=r"no label is one of the 2 classes of .*public\.npz"):
            build_scenario(DataConfig(source=own, public=str(public), devices=2), 0)

    def test_a_strange_label_in_the_test_file_is_named(self, tmp_path: Path) -> None:
        own, test = self.images(tmp_path / "own.npz", 9), self.images(tmp_path / "test.npz", 9, labels=3)
        with pytest.raises(DataError, match=r"test\.npz: label '2' does not occur"):
            build_scenario(DataConfig(source=own, test=test, devices=2, gap="none", device_test_records=5), 0)


class TestAlike:
    def refused(self, folder: Path, *words: str, **more: Any) -> None:
        with pytest.raises(InputError) as caught:
            build_scenario(settings(folder, **more), 0)
        assert "\n" not in str(caught.value)
        for word in words:
            assert word in str(caught.value)

    def test_columns_that_lack_are_named(self, tmp_path: Path) -> None:
        for role in ("public", "proxy", "test"):
            path = table(tmp_path / "few.csv", 60, names=("a", "outcome"))
            self.refused(tmp_path, "few.csv", "lacks 'b'", **{role: path})

    def test_columns_too_many_are_named(self, tmp_path: Path) -> None:
        path = table(tmp_path / "many.csv", 60, names=("note", *NAMES))
        self.refused(tmp_path, "many.csv", "'note'", proxy=path)

    def test_a_label_that_lacks_is_named(self, tmp_path: Path) -> None:
        path = table(tmp_path / "bare.csv", 60, names=("a", "b"))
        self.refused(tmp_path, "no columns are called 'outcome'", public=path)

    def test_a_table_beside_arrays(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=np.zeros((60, 2)), outcome=np.array(["yes", "no"] * 30))
        self.refused(tmp_path, "write both as tables", public=str(tmp_path / "a.npz"))

    def test_another_shape_type_or_kind(self, tmp_path: Path) -> None:
        x, y = RNG.integers(0, 255, (60, 4, 4), dtype=np.uint8), np.arange(60) % 2
        np.savez(tmp_path / "own.npz", x=x, y=y)
        own = {"source": str(tmp_path / "own.npz"), "label": None, "proxy": None, "test": None}
        folder = tmp_path / "images" / "0"
        folder.mkdir(parents=True)
        Image.fromarray(x[0]).save(folder / "a.png")
        for other, words in ((x[:, :3], "do not match"), (x / 255, "bytes (uint8)")):
            np.savez(tmp_path / "b.npz", x=other, y=y)
            self.refused(tmp_path, "data.public", words, public=str(tmp_path / "b.npz"), **own)
        self.refused(tmp_path, "image files", public=str(tmp_path / "images"), **own)
        np.savez(tmp_path / "own.npz", x=x[:, None].astype(np.int64), y=y)
        np.savez(tmp_path / "b.npz", x=x[:, None] / 255, y=y)
        self.refused(tmp_path, "whole numbers here", public=str(tmp_path / "b.npz"), **own)

    def test_splits_where_one_is_asked_for(self, tmp_path: Path) -> None:
        x, y = RNG.random((60, 4)), np.arange(60) % 2
        np.savez(tmp_path / "own.npz", x=x, y=y)
        np.savez(tmp_path / "both.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        own = {"source": str(tmp_path / "own.npz"), "label": None, "public": None}
        both = str(tmp_path / "both.npz")
        self.refused(tmp_path, "holds splits", proxy=None, test=both, **own)

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            ({"public_records": 9}, "data.public_records=9: data.public='a.csv' is taken whole"),
            ({"proxy_records": 9}, "proxy_records=9"),
            ({"test_records": 9}, "test_records=9"),
            ({"gap": "withheld"}, "gap='withheld'"),
        ],
    )
    def test_sizes_and_gaps_that_contradict(self, more: dict[str, Any], words: str) -> None:
        beside = {"public": "a.csv", "proxy": "b.csv", "test": "c.csv"}
        with pytest.raises(ConfigError) as caught:
            Config(data={"source": "own.csv", **beside, **more})
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_too_little_to_learn_from(self, tmp_path: Path) -> None:
        path = table(tmp_path / "short.csv", 3)
        self.refused(
            tmp_path, "short.csv: 3 records", "leave none", public=path, proxy=None, validation_records=2
        )


class TestForms:
    """Whatever format the data have, files beside them may have."""

    def test_images(self, tmp_path: Path) -> None:
        for name, count in (("own", 40), ("public", 30), ("test", 6)):
            for number in range(count):
                folder = tmp_path / name / ("cat" if number % 2 else "dog")
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(RNG.integers(0, 255, (6, 5), dtype=np.uint8)).save(folder / f"{number}.png")
        (tmp_path / "proxy" / "deeper").mkdir(parents=True)
        for name in ("a.png", "deeper/b.png"):
            pixels = RNG.integers(0, 255, (6, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "proxy" / name)
        beside = {role: str(tmp_path / role) for role in ("public", "proxy", "test")}
        found = build_scenario(
            DataConfig(source=str(tmp_path / "own"), devices=2, device_test_records=5, **beside), 0
        )
        assert found.proxy.shape == (2, 1, 6, 5)
        assert (len(found.public), len(found.validation), len(found.test)) == (27, 3, 6)
        assert sum(len(device.train) + len(device.test) for device in found.devices) == 40
        assert found.labels == ("cat", "dog")

    def test_functions(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "own_roles.py").write_text(
            "import numpy as np\n"
            "def rows(first, n): return np.arange(first, first + n, dtype=float)[:, None]\n"
            "def data(): return rows(0, 60), np.arange(60) % 2\n"
            "def public(): return rows(1000, 60), np.arange(60) % 2\n"
            "def proxy(): return rows(2000, 9)\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        config = DataConfig(
            source="own_roles:data", public="own_roles:public", proxy="own_roles:proxy", devices=2
        )
        found = build_scenario(config, 0)
        assert len(found.proxy) == 9
        assert len(found.public) + len(found.validation) + len(found.test) == 60
        sys.modules.pop("own_roles")

    def test_parquet(self, tmp_path: Path) -> None:
        pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

        def write(name: str, **columns: Any) -> str:
            writer.write_table(pyarrow.table(columns), tmp_path / name)
            return str(tmp_path / name)

        a, b, y = np.arange(60.0), np.arange(60.0) * 2, ["u", "v"] * 30
        config = DataConfig(
            source=write("own.parquet", a=a, b=b, y=y),
            public=write("public.parquet", b=b, y=y, a=a),
            proxy=write("proxy.parquet", b=b[:5] + 1, a=a[:5]),
            devices=2,
        )
        found = build_scenario(config, 0)
        by_a = found.constants.features(np.stack([a[:5], b[:5] + 1], axis=1))
        assert found.proxy.tolist() == by_a.tolist()
        with pytest.raises(DataError, match=r"lacks 'a'"):
            build_scenario(config.model_copy(update={"proxy": write("c.parquet", b=b[:5])}), 0)


class TestPublicCloud:
    def test_the_public_roles_without_the_private_file(self, tmp_path: Path) -> None:
        config = settings(tmp_path, records_per_device=30)
        whole = build_scenario(config, 3)
        (tmp_path / "own.csv").unlink()
        alone = public_scenario(config, 3)
        assert alone.devices == ()
        for name in ("public", "validation", "test"):
            mine, theirs = getattr(alone, name), getattr(whole, name)
            assert mine.inputs.equal(theirs.inputs) or mine.inputs.flip(1).equal(theirs.inputs)
            assert mine.labels.equal(theirs.labels)
        assert alone.labels == whole.labels

    def test_needs_the_size_of_a_shard(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="records_per_device is not set"):
            public_scenario(settings(tmp_path), 3)


class TestBinding:
    SETTINGS = (
        "rounds=1", "data.label=outcome", "data.proxy_records=10", "data.device_test_records=0",
        "data.records_per_device=20",
    )  # fmt: skip

    def test_a_file_that_changed_is_named(self, tmp_path: Path) -> None:
        own, public = table(tmp_path / "own.csv", 90), table(tmp_path / "public.csv", 60)
        play(tmp_path / "run", f"data.source={own}", f"data.public={public}", *self.SETTINGS)
        table(tmp_path / "public.csv", 59)
        with (
            RunFolder.resume(tmp_path / "run") as folder,
            pytest.raises(RunError, match=r"data\.public/public\.csv was changed"),
        ):
            reopen(folder)

    def test_paths_hold_from_anywhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = settings(tmp_path)
        monkeypatch.chdir(tmp_path)
        relative = {name: Path(path).name for name, path in config.own_files.items()}
        found = located(Config(data=config.model_copy(update=relative)))
        assert found.data.own_files == config.own_files
        assert sorted(data_files(found.data)) == [
            "data.proxy/proxy.csv", "data.public/public.csv", "data.test/test.csv", "own.csv",
        ]  # fmt: skip

    def test_is_said_before_and_after(self, tmp_path: Path) -> None:
        config = settings(tmp_path)
        options = ["train", "--data", config.source, "--label", "outcome", "--devices", "3", "--dry-run"]
        for role, path in config.own_files.items():
            options += [f"--{role}", path]
        more = ["--set", "data.device_test_records=0", "--classes", "no,yes", "--json"]
        answer = CliRunner().invoke(app, options + more)
        assert answer.exit_code == 0, answer.output
        taken = json.loads(answer.stdout)["plan"]["taken"]
        assert taken["public records"] == "all of 'public.csv'"
        assert taken["proxy inputs"] == "those of 'proxy.csv'"
        assert taken["test split"] == "'test.csv'"
        assert "gap" not in taken


def test_a_public_file_alone_may_have_the_default_gap_written_down(tmp_path: Path) -> None:
    """A run keeps every setting, the default ones too, and is read again from them."""
    config = load_config(None, (), {"public": "p.csv", "data": "own.csv", "data.gap": "rare"})
    assert config.data.simulated_gap == "none"


def test_a_cloud_s_plan_is_made_of_them_alone(tmp_path: Path) -> None:
    """What devices are told follows from the public files, and names none of them."""
    data = settings(tmp_path, records_per_device=30)
    (tmp_path / "own.csv").unlink()
    config = Config(data=data, student={"models": ["mlp"]}, privacy={"noise": "system"})
    found = prepare(config, public=True)
    published = PublishedPlan.of(config, found.scenario, found.plan, ["a", "b"], 10.0)
    assert published.classes == ("no", "yes")
    assert published.input_shape == (2,)
    assert published.queries == 20
    assert "csv" not in json.dumps(published.tree())


def test_text_columns_are_told_by_their_names_too(tmp_path: Path) -> None:
    """The same records in another order of columns give the same inputs, by the public file's vocabulary."""
    rows = [(f"{number}", ("red", "blue", "green")[number % 3], "uv"[number % 2]) for number in range(60)]

    def write(name: str, order: tuple[int, ...]) -> str:
        lines = [[("size", "colour", "label")[place] for place in order]]
        lines += [[row[place] for place in order] for row in rows]
        (tmp_path / name).write_text("".join(",".join(line) + "\n" for line in lines))
        return str(tmp_path / name)

    own, public = write("own.csv", (0, 1, 2)), write("public.csv", (2, 1, 0))
    config = DataConfig(source=own, public=public, devices=2, device_test_records=0)
    straight = build_scenario(config.model_copy(update={"proxy": write("a.csv", (0, 1))}), 0)
    turned = build_scenario(config.model_copy(update={"proxy": write("b.csv", (1, 0))}), 0)
    assert straight.proxy.tolist() == turned.proxy.tolist()
    assert len(straight.proxy.unique(dim=0)) == 60
    held = [tuple(row) for device in turned.devices for row in device.train.inputs.tolist()]
    assert sorted(held) == sorted(map(tuple, turned.proxy.tolist()))
