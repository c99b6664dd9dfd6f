"""Where records come from: one name, path or function to one ``Source``."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from privkd.config import Config, DataConfig
from privkd.data.columns import UNLABELLED, Beside, labelled, refuse_columns
from privkd.data.constants import PUBLIC_SOURCES
from privkd.data.dataset import Array, RawSet, Source, make_source
from privkd.data.delimited import SUFFIXES, load_csv
from privkd.data.docstrings import LIBRARIES, load_docstrings
from privkd.data.folders import holds
from privkd.data.idx import find_idx, load_idx_folder, load_idx_images
from privkd.data.images import IMAGE_SUFFIXES, load_image_folder, load_images
from privkd.data.leaf import leaf_files, load_leaf, looks_like_leaf
from privkd.data.parquet import load_parquet
from privkd.data.saved import is_saved, load_saved
from privkd.data.tabular import load_npz
from privkd.data.text import TEXT_SUFFIXES, load_json_lines, load_text_folder, load_texts
from privkd.errors import ConfigError, DataError, one_line
from privkd.plugins import Registry, plugin_file, users_callable

_DOTTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_WORD = re.compile(r"[\w-]+")
"""Only this asks installed plug-ins for a source of that name: no file ``data.csv`` does."""


def is_function_name(source: str) -> bool:
    """Whether ``source`` is spelt ``package.module:function``."""
    return _DOTTED.fullmatch(source) is not None


def load_function(source: str, config: DataConfig) -> Source:
    """The records of the function that ``source`` names, imported from the working directory too.

    See `records_of`.

    Raises:
        DataError: it cannot be imported, fails, or returns something else.
    """
    return records_of(users_callable(source, "source", DataError), source, config)


def records_of(function: Callable[[], Any], source: str, config: DataConfig) -> Source:
    """Call the function, which returns ``(inputs, labels)`` as arrays, tensors or lists; inputs may be texts.

    With ``data.group``, which then may be any name, it returns ``(inputs, labels, groups)``.

    It must return the same records each time, or a run cannot be repeated.

    Raises:
        DataError: it fails, or returns something else.
    """
    try:
        returned = function()
    except (Exception, SystemExit) as error:
        raise DataError(
            f"source {source!r}: failed when called without arguments ({one_line(error)})"
        ) from error
    if not labelled(config):
        inputs = _array(returned[0] if isinstance(returned, tuple) and returned else returned, source)
        records, taken = RawSet(inputs, inputs), {"label": UNLABELLED}
        return make_source(source, records, taken=taken, tokens=config.tokens, labelled=False)
    grouped = config.group is not None and not isinstance(config, Beside)
    wanted = "(inputs, labels, groups), as data.group is set" if grouped else "(inputs, labels)"
    if not isinstance(returned, tuple | list) or len(returned) != (3 if grouped else 2):
        raise DataError(f"source {source!r}: returned {type(returned).__name__}; return {wanted}")
    inputs, labels, *groups = (_array(value, source) for value in returned)
    taken = {"label": "the second that the function returned"}
    if groups:
        taken["group"] = "the third that the function returned"
    records = RawSet(inputs, labels, groups=groups[0] if groups else None)
    return make_source(source, records, classes=config.classes, taken=taken, tokens=config.tokens)


def _array(value: Any, source: str) -> Array:
    try:
        if isinstance(value, list) and value and isinstance(value[0], str):
            return np.array(value, dtype=object)  # an array of text takes the longest's room for each
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            return (value.float() if value.is_floating_point() else value).numpy()
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"source {source!r}: {one_line(error)}; return plain arrays or tensors") from error


_TABLE_PLACES = ("", "data")
"""Where the files may lie below the folder."""
_HELD_OUT = ("validation", "valid", "val", "dev")
_SHARD = re.compile(r".*-([0-9]{1,9})-of-([0-9]{1,9})\.parquet")


def table_folders(folder: Path) -> list[Path]:
    """The places below ``folder`` that hold the table of a ``train`` split."""
    return [folder / place for place in _TABLE_PLACES if split_tables(folder / place, "train")]


def split_tables(folder: Path, split: str) -> list[Path]:
    """The files of a split: ``train.parquet``, or the shards ``train-*.parquet`` in their order."""
    found = [*folder.glob(f"{split}.parquet"), *sorted(folder.glob(f"{split}-*.parquet"))]
    return [path for path in found if path.is_file()]


def load_table_folder(folder: Path, name: str, config: DataConfig) -> Source:
    """The ``train`` split of a folder, and its ``test`` split if there is one.

    Raises:
        ConfigError: as `load_parquet`.
        DataError: as `load_parquet`; a shard is missing, or a split is there twice.
    """
    places = table_folders(folder)
    if len(places) > 1:
        raise DataError(f"{folder}: training tables lie in it and in {places[1].name}; name one of the two")
    train, test = (_whole(split_tables(places[0], split), split) for split in ("train", "test"))
    taken = {}
    if test:
        taken["test split"] = _named(test)
    held_out = [path for split in _HELD_OUT for path in split_tables(places[0], split)]
    if held_out:
        taken["splits left out"] = _named(held_out)
    return load_parquet(train, name, config, test, taken)


def refuse_other_tables(folder: Path) -> None:
    """Refuse a folder whose Parquet files are not called as splits are.

    Raises:
        DataError: it holds such files, or one of its sub-folders does.
    """
    found = next(
        (path for pattern in ("*.parquet", "*/*.parquet") for path in sorted(folder.glob(pattern))), None
    )
    if found is not None:
        raise DataError(
            f"{folder}: {found.relative_to(folder)} is a table, but no file in it or in data/ is called "
            "train.parquet or train-*.parquet; rename it, or name one file or the folder that holds them"
        )


def _whole(paths: list[Path], split: str) -> list[Path]:
    """``paths``, of which none lacks."""
    shards = [found for path in paths if (found := _SHARD.fullmatch(path.name))]
    if len(paths) > 1 and len(shards) < len(paths):
        both = f"{paths[0].name} and {paths[1].name}"
        raise DataError(f"{paths[0].parent}: {both} could be the {split} split; keep one")
    numbers = [int(shard[1]) for shard in shards]
    if shards and (len({shard[2] for shard in shards}) > 1 or numbers != list(range(int(shards[0][2])))):
        raise DataError(
            f"{paths[0].parent}: {len(shards)} of {shards[0][2].lstrip('0') or '0'} shards of the {split} "
            "split are there; fetch them all, of one data set"
        )
    return paths


def _named(paths: Sequence[Path]) -> str:
    return ", ".join(repr(path.name) for path in paths[:2]) + (
        f" and {len(paths) - 2} more" if paths[2:] else ""
    )


_DIGITS_MAX = 16
_FILE_READERS: dict[str, Callable[[Path, str, DataConfig], Source]] = {
    ".npz": load_npz,
    **dict.fromkeys(SUFFIXES, load_csv),
    ".parquet": lambda path, name, config: load_parquet([path], name, config),
    ".jsonl": load_json_lines,
    ".ndjson": load_json_lines,
    ".json": lambda path, name, config: load_leaf([path], name, config),
}
_BYTES_MAX = 255
_TEN = tuple("0123456789")
_IDX = "*-ubyte*"
_PLACES = {"mnist": (".", "MNIST/raw", "raw"), "cifar10": (".", "cifar10")}
"""Where the files of a data set may lie below ``data_dir``."""


def load(config: DataConfig) -> Source:
    """Read the data set that ``config.source`` names.

    Raises:
        ConfigError: a setting is about what it has not.
        DataError: it is unknown, missing or malformed; the message names the file, the value and the cure.
    """
    found = _read(config)
    side = config.image_size
    if side is None:
        return found
    if found.records.colour is None:
        raise ConfigError(
            f"data.image_size={side}: source {config.source!r} has no image files to resize; leave it out"
        )
    said = f"{side} x {side}: the shorter side brought to it (bicubic), the longer cut at both ends"
    return replace(found, taken={**found.taken, "image size": said})


def _read(config: DataConfig) -> Source:
    if not is_named(config.source):
        return _from_path(config)
    own = is_function_name(config.source)
    refuse_columns(config, group=own, tokens=own)
    read = SOURCES.find(config.source)
    return load_function(config.source, config) if read is None else read(config)


def is_named(source: str) -> bool:
    """Whether ``source`` is one of `SOURCES` or ``package.module:function``, and so no path."""
    return is_function_name(source) or (_WORD.fullmatch(source) is not None and source in SOURCES)


def may_be_code(source: str) -> bool:
    """Whether the records of ``source``, as `located` spells it, come from code of the user's."""
    return source not in PUBLIC_SOURCES and not Path(source).is_absolute()


