"""Folders that the Hugging Face library ``datasets`` saved to disk: Arrow files, and what their columns mean.

Nothing is fetched, and the library itself is not needed.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from privkd.config import DataConfig
from privkd.data.columns import LABEL_NAMES
from privkd.data.dataset import Source
from privkd.data.parquet import arrow_columns, load_parquet
from privkd.errors import DataError, one_line

_SPLITS, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"
_TRAIN, _TEST = "train", "test"
_LARGEST = 1 << 26
"""Bytes of what describes the data."""


def is_saved(folder: Path) -> bool:
    """Whether ``datasets`` saved a set, or a set in splits, in ``folder``."""
    return (folder / _SPLITS).is_file() or all((folder / name).is_file() for name in (_STATE, _INFO))


def load_saved(folder: Path, name: str, config: DataConfig) -> Source:
    """The ``train`` split of a folder, and its ``test`` split if there is one; or the one set that it holds.

    Classes are called as the column of labels says; where no column is called like one, and only one is of
    class labels, it is that. Images and other columns are taken as those of a Parquet file are.

    Raises:
        ConfigError: as `load_parquet`.
        DataError: as `load_parquet`; or what describes the files is damaged, or no split is that to train on.
    """
    splits = _split_folders(folder)
    train = _files(splits[_TRAIN])
    names = _class_names(splits[_TRAIN])
    strange = [column for column in names if column not in arrow_columns(train[0])]
    if strange:
        raise DataError(
            f"{splits[_TRAIN] / _INFO}: column {strange[0]!r} is not in the data; save them again"
        )
    label = _label(splits[_TRAIN], names) if config.label is None else None
    asked = config if label is None else config.model_copy(update={"label": label})
    left_out = [split for split in splits if split not in (_TRAIN, _TEST)]
    taken = {
        **({"test split": f"split {_TEST!r}"} if _TEST in splits else {}),
        **({"splits left out": ", ".join(map(repr, left_out))} if left_out else {}),
        **({"label": f"{label!r}, the only column of class labels"} if label is not None else {}),
    }
    test = _files(splits[_TEST]) if _TEST in splits else ()
    source = load_parquet(train, name, asked, test, taken, names)
    known = names.get(source.label or "")
    return source if known is None else replace(source, classes=known)


def _split_folders(folder: Path) -> dict[str, Path]:
    """The folders of the splits by name; that of a set without splits is the one to train on."""
    if not (folder / _SPLITS).is_file():
        return {_TRAIN: folder}
    names = _described(folder / _SPLITS).get("splits")
    if not isinstance(names, list) or not names or not all(map(_is_name, names)):
        raise DataError(f"{folder / _SPLITS}: names no splits; save the data again")
    splits = {name: folder / name for name in names}
    lacking = [name for name, path in splits.items() if not is_saved(path)]
    if lacking:
        raise DataError(f"{folder}: split {lacking[0]!r} is not there as a whole; save the data again")
    if len(splits) == 1:
        return {_TRAIN: next(iter(splits.values()))}
    if _TRAIN not in splits:
        raise DataError(
            f"{folder}: its splits are {', '.join(map(repr, names))}, and none is {_TRAIN!r}; name the "
            "folder of the one to train on"
        )
    return splits


def _files(folder: Path) -> list[Path]:
    """The Arrow files of one set, in their order."""
    listed = _described(folder / _STATE).get("_data_files")
    described = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    names = [str(each.get("filename")) for each in described]
    if not names or not all(_is_name(name) and name.endswith(".arrow") for name in names):
        raise DataError(f"{folder / _STATE}: names no Arrow files; save the data again")
    lacking = [name for name in names if not (folder / name).is_file()]
    if lacking:
        raise DataError(f"{folder}: {lacking[0]} is missing; save the data again")
    return [folder / name for name in names]


def _class_names(folder: Path) -> dict[str, tuple[str, ...]]:
    """The classes by name of each column of class labels."""
    features = _described(folder / _INFO).get("features")
    found: dict[str, tuple[str, ...]] = {}
    for column, kind in (features if isinstance(features, dict) else {}).items():
        if isinstance(kind, dict) and kind.get("_type") == "ClassLabel":
            names = kind.get("names")
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise DataError(f"{folder / _INFO}: column {column!r} names no classes; save the data again")
            if len({name.strip() for name in names}) < len(names):
                raise DataError(
                    f"{folder / _INFO}: column {column!r} names a class twice; call each otherwise"
                )
            found[column] = tuple(name.strip() for name in names)
    return found


def _label(folder: Path, names: Mapping[str, Any]) -> str | None:
    """The only column of class labels, where no column is called like a label."""
    columns = _described(folder / _INFO).get("features")
    called = any(column.lower() in LABEL_NAMES for column in (columns if isinstance(columns, dict) else {}))
    return next(iter(names)) if len(names) == 1 and not called else None


def _described(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            raise DataError(
                f"{path}: larger than {_LARGEST >> 20} MiB, which describes no data; save them again"
            )
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({one_line(error)}); save the data again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: describes no data; save them again")
    return found


def _is_name(name: Any) -> bool:
    """Whether it names something in the folder, and nothing beyond it."""
    return (
        isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and "\0" not in name
    )
