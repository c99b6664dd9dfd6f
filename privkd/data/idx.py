"""IDX files, the format of MNIST and its relatives, gzipped or plain.

An IDX file is a big-endian header (two zero bytes, a type code, the number of axes, one uint32 per
axis) and then the values. Only unsigned bytes (type 0x08) occur in these data sets.
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from privkd.data.columns import UNLABELLED
from privkd.data.dataset import MAX_VALUES, Array, RawSet, Source, make_source
from privkd.errors import DataError, one_line

_UNSIGNED_BYTE = 0x08
_GZIP_MAGIC = b"\x1f\x8b"
_DEFLATE_MAX_RATIO = 1032
_CHUNK = 1 << 20
_CURE = "fetch the file again"


def find_idx(folder: Path, split: str, kind: str) -> Path | None:
    """The file of a split (``train``, ``t10k``) and kind (``images``, ``labels``), plain before gzipped."""
    axes = {"images": "idx[34]", "labels": "idx1"}[kind]
    matches = [
        path
        for ending in ("", ".gz")
        for path in sorted(folder.glob(f"*{split}-{kind}[-.]{axes}-ubyte{ending}"))
        if path.is_file()
    ]
    return matches[0] if matches else None


def load_idx_images(folder: Path, name: str) -> Source:
    """The training images of a folder without their labels.

    Raises:
        DataError: there are none, or their file is damaged.
    """
    images = find_idx(folder, "train", "images")
    if images is None:
        raise DataError(f"{folder}: no train-images IDX file; give a folder that has it")
    inputs = read_idx(images)
    return make_source(name, RawSet(inputs, inputs), taken={"label": UNLABELLED}, labelled=False)


def load_idx_folder(folder: Path, name: str) -> Source:
    """The training files of a folder, with the test files where both are there.

    Raises:
        DataError: a file is missing, damaged, or does not match the others.
    """
    train = _load_pair(folder, "train")
    if train is None:
        raise DataError(f"{folder}: no train-images and train-labels IDX files; give a folder that has both")
    return make_source(name, train, _load_pair(folder, "t10k"), taken={"label": "the IDX file of labels"})


def _load_pair(folder: Path, split: str) -> RawSet | None:
    images, labels = (find_idx(folder, split, kind) for kind in ("images", "labels"))
    if images is None and labels is None:
        return None
    if images is None or labels is None:
        lacking = "images" if images is None else "labels"
        raise DataError(f"{folder}: {split}-{lacking} IDX file is missing; put it beside its counterpart")
    inputs, classes = read_idx(images), read_idx(labels)
    if inputs.ndim < 3 or classes.ndim != 1:
        raise DataError(
            f"{images}: shape {inputs.shape} with labels {classes.shape}; expected images, one label each"
        )
    if len(inputs) != len(classes):
        raise DataError(f"{images}: {len(inputs)} images but {len(classes)} labels in {labels.name}; {_CURE}")
    return RawSet(inputs, classes)


def read_idx(path: Path) -> Array:
    """The unsigned bytes of one IDX file, gzipped or not, in their declared shape.

    Memory is taken for what the file holds, never for what its header merely claims.

    Raises:
        DataError: unreadable, not IDX, not unsigned bytes, or shorter or longer than its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            zipped = file.read(2) == _GZIP_MAGIC
        with gzip.open(path) if zipped else path.open("rb") as stream:
            return _parse(stream, path, most=size * _DEFLATE_MAX_RATIO if zipped else size)  # type: ignore[arg-type]
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)}); {_CURE}") from error


def _parse(stream: BinaryIO, path: Path, most: int) -> Array:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != _UNSIGNED_BYTE or not 1 <= magic[3] <= 4:
        raise DataError(f"{path}: magic number 0x{magic.hex()} is not that of an IDX file of bytes; {_CURE}")
    header = stream.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise DataError(f"{path}: ends inside its header; {_CURE}")
    shape = tuple(int(size) for size in np.frombuffer(header, ">u4"))
    declared = math.prod(shape)
    if declared > min(most, MAX_VALUES):
        raise DataError(f"{path}: header declares shape {shape}, more bytes than the file can hold; {_CURE}")
    values = bytearray()
    while len(values) < declared and (chunk := stream.read(min(_CHUNK, declared - len(values)))):
        values += chunk
    if len(values) < declared:
        raise DataError(f"{path}: holds {len(values)} of the {declared} bytes it declares; {_CURE}")
    if stream.read(1):
        raise DataError(f"{path}: holds more than the {declared} bytes it declares; {_CURE}")
    return np.frombuffer(values, np.uint8).reshape(shape)
