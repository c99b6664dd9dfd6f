"""A finished run with its students: the one place that knows where they come from.

A run's folder holds what the cloud holds, so no student. In a simulation the seed decides them: they are
trained again, from the teachers that were published. In a deployment they are on their devices alone.
"""

from dataclasses import replace

from privkd.errors import RunError
from privkd.federation import Game
from privkd.state import State, load_state, load_teachers, saved
from privkd.store import RunFolder


def finished_state(game: Game, folder: RunFolder) -> State:
    """The last state of the run in ``folder``, whose settings ``game`` was opened with.

    Training the students again repeats randomness that was paid for: it shows nothing new.

    Raises:
        RunError: the run is not finished, is damaged, or was a deployment.
    """
    record = saved(folder)
    done = max(len(record.rounds) - 1, 0)
    if done < game.plan.rounds:
        raise RunError(
            f"{folder.path}: {done} of {game.plan.rounds} rounds are finished; "
            f"go on with `privkd train --resume {folder.path}`"
        )
    if game.config.privacy.noise != "seeded":
        raise RunError(
            f"{folder.path}: privacy.noise={game.config.privacy.noise!r}: the students of a deployment are "
            "on their devices, and no seed brings them back; take a run with privacy.noise=seeded"
        )
    teacher, _ = game.blank()
    published = load_teachers(folder, record, teacher)[:done]
    return replace(load_state(folder, record, teacher), students=game.students_after(published))
