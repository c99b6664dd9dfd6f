"""Folders of Parquet files: splits by name, each in one file or in shards, as data hubs lay them out."""

import re
from collections.abc import Sequence
from pathlib import Path

from privkd.config import DataConfig
from privkd.data.parquet import load_parquet
from privkd.data.source import Source
from privkd.errors import DataError

_PLACES = ("", "data")
"""Where the files may lie below the folder."""
_HELD_OUT = ("validation", "valid", "val", "dev")
_SHARD = re.compile(r".*-([0-9]{1,9})-of-([0-9]{1,9})\.parquet")


def table_folders(folder: Path) -> list[Path]:
    """The places below ``folder`` that hold the table of a ``train`` split."""
    return [folder / place for place in _PLACES if split_tables(folder / place, "train")]


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
