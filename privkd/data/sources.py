"""Where records come from: one name, path or function to one ``Source``."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from privkd.config import DataConfig, RunConfig
from privkd.data.columns import refuse_columns
from privkd.data.constants import PUBLIC_SOURCES
from privkd.data.function import is_function_name, load_function
from privkd.data.idx import find_idx, load_idx_folder
from privkd.data.images import load_image_folder
from privkd.data.parquet import load_parquet
from privkd.data.source import RawSet, Source, make_source
from privkd.data.table_folder import (
    load_table_folder,
    refuse_other_tables,
    split_tables,
    table_folders,
)
from privkd.data.tabular import load_csv, load_npz
from privkd.errors import DataError

_DIGITS_MAX = 16
_FILE_READERS: dict[str, Callable[[Path, str, DataConfig], Source]] = {
    ".npz": load_npz,
    ".csv": load_csv,
    ".parquet": lambda path, name, config: load_parquet([path], name, config),
}
_BYTES_MAX = 255
_TEN = tuple("0123456789")
_IDX = "*-ubyte*"
_NAMED = ("digits", "mnist", "cifar10")
_PLACES = {"mnist": (".", "MNIST/raw", "raw"), "cifar10": (".", "cifar10")}
"""Where the files of a data set may lie below ``data_dir``."""


def load(config: DataConfig) -> Source:
    """Read the data set that ``config.source`` names.

    Raises:
        DataError: it is unknown, missing or malformed; the message names the file, the value and the cure.
    """
    if config.source in PUBLIC_SOURCES or is_function_name(config.source):
        refuse_columns(config)
    if config.source == "digits":
        return _digits()
    if config.source == "mnist":
        return _mnist(config.data_dir)
    if config.source == "cifar10":
        return _cifar10(config)
    if is_function_name(config.source):
        return load_function(config.source, config)
    return _from_path(config)


def located(config: RunConfig) -> RunConfig:
    """The same settings, with paths that any working directory finds: for the record of a run."""
    data, channel = config.data, config.channel
    named = data.source in PUBLIC_SOURCES or is_function_name(data.source)
    path = None if named else _existing(data.source, data.data_dir)
    source = data.source if path is None else str(path.absolute())
    by_name_alone = data.data_dir is None and data.source not in ("mnist", "cifar10")
    data_dir = None if by_name_alone else (data.data_dir or Path()).absolute()
    credentials = {
        name: value.absolute()
        for name in ("ca", "certificate", "key")
        if (value := getattr(channel, name)) is not None
    }
    return config.model_copy(
        update={
            "data": data.model_copy(update={"source": source, "data_dir": data_dir}),
            "channel": channel.model_copy(update=credentials),
        }
    )


def data_files(config: DataConfig) -> dict[str, Path]:
    """The files that ``config.source`` is read from, by their names below its folder, sorted.

    Of a folder these are its IDX files, else its Parquet files, else all files below it that are not hidden:
    a reader may look at fewer. Of an embedded data set, a function, or what is not there, there are none.
    """
    if config.source in _PLACES:
        folders = [folder for folder in _places(config.source, config.data_dir) if _training_files(folder)]
        return _files_in(folders[0]) if folders else {}
    named = config.source in _NAMED or is_function_name(config.source)
    path = None if named else _existing(config.source, config.data_dir)
    if path is None:
        return {}
    return _files_in(path) if path.is_dir() else {path.name: path}


def _training_files(folder: Path) -> list[Path]:
    tables = [path for place in table_folders(folder) for path in split_tables(place, "train")]
    images = find_idx(folder, "train", "images")
    return tables if images is None else [images]


def _files_in(folder: Path) -> dict[str, Path]:
    patterns = ["**/*"]
    if training := _training_files(folder):
        tables = [f"{path.relative_to(folder).as_posix()}/*.parquet" for path in table_folders(folder)]
        patterns = [_IDX] if training[0].suffix != ".parquet" else tables
    found = {path.relative_to(folder): path for pattern in patterns for path in folder.glob(pattern)}
    shown = [name for name in sorted(found) if not any(part.startswith(".") for part in name.parts)]
    return {name.as_posix(): found[name] for name in shown if found[name].is_file()}


def _digits() -> Source:
    bunch = load_digits()
    records = RawSet(bunch.images.astype(np.uint8), bunch.target)
    return _public(make_source("digits", records, taken={"label": "as published"}), _DIGITS_MAX)


def _mnist(data_dir: Path | None) -> Source:
    folders = _places("mnist", data_dir)
    for folder in folders:
        if find_idx(folder, "train", "images"):
            return _public(load_idx_folder(folder, "mnist"), _BYTES_MAX)
    raise DataError(_nowhere("mnist", "train-images IDX file", folders))


def _cifar10(config: DataConfig) -> Source:
    folders = _places("cifar10", config.data_dir)
    for folder in folders:
        if table_folders(folder):
            return _public(load_table_folder(folder, "cifar10", config), _BYTES_MAX)
    raise DataError(_nowhere("cifar10", "train.parquet", folders))


def _public(source: Source, divisor: float) -> Source:
    """With what all the world knows of a public data set: ten classes by number, and its features' range."""
    return replace(source, classes=_TEN, divisor=float(divisor))


def _places(source: str, data_dir: Path | None) -> list[Path]:
    return [(data_dir or Path()) / place for place in _PLACES[source]]


def _nowhere(source: str, file: str, folders: list[Path]) -> str:
    return f"source {source!r}: no {file} in {', '.join(map(str, folders))}; name its folder with --data-dir"


def _from_path(config: DataConfig) -> Source:
    path = _existing(config.source, config.data_dir)
    if path is None:
        raise DataError(
            f"source {config.source!r}: no such file or folder; "
            "expected digits, mnist, cifar10, a path or package.module:function"
        )
    if path.is_dir():
        return _from_folder(path, config)
    reader = _FILE_READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: unknown format {path.suffix!r}; expected one of {', '.join(_FILE_READERS)}, or a folder"
        )
    refuse_columns(config, label=True, header=path.suffix.lower() == ".csv")
    return reader(path, str(path), config)


def _existing(source: str, data_dir: Path | None) -> Path | None:
    """The path as written, from ``data_dir`` first where one is given."""
    try:
        written = Path(source).expanduser()
        candidates = [written] if data_dir is None else [data_dir / written, written]
        return next((path for path in candidates if source and path.exists()), None)
    except (OSError, RuntimeError):  # A name too long, or the home of nobody.
        return None


def _from_folder(folder: Path, config: DataConfig) -> Source:
    if find_idx(folder, "train", "images") or find_idx(folder, "train", "labels"):
        refuse_columns(config)
        return load_idx_folder(folder, str(folder))
    if table_folders(folder):
        refuse_columns(config, label=True)
        return load_table_folder(folder, str(folder), config)
    refuse_other_tables(folder)
    refuse_columns(config)
    return load_image_folder(folder, str(folder))
