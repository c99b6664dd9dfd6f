"""Folders that ``datasets`` saved to disk: names of classes, images, splits, and damage in one line."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reading import read

from privkd.config import DataConfig
from privkd.data import build_scenario, load
from privkd.errors import ConfigError, DataError

os.environ.setdefault("HF_HUB_OFFLINE", "1")
library = pytest.importorskip("datasets")
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 255, (60, 6, 5), dtype=np.uint8)


def picture(pixels: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def images(count: int = 60, first: int = 0, label: str = "label") -> Any:
    features = library.Features(
        {
            "image": library.Image(),
            label: library.ClassLabel(names=["dog", "cat"]),
            "id": library.Value("int64"),
        }
    )
    numbers = range(first, first + count)
    columns = {
        "image": [picture(PIXELS[number % 60]) for number in numbers],
        label: [number % 2 for number in numbers],
        "id": list(numbers),
    }
    return library.Dataset.from_dict(columns, features=features)


def saved(folder: Path, data: Any, **more: Any) -> str:
    data.save_to_disk(str(folder), **more)
    return str(folder)


class TestRead:
    def test_one_set_in_shards(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "a", images(), num_shards=3)
        found = load(DataConfig(source=path))
        assert found.records.inputs[:, 0].tolist() == PIXELS.tolist()
        assert found.records.labels[:3].tolist() == ["dog", "cat", "dog"]
        assert found.classes == ("dog", "cat")
        assert found.taken["image"] == "column 'image'"
        assert found.taken["left out"] == "'id'"
        assert read(path).labels[:3].tolist() == [0, 1, 0]

    def test_splits(self, tmp_path: Path) -> None:
        splits = {"train": images(40), "test": images(10, 40), "validation": images(10, 50)}
        found = load(DataConfig(source=saved(tmp_path / "a", library.DatasetDict(splits))))
        assert len(found.records.labels) == 40
        assert found.test is not None
        assert found.test.labels.tolist() == ["dog", "cat"] * 5
        assert found.taken["test split"] == "split 'test'"
        assert found.taken["splits left out"] == "'validation'"

    def test_splits_of_which_none_is_to_train_on(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "a", library.DatasetDict(dict.fromkeys(("day", "night"), images(4))))
        with pytest.raises(DataError, match="'day', 'night', and none is 'train'"):
            load(DataConfig(source=path))
        assert len(load(DataConfig(source=f"{path}/night")).records.labels) == 4

    def test_the_only_column_of_class_labels(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "a", images(6, label="animal"))
        found = load(DataConfig(source=path))
        assert found.taken["label"] == "'animal', the only column of class labels"
        assert found.records.labels.tolist() == ["dog", "cat"] * 3

    def test_two_columns_of_class_labels_are_asked_about(self, tmp_path: Path) -> None:
        kinds = library.ClassLabel(names=["u", "v"])
        features = library.Features({"a": library.Value("float64"), "fine": kinds, "coarse": kinds})
        columns = {"a": [0.0, 1.0, 2.0], "fine": [0, 1, 0], "coarse": [1, 1, 0]}
        path = saved(tmp_path / "a", library.Dataset.from_dict(columns, features=features))
        with pytest.raises(DataError, match="--label"):
            load(DataConfig(source=path))
        found = load(DataConfig(source=path, label="coarse"))
        assert found.records.labels.tolist() == ["v", "v", "u"]
        assert found.columns == ("a", "fine")
        with pytest.raises(ConfigError, match="no such column"):
            load(DataConfig(source=path, label="x"))

    def test_a_label_that_the_hub_left_out(self, tmp_path: Path) -> None:
        data = images(6).map(lambda row: {"label": -1 if row["id"] == 4 else row["label"]})
        with pytest.raises(DataError, match="label -1 of record 4"):
            load(DataConfig(source=saved(tmp_path / "a", data)))

    def test_beside_the_data(self, tmp_path: Path) -> None:
        own, public = saved(tmp_path / "own", images()), saved(tmp_path / "public", images(30))
        config = DataConfig(source=own, public=public, devices=2, device_test_records=2)
        found = build_scenario(config, 0)
        assert found.labels == ("dog", "cat")
        assert sum(len(device.train) + len(device.test) for device in found.devices) >= 58


class TestDamage:
    @pytest.fixture
    def whole(self, tmp_path: Path) -> Path:
        splits = library.DatasetDict({"train": images(6), "test": images(4)})
        return Path(saved(tmp_path / "a", splits))

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("dataset_dict.json", "{}", "names no splits"),
            ("dataset_dict.json", '{"splits": ["train", "../../x"]}', "names no splits"),
            ("dataset_dict.json", '{"splits": ["train", "dev"]}', "'dev' is not there"),
            ("train/state.json", "[]", "describes no data"),
            ("train/state.json", "{}", "names no Arrow files"),
            ("train/state.json", '{"_data_files": [{"filename": "/etc/passwd"}]}', "names no Arrow files"),
            ("train/state.json", '{"_data_files": [{"filename": "b.arrow"}]}', "b.arrow is missing"),
            ("train/dataset_info.json", "{", "not readable as JSON"),
            ("train/dataset_info.json", "[" * 100_000, "not readable as JSON"),
            ("train/data-00000-of-00001.arrow", "", "not a readable Arrow file"),
            ("train/data-00000-of-00001.arrow", "no arrow at all", "not a readable Arrow file"),
        ],
    )
    def test_is_named(self, whole: Path, name: str, content: str, words: str) -> None:
        (whole / name).write_text(content)
        with pytest.raises(DataError, match=words) as caught:
            load(DataConfig(source=str(whole)))
        assert "\n" not in str(caught.value)

    def test_of_class_names(self, whole: Path) -> None:
        path = whole / "train" / "dataset_info.json"
        told = json.loads(path.read_text())
        for names in (None, [1, 2], ["a", "a "]):
            told["features"]["label"]["names"] = names
            path.write_text(json.dumps(told))
            with pytest.raises(DataError, match="'label' names"):
                load(DataConfig(source=str(whole)))

    def test_a_split_that_is_gone(self, whole: Path) -> None:
        shutil.rmtree(whole / "test")
        with pytest.raises(DataError, match="'test' is not there"):
            load(DataConfig(source=str(whole)))
