"""A finished run with its students: the one place that knows where they come from."""

from privkd.errors import RunError
from privkd.federation import Game
from privkd.state import State, load_state, saved
from privkd.store import RunFolder


def finished_state(game: Game, folder: RunFolder) -> State:
    """The last state of the run in ``folder``, whose settings ``game`` was opened with.

    Raises:
        RunError: the run is not finished, is damaged, or keeps no students.
    """
    record = saved(folder)
    done = max(len(record.rounds) - 1, 0)
    if done < game.plan.rounds:
        raise RunError(
            f"{folder.path}: {done} of {game.plan.rounds} rounds are finished; "
            f"go on with `privkd train --resume {folder.path}`"
        )
    return load_state(folder, record, *game.blank())
