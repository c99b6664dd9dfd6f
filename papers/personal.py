"""How well each model answers on the devices' own distributions."""

import statistics
from collections.abc import Mapping, Sequence

from torch import nn

from privkd.data.scenario import Device
from privkd.delivery import deliver
from privkd.errors import RunError
from privkd.privacy.randomness import seeded_layers
from privkd.progress import Silent
from privkd.reopening import reopened_simulation
from privkd.runs.folder import RunFolder
from privkd.students import HELD_BY_DEVICES, finished_state
from privkd.training.fit import accuracy


def personal_figures(folder: RunFolder) -> Mapping[str, float]:
    """Means over the devices of accuracies on each device's own test set; devices without one are left out.

    ``personal.student`` is the student that each device is left with, ``personal.trained`` the one it trained
    in the last round, ``personal.teacher`` the last teacher, and ``personal.global`` the student that a
    device would start from in the next round: distilled from the last teacher on public data alone, the
    same for all. ``personal.worst`` is the first's worst device.

    Raises:
        RunError: the run is not finished, or no device has test records.
    """
    game = reopened_simulation(folder, HELD_BY_DEVICES)
    state = finished_state(game, folder)
    devices = [number for number, device in enumerate(game.scenario.devices) if len(device.test)]
    if not devices:
        raise RunError(f"{folder.path}: no device has test records; set data.device_test_records")
    tested = [game.scenario.devices[number] for number in devices]
    own = _accuracies(deliver(game, state, devices, Silent()), tested)
    trained = _accuracies([state.students[number] for number in devices], tested)
    with seeded_layers(game.config.seed, "global"):
        shared = game.public_students(state.teacher, round=state.round)[0]
    return {
        "personal.student": statistics.fmean(own),
        "personal.trained": statistics.fmean(trained),
        "personal.worst": min(own),
        "personal.global": statistics.fmean(_accuracies([shared] * len(tested), tested)),
        "personal.teacher": statistics.fmean(_accuracies([state.teacher] * len(tested), tested)),
    }


def _accuracies(models: Sequence[nn.Module], devices: Sequence[Device]) -> list[float]:
    return [
        accuracy(model, device.test.inputs, device.test.labels)
        for model, device in zip(models, devices, strict=True)
    ]
