"""A run's folder: settings, journal, ledger, weights and transcript, each written whole or not at all."""

import platform
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Self

import tomli_w
import torch
from torch import Tensor

from privkd.config import Config, config_tree, load_config
from privkd.data.sources import located
from privkd.errors import RunError
from privkd.folder import LOCK, HeldFolder

_LEFT_BY_A_START = ("config.toml", ".config.toml.", "versions.json", ".versions.json.", ".journal.jsonl.")
_VERSIONED = ("privkd", "torch", "opacus", "dp-accounting", "crypten", "numpy", "scipy", "scikit-learn")


class RunFolder(HeldFolder):
    """One run on disk, held by one process at a time."""

    subject = "the run"
    when_kept = "the run is kept, resume it later"

    @classmethod
    def create(cls, path: Path, config: Config) -> Self:
        """Start a run in a new folder, or in one where a start was cut short.

        Raises:
            RunError: the folder holds something already, is in use, or cannot be written.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            _check_unused(path)
        except OSError as error:
            raise RunError(f"{path}: {error.strerror or error}; name another --out") from None
        folder = cls(path)
        with folder._closed_on_error():
            # Once more, now that no other process can start a run here.
            _check_unused(path)
            folder.write_text("config.toml", tomli_w.dumps(config_tree(located(config))))
            folder.write_json("versions.json", versions())
            folder.journal.append({"step": "started", "config": folder.digest("config.toml")})
        return folder

    @classmethod
    def resume(cls, path: Path) -> Self:
        """Continue the run in ``path``.

        Raises:
            RunError: not a run, damaged, or in use by another process.
        """
        if not _is_run(path):
            raise RunError(f"{path} is not the folder of a run: expected its config.toml and journal.jsonl")
        folder = cls(path)
        with folder._closed_on_error():
            started = next(iter(folder.journal), None)
            if started is None or started.get("config") != folder.digest("config.toml"):
                raise RunError(f"{path / 'config.toml'} was changed since the run was started: restore it")
        return folder

    @property
    def config(self) -> Config:
        """The resolved settings that the run was started with."""
        return load_config(self.path / "config.toml")

    @property
    def ledger_path(self) -> Path:
        """Where the ledger's journal lies."""
        return self.path / "ledger.jsonl"

    def forget_secrets(self) -> None:
        """Remove what must not outlive the run: whoever holds the noise key can take the noise off."""
        folder = self.path / "secrets"
        try:
            for path in folder.glob("*"):
                path.unlink()
            if folder.is_dir():
                folder.rmdir()
        except OSError as error:
            raise RunError(f"{folder}: {error.strerror or error}; remove it by hand, it holds keys") from None


def default_folder(root: Path = Path("runs")) -> Path:
    """A new, empty folder under ``root``, named by the time. It is made here, so no other run has it.

    Raises:
        RunError: it cannot be made.
    """
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    try:
        root.mkdir(parents=True, exist_ok=True)
        for name in (stamp, *(f"{stamp}-{number}" for number in range(2, 1000))):
            with suppress(FileExistsError):
                (root / name).mkdir()
                return root / name
    except OSError as error:
        raise RunError(f"{root}: {error.strerror or error}; name a folder with --out") from None
    raise RunError(f"{root} holds a thousand runs of this second: name a folder with --out")


def _is_run(path: Path) -> bool:
    try:
        return (path / "journal.jsonl").is_file() and (path / "config.toml").is_file()
    except OSError:
        return False


def _check_unused(path: Path) -> None:
    """Raise `RunError` unless ``path`` holds nothing but what a start leaves behind that was cut short."""
    if _is_run(path):
        raise RunError(f"{path} holds a run: resume it with --resume {path}, or name another --out")
    names = {entry.name for entry in path.iterdir()}
    left = all(name == LOCK or name.startswith(_LEFT_BY_A_START) for name in names)
    if names and not (left and LOCK in names):
        raise RunError(f"{path} is not empty: name another --out")


def versions() -> dict[str, str]:
    """Versions of what computed the run; ``absent`` where a library is not installed."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def prefixed(prefix: str, module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's weights under ``prefix.``, for one file that holds several modules."""
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def restore(module: torch.nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> torch.nn.Module:
    """Put weights written under ``prefix.`` back into ``module``, and return it in evaluation mode.

    Raises:
        RunError: the weights do not fit the module.
    """
    start = f"{prefix}."
    own = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
    try:
        module.load_state_dict(own)
    except RuntimeError as error:
        raise RunError(f"weights {prefix!r} do not fit their model: {' '.join(str(error).split())}") from None
    return module.eval()
