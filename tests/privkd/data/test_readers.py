"""What people hand over, and what becomes of it: nothing is guessed in silence, what is doubtful is asked."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from reading import in_public, read
from running import SMALL
from typer.testing import CliRunner

from cli import app
from privkd.config import DataConfig, load_config
from privkd.config.spelling import config_tree, parse_config
from privkd.data import load, tabular
from privkd.data.constants import find_constants
from privkd.data.dataset import RawSet, make_source
from privkd.data.images import decode_images
from privkd.data.sources import data_files
from privkd.errors import ConfigError, DataError, InputError

RNG = np.random.default_rng(0)


def taken(path: Path, **settings: Any) -> dict[str, str]:
    """What was taken for what."""
    return dict(load(DataConfig(source=str(path), **settings)).taken)


def asks(path: Path, *words: str, **settings: Any) -> None:
    """The data set is refused in one line that holds all the words."""
    with pytest.raises(InputError) as caught:
        read(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def csv(folder: Path, text: str) -> Path:
    path = folder / "a.csv"
    path.write_text(text)
    return path


def parquet(path: Path, metadata: Any = None, **columns: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"pandas": metadata})
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("pyarrow.parquet").write_table(table, path)
    return path


def encode(pixels: Any, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(size: int = 4) -> bytes:
    return encode(RNG.integers(0, 256, (size, size), dtype=np.uint8))


def decoded(*images: bytes) -> Any:
    return decode_images(images, [f"{number}" for number in range(len(images))])


class TestLabelColumn:
    TEXT = "outcome,deck,relatives\n1,3,0\n0,1,2\n1,2,2\n"

    def test_without_a_name_that_says_so_is_asked_for(self, tmp_path: Path) -> None:
        asks(csv(tmp_path, self.TEXT), "'outcome', 'deck', 'relatives'", "--label NAME")
        path = parquet(tmp_path / "a.parquet", outcome=[1, 0], fare=[0.5, 2.0])
        asks(path, "'outcome', 'fare'", "--label NAME")

    def test_is_the_one_set(self, tmp_path: Path) -> None:
        path = csv(tmp_path, self.TEXT)
        source = read(path, label="outcome")
        assert source.labels.tolist() == [1, 0, 1]
        assert source.inputs.tolist() == [[3, 0], [1, 2], [2, 2]]
        assert taken(path, label="outcome")["label"] == "'outcome', as set"
        assert read(path, label="relatives", drop="deck").inputs.tolist() == [[1], [0], [1]]

    def test_two_that_could_be_are_asked_about(self, tmp_path: Path) -> None:
        path = csv(tmp_path, "class,a,target\n1,3,0\n0,1,1\n")
        asks(path, "'class', 'target'", "--label NAME")
        assert read(path, label="target").labels.tolist() == [0, 1]
        assert read(path, drop="class").inputs.tolist() == [[3], [1]]

    def test_without_a_header_is_the_last_or_a_number(self, tmp_path: Path) -> None:
        path = csv(tmp_path, "1,5,0\n0,6,2\n1,7,2\n")
        assert taken(path)["label"] == "'column 3', the last, as there is no header"
        for name in ("1", "column 1"):
            assert read(path, label=name).labels.tolist() == [1, 0, 1]
        assert read(path, label="1", drop="column 3").inputs.tolist() == [[5], [6], [7]]

    def test_that_would_make_a_class_of_every_record_is_asked_about(self, tmp_path: Path) -> None:
        """A number of persons or a measurement at the end is no label; a deployment is given its classes."""
        path = csv(tmp_path, "".join(f"{k % 3 + 5},{k / 7:.3f},{1000 + 3 * k}\n" for k in range(90)))
        asks(path, "90 classes of 90 records", "--label N")
        assert read(path, label="1").classes == 3
        many = tuple(str(1000 + 3 * k) for k in range(90))
        assert read(path, classes=many).classes == 90

    @pytest.mark.parametrize("settings", [{"label": "b"}, {"drop": "b"}, {"label": "9"}, {"drop": "1"}])
    def test_one_that_is_not_there_is_named(self, tmp_path: Path, settings: dict[str, str]) -> None:
        asks(
            csv(tmp_path, self.TEXT),
            f"data.{next(iter(settings))}",
            "no such column",
            "'outcome'",
            **settings,
        )

    def test_cannot_be_left_out_as_well(self, tmp_path: Path) -> None:
        asks(csv(tmp_path, self.TEXT), "data.drop leaves it out", label="deck", drop=("deck",))

    def test_of_an_archive_is_an_array(self, tmp_path: Path) -> None:
        x, y, fine = RNG.random((6, 2)), np.arange(6) % 2, np.arange(6) % 3
        np.savez(tmp_path / "a.npz", x=x, y=y, fine=fine)
        assert read(tmp_path / "a.npz").classes == 2
        assert read(tmp_path / "a.npz", label="fine").classes == 3
        assert taken(tmp_path / "a.npz")["left out"] == "'fine'"
        np.savez(tmp_path / "c.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        assert read(tmp_path / "c.npz", label="y_train").test_labels is not None
        asks(tmp_path / "a.npz", "no such array", "x, y, fine", label="coarse")
        np.savez(tmp_path / "b.npz", x=x, y=y, target=fine)
        asks(tmp_path / "b.npz", "'y', 'target'", "--label")
        assert read(tmp_path / "b.npz", drop="y").classes == 3

    @pytest.mark.parametrize("settings", [{"label": "a"}, {"drop": "a"}, {"header": "yes"}])
    def test_of_what_has_no_columns_is_refused(self, settings: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=f"data.{next(iter(settings))}: source 'digits' has no columns"):
            load(DataConfig(**settings))

    def test_settings_are_read_as_they_are_written(self) -> None:
        config = load_config(None, ["data.label=3", "data.drop=4"], {"data.drop": "a, b c"})
        assert config.data.label == "3"
        assert config.data.drop == ("a", "b c")
        assert load_config(None, ["data.drop=4"]).data.drop == ("4",)
        assert parse_config(config_tree(config)) == config
        with pytest.raises(ConfigError, match=r"data\.header='perhaps'"):
            load_config(None, ["data.header=perhaps"])


class TestHeader:
    @pytest.mark.parametrize(
        "first",
        ["0,1,2,3", "1,2,3,4", "0,1,2,kind", "2019,2020,2021,label", "0.5,1.5,3,y", "0.5,red,3,1", "1,2,x,7"],
    )
    def test_that_could_be_a_record_is_asked_about(self, tmp_path: Path, first: str) -> None:
        asks(csv(tmp_path, f"{first}\n5,6,7,0\n7,8,9,1\n"), first, "data.header=yes or --set data.header=no")

    def test_of_numbers(self, tmp_path: Path) -> None:
        path = csv(tmp_path, "0,1,2,3\n5,6,7,0\n7,8,9,1\n")
        assert read(path, header="no").labels.tolist() == [2, 0, 1]
        asks(path, "no label column", header="yes")
        source = read(path, header="yes", label="3", drop="0")
        assert source.labels.tolist() == [0, 1]
        assert source.inputs.tolist() == [[6, 7], [8, 9]]

    @pytest.mark.parametrize(
        ("first", "header"),
        [("a,b,c,label", True), ("0,1,2,label", True), ("age,2019,2020,class", True), ("5,6,7,0", False),
         ("3,2,1,cat", False), ("0,10,20,30", False), ("-1,0,1,2", False)],
    )  # fmt: skip
    def test_that_is_none_or_is_one(self, tmp_path: Path, first: str, header: bool) -> None:
        path = csv(tmp_path, f"{first}\n5,6,7,dog\n7,8,9,bird\n")
        assert len(read(path).labels) == 3 - header
        assert taken(path)["header"].startswith("the first" if header else "none")

    def test_does_not_depend_on_the_records_below(self, tmp_path: Path) -> None:
        below = ["5,6,0\n7,8,1\n", "0,1,0\n1,2,1\n", "0.5,0.25,0\n1e3,-1,1\n"]
        assert len({taken(csv(tmp_path, f"3,4,0\n{rows}"))["header"] for rows in below}) == 1

    @pytest.mark.parametrize("name", ["", "Unnamed: 0"])
    def test_of_a_column_without_a_name(self, tmp_path: Path, name: str) -> None:
        """What pandas writes of an index: row numbers are no feature."""
        path = csv(tmp_path, f"{name},a,label\n0,5,0\n1,6,1\n")
        asks(path, "column 1 of the header has no name", "--drop 'column 1'")
        assert read(path, drop="column 1").inputs.tolist() == [[5], [6]]
        assert taken(path, drop="column 1")["left out"] == repr(name)

    def test_is_for_csv_alone(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=np.ones((2, 2)), y=[0, 1])
        asks(tmp_path / "a.npz", "data.header", header="no")


def test_an_archive_that_unpacks_to_hundreds_of_times_its_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before memory is taken; beyond a gigabyte, which stands at a megabyte here."""
    monkeypatch.setattr(tabular, "_FREELY", 1 << 20)
    x, y = np.zeros((8, 1 << 15)), np.arange(8) % 2
    np.savez_compressed(tmp_path / "trap.npz", x=x, y=y)
    asks(tmp_path / "trap.npz", "looks like a trap", "numpy.savez")
    np.savez(tmp_path / "plain.npz", x=x, y=y)
    assert read(tmp_path / "plain.npz").inputs.shape == x.shape
    np.savez_compressed(tmp_path / "small.npz", x=x[:, :100], y=y)
    assert read(tmp_path / "small.npz").inputs.shape == (8, 100)


