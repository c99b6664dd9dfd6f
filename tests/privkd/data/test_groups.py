"""Records that belong to somebody: whole groups are public or on one device, and the group is no feature."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from privkd.config import DataConfig
from privkd.data import build_scenario, load, split_indices
from privkd.data.partition import natural
from privkd.errors import ConfigError, DataError

WRITERS, EACH = 40, 30


def records() -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.str_]]:
    """Each writer's own number is the first feature, so that a test can tell whose a record is."""
    rng = np.random.default_rng(0)
    writers = np.repeat(np.arange(WRITERS), EACH)
    labels = rng.integers(0, 3, len(writers))
    inputs = np.stack([writers + 0.5, rng.normal(labels, 1.0)], axis=1)
    order = rng.permutation(len(writers))
    return inputs[order], labels[order], np.array([f"w{writer}" for writer in writers[order]])


def write(folder: Path, form: str) -> Path:
    inputs, labels, writers = records()
    path = folder / f"t.{form}"
    if form == "npz":
        np.savez(path, x=inputs, y=labels, writer_id=writers)
        return path
    rows = [[w, *map(repr, x.tolist()), k] for w, x, k in zip(writers, inputs, labels, strict=True)]
    if form == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["writer_id", "a", "b", "label"], *rows])
        return path
    pyarrow = pytest.importorskip("pyarrow")
    columns = {"writer_id": writers.tolist(), "a": inputs[:, 0], "b": inputs[:, 1], "label": labels}
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)
    return path


def own_function() -> tuple[Any, Any, Any]:
    return records()


def settings(source: str, **more: Any) -> DataConfig:
    return DataConfig(source=source, group="writer_id", devices=6, **more)


@pytest.mark.parametrize("form", ["csv", "npz", "parquet"])
def test_each_writer_has_one_place(tmp_path: Path, form: str) -> None:
    scenario = build_scenario(settings(str(write(tmp_path, form))), 0)
    assert scenario.input_shape == (2,)
    places = [scenario.public.inputs, scenario.validation.inputs, scenario.proxy, scenario.test.inputs]
    shown = {float(writer) for inputs in places for writer in inputs[:, 0]}
    held = [
        {float(writer) for records in (device.train, device.test) for writer in records.inputs[:, 0]}
        for device in scenario.devices
    ]
    assert all(held)
    assert sum(map(len, held)) == len(set.union(*held))
    assert not shown & set.union(*held)
    assert max(map(len, held)) - min(map(len, held)) <= 1


def test_all_readers_give_one_split(tmp_path: Path) -> None:
    groups = [load(settings(str(write(tmp_path, form)))).records.groups for form in ("csv", "npz", "parquet")]
    assert all(np.array_equal(group, groups[0]) for group in groups)
    assert load(settings(f"{__name__}:own_function")).records.groups is not None


def test_it_is_said_and_is_no_feature(tmp_path: Path) -> None:
    source = load(settings(str(write(tmp_path, "csv"))))
    assert source.taken["group"] == "'writer_id', as set"
    assert source.taken["features"] == "2 columns"
    assert "left out" not in source.taken


def test_no_partition_divides_a_group() -> None:
    with pytest.raises(ValidationError, match="stay together"):
        DataConfig(group="writer_id", partition="dirichlet")


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"group": "nobody"}, ConfigError, "no such column"),
        ({"group": "label", "label": "label"}, ConfigError, "it is data.group"),
        ({"drop": ("writer_id",)}, ConfigError, "data.drop leaves it out"),
        ({"devices": 39}, DataError, "40 groups of 'writer_id'"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, more: dict[str, Any], error: Any, said: str) -> None:
    tree = {"source": str(write(tmp_path, "csv")), "group": "writer_id", "devices": 6} | more
    with pytest.raises(error, match=said):
        build_scenario(DataConfig(**tree), 0)


def test_a_missing_group_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("writer_id,a,label\nw1,0.5,0\n,0.7,1\n")
    with pytest.raises(DataError, match="record 1 has no group"):
        load(settings(str(path)))


def test_a_source_without_columns_has_no_groups() -> None:
    with pytest.raises(ConfigError, match=r"data\.group"):
        load(DataConfig(group="writer_id"))


def test_a_group_more_moves_nobody_public() -> None:
    """Which groups are public depends on their names and on the public ones' own records alone."""
    _, labels, writers = records()
    config = settings("t.csv", public_records=60, validation_records=30, proxy_records=60, test_records=60)
    small = split_indices(labels, config, 0, classes=3, groups=writers)
    more = np.concatenate([labels, np.zeros(30, np.int64)]), np.concatenate([writers, ["new"] * 30])
    large = split_indices(more[0], config, 0, classes=3, groups=more[1])
    if "new" not in more[1][large.shown]:
        assert np.array_equal(small.shown, large.shown)


def test_groups_are_dealt_in_turn() -> None:
    groups = np.array([f"g{number % 7}" for number in range(70)])
    shards = natural(np.arange(70), groups, 3, np.random.default_rng(0))
    assert sorted(len(set(groups[shard])) for shard in shards) == [2, 2, 3]
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(70))
    with pytest.raises(ValueError, match="7 groups for 8 devices"):
        natural(np.arange(70), groups, 8, np.random.default_rng(0))
