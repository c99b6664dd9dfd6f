"""The control of the reverse flow: what a teacher becomes without devices, and what devices must beat."""

from collections.abc import Sequence
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privkd.cloud import Cloud, PublicData, Targets, train_teacher
from privkd.config import Config, FitConfig, ReverseConfig
from privkd.controls import NoDeviceTeachers
from privkd.data.scenario import LabelledSet
from privkd.plan import Plan
from privkd.training.fit import accuracy
from privkd.training.proof import Probe

FIT = FitConfig(steps=120, batch_size=32, learning_rate=0.01)
CONFIG = ReverseConfig(fit=FIT, trust=2.0, anchor=0.1, tolerance=0.0)
QUERIES = torch.arange(1, 100, 2)


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
def idle(teacher: nn.Module, public: PublicData) -> NoDeviceTeachers:
    return NoDeviceTeachers(teacher, teacher).after(cloud(public), QUERIES, 0)


def cloud(public: PublicData) -> Cloud:
    """A cloud that holds ``public``; what it plans is of no matter here."""
    return Cloud(Config(reverse=CONFIG), cast(Plan, None), public, Probe.of(public.proxy, 4), 4)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def absorbed(teacher: nn.Module, probabilities: Tensor, weight: float, public: PublicData) -> nn.Module:
    prior = F.softmax(teacher(public.proxy[QUERIES]), dim=-1).detach()
    targets = Targets(QUERIES, probabilities, torch.full((len(QUERIES),), weight), prior)
    return cloud(public).update(teacher, targets, 0).teacher


def test_self_distillation_is_the_update_on_the_teachers_own_answers(
    idle: NoDeviceTeachers, teacher: nn.Module, public: PublicData
) -> None:
    own = F.softmax(teacher(public.proxy[QUERIES]), dim=-1).detach()
    assert same(idle.self_distilled, absorbed(teacher, own, 1.0, public))


def test_labels_only_is_the_update_that_trusts_nothing(
    idle: NoDeviceTeachers, teacher: nn.Module, public: PublicData
) -> None:
    """To the bit: so a release of which nothing is trusted shows no gain."""
    anything = torch.rand(len(QUERIES), 4).softmax(-1)
    assert same(idle.labels_only, absorbed(teacher, anything, 0.0, public))
    assert not same(idle.labels_only, idle.self_distilled)


def test_neither_finds_what_only_devices_know(
    idle: NoDeviceTeachers, teacher: nn.Module, public: PublicData
) -> None:
    test = blobs(200, 4)
    told = F.one_hot(blobs(100, 3).labels[QUERIES], 4) * 0.9 + 0.025
    assert accuracy(absorbed(teacher, told, 1.0, public), test.inputs, test.labels) > 0.95
    for model in (idle.self_distilled, idle.labels_only):
        assert accuracy(model, test.inputs, test.labels) < 0.8


def test_without_queries_nothing_moves(teacher: nn.Module, public: PublicData) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    after = NoDeviceTeachers(teacher, teacher).after(cloud(public), none, 0)
    assert after == NoDeviceTeachers(teacher, teacher)
