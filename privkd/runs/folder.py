"""A run's folder: settings, journal, ledger, weights and transcript, each written whole or not at all."""

import fcntl
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import tomli_w
import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors
from torch import Tensor

from privkd.config import Config, config_tree, load_config
from privkd.data.sources import located
from privkd.errors import RunError
from privkd.journal import Journal

_LOCK = ".lock"
_HALF = ".part"
"""Ends the names of files that are being written; whoever holds the lock may remove what a kill left."""
_LEFT_BY_A_START = ("config.toml", ".config.toml.", "versions.json", ".versions.json.", ".journal.jsonl.")
_VERSIONED = ("privkd", "torch", "opacus", "dp-accounting", "crypten", "numpy", "scipy", "scikit-learn")


class RunFolder:
    """One run on disk, held by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = self._take()
        with self._closed_on_error():
            self._sweep()
            self.journal = Journal(path / "journal.jsonl")

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

    def close(self) -> None:
        """Let another process have the folder. Idempotent."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all; durable on return."""
        self._write(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all; durable on return."""
        self._write(name, data)

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON; infinities must have been spelt out before."""
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Write tensors as safetensors; returns the file's SHA-256, to be journalled."""
        flat = {key: tensor.detach().to("cpu").contiguous().clone() for key, tensor in tensors.items()}
        return self._write(name, serialise_tensors(flat))

    def load(self, name: str, digest: str) -> dict[str, Tensor]:
        """Read tensors back.

        Raises:
            RunError: the file is missing, or is not what ``digest`` says was written.
        """
        try:
            data = (self.path / name).read_bytes()
        except OSError as error:
            raise RunError(f"{self.path / name}: {error.strerror or error}; the run cannot go on") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise RunError(f"{self.path / name} is damaged or was changed: restore it from a copy")
        try:
            return parse_tensors(data)
        except SafetensorError as error:
            raise RunError(f"{self.path / name} is not safetensors: {error}") from None

    def digest(self, name: str) -> str:
        """SHA-256 of a file of the run."""
        return hashlib.sha256((self.path / name).read_bytes()).hexdigest()

    def note(self, step: str, **facts: Any) -> dict[str, Any]:
        """Journal ``facts``, which JSON can hold, once: the first under ``step`` are returned for good."""
        for record in self.journal:
            if record.get("step") == step:
                return record
        self.journal.append({"step": step, **facts})
        return facts

    def secret(self, name: str, fresh: bytes) -> bytes:
        """A secret that outlives an interruption: ``fresh`` is kept, unless one was kept before.

        Raises:
            RunError: the one kept before is gone or was changed. With a new one, a round that is repeated
                would release the same data under other noise.
        """
        path = self.path / "secrets" / name
        step = f"secret {name}"
        if not any(record.get("step") == step for record in self.journal):
            self._write(f"secrets/{name}", fresh, mode=0o700)
        # A digest of 32 random bytes tells nothing of them.
        noted = self.note(step, sha256=hashlib.sha256(fresh).hexdigest())
        try:
            kept = path.read_bytes()
        except OSError as error:
            raise RunError(f"{path}: {error.strerror or error}; without it the run cannot go on") from None
        if hashlib.sha256(kept).hexdigest() != noted.get("sha256"):
            raise RunError(f"{path} is damaged or was changed: restore it, the run cannot go on without it")
        return kept

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

    def _write(self, name: str, data: bytes, *, mode: int = 0o777) -> str:
        target = self.path / name
        try:
            target.parent.mkdir(mode, parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(
                dir=target.parent, prefix=f".{target.name}.", suffix=_HALF
            )
            with _removed_on_error(Path(temporary)):
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                Path(temporary).replace(target)
            _sync(target.parent)
        except OSError as error:
            raise RunError(f"{target}: {error.strerror or error}; the run is kept, resume it later") from None
        return hashlib.sha256(data).hexdigest()

    def _sweep(self) -> None:
        try:
            for path in self.path.rglob(f".*{_HALF}"):
                path.unlink()
        except OSError as error:
            raise RunError(
                f"{self.path}: {error.strerror or error}; the run is kept, resume it later"
            ) from None

    def _take(self) -> int:
        try:
            descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise RunError(f"{self.path}: {error.strerror or error}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise RunError(f"{self.path} is in use by another process: wait for it to end") from None
        return descriptor

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise


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
    left = all(name == _LOCK or name.startswith(_LEFT_BY_A_START) for name in names)
    if names and not (left and _LOCK in names):
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


@contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
