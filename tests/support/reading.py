"""A source as tests look at it: every record converted, as if all were public, and no table standardised."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, from_numpy

from privkd.config import DataConfig
from privkd.data import Source, load
from privkd.data.constants import Constants, find_constants, label_space, numbered, numbered_test
from privkd.data.encoding import encoded_source


@dataclass(frozen=True)
class Read:
    """Inputs and class numbers of all records, and of the test split that came with them."""

    inputs: Tensor
    labels: Tensor
    classes: int
    constants: Constants
    test_inputs: Tensor | None = None
    test_labels: Tensor | None = None


def in_public(source: Source, config: DataConfig | None = None) -> Read:
    """``source`` with all of its records public."""
    config = config or DataConfig(source="own", standardise="no")
    classes = label_space(source, config)
    constants = find_constants(source, np.arange(len(source.records.labels)), config)
    source = encoded_source(source, constants.columns)
    test_inputs, test_labels = None, None
    if source.test is not None:
        test_inputs = constants.features(source.test.inputs)
        test_labels = from_numpy(numbered_test(source, source.test, classes, config))
    return Read(
        constants.features(source.records.inputs),
        from_numpy(numbered(source.records.labels, classes)),
        len(classes),
        constants,
        test_inputs,
        test_labels,
    )


def read(path: Path | str, data_dir: Path | None = None, **settings: Any) -> Read:
    """The data set that ``path`` names."""
    config = DataConfig(source=str(path), data_dir=data_dir, **{"standardise": "no"} | settings)
    return in_public(load(config), config)
