"""Every format is read exactly, and every damaged file ends in one line that names it."""

import gzip
import io
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reading import in_public, read
from sklearn.datasets import load_digits

from privkd.config import DataConfig
from privkd.data import build_scenario
from privkd.data.dataset import RawSet, make_source
from privkd.errors import DataError

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
LABELS = np.array([3, 7, 3, 7, 9, 9], dtype=np.uint8)
NUMBERED = [0, 1, 0, 1, 2, 2]


def refuses(path: Path | str, *words: str, data_dir: Path | None = None) -> None:
    """The data set is refused in one line that holds all the words."""
    with pytest.raises(DataError) as caught:
        read(path, data_dir)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, images: bytes, labels: bytes, split: str = "train", ending: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, axes, content in (("images", 3, images), ("labels", 1, labels)):
        path = folder / f"{split}-{kind}-idx{axes}-ubyte{ending}"
        path.write_bytes(gzip.compress(content) if ending else content)


def encode(pixels: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def write_folder(root: Path, images: np.ndarray = IMAGES) -> Path:
    for number, (image, label) in enumerate(zip(images, LABELS, strict=True)):
        folder = root / f"class-{label}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encode(image))
    return root


def write_parquet(path: Path, **columns: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)
    return path


class TestEmbedded:
    def test_digits(self) -> None:
        source = read("digits")
        bunch = load_digits()
        assert source.inputs.shape == (1797, 1, 8, 8)
        assert source.inputs.dtype == torch.float32
        assert source.labels.dtype == torch.int64
        assert torch.equal(source.labels, torch.from_numpy(bunch.target))
        assert torch.equal(source.inputs[:, 0] * 16, torch.from_numpy(bunch.images).float())
        assert source.classes == 10

    @pytest.mark.parametrize("name", ["minst", "/nowhere/x.npz", "", "a" * 5000, "a\0b", "~nobody-here/x"])
    def test_an_unknown_source_names_the_choices(self, name: str, tmp_path: Path) -> None:
        refuses(name, repr(name), "digits, docstrings, mnist, cifar10", data_dir=tmp_path)

    def test_an_unknown_format_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(1))
        refuses(tmp_path / "x.pkl", "x.pkl", ".npz, .csv, .tsv, .tab, .parquet")


