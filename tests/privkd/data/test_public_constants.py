"""One private record more, less or other changes nothing that anybody sees before the first charge."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from neighbours import CHANGES, FORMS, Form, Record
from numpy.typing import NDArray
from PIL import Image
from running import SMALL, play
from typer.testing import CliRunner

from cli import app
from privkd.config import Config, DataConfig, load_config
from privkd.data import Scenario, load, scenario_from, split_indices
from privkd.data import scenario as splitting
from privkd.data.constants import Constants, find_constants, in_words, label_space, numbered
from privkd.data.dataset import RawSet, make_source
from privkd.data.public_sets import Stream, choose_gap_classes, draw_public_sets, public_sizes
from privkd.errors import ConfigError, DataError
from privkd.federation import Federation
from privkd.plan import facts_of, make_plan
from privkd.prepared import prepare

SIZES = {
    "records_per_device": 20, "public_records": 20, "validation_records": 10, "proxy_records": 20,
    "test_records": 20, "device_test_records": 4, "devices": 2,
}  # fmt: skip


def settings(form: Form, source: str, **others: Any) -> DataConfig:
    """All that a deployment must be given."""
    own = {"source": source, "classes": form.labels, **form.settings}
    return DataConfig(**own | SIZES | others)


def public_view(config: DataConfig, seed: int, *, deployment: bool = True) -> dict[str, Any]:
    """Whatever follows from data before the first charge: public records, constants, plan."""
    return shown(splitting.build_scenario(config, seed, deployment=deployment))


def shown(scenario: Scenario) -> dict[str, Any]:
    sets = (scenario.public, scenario.validation, scenario.test)
    tensors = [scenario.proxy, *(tensor for part in sets for tensor in (part.inputs, part.labels))]
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()
    return {
        "records": digest,
        "shapes": [tuple(tensor.shape) for tensor in tensors],
        "classes": scenario.classes,
        "constants": scenario.constants,
        "gap": scenario.gap_classes,
        "plan": asdict(make_plan(Config(), facts_of(scenario))),
    }


def withheld(config: DataConfig, seed: int) -> NDArray[np.int64]:
    """The records that no device may hold."""
    source = load(config)
    classes = label_space(source, config)
    sizes = public_sizes(config, len(source.records.labels))
    gap = choose_gap_classes(config, len(classes), Stream.GAP.generator(seed))
    return draw_public_sets(
        numbered(source.records.labels, classes), config, sizes, gap,
        classes=len(classes), seed=seed, names=source.names,
    )[1]  # fmt: skip


def private_names(config: DataConfig, seed: int, records: list[Record]) -> list[int]:
    """Which ``records``, in the order of ``records``, devices may hold."""
    source, public = load(config), withheld(config, seed)
    if source.names is None:
        return sorted({*range(len(records))} - {*public.tolist()})
    names = {source.names[number] for number in public}
    return [number for number, record in enumerate(records) if record.name not in names]


class Neighbours:
    """A data set on the disk, and the same with one private record changed, added or removed."""

    def __init__(self, form: Form, folder: Path, seed: int) -> None:
        self.form, self.folder, self.seed = form, folder, seed
        self.records = form.records(seed)
        self.config = settings(form, self.written(self.records, "first"))
        self.private = private_names(self.config, seed, self.records)

    def written(self, records: list[Record], name: str) -> str:
        place = self.folder / name
        place.mkdir()
        return self.form.write(place, records)

    def changed(self, change: str, number: int) -> list[Record]:
        records = list(self.records)
        records[number] = CHANGES[change](self.form, records[number])
        return records

    def view(self, records: list[Record], name: str, **others: Any) -> dict[str, Any]:
        config = self.config.model_copy(update={"source": self.written(records, name), **others})
        return public_view(config, self.seed)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Form:
    return FORMS[request.param]


@pytest.mark.parametrize("seed", range(2))
def test_a_private_record_changes_nothing_public(form: Form, tmp_path: Path, seed: int) -> None:
    near = Neighbours(form, tmp_path, seed)
    before = near.view(near.records, "again")
    for change in CHANGES:
        for number in np.random.default_rng(seed).choice(near.private, 3, replace=False):
            assert near.view(near.changed(change, number), f"{change} {number}") == before, (change, number)


@pytest.mark.parametrize("seed", range(3))
def test_nor_does_one_more_or_one_less(form: Form, tmp_path: Path, seed: int) -> None:
    near = Neighbours(form, tmp_path, seed)
    last = near.private[-1]
    shorter, longer = near.records[:last], near.records[: last + 1]
    assert near.view(shorter, "shorter") == near.view(longer, "longer")


@pytest.mark.parametrize("name", ["folder, grey", "folder, colour"])
def test_nor_does_an_image_less_among_the_others(tmp_path: Path, name: str) -> None:
    """A file is known by its name, so those that come after it keep their roles."""
    near = Neighbours(FORMS[name], tmp_path, 0)
    before = near.view(near.records, "again")
    for number in near.private[:5]:
        less = [record for record in near.records if record is not near.records[number]]
        assert near.view(less, f"without {number}") == before


class TestBrokenTwins:
    """What was read from all records before, and what it gave away: each is seen by the property above."""

    def caught(self, name: str, folder: Path, change: str) -> bool:
        """Whether another view, or a refusal, tells of the change of a private record."""
        for seed in range(4):
            place = folder / f"{seed}"
            place.mkdir()
            near = Neighbours(FORMS[name], place, seed)
            before = near.view(near.records, "again")
            for number in near.private[:6]:
                try:
                    if near.view(near.changed(change, number), f"{number}") != before:
                        return True
                except DataError:
                    return True
        return False

    @pytest.mark.parametrize(
        ("name", "change"),
        [("npz, flags", "features out of range"), ("npz, wide images", "features out of range"),
         ("folder, flags", "features out of range"),
         ("folder, grey", "colour"), ("parquet, images", "colour")],
    )  # fmt: skip
    def test_constants_of_all_records(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: str
    ) -> None:
        everybody = lambda source, public, config: find_constants(  # noqa: E731
            source, np.arange(len(source.records.labels)), config
        )
        monkeypatch.setattr(splitting, "find_constants", everybody)
        assert self.caught(name, tmp_path, change)

    @pytest.mark.parametrize("name", ["npz, flags", "csv, text", "folder, grey"])
    def test_classes_of_all_records(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        real = label_space
        occurring = lambda source, config: real(source, config.model_copy(update={"classes": None}))  # noqa: E731
        monkeypatch.setattr(splitting, "label_space", occurring)
        assert self.caught(name, tmp_path, "a label that is no class")

    def test_roles_by_the_labels_of_all_records(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sources = [str(path) for seed in range(4) for path in self.all_sources(tmp_path / f"{seed}")]
        monkeypatch.setattr("privkd.data.public_sets.PUBLIC_SOURCES", ("digits", *sources))
        assert self.caught("csv", tmp_path, "another label")

    def all_sources(self, folder: Path) -> list[Path]:
        return [folder / name / "own.csv" for name in ("first", "again", *map(str, range(200)))]

    def test_a_shard_size_from_the_number_of_records(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(splitting, "check_set", lambda config, **_: None)
        near = Neighbours(FORMS["csv"], tmp_path, 0)
        update = {"records_per_device": None}
        sizes = {
            near.view(near.records[: near.private[-1] + 1 - less], f"{less}", **update)["plan"][
                "expected_batch_size"
            ]
            for less in range(3)
        }
        assert len(sizes) > 1


class TestRun:
    """The whole of it: what the run's folder holds when the first charge is about to be made."""

    DEPLOYED = (
        "privacy.noise=system", "data.devices=2", "data.records_per_device=20", "data.public_records=20",
        "data.validation_records=10", "data.proxy_records=20", "data.test_records=20",
    )  # fmt: skip

    def folder_before_the_first_charge(
        self, path: Path, form: Form, source: str, monkeypatch: pytest.MonkeyPatch
    ) -> dict[str, Any]:
        def debit(*_: object) -> None:
            raise InterruptedError

        classes = f"data.classes={','.join(form.labels)}"
        monkeypatch.setattr(Federation, "_debit", debit)
        with pytest.raises(InterruptedError):
            play(path, *self.DEPLOYED, classes, f"data.source={source}")
        files = {
            str(file.relative_to(path)): file.read_bytes()
            for file in sorted(path.rglob("*"))
            if file.is_file() and file.parent.name != "secrets"
        }
        lines = [json.loads(line)["record"] for line in files.pop("journal.jsonl").splitlines()]
        # The noise key is drawn anew, and without it the digests that bind a run to its data say nothing.
        keyed = ("bound", "secret noise.key")
        return {**files, "journal": [line for line in lines if line["step"] not in keyed]}

    @pytest.mark.parametrize("name", ["npz, flags", "csv, text", "folder, grey"])
    def test_every_byte_is_the_same(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        near = Neighbours(FORMS[name], tmp_path, 0)
        number = near.private[3]
        neighbours = {change: near.changed(change, number) for change in CHANGES}
        neighbours["one less"] = near.records[: near.private[-1]]
        # In one place in turn, as its name stands in the settings.
        place, found = tmp_path / "data", {}
        for change, records in {"none": near.records, **neighbours}.items():
            source = near.written(records, "data")
            found[change] = self.folder_before_the_first_charge(
                tmp_path / change, near.form, source, monkeypatch
            )
            place.rename(tmp_path / f"data of {change}")
        assert "rounds/000/cloud.safetensors" in found["none"]
        assert [line["step"] for line in found["none"]["journal"]].count("round") == 1
        for change in neighbours:
            assert found[change] == found["none"], change

    def test_the_dry_run_says_the_same(self, tmp_path: Path) -> None:
        near = Neighbours(FORMS["npz, flags"], tmp_path, 0)
        said = []
        for change in ("features", "features out of range", "a label that is no class"):
            source = near.written(near.changed(change, near.private[0]), f"dry {change}")
            tree = dry_run(*self.DEPLOYED, f"data.source={source}", "data.classes=0,1,2")
            del tree["seconds"]
            said.append(tree)
        assert said[0] == said[1] == said[2]
        assert said[0]["plan"]["inferred"] == []


def dry_run(*overrides: str) -> dict[str, Any]:
    options = [word for override in (*SMALL, *overrides) for word in ("--set", override)]
    answer = CliRunner().invoke(app, ["train", *options, "--dry-run", "--json"])
    assert answer.exit_code == 0, answer.output
    tree: dict[str, Any] = json.loads(answer.stdout)
    return tree


class TestPublicDataSets:
    """Their roles are as they always were; what is read from them is not."""

    def test_a_private_digit_changes_nothing_public(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source, config = load(DataConfig()), DataConfig()
        labels = source.records.labels.astype(np.int64)
        split = split_indices(labels, config, 0, classes=10)
        monkeypatch.setattr(splitting, "split_indices", lambda *_, **__: split)
        before = scenario_from(source, config, 0)
        for number in split.device_train[2][:3]:
            inputs, texts = source.records.inputs.copy(), source.records.labels.astype("<U5").copy()
            inputs[number], texts[number] = 200, "zebra"
            other = scenario_from(replace(source, records=RawSet(inputs, texts)), config, 0)
            assert shown(other) == shown(before)
            assert not torch.equal(other.devices[2].train.inputs, before.devices[2].train.inputs)

    def test_need_no_settings_in_a_deployment(self) -> None:
        scenario = splitting.build_scenario(DataConfig(), 0, deployment=True)
        assert scenario.inferred == ()
        assert scenario.classes == 10


class TestWhatDoesNotFit:
    """Private records are bent to the public constants, or dropped."""

    def other(self, name: str, folder: Path, change: str) -> tuple[Scenario, Scenario, int, int]:
        """Before, after, and the device and the place of the record that was changed."""
        near = Neighbours(FORMS[name], folder, 0)
        source = load(near.config)
        split = split_indices(
            numbered(source.records.labels, near.form.labels), near.config, 0,
            classes=len(near.form.labels), names=source.names,
        )  # fmt: skip
        number = int(split.device_train[1][7])
        if source.names is not None:
            number = next(i for i, r in enumerate(near.records) if r.name == source.names[number])
        config = near.config.model_copy(
            update={"source": near.written(near.changed(change, number), "other")}
        )
        return splitting.build_scenario(near.config, 0), splitting.build_scenario(config, 0), 1, 7

    def test_bytes_among_flags_are_flags(self, tmp_path: Path) -> None:
        _, after, device, place = self.other("npz, flags", tmp_path, "features out of range")
        assert after.devices[device].train.inputs[place].tolist() == [1] * 6
        assert after.constants.divisor == 1

    def test_colour_among_grey_is_grey(self, tmp_path: Path) -> None:
        before, after, device, place = self.other("parquet, images", tmp_path, "colour")
        image = (before.devices[device].train.inputs[place, 0] * 255).round().to(torch.uint8).numpy()
        coloured = Image.fromarray(np.stack([image, image // 2, 255 - image], axis=-1))
        expected = np.asarray(coloured.convert("L"))
        assert np.array_equal((after.devices[device].train.inputs[place, 0] * 255).round(), expected)

    @pytest.mark.parametrize("name", ["npz, flags", "csv, text", "parquet, images"])
    def test_a_foreign_label_drops_its_record_alone(self, tmp_path: Path, name: str) -> None:
        before, after, device, place = self.other(name, tmp_path, "a label that is no class")
        kept = [i for i in range(20) if i != place]
        assert torch.equal(after.devices[device].train.inputs, before.devices[device].train.inputs[kept])
        assert torch.equal(after.devices[0].train.inputs, before.devices[0].train.inputs)
        assert after.records_per_device == before.records_per_device == 20
        assert int(after.devices[device].train.labels.max()) < after.classes

    @pytest.mark.parametrize("partition", ["dirichlet", "classes"])
    def test_under_every_partition(self, tmp_path: Path, partition: Any) -> None:
        form = FORMS["csv, text"]
        near = Neighbours(form, tmp_path, 0)
        records = list(near.records)
        for number in near.private[::4]:
            records[number] = replace(records[number], label=form.foreign)
        source = near.written(records, "other")
        scenario = splitting.build_scenario(settings(form, source, partition=partition), 0, deployment=True)
        held = [len(device.train) for device in scenario.devices]
        assert 0 < sum(held) < 40
        assert all(int(device.train.labels.max()) < 3 for device in scenario.devices if len(device.train))

    def test_style_clamps_private_images(self, tmp_path: Path) -> None:
        """They would stop the run otherwise, and tell so."""
        rng = np.random.default_rng(0)
        inputs, labels = rng.random((170, 1, 5, 4), dtype=np.float32), np.arange(170) % 3
        config = settings(FORMS["csv"], "own", gap="style")
        number = split_indices(labels, config, 0, classes=3).device_train[0][0]
        before = shown(scenario_from(make_source("own", RawSet(inputs, labels)), config, 0))
        inputs[number] = 1e6
        assert shown(scenario_from(make_source("own", RawSet(inputs, labels)), config, 0)) == before

    def test_grey_is_pillows(self) -> None:
        colours = np.random.default_rng(0).integers(0, 256, (50, 9, 7, 3), dtype=np.uint8)
        expected = [np.asarray(Image.fromarray(image).convert("L")) for image in colours]
        grey = Constants(1.0, None, 1, "grey").features
        assert np.array_equal(grey(colours.transpose(0, 3, 1, 2))[:, 0], np.stack(expected))
        same = np.repeat(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), 3, axis=1)
        assert np.array_equal(grey(same), same[:, :1])


class TestDeployment:
    def test_must_be_given_what_is_public(self, tmp_path: Path) -> None:
        form = FORMS["csv"]
        source = form.write(tmp_path, form.records(0))
        with pytest.raises(ConfigError) as caught:
            prepare(load_config(None, [*SMALL[2:3], "privacy.noise=system", f"data.source={source}"]))
        words = str(caught.value)
        assert "\n" not in words
        for name in ("records_per_device", "public_records", "validation_records", "proxy_records"):
            assert f"--set data.{name}=N" in words
        assert "--classes NAME,NAME,..." in words
        assert "--set data.test_records=N" in words

    @pytest.mark.parametrize("lacking", ["classes", *(name for name in SIZES if name.endswith("records"))])
    def test_every_one_of_them(self, tmp_path: Path, lacking: str) -> None:
        form = FORMS["csv"]
        config = settings(form, form.write(tmp_path, form.records(0)))
        splitting.build_scenario(config, 0, deployment=True)
        without = config.model_copy(update={lacking: None})
        if lacking == "device_test_records":
            return
        with pytest.raises(
            ConfigError, match=rf"give (--set data\.{lacking}=N|--{lacking} NAME,NAME,\.\.\.)$"
        ):
            splitting.build_scenario(without, 0, deployment=True)

    def test_a_test_split_of_the_datas_own_needs_no_size(self) -> None:
        rng = np.random.default_rng(0)
        inputs, labels = rng.random((170, 4), dtype=np.float32), np.arange(170) % 3
        source = make_source("own", RawSet(inputs, labels), RawSet(inputs[:9], labels[:9]))
        config = settings(FORMS["csv"], "own", test_records=None)
        assert len(scenario_from(source, config, 0, deployment=True).test) == 9
        with pytest.raises(ConfigError, match="test_records=20: the data bring a test split"):
            scenario_from(source, settings(FORMS["csv"], "own"), 0)

    def test_a_public_record_of_no_class_is_refused(self, tmp_path: Path) -> None:
        """A class that was forgotten would vanish otherwise."""
        form = FORMS["csv"]
        config = settings(form, form.write(tmp_path, form.records(0)), classes=("0", "1"))
        with pytest.raises(DataError, match=r"record \d+ is public, but its label is none of the 2 classes"):
            splitting.build_scenario(config, 0, deployment=True)


class TestSimulation:
    def test_says_what_it_read_from_all_records(self, tmp_path: Path) -> None:
        form = FORMS["csv, text"]
        source = form.write(tmp_path, form.records(0))
        scenario = splitting.build_scenario(DataConfig(source=source, device_test_records=2), 0)
        assert scenario.inferred == (
            "classes", "records per device", "public records", "validation records", "proxy records",
            "test records",
        )  # fmt: skip
        assert scenario.classes == 3
        given = splitting.build_scenario(settings(form, source), 0)
        assert given.inferred == ()
        assert splitting.build_scenario(settings(form, source, classes=None), 0).inferred == ("classes",)

    def test_the_plan_says_so(self, tmp_path: Path) -> None:
        form = FORMS["csv"]
        source = form.write(tmp_path, form.records(0))
        wanted = ("data.devices=2", "data.records_per_device=20", f"data.source={source}")
        assert dry_run(*wanted)["plan"]["inferred"] == [
            "classes", "public records", "validation records", "test records",
        ]  # fmt: skip
        options = [word for override in (*SMALL, *wanted) for word in ("--set", override)]
        answer = CliRunner().invoke(app, ["train", *options, "--dry-run"])
        said = " ".join(answer.stdout.split())
        assert "private ones too: classes, public records, validation records, test records." in said

    def test_in_words(self) -> None:
        assert in_words(("records_per_device",)) == ("records per device",)


class TestConstants:
    @pytest.mark.parametrize(
        ("values", "scale", "most"),
        [
            (np.array([[0, 16], [4, 8]], np.uint8), 16, 1.0),
            (np.array([[0, 16], [4, 8]], np.int64), 32, 0.5),
            (np.array([[0, 1], [1, 0]], np.uint8), 2, 0.5),
            (np.array([[0, 16], [4, 8]], np.int64), None, 16.0),
        ],
    )
    def test_scale(self, values: NDArray[Any], scale: float | None, most: float) -> None:
        source = make_source("own", RawSet(values, np.array([0, 1])))
        constants = find_constants(source, np.array([0]), DataConfig(source="own", scale=scale))
        assert constants.features(source.records.inputs).max() == most
        assert constants.divisor == (scale or 1)

    def test_fractions_have_no_scale(self) -> None:
        source = make_source("own", RawSet(np.ones((2, 2)), np.array([0, 1])))
        with pytest.raises(ConfigError, match=r"data\.scale=255: the features of source 'own'"):
            find_constants(source, np.array([0]), DataConfig(source="own", scale=255))

    @pytest.mark.parametrize("labels", [["3", "4", " 3 "], [3, 4, 3], [3.0, 4.0, 3.0]], ids=str)
    def test_labels_are_text_and_numbers_of_one_form(self, labels: list[Any]) -> None:
        source = make_source("own", RawSet(np.ones((3, 1)), np.array(labels)))
        assert label_space(source, DataConfig(source="own")) == ("3", "4")
        assert numbered(source.records.labels, ("4", "3")).tolist() == [1, 0, 1]

    def test_text_with_a_point_is_the_class_of_that_number(self) -> None:
        source = make_source("own", RawSet(np.ones((3, 1)), np.array(["3.0", "4", "3"])))
        assert numbered(source.records.labels, ("4", "3")).tolist() == [1, 0, 1]
        with pytest.raises(DataError, match=r"labels '3' and '3\.0' spell one number in two ways"):
            label_space(source, DataConfig(source="own"))

    def test_codes_are_not_numbers(self) -> None:
        source = make_source("own", RawSet(np.ones((4, 1)), np.array(["12", "012", "1.2e1", "+12"])))
        classes = label_space(source, DataConfig(source="own"))
        assert sorted(classes) == ["+12", "012", "1.2e1", "12"]
        assert sorted(numbered(source.records.labels, classes).tolist()) == [0, 1, 2, 3]
        assert numbered(source.records.labels, ("12", "7")).tolist() == [0, 2, 2, 2], "none is taken for 12"

    def test_the_order_of_the_settings_is_that_of_the_numbers(self, tmp_path: Path) -> None:
        form = FORMS["csv, text"]
        source = form.write(tmp_path, form.records(0))
        one, other = (
            splitting.build_scenario(settings(form, source, classes=classes, gap="none"), 0)
            for classes in (("ash", "birch", "yew"), ("yew", "birch", "ash"))
        )
        assert torch.equal(one.test.labels, 2 - other.test.labels)


def test_the_pool_is_no_larger_than_it_must_be() -> None:
    """Without a gap nothing is passed over; with half of the classes rare, little more than must be."""
    labels = np.random.default_rng(0).integers(0, 10, 2000)
    config = {"source": "own", "public_records": 200, "validation_records": 100, "proxy_records": 100}
    passed_over: dict[str, int] = {}
    check: Callable[[str], DataConfig] = lambda gap: DataConfig(**config, test_records=100, gap=gap)  # noqa: E731
    for gap in ("none", "style", "withheld"):
        wanted = check(gap)
        sizes = public_sizes(wanted, len(labels))
        classes = choose_gap_classes(wanted, 10, Stream.GAP.generator(0))
        public = draw_public_sets(labels, wanted, sizes, classes, classes=10, seed=0, names=None)[1]
        passed_over[gap] = len(public) - sizes.total
    assert passed_over["none"] == passed_over["style"] == 0
    assert 250 <= passed_over["withheld"] <= 350


def test_records_of_one_name_are_public_together() -> None:
    """Every class folder may hold a ``0.png``: one more changes nobody else's role."""
    rng = np.random.default_rng(0)
    labels, config = rng.integers(0, 3, 300), settings(FORMS["csv"], "own")
    names = tuple(f"{number // 3}.png" for number in range(300))
    sizes, gap = public_sizes(config, 300), (1,)

    def drawn(count: int) -> tuple[list[int], set[str]]:
        sets, pool = draw_public_sets(
            labels[:count], config, sizes, gap, classes=3, seed=0, names=names[:count]
        )
        return sets.shown.tolist(), {names[number] for number in pool}

    sets, pool = drawn(300)
    assert len(pool) * 3 == len(
        draw_public_sets(labels, config, sizes, gap, classes=3, seed=0, names=names)[1]
    )
    last = max(number for number in range(300) if names[number] not in pool)
    assert drawn(last) == drawn(last + 1)
    assert len(sets) == sizes.total