class TestMissingLabels:
    @pytest.mark.parametrize("mark", ["NA", "nan", "null", "None", "?", ""])
    def test_are_refused_by_row(self, tmp_path: Path, mark: str) -> None:
        path = csv(tmp_path, f"a,label\n1,low\n2,{mark}\n3,high\n")
        asks(path, "record 1", "label", mark)
        asks(parquet(tmp_path / "a.parquet", a=[1, 2, 3], label=["low", mark, "high"]), "record 1", mark)

    def test_are_classes_where_they_are_named_so(self, tmp_path: Path) -> None:
        path = csv(tmp_path, "a,label\n1,mild\n2,none\n3,mild\n")
        assert read(path, classes="none,mild").labels.tolist() == [1, 0, 1]
        for name in ("none", "NA"):
            (tmp_path / "set" / name).mkdir(parents=True)
            (tmp_path / "set" / name / "a.png").write_bytes(picture())
        assert read(tmp_path / "set").classes == 2, "a folder was given its name on purpose"

    @pytest.mark.parametrize("absent", [None, float("nan")])
    def test_of_a_function(self, absent: Any) -> None:
        labels = np.array(["a", "b", absent], dtype=object)
        with pytest.raises(DataError, match="record 2 has no label"):
            make_source("own", RawSet(np.ones((3, 2)), labels))


class TestPandasIndex:
    COLUMNS: ClassVar = {"a": [0.5, 1.5], "y": [0, 1]}

    @pytest.mark.parametrize("name", ["__index_level_0__", "passenger"])
    def test_is_no_feature(self, tmp_path: Path, name: str) -> None:
        told = json.dumps({"index_columns": [name, {"kind": "range"}]})
        path = parquet(tmp_path / "a.parquet", told, **self.COLUMNS, **{name: [7, 8]})
        assert read(path).inputs.tolist() == [[0.5], [1.5]]
        assert taken(path)["left out"] == repr(name)

    @pytest.mark.parametrize("told", ["", "{", "[]", '{"index_columns": 3}', '{"index_columns": [null]}'])
    def test_is_known_by_its_name_whatever_the_metadata_say(self, tmp_path: Path, told: str) -> None:
        path = parquet(tmp_path / "a.parquet", told, **self.COLUMNS, __index_level_0__=[7, 8])
        assert read(path).inputs.tolist() == [[0.5], [1.5]]

    def test_may_be_the_label(self, tmp_path: Path) -> None:
        told = json.dumps({"index_columns": ["y"]})
        assert read(parquet(tmp_path / "a.parquet", told, **self.COLUMNS)).labels.tolist() == [0, 1]


