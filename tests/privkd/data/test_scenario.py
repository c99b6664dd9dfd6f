"""The split is disjoint, exhaustive and a pure function of its seed; the gap and the shards are as asked."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from privkd.config import DataConfig
from privkd.data import Scenario, Split, build_scenario, load, partition, scenario_from, split_indices
from privkd.data.dataset import RawSet, make_source
from privkd.data.partition import Indices
from privkd.data.public_sets import proportional
from privkd.data.scenario import public_scenario, restyle
from privkd.errors import ConfigError, DataError, InputError

BALANCED = np.tile(np.arange(10), 100)


def sizes(**others: Any) -> DataConfig:
    """A small request that fits 1,000 records of ten classes, all of them known to the world."""
    small = {"source": "digits", "public_records": 50, "validation_records": 20, "proxy_records": 100}
    small |= {"test_records": 200, "records_per_device": 40, "device_test_records": 10}
    return DataConfig(**{**small, **others})


def own(**others: Any) -> DataConfig:
    """The same of a user's own file."""
    return sizes(source="own", **others)


def divided(labels: Indices, config: DataConfig, seed: int, *, given_test: bool = False) -> Split:
    return split_indices(labels, config, seed, classes=int(labels.max()) + 1, given_test=given_test)


def roles(split: Split) -> Iterator[Indices]:
    yield from (split.test, split.public, split.validation, split.proxy, split.reserve)
    yield from split.device_train
    yield from split.device_test


def counts(labels: NDArray[np.int64], indices: Indices) -> list[int]:
    return np.bincount(labels[indices], minlength=10).tolist()


@st.composite
def requests(draw: st.DrawFn) -> tuple[NDArray[np.int64], DataConfig, int, bool]:
    """Labels, some of them very uneven, and settings that need not fit them."""
    classes = draw(st.integers(2, 12))
    weights = draw(st.lists(st.integers(1, 40), min_size=classes, max_size=classes))
    labels = np.random.default_rng(draw(st.integers(0, 99))).permutation(
        np.repeat(np.arange(classes), weights)
    )
    gap = draw(st.sampled_from(["rare", "withheld", "style", "none"]))
    concerned = st.none() | st.lists(st.integers(0, classes - 1), max_size=classes).map(tuple)
    given_test = draw(st.booleans())
    source = draw(st.sampled_from(["digits", "own"]))
    # The sizes of digits' own are too large for these.
    optional = st.integers(1, 30) if source == "digits" else st.none() | st.integers(1, 30)
    config = DataConfig(
        source=source,
        test_records=None if given_test else draw(optional),
        devices=draw(st.integers(1, 12)),
        records_per_device=draw(optional),
        public_records=draw(optional),
        validation_records=draw(optional),
        proxy_records=draw(optional | st.just(0)),
        device_test_records=draw(st.integers(0, 6)),
        partition=draw(st.sampled_from(["iid", "dirichlet", "classes"])),
        dirichlet_alpha=draw(st.sampled_from([1e-300, 0.01, 1.0, 1e9])),
        classes_per_device=draw(st.integers(1, classes)),
        gap=gap,
        gap_classes=draw(concerned) if gap in ("rare", "withheld") else None,
        rare_share=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
    )
    return labels, config, draw(st.integers(0, 2**40)), given_test


