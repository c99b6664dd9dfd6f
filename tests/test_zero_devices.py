"""The control of the reverse flow: what a teacher becomes without devices, and what devices must beat."""

import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privkd.cloud import PublicData, Targets, absorb, train_teacher
from privkd.config import FitConfig, ReverseConfig
from privkd.controls import ZeroDevices
from privkd.data.scenario import LabelledSet
from privkd.privacy.randomness import seeded_generator
from privkd.training.fit import accuracy

FIT = FitConfig(steps=120, batch_size=32, learning_rate=0.01)
CONFIG = ReverseConfig(fit=FIT, trust=2.0, anchor=0.1, tolerance=0.0)
QUERIES = torch.arange(1, 100, 2)
BATCHES = functools.partial(seeded_generator, 0, "absorb", 0)


def blobs(number: int, seed: int) -> LabelledSet:
    """Four classes, each around a corner of a square."""
    drawn = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]])
    labels = torch.arange(number) % 4
    return LabelledSet(corners[labels] + torch.randn(number, 2, generator=drawn) * 0.7, labels)


def only(records: LabelledSet, classes: Sequence[int]) -> LabelledSet:
    kept = torch.isin(records.labels, torch.tensor(classes))
    return LabelledSet(records.inputs[kept], records.labels[kept])


@pytest.fixture(scope="module")
def public() -> PublicData:
    """Devoid of class 3, but for the unlabelled proxy set."""
    return PublicData(only(blobs(80, 1), [0, 1, 2]), only(blobs(40, 5), [0, 1, 2]), blobs(100, 3).inputs)


@pytest.fixture(scope="module")
def teacher(public: PublicData) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 4))
    return train_teacher(network, public.train, FIT, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def idle(teacher: nn.Module, public: PublicData) -> ZeroDevices:
    return ZeroDevices(teacher, teacher).after(QUERIES, public, CONFIG, BATCHES)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def absorbed(teacher: nn.Module, probabilities: Tensor, weight: float, public: PublicData) -> nn.Module:
    prior = F.softmax(teacher(public.proxy[QUERIES]), dim=-1).detach()
    targets = Targets(QUERIES, probabilities, torch.full((len(QUERIES),), weight), prior)
    return absorb(teacher, targets, public, CONFIG, BATCHES()).teacher


def test_self_distillation_is_the_update_on_the_teachers_own_answers(
    idle: ZeroDevices, teacher: nn.Module, public: PublicData
) -> None:
    own = F.softmax(teacher(public.proxy[QUERIES]), dim=-1).detach()
    assert same(idle.self_distilled, absorbed(teacher, own, 1.0, public))


def test_labels_only_is_the_update_that_trusts_nothing(
    idle: ZeroDevices, teacher: nn.Module, public: PublicData
) -> None:
    """To the bit: so a release of which nothing is trusted shows no gain."""
    anything = torch.rand(len(QUERIES), 4).softmax(-1)
    assert same(idle.labels_only, absorbed(teacher, anything, 0.0, public))
    assert not same(idle.labels_only, idle.self_distilled)


def test_neither_finds_what_only_devices_know(
    idle: ZeroDevices, teacher: nn.Module, public: PublicData
) -> None:
    test = blobs(200, 4)
    told = F.one_hot(blobs(100, 3).labels[QUERIES], 4) * 0.9 + 0.025
    assert accuracy(absorbed(teacher, told, 1.0, public), test.inputs, test.labels) > 0.95
    for model in (idle.self_distilled, idle.labels_only):
        assert accuracy(model, test.inputs, test.labels) < 0.8


def test_without_queries_nothing_moves(teacher: nn.Module, public: PublicData) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    after = ZeroDevices(teacher, teacher).after(none, public, CONFIG, BATCHES)
    assert after == ZeroDevices(teacher, teacher)
