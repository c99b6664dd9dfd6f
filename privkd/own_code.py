"""What users bring as ``package.module:name``: their data, their models."""

import importlib
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from privkd.errors import InputError, one_line
from privkd.siblings import SIBLINGS

_OURS = {"privkd", *SIBLINGS}
_INSTALLED = {"site-packages", "dist-packages"}


_HANDED_OVER = "python"
"""In the place of a module, in the names of what no other process can import."""
_HERE: dict[str, Any] = {}


def name_of(given: Any, what: str) -> str:
    """The name by which a setting asks `users_callable` for ``given``, or ``given`` itself where it is text.

    A function or a class of a module is named by that; any other has a name that holds in this process.

    Args:
        given: text, a path, or something to call.
        what: it is for, which names what has no name of its own.

    Raises:
        InputError: it is neither.
    """
    if isinstance(given, str | Path):
        return str(given)
    if not callable(given):
        raise InputError(f"{what}: {type(given).__name__} is neither a name nor something to call")
    module, name = getattr(given, "__module__", "__main__"), getattr(given, "__qualname__", "")
    name = name if name.isidentifier() else what
    if module != "__main__" and getattr(sys.modules.get(module), name, None) is given:
        return f"{module}:{name}"
    names = (f"{_HANDED_OVER}:{name}{number or ''}" for number in count())
    free = next(each for each in names if _HERE.get(each, given) is given)
    _HERE[free] = given
    return free


def hand_over(name: str, given: Any) -> None:
    """Give ``given`` the ``name`` that `name_of` gave it in another process."""
    if name.partition(":")[0] == _HANDED_OVER:
        _HERE[name] = given


def users_callable(path: str, what: str, error: type[InputError]) -> Any:
    """Import what ``path`` names; the working directory is importable.

    Args:
        path: ``package.module:name``.
        what: ``source`` or ``model``, for the message.
        error: raised, in one line, where it cannot be imported or called.
    """
    module, _, name = path.partition(":")
    if module == _HANDED_OVER:
        if path not in _HERE:
            raise error(f"{what} {path!r} was handed over in another process: give it to privkd.load again")
        return _HERE[path]
    import_from(Path.cwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as cause:  # A user's module may fail in any way.
        first = module.partition(".")[0]
        cure = f"; {first!r} is a name of privkd's own: rename your module" if first in _OURS else ""
        raise error(f"{what} {path!r}: cannot be imported ({one_line(cause)}){cure}") from cause
    if not callable(found):
        raise error(f"{what} {path!r}: is a {type(found).__name__}, not a function")
    return found


def make_importable(folders: Mapping[str, str]) -> None:
    """Import from ``folders``, as `OwnCode.folders`, first: where their marks are what they were.

    The working directory is next.
    """
    import_from(Path.cwd())
    for folder in reversed(list(folders)):
        if is_marked(Path(folder), folders):
            import_from(Path(folder))


def is_marked(folder: Path, folders: Mapping[str, str]) -> bool:
    """Whether ``folder`` is one of ``folders``, as `OwnCode.folders`, and its mark is what it was."""
    name, _, known = folders.get(str(folder), "").rpartition(" ")
    return (folder / name).is_file() and mark(folder / name) == known


def importable(name: str) -> Path | None:
    """The file of that name, below the first folder to import from that has it."""
    places = (Path(place) / name for place in (*sys.path, str(Path.cwd())))
    return next((path for path in places if path.is_file()), None)


def import_from(folder: Path) -> None:
    """Import from ``folder`` first, unless it is imported from already."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@dataclass(frozen=True)
class OwnCode:
    """The user's modules.

    Attributes:
        files: by their names below the folder that they were imported from.
        folders: those folders, each with the mark of a module in it: see `mark`.
    """

    files: dict[str, Path]
    folders: dict[str, str]


def mark(file: Path) -> str:
    """What tells a file from a copy of it: the inode, and when that was changed last, which nobody can set.

    A run's folder may come from anybody. Who made it up elsewhere can name a folder here, and put a module
    into it, but cannot know the mark that the module will have.
    """
    status = file.stat()
    return f"{status.st_ino}-{status.st_ctime_ns}"


def own_code(paths: Iterable[str]) -> OwnCode:
    """The modules that ``paths`` name, and what else was imported from the folders where they were found.

    Installed packages and privkd's own are left out; of a module that is installed, its package is all. A
    path without ``:`` names nothing of the user's, and a module that was not imported yet has no file.
    """
    files: dict[str, Path] = {}
    folders: dict[str, str] = {}
    for name in dict.fromkeys(path.partition(":")[0] for path in paths if ":" in path):
        file = _file_of(name)
        if file is None:
            continue
        folder = file.parents[name.count(".") + (file.stem == "__init__")]
        folders.setdefault(str(folder), f"{file.relative_to(folder).as_posix()} {mark(file)}")
        within = folder / name.partition(".")[0] if _is_installed(file) else folder
        for other in list(sys.modules):
            found = None if other.partition(".")[0] in _OURS else _file_of(other)
            if found == file or (found and _belongs(found, within, installed=_is_installed(file))):
                files[found.relative_to(folder).as_posix()] = found
    return OwnCode(dict(sorted(files.items())), folders)


def _belongs(file: Path, within: Path, *, installed: bool) -> bool:
    return file.is_relative_to(within) and (installed or not _is_installed(file))


def _is_installed(file: Path) -> bool:
    return bool(_INSTALLED & set(file.parts)) or file.is_relative_to(sysconfig.get_path("stdlib"))


def _file_of(module: str) -> Path | None:
    file = getattr(sys.modules.get(module), "__file__", None)
    return Path(file).resolve() if isinstance(file, str) and Path(file).is_file() else None
