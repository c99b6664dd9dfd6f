"""What a run is bound to, and how it is known again: its data, the user's own code, its repeated answers.

All of it is noted in the run's journal before anything is spent, and checked by whoever goes on with the run,
trains its students again or replays them. On other records the noise of a repeated round would cancel, and a
student trained on them would be one that the ledger never charged for. A round that was charged may be played
again after an interruption, under the same noise: were its answers other ones, by as little as another order
of sums, then two releases would be seen and one was charged for; so a repeat shows the same bytes or is not
made at all.

In a simulation digests are plain SHA-256, so that two runs can be compared. In a deployment the plain digest
of private data would be a release, as whoever guesses the data could prove it: digests there are HMAC-SHA256
under the run's own secret. Each is spelled with the way it was made: ``sha256:...``, ``hmac-sha256:...``.
"""

import hashlib
import hmac
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from privkd.channels.registry import KINDS
from privkd.cloud import RULES
from privkd.config import Config, DataConfig
from privkd.data.scenario import Scenario
from privkd.data.sources import SOURCES, data_files, is_function_name, may_be_code
from privkd.data.tokens import TOKENIZER_FILE
from privkd.errors import RunError
from privkd.models.encoder import encoder_named
from privkd.models.inputs import InputType
from privkd.plugins import (
    OwnCode,
    importable,
    is_loaded,
    is_marked,
    load_plugins,
    make_importable,
    own_code,
    plugin_file,
    plugin_module,
)
from privkd.privacy.events import PartyId
from privkd.privacy.noise import NoiseRoot
from privkd.runs.binding import STEP, Binding, binding_of
from privkd.runs.checkpoint import saved
from privkd.runs.credentials import noise_root
from privkd.runs.folder import RunFolder, versions

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
        """The digest of the label space and, of text, of its tokenizer."""
        tokens = scenario.constants.tokens
        of_tokens = () if tokens is None else ((tokens.vocabulary, tokens.length, tokens.digest),)
        return self.of([repr((scenario.classes, scenario.gap_classes, *of_tokens)).encode()])

    def of_records(self, scenario: Scenario) -> str:
        """The digest of the records as they were split: public ones, and each device's own to train on."""
        return self.of(_tensors(scenario))


def _tensors(scenario: Scenario) -> Iterator[bytes]:
    sets = [scenario.public, scenario.validation, *(device.train for device in scenario.devices)]
    tensors = [tensor for held in sets for tensor in (held.inputs, held.labels, held.persons)]
    for tensor in (scenario.proxy, *tensors):
        if tensor is not None:
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


_MATTER = ("privkd", "torch", "opacus", "numpy", "crypten", "dp-accounting")
_LOG = logging.getLogger(__name__)


def bind(folder: RunFolder, scenario: Scenario, root: NoiseRoot) -> None:
    """Note what the run in ``folder`` is bound to or, where that was noted, check it.

    Raises:
        RunError: the data or the code are not those that the run was started with; it names what changed.
    """
    noted, now = _noted(folder), _Now(folder, folder.config, root)
    if noted is not None:
        now.check_code(noted)
        now.check_data(noted)
        now.check_scenario(noted, scenario)
        return
    if saved(folder).rounds:
        now.check_unbound(scenario)
    tokens = scenario.constants.tokens
    if tokens is not None and tokens.tokenizer is not None:
        folder.write_text(TOKENIZER_FILE, tokens.tokenizer)
    folder.note(STEP, **asdict(now.binding(root, scenario)))


def check_files(folder: RunFolder) -> None:
    """Check the data and the code before either is loaded, let the code be imported, and load the plug-ins.

    Modules are imported from where they were when the run was started, as long as they are the very files.
    A library of another version is said on stderr. Of a run that is not bound no data and code are checked.

    Raises:
        ConfigError: a plug-in cannot be imported.
        RunError: as `bind`; or a plug-in is not the very file, and was not loaded by the caller.
    """
    noted = _noted(folder)
    if noted is not None:
        make_importable(noted.folders)
        _warn_of_versions(folder, noted)
        _Now.of(folder).check_code(noted)
    _load_plugins(folder, {} if noted is None else noted.folders)
    if noted is not None:
        _Now.of(folder).check_data(noted)


