"""Data sets of every form, and those that differ from them in one private record."""

import io
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

CLASSES = 3
RECORDS = 200
TEXT = ("ash", "birch", "yew")


@dataclass(frozen=True)
class Record:
    """One record of a file; ``name`` is what an image's file is called."""

    values: NDArray[Any]
    label: str
    name: str


@dataclass(frozen=True)
class Form:
    """How a data set lies on the disk: ``write(folder, records)`` returns ``data.source``.

    ``high`` is a value out of the range of the others, ``foreign`` a label that is no class, ``settings`` are
    what else it is read by.
    """

    write: Callable[[Path, Sequence[Record]], str]
    draw: Callable[[np.random.Generator], NDArray[Any]]
    high: float
    labels: tuple[str, ...] = ("0", "1", "2")
    foreign: str = "9"
    images: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def records(self, seed: int) -> list[Record]:
        """A data set of this form, the first class twice as common as the others."""
        rng = np.random.default_rng(seed)
        return [self.record(rng, number) for number in range(RECORDS)]

    def record(self, rng: np.random.Generator, number: int) -> Record:
        """One more record."""
        label = self.labels[max(0, int(rng.integers(CLASSES + 1)) - 1)]
        return Record(self.draw(rng), label, f"{number:04d}.png")


def _arrays(records: Sequence[Record]) -> tuple[NDArray[Any], NDArray[Any]]:
    return np.stack([record.values for record in records]), np.array([record.label for record in records])


def _npz(folder: Path, records: Sequence[Record]) -> str:
    inputs, labels = _arrays(records)
    np.savez(folder / "own.npz", x=inputs, y=labels)
    return str(folder / "own.npz")


def _numbered_npz(folder: Path, records: Sequence[Record]) -> str:
    inputs, labels = _arrays(records)
    np.savez(folder / "own.npz", x=inputs, y=labels.astype(np.int64))
    return str(folder / "own.npz")


def _function(folder: Path, records: Sequence[Record]) -> str:
    module = ModuleType(f"own_records_{abs(hash(folder))}")
    inputs, labels = _arrays(records)
    module.load = lambda: (inputs, labels.tolist())  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    return f"{module.__name__}:load"


def _csv(folder: Path, records: Sequence[Record]) -> str:
    lines = [",".join([*map(str, record.values.tolist()), record.label]) for record in records]
    (folder / "own.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "own.csv")


def _csv_with_header(folder: Path, records: Sequence[Record]) -> str:
    path = Path(_csv(folder, records))
    names = [f"feature{number}" for number in range(records[0].values.size)]
    path.write_text(",".join([*names, "label"]) + "\n" + path.read_text())
    return str(path)


def _csv_of_words(folder: Path, records: Sequence[Record]) -> str:
    """Numbers, some of them missing, beside categories and flags in words."""

    def cells(values: Sequence[float]) -> list[str]:
        known = 0 <= values[1] < 1
        return [
            "NA" if values[0] < 0.1 else str(values[0]),
            TEXT[int(3 * values[1])] if known else "unheard of",
            ["no", "Yes"][int(2 * values[2])] if known else "perhaps",
            "" if values[3] < 0.1 else f"code {int(3 * values[3])}",
        ]

    lines = [",".join([*cells(record.values.tolist()), record.label]) for record in records]
    (folder / "own.csv").write_text("\n".join(["a,tree,wet,code,label", *lines]))
    return str(folder / "own.csv")


def _parquet(folder: Path, records: Sequence[Record]) -> str:
    inputs, labels = _arrays(records)
    columns = {f"feature{number}": column for number, column in enumerate(inputs.T)}
    return _table(folder, **columns, label=labels.tolist())


def _parquet_of_images(folder: Path, records: Sequence[Record]) -> str:
    images = [{"bytes": _png(record.values), "path": None} for record in records]
    return _table(folder, image=images, label=[record.label for record in records])


def _table(folder: Path, **columns: Any) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), folder / "own.parquet")
    return str(folder / "own.parquet")


def _folder(folder: Path, records: Sequence[Record]) -> str:
    for record in records:
        place = folder / "images" / record.label
        place.mkdir(parents=True, exist_ok=True)
        (place / record.name).write_bytes(_png(record.values))
    return str(folder / "images")


def _idx(folder: Path, records: Sequence[Record]) -> str:
    inputs, labels = _arrays(records)
    for kind, array in (("images-idx3", inputs), ("labels-idx1", labels.astype(np.uint8))):
        header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        (folder / f"train-{kind}-ubyte").write_bytes(header + array.tobytes())
    return str(folder)


def _png(pixels: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _flags(rng: np.random.Generator) -> NDArray[Any]:
    return rng.integers(0, 2, 6, dtype=np.uint8)


def _bytes(rng: np.random.Generator) -> NDArray[Any]:
    return rng.integers(0, 200, 6, dtype=np.uint8)


def _floats(rng: np.random.Generator) -> NDArray[Any]:
    return rng.random(6, dtype=np.float32)


def _grey(rng: np.random.Generator) -> NDArray[Any]:
    return rng.integers(0, 200, (5, 4), dtype=np.uint8)


def _colour(rng: np.random.Generator) -> NDArray[Any]:
    return rng.integers(0, 200, (5, 4, 3), dtype=np.uint8)


FORMS = {
    "npz, flags": Form(_numbered_npz, _flags, high=2),
    "npz, bytes": Form(_numbered_npz, _bytes, high=255),
    "npz, floats": Form(_npz, _floats, high=1e6, labels=TEXT, foreign="zebra"),
    "npz, images": Form(_numbered_npz, _grey, high=255),
    "npz, wide images": Form(_numbered_npz, lambda rng: _grey(rng).astype(np.int64), high=3000),
    "function": Form(_function, _bytes, high=255, labels=TEXT, foreign="aaa"),
    "csv": Form(_csv, _floats, high=-1e6),
    "csv, named": Form(_csv_with_header, _floats, high=-1e6),
    "csv, text": Form(_csv, _bytes, high=255, labels=TEXT, foreign="aaa"),
    "csv, words": Form(_csv_of_words, _floats, high=1e6, settings={"missing": "mean"}),
    "parquet": Form(_parquet, _bytes, high=255, labels=TEXT, foreign="0"),
    "parquet, images": Form(_parquet_of_images, _grey, high=255, images=True),
    "folder, grey": Form(_folder, _grey, high=255, labels=TEXT, foreign="aaa", images=True),
    "folder, colour": Form(_folder, _colour, high=255, images=True),
    "folder, flags": Form(
        _folder, lambda rng: rng.integers(0, 2, (5, 4), dtype=np.uint8), high=2, images=True
    ),
    "idx": Form(_idx, _grey, high=255),
}


def _other_label(form: Form, record: Record) -> str:
    return next(label for label in form.labels if label != record.label)


def _coloured(values: NDArray[Any]) -> NDArray[Any]:
    """A grey image in colour, and a coloured one in grey."""
    return np.stack([values, values // 2, 255 - values], axis=-1) if values.ndim == 2 else values[..., 0]


CHANGES: dict[str, Callable[[Form, Record], Record]] = {
    "features": lambda form, record: replace(record, values=record.values[::-1].copy()),
    "features out of range": lambda form, record: replace(
        record, values=np.full_like(record.values, form.high)
    ),
    "another label": lambda form, record: replace(record, label=_other_label(form, record)),
    "a label that is no class": lambda form, record: replace(record, label=form.foreign),
    "colour": lambda form, record: (
        replace(record, values=_coloured(record.values)) if form.images else record
    ),
}
"""What may happen to one record."""
