"""The owner's records as inputs of a published plan: numbered and scaled by its constants alone."""

import torch

from privkd.config import DataConfig
from privkd.data.constants import PUBLIC_SOURCES, check_columns, numbered
from privkd.data.encoding import encoded
from privkd.data.scenario import LabelledSet, build_scenario
from privkd.data.sources import load
from privkd.deployment.owner import RecordsConfig
from privkd.deployment.published import PublishedPlan, Scale
from privkd.errors import DataError

_READ_BY = (
    "source",
    "data_dir",
    "label",
    "drop",
    "text",
    "header",
    "delimiter",
    "decimal",
    "missing",
    "image_size",
)


def own_records(config: RecordsConfig, plan: PublishedPlan) -> LabelledSet:
    """The records at ``config``, as students of ``plan`` learn from them; those of no class are left out.

    Raises:
        DataError: they cannot be read, or are not of the plan's shape.
        ConfigError: ``config`` names columns that its source has not.
    """
    found = _part_of(config, plan) if config.part is not None else _all_of(config, plan)
    if len(found) and tuple(found.inputs.shape[1:]) != plan.input_shape:
        raise DataError(
            f"{config.source}: records of shape {list(found.inputs.shape[1:])}, but the plan's inputs are "
            f"{list(plan.input_shape)}"
        )
    return found


def _all_of(config: RecordsConfig, plan: PublishedPlan) -> LabelledSet:
    columns, tokens = plan.scale.columns, plan.scale.tokens
    given = {name: getattr(config, name) for name in _READ_BY}
    filled = {"missing": "mean"} if any(column.fill is not None for column in columns) else {}
    text = tuple(column.name for column in columns if column.vocabulary)
    as_ids = tokens is not None and tokens.tokenizer is None
    source = load(DataConfig(**given | filled, classes=plan.classes, categorical=text, tokens=as_ids))
    if source.tokens != (tokens is not None):
        wanted, found = ("text", "numbers") if tokens is not None else ("numbers", "text")
        raise DataError(f"{config.source}: holds {found}, and the plan is about {wanted}")
    check_columns(source, columns)
    records = encoded(source.records, columns, source.name)
    labels = numbered(records.labels, plan.classes)
    known = labels < len(plan.classes)
    inputs = plan.constants.features(records.inputs[known])
    return LabelledSet(inputs, torch.from_numpy(labels[known]))


def _part_of(config: RecordsConfig, plan: PublishedPlan) -> LabelledSet:
    """A simulated device's shard of a public data set."""
    if config.source not in PUBLIC_SOURCES or config.part is None:
        raise DataError(f"records.part is for trials with {', '.join(PUBLIC_SOURCES)}, not {config.source!r}")
    number, devices = config.part
    scenario = build_scenario(
        DataConfig(source=config.source, data_dir=config.data_dir, devices=devices), seed=0
    )
    if scenario.labels != plan.classes or Scale.of(scenario.constants) != plan.scale:
        raise DataError(f"{config.source}: its classes or their scale are not the plan's")
    return scenario.devices[number].train
