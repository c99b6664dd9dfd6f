"""From settings and a seed to a ``Scenario``."""

import torch

from privkd.config import DataConfig
from privkd.data.partition import Indices
from privkd.data.scenario import Device, LabelledSet, Scenario
from privkd.data.source import Source
from privkd.data.sources import load
from privkd.data.split import split_indices
from privkd.data.style import restyle


def build_scenario(config: DataConfig, seed: int) -> Scenario:
    """Load the source and split it. A pure function of its arguments and of the files they name.

    Raises:
        ConfigError: settings that do not go together.
        DataError: the source is missing, malformed, or too small for the request.
    """
    return scenario_from(load(config), config, seed)


def scenario_from(source: Source, config: DataConfig, seed: int) -> Scenario:
    """Split a source that is already loaded; ``config.source`` still chooses the default sizes.

    Raises:
        ConfigError: settings that do not go together.
        DataError: the source is too small for the request.
    """
    split = split_indices(source.labels.numpy(), config, seed, given_test=source.test_inputs is not None)
    altered = config.gap == "style"
    return Scenario(
        public=_select(source, split.public),
        validation=_select(source, split.validation),
        proxy=_select(source, split.proxy, altered=altered).inputs,
        devices=tuple(
            Device(
                name=f"device-{number:04d}",
                train=_select(source, train, altered=altered),
                test=_select(source, test, altered=altered),
            )
            for number, (train, test) in enumerate(zip(split.device_train, split.device_test, strict=True))
        ),
        test=_global_test(source, split.test, altered=altered),
        classes=source.classes,
        records_per_device=split.records_per_device,
        gap_classes=split.gap_classes,
        divisor=source.divisor,
    )


def _select(source: Source, indices: Indices, *, altered: bool = False) -> LabelledSet:
    chosen = torch.from_numpy(indices)
    inputs = source.inputs[chosen]
    return LabelledSet(restyle(inputs) if altered else inputs, source.labels[chosen])


def _global_test(source: Source, drawn: Indices, *, altered: bool) -> LabelledSet:
    if source.test_inputs is None or source.test_labels is None:
        return _select(source, drawn, altered=altered)
    return LabelledSet(restyle(source.test_inputs) if altered else source.test_inputs, source.test_labels)
