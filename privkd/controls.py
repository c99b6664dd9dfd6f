"""What a gain is measured against: teachers that learned from no device, students trained directly.

The cloud's controls use what the cloud holds. The devices' belong to simulations: they use private records
beside the run itself, so their figures are not covered by its ledger, and a deployment must not compute them.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn import functional as F

from privkd.cloud import Cloud, Targets
from privkd.data.scenario import Device, LabelledSet
from privkd.engines.simulation import Simulation
from privkd.privacy.randomness import SeededRandomness, derive_seed
from privkd.progress import Progress
from privkd.training.dpsgd import Mechanism, with_capped_learning_rate
from privkd.training.fit import accuracy, logits_of

_MEASURED = 20


@dataclass(frozen=True)
class Controls:
    """Mean accuracies on the global test set of students trained on their device's records alone.

    ``direct`` without a teacher and without DP; ``direct_private`` without a teacher and with the run's
    whole budget. ``None`` where it was not computed.
    """

    direct: float | None
    direct_private: float | None


def measure_controls(
    simulation: Simulation,
    fresh: Sequence[nn.Module],
    mechanism: Mechanism | None,
    *,
    rounds: int,
    test: LabelledSet,
    seed: int,
    progress: Progress,
) -> Controls:
    """Train each device's student from scratch, directly on its labels.

    Args:
        simulation: the devices.
        fresh: untrained students, one for each device.
        mechanism: of one round of the run, whose noise multiplier and samples are spent over all
            ``rounds`` at once; ``None`` without DP.
        rounds: number of rounds. The controls take as many steps on private records as the run's students
            take in all of them.
        test: global test set.
        seed: of the batches, samples and noise.
        progress: told of each device.
    """
    total = len(simulation.devices)
    progress.stage("control: students trained directly")
    once = simulation.config.private_fit
    direct = simulation.fit(
        fresh,
        None,
        once.model_copy(update={"steps": once.steps * rounds}),
        derive_seed(seed, "direct"),
        lambda n: progress.advance(n, total),
    )
    direct_accuracy = mean_accuracy(direct, test)
    if mechanism is None:
        return Controls(direct_accuracy, None)
    progress.stage("control: students trained directly with DP-SGD")
    recipe = simulation.config.direct_dp.model_copy(
        update={
            "steps": mechanism.recipe.steps * rounds,
            "sampling_rate": mechanism.recipe.sampling_rate,
        }
    )
    private = simulation.train_private(
        fresh,
        None,
        replace(
            mechanism,
            recipe=with_capped_learning_rate(
                recipe, mechanism.noise_multiplier, mechanism.expected_batch_size
            ),
        ),
        lambda name: SeededRandomness(seed, "direct", name),
        lambda n: progress.advance(n, total),
    )
    return Controls(direct_accuracy, mean_accuracy(private, test))


def measured_devices(count: int) -> range:
    """The numbers of those of ``count`` devices whose students are measured: 20 at most, evenly spaced."""
    return range(0, count, max(1, math.ceil(count / _MEASURED)))


def mean_accuracy(models: Sequence[nn.Module], test: LabelledSet) -> float:
    """Mean of the accuracy on ``test`` over those of ``models`` that are measured, 20 at most."""
    measured = [models[number] for number in measured_devices(len(models))]
    found = {id(model): model for model in measured}
    each = {key: accuracy(model, test.inputs, test.labels) for key, model in found.items()}
    return statistics.fmean(each[id(model)] for model in measured)


def class_accuracies(model: nn.Module, test: LabelledSet, classes: int) -> list[float]:
    """Accuracy on the records of each class in ``test``; NaN for a class without one."""
    labels = test.labels.cpu()
    right = logits_of(model, test.inputs).argmax(-1).cpu() == labels
    shares: list[float] = (
        labels.bincount(right.double(), minlength=classes) / labels.bincount(minlength=classes)
    ).tolist()
    return shares


def personal_accuracy(students: Sequence[nn.Module], devices: Sequence[Device]) -> float:
    """Mean over ``students`` of the accuracy on their devices' own test sets; NaN where no device has one.

    No ledger covers it: it belongs to simulations.
    """
    found = [
        accuracy(student, device.test.inputs, device.test.labels)
        for student, device in zip(students, devices, strict=True)
        if len(device.test)
    ]
    return statistics.fmean(found) if found else math.nan


@dataclass(frozen=True)
class NoDeviceTeachers:
    """Two teachers that learn as long as the run's, on the same batches and behind the same gate, but from no
    device.

    Neither is always the stronger: own answers hold a teacher that would overfit, and hold back one that
    would not. What devices add is measured against the better of the two.

    Attributes:
        self_distilled: learns its own answers in place of each release.
        labels_only: learns the public labels alone, as the run's teacher does where it trusts nothing
            that was released.
    """

    self_distilled: nn.Module
    labels_only: nn.Module

    def after(self, cloud: Cloud, queries: Tensor, round: int) -> "NoDeviceTeachers":
        """Both after one more update, in ``round``.

        Args:
            cloud: that of the run.
            queries: proxy indices that the run's teacher learns from, int64 ``[query]``.
            round: from 0.
        """

        def learned(teacher: nn.Module, weight: float) -> nn.Module:
            own = F.softmax(logits_of(teacher, cloud.data.proxy[queries]), dim=-1)
            targets = Targets(queries, own, own.new_full((len(queries),), weight), own)
            return cloud.update(teacher, targets, round).teacher

        return NoDeviceTeachers(learned(self.self_distilled, 1.0), learned(self.labels_only, 0.0))
