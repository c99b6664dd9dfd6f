"""A finished run with its students, which no run folder keeps: they are trained again from the seed."""

from dataclasses import replace

from privkd.errors import RunError
from privkd.federation import Game
from privkd.reopening import check_simulated
from privkd.runs.checkpoint import State, load_state, load_teachers, saved
from privkd.runs.fingerprints import check_bound
from privkd.runs.folder import RunFolder

HELD_BY_DEVICES = (
    "and holds no students: each is on its device alone, where privkd.export.export.export_model writes it; "
    "or name a simulation's folder"
)


def finished_state(game: Game, folder: RunFolder) -> State:
    """The last state of the simulation in ``folder``, whose settings ``game`` was opened with.

    The students repeat their last round with the run's own randomness, so nothing new is released or spent.

    Raises:
        RunError: the run is not finished, is damaged, or is a deployment, whose students are on their devices
            and whose noise nobody can repeat.
    """
    record = saved(folder)
    done = max(len(record.rounds) - 1, 0)
    if done < game.plan.rounds:
        raise RunError(
            f"{folder.path}: {done} of {game.plan.rounds} rounds are finished; "
            f"go on with `privkd train --resume {folder.path}`"
        )
    check_simulated(folder, game.config, HELD_BY_DEVICES)
    return with_students(game, folder, load_state(folder, record, game.blank()[0]))


def with_students(game: Game, folder: RunFolder, state: State) -> State:
    """``state``, as loaded from the simulation in ``folder``, with its students: see `finished_state`."""
    check_bound(folder, game.scenario)
    teachers = load_teachers(folder, saved(folder), game.blank()[0])
    return replace(state, students=game.students_after(teachers[: state.round]))
