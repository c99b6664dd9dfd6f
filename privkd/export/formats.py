"""The forms in which a student leaves for its device, and what each needs. Light to import."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from privkd.errors import ConfigError
from privkd.plugins import Registry

if TYPE_CHECKING:
    from privkd.export.artefact import Format


@dataclass(frozen=True)
class Form:
    """A format before it is loaded.

    Attributes:
        suffix: of its files, such as ``.onnx``.
        needs: the modules that must be installed.
        make: loads it.
    """

    suffix: str
    needs: tuple[str, ...]
    make: "Callable[[], Format]"


def _torch() -> "Format":
    from privkd.export.torch_format import TorchFormat

    return TorchFormat()


def _onnx() -> "Format":
    from privkd.export.onnx_format import OnnxFormat

    return OnnxFormat()


def _executorch() -> "Format":
    from privkd.export.executorch_format import ExecutorchFormat

    return ExecutorchFormat()


FORMATS: Registry[Form] = Registry(
    "format",
    {
        "torch": Form(".pt2", (), _torch),
        "onnx": Form(".onnx", ("onnx", "onnxscript", "onnxruntime"), _onnx),
        "executorch": Form(".pte", ("executorch",), _executorch),
    },
)

F = TypeVar("F", bound="Callable[[], Format]")


def register(name: str, *, suffix: str, needs: tuple[str, ...] = ()) -> "Callable[[F], F]":
    """Add the decorated class to `FORMATS`: one that ``privkd export --format`` may name.

    Args:
        name: letters, digits, ``-`` and ``_``.
        suffix: of the files, with its point.
        needs: modules that it imports when it writes or loads; without one of them it is refused in one line.

    Raises:
        ConfigError: the name is taken, or the suffix is none.
    """
    if not suffix.startswith(".") or "/" in suffix:
        raise ConfigError(f"format {name!r}: suffix {suffix!r} is none; give one such as '.onnx'")

    def enter(make: F) -> F:
        FORMATS.add(name, Form(suffix, needs, make), make)
        return make

    return enter


def suffix_of(name: str) -> str:
    """How the files of a format end.

    Raises:
        ConfigError: the format is unknown.
    """
    return FORMATS[name].suffix


def check_asked(name: str, device: int, out: Path | None) -> None:
    """Do nothing where an export can be asked for so. Light, so that a typo is answered at once.

    Raises:
        ConfigError: the format is unknown or lacks a package, or ``device`` or ``out`` do not fit.
    """
    suffix = suffix_of(name)
    if device < 0:
        raise ConfigError(f"device-index {device}: devices are numbered from 0")
    if out is not None and out.suffix != suffix:
        raise ConfigError(f"--out {out}: format {name!r} writes a {suffix} file; name one")
    check_installed(name)


def check_installed(name: str) -> None:
    """Do nothing where all that the format needs is installed.

    Raises:
        ConfigError: a package is missing; the message has the command that installs it.
    """
    missing = [module for module in FORMATS[name].needs if importlib.util.find_spec(module) is None]
    if missing:
        what = " ".join(missing) if FORMATS.module(name) else f"'privkd[{name}]'"
        raise ConfigError(
            f"format {name!r} needs {', '.join(missing)}, not installed here: pip install {what}"
        )


def format_named(name: str) -> "Format":
    """The format that ``name`` names. Raises as `suffix_of` and `check_installed` do."""
    check_installed(name)
    return FORMATS[name].make()
