"""The import names that are installed beside ``privkd``: ours, whatever a user's working folder holds.

``attacks``, ``audits``, ``cli`` and ``papers`` are words that a project of the user's may well use for
modules of its own, and a folder that comes earlier on ``sys.path`` would win. So each of ours is loaded from
the folder that ``privkd`` itself was loaded from, by whoever is about to import it; what lies below a package
follows it.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

from privkd.errors import InputError

SIBLINGS = ("attacks", "audits", "cli", "papers")
_ROOT = Path(__file__).resolve().parents[1]


def load_siblings(*names: str) -> None:
    """Make ``import`` of each of ``names``, of `SIBLINGS`, mean ours from here on.

    Raises:
        InputError: something else of that name was imported before.
    """
    for name in names:
        loaded = sys.modules.get(name)
        if loaded is None:
            _load(name)
        elif not _is_ours(getattr(loaded, "__file__", None)):
            where = getattr(loaded, "__file__", None) or next(iter(getattr(loaded, "__path__", ())), "?")
            raise InputError(f"{where} is imported as {name!r}, which privkd has a module of: rename yours")


def _is_ours(file: str | None) -> bool:
    return file is not None and Path(file).resolve().is_relative_to(_ROOT)


def _load(name: str) -> None:
    spec = PathFinder.find_spec(name, [str(_ROOT)])
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r} in {_ROOT}: install privkd again", name=name)
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
