"""Plays the runs of a study, each in a folder of its own that is kept, resumed and never played twice."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from papers.probes import Effort, Probe
from papers.study import Case, Scale
from privkd.config import Config, config_tree, load_config
from privkd.errors import RunError
from privkd.prepared import prepare
from privkd.progress import Progress
from privkd.result import plain, train
from privkd.runs.fingerprints import check_files
from privkd.runs.folder import RunFolder
from privkd.secure.installed import check_channel

_DIGEST = 12


@dataclass(frozen=True)
class Player:
    """Where runs lie, where data lie, and who is told.

    Attributes:
        out: the folder of all runs. A run's folder there is named by a digest of its settings, so that
            studies share equal runs and other settings never meet an old result.
        data_dir: base of the data, as ``--data-dir``.
        progress: told of each run.
    """

    out: Path
    data_dir: Path | None
    progress: Progress

    def figures(self, case: Case, scale: Scale, seed: int) -> Mapping[str, float]:
        """The figures of one run by their dotted names, played or resumed where it is not finished yet.

        Raises:
            RunError: the data or the code of a run that is kept changed since.
            PrivkdError: otherwise as training and auditing do.
        """
        config = config_of(case, scale, seed, self.data_dir)
        with _opened(self.out / folder_name(config), config) as folder:
            check_files(folder)
            tree = _finished(folder)
            if tree is None:
                self.progress.stage(f"papers: case {case.name}, seed {seed}, in {folder.path}")
                train(config, folder, self.progress, resumed=True)
                tree = _read(folder, "result.json")
            found = dict(flat(tree))
            for probe in case.probes:
                found |= self._probed(folder, probe, scale.effort)
            return found

    def _probed(self, folder: RunFolder, probe: Probe, effort: Effort) -> Mapping[str, float]:
        """What ``probe`` measures, kept in the run's folder beside the result it belongs to."""
        name, result = f"papers/{probe.name(effort)}.json", folder.digest("result.json")
        if (folder.path / name).is_file():
            kept = _read(folder, name)
            if isinstance(kept, dict) and kept.get("result") == result:
                return dict(flat(kept["figures"]))
        figures = {key: float(value) for key, value in probe.measure(folder, self.progress, effort).items()}
        folder.write_json(name, {"result": result, "figures": plain(figures)})
        return figures


def config_of(case: Case, scale: Scale, seed: int, data_dir: Path | None) -> Config:
    """The settings of one run.

    Raises:
        ConfigError: they do not go together.
    """
    settings: dict[str, Any] = {"seed": seed}
    if data_dir is not None:
        settings["data.data_dir"] = str(data_dir.absolute())
    return load_config(None, case.settings_on(scale), settings)


def folder_name(config: Config) -> str:
    """A name that equal settings share."""
    digest = hashlib.sha256(tomli_w.dumps(config_tree(config)).encode()).hexdigest()[:_DIGEST]
    return f"{Path(config.data.source).name}-seed{config.seed}-{digest}"


def flat(tree: Any, prefix: str = "") -> Mapping[str, float]:
    """The numbers among nested JSON values by dotted names; the rest is left out.

    As `privkd.result.plain` spells them: ``"inf"`` is infinity, ``null`` NaN.
    """
    if isinstance(tree, Mapping):
        items: Sequence[tuple[Any, Any]] = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    elif tree is None:
        return {prefix: math.nan}
    elif tree == "inf" or (isinstance(tree, int | float) and not isinstance(tree, bool)):
        return {prefix: float(tree)}
    else:
        return {}
    found: dict[str, float] = {}
    for key, value in items:
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _opened(path: Path, config: Config) -> RunFolder:
    if (path / "journal.jsonl").is_file() and (path / "config.toml").is_file():
        return RunFolder.resume(path)
    # Bad data or models fail here, and a lack of CrypTen, before a run folder exists.
    check_channel(config.channel)
    prepare(config)
    return RunFolder.create(path, config)


def _finished(folder: RunFolder) -> Any | None:
    """The result as JSON values, if the run wrote it down and it is still what was written."""
    last = [record for record in folder.journal if record.get("step") == "finished"]
    if not last or not (folder.path / "result.json").is_file():
        return None
    return _read(folder, "result.json") if folder.digest("result.json") == last[-1]["result"] else None


def _read(folder: RunFolder, name: str) -> Any:
    try:
        return json.loads((folder.path / name).read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{folder.path / name} cannot be read ({error}): remove it and run again") from None
