"""What many students answer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from privkd.architecture import group_by_architecture
from privkd.cohort.chunks import (
    DEFAULT_MEMORY_BUDGET,
    Cost,
    MemoryMeter,
    chunk_students,
    records_per_pass,
)
from privkd.cohort.formulations import Formulation, answering
from privkd.cohort.weights import Weights
from privkd.fitting import logits_of
from privkd.frontend import Parted


@torch.no_grad()
def cohort_answers(
    models: Sequence[nn.Module], inputs: Tensor, *, memory_budget: int = DEFAULT_MEMORY_BUDGET
) -> Tensor:
    """Each student's logits in evaluation mode, ``[student, query, class]``; all have the same ``inputs``.

    Args:
        models: at least one, of any architectures with equal classes; left unchanged.
        inputs: ``[query, *shape]``.
        memory_budget: bytes that may be taken beyond the arguments and the result.
    """
    answers: dict[int, Tensor] = {}
    for chosen in group_by_architecture(models):
        answers.update(zip(chosen, _answers([models[i] for i in chosen], inputs, memory_budget), strict=True))
    return torch.stack([answers[i] for i in range(len(models))])


def _answers(models: Sequence[nn.Module], inputs: Tensor, budget: int) -> list[Tensor]:
    several = len(models) > 1 and len(inputs) > 0
    if not several:
        return [logits_of(model, inputs) for model in models]
    inputs = Parted.of(models[0]).features(inputs)
    models = [Parted.of(model).rest for model in models]
    formulation = answering(models[0], tuple(inputs.shape[1:]))
    if formulation is None:
        return [logits_of(model, inputs) for model in models]
    cost = _cost(formulation, models[0], inputs)
    answers: dict[int, Tensor] = {}
    for chunk in chunk_students(dict.fromkeys(range(len(models)), 1.0), cost, budget=budget):
        state = Weights.stack([models[i] for i in chunk], frozenset()).frozen_views
        size = records_per_pass(len(chunk), cost, budget=budget)
        parts = [
            formulation.outputs(state, part.expand(len(chunk), *part.shape)) for part in inputs.split(size)
        ]
        answers |= zip(chunk, torch.cat(parts, dim=1), strict=True)
    return [answers[i] for i in range(len(models))]


def _cost(formulation: Formulation, model: nn.Module, inputs: Tensor) -> Cost:
    weights = Weights.stack([model], frozenset())
    few = inputs[:2].unsqueeze(0)
    with MemoryMeter() as meter:
        formulation.outputs(weights.frozen_views, few)
    return Cost(weights.frozen.nbytes, meter.bytes // few.shape[1] + few.nbytes // few.shape[1])
