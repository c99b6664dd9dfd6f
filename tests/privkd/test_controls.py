"""What a gain is measured against: means over many students."""

from itertools import pairwise
from typing import Self

import pytest
import torch
from torch import Tensor, nn

from privkd.controls import mean_accuracy
from privkd.data.scenario import LabelledSet


class Calls:
    """How often a model and its copies were asked."""

    def __init__(self) -> None:
        self.count = 0

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self


class Right(nn.Module):
    """Right on the first ``count`` of ten records."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.calls = Calls()

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls.count += 1
        right = (inputs[:, 0] < self.count).float()
        return torch.stack([1 - right, right], dim=1)


TEN = LabelledSet(torch.arange(10.0)[:, None], torch.ones(10, dtype=torch.int64))


@pytest.mark.parametrize("students", [1, 2, 19, 20])
def test_few_students_are_all_measured(students: int) -> None:
    models = [Right(number % 11) for number in range(students)]
    expected = sum(model.count for model in models) / 10 / students
    assert mean_accuracy(models, TEN) == pytest.approx(expected)
    assert [model.calls.count for model in models] == [1] * students


@pytest.mark.parametrize("students", [21, 39, 40, 250, 1000])
def test_of_many_at_most_twenty_are_and_evenly(students: int) -> None:
    models = [Right(5) for _ in range(students)]
    assert mean_accuracy(models, TEN) == 0.5
    measured = [number for number, model in enumerate(models) if model.calls.count]
    assert 10 < len(measured) <= 20
    assert len({after - before for before, after in pairwise(measured)}) == 1


def test_one_model_on_all_devices_is_asked_once() -> None:
    model = Right(3)
    assert mean_accuracy([model] * 12, TEN) == pytest.approx(0.3)
    assert model.calls.count == 1
