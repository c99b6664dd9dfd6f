"""What users add to privkd under a name of their own, and the modules in which they do.

There is one `Registry` for each kind of thing: attacks, aggregation rules, data sources, export formats. A
plug-in is a module that enters something into one when it is imported, by the kind's ``register``. It is
named by the setting ``plugins`` or by ``--plugin``, or it is installed with an entry point of the group
``privkd.plugins``; those are looked at only where a name is not known, or where all names are asked for.
"""

import difflib
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Generic, TypeVar

from privkd.errors import ConfigError, InputError, PrivkdError, one_line
from privkd.own_code import import_from
from privkd.siblings import load_siblings

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
