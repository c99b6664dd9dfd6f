"""How students of one architecture are trained: found once, kept for the next cohort of the same kind."""

import copy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Self

import torch
from torch import nn

from privkd.cohort.architecture import Architecture
from privkd.cohort.formulations import choose
from privkd.cohort.gradients import Footprint, Gradients
from privkd.cohort.objective import Objective
from privkd.cohort.weights import Weights

_PROBE_RECORDS = 2
_KEPT = 32


@dataclass(frozen=True)
class Plan:
    """What training needs to know beforehand.

    Attributes:
        gradients: how they are computed.
        classes: how many the students tell apart.
        footprint: the memory that training takes.
    """

    gradients: Gradients
    classes: int
    footprint: Footprint

    def in_passes(self, records: int) -> Self:
        """The same with at most so many records of each student in a pass."""
        return replace(self, gradients=replace(self.gradients, records_per_pass=records))


def plan_of(
    model: nn.Module,
    input_shape: tuple[int, ...],
    trained: frozenset[str],
    objective: Objective,
    clip_norm: float | None,
) -> Plan | None:
    """The fastest way to train students like ``model``; ``None`` if only one after another will do.

    Args:
        model: one of the students; only its architecture matters.
        input_shape: of one record.
        trained: names of the parameters in training.
        objective: the loss.
        clip_norm: of each record's gradient, or ``None`` without privacy.
    """
    example = _Example(Architecture.of(model), model)
    find = _found if example.architecture.by_value else _found.__wrapped__
    return find(example, input_shape, trained, objective, clip_norm)


@dataclass(frozen=True)
class _Example:
    """A model that stands for its architecture."""

    architecture: Architecture
    model: nn.Module = field(compare=False)


@lru_cache(maxsize=_KEPT)
def _found(
    example: _Example,
    input_shape: tuple[int, ...],
    trained: frozenset[str],
    objective: Objective,
    clip_norm: float | None,
) -> Plan | None:
    model = example.model
    formulation = choose(model, input_shape, training=True, trained=trained) if trained else None
    if formulation is None:
        return None
    gradients = Gradients(formulation, objective, clip_norm, trained).with_frozen_part(model, input_shape)
    weights = Weights.stack([model], trained)
    blank = weights.trained.new_zeros((1, _PROBE_RECORDS, *input_shape))
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        classes = int(twin(blank[0]).shape[-1])
    return Plan(gradients, classes, gradients.footprint(weights, blank, classes))