class TestProperties:
    @settings(max_examples=300, deadline=None)
    @given(requests())
    def test_every_record_has_exactly_one_role(self, request_: tuple[Any, ...]) -> None:
        labels, config, seed, given_test = request_
        try:
            split = divided(labels, config, seed, given_test=given_test)
        except DataError:  # Too few records for this request.
            return
        assigned = np.concatenate(list(roles(split)))
        assert np.array_equal(np.sort(assigned), np.arange(len(labels)))
        again = divided(labels, config, seed, given_test=given_test)
        assert all(
            np.array_equal(left, right) for left, right in zip(roles(split), roles(again), strict=True)
        )
        self.check_sizes(split, labels, config, given_test)
        self.check_gap(split, labels, config)

    @staticmethod
    def check_sizes(split: Split, labels: Indices, config: DataConfig, given_test: bool) -> None:
        for indices, wanted in (
            (split.public, config.public_records),
            (split.validation, config.validation_records),
            (split.proxy, config.proxy_records),
        ):
            assert wanted is None or len(indices) == wanted
        assert (len(split.test) == 0) == given_test
        assert len(split.device_train) == len(split.device_test) == config.devices
        assert config.records_per_device in (None, split.records_per_device)
        trained = [len(shard) for shard in split.device_train]
        nominal = split.records_per_device
        assert nominal * config.devices <= sum(trained) <= (nominal + 1) * config.devices
        assert all(len(shard) <= config.device_test_records for shard in split.device_test)
        if config.partition == "iid":
            assert set(trained) == {nominal}
            assert {len(shard) for shard in split.device_test} == {config.device_test_records}
        if config.partition == "classes":
            for train, test in zip(split.device_train, split.device_test, strict=True):
                assert len(np.unique(labels[np.concatenate([train, test])])) <= config.classes_per_device

    @staticmethod
    def check_gap(split: Split, labels: Indices, config: DataConfig) -> None:
        classes = labels.max() + 1
        if config.gap in ("style", "none"):
            assert split.gap_classes == ()
        elif config.gap_classes is None:
            assert len(split.gap_classes) == classes // 2
        else:
            assert split.gap_classes == tuple(sorted(set(config.gap_classes)))
        for indices in (split.public, split.validation):
            held = np.isin(labels[indices], split.gap_classes).sum()
            if config.gap == "withheld" or config.rare_share == 0:
                assert held == 0
            elif config.gap == "rare":
                fair = len(indices) / classes
                assert held <= len(split.gap_classes) * max(config.rare_share * fair + 0.5, 1)


class TestSplit:
    def test_the_seed_matters(self) -> None:
        first, second = (divided(BALANCED, sizes(), seed) for seed in (0, 1))
        assert not np.array_equal(np.sort(first.test), np.sort(second.test))
        assert len({divided(BALANCED, sizes(), seed).gap_classes for seed in range(5)}) > 1

    @pytest.mark.parametrize(
        "change",
        [
            {"devices": 9},
            {"records_per_device": 7},
            {"device_test_records": 0},
            {"partition": "dirichlet"},
            {"partition": "classes", "classes_per_device": 5},
        ],
    )
    def test_devices_leave_everything_public_alone(self, change: dict[str, Any]) -> None:
        plain, changed = (divided(BALANCED, sizes(**other), 0) for other in ({}, change))
        for name in ("test", "public", "validation", "proxy"):
            assert np.array_equal(getattr(plain, name), getattr(changed, name))

    def test_the_pool_of_few_devices_lies_in_that_of_many(self) -> None:
        few, many = (divided(BALANCED, sizes(devices=n), 0) for n in (3, 8))
        pool = np.concatenate([*many.device_train, *many.device_test])
        assert np.isin(np.concatenate([*few.device_train, *few.device_test]), pool).all()

    def test_the_proxy_size_leaves_the_public_sets_alone_and_conversely(self) -> None:
        plain = divided(BALANCED, sizes(), 0)
        more_proxy = divided(BALANCED, sizes(proxy_records=150), 0)
        more_public = divided(BALANCED, sizes(public_records=80), 0)
        assert np.array_equal(plain.public, more_proxy.public)
        assert np.array_equal(plain.test, more_proxy.test)
        assert np.array_equal(plain.proxy, more_public.proxy)
        assert np.isin(plain.proxy, more_proxy.proxy).all()
        assert np.isin(plain.public, more_public.public).all()

    def test_the_test_is_stratified(self) -> None:
        assert counts(BALANCED, divided(BALANCED, sizes(), 0).test) == [20] * 10

    def test_rare_classes(self) -> None:
        config = sizes(gap_classes=(8, 1), public_records=200, rare_share=0.1)
        split = divided(BALANCED, config, 0)
        assert split.gap_classes == (1, 8)
        assert counts(BALANCED, split.public)[1] == counts(BALANCED, split.public)[8] == 2
        assert counts(BALANCED, split.validation)[1] == 1, "a rare class is not withheld"
        assert len(split.public) == 200
        assert min(counts(BALANCED, split.proxy)) > 0, "the proxy knows every class"

    def test_one_gap_class(self) -> None:
        split = divided(BALANCED, sizes(gap="withheld", gap_classes=(0,)), 0)
        held = counts(BALANCED, split.public)
        assert held[0] == 0
        assert min(held[1:]) >= 5

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            (sizes(devices=20), ["1000 records", "20 devices x (40 + 10 test records)", "lower"]),
            (sizes(devices=10**9), ["1000 records", "1000000000 devices"]),
            (sizes(records_per_device=10**9), ["1000000000"]),
            (sizes(records_per_device=None, devices=200), ["200 devices x (1 + 10"]),
            (sizes(proxy_records=10**9), ["proxy_records=1000000000"]),
            (sizes(public_records=400, gap="withheld"), ["labelled set of 400", "needs 400 records outside"]),
            (sizes(validation_records=340, gap="withheld"), ["labelled set of 340"]),
            (
                sizes(gap="withheld", gap_classes=tuple(range(10))),
                ["labelled set of 50", "fewer gap_classes"],
            ),
            (sizes(gap_classes=tuple(range(10))), ["labelled set of 50", "fewer gap_classes"]),
            (sizes(gap_classes=(3, 10)), ["gap_classes=[3, 10]", "0 to 9"]),
            (sizes(gap="none", gap_classes=(3,)), ["gap_classes=[3]", "'none'"]),
            (sizes(partition="classes", classes_per_device=11), ["classes_per_device=11", "10 classes"]),
        ],
    )
    def test_what_cannot_be_is_refused(self, config: DataConfig, words: list[str]) -> None:
        with pytest.raises(InputError) as caught:
            divided(BALANCED, config, 0)
        assert "\n" not in str(caught.value)
        for word in words:
            assert word in str(caught.value)

    def test_a_negative_seed_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="seed=-1"):
            divided(BALANCED, sizes(), -1)

    def test_device_tests_follow_the_devices_own_classes(self) -> None:
        """In total variation, where 200 draws of ten classes stray by about 0.06, devices by far more."""
        labels = np.tile(BALANCED, 20)
        config = sizes(
            devices=4,
            records_per_device=2000,
            device_test_records=200,
            partition="dirichlet",
            dirichlet_alpha=0.3,
        )
        split = divided(labels, config, 0)
        for train, test in zip(split.device_train, split.device_test, strict=True):
            own = np.array(counts(labels, train)) / len(train)
            tested = np.array(counts(labels, test)) / len(test)
            assert np.abs(own - tested).sum() / 2 < 0.15
            assert np.abs(own - 0.1).sum() / 2 > 0.3

    def test_an_empty_shard_is_possible(self) -> None:
        config = sizes(devices=12, records_per_device=20, partition="dirichlet", dirichlet_alpha=1e-6)
        assert 0 in {len(shard) for shard in divided(BALANCED, config, 0).device_train}


