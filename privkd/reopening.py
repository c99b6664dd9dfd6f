"""A run's folder, opened again: on the data and the code that it was started with, or not at all."""

from privkd.config import RunConfig
from privkd.errors import RunError
from privkd.federation import Game, open_game
from privkd.runs.fingerprints import check_bound, check_files
from privkd.runs.folder import RunFolder


def reopened(folder: RunFolder) -> Game:
    """The game of the run in ``folder``, to go on with. One that was not begun yet is opened like a new one.

    Raises:
        RunError: the data or the code changed since the run was started; it names what did.
        InputError: otherwise as `open_game`.
    """
    check_files(folder)
    game = open_game(folder.config)
    check_bound(folder, game.scenario)
    return game


def reopened_simulation(folder: RunFolder, why: str) -> Game:
    """The game of the simulation in ``folder``, for whatever trains its students again or replays them.

    Args:
        folder: of the run.
        why: that cannot be done to a deployment, and what to do instead, for the message.

    Raises:
        RunError: as `reopened`; or it is a deployment.
    """
    check_simulated(folder, folder.config, why)
    return reopened(folder)


def check_simulated(folder: RunFolder, config: RunConfig, why: str) -> None:
    """Do nothing where the run's noise comes from the seed.

    Raises:
        RunError: it is a deployment; ``why`` says what that means here.
    """
    if config.privacy.noise != "seeded":
        raise RunError(f"{folder.path} is a deployment (privacy.noise='system') {why}")
