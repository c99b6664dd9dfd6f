"""What the audited device hides in a game, drawn by the challenger before anything is trained."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privkd.data.scenario import LabelledSet, Scenario
from privkd.errors import ConfigError, DataError
from privkd.privacy.randomness import seeded_generator

Floats = NDArray[np.float64]
Secrets = NDArray[np.int64]

_LEAST_RECORDS = 2


@dataclass(frozen=True)
class ClassSecrets:
    """One device holds a class that the public set lacks; which one is the secret of each trial.

    The records are filed under one label, the ``slot``, whatever they show, so that no label tells. Every one
    of the ``classes`` is as likely: a guess without the release is right in one of ``len(classes)`` trials.

    Attributes:
        slot: the label under which the secret class is filed.
        classes: the candidates.
        secrets: index of each trial's class among them, int64 ``[trial]``.
        shards: the device's training records in each trial.
        appearances: mean record of each candidate, of held-out records ``[candidate, *shape]``.
    """

    slot: int
    classes: tuple[int, ...]
    secrets: Secrets
    shards: tuple[LabelledSet, ...]
    appearances: Floats


@dataclass(frozen=True)
class RecordSecrets:
    """One record of the device is secret, drawn uniformly among the candidates; all others are known.

    Attributes:
        known: the device's other records.
        candidates: ``[candidate]``, held-out records.
        secrets: index of each trial's record among them, int64 ``[trial]``.
        public: labelled public records, of which the adversary makes shadows ``[shadow]``.
    """

    known: LabelledSet
    candidates: LabelledSet
    secrets: Secrets
    public: LabelledSet

    def shard(self, record: LabelledSet) -> LabelledSet:
        """The device's records with this one for the secret."""
        return LabelledSet(
            torch.cat([self.known.inputs, record.inputs]), torch.cat([self.known.labels, record.labels])
        )


def lacks_classes(scenario: Scenario) -> bool:
    """Whether the public set lacks, or holds rarely, enough classes for `ClassSecrets`."""
    return len(scenario.gap_classes) >= 2


def draw_classes(scenario: Scenario, device: int, trials: int, seed: int) -> ClassSecrets:
    """The class game: each trial's secret class among those that the public set lacks or holds rarely.

    Raises:
        ConfigError: no such device, or fewer than two such classes.
        DataError: a class has no records to play with.
    """
    _check_device(scenario, device)
    if not lacks_classes(scenario):
        raise ConfigError(
            f"the public set lacks {len(scenario.gap_classes)} classes, and the game takes 2 or more: "
            "train with --set data.gap=withheld"
        )
    classes, slot = scenario.gap_classes, scenario.gap_classes[0]
    concerned = torch.tensor(classes)
    held = LabelledSet(
        torch.cat([holder.train.inputs for holder in scenario.devices]),
        torch.cat([holder.train.labels for holder in scenario.devices]),
    )
    own = scenario.devices[device].train
    always = _part(own, ~torch.isin(own.labels, concerned.to(own.labels.device)))
    places = [(held.labels == c).nonzero().flatten().cpu() for c in classes]
    count = min(max(1, scenario.records_per_device // scenario.classes), *(len(found) for found in places))
    if not count or not all(bool((scenario.test.labels == c).any()) for c in classes):
        raise DataError(
            f"of the classes {list(classes)}, one has no private or no held-out record to play with"
        )
    generator = seeded_generator(seed, "audit", "class secrets")
    secrets = torch.randint(len(classes), (trials,), generator=generator)
    shards = []
    for secret in secrets.tolist():
        order = torch.randperm(len(places[secret]), generator=generator)[:count]
        hidden = held.inputs[places[secret][order].to(held.inputs.device)]
        labels = torch.cat([always.labels, always.labels.new_full((count,), slot)])
        shards.append(LabelledSet(torch.cat([always.inputs, hidden]), labels))
    return ClassSecrets(slot, classes, secrets.numpy(), tuple(shards), _appearances(scenario))


def without_classes(records: LabelledSet, classes: tuple[int, ...]) -> LabelledSet:
    """The records of all other classes."""
    return _part(records, ~torch.isin(records.labels, torch.tensor(classes, device=records.labels.device)))


def draw_records(
    scenario: Scenario, device: int, *, candidates: int, trials: int, shadows: int, seed: int
) -> RecordSecrets:
    """The record game: each trial's secret record, and public records for ``shadows``.

    Raises:
        ConfigError: no such device.
        DataError: too few records.
    """
    _check_device(scenario, device)
    own = scenario.devices[device].train
    if len(scenario.test) < candidates or len(own) < _LEAST_RECORDS:
        raise DataError(
            f"candidates={candidates}: {len(scenario.test)} held-out records, and device {device} has "
            f"{len(own)}; it takes as many of the first as candidates, and 2 of the second"
        )
    generator = seeded_generator(seed, "audit", "record secrets")
    chosen = torch.randperm(len(scenario.test), generator=generator)[:candidates]
    lent = torch.randperm(len(scenario.public), generator=generator)[:shadows]
    kept = torch.randperm(len(own), generator=generator)[1:]
    secrets = torch.randint(candidates, (trials,), generator=generator)
    return RecordSecrets(
        known=_part(own, kept),
        candidates=_part(scenario.test, chosen),
        secrets=secrets.numpy(),
        public=_part(scenario.public, lent),
    )


def numbers(inputs: Tensor) -> Floats:
    """Records as float64 on the CPU."""
    return np.asarray(inputs.detach().to("cpu", torch.float64).numpy(), dtype=np.float64)


def _appearances(scenario: Scenario) -> Floats:
    test = scenario.test
    return np.stack([numbers(test.inputs[test.labels == c]).mean(axis=0) for c in scenario.gap_classes])


def _check_device(scenario: Scenario, device: int) -> None:
    if device >= len(scenario.devices):
        raise ConfigError(f"device={device}: expected 0 to {len(scenario.devices) - 1}")


def _part(records: LabelledSet, chosen: Tensor) -> LabelledSet:
    place = chosen.to(records.labels.device)
    return LabelledSet(records.inputs[place], records.labels[place])
