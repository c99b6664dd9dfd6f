"""What users bring: code of their own by name, and what they add under a name of their own.

A setting names the user's code as ``package.module:name``; what was handed over from Python and cannot be
imported has a name that holds in its process. There is one `Registry` for each kind of thing that can be
added: attacks, aggregation rules, channels, data sources, export formats. A plug-in is a module that enters
something into one when it is imported, by the kind's ``register``. It is named by the setting ``plugins`` or
by ``--plugin``, or it is installed with an entry point of the group ``privkd.plugins``; those are looked at
only where a name is not known, or where all names are asked for.

Of ``attacks``, ``audits``, ``cli`` and ``papers``, words that a user's project may use for modules of its
own, the ones that are installed beside ``privkd`` are imported, whatever the working folder holds.
"""

import difflib
import importlib
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from itertools import count
from pathlib import Path
from typing import Any, Generic, TypeVar

from privkd.errors import ConfigError, InputError, PrivkdError, one_line

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
    """Give ``given`` the ``name`` that `name_of` gave it in another process.

    Raises:
        InputError: the name is of something else, which needs nothing.
    """
    if name.partition(":")[0] == _HANDED_OVER:
        _HERE[name] = given
    elif name_of(given, "it") != name:
        raise InputError(f"the run has {name!r}, which was not handed over: give nothing in its place")


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
            again = "give it to privkd.load, or to privkd.resume, again"
            raise error(f"{what} {path!r} was handed over in another process: {again}")
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


GROUP = "privkd.plugins"
"""Of the entry points of installed plug-ins."""

T = TypeVar("T")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
"""Of what users add: fit for file names, and unlike a path or ``package.module:function``."""


class Registry(Generic[T]):
    """Everything of one kind, by name: ours, and what plug-ins add.

    Args:
        what: the setting or option that names one, for messages.
        ours: what is there without any plug-in.
        reserved: names that mean something else where one is asked for.
    """

    def __init__(self, what: str, ours: Mapping[str, T], reserved: Iterable[str] = ()) -> None:
        self._what = what
        self._values = dict(ours)
        self._reserved = frozenset(reserved)
        self._makers: dict[str, Callable[..., object]] = {}

    def add(self, name: str, value: T, maker: Callable[..., object]) -> None:
        """Enter ``value`` for the function or class ``maker``; the same one again takes its own place.

        Raises:
            ConfigError: the name is no word of letters, digits, ``-`` and ``_``, or is taken.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{self._what} {name!r}: expected a name of letters, digits, - and _")
        before = self._makers.get(name)
        if before is None and (name in self._values or name in self._reserved):
            raise ConfigError(f"{self._what} {name!r} is a name of privkd's own: choose another")
        if before is not None and _place(before) != _place(maker):
            raise ConfigError(f"{self._what} {name!r} is {_place(before)}: choose another name")
        self._values[name], self._makers[name] = value, maker

    def find(self, name: str) -> T | None:
        """What is called so, installed plug-ins included; ``None`` where nothing is."""
        if name not in self._values:
            load_installed()
        return self._values.get(name)

    def __getitem__(self, name: str) -> T:
        """What is called so.

        Raises:
            ConfigError: nothing is; it lists what there is, near matches first.
        """
        found = self.find(name)
        if found is None:
            raise ConfigError(f"{self._what}={name!r}: expected one of {nearest_first(name, self)}")
        return found

    def check(self, name: str) -> None:
        """Do nothing where something is called so. Raises as ``[]`` does."""
        self[name]

    def __iter__(self) -> Iterator[str]:
        """All names, ours first; installed plug-ins are loaded."""
        load_installed()
        return iter(tuple(self._values))

    def __contains__(self, name: object) -> bool:
        """Whether something is called so, installed plug-ins included."""
        return isinstance(name, str) and self.find(name) is not None

    def module(self, name: str) -> str | None:
        """The module of the plug-in that entered ``name``; ``None`` where it is ours, or not there."""
        maker = self._makers.get(name)
        return None if maker is None else maker.__module__

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Turn whatever a plug-in's code raises into one line for people.

        Raises:
            InputError: it names ``name`` and the error.
        """
        try:
            yield
        except PrivkdError:
            raise
        except Exception as error:
            if name not in self._makers:
                raise
            where = _place(self._makers[name])
            raise InputError(f"{self._what} {name!r}, {where}, failed: {one_line(error)}") from error


def nearest_first(name: str, known: Iterable[str]) -> list[str]:
    """All of ``known``: what is spelt much like ``name`` first, the rest by the alphabet."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names)
    return [*near, *(other for other in names if other not in near)]


def load_plugins(plugins: Iterable[str]) -> None:
    """Import each plug-in once, so that what it registers is known.

    Args:
        plugins: each ``package.module``, for which the working directory is importable, or a path that ends
            in ``.py``: files are told apart by their names.

    Raises:
        ConfigError: one cannot be imported, registers a name that is taken, or another file of its name is
            loaded.
    """
    for plugin in plugins:
        file = plugin_file(plugin)
        if not is_loaded(plugin):
            with _importing(f"plugin {plugin!r}"):
                _import(plugin)
        elif file is not None and file.exists() and not file.samefile(loaded := _loaded_file(plugin)):
            raise ConfigError(f"plugin {plugin!r}: {loaded} of the same name is loaded: rename one")


@cache
def load_installed() -> None:
    """Import the installed plug-ins, once in a process.

    Raises:
        ConfigError: one cannot be imported, or registers a name that is taken.
    """
    from importlib.metadata import entry_points

    for entry in entry_points(group=GROUP):
        with _importing(f"plugin {entry.name!r}, installed with {entry.dist and entry.dist.name}"):
            entry.load()


def is_loaded(plugin: str) -> bool:
    """Whether the plug-in was imported in this process."""
    return plugin_module(plugin) in sys.modules


def plugin_module(plugin: str) -> str:
    """The name under which ``sys.modules`` has the plug-in once it is loaded."""
    file = plugin_file(plugin)
    return plugin if file is None else f"privkd_plugin_{file.stem.replace('.', '_')}"


def plugin_file(plugin: str) -> Path | None:
    """The absolute path of a plug-in that is named by one; ``None`` of a module."""
    return Path(plugin).expanduser().absolute() if plugin.endswith(".py") else None


def _loaded_file(plugin: str) -> str:
    return str(sys.modules[plugin_module(plugin)].__file__)


def _import(plugin: str) -> None:
    file, name = plugin_file(plugin), plugin_module(plugin)
    if file is None:
        import_from(Path.cwd())
        importlib.import_module(name)
        return
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


@contextmanager
def _importing(what: str) -> Iterator[None]:
    load_siblings("attacks")
    try:
        yield
    except PrivkdError as error:
        raise ConfigError(f"{what}: {error}") from error
    except (Exception, SystemExit) as error:  # A user's module may fail in any way.
        raise ConfigError(f"{what}: cannot be imported ({one_line(error)})") from error


def _place(maker: Callable[..., object]) -> str:
    module = maker.__module__
    return f"{maker.__qualname__} in {getattr(sys.modules.get(module), '__file__', None) or module}"
