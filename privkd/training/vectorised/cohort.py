"""A cohort of students of one architecture: how it is trained, found once, and its training in chunks."""

import copy
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Self

import torch
from torch import Tensor, nn

from privkd.data.scenario import LabelledSet
from privkd.errors import DataError, ModelError
from privkd.models.architecture import Example, same_architecture
from privkd.models.features import Parted
from privkd.models.inputs import InputType
from privkd.privacy.events import Unit
from privkd.training.proof import (
    BATCHES,
    Probe,
    agree,
    buffers_kept,
    clipped,
    gradients_alone,
    keep_statistics,
    one_hots,
    perturbed,
)
from privkd.training.units import Units
from privkd.training.vectorised.gradients import (
    BookKeeping,
    Footprint,
    FormulationName,
    Gradients,
    OutputProbe,
    candidates,
)
from privkd.training.vectorised.memory import chunk_students, flushed_denormals, records_per_pass
from privkd.training.vectorised.tensors import Objective, Owners, Records, Weights, joined, views

_PROBE_RECORDS = 2
_KEPT = 32
_PERSON_OF = (0, 0, 1, 2, 2, 2, 3, 4, 4, 4)
_PERSONS = (slice(0, 2), slice(2, 5))
"""Whose a probe's records are where persons are clipped, and these persons as two batches."""


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
    inputs: InputType,
    trained: frozenset[str],
    objective: Objective,
    clip_norm: float | None,
    probe: Probe | None = None,
    unit: Unit = Unit.RECORD,
) -> Plan | None:
    """The fastest way to train students like ``model``; ``None`` if only one after another will do.

    With a clip norm, the gradients are proved to be those of plain autograd, record by record, added up for
    each ``unit`` and clipped, at the weights of ``model`` and at perturbed ones.

    Args:
        model: one of the students.
        inputs: that which it takes.
        trained: names of the parameters in training.
        objective: the loss.
        clip_norm: of each unit's gradient, or ``None`` without privacy.
        probe: the records of the proof; made-up ones without it.
        unit: a record or a person.
    """
    example = Example.of(model)
    find = _found if example.architecture.by_value else _found.__wrapped__
    return find(example, inputs, trained, objective, clip_norm, probe, unit)


