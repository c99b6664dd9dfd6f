"""A folder that one process holds at a time, and in which each file is written whole or not at all."""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors
from torch import Tensor

from privkd.errors import RunError
from privkd.journal import Journal, sync_folder

LOCK = ".lock"
_HALF = ".part"
"""Ends the names of files that are being written; whoever holds the lock may remove what a kill left."""


class HeldFolder:
    """A folder with a journal, held by one process at a time."""

    subject: ClassVar[str]
    """Whose folder it is, in words: what cannot go on without it."""
    when_kept: ClassVar[str]
    """What to say where a write fails and what was there before is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = self._take()
        with self._closed_on_error():
            self._sweep()
            self.journal = Journal(path / "journal.jsonl")

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
            return read_tensors(self.path / name, digest)
        except OSError as error:
            lacks = f"{self.path / name}: {error.strerror or error}"
            raise RunError(f"{lacks}; {self.subject} cannot go on") from None

    def digest(self, name: str) -> str:
        """SHA-256 of a file of the folder."""
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
            raise RunError(
                f"{path}: {error.strerror or error}; without it {self.subject} cannot go on"
            ) from None
        if hashlib.sha256(kept).hexdigest() != noted.get("sha256"):
            raise RunError(
                f"{path} is damaged or was changed: restore it, {self.subject} cannot go on without it"
            )
        return kept

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
            sync_folder(target.parent)
        except OSError as error:
            raise RunError(f"{target}: {error.strerror or error}; {self.when_kept}") from None
        return hashlib.sha256(data).hexdigest()

    def _sweep(self) -> None:
        try:
            for path in self.path.rglob(f".*{_HALF}"):
                path.unlink()
        except OSError as error:
            raise RunError(f"{self.path}: {error.strerror or error}; {self.when_kept}") from None

    def _take(self) -> int:
        try:
            descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
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


def read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    """The tensors that were written to ``path`` with this digest.

    Raises:
        OSError: the file cannot be read.
        RunError: it is not what was written.
    """
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise RunError(f"{path} is damaged or was changed: restore it from a copy")
    try:
        return parse_tensors(data)
    except SafetensorError as error:
        raise RunError(f"{path} is not safetensors: {error}") from None


@contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise
