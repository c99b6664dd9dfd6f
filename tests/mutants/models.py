"""Models that a user might bring, each with something that a proof, a check or a fault is about."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_WIDTH = 8


def _around(shape: Sequence[int], classes: int, middle: nn.Module) -> nn.Module:
    dense = nn.Linear(math.prod(shape), _WIDTH)
    return nn.Sequential(nn.Flatten(), dense, nn.Tanh(), middle, nn.Linear(_WIDTH, classes))


def dropping(shape: Sequence[int], classes: int) -> nn.Module:
    """A student with dropout."""
    return _around(shape, classes, nn.Dropout(0.5))


class Centred(nn.Module):
    """Takes the mean of the batch away: it mixes records."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


def mixing(shape: Sequence[int], classes: int) -> nn.Module:
    """A model that mixes records, in training and in evaluation."""
    return _around(shape, classes, Centred())


class Counting(nn.Module):
    """Keeps the sum of what it saw in training, for a later day."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(_WIDTH))
        self.seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += x.detach().sum(0)
        return x


def counting(shape: Sequence[int], classes: int) -> nn.Module:
    """A student that writes private statistics to a buffer."""
    return _around(shape, classes, Counting())


class Remembering(nn.Module):
    """Adds a little of the batch before to each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        before, self.last = self.last, x.detach().mean(0)
        return x if before is None else x + 0.1 * before


def remembering(shape: Sequence[int], classes: int) -> nn.Module:
    """A student that keeps something between calls."""
    return _around(shape, classes, Remembering())


class Folding(nn.Module):
    """Folds the first axis of a record into the batch: no layer's batch is the records."""

    def __init__(self, shape: Sequence[int], classes: int) -> None:
        super().__init__()
        self.rows = shape[-2]
        self.dense = nn.Linear(math.prod(shape) // self.rows, _WIDTH)
        self.head = nn.Linear(_WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.tanh(self.dense(x.reshape(len(x) * self.rows, -1)))
        logits: Tensor = self.head(rows)
        return logits.view(len(x), self.rows, -1).mean(1)


def folding(shape: Sequence[int], classes: int) -> nn.Module:
    """A student that only plain autograd, one record after the other, differentiates as it should be."""
    return Folding(shape, classes)


def writers() -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.str_]]:
    """Data of persons with one to five records each."""
    rng = np.random.default_rng(0)
    whose = np.repeat(np.arange(200), rng.integers(1, 6, 200))
    labels = rng.integers(0, 3, len(whose))
    inputs = rng.normal(labels[:, None], 1.0, (len(whose), 16))
    return inputs.astype(np.float32), labels, whose.astype(np.str_)
