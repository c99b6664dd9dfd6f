"""Digests of data and code, by which a run knows them again.

In a simulation they are plain SHA-256, so that two runs can be compared. In a deployment the plain digest of
private data would be a release, as whoever guesses the data could prove it: digests there are HMAC-SHA256
under the run's own secret. Each is spelled with the way it was made: ``sha256:...``, ``hmac-sha256:...``.
"""

import hashlib
import hmac
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from privkd.config import DataConfig
from privkd.data.scenario import Scenario
from privkd.data.sources import data_files
from privkd.errors import RunError

_MOST_NAMED = 100
"""Files of a data set that have a digest each; of more, each folder has one."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Fingerprints:
    """Makes digests: plain ones without a ``key``, else keyed ones."""

    key: bytes | None = field(repr=False)

    def of(self, chunks: Iterable[bytes]) -> str:
        """The digest of all chunks, one after the other."""
        made = "sha256" if self.key is None else "hmac-sha256"
        digest: Any = hashlib.sha256() if self.key is None else hmac.new(self.key, digestmod="sha256")
        for chunk in chunks:
            digest.update(chunk)
        return f"{made}:{digest.hexdigest()}"

    def of_files(self, files: Mapping[str, Path]) -> dict[str, str]:
        """The digest of each file, by its name. Raises `RunError`: one cannot be read."""
        return {name: self.of(_content(path)) for name, path in files.items()}

    def of_data(self, config: DataConfig) -> dict[str, str]:
        """The digests of the files that a data set is read from, by name.

        A keyed one is of all files together, under the name of the set: how many there are, and what they are
        called, may be private too.

        Raises:
            RunError: a file cannot be read.
        """
        files = data_files(config)
        if self.key is not None:
            return {Path(config.source).name: self.of(_all_of(files))} if files else {}
        if len(files) <= _MOST_NAMED:
            return self.of_files(files)
        folders = groupby(sorted(files, key=_folder_of), key=_folder_of)
        return {folder: self.of(_all_of({name: files[name] for name in names})) for folder, names in folders}

    def of_classes(self, scenario: Scenario) -> str:
        """The digest of the label space."""
        return self.of([repr((scenario.classes, scenario.gap_classes)).encode()])

    def of_records(self, scenario: Scenario) -> str:
        """The digest of the records as they were split: public ones, and each device's own to train on."""
        return self.of(_tensors(scenario))


def _tensors(scenario: Scenario) -> Iterator[bytes]:
    sets = [scenario.public, scenario.validation, *(device.train for device in scenario.devices)]
    tensors = [tensor for records in sets for tensor in (records.inputs, records.labels)]
    for tensor in (scenario.proxy, *tensors):
        yield tensor.cpu().numpy().tobytes()


def _all_of(files: Mapping[str, Path]) -> Iterator[bytes]:
    """What stands for several files: a digest of each one's name and of its content."""
    for name, path in files.items():
        content = hashlib.sha256()
        for chunk in _content(path):
            content.update(chunk)
        yield hashlib.sha256(name.encode()).digest() + content.digest()


def _content(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}; it is needed to know the data again") from None


def _folder_of(name: str) -> str:
    return f"{Path(name).parent.as_posix()}/"