class TestIdx:
    @pytest.mark.parametrize("ending", ["", ".gz"])
    @pytest.mark.parametrize("place", [".", "raw", "MNIST/raw"])
    def test_mnist_is_found_and_read(self, tmp_path: Path, place: str, ending: str) -> None:
        write_idx(tmp_path / place, idx(IMAGES), idx(LABELS), ending=ending)
        write_idx(tmp_path / place, idx(IMAGES[:2]), idx(LABELS[:2]), split="t10k", ending=ending)
        source = read("mnist", tmp_path)
        assert torch.equal(source.inputs, torch.from_numpy(IMAGES).float()[:, None] / 255)
        assert source.labels.tolist() == LABELS.tolist()
        assert source.classes == 10, "whatever the files hold"
        assert source.test_inputs is not None
        assert source.test_labels is not None
        assert torch.equal(source.test_inputs, source.inputs[:2])
        assert source.test_labels.tolist() == LABELS[:2].tolist()

    def test_a_folder_of_idx_files_is_a_path(self, tmp_path: Path) -> None:
        write_idx(tmp_path, idx(IMAGES), idx(LABELS))
        source = read(tmp_path)
        assert len(source.labels) == 6
        assert source.test_inputs is None

    def test_a_folder_of_one_class_is_refused(self, tmp_path: Path) -> None:
        write_idx(tmp_path, idx(IMAGES), idx(np.full(6, 4, np.uint8)))
        refuses(tmp_path, "at least two classes")

    def test_missing_files_name_the_places(self, tmp_path: Path) -> None:
        refuses("mnist", str(tmp_path / "MNIST" / "raw"), "--data-dir", data_dir=tmp_path)
        write_idx(tmp_path, idx(IMAGES), idx(LABELS))
        (tmp_path / "train-labels-idx1-ubyte").unlink()
        refuses("mnist", "train-labels", "missing", data_dir=tmp_path)

    @pytest.mark.parametrize(
        ("images", "labels", "word"),
        [
            (idx(IMAGES)[:-1], idx(LABELS), "of the 120 bytes"),
            (idx(IMAGES) + b"x", idx(LABELS), "more than the 120 bytes"),
            (b"", idx(LABELS), "magic"),
            (b"\0\0\x08", idx(LABELS), "magic"),
            (b"PNG!" + bytes(200), idx(LABELS), "magic"),
            (idx(IMAGES, kind=0x0D), idx(LABELS), "magic"),
            (b"\0\0\x08\x03" + bytes(5), idx(LABELS), "header"),
            (b"\0\0\x08\x03" + struct.pack(">3I", *[2**32 - 1] * 3), idx(LABELS), "declares shape"),
            (b"\0\0\x08\x03" + struct.pack(">3I", 0, 28, 28), idx(LABELS[:0]), "no values"),
            (idx(IMAGES[:5]), idx(LABELS), "5 images but 6 labels"),
            (idx(LABELS), idx(LABELS), "expected images"),
        ],
    )
    @pytest.mark.parametrize("ending", ["", ".gz"])
    def test_damage_is_one_line(
        self, tmp_path: Path, images: bytes, labels: bytes, word: str, ending: str
    ) -> None:
        write_idx(tmp_path, images, labels, ending=ending)
        refuses("mnist", word, data_dir=tmp_path)

    @pytest.mark.parametrize("cut", [3, 11, 40, -9, -1])
    def test_truncated_gzip(self, tmp_path: Path, cut: int) -> None:
        write_idx(tmp_path, idx(IMAGES), idx(LABELS), ending=".gz")
        path = tmp_path / "train-images-idx3-ubyte.gz"
        path.write_bytes(path.read_bytes()[:cut])
        refuses("mnist", path.name, "fetch the file again", data_dir=tmp_path)

    def test_flipped_gzip_bytes_are_caught_by_the_checksum(self, tmp_path: Path) -> None:
        write_idx(tmp_path, idx(IMAGES), idx(LABELS), ending=".gz")
        path = tmp_path / "train-images-idx3-ubyte.gz"
        damaged = bytearray(path.read_bytes())
        damaged[60] ^= 0xFF
        path.write_bytes(damaged)
        refuses("mnist", path.name, data_dir=tmp_path)


