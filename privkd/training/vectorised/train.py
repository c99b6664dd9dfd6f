"""Train many students of one architecture, with DP-SGD or without, and ask them."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from privkd.config import DpSgdConfig, FitConfig
from privkd.data.scenario import LabelledSet
from privkd.models.architecture import group_by_architecture
from privkd.models.features import Parted
from privkd.models.inputs import InputType
from privkd.models.zoo import trained_parameters
from privkd.privacy.randomness import Randomness
from privkd.training.dpsgd import Mechanism, TailAverage, full_precision, train_private, train_unprotected
from privkd.training.fit import check_finite, logits_of
from privkd.training.vectorised.cohort import Plan, Students, in_chunks
from privkd.training.vectorised.gradients import Formulation, answering
from privkd.training.vectorised.memory import (
    DEFAULT_MEMORY_BUDGET,
    Cost,
    MemoryMeter,
    Progress,
    chunk_students,
    records_per_pass,
)
from privkd.training.vectorised.tensors import Objective, Weights, views

_DRAWN_AT_ONCE = 1 << 20
"""Records times steps for which samples are drawn in one go."""

Report = Callable[[int], None]
"""Told how many students' worth of steps are done."""


def train_cohort(
    models: Sequence[nn.Module],
    shards: Sequence[LabelledSet],
    teacher_logits: Sequence[Tensor] | None,
    mechanism: Mechanism,
    randomness: Sequence[Randomness],
    *,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    progress: Report | None = None,
) -> list[nn.Module]:
    """`student.train_private` for many students at once; given the same randomness, the same weights.

    Each student has its own initial weights, shard (of any size, also none), targets, Poisson samples and
    noise, so the guarantee is the same: DP-SGD for the relation "add or remove one unit", a record or a
    person, of one student.

    Args:
        models: students of one architecture; left unchanged. One may appear several times.
        shards: the private records of each.
        teacher_logits: the frozen teacher's answers on each shard ``[record, class]``, or ``None``.
        mechanism: the public parameters, the same for all.
        randomness: the source of each student's samples and noise.
        memory_budget: bytes that training may take beyond its arguments and results. The cohort is cut
            into chunks of students, and batches into passes, to stay within it.
        progress: see `Report`.

    Raises:
        DataError: the sequences differ in length, or persons are the units and nothing says whose the records
            are.
        ModelError: the students differ in architecture.
    """
    students = Students.of(models, shards, teacher_logits, randomness)
    recipe = mechanism.recipe
    report = Progress(progress, steps=recipe.steps)

    def train_one(i: int) -> nn.Module:
        return train_private(models[i], shards[i], students.targets(i), mechanism, randomness[i])

    def train_chunk(chosen: list[int], plan: Plan) -> list[nn.Module]:
        sources = [randomness[i] for i in chosen]
        return _train_privately(students.part(chosen), plan, mechanism, sources, report)

    with full_precision():
        plan = _private_plan(students, mechanism, teacher_logits)
        if plan is None:
            return [report.after(train_one(i)) for i in range(len(models))]
        expected = _expected(students, mechanism)
        trained = in_chunks(train_chunk, students, plan, expected, memory_budget, mechanism.unit)
    return [trained[i] for i in range(len(models))]


def _expected(students: Students, mechanism: Mechanism) -> dict[int, float]:
    """Each student's expected batch in records, as they are laid out."""
    rate, expected = mechanism.recipe.sampling_rate, dict[int, float]()
    for i, units in enumerate(students.units(mechanism.unit)):
        slots = 1 if units.of is None else units.table[1].shape[1]
        expected[i] = units.count * rate * slots
    return expected


def is_vectorised(model: nn.Module, shard: LabelledSet, mechanism: Mechanism) -> bool:
    """Whether `train_cohort` trains students like ``model``, on shards like this, as one program."""
    students = Students.of([model], [shard], None, [None])
    return _private_plan(students, mechanism, teacher_logits=()) is not None


def _private_plan(students: Students, mechanism: Mechanism, teacher_logits: object | None) -> Plan | None:
    recipe = mechanism.recipe
    return students.plan(
        Objective.of(mechanism.alpha, mechanism.temperature, teacher_logits),
        recipe.clip_norm,
        lambda m: trained_parameters(m, recipe.part),
        mechanism.probe,
        mechanism.unit,
    )


