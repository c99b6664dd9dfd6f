"""DP-SGD per person: a person moves the clipped sum by one clip norm at most, whatever it holds."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from privkd.config import DpSgdConfig
from privkd.data.scenario import LabelledSet
from privkd.errors import DataError
from privkd.privacy.events import Unit
from privkd.privacy.randomness import SeededRandomness
from privkd.training.dpsgd import Mechanism, train_private
from privkd.training.losses import forward_loss
from privkd.training.units import Units
from privkd.training.vectorised import is_vectorised, train_cohort

CLIP, CLASSES = 0.5, 3
SHAPES = {"mlp": (12,), "cnn": (1, 8, 8), "text": (5,), "scaled": (12,), "halved": (12,)}


class Scaled(nn.Module):
    """Has a weight that belongs to no layer, so that the fast program cannot take it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(12, 5), nn.Parameter(torch.ones(5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x)) * self.scale)
        return out


class Halved(nn.Module):
    """Branches on what it sees, so that no program of many students takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x if float(x.detach().abs().max()) < 1e6 else x / 2)
        return out


def student(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "scaled":
        return Scaled()
    if name == "halved":
        return Halved()
    if name == "text":
        return nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(20, CLASSES))
    if name == "mlp":
        return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, CLASSES))
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 3), nn.Tanh(),
        nn.Flatten(), nn.Linear(6 * 36, CLASSES),
    )  # fmt: skip


def shard(name: str, sizes: Sequence[int], seed: int = 0) -> LabelledSet:
    """Persons with so many records each, their records in no order, the first person's far out."""
    generator = torch.Generator().manual_seed(seed)
    persons = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
    persons = persons[torch.randperm(len(persons), generator=generator)]
    inputs = torch.randn((len(persons), *SHAPES[name]), generator=generator)
    inputs[persons == 0] *= 10
    if name == "text":
        inputs = inputs.abs().to(torch.int64) % 6
    return LabelledSet(inputs, torch.randint(CLASSES, (len(persons),), generator=generator), persons)


def mechanism(rate: float = 1.0, steps: int = 1, noise: float = 0.0, unit: Unit = Unit.PERSON) -> Mechanism:
    recipe = DpSgdConfig(sampling_rate=rate, steps=steps, clip_norm=CLIP, learning_rate=1.0, averaging=0.0)
    return Mechanism(recipe, noise, expected_batch_size=1.0, alpha=0.0, temperature=1.0, unit=unit)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def moved(engine: str, model: nn.Module, held: LabelledSet, how: Mechanism) -> Tensor:
    """What one noiseless step subtracts: the clipped sum."""
    source = SeededRandomness(0)
    if engine == "cohort":
        (trained,) = train_cohort([model], [held], None, how, [source])
    else:
        trained = train_private(model, held, None, how, source)
    return flat(model) - flat(trained)


