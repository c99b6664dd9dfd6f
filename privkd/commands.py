"""What the command line's commands do, between its parsing and the library.

Settings are checked before the heavy libraries are loaded, so that a typo is answered at once.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privkd.config import RunConfig, load_config
from privkd.errors import ConfigError
from privkd.stdout import print_json

if TYPE_CHECKING:
    from privkd.federation import Game
    from privkd.store import RunFolder


@dataclass(frozen=True)
class TrainRequest:
    """``privkd train`` as it was typed: ``settings`` by dotted name, ``overrides`` as ``a.b=value``."""

    settings: Mapping[str, Any]
    overrides: tuple[str, ...]
    config: Path | None
    out: Path | None
    resume: Path | None
    dry_run: bool
    json: bool


def train_command(request: TrainRequest) -> None:
    """Run, resume or forecast, and print.

    Raises:
        PrivkdError: see its tree; the message is for people.
    """
    if request.resume is not None:
        _resume(request, request.resume)
        return
    config = load_config(request.config, request.overrides, request.settings)
    if request.dry_run:
        _forecast(config, as_json=request.json)
        return
    _start(config, request)


def _start(config: RunConfig, request: TrainRequest) -> None:
    from privkd.console import print_folder
    from privkd.federation import open_game
    from privkd.store import RunFolder, default_folder

    # Bad data, models or budgets fail here, before a run folder exists.
    game = open_game(config)
    with RunFolder.create(request.out or default_folder(), config) as folder:
        print_folder(folder.path)
        _run(folder, game, as_json=request.json)


def _resume(request: TrainRequest, path: Path) -> None:
    if request.settings or request.overrides or request.config or request.out or request.dry_run:
        raise ConfigError(
            f"--resume {path}: a run goes on with the settings it was started with; give no others"
        )
    from privkd.store import RunFolder

    with RunFolder.resume(path) as folder:
        _run(folder, None, as_json=request.json)


def _run(folder: "RunFolder", game: "Game | None", *, as_json: bool) -> None:
    """Start ``game``, or go on with the folder's run where there is none."""
    from privkd.console import print_result, progress_on_stderr
    from privkd.result import result_tree
    from privkd.result import train as run_training

    with progress_on_stderr() as progress:
        result = run_training(folder.config, folder, progress, resumed=game is None, game=game)
    if as_json:
        print_json(result_tree(result))
    else:
        print_result(result)


def _forecast(config: RunConfig, *, as_json: bool) -> None:
    from privkd.console import print_forecast
    from privkd.forecast import forecast
    from privkd.result import plain

    found = forecast(config)
    if as_json:
        print_json(plain(asdict(found)))
    else:
        print_forecast(found)