def fit_cohort(
    models: Sequence[nn.Module],
    shards: Sequence[LabelledSet],
    teacher_logits: Sequence[Tensor] | None,
    config: FitConfig,
    generators: Sequence[torch.Generator],
    *,
    alpha: float,
    temperature: float,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    progress: Report | None = None,
) -> list[nn.Module]:
    """`student.train_unprotected` for many students at once; given the same generators, the same weights.

    No privacy: for runs that ask for none, controls and shadow models. Arguments and errors as for
    `train_cohort`, but:

    Args:
        config: of each student's training.
        generators: on the CPU, one a student; sources of the batches.
        alpha: weight of the teacher in the loss.
        temperature: of the teacher's term.

    Raises:
        TrainingError: the weights of a student are not finite at the end.
    """
    students = Students.of(models, shards, teacher_logits, generators)
    report = Progress(progress, steps=config.steps)

    def train_one(i: int) -> nn.Module:
        own = (models[i], shards[i], students.targets(i), config, generators[i])
        return train_unprotected(*own, alpha=alpha, temperature=temperature)

    def train_chunk(chosen: list[int], plan: Plan) -> list[nn.Module]:
        return _fit(students.part(chosen), plan, config, [generators[i] for i in chosen], report)

    plan = students.plan(
        Objective.of(alpha, temperature, teacher_logits),
        None,
        lambda m: [p for p in m.parameters() if p.requires_grad],
    )
    # Without records there is nothing to draw batches from: such a student stays as it is.
    expected = {i: float(config.batch_size) for i, shard in enumerate(shards) if len(shard)}
    trained: dict[int, nn.Module] = {}
    if plan is not None and expected:
        trained = in_chunks(train_chunk, students, plan, expected, memory_budget)
    fitted = [trained[i] if i in trained else report.after(train_one(i)) for i in range(len(models))]
    for i, model in enumerate(fitted):
        check_finite(model, f"student {i}", config.learning_rate)
    return fitted


def _train_privately(
    students: Students,
    plan: Plan,
    mechanism: Mechanism,
    randomness: Sequence[Randomness],
    report: Progress,
) -> list[nn.Module]:
    recipe = mechanism.recipe
    gradients = plan.gradients
    weights = students.weights(gradients.trained)
    records = gradients.features(weights, students.records(plan, mechanism.unit))
    theta = weights.trained
    optimizer = _optimizer(theta, recipe)
    average = TailAverage([theta], steps=recipe.steps, share=recipe.averaging)
    theta.grad = torch.empty_like(theta)
    sums = torch.empty_like(theta, dtype=torch.float64)
    totals = views(sums, weights.trained_slots)
    noise_std = mechanism.noise_multiplier * recipe.clip_norm
    noise = torch.empty(theta.shape, dtype=torch.float64)
    for sample in _poisson_samples(randomness, records.units, recipe):
        index, present = records.poisson(sample)
        gradients.write_to(totals, weights, records, index, present)
        for row, source in zip(noise, randomness, strict=True):
            row.copy_(source.noise(len(row)))
        # In float64 and rounded once, so that no low bit betrays what the noise was added to.
        sums.add_(noise.to(theta.device), alpha=noise_std).div_(mechanism.expected_batch_size)
        theta.grad.copy_(sums)
        optimizer.step()
        average.update([theta])
        report.advance(len(randomness))
    average.write([theta])
    return [students.parted.rejoined(model) for model in weights.models(students.models)]


def _poisson_samples(
    randomness: Sequence[Randomness], counts: Sequence[int], recipe: DpSgdConfig
) -> Iterator[Tensor]:
    """For each step, all students' samples, one after another, bool ``[unit]``."""
    at_once = max(1, _DRAWN_AT_ONCE // max(1, sum(counts)))
    for start in range(0, recipe.steps, at_once):
        steps = min(at_once, recipe.steps - start)
        drawn = [
            source.samples(steps, count, recipe.sampling_rate)
            for source, count in zip(randomness, counts, strict=True)
        ]
        yield from torch.cat(drawn, dim=1)


def _optimizer(theta: Tensor, recipe: DpSgdConfig) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.Adam([theta], lr=recipe.learning_rate, fused=True)
    return torch.optim.SGD([theta], lr=recipe.learning_rate, momentum=recipe.momentum, fused=True)


def _fit(
    students: Students,
    plan: Plan,
    config: FitConfig,
    generators: Sequence[torch.Generator],
    report: Progress,
) -> list[nn.Module]:
    gradients = plan.gradients
    weights = students.weights(gradients.trained)
    records = gradients.features(weights, students.records(plan))
    theta = weights.trained
    optimizer = torch.optim.AdamW(
        [theta], lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.steps)
    theta.grad = torch.empty_like(theta)
    totals = views(theta.grad, weights.trained_slots)
    share = torch.full((len(generators), config.batch_size), 1.0 / config.batch_size)
    for _ in range(config.steps):
        draws = [
            torch.randint(count, (config.batch_size,), generator=generator)
            for generator, count in zip(generators, records.counts, strict=True)
        ]
        gradients.write_to(totals, weights, records, records.index(draws), share)
        optimizer.step()
        schedule.step()
        report.advance(len(generators))
    return [students.parted.rejoined(model) for model in weights.models(students.models)]


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
    formulation = answering(models[0], InputType.of(inputs))
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
