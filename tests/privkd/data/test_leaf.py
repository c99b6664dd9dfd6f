"""Federated JSON in LEAF's form: users are groups, and damage is named in one line."""

import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reading import read

from privkd.config import DataConfig
from privkd.data import build_scenario, load
from privkd.data.leaf import load_leaf
from privkd.errors import DataError


def tree(users: int = 12, records: int = 6, first: int = 0) -> dict[str, Any]:
    """User ``uN`` holds ``records`` records ``[N, k]`` of classes ``k % 2``."""
    names = [f"u{number}" for number in range(first, first + users)]
    data = {
        name: {
            "x": [[float(number), float(k)] for k in range(records)],
            "y": [k % 2 for k in range(records)],
        }
        for number, name in enumerate(names, first)
    }
    return {"users": names, "num_samples": [records] * users, "user_data": data}


def write(path: Path, content: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


class TestRead:
    def test_records_and_users(self, tmp_path: Path) -> None:
        found = load(DataConfig(source=write(tmp_path / "a.json", tree(3, 2))))
        assert found.records.inputs.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]
        assert found.records.labels.tolist() == ["0", "1"] * 3
        assert found.records.groups is not None
        assert found.records.groups.tolist() == ["u0", "u0", "u1", "u1", "u2", "u2"]
        assert found.taken["group"] == "users of the JSON"

    def test_members_in_any_order_and_spacing(self, tmp_path: Path) -> None:
        whole = tree(3, 2)
        other = {"hierarchies": [], **{name: whole[name] for name in ("user_data", "num_samples", "users")}}
        path = write(tmp_path / "a.json", "\ufeff \n" + json.dumps(other, indent=3) + "\n\t ")
        assert read(path).inputs.shape == (6, 2)

    def test_a_folder_of_files_with_a_test_split(self, tmp_path: Path) -> None:
        write(tmp_path / "train" / "b.json", tree(2, 4, first=3))
        write(tmp_path / "train" / "a.json", tree(3, 4))
        write(tmp_path / "test" / "a.json", tree(3, 2))
        found = load(DataConfig(source=str(tmp_path)))
        assert sorted(set(found.records.inputs[:, 0])) == [0, 1, 2, 3, 4]
        assert found.test is not None
        assert len(found.test.labels) == 6
        assert found.taken["test split"] == "'a.json'"

    def test_a_folder_of_files_without_splits(self, tmp_path: Path) -> None:
        for number in range(3):
            write(tmp_path / f"{number}.json", tree(2, 4, first=2 * number))
        assert len(load(DataConfig(source=str(tmp_path))).records.labels) == 24

    def test_devices_hold_whole_users(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.json", tree(30, 6))
        config = DataConfig(source=path, devices=3, device_test_records=0, gap="none", records_per_device=20)
        found = build_scenario(config, 0)
        whose = [set(device.train.inputs[:, 0].tolist()) for device in found.devices]
        assert sum(map(len, whose)) == len(set.union(*whose))
        for device in found.devices:
            assert set(Counter(device.train.inputs[:, 0].tolist()).values()) == {6}

    def test_another_partition_is_another_wish(self, tmp_path: Path) -> None:
        config = DataConfig(source=write(tmp_path / "a.json", tree()), partition="dirichlet")
        found = load(config)
        assert found.records.groups is None
        assert found.taken["group"] == "none, as data.partition='dirichlet' is set"

    def test_beside_the_data_without_labels(self, tmp_path: Path) -> None:
        bare = tree(2, 3)
        for own in bare["user_data"].values():
            del own["y"]
        proxy = write(tmp_path / "proxy.json", bare)
        own = write(tmp_path / "own.json", tree(30, 6))
        config = DataConfig(source=own, proxy=proxy, public=write(tmp_path / "public.json", tree(20, 4)))
        found = build_scenario(config.model_copy(update={"device_test_records": 0}), 0)
        assert len(found.proxy) == 6
        assert sum(len(device.train) for device in found.devices) == 180

    def test_users_are_decoded_one_by_one(self, tmp_path: Path) -> None:
        """Python's objects of all users at once would take several times the file's size."""
        rng = np.random.default_rng(0)
        users = {f"u{n}": {"x": rng.random((20, 200)).tolist(), "y": [0, 1] * 10} for n in range(60)}
        path = Path(
            write(
                tmp_path / "a.json",
                {"users": list(users), "num_samples": [20] * 60, "user_data": users},
            )
        )
        del users
        tracemalloc.start()
        load_leaf([path], "a", DataConfig())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2.5 * path.stat().st_size


class TestDamage:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"num_samples": [1, 1, 1]}, "has 2 records where num_samples says 1"),
            ({"num_samples": [2, 2]}, "not one number for each user"),
            ({"users": ["u0", "u1"]}, "does not name the users"),
            ({"users": 3}, "does not name the users"),
            ({"user_data": {}}, "no user has a record|does not name the users"),
            ({"user_data": []}, "is expected"),
            ({"user_data": {"u0": [], "u1": {}, "u2": {}}}, "'u0' has no list 'x'"),
            ({"user_data": {"u0": {"x": [[1]], "y": []}}}, "not one label in 'y'"),
            ({"user_data": {"u0": {"x": [[1], [1, 2]], "y": [0, 1]}}}, "inputs of several shapes"),
            ({"user_data": {"u0": {"x": ["to be", "or not"], "y": [0, 1]}}}, "holds text"),
            ({"user_data": {"u0": {"x": [[1], [2]], "y": [[0], {}]}}}, "no number and no text"),
        ],
    )
    def test_is_named(self, tmp_path: Path, change: dict[str, Any], words: str) -> None:
        path = write(tmp_path / "a.json", tree(3, 2) | change)
        with pytest.raises(DataError, match=words) as caught:
            load(DataConfig(source=path))
        assert "\n" not in str(caught.value)
        assert "a.json" in str(caught.value)

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", "{}", "3", '{"users": ["a"]', '{"users": [1,]}', '{"user_data": {"a": {"x": [[1]]}}',
         "[" * 100_000, '{"user_data": ' + '{"a": ' * 50_000,
         '{"users": [], } ', '{"users": [] "user_data": {}}'],
    )  # fmt: skip
    def test_of_the_json_is_named(self, tmp_path: Path, text: str) -> None:
        path = write(tmp_path / "a.json", text)
        with pytest.raises(DataError, match=r"a\.json") as caught:
            load(DataConfig(source=path))
        assert "\n" not in str(caught.value)

    def test_a_user_twice_and_shapes_that_differ_between_users(self, tmp_path: Path) -> None:
        own = '{"x": [[1]], "y": [0]}'
        twice = f'{{"users": ["a"], "user_data": {{"a": {own}, "a": {own}}}}}'
        with pytest.raises(DataError, match="'a' is there twice"):
            load(DataConfig(source=write(tmp_path / "a.json", twice)))
        uneven = tree(2, 2)
        uneven["user_data"]["u1"]["x"] = [[1, 2, 3]] * 2
        with pytest.raises(DataError, match=r"shape \[2\] and of shape \[3\]"):
            load(DataConfig(source=write(tmp_path / "b.json", uneven)))
