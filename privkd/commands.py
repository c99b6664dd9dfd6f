"""What the command line's commands do, between its parsing and the library.

Settings are checked before the heavy libraries are loaded, so that a typo is answered at once.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privkd.config import Config, load_config
from privkd.errors import ConfigError
from privkd.plugins import load_plugins
from privkd.secure.installed import check_channel
from privkd.stdout import print_json

if TYPE_CHECKING:
    from privkd.federation import ClosingAudit
    from privkd.prepared import Prepared
    from privkd.runs.folder import RunFolder


@dataclass(frozen=True)
class TrainRequest:
    """``privkd train`` as it was typed: ``settings`` by dotted name, ``overrides`` as ``a.b=value``.

    ``plugins`` are the run's; to a run that is resumed they say which of its own files are trusted.
    """

    settings: Mapping[str, Any]
    overrides: tuple[str, ...]
    plugins: tuple[str, ...]
    config: Path | None
    out: Path | None
    resume: Path | None
    dry_run: bool
    json: bool


def train_command(request: TrainRequest, audit: "ClosingAudit") -> None:
    """Run, resume or forecast, and print. ``audit`` closes the run.

    Raises:
        AuditAlarm: a lower bound lies above the ledger's upper bound; both were printed first.
        PrivkdError: see its tree; the message is for people.
    """
    if request.resume is not None:
        load_plugins(request.plugins)
        _resume(request, request.resume, audit)
        return
    added = {"plugins": request.plugins} if request.plugins else {}
    config = load_config(request.config, request.overrides, {**request.settings, **added})
    if request.dry_run:
        _forecast(config, as_json=request.json)
        return
    _start(config, request, audit)


def _start(config: Config, request: TrainRequest, audit: "ClosingAudit") -> None:
    check_channel(config.channel)
    from privkd.data.constants import PUBLIC_SOURCES
    from privkd.prepared import prepare
    from privkd.runs.folder import RunFolder, default_folder
    from privkd.terminal import print_folder, print_taken

    # Bad data, models or budgets fail here, before a run folder exists.
    prepared = prepare(config)
    with RunFolder.create(request.out or default_folder(), config) as folder:
        print_folder(folder.path)
        if config.data.source not in PUBLIC_SOURCES:
            print_taken(prepared.plan.taken)
        _run(folder, prepared, audit, as_json=request.json)


def _resume(request: TrainRequest, path: Path, audit: "ClosingAudit") -> None:
    if request.settings or request.overrides or request.config or request.out or request.dry_run:
        raise ConfigError(
            f"--resume {path}: a run goes on with the settings it was started with; give no others"
        )
    from privkd.runs.folder import RunFolder

    with RunFolder.resume(path) as folder:
        _run(folder, None, audit, as_json=request.json)


def _run(folder: "RunFolder", prepared: "Prepared | None", audit: "ClosingAudit", *, as_json: bool) -> None:
    """Start ``prepared``, or go on with the folder's run where there is none."""
    from privkd.runner import train as run_training
    from privkd.terminal import progress_on_stderr, show

    with progress_on_stderr() as progress:
        resumed = prepared is None
        result = run_training(
            folder.config, folder, progress, resumed=resumed, prepared=prepared, audit=audit
        )
    show(result, as_json=as_json)


def _forecast(config: Config, *, as_json: bool) -> None:
    from privkd.prepared import forecast
    from privkd.records import plain
    from privkd.terminal import print_forecast

    found = forecast(config)
    if as_json:
        print_json(plain(asdict(found)))
    else:
        print_forecast(found)
