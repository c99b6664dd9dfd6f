"""What a run would do and cost, before any private record is touched."""

import math
from dataclasses import dataclass

from privkd.config import RunConfig
from privkd.federation import open_game
from privkd.models.zoo import parameter_count
from privkd.plan import Plan
from privkd.training.dpsgd import seconds_per_step


@dataclass(frozen=True)
class Forecast:
    """A plan and what it takes: the student's ``parameters``, and about how many ``seconds`` the devices'
    private training would take one after the other on this machine, from one real step on made-up records."""

    plan: Plan
    parameters: int
    seconds: float


def forecast(config: RunConfig) -> Forecast:
    """What a run would do and cost. Raises as `open_game` does."""
    game = open_game(config)
    plan, student = game.plan, game.blank()[1][0].cpu()
    step = seconds_per_step(
        student,
        input_shape=game.scenario.input_shape,
        classes=game.scenario.classes,
        recipe=config.student.dp,
        batch=math.ceil(plan.expected_batch_size),
    )
    return Forecast(plan, parameter_count(student), step * plan.steps * plan.rounds * plan.devices)