class TestNpz:
    @pytest.mark.parametrize("names", [("x", "y"), ("X", "Y"), ("inputs", "labels"), ("data", "target")])
    def test_spellings(self, tmp_path: Path, names: tuple[str, str]) -> None:
        path = tmp_path / "a.npz"
        np.savez_compressed(path, **{names[0]: IMAGES, names[1]: LABELS})
        source = read(path)
        assert torch.equal(source.inputs, torch.from_numpy(IMAGES).float()[:, None] / 255)
        assert source.labels.tolist() == NUMBERED

    def test_a_given_test_split(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npz"
        np.savez(path, x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:1] // 255, y_test=LABELS[:1])
        source = read(path)
        assert source.test_inputs is not None
        assert source.test_inputs.max() <= 1 / 255, "the test split is scaled as the training split is"

    def test_relative_paths_start_at_data_dir(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=IMAGES, y=LABELS)
        assert len(read("a.npz", tmp_path).labels) == 6

    @pytest.mark.parametrize(
        ("arrays", "words"),
        [
            ({"x": IMAGES}, ["x and y", "found x"]),
            ({}, ["found none"]),
            ({"x": IMAGES, "y": LABELS[:3]}, ["6 inputs but 3 labels"]),
            ({"x": IMAGES, "y": LABELS / 2}, ["label 1.5 of record 0"]),
            ({"x": IMAGES, "y": np.eye(6)}, ["one class per record"]),
            ({"x": IMAGES, "y": np.array([0, 1, 0, 1, 0, np.nan])}, ["label nan of record 5"]),
            ({"x": IMAGES, "y": np.zeros(6)}, ["two classes"]),
            ({"x": IMAGES, "y": LABELS + 0j}, ["complex128"]),
            ({"x": np.array(["a"] * 6)[:, None], "y": LABELS}, ["not numbers"]),
            ({"x": LABELS, "y": LABELS}, ["[record, feature]"]),
            ({"x": np.ones((6, 0)), "y": LABELS}, ["no values"]),
            ({"x": np.ones((0, 3)), "y": LABELS[:0]}, ["no values"]),
            ({"x": np.array(1.0), "y": np.array(1)}, ["shape"]),
            ({"x": np.where(np.eye(6) > 0, np.nan, 1), "y": LABELS}, ["record 0, feature 0", "nan"]),
            ({"x": np.diag([0, 1, np.inf, 0, 0, 0]), "y": LABELS}, ["record 2, feature 2", "inf"]),
            ({"x": np.diag([0, 1, 1e300, 0, 0, 0]), "y": LABELS}, ["1e+300", "float32"]),
            ({"x": IMAGES.astype(object), "y": LABELS}, ["pickled"]),
            ({"x": IMAGES, "y": LABELS.astype(object)}, ["pickled"]),
        ],
    )
    def test_bad_contents(self, tmp_path: Path, arrays: dict[str, Any], words: list[str]) -> None:
        np.savez(tmp_path / "a.npz", **arrays)
        refuses(tmp_path / "a.npz", "a.npz", *words)

    def test_a_pickle_is_never_loaded(self, tmp_path: Path) -> None:
        class Bomb:
            def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
                return os.mkdir, (str(tmp_path / "exploded"),)

        np.savez(tmp_path / "a.npz", x=np.array([Bomb()] * 6, dtype=object), y=LABELS)
        (tmp_path / "b.npz").write_bytes(pickle.dumps(Bomb()))
        refuses(tmp_path / "a.npz")
        refuses(tmp_path / "b.npz")
        assert not (tmp_path / "exploded").exists()

    def test_damaged_archives(self, tmp_path: Path) -> None:
        np.savez_compressed(tmp_path / "whole.npz", x=IMAGES, y=LABELS)
        whole = (tmp_path / "whole.npz").read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 3] ^= 0xFF
        for content in (b"", b"PK", whole[:-30], whole[: len(whole) // 2], bytes(flipped)):
            (tmp_path / "a.npz").write_bytes(content)
            refuses(tmp_path / "a.npz", "a.npz")

    @pytest.mark.parametrize("shape", ["(100000000000, 100)", "(-6, 4)", "(6, 5)"])
    def test_a_lying_header_takes_no_memory(self, tmp_path: Path, shape: str) -> None:
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
        npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(24)
        np.savez(tmp_path / "a.npz", y=LABELS)
        with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
            archive.writestr("x.npy", npy)
        refuses(tmp_path / "a.npz", "x.npy", "declares shape")


class TestCsv:
    def write(self, folder: Path, text: str | bytes) -> Path:
        path = folder / "a.csv"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    @pytest.mark.parametrize(
        "text",
        [
            "1,2.5,cat\n3,4,dog\n-1,1e2,cat\n",
            "a,b,label\n1,2.5,cat\n3,4,dog\n-1,1e2,cat\n",
            "Class,a,b\ncat,1,2.5\ndog,3,4\ncat,-1,1e2\n",
            '\ufeffa,b,Label\r\n1, 2.5,"cat"\r\n\r\n3,4, dog\r\n-1,100,cat',
            "a,y,b\n1,cat,2.5\n3,dog,4\n-1,cat,100\n",
        ],
    )
    def test_layouts(self, tmp_path: Path, text: str) -> None:
        source = read(self.write(tmp_path, text))
        assert source.inputs.tolist() == [[1, 2.5], [3, 4], [-1, 100]]
        assert source.labels.tolist() == [0, 1, 0]

    def test_numbers_sort_as_numbers(self, tmp_path: Path) -> None:
        assert read(self.write(tmp_path, "0,10\n1,9\n2,-3\n")).labels.tolist() == [2, 1, 0]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", ["empty"]),
            ("\n\n", ["empty"]),
            ("a,b,label\n", ["no records"]),
            ("1\n2\n", ["one column"]),
            ("1;2;0\n3;4;1\n", ["commas"]),
            ("1,2,0\n3,1\n", ["line 2", "2 cells"]),
            ("1,2,0\n3,red,1\n", ["line 2", "'red'", "column 2"]),
            ("a,b,label\n1,,0\n3,4,1\n", ["missing in 'b' (1, first in record 0)", "--missing"]),
            (",2,0\n3,4,1\n", ["missing in 'column 1' (1, first in record 0)"]),
            ("1,2,0\n3,nan,1\n", ["missing in 'column 2' (1, first in record 1)"]),
            ("1,2,0\n3,inf,1\n", ["inf"]),
            ("1,2,0\n3,1e99,1\n", ["float32"]),
            ("1,2,0.5\n3,4,1\n", ["label 0.5"]),
            ("1,2,\n3,4,1\n", ["no label"]),
            ("1,2,0\n3,4,0\n", ["two classes"]),
            ("y,y,a\n0,1,1\n1,1,1\n", ["2 columns", "'y'"]),
            (",a,label\n0,1,0\n1,1,1\n", ["no name"]),
            (b"1,2,0\n\xff\xfe,4,1\n", ["UTF-8"]),
            (b"1,2,0\n3,\0,1\n", ["a.csv"]),
            ('1,2,"0\n3,4,1\n', ["a.csv"]),
            ("1," + "2" * 200_000 + ",0\n3,4,1\n", ["a.csv"]),
        ],
    )
    def test_bad_contents(self, tmp_path: Path, text: str | bytes, words: list[str]) -> None:
        refuses(self.write(tmp_path, text), "a.csv", *words)