class TestPartitions:
    @pytest.mark.parametrize("devices", [1, 3, 50, 300])
    def test_all_are_exhaustive_over_what_they_are_given(self, devices: int) -> None:
        rng = np.random.default_rng(0)
        pool = rng.permutation(1000)[:200]
        labels = BALANCED[pool]
        holders = partition.assign_classes(devices, 10, 10, rng)
        for shards in (
            partition.iid(pool, devices, rng),
            partition.dirichlet(pool, labels, devices, 0.3, rng),
            partition.by_class(pool, labels, holders, rng),
        ):
            assert len(shards) == devices
            assert np.array_equal(np.sort(np.concatenate(shards)), np.sort(pool))

    def test_iid_shards_are_equal(self) -> None:
        shards = partition.iid(np.arange(103), 10, np.random.default_rng(0))
        assert {len(shard) for shard in shards} == {10, 11}

    def test_alpha_governs_evenness(self) -> None:
        """Mean share of the commonest holder, known for both limits: 1/devices and 1."""
        rng = np.random.default_rng(0)
        labels = np.repeat(np.arange(10), 500)
        largest = {}
        for alpha in (1e-9, 1.0, 1e9):
            shards = partition.dirichlet(np.arange(5000), labels, 5, alpha, rng)
            table = np.stack([np.bincount(labels[shard], minlength=10) for shard in shards])
            largest[alpha] = (table.max(0) / 500).mean()
        assert largest[1e-9] == 1
        assert largest[1e9] == pytest.approx(0.2, abs=0.01)
        assert 0.3 < largest[1.0] < 0.6

    @pytest.mark.parametrize(
        ("devices", "classes", "each"), [(1, 5, 5), (7, 10, 3), (100, 10, 1), (3, 10, 2)]
    )
    def test_classes_are_assigned_evenly(self, devices: int, classes: int, each: int) -> None:
        holders = partition.assign_classes(devices, classes, each, np.random.default_rng(0))
        assert (holders.sum(1) == each).all()
        assert np.ptp(holders.sum(0)) <= 1

    def test_a_class_without_a_holder_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no holder"):
            partition.by_class(
                np.arange(2), np.array([0, 1]), np.array([[True, False]]), np.random.default_rng(0)
            )
        with pytest.raises(ValueError, match="exceed"):
            partition.assign_classes(2, 3, 4, np.random.default_rng(0))

    @given(st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any), st.data())
    def test_proportional_shares(self, held: list[int], data: st.DataObject) -> None:
        total = data.draw(st.integers(0, sum(held)))
        shares = proportional(np.array(held), total)
        assert shares.sum() == total
        assert (shares <= held).all()
        assert (np.abs(shares - np.array(held) * total / sum(held)) < 1).all()


