"""The plug-ins of a run, for whoever is about to name what one of them adds. Light to import."""

from collections.abc import Iterable
from pathlib import Path

from privkd.config import load_config
from privkd.plugins import load_plugins


def load_plugins_for(run: Path | None, plugins: Iterable[str]) -> None:
    """Load ``plugins``, then those that the run in ``run`` was started with.

    Nothing else of the run is looked at, and what is no run, or ``None``, has no plug-ins.

    Raises:
        ConfigError: one cannot be imported, or the run's settings are bad.
        RunError: see `privkd.runs.fingerprints.check_files`.
    """
    load_plugins(plugins)
    settings = None if run is None else run / "config.toml"
    if run is None or settings is None or not settings.is_file() or not load_config(settings).plugins:
        return
    from privkd.runs.fingerprints import check_files
    from privkd.runs.folder import RunFolder

    with RunFolder.resume(run) as folder:
        check_files(folder)