class TestParquet:
    def images(self) -> list[dict[str, Any]]:
        return [{"bytes": encode(image), "path": f"{n}.png"} for n, image in enumerate(IMAGES)]

    def test_images_in_a_struct(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "a.parquet", img=self.images(), id=list("abcdef"), label=LABELS)
        source = read(path)
        assert torch.equal(source.inputs, torch.from_numpy(IMAGES).float()[:, None] / 255)
        assert source.labels.tolist() == NUMBERED

    @pytest.mark.parametrize("place", [".", "cifar10"])
    def test_cifar10_is_found_with_its_test_split(self, tmp_path: Path, place: str) -> None:
        colour = np.stack([IMAGES, IMAGES // 2, IMAGES // 3], axis=-1)
        rows = [{"bytes": encode(image), "path": None} for image in colour]
        write_parquet(tmp_path / place / "train.parquet", img=rows, label=LABELS)
        write_parquet(tmp_path / place / "test.parquet", img=rows[:2], label=LABELS[:2])
        source = read("cifar10", tmp_path)
        assert torch.equal(source.inputs, torch.from_numpy(colour).permute(0, 3, 1, 2) / 255)
        assert source.test_labels is not None
        assert source.test_labels.tolist() == LABELS[:2].tolist()
        assert source.classes == 10

    def test_a_path_in_place_of_bytes_is_never_opened(self, tmp_path: Path) -> None:
        (tmp_path / "secret.png").write_bytes(encode(IMAGES[0]))
        named = {"bytes": str(tmp_path / "secret.png"), "path": "a.png"}
        refuses(
            write_parquet(tmp_path / "a.parquet", img=[named, named], label=[0, 1]), "'img'", "not numeric"
        )

    def test_a_missing_struct_is_a_missing_image(self, tmp_path: Path) -> None:
        rows = [*self.images()[:5], None]
        refuses(write_parquet(tmp_path / "a.parquet", img=rows, label=LABELS), "1 images are missing")

    def test_numeric_columns(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "a.parquet", a=[1.5, 2.0], b=[True, False], kind=["z", "b"])
        source = read(path, label="kind")
        assert source.inputs.tolist() == [[1.5, 1], [2, 0]]
        assert source.labels.tolist() == [1, 0]

    @pytest.mark.parametrize(
        ("columns", "words"),
        [
            ({"a": [1.0, None], "y": [0, 1]}, ["'a'", "missing"]),
            ({"a": [1.0, 2.0], "y": [0, None]}, ["'y'", "missing"]),
            ({"a": [1.0, 2.0], "y": ["u", None]}, ["no label"]),
            ({"a": [1.0, np.inf], "y": [0, 1]}, ["inf"]),
            ({"a": [[1.0], [2.0]], "y": [0, 1]}, ["'a'", "not numeric"]),
            ({"y": [0, 1]}, ["one column"]),
            ({"a": [1.0, 2.0], "y": [0.5, 1]}, ["label 0.5"]),
            ({"a": [1.0, 2.0], "y": [[0], [1]]}, ["'y'", "no classes"]),
            ({"a": np.zeros(0), "y": np.zeros(0, np.int64)}, ["no records"]),
            ({"img": [b"junk", b"junk"], "label": [0, 1]}, ["row 0", "not a readable image"]),
            ({"img": [encode(IMAGES[0]), None], "label": [0, 1]}, ["1 images are missing"]),
            ({"img": [encode(IMAGES[0]), encode(IMAGES[1].T.copy())], "label": [0, 1]}, ["row 1", "5x4"]),
            ({"img": [encode(IMAGES[0])] * 2, "kind": [0, 1]}, ["no label column", "'img', 'kind'"]),
        ],
    )
    def test_bad_contents(self, tmp_path: Path, columns: dict[str, Any], words: list[str]) -> None:
        refuses(write_parquet(tmp_path / "a.parquet", **columns), "a.parquet", *words)

    def test_damaged_files(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "a.parquet", img=self.images(), label=LABELS)
        whole = path.read_bytes()
        for content in (
            b"",
            b"PAR1",
            whole[:-20],
            whole[: len(whole) // 2],
            whole[:4] + bytes(50) + whole[54:],
        ):
            path.write_bytes(content)
            refuses(path, "a.parquet")

    def test_a_missing_pyarrow_names_the_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_parquet(tmp_path / "a.parquet", a=[1.0, 2.0], y=[0, 1])
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        refuses(path, "pip install 'privkd[parquet]'")

    def test_missing_files_name_the_places(self, tmp_path: Path) -> None:
        refuses("cifar10", "train.parquet", str(tmp_path / "cifar10"), data_dir=tmp_path)


class TestImageFolder:
    def test_grey(self, tmp_path: Path) -> None:
        write_folder(tmp_path)
        (tmp_path / "class-3" / "notes.txt").write_text("no image")
        (tmp_path / ".cache").mkdir()
        source = read(tmp_path)
        order = np.argsort(LABELS, kind="stable")
        assert torch.equal(source.inputs, torch.from_numpy(IMAGES[order]).float()[:, None] / 255)
        assert source.labels.tolist() == [0, 0, 1, 1, 2, 2]

    def test_one_colour_image_makes_all_colour(self, tmp_path: Path) -> None:
        write_folder(tmp_path)
        colour = np.stack([IMAGES[0], IMAGES[1], IMAGES[2]], axis=-1)
        (tmp_path / "class-9" / "z.png").write_bytes(encode(colour))
        source = read(tmp_path)
        assert source.inputs.shape == (7, 3, 5, 4)
        assert torch.equal(source.inputs[-1] * 255, torch.from_numpy(colour).permute(2, 0, 1).float())
        assert torch.equal(source.inputs[0, 0], source.inputs[0, 2])

    def test_numbered_folders_sort_as_numbers(self, tmp_path: Path) -> None:
        for name in ("10", "9"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "a.png").write_bytes(encode(IMAGES[0]))
        assert read(tmp_path).labels.tolist() == [1, 0]

    def test_bad_folders(self, tmp_path: Path) -> None:
        root = tmp_path / "root"
        root.mkdir()
        refuses(root, "one sub-folder per class")
        (root / "a.png").write_bytes(encode(IMAGES[0]))
        refuses(root, "one sub-folder per class")
        write_folder(root)
        (root / "class-8").mkdir()
        refuses(root, "class-8", "no images")
        (root / "class-8" / "a.png").write_bytes(encode(IMAGES[0][:3]))
        refuses(root, "a.png", "4x3", "4x5")

    @pytest.mark.parametrize(
        "content",
        [b"", b"junk", encode(IMAGES[0])[:-30], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 5\n"],
    )
    def test_damaged_images(self, tmp_path: Path, content: bytes) -> None:
        write_folder(tmp_path)
        (tmp_path / "class-3" / "0.png").write_bytes(content)
        refuses(tmp_path, "0.png", "not a readable image")

    def test_sixteen_bits_are_refused(self, tmp_path: Path) -> None:
        write_folder(tmp_path)
        (tmp_path / "class-3" / "0.png").write_bytes(encode(IMAGES[0].astype(np.uint16) * 256))
        refuses(tmp_path, "0.png", "8 bits")

    def test_a_huge_image_is_refused_by_its_header(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "a.pgm").write_bytes(b"P5 100000 100000 255\n" + bytes(10))
        refuses(tmp_path, "a.pgm")


MODULE = """
import numpy as np, torch
def tensors(): return torch.arange(12.).reshape(6, 2).requires_grad_(), torch.tensor([1, 5, 1, 5, 1, 5])
def half(): return torch.ones(2, 3, dtype=torch.bfloat16), [False, True]
def lists(): return [[0, 1], [1, 0]], ["b", "a"]
def objects(): return np.ones((2, 3)), np.array(["b", "a"], dtype=object)
def flags(): return np.eye(2, dtype=np.uint8), [0, 1]
def channels_last(): return np.full((2, 8, 8, 3), 51, np.uint8), [0, 1]
def ragged(): return [[0, 1], [1]], [0, 1]
def single(): return np.ones((2, 3))
def mixed(): return np.ones((2, 3)), np.array(["b", 1], dtype=object)
def broken(): raise RuntimeError("first\\nsecond")
def leaves(): raise SystemExit(3)
def needs(argument): return None
number = 3
"""


class TestFunction:
    @pytest.fixture(autouse=True)
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "own_records.py").write_text(MODULE)
        (tmp_path / "own_damaged.py").write_text("def f(:\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.delitem(sys.modules, "own_records", raising=False)

    def test_tensors(self) -> None:
        source = read("own_records:tensors")
        assert torch.equal(source.inputs, torch.arange(12.0).reshape(6, 2))
        assert not source.inputs.requires_grad
        assert source.labels.tolist() == [0, 1] * 3

    @pytest.mark.parametrize("name", ["half", "lists", "objects", "flags"])
    def test_other_types(self, name: str) -> None:
        source = read(f"own_records:{name}")
        assert source.inputs.max() == 1
        assert sorted(source.labels.tolist()) == [0, 1]

    def test_byte_images_become_channels_first(self) -> None:
        source = read("own_records:channels_last")
        assert source.inputs.shape == (2, 3, 8, 8)
        assert source.inputs.unique().tolist() == [pytest.approx(0.2)]

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("own_records:nothing", ["cannot be imported", "nothing"]),
            ("own_absent:f", ["cannot be imported", "own_absent"]),
            ("own_damaged:f", ["cannot be imported", "SyntaxError"]),
            ("own_records:number", ["int, not a function"]),
            ("own_records:broken", ["RuntimeError: first"]),
            ("own_records:leaves", ["SystemExit"]),
            ("own_records:needs", ["without arguments", "argument"]),
            ("own_records:single", ["return (inputs, labels)"]),
            ("own_records:ragged", ["plain arrays"]),
            ("own_records:mixed", ["not classes"]),
        ],
    )
    def test_bad_functions(self, name: str, words: list[str]) -> None:
        refuses(name, name, *words)


class TestCorruption:
    """Whatever happens to a file's bytes, it is read or refused in one line."""

    @pytest.fixture(params=["npz", "csv", "parquet", "idx", "png", "jpeg"])
    def whole(self, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
        """A data set, and its file to damage."""
        source = tmp_path / f"a.{request.param}"
        if request.param == "npz":
            np.savez_compressed(source, x=IMAGES, y=LABELS.astype(str))
        elif request.param == "csv":
            source.write_text("a,b,label\n" + "".join(f"{row},{row / 3:.3f},{row % 3}\n" for row in range(9)))
        elif request.param == "parquet":
            rows = [{"bytes": encode(image), "path": "a.png"} for image in IMAGES]
            write_parquet(source, img=rows, label=[str(label) for label in LABELS])
        elif request.param == "idx":
            write_idx(source, idx(IMAGES), idx(LABELS), ending=".gz")
            return source, source / "train-images-idx3-ubyte.gz"
        else:
            damaged = write_folder(source) / "class-3" / f"z.{request.param}"
            damaged.write_bytes(encode(IMAGES[0], request.param))
            return source, damaged
        return source, source

    @pytest.mark.filterwarnings("error")
    def test_random_damage(self, whole: tuple[Path, Path]) -> None:
        source, path = whole
        assert len(read(source).labels) >= 6
        intact = path.read_bytes()
        rng = np.random.default_rng(0)
        messages = []
        for _ in range(200):
            damaged = bytearray(intact[: rng.integers(1, len(intact))] if rng.random() < 0.2 else intact)
            for place in rng.integers(len(damaged), size=rng.integers(1, 6)):
                damaged[place] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                read(source)
            except DataError as error:
                messages.append(str(error))
        assert messages
        assert not any("\n" in message for message in messages)


class TestTestSplit:
    def test_it_must_match_the_training_split(self) -> None:
        inputs = IMAGES.astype(np.float32)
        for test, word in [
            ((inputs, LABELS + 1), "does not occur"),
            ((inputs[:, :2], LABELS), "do not match"),
            ((inputs, LABELS.astype(str) + np.array("a")), "'3a' does not occur"),
            ((inputs[:2], LABELS), "2 inputs but 6 labels"),
            ((IMAGES, LABELS), "store both alike"),
        ]:
            with pytest.raises(DataError, match=word):
                in_public(make_source("own", RawSet(inputs, LABELS), RawSet(*test)))

    def test_inputs_are_copied(self) -> None:
        inputs = np.ones((2, 3), dtype=np.float32)
        source = make_source("own", RawSet(inputs, np.array([0, 1])))
        inputs[:] = 5
        assert source.records.inputs.max() == 1


@pytest.mark.data
class TestRealData:
    def test_mnist(self, data_dir: Path) -> None:
        source = read("mnist", data_dir)
        assert source.inputs.shape == (60_000, 1, 28, 28)
        assert source.labels[:5].tolist() == [5, 0, 4, 1, 9]
        assert source.inputs.mean() == pytest.approx(0.1307, abs=1e-4)
        assert source.test_inputs is not None
        assert len(source.test_inputs) == 10_000

    @pytest.mark.slow
    def test_cifar10(self, data_dir: Path) -> None:
        scenario = build_scenario(DataConfig(source="cifar10", data_dir=data_dir), 0)
        assert scenario.input_shape == (3, 32, 32)
        assert len(scenario.public) == 5000
        assert len(scenario.test) == 10_000
        assert torch.bincount(scenario.test.labels).tolist() == [1000] * 10

    def test_location30(self, data_dir: Path) -> None:
        source = read("location30/location30.npz", data_dir)
        assert source.inputs.shape == (5010, 446)
        assert source.classes == 30
        assert source.inputs.unique().tolist() == [0, 1]
