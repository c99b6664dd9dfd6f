"""What a run is bound to: its data, the user's own code, and the libraries that computed it.

All of it is noted in the run's journal before anything is spent, and checked by whoever goes on with the run,
trains its students again or replays them. On other records the noise of a repeated round would cancel, and a
student trained on them would be one that the ledger never charged for.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from privkd.binding import STEP, Binding, binding_of
from privkd.config import RunConfig
from privkd.credentials import noise_root
from privkd.data.function import is_function_name
from privkd.data.scenario import Scenario
from privkd.errors import RunError
from privkd.fingerprints import Fingerprints
from privkd.noise import NoiseRoot
from privkd.state import saved
from privkd.store import RunFolder, versions
from privkd.userscode import OwnCode, importable, make_importable, own_code

_MATTER = ("privkd", "torch", "opacus", "numpy", "crypten", "dp-accounting")
_LOG = logging.getLogger(__name__)


def bind(folder: RunFolder, scenario: Scenario, root: NoiseRoot) -> None:
    """Note what the run in ``folder`` is bound to or, where that was noted, check it.

    Raises:
        RunError: the data or the code are not those that the run was started with; it names what changed.
    """
    noted, now = _noted(folder), _Now(folder, folder.config, root)
    if noted is not None:
        now.check_files(noted)
        now.check_scenario(noted, scenario)
        return
    if saved(folder).rounds:
        now.check_unbound(scenario)
    folder.note(STEP, **asdict(now.binding(root, scenario)))


def check_files(folder: RunFolder) -> None:
    """Check the data and the code before either is loaded, and let the code be imported.

    Modules are imported from where they were when the run was started, as long as they are the very files.
    A library of another version is said on stderr. Nothing is checked of a run that is not bound.

    Raises:
        RunError: as `bind`.
    """
    noted = _noted(folder)
    if noted is not None:
        make_importable(noted.folders)
        _warn_of_versions(folder, noted)
        _Now.of(folder).check_files(noted)


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
    config: RunConfig
    root: NoiseRoot | None

    @classmethod
    def of(cls, folder: RunFolder) -> "_Now":
        config = folder.config
        forgotten = config.privacy.noise == "system" and len(saved(folder).rounds) > config.rounds
        return cls(folder, config, None if forgotten else noise_root(config, folder))

    @property
    def code(self) -> OwnCode:
        """The user's modules, as far as they are imported."""
        models = [self.config.teacher.model, *self.config.student.models]
        source = self.config.data.source
        return own_code([*(model.name for model in models), *([source] if is_function_name(source) else [])])

    def binding(self, root: NoiseRoot, scenario: Scenario) -> Binding:
        code, versions = self.code, _versions()
        return Binding(
            data=self._private(root).of_data(self.config.data),
            records=_records(root, scenario),
            classes=self._private(root).of_classes(scenario),
            code=self._coded(root).of_files(code.files),
            folders=code.folders,
            versions=versions,
        )

    def check_files(self, noted: Binding) -> None:
        self.check_code(noted)
        if self.root is not None:
            self._compare("data", noted.data, self._private(self.root).of_data(self.config.data))

    def check_code(self, noted: Binding) -> None:
        if self.root is None and self._code_is_private:
            return
        loaded = self.code.files
        found = {name: loaded.get(name) or importable(name) for name in noted.code}
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

    def check_scenario(self, noted: Binding, scenario: Scenario) -> None:
        if self.root is None:
            return
        if noted.classes != self._private(self.root).of_classes(scenario):
            raise self._changed("data", "the classes are others")
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
        return self.config.privacy.noise == "system" and is_function_name(self.config.data.source)

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