def formulation(
    model: nn.Module, input_shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> FormulationName:
    """How a cohort of ``model`` on inputs ``[record, *input_shape]`` of ``dtype`` is computed.

    ``bookkeeping`` is the fast program; ``vmap`` maps `torch.func` over any other model that allows it;
    ``loop`` trains one student after another. A front end is computed once and by itself in all.
    """
    parted = Parted.of(model)
    features = InputType.of(parted.features(InputType(input_shape, dtype).zeros(1)))
    trained = frozenset(name for name, _ in parted.rest.named_parameters())
    plan = plan_of(parted.rest, features, trained, Objective(0.5, 2.0), 1.0)
    if plan is None:
        return "loop"
    return "bookkeeping" if isinstance(plan.gradients.formulation, BookKeeping) else "vmap"


@lru_cache(maxsize=_KEPT)
def _found(
    example: Example,
    inputs: InputType,
    trained: frozenset[str],
    objective: Objective,
    clip_norm: float | None,
    probe: Probe | None,
    unit: Unit,
) -> Plan | None:
    if not trained:
        return None
    model = copy.deepcopy(example.model).train()
    keep_statistics(model, [p for name, p in model.named_parameters() if name in trained])
    try:
        with torch.no_grad(), buffers_kept(model):
            blank = inputs.zeros(1, _PROBE_RECORDS, device=next(model.parameters()).device)
            classes = int(copy.deepcopy(model).eval()(blank[0]).shape[-1])
        if clip_norm is not None:
            probe = probe or Probe.made_up(inputs.shape, classes, blank)
        outputs = OutputProbe.of(model, inputs)
        for candidate in candidates(model, trained):
            gradients = Gradients(candidate, objective, clip_norm, trained).with_frozen_part(model, inputs)
            if probe is None or clip_norm is None:
                proved = not any(True for _ in model.buffers()) and outputs.agrees(candidate)
            else:
                proved = _is_proved(gradients, model, probe, clip_norm, unit)
            if proved:
                weights = Weights.stack([model], trained)
                return Plan(gradients, classes, gradients.footprint(weights, blank, classes))
    except Exception:  # a model that fails by itself is left to fail in the loop
        return None
    return None


def _is_proved(gradients: Gradients, model: nn.Module, probe: Probe, clip_norm: float, unit: Unit) -> bool:
    """Whether ``gradients`` are those of plain autograd on each record alone, clipped by unit and added up.

    Each unit is chosen by itself and all together, in batches of two sizes and in several passes, clipped
    and not, for two students at once whose records stand in opposite order.
    """
    students = (model, perturbed(model))
    objective = gradients.objective
    truths = [
        gradients_alone(
            student,
            [p for name, p in student.named_parameters() if name in gradients.trained],
            probe,
            alpha=objective.alpha,
            temperature=objective.temperature,
        )
        for student in students
    ]
    units = _units_both_ways(len(probe.labels), unit)
    both = zip(units, (truths[0], truths[1].flip(0)), strict=True)
    truth = torch.stack([each.chosen(torch.ones(each.count) > 0).summed(own) for each, own in both])
    weights = Weights.stack(students, gradients.trained)
    try:
        records = gradients.features(weights, _both_ways(probe, objective, units))
        largest = float(truth[truth.isfinite().all(-1)].norm(dim=-1).max())
        return all(
            _sums_agree(replace(gradients, clip_norm=clip), weights, records, truth, batch)
            for clip in (clip_norm, 1e3 * largest + 1.0)
            for batch in (BATCHES if unit is Unit.RECORD else _PERSONS)
        )
    except Exception:  # whatever a model raises in this formulation, another takes it
        return False


def _units_both_ways(records: int, unit: Unit) -> tuple[Units, Units]:
    """Those of a probe's records, for two students whose records stand in opposite order."""
    if unit is Unit.RECORD:
        return Units(records), Units(records)
    of = torch.tensor(_PERSON_OF)
    count = 1 + int(of.max())
    return Units(count, of), Units(count, count - 1 - of.flip(0))


def _both_ways(probe: Probe, objective: Objective, units: Sequence[Units]) -> Records:
    """The probe's records as those of two students, and in opposite order for the second."""
    classes = probe.teacher_logits.shape[-1]
    labels, logits = probe.labels.to(probe.inputs.device), probe.teacher_logits
    targets = objective.targets(labels, logits, classes, torch.float32)
    inputs = torch.cat([probe.inputs, probe.inputs.flip(0)])
    counts = [len(labels)] * 2
    owners = None if units[0].of is None else Owners.of(units, counts)
    return Records.of(inputs, torch.cat([targets, targets.flip(0)]), counts, owners)


def _sums_agree(
    gradients: Gradients, weights: Weights, records: Records, truth: Tensor, batch: slice
) -> bool:
    """One batch of a proof; ``truth`` ``[student, unit, parameter]``."""
    assert gradients.clip_norm is not None
    numbers = torch.arange(truth.shape[1])[batch]
    index = records.index([numbers] * len(truth))
    expected = torch.stack([clipped(each[batch], gradients.clip_norm) for each in truth])

    def summed(chosen: Tensor, way: Gradients) -> Tensor:
        sums = torch.zeros(weights.trained.shape, dtype=torch.float64)
        of = chosen.expand(len(truth), -1).to(weights.trained)
        way.write_to(views(sums, weights.trained_slots), weights, records, index, of)
        return sums

    *each, together = one_hots(len(numbers))
    found = torch.stack([summed(chosen, gradients) for chosen in each], dim=1)
    in_passes = replace(gradients, records_per_pass=2)
    return all(agree(*pair) for pair in zip(found, expected, strict=True)) and all(
        agree(summed(together, way), expected.sum(1)) for way in (gradients, in_passes)
    )


@dataclass(frozen=True)
class Students:
    """Models of one architecture, the shard of each, and the teacher's answers on it.

    ``models`` are what follows the students' front end, if they have one; ``parted`` is the first student
    as its two parts.
    """

    parted: Parted
    models: tuple[nn.Module, ...]
    shards: tuple[LabelledSet, ...]
    teacher_logits: tuple[Tensor, ...] | None

    @staticmethod
    def of(
        models: Sequence[nn.Module],
        shards: Sequence[LabelledSet],
        teacher_logits: Sequence[Tensor] | None,
        sources: Sized,
    ) -> "Students":
        """Check that the sequences fit each other.

        Raises:
            DataError: they differ in length.
            ModelError: the models differ in architecture.
        """
        targets = models if teacher_logits is None else teacher_logits
        for name, given in (("shards", shards), ("teacher logits", targets), ("sources", sources)):
            if len(given) != len(models):
                raise DataError(f"{len(models)} students, but {len(given)} {name}: give one for each student")
        if not same_architecture(models):
            raise ModelError("the students differ in architecture: train each architecture by itself")
        return Students(
            Parted.of(models[0]) if models else Parted(None, nn.Identity()),
            tuple(Parted.of(model).rest for model in models),
            tuple(shards),
            None if teacher_logits is None else tuple(teacher_logits),
        )

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.models[0].parameters()).device

    def targets(self, student: int) -> Tensor | None:
        """The teacher's logits on one student's shard."""
        return None if self.teacher_logits is None else self.teacher_logits[student]

    def part(self, chosen: Sequence[int]) -> "Students":
        """Some of the students."""
        logits = self.teacher_logits
        return replace(
            self,
            models=tuple(self.models[i] for i in chosen),
            shards=tuple(self.shards[i] for i in chosen),
            teacher_logits=None if logits is None else tuple(logits[i] for i in chosen),
        )

    def weights(self, trained: frozenset[str]) -> Weights:
        """A copy of the parameters; ``trained`` names those in training."""
        return Weights.stack(self.models, trained)

    def units(self, unit: Unit) -> list[Units]:
        """What each student's training samples. Raises as `Units.on`."""
        return [Units.on(shard, unit) for shard in self.shards]

    def records(self, plan: Plan, unit: Unit = Unit.RECORD) -> Records:
        """The shards on the models' device, as the models take them. Raises as `Units.on`."""
        inputs = joined([self.parted.features(shard.inputs) for shard in self.shards]).to(self.device)
        labels = joined([shard.labels for shard in self.shards]).to(self.device)
        logits = None if self.teacher_logits is None else joined(self.teacher_logits).to(self.device)
        dtype = next(self.models[0].parameters()).dtype
        targets = plan.gradients.objective.targets(labels, logits, plan.classes, dtype)
        counts = [len(shard) for shard in self.shards]
        owners = None if unit is Unit.RECORD else Owners.of(self.units(unit), counts)
        return Records.of(inputs, targets, counts, owners)

    @cached_property
    def inputs(self) -> InputType:
        """What the models take; from the largest shard, since an empty one may have lost its shape."""
        inputs = max(self.shards, key=len).inputs
        return InputType.of(self.parted.features(inputs.new_zeros((1, *inputs.shape[1:]))))

    def plan(
        self,
        objective: Objective,
        clip_norm: float | None,
        trained: Callable[[nn.Module], Sequence[nn.Parameter]],
        probe: Probe | None = None,
        unit: Unit = Unit.RECORD,
    ) -> Plan | None:
        """How to train the students as one program; ``None`` if their architecture allows none.

        ``probe``: records for the proof, as the whole students take them; ``unit``: whose gradients are
        clipped.
        """
        if not self.models or not _same_buffers(self.models):
            return None
        model = self.models[0]
        if probe is not None and self.parted.front is not None:
            probe = probe.through(self.parted.features)
        kept = {id(parameter) for parameter in trained(model)}
        names = frozenset(name for name, p in model.named_parameters() if id(p) in kept)
        return plan_of(model, self.inputs, names, objective, clip_norm, probe, unit)


def _same_buffers(models: Sequence[nn.Module]) -> bool:
    """Whether one model's buffers can stand for all: a cohort has parameters of each student alone."""
    first = list(models[0].buffers())
    return not first or all(
        torch.equal(kept, other)
        for model in models[1:]
        for kept, other in zip(first, model.buffers(), strict=True)
    )


def in_chunks(
    train: Callable[[list[int], Plan], list[nn.Module]],
    students: Students,
    plan: Plan,
    expected: Mapping[int, float],
    memory_budget: int,
    unit: Unit = Unit.RECORD,
) -> dict[int, nn.Module]:
    """``train`` students chunk by chunk within ``memory_budget`` bytes.

    ``expected`` says which students, by number, and the expected batch of each in records; ``unit`` whose
    gradients are clipped.
    """
    cost = plan.footprint.cost(max(len(shard) for shard in students.shards), unit)
    trained: dict[int, nn.Module] = {}
    with flushed_denormals():
        for chosen in chunk_students(expected, cost, budget=memory_budget):
            fitting = records_per_pass(len(chosen), cost, budget=memory_budget)
            trained |= zip(chosen, train(chosen, plan.in_passes(fitting)), strict=True)
    return trained