def naive(model: nn.Module, held: LabelledSet) -> Tensor:
    """The slow twin: person by person, record by record, in plain autograd."""
    assert held.persons is not None
    parameters = list(model.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for person in held.persons.unique():
        own = torch.zeros_like(total)
        for record in (held.persons == person).nonzero().flatten():
            one = slice(int(record), int(record) + 1)
            loss = forward_loss(model(held.inputs[one]), held.labels[one], None, alpha=0.0, temperature=1.0)
            own += torch.cat([g.flatten().double() for g in torch.autograd.grad(loss.sum(), parameters)])
        total += own * min(1.0, CLIP / (float(own.norm()) + 1e-6))
    return total


people = st.lists(st.integers(1, 7), min_size=1, max_size=6)


@pytest.mark.parametrize("engine", ["cohort", "opacus"])
@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=12, deadline=None)
@given(people)
def test_the_sum_is_the_slow_twins(name: str, engine: str, sizes: list[int]) -> None:
    model, held = student(name), shard(name, sizes)
    torch.testing.assert_close(
        moved(engine, model, held, mechanism()), naive(model, held), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("engine", ["cohort", "opacus"])
@settings(max_examples=25, deadline=None)
@given(people, st.data())
def test_a_person_moves_it_by_at_most_the_clip_norm(
    engine: str, sizes: list[int], data: st.DataObject
) -> None:
    model, held = student("mlp"), shard("mlp", sizes)
    assert held.persons is not None
    gone = data.draw(st.integers(0, len(sizes) - 1))
    rest = held.part(held.persons != gone)
    by = (moved(engine, model, held, mechanism()) - moved(engine, model, rest, mechanism())).norm()
    assert float(by) <= CLIP * (1 + 1e-3)


def test_records_of_one_person_would_move_it_by_more() -> None:
    """What the property above would miss if it were of records: its broken twin."""
    model, held = student("mlp"), shard("mlp", [6, 2])
    assert held.persons is not None
    whole, rest = (
        moved("cohort", model, some, mechanism(unit=Unit.RECORD))
        for some in (held, held.part(held.persons != 0))
    )
    assert float((whole - rest).norm()) > 1.5 * CLIP


@pytest.mark.parametrize("rate", [1.0, 0.4])
@pytest.mark.parametrize("name", SHAPES)
def test_both_engines_train_alike(name: str, rate: float) -> None:
    """Persons of all sizes, a device without any, several devices at once, and little memory."""
    how, model = mechanism(rate, steps=4, noise=0.5), student(name)
    shards = [shard(name, [3, 1, 7, 2], 0), shard(name, [1, 1], 1), shard(name, [9], 2)]
    shards.append(shards[0].part(slice(0, 0)))
    sources = [[SeededRandomness(1, "device", i) for i in range(len(shards))] for _ in range(3)]
    alone = [train_private(model, s, None, how, r) for s, r in zip(shards, sources[0], strict=True)]
    for budget, source in ((1 << 30, sources[1]), (1 << 16, sources[2])):
        together = train_cohort([model] * 4, shards, None, how, source, memory_budget=budget)
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(flat(one), flat(other), rtol=1e-4, atol=1e-5)
    assert is_vectorised(model, shards[0], how) == (name != "halved")


@pytest.mark.parametrize("engine", ["cohort", "opacus"])
def test_a_person_without_a_finite_gradient_counts_for_nothing(engine: str) -> None:
    model, held = student("mlp"), shard("mlp", [2, 3, 1])
    assert held.persons is not None
    held.inputs[(held.persons == 1).nonzero()[0]] = torch.inf
    rest = held.part(held.persons != 1)
    torch.testing.assert_close(
        moved(engine, model, held, mechanism()), moved(engine, model, rest, mechanism()), rtol=1e-5, atol=1e-6
    )


def test_one_record_each_is_training_per_record() -> None:
    model, held = student("cnn"), shard("cnn", [1] * 9)
    held = LabelledSet(held.inputs, held.labels, torch.arange(9))
    for engine in ("cohort", "opacus"):
        per_person, per_record = (
            moved(engine, model, held, mechanism(0.5, 3, 1.0, unit)) for unit in (Unit.PERSON, Unit.RECORD)
        )
        torch.testing.assert_close(per_person, per_record, rtol=1e-5, atol=1e-6)


def test_persons_are_sampled_whole() -> None:
    persons = torch.tensor([4, 4, 9, 1, 9, 4, 1])
    units = Units.on(LabelledSet(torch.zeros(7, 1), torch.zeros(7), persons), Unit.PERSON)
    assert units.count == 3
    chosen = units.chosen(torch.tensor([True, False, True]))
    assert chosen.records.tolist() == [2, 3, 4, 6]
    assert chosen.owners is not None
    assert chosen.owners.tolist() == [1, 0, 1, 0]
    assert chosen.summed(torch.tensor([[1.0], [2.0], [4.0], [8.0]])).tolist() == [[10.0], [5.0]]


@pytest.mark.parametrize("engine", ["cohort", "opacus"])
def test_it_must_be_known_whose_records_are(engine: str) -> None:
    held = LabelledSet(torch.zeros(4, 12), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(DataError, match=r"data\.group"):
        moved(engine, student("mlp"), held, mechanism())