def _load_plugins(folder: RunFolder, folders: Mapping[str, str]) -> None:
    """Whoever made the run's folder chose the paths: only a file that is known to be the user's is run."""
    plugins = folder.config.plugins
    left = [file for name in plugins if not is_loaded(name) and (file := plugin_file(name)) is not None]
    strange = [str(file) for file in left if not is_marked(file.resolve().parent, folders)]
    if strange:
        raise RunError(
            f"{folder.path}: nothing tells that {', '.join(strange)} is the plug-in that the run was started "
            "with: give its path with --plugin, if you trust it"
        )
    load_plugins(plugins)


def check_bound(folder: RunFolder, scenario: Scenario) -> None:
    """Check that the records, and the modules that were loaded, are those that the run began with.

    A run that was started by a version which noted the digest of its records alone goes on with a warning.

    Raises:
        RunError: as `bind`; or rounds were played without any note of the data.
    """
    noted = _noted(folder)
    if noted is not None:
        now = _Now.of(folder)
        now.check_code(noted)
        now.check_scenario(noted, scenario)
    elif saved(folder).rounds:
        _Now.of(folder).check_unbound(scenario)


def _noted(folder: RunFolder) -> Binding | None:
    return binding_of(folder.journal, folder.path / "journal.jsonl")


@dataclass(frozen=True)
class _Now:
    """What the data and the code of a run are now.

    ``root`` is the run's secret: ``None`` once a deployment has played all its rounds and so forgotten it.
    Then nothing private is trained on again, and what is keyed is not checked.
    """

    folder: RunFolder
    config: Config
    root: NoiseRoot | None

    @classmethod
    def of(cls, folder: RunFolder) -> "_Now":
        config = folder.config
        forgotten = config.privacy.noise == "system" and len(saved(folder).rounds) > config.rounds
        return cls(folder, config, None if forgotten else noise_root(config, folder))

    @property
    def code(self) -> OwnCode:
        """The user's modules, as far as they are imported."""
        config = self.config
        models = [name for model in config.models for name in (model.name, model.encoder or "")]
        read = [config.data.source, *config.data.own_files.values()]
        source = list(filter(is_function_name, read))
        added = (
            *map(SOURCES.module, read),
            RULES.module(config.reverse.aggregation),
            KINDS.module(config.channel.kind),
        )
        plugins = [*map(plugin_module, config.plugins), *filter(None, added)]
        return own_code([*models, *source, *(f"{module}:" for module in plugins)])

    def binding(self, root: NoiseRoot, scenario: Scenario) -> Binding:
        code, versions = self.code, _versions()
        return Binding(
            data=self._private(root).of_data(self.config.data),
            records=_records(root, scenario),
            classes=self._private(root).of_classes(scenario),
            encoders=self._encoders(scenario),
            code=self._coded(root).of_files(code.files),
            folders=code.folders,
            versions=versions,
        )

    def check_data(self, noted: Binding) -> None:
        if self.root is not None:
            self._compare("data", noted.data, self._private(self.root).of_data(self.config.data))

    def check_code(self, noted: Binding) -> None:
        if self.root is None and self._code_is_private:
            return
        known = {file.name: file for file in map(plugin_file, self.config.plugins) if file and file.is_file()}
        known |= self.code.files
        found = {name: known.get(name) or importable(name) for name in noted.code}
        files = {name: path for name, path in found.items() if path is not None}
        now = self._coded(self.root).of_files(files)
        if now != noted.code:
            self._point_to(noted)
        self._compare("code", noted.code, now)

    def _point_to(self, noted: Binding) -> None:
        """Raise `RunError` where the code lies as it was, in a folder that is not imported from."""
        for place in noted.folders:
            files = {name: Path(place) / name for name in noted.code if (Path(place) / name).is_file()}
            if files and self._coded(self.root).of_files(files) == noted.code:
                raise RunError(
                    f"{self.folder.path}: its modules were imported from {place}: go on from there, or set "
                    f"PYTHONPATH={place}"
                )

    def _encoders(self, scenario: Scenario) -> dict[str, str]:
        """They are public."""
        names = filter(None, (model.encoder for model in self.config.models))
        inputs = InputType.of(scenario.public.inputs)
        return {name: encoder_named(name, inputs).digest for name in names}

    def check_scenario(self, noted: Binding, scenario: Scenario) -> None:
        self._compare("encoder", noted.encoders, self._encoders(scenario))
        if self.root is None:
            return
        if noted.classes != self._private(self.root).of_classes(scenario):
            raise self._changed("data", "the classes, or the tokenizer, are others")
        if noted.records != _records(self.root, scenario):
            raise self._changed("data", "the records are others")

    def check_unbound(self, scenario: Scenario) -> None:
        old = [row.get("hmac") for row in self.folder.journal if row.get("step") == "records"]
        if not old:
            raise RunError(
                f"{self.folder.path} was started by a version that did not bind runs to their data, so "
                "nothing tells whether they are the same: start a new run"
            )
        if self.root is not None and _records(self.root, scenario) != f"hmac-sha256:{old[0]}":
            raise self._changed("data", "the records are others")
        _LOG.warning(
            "privkd: warning: %s was started by a version that did not bind runs to their code: its records "
            "are the same, its modules may not be",
            self.folder.path,
        )

    @property
    def _code_is_private(self) -> bool:
        """Whether a digest of the code could be one of private data: a function may hold its data itself."""
        return self.config.privacy.noise == "system" and may_be_code(self.config.data.source)

    def _private(self, root: NoiseRoot) -> Fingerprints:
        return Fingerprints(root.subkey("bound") if self.config.privacy.noise == "system" else None)

    def _coded(self, root: NoiseRoot | None) -> Fingerprints:
        return Fingerprints(root.subkey("bound") if root and self._code_is_private else None)

    def _compare(self, what: str, noted: Mapping[str, str], found: Mapping[str, str]) -> None:
        for name in noted:
            if name not in found:
                raise self._changed(what, f"{name} is gone")
            if noted[name] != found[name]:
                raise self._changed(what, f"{name} was changed")
        for name in found:
            if name not in noted:
                raise self._changed(what, f"{name} is new")

    def _changed(self, what: str, how: str) -> RunError:
        return RunError(
            f"{self.folder.path}: the {what} changed since the run was started: {how}; bring back the "
            f"old {what}"
        )


