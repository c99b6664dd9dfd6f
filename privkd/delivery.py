"""What the devices are left with when a run ends: the last teacher's knowledge and their own in one student.

The last teacher is better than the one that the last round's students began from, and a device's student
knows what is peculiar to the device. Only public inputs, the published teacher and students that DP-SGD has
paid for are used: it is post-processing and costs nothing.
"""

from collections.abc import Sequence

from torch import nn

from privkd.federation import Game
from privkd.privacy.randomness import derive_seed, seeded_layers
from privkd.progress import Progress
from privkd.runs.checkpoint import State


def deliver(game: Game, state: State, numbers: Sequence[int], progress: Progress) -> list[nn.Module]:
    """The students that the devices of ``numbers`` are left with after ``state``; see `student.own_weight`.

    Each is distilled on all public inputs toward the weighted mean of its own answers and the teacher's, from
    a student freshly distilled from the teacher.

    Raises:
        TrainingError: a student's weights are not finite.
    """
    own = [state.students[number] for number in numbers]
    weight = game.config.student.own_weight
    if weight == 1:
        return own
    progress.stage("students: learning from the last teacher")
    with seeded_layers(game.config.seed, "deliver"):
        shared = game.fleet.dealt(game.public_students(state.teacher, round=state.round))
        starts = [shared[number] for number in numbers]
        if weight == 0:
            return starts
        return game.fleet.part(numbers).merge(
            own,
            state.teacher,
            starts,
            game.data.inputs,
            derive_seed(game.config.seed, "deliver"),
            lambda done: progress.advance(done, len(numbers)),
        )