def located(config: Config) -> Config:
    """The same settings, with paths that any working directory finds: for the record of a run."""
    data, channel = config.data, config.channel
    sources = {"source": data.source, **data.own_files}
    by_name_alone = data.data_dir is None and not set(sources.values()) & set(_PLACES)
    data_dir = None if by_name_alone else (data.data_dir or Path()).absolute()
    tokenizer = None if data.tokenizer is None else data.tokenizer.absolute()
    credentials = {
        name: value.absolute()
        for name in ("ca", "certificate", "key")
        if (value := getattr(channel, name)) is not None
    }
    plugins = tuple(str(plugin_file(name) or name) for name in config.plugins)
    return config.with_encoders(_located_encoder).model_copy(
        update={
            "plugins": plugins,
            "data": data.model_copy(
                update={"data_dir": data_dir, "tokenizer": tokenizer}
                | {name: _located(source, data.data_dir) for name, source in sources.items()}
            ),
            "channel": channel.model_copy(update=credentials),
        }
    )


def _located(source: str, data_dir: Path | None) -> str:
    path = None if is_named(source) else _existing(source, data_dir)
    return source if path is None else str(path.absolute())


def _located_encoder(name: str) -> str:
    return name if ":" in name else str(Path(name).expanduser().absolute())


def data_files(config: DataConfig) -> dict[str, Path]:
    """The files that the data are read from, by their names below their folder, sorted.

    Those beside ``config.source`` are below ``data.public``, ``data.proxy`` and ``data.test``; a tokenizer
    that is brought along is ``data.tokenizer``.

    Of a folder these are its IDX files, else its Parquet files, else all files below it that are not hidden:
    a reader may look at fewer. Of an embedded data set, a function, or what is not there, there are none.
    """
    beside = {
        f"data.{role}/{name}": path
        for role, source in config.own_files.items()
        for name, path in _files_of(source, config.data_dir).items()
    }
    tokenizer = {} if config.tokenizer is None else {"data.tokenizer": config.tokenizer}
    return _files_of(config.source, config.data_dir) | beside | tokenizer