def same(left: Scenario, right: Scenario) -> bool:
    def tensors(scenario: Scenario) -> list[torch.Tensor]:
        sets = [scenario.public, scenario.validation, scenario.test]
        sets += [part for device in scenario.devices for part in (device.train, device.test)]
        return [scenario.proxy, *(tensor for part in sets for tensor in (part.inputs, part.labels))]

    return all(torch.equal(one, other) for one, other in zip(tensors(left), tensors(right), strict=True))


class TestScenario:
    def test_the_default(self) -> None:
        scenario = build_scenario(DataConfig(), 0)
        assert [len(device.train) for device in scenario.devices] == [140] * 5
        assert [len(device.test) for device in scenario.devices] == [20] * 5
        assert [device.name for device in scenario.devices][:2] == ["device-0000", "device-0001"]
        assert (len(scenario.public), len(scenario.validation), len(scenario.test)) == (160, 80, 360)
        assert scenario.proxy.shape == (360, 1, 8, 8)
        assert scenario.input_shape == (1, 8, 8)
        assert scenario.classes == 10
        assert scenario.records_per_device == 140
        assert len(scenario.gap_classes) == 5
        held = torch.bincount(scenario.public.labels, minlength=10)
        assert held[list(scenario.gap_classes)].tolist() == [2] * 5

    def test_it_is_a_pure_function_of_its_arguments(self) -> None:
        first = build_scenario(DataConfig(), 3)
        torch.manual_seed(1)
        assert same(first, build_scenario(DataConfig(), 3))
        assert not same(first, build_scenario(DataConfig(), 4))

    def test_inputs_stay_with_their_labels(self) -> None:
        source = load(DataConfig())
        images, labels = source.records.inputs / np.float32(16), source.records.labels
        known = {(tuple(x.flatten().tolist()), int(y)) for x, y in zip(images, labels, strict=True)}
        scenario = scenario_from(source, DataConfig(partition="dirichlet"), 0)
        for device in scenario.devices:
            for part in (device.train, device.test):
                for x, y in zip(part.inputs, part.labels, strict=True):
                    assert (tuple(x.flatten().tolist()), int(y)) in known

    @pytest.mark.parametrize("devices", [1, 4, 10, 39])
    @pytest.mark.parametrize("kind", ["iid", "dirichlet", "classes"])
    def test_the_default_sizes_bend_to_the_number_of_devices(self, devices: int, kind: Any) -> None:
        scenario = build_scenario(DataConfig(devices=devices, partition=kind), 0)
        assert len(scenario.devices) == devices
        assert 1 <= scenario.records_per_device <= 140

    def test_edges(self) -> None:
        one = DataConfig(devices=1, records_per_device=1, device_test_records=0, proxy_records=0)
        scenario = build_scenario(one, 0)
        assert len(scenario.devices[0].train) == 1
        assert scenario.devices[0].test.inputs.shape == (0, 1, 8, 8)
        assert scenario.proxy.shape == (0, 1, 8, 8)

    def test_a_given_test_split_is_kept_whole(self) -> None:
        generator = torch.Generator().manual_seed(0)
        inputs, labels = torch.rand(1000, 3, generator=generator), torch.from_numpy(BALANCED)
        records, test = RawSet(inputs.numpy(), BALANCED), RawSet(inputs[:7].numpy() + 1, BALANCED[:7])
        scenario = scenario_from(
            make_source("own", records, test), own(test_records=None, standardise="no"), 0
        )
        assert torch.equal(scenario.test.inputs, inputs[:7] + 1)
        assert torch.equal(scenario.test.labels, labels[:7])

    @pytest.mark.data
    def test_mnist(self, data_dir: Path) -> None:
        config = DataConfig(source="mnist", data_dir=data_dir, devices=20)
        scenario = build_scenario(config, 0)
        assert (len(scenario.public), len(scenario.validation), len(scenario.proxy)) == (2000, 500, 5000)
        assert [len(device.train) for device in scenario.devices] == [1000] * 20
        assert len(scenario.test) == 10_000
        held = torch.bincount(scenario.public.labels, minlength=10)
        assert held[list(scenario.gap_classes)].tolist() == [20] * 5