class TestTableFolders:
    def shard(self, folder: Path, name: str, labels: Sequence[int]) -> None:
        parquet(folder / f"{name}.parquet", img=[{"bytes": picture()} for _ in labels], label=list(labels))

    @pytest.mark.parametrize("place", ["", "data"])
    def test_of_shards(self, tmp_path: Path, place: str) -> None:
        root = tmp_path / "set"
        self.shard(root / place, "train-00001-of-00002", [5, 6])
        self.shard(root / place, "train-00000-of-00002", [3, 4, 5, 6])
        self.shard(root / place, "test-00000-of-00001", [4, 4])
        self.shard(root / place, "validation-00000-of-00001", [3])
        source = read(root)
        assert source.labels.tolist() == [0, 1, 2, 3, 2, 3]
        assert source.test_labels is not None
        assert source.test_labels.tolist() == [1, 1]
        assert taken(root)["test split"] == "'test-00000-of-00001.parquet'"
        assert taken(root)["splits left out"] == "'validation-00000-of-00001.parquet'"
        assert len(data_files(DataConfig(source=str(root)))) == 4, "a run is bound to them all"

    def test_colour_in_one_shard_is_colour_in_all(self, tmp_path: Path) -> None:
        self.shard(tmp_path, "train-00000-of-00002", [0, 1])
        colour = encode(RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        parquet(tmp_path / "train-00001-of-00002.parquet", img=[{"bytes": colour}], label=[0])
        assert read(tmp_path).inputs.shape == (3, 3, 4, 4)

    def test_a_damaged_image_is_named_by_its_own_file(self, tmp_path: Path) -> None:
        self.shard(tmp_path, "train-00000-of-00002", [0, 1])
        rows = [{"bytes": picture()}, {"bytes": b"junk"}]
        parquet(tmp_path / "train-00001-of-00002.parquet", img=rows, label=[0, 1])
        asks(tmp_path, "train-00001-of-00002.parquet, row 1, column 'img'")

    def test_features_of_the_test_split_stand_as_in_training(self, tmp_path: Path) -> None:
        parquet(tmp_path / "train.parquet", a=[0.5, 1.0], b=[3, 4], y=[0, 1])
        parquet(tmp_path / "test.parquet", y=[0, 1], a=[0.5, 1.0], b=[3, 4])
        assert read(tmp_path).test_labels is not None
        parquet(tmp_path / "test.parquet", b=[3, 4], a=[0.5, 1.0], y=[0, 1])
        asks(tmp_path, "test.parquet", "another order")

    def test_that_lack_something(self, tmp_path: Path) -> None:
        self.shard(tmp_path / "a", "train-00000-of-00003", [0, 1])
        self.shard(tmp_path / "a", "train-00002-of-00003", [0, 1])
        asks(tmp_path / "a", "2 of 3 shards of the train split")
        self.shard(tmp_path / "b", "train", [0, 1])
        self.shard(tmp_path / "b", "train-00000-of-00001", [0, 1])
        asks(tmp_path / "b", "train.parquet and train-00000-of-00001.parquet", "keep one")
        self.shard(tmp_path / "c", "part-0", [0, 1])
        asks(tmp_path / "c", "part-0.parquet", "train.parquet or train-*.parquet")
        self.shard(tmp_path / "d" / "plain", "train-00000-of-00001", [0, 1])
        asks(tmp_path / "d", "plain/train-00000-of-00001.parquet", "the folder that holds them")
        self.shard(tmp_path / "e", "train-00000-of-00002", [0, 1])
        parquet(tmp_path / "e" / "train-00001-of-00002.parquet", pic=[picture()], label=[0])
        asks(tmp_path / "e", "train-00001-of-00002.parquet", "write them alike")


class TestImageFolders:
    def fill(self, folder: Path, count: int = 2) -> None:
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number}.png").write_bytes(picture())

    def test_splits_hold_classes(self, tmp_path: Path) -> None:
        for place in ("train/cat", "train/dog", "test/cat", "test/dog", "val/cat"):
            self.fill(tmp_path / place)
        source = read(tmp_path)
        assert source.labels.tolist() == [0, 0, 1, 1]
        assert source.test_labels is not None
        assert source.test_labels.tolist() == [0, 0, 1, 1]
        assert taken(tmp_path)["test split"] == "folder 'test'"
        assert taken(tmp_path)["left out"] == "'val'"

    def test_val_tests_where_nothing_else_does(self, tmp_path: Path) -> None:
        for place in ("train/cat", "train/dog", "val/dog"):
            self.fill(tmp_path / place)
        assert taken(tmp_path)["test split"] == "folder 'val'"

    def test_splits_are_no_classes(self, tmp_path: Path) -> None:
        for place in ("train", "test"):
            self.fill(tmp_path / place)
        asks(tmp_path, "train: a split", "one sub-folder per class")

    def test_what_may_be_either_is_asked_about(self, tmp_path: Path) -> None:
        for place in ("train", "test", "extra"):
            self.fill(tmp_path / place)
        asks(tmp_path, "train and test are called as splits are, extra is not")

    def test_a_train_may_be_a_class(self, tmp_path: Path) -> None:
        for place in ("train", "bus", "tram"):
            self.fill(tmp_path / place)
        assert read(tmp_path).classes == 3