def _files_of(source: str, data_dir: Path | None) -> dict[str, Path]:
    if source in _PLACES:
        folders = [folder for folder in _places(source, data_dir) if _training_files(folder)]
        return _files_in(folders[0]) if folders else {}
    path = None if is_named(source) else _existing(source, data_dir)
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
    # Imported here: a device, which has records of its own, is installed without it.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    records = RawSet(bunch.images.astype(np.uint8), bunch.target)
    return _public(make_source("digits", records, taken={"label": "as published"}), _DIGITS_MAX)


def _docstrings() -> Source:
    return replace(load_docstrings(), classes=tuple(LIBRARIES))


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
            f"expected {', '.join(SOURCES)}, a path or package.module:function"
        )
    if path.is_dir():
        return _from_folder(path, config)
    reader = _FILE_READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: unknown format {path.suffix!r}; expected one of {', '.join(_FILE_READERS)}, or a folder"
        )
    suffix = path.suffix.lower()
    named, arrays, lines = suffix != ".json", suffix == ".npz", suffix in SUFFIXES
    table = lines or suffix == ".parquet"
    refuse_columns(config, label=named, lines=lines, table=table, text=named and not arrays, tokens=arrays)
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
        read_idx_of = load_idx_folder if labelled(config) else load_idx_images
        return read_idx_of(folder, str(folder))
    if is_saved(folder):
        refuse_columns(config, label=True, text=True)
        return load_saved(folder, str(folder), config)
    if table_folders(folder):
        refuse_columns(config, label=True, table=True, text=True)
        return load_table_folder(folder, str(folder), config)
    if looks_like_leaf(leaf := leaf_files(folder)):
        refuse_columns(config)
        return load_leaf(leaf, str(folder), config, leaf_files(folder, "test"))
    refuse_other_tables(folder)
    refuse_columns(config)
    if holds(folder, TEXT_SUFFIXES) and not holds(folder, IMAGE_SUFFIXES):
        read_texts_of = load_text_folder if labelled(config) else load_texts
        return read_texts_of(folder, str(folder))
    read_images_of = load_image_folder if labelled(config) else load_images
    return read_images_of(folder, str(folder), config.image_size)


SOURCES: Registry[Callable[[DataConfig], Source]] = Registry(
    "data.source",
    {
        "digits": lambda _: _digits(),
        "docstrings": lambda _: _docstrings(),
        "mnist": lambda config: _mnist(config.data_dir),
        "cifar10": _cifar10,
    },
)
"""Data sets that have a name of their own."""

F = TypeVar("F", bound=Callable[[], Any])


def register(name: str) -> Callable[[F], F]:
    """Add the decorated function to `SOURCES`: a data set that ``data.source`` may name; see `records_of`.

    Raises:
        ConfigError: the name is taken.
    """

    def enter(function: F) -> F:
        SOURCES.add(name, lambda config: records_of(function, name, config), function)
        return function

    return enter
