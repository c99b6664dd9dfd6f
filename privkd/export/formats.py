"""The forms in which a student leaves for its device, and what each needs."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from privkd.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

Answering: TypeAlias = "Callable[[Tensor], Tensor]"
"""Raw records ``[record, *shape]`` to logits ``[record, class]``, through the artefact."""


class Format(Protocol):
    """One form of artefact."""

    suffix: str

    def write(self, model: "nn.Module", example: "Tensor", path: Path) -> None:
        """Write ``model``, traced on ``example`` ``[2, *shape]``, to ``path``."""
        ...

    def load(self, path: Path) -> Answering:
        """The artefact at ``path`` as something that answers, on one CPU thread."""
        ...


_SUFFIXES = {"torch": ".pt2", "onnx": ".onnx", "executorch": ".pte"}
_NEEDS = {"torch": (), "onnx": ("onnx", "onnxscript", "onnxruntime"), "executorch": ("executorch",)}


def suffix_of(name: str) -> str:
    """How the files of a format end.

    Raises:
        ConfigError: the format is unknown.
    """
    if name not in _SUFFIXES:
        raise ConfigError(f"format {name!r}: expected one of {', '.join(_SUFFIXES)}")
    return _SUFFIXES[name]


def check_installed(name: str) -> None:
    """Do nothing where all that the format needs is installed.

    Raises:
        ConfigError: a package is missing; the message has the command that installs it.
    """
    missing = [module for module in _NEEDS[name] if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"format {name!r} needs {', '.join(missing)}, not installed here: pip install 'privkd[{name}]'"
        )


def format_named(name: str) -> Format:
    """The format that ``name`` names. Raises as `suffix_of` and `check_installed` do."""
    suffix_of(name)
    check_installed(name)
    if name == "onnx":
        from privkd.export.onnx_format import OnnxFormat

        return OnnxFormat()
    if name == "executorch":
        from privkd.export.executorch_format import ExecutorchFormat

        return ExecutorchFormat()
    from privkd.export.torch_format import TorchFormat

    return TorchFormat()
