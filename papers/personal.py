"""How well each model answers on the devices' own distributions."""

import statistics
from collections.abc import Mapping, Sequence

from torch import nn

from privkd.data.scenario import Device
from privkd.errors import RunError
from privkd.prepared import HELD_BY_DEVICES, finished, reopen_simulation
from privkd.privacy.randomness import seeded_layers
from privkd.progress import Silent
from privkd.runs.folder import RunFolder
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
    prepared = reopen_simulation(folder, HELD_BY_DEVICES)
    done = finished(prepared, folder)
    state = done.state
    devices = [number for number, device in enumerate(prepared.scenario.devices) if len(device.test)]
    if not devices:
        raise RunError(f"{folder.path}: no device has test records; set data.device_test_records")
    tested = [prepared.scenario.devices[number] for number in devices]
    own = _accuracies(prepared.personalised(done, devices, Silent()), tested)
    trained = _accuracies([done.students[number] for number in devices], tested)
    with seeded_layers(prepared.config.seed, "global"):
        shared = prepared.cloud.public_students(state.teacher, round=state.round)[0]
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