class TestImages:
    def test_transparent_ones_lie_on_white(self) -> None:
        drawn = np.zeros((4, 4, 4), np.uint8)
        drawn[1, :, 3], drawn[2, :, 3] = 255, 128
        pixels, colour = decoded(encode(drawn))
        assert colour.tolist() == [True]
        assert pixels[0, :, 0].min() == 255, "nothing was drawn there"
        assert pixels[0, :, 1].max() == 0
        assert set(pixels[0, :, 2].ravel()) == {127}

    @pytest.mark.parametrize("mode", ["LA", "PA", "P", "L"])
    def test_of_every_kind(self, mode: str) -> None:
        drawn = np.zeros((4, 4, 4), np.uint8)
        drawn[1, :, 3] = 255
        image = Image.fromarray(drawn)
        if mode in ("LA", "PA"):
            whole = encode(image.convert(mode), "PNG" if mode == "LA" else "TIFF")
        else:
            grey = Image.fromarray(np.where(drawn[..., 3] > 0, 0, 200).astype(np.uint8))
            whole = encode(
                grey.convert(mode), transparency=200 if mode == "L" else grey.convert("P").getpixel((0, 0))
            )
        pixels, colour = decoded(whole)
        assert colour.tolist() == [mode in ("PA", "P")]
        assert (pixels[0, :, 0] == 255).all()
        assert (pixels[0, :, 1] == 0).all()

    def test_opaque_ones_stay_what_they_are(self) -> None:
        drawn = RNG.integers(0, 256, (4, 4, 4), dtype=np.uint8)
        drawn[..., 3] = 255
        assert np.array_equal(decoded(encode(drawn))[0][0], drawn[..., :3].transpose(2, 0, 1))

    @pytest.mark.parametrize("form", ["PNG", "TIFF"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_are_upright(self, orientation: int, form: str) -> None:
        turned = {
            1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: np.transpose,
            6: np.rot90, 7: lambda a: np.rot90(a.T, 2), 8: lambda a: np.rot90(a, -1),
        }[orientation]  # fmt: skip
        upright = RNG.integers(0, 256, (6, 4), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = encode(np.ascontiguousarray(turned(upright)), form, exif=exif)
        pixels, _ = decoded(encode(upright), stored)
        assert np.array_equal(pixels[0], pixels[1])

    def test_damaged_exif_turns_nothing(self) -> None:
        upright = RNG.integers(0, 256, (6, 4), dtype=np.uint8)
        assert np.array_equal(decoded(encode(upright, exif=b"Exif\0\0junk"))[0][0, 0], upright)

    def test_sizes_are_compared_upright(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        stored = encode(RNG.integers(0, 256, (6, 4), dtype=np.uint8), exif=exif)
        with pytest.raises(DataError, match="6x4 pixels, but the first image has 4x6"):
            decoded(encode(RNG.integers(0, 256, (6, 4), dtype=np.uint8)), stored)


class TestArrays:
    BYTES = RNG.integers(0, 256, (9, 5, 5, 3), dtype=np.uint8)
    LABELS = np.arange(9) % 3

    def source(self, inputs: Any) -> Any:
        return make_source("own", RawSet(inputs, self.LABELS))

    @pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, np.int64, np.uint16])
    def test_channels_come_first_whatever_the_type(self, kind: Any) -> None:
        as_bytes = in_public(self.source(self.BYTES))
        inputs = self.BYTES / 255 if np.dtype(kind).kind == "f" else self.BYTES
        found = in_public(self.source(inputs.astype(kind)))
        assert found.inputs.shape == as_bytes.inputs.shape == (9, 3, 5, 5)
        assert torch.allclose(found.inputs, as_bytes.inputs, atol=1e-3)

    def test_that_they_do_is_said(self) -> None:
        assert (
            self.source(self.BYTES / 255).taken["layout"]
            == "[3, 5, 5], channels first, of [5, 5, 3] in the data"
        )
        first = np.ones((9, 3, 5, 3))
        assert self.source(first).taken["layout"] == "[3, 5, 3], as it came"

    @pytest.mark.parametrize(
        ("factor", "kind"), [(1, np.int64), (1, np.int16), (257, np.uint16), (257, np.int32)]
    )
    @pytest.mark.parametrize("axes", [3, 4])
    def test_images_in_whole_numbers_are_scaled_as_bytes_are(self, factor: int, kind: Any, axes: int) -> None:
        images = self.BYTES[..., 0] if axes == 3 else self.BYTES[:, None, :, :, 0]
        images[0] = 255
        found = in_public(self.source((images.astype(np.int64) * factor).astype(kind)))
        assert torch.allclose(
            found.inputs.reshape(9, 5, 5), torch.from_numpy(images.reshape(9, 5, 5) / 255).float()
        )

    def test_others_must_be_given_a_scale(self) -> None:
        for low, high in ((-1, 255), (0, 70_000)):
            images = np.full((9, 1, 5, 5), high)
            images[3] = low
            with pytest.raises(
                ConfigError, match=r"from .* are neither of 8 nor of 16 bits; .* data\.scale=N"
            ):
                in_public(self.source(images))
        given = in_public(self.source(images), DataConfig(source="own", scale=70_000))
        assert given.inputs.max() == 1

    def test_private_ones_beyond_the_public_range_are_clamped(self) -> None:
        images = np.full((9, 1, 5, 5), 200)
        images[7], images[8] = 3000, -4
        source = self.source(images)
        constants = find_constants(source, np.arange(5), DataConfig(source="own"))
        assert constants.divisor == 255
        assert constants.features(source.records.inputs)[5:, 0, 0, 0].tolist() == pytest.approx(
            [200 / 255, 200 / 255, 1, 0]
        )

    def test_flags_of_every_type_stay(self) -> None:
        flags = np.arange(9 * 25).reshape(9, 1, 5, 5) % 2
        assert in_public(self.source(flags)).inputs.max() == 1

    def test_tables_stay_as_they_are(self) -> None:
        table = np.arange(18).reshape(9, 2) * 20
        assert in_public(self.source(table)).inputs.max() == 340


class TestImageColumn:
    def test_called_so_wins(self, tmp_path: Path) -> None:
        for other in ({"md5": [b"abc", b"def"]}, {"mask": [{"bytes": picture(3)}] * 2}):
            rows = [{"bytes": picture(6)} for _ in range(2)]
            path = parquet(tmp_path / "a.parquet", **other, image=rows, label=[0, 1])
            assert read(path).inputs.shape == (2, 1, 6, 6)
            assert taken(path)["image"] == "column 'image'"
            assert taken(path)["left out"] == repr(next(iter(other)))

    def test_a_struct_wins_over_bytes(self, tmp_path: Path) -> None:
        rows = [{"bytes": picture(6)} for _ in range(2)]
        path = parquet(tmp_path / "a.parquet", id=[b"a", b"b"], scan=rows, label=[0, 1])
        assert read(path).inputs.shape == (2, 1, 6, 6)

    def test_two_that_could_be_are_asked_about(self, tmp_path: Path) -> None:
        rows = [{"bytes": picture(6)} for _ in range(2)]
        path = parquet(tmp_path / "a.parquet", left=rows, right=rows, label=[0, 1])
        asks(path, "'left', 'right' could be the images", "--drop")
        assert read(path, drop="left").inputs.shape == (2, 1, 6, 6)

    def test_one_that_holds_none_is_named(self, tmp_path: Path) -> None:
        path = parquet(tmp_path / "a.parquet", md5=[b"abc", b"def"], a=[0.5, 1.0], label=[0, 1])
        asks(path, "row 0, column 'md5'")
        assert read(path, drop="md5").inputs.tolist() == [[0.5], [1.0]]


class TestSaid:
    def table(self, folder: Path) -> Path:
        rows = "".join(f"{k},{k % 7 / 7:.3f},{k % 5},{k % 3}\n" for k in range(400))
        return csv(folder, f"id,a,b,outcome\n{rows}")

    def options(self, path: Path) -> list[str]:
        words = [word for override in SMALL for word in ("--set", override)]
        return [
            "train",
            *words,
            "--set",
            "rounds=1",
            "--data",
            str(path),
            "--label",
            "outcome",
            "--drop",
            "id",
        ]

    WORDS: ClassVar = {
        "test split": "none came with the data",
        "header": "the first line names the columns",
        "label": "'outcome', as set",
        "features": "2 columns",
        "left out": "'id'",
        "layout": "[2], as it came",
        "scale": (
            "2 columns standardised to mean 0 and deviation 1, clipped at 5 deviations, by the public records"
        ),
        "gap": "simulated in the public sets: '0' rare; data.gap='none' leaves it out",
    }

    def test_with_the_plan(self, tmp_path: Path) -> None:
        options = [*self.options(self.table(tmp_path)), "--dry-run"]
        answer = CliRunner().invoke(app, [*options, "--json"])
        assert json.loads(answer.stdout)["plan"]["taken"] == self.WORDS
        lines = CliRunner().invoke(app, options).stdout.splitlines()
        for name, words in self.WORDS.items():
            assert f"data, {name}: {words}" in lines

    def test_in_the_run_and_its_report(self, tmp_path: Path) -> None:
        run = tmp_path / "run"
        answer = CliRunner().invoke(app, [*self.options(self.table(tmp_path)), "--out", str(run)])
        assert answer.exit_code == 0, answer.output
        assert "data, label: 'outcome', as set" in answer.stderr.splitlines()
        assert json.loads((run / "result.json").read_text())["taken"] == self.WORDS
        assert CliRunner().invoke(app, ["report", str(run)]).exit_code == 0
        assert json.loads((run / "report.json").read_text())["taken"] == self.WORDS
        assert "What in the data was taken for what" in (run / "report.md").read_text()

    def test_a_question_ends_in_one_line(self, tmp_path: Path) -> None:
        options = self.options(self.table(tmp_path))
        options = options[: options.index("--label")]
        answer = CliRunner().invoke(app, [*options, "--out", str(tmp_path / "run")])
        assert isinstance(answer.exception, InputError) or answer.exit_code == 2
        assert not (tmp_path / "run").exists()
