"""From settings and a seed to a ``Scenario``."""

import torch

from privkd.config import DataConfig
from privkd.data.constants import (
    Constants,
    check_set,
    find_constants,
    in_words,
    label_space,
    numbered,
    numbered_test,
    unset,
)
from privkd.data.partition import Indices
from privkd.data.scenario import Device, LabelledSet, Scenario
from privkd.data.source import RawSet, Source
from privkd.data.sources import load
from privkd.data.split import split_indices
from privkd.data.style import restyle


def build_scenario(config: DataConfig, seed: int, *, deployment: bool = False) -> Scenario:
    """Load the source and split it. A pure function of its arguments and of the files they name.

    Nothing public depends on a private record, but for the constants that ``inferred`` names; a
    ``deployment`` infers none.

    Raises:
        ConfigError: settings that do not go together, or that a deployment must be given.
        DataError: the source is missing, malformed, or too small for the request.
    """
    return scenario_from(load(config), config, seed, deployment=deployment)


def scenario_from(source: Source, config: DataConfig, seed: int, *, deployment: bool = False) -> Scenario:
    """Split a source that is already loaded; ``config.source`` still says whether it is a public data set.

    Raises:
        ConfigError: settings that do not go together, or that a deployment must be given.
        DataError: the source is too small for the request, or a public record's label is no class.
    """
    given_test = source.test is not None
    if deployment:
        check_set(config, given_test=given_test)
    classes = label_space(source, config)
    labels = numbered(source.records.labels, classes)
    split = split_indices(
        labels, config, seed, classes=len(classes), given_test=given_test, names=source.names
    )
    constants = find_constants(source, split.shown, config)
    style = config.gap == "style"

    def select(indices: Indices, *, altered: bool = False, private: bool = False) -> LabelledSet:
        inputs = constants.features(source.records.inputs[indices])
        if altered:
            # A private value out of range must not stop the run where everybody sees it.
            inputs = restyle(inputs.clamp_(0, 1) if private else inputs)
        return LabelledSet(inputs, torch.from_numpy(labels[indices]))

    return Scenario(
        public=select(split.public),
        validation=select(split.validation),
        proxy=select(split.proxy, altered=style).inputs,
        devices=tuple(
            Device(
                name=f"device-{number:04d}",
                train=select(train, altered=style, private=True),
                test=select(test, altered=style, private=True),
            )
            for number, (train, test) in enumerate(zip(split.device_train, split.device_test, strict=True))
        ),
        test=(
            select(split.test, altered=style)
            if source.test is None
            else _given(source, source.test, constants, classes, config)
        ),
        classes=len(classes),
        records_per_device=split.records_per_device,
        gap_classes=split.gap_classes,
        divisor=constants.divisor,
        inferred=in_words(unset(config, given_test=given_test)),
        taken={**source.taken, "scale": constants.said},
    )


def _given(
    source: Source, test: RawSet, constants: Constants, classes: tuple[str, ...], config: DataConfig
) -> LabelledSet:
    """The test split that came with the data, whole."""
    labels = numbered_test(source, test, classes, config)
    inputs = constants.features(test.inputs)
    return LabelledSet(restyle(inputs) if config.gap == "style" else inputs, torch.from_numpy(labels))