class TestWithoutDevices:
    """What a cloud holds whose devices are elsewhere."""

    @pytest.mark.parametrize("gap", ["rare", "withheld", "style", "none"])
    def test_of_a_public_data_set_it_is_the_public_part_of_a_simulation(self, gap: str) -> None:
        config = DataConfig(gap=gap)
        whole, public = build_scenario(config, 3), public_scenario(config, 3)
        assert public.devices == ()
        for name in ("public", "validation", "test"):
            one, other = getattr(whole, name), getattr(public, name)
            assert torch.equal(one.inputs, other.inputs)
            assert torch.equal(one.labels, other.labels)
        assert torch.equal(whole.proxy, public.proxy)
        assert (public.gap_classes, public.constants) == (whole.gap_classes, whole.constants)
        assert public.records_per_device == whole.records_per_device == 140

    def test_of_ones_own_file_every_record_may_be_public(self, tmp_path: Path) -> None:
        """Sizes that leave a simulation no record for a device take them all here, each once."""
        inputs, labels = np.arange(200, dtype=np.float32)[:, None], np.tile(np.arange(4), 50)
        np.savez(tmp_path / "own.npz", inputs=inputs, labels=labels)
        config = DataConfig(
            source=str(tmp_path / "own.npz"), gap="none", records_per_device=500, standardise="no",
            test_records=60, public_records=80, validation_records=20, proxy_records=40,
        )  # fmt: skip
        with pytest.raises(DataError):
            build_scenario(config, 0)
        found = public_scenario(config, 0)
        sets = [found.test.inputs, found.public.inputs, found.validation.inputs, found.proxy]
        assert sorted(torch.cat(sets).flatten().tolist()) == list(range(200))
        assert [len(each) for each in sets] == [60, 80, 20, 40]
        assert (found.devices, found.records_per_device, found.inferred) == ((), 500, ())

    def test_what_devices_hold_is_never_guessed_from_it(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "own.npz", inputs=np.zeros((200, 1)), labels=np.tile(np.arange(4), 50))
        with pytest.raises(ConfigError, match="records_per_device"):
            public_scenario(DataConfig(source=str(tmp_path / "own.npz")), 0)

    def test_too_few_records_are_said_with_the_sizes(self) -> None:
        with pytest.raises(DataError, match="1797 records, fewer than test_records=360, public_records=1500"):
            public_scenario(DataConfig(public_records=1500), 0)

    def test_no_number_of_devices_is_too_many(self) -> None:
        few, many = (public_scenario(DataConfig(devices=devices), 0) for devices in (5, 5000))
        assert same(few, many)


class TestStyle:
    def test_the_public_sets_are_plain_and_all_others_altered(self) -> None:
        plain, style = (build_scenario(DataConfig(gap=gap), 0) for gap in ("none", "style"))
        assert torch.equal(style.public.inputs, plain.public.inputs)
        assert torch.equal(style.validation.inputs, plain.validation.inputs)
        assert torch.equal(style.proxy, restyle(plain.proxy))
        assert torch.equal(style.test.inputs, restyle(plain.test.inputs))
        assert torch.equal(style.devices[2].train.inputs, restyle(plain.devices[2].train.inputs))
        assert torch.equal(style.devices[2].test.inputs, restyle(plain.devices[2].test.inputs))
        assert style.gap_classes == ()

    def test_the_alteration_equals_its_naive_twin(self) -> None:
        image = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
        expected = torch.zeros_like(image)
        for row in range(5):
            for column in range(4):
                for down, vertical in zip((-1, 0, 1), (0.25, 0.5, 0.25), strict=True):
                    for right, horizontal in zip((-1, 0, 1), (0.25, 0.5, 0.25), strict=True):
                        y, x = min(max(row + down, 0), 4), min(max(column + right, 0), 3)
                        expected[:, :, row, column] += vertical * horizontal * (1 - image[:, :, y, x])
        altered = restyle(image)
        assert torch.allclose(altered, expected, atol=1e-6)
        assert altered.min() >= 0
        assert altered.max() <= 1

    def test_an_empty_set_stays_empty(self) -> None:
        assert restyle(torch.zeros(0, 1, 8, 8)).shape == (0, 1, 8, 8)

    def test_tables_have_no_style(self) -> None:
        with pytest.raises(ConfigError, match="images"):
            restyle(torch.zeros(3, 4))

    def test_values_out_of_range_have_no_inverse(self) -> None:
        with pytest.raises(DataError, match=r"\[0, 1\]"):
            restyle(torch.full((1, 1, 2, 2), 2.0))