def _records(root: NoiseRoot, scenario: Scenario) -> str:
    return Fingerprints(root.subkey("records")).of_records(scenario)


def _versions() -> dict[str, str]:
    found = versions()
    return {name: found[name] for name in _MATTER}


def _warn_of_versions(folder: RunFolder, noted: Binding) -> None:
    for name, version in _versions().items():
        before = noted.versions.get(name, "absent")
        if before != version:
            _LOG.warning(
                "privkd: warning: %s was started with %s %s and goes on with %s %s: figures may differ",
                *(folder.path, name, before, name, version),
            )


class Notes(Protocol):
    """Where facts are noted once and for good: `store.RunFolder`."""

    def note(self, step: str, **facts: Any) -> Mapping[str, Any]:
        """Note ``facts``, durably; what was noted first under ``step`` is returned."""
        ...


class _Unkept:
    def note(self, step: str, **facts: Any) -> Mapping[str, Any]:
        """See `Notes.note`."""
        return facts


UNKEPT = _Unkept()
"""Notes nothing: for a game that nobody goes on with after an interruption."""


def check_repeats(
    notes: Notes, root: NoiseRoot, round: int, devices: Sequence[PartyId], answers: Tensor
) -> None:
    """Note what ``devices`` are about to answer, or check it where the round was begun before.

    Call it before the answers reach the channel. The digest is HMAC-SHA256 under the run's secret.

    Args:
        notes: of the run.
        root: the run's noise root.
        round: from 0.
        devices: who answers.
        answers: theirs, ``[device, query, class]``.

    Raises:
        RunError: the answers differ from those that were noted.
    """
    digest = hmac.new(root.subkey("answers", round), digestmod="sha256")
    digest.update(repr((tuple(devices), tuple(answers.shape), str(answers.dtype))).encode())
    digest.update(answers.detach().cpu().contiguous().numpy().tobytes())
    threads = str(torch.get_num_threads())
    noted = notes.note(f"answers {round}", hmac=digest.hexdigest(), threads=threads)
    if noted.get("hmac") != digest.hexdigest():
        raise RunError(
            f"the answers of round {round + 1} differ from those of the interrupted release, and a second "
            "one was not charged for: nothing was released; resume on the same machine, with the same "
            f"libraries and number of threads (OMP_NUM_THREADS={noted.get('threads')}; now {threads})"
        )
