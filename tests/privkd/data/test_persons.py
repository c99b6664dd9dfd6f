"""How many persons a device holds, and with how many records at most: public, and kept on each device."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privkd.config import DataConfig
from privkd.data import build_scenario, split_indices
from privkd.data.dataset import RawSet
from privkd.data.persons import within
from privkd.data.scenario import public_scenario, scenario_from
from privkd.data.sources import load
from privkd.errors import ConfigError
from privkd.privacy.joint import Persons


def write(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    whose = np.repeat(np.arange(60), rng.integers(1, 9, 60))
    path = folder / "t.csv"
    rows = (f"w{w},{w}.5,{x:.3f},{k}" for w, x, k in zip(whose, rng.normal(size=len(whose)),
            rng.integers(0, 3, len(whose)), strict=True))  # fmt: skip
    path.write_text("\n".join(["writer,a,b,label", *rows]))
    return path


def config(path: Path, **more: object) -> DataConfig:
    sizes = {"public_records": 40, "validation_records": 20, "proxy_records": 20, "test_records": 20}
    return DataConfig(source=str(path), group="writer", devices=4, gap="none", **(sizes | more))


def test_a_simulation_reads_them_and_says_so(tmp_path: Path) -> None:
    scenario = build_scenario(config(write(tmp_path)), 0)
    assert scenario.persons is not None
    held = [device.train.persons for device in scenario.devices]
    counts = [len(set(persons.tolist())) for persons in held if persons is not None]
    assert len(counts) == 4
    assert min(counts) <= scenario.persons.per_device <= max(counts)
    assert scenario.persons.most_records == 8
    assert {"persons per device", "records per person"} <= set(scenario.inferred)


def test_persons_are_numbered_as_the_records_say(tmp_path: Path) -> None:
    for device in build_scenario(config(write(tmp_path)), 0).devices:
        assert device.train.persons is not None
        pairs = set(zip(device.train.inputs[:, 0].tolist(), device.train.persons.tolist(), strict=True))
        assert len(pairs) == len({writer for writer, _ in pairs}) == len({number for _, number in pairs})


def test_more_records_of_a_person_are_dropped(tmp_path: Path) -> None:
    scenario = build_scenario(config(write(tmp_path), records_per_person=3, persons_per_device=11), 0)
    assert scenario.persons == Persons(per_device=11, most_records=3)
    for device in scenario.devices:
        assert device.train.persons is not None
        assert max(Counter(device.train.persons.tolist()).values()) <= 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 5), st.randoms())
def test_which_stay_depends_on_the_persons_own_records_alone(
    whose: list[int], most: int, random: object
) -> None:
    groups = np.array([f"p{number}" for number in whose])
    order = np.random.default_rng(0).permutation(len(groups))
    kept = set(within(order, groups, most).tolist())
    for person in set(groups):
        own = np.flatnonzero(groups == person)
        assert kept & set(own.tolist()) == set(own[:most].tolist())
        alone = within(own, groups, most)
        assert alone.tolist() == own[:most].tolist()


def test_nothing_moves_where_nobody_has_too_many(tmp_path: Path) -> None:
    source = load(config(write(tmp_path)))
    labels = np.zeros(len(source.records.labels), dtype=np.int64)
    plain = split_indices(labels, config(tmp_path), 0, classes=1, groups=source.records.groups)
    bounded = config(tmp_path, records_per_person=8)
    again = split_indices(labels, bounded, 0, classes=1, groups=source.records.groups)
    assert all(
        np.array_equal(one, other) for one, other in zip(plain.device_train, again.device_train, strict=True)
    )


def test_a_deployment_must_be_given_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.persons_per_device=N .*data\.records_per_person=N"):
        build_scenario(config(write(tmp_path), classes=("0", "1", "2")), 0, deployment=True)


@pytest.mark.parametrize("name", ["persons_per_device", "records_per_person"])
def test_they_need_to_know_whose_records_are(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=5.*--group"):
        build_scenario(DataConfig(**{name: 5}), 0)


def test_of_devices_elsewhere_what_is_set_is_known() -> None:
    sizes = DataConfig(records_per_device=40, persons_per_device=6, records_per_person=9)
    assert public_scenario(sizes, 0).persons == Persons(6, 9)
    assert public_scenario(DataConfig(records_per_device=40), 0).persons is None


def test_data_without_groups_have_no_persons(tmp_path: Path) -> None:
    source = load(config(write(tmp_path)))
    nobody = replace(source, records=RawSet(source.records.inputs, source.records.labels))
    scenario = scenario_from(nobody, config(tmp_path).model_copy(update={"group": None}), 0)
    assert scenario.persons is None
    assert all(device.train.persons is None for device in scenario.devices)
