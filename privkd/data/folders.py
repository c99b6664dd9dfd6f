"""Folders with one sub-folder for each class, and folders of splits that hold such."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from privkd.errors import DataError, one_line

_TRAIN, _TEST = ("train", "training"), ("test", "testing")
_HELD_OUT = ("val", "valid", "validation", "dev")
"""Names of folders that are splits: of records, of a test, and of what tests where there is none."""


@dataclass(frozen=True)
class Splits:
    """The folders that hold class folders: what is said of them is under ``said``."""

    train: Path
    test: Path | None
    said: Mapping[str, str]


def splits_of(folder: Path, what: str) -> Splits:
    """``folder`` itself, or its sub-folders where their names say that they are splits.

    Args:
        folder: of classes or of splits.
        what: the files that belong in it, for messages.

    Raises:
        DataError: some are called as splits are, and some are not; or a split has no class folders.
    """
    folders = sub_folders(folder)
    by_name = {path.name.lower(): path for path in folders}
    trains, tests, held = (
        [by_name[name] for name in names if name in by_name] for names in (_TRAIN, _TEST, _HELD_OUT)
    )
    if len(trains) != 1 or not tests + held:
        return Splits(folder, None, {})
    if len(trains + tests + held) < len(folders):
        other = next(path.name for path in folders if path not in trains + tests + held)
        raise DataError(
            f"{folder}: {trains[0].name} and {(tests + held)[0].name} are called as splits are, {other} is "
            "not; leave only splits or only classes in it"
        )
    if len(tests) > 1 or (not tests and len(held) > 1):
        raise DataError(f"{folder}: two folders could be the test split; remove one")
    test = (tests + held)[0]
    for split in (trains[0], test):
        if not sub_folders(split):
            raise DataError(
                f"{split}: a split, so its {what} belong in one sub-folder per class; there is none"
            )
    said = {"test split": f"folder {test.name!r}"}
    passed_over = [path.name for path in held if path != test]
    return Splits(
        trains[0], test, said | ({"left out": ", ".join(map(repr, passed_over))} if passed_over else {})
    )


def class_files(folder: Path, suffixes: Collection[str], what: str) -> tuple[list[Path], list[str]]:
    """The files of all class folders in ``folder``, and the label of each.

    Args:
        folder: of classes.
        suffixes: of the files, in lower case; others, and hidden ones, are passed over.
        what: the files, for messages.

    Raises:
        DataError: there are no class folders, or an empty one.
    """
    classes = sub_folders(folder)
    if not classes:
        raise DataError(
            f"{folder}: no class folders and no IDX files; put {what} in one sub-folder per class"
        )
    members = {path: files_in(path, suffixes) for path in classes}
    for path, files in members.items():
        if not files:
            raise DataError(f"{path}: holds no {what}; add some or remove the folder")
    return [file for path in classes for file in members[path]], [
        path.name for path in classes for _ in members[path]
    ]


def files_below(folder: Path, suffixes: Collection[str], what: str) -> list[Path]:
    """The files in ``folder`` and its sub-folders, whatever these are called; arguments as of `class_files`.

    Raises:
        DataError: there are none, or the sub-folders are splits.
    """
    if splits_of(folder, what).train != folder:
        raise DataError(f"{folder}: holds splits; name the folder of one of them")
    found = [file for place in (folder, *sub_folders(folder)) for file in files_in(place, suffixes)]
    if not found:
        raise DataError(f"{folder}: holds no {what}; give a folder that does")
    return found


def holds(folder: Path, suffixes: Collection[str]) -> bool:
    """Whether ``folder``, or a folder in it or in its splits, holds a file of these suffixes."""
    inner = [path for split in sub_folders(folder) for path in (split, *sub_folders(split))]
    return any(files_in(path, suffixes) for path in (folder, *inner))


def sub_folders(folder: Path) -> list[Path]:
    """The folders in ``folder`` that are not hidden, sorted."""
    return sorted(path for path in _listed(folder) if path.is_dir() and not path.name.startswith("."))


def files_in(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files in ``folder`` of these suffixes that are not hidden, sorted."""
    return sorted(
        path
        for path in _listed(folder)
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    )


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({one_line(error)}); make it readable") from error
