"""Models of token ids int64 ``[record, length]``, of which 0 is padding and contributes nothing.

A record's own padding says how long it is: the mask is a part of the record, as its text is. No layer but a
linear one or the table of embeddings has parameters, and none looks beyond its record: what acts within one
is a `Within`, of tensors whose axes before the last ones are records, and so serves many students as it is.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

HEADS = 4
_WINDOW = 3
_SPREAD = 0.1
Activation: TypeAlias = Callable[[], nn.Module]
_FINITE_MIN = torch.finfo(torch.float32).min


class Within(nn.Module):
    """Acts within a record, without parameters: tensors ``[*records, ...]`` to ``[*records, ...]``.

    How many axes of records there are makes no difference to it.
    """


class Mean(Within):
    """The mean of the positions that are no padding; zero where there are none."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """``x`` ``[*records, length, width]`` and ids ``[*records, length]`` to ``[*records, width]``."""
        kept = _kept(ids, x)
        return (x * kept).sum(-2) / kept.sum(-2).clamp(min=1)


class Largest(Within):
    """The largest value of the positions that are no padding; zero where there are none."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """``x`` ``[*records, length, width]`` and ids ``[*records, length]`` to ``[*records, width]``."""
        kept = (ids != 0).unsqueeze(-1)
        found = x.masked_fill(~kept, _FINITE_MIN).amax(-2)
        return found.masked_fill(~kept.any(-2), 0.0)


class Windows(Within):
    """Each position beside its neighbours, for a convolution over time; padding is zeros, as is what lies
    beyond the ends."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """``x`` ``[*records, length, width]`` and ids to ``[*records, length, window * width]``."""
        around = self.width // 2
        padded = nn.functional.pad(x * _kept(ids, x), (0, 0, around, around))
        length = x.shape[-2]
        return torch.cat([padded.narrow(-2, start, length) for start in range(self.width)], dim=-1)


class Positions(Within):
    """Adds the sinusoids of each position (Vaswani et al. 2017), which are constants."""

    def forward(self, x: Tensor) -> Tensor:
        """``[*records, length, width]`` to the same."""
        return x + _sinusoids(x.shape[-2], x.shape[-1]).to(x)


class Attention(Within):
    """Scaled dot products of queries and keys, within a record and past its padding, weigh values."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, mixed: Tensor, ids: Tensor) -> Tensor:
        """Queries, keys and values ``[*records, length, 3 * width]`` to ``[*records, length, width]``."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for part in mixed.chunk(3, -1)
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        padding = (ids == 0)[..., None, None, :]
        weights = scores.masked_fill(padding, _FINITE_MIN).softmax(-1)
        return (weights @ value).transpose(-2, -3).flatten(-2)


def _kept(ids: Tensor, like: Tensor) -> Tensor:
    """1 where there is a token and 0 where there is padding, ``[*records, length, 1]``."""
    return (ids != 0).unsqueeze(-1).to(like.dtype)


def _sinusoids(length: int, width: int) -> Tensor:
    angles = torch.arange(length)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


class Embedded(nn.Module):
    """The mean of a text's embeddings, and a linear head."""

    def __init__(self, vocabulary: int, width: int, classes: int) -> None:
        super().__init__()
        self.table = _table(vocabulary, width)
        self.mean = Mean()
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """``[record, length]`` to logits ``[record, class]``."""
        logits: Tensor = self.head(self.mean(self.table(ids), ids))
        return logits


class Convolved(nn.Module):
    """Two convolutions over time, the largest value of each feature, and a linear head (after Kim 2014)."""

    def __init__(self, vocabulary: int, width: int, classes: int, activation: Activation) -> None:
        super().__init__()
        self.table = _table(vocabulary, width)
        self.windows = Windows(_WINDOW)
        self.block1 = nn.Sequential(*self._layers(width, activation))
        self.block2 = nn.Sequential(*self._layers(width, activation))
        self.largest = Largest()
        self.head = nn.Linear(width, classes)

    @staticmethod
    def _layers(width: int, activation: Activation) -> tuple[nn.Module, ...]:
        return nn.Linear(_WINDOW * width, width), _norm(width), activation()

    def forward(self, ids: Tensor) -> Tensor:
        """``[record, length]`` to logits ``[record, class]``."""
        x = self.block1(self.windows(self.table(ids), ids))
        x = self.block2(self.windows(x, ids))
        logits: Tensor = self.head(self.largest(x, ids))
        return logits


class EncoderBlock(nn.Module):
    """Attention and a perceptron, each normalised before and added to what it was given."""

    def __init__(self, width: int, activation: Activation) -> None:
        super().__init__()
        self.norm1 = _norm(width)
        self.mixed = nn.Linear(width, 3 * width)
        self.attention = Attention(HEADS)
        self.out = nn.Linear(width, width)
        self.norm2 = _norm(width)
        self.body = nn.Sequential(nn.Linear(width, 2 * width), activation(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """``[record, length, width]`` and ids ``[record, length]`` to the first's shape."""
        x = x + self.out(self.attention(self.mixed(self.norm1(x)), ids))
        added: Tensor = x + self.body(self.norm2(x))
        return added


class Transformer(nn.Module):
    """A small encoder (Vaswani et al. 2017, normalised before), the mean over time, and a linear head."""

    def __init__(self, vocabulary: int, width: int, classes: int, activation: Activation) -> None:
        super().__init__()
        self.table = _table(vocabulary, width)
        self.positions = Positions()
        self.block1 = EncoderBlock(width, activation)
        self.block2 = EncoderBlock(width, activation)
        self.mean = Mean()
        self.norm = _norm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """``[record, length]`` to logits ``[record, class]``."""
        x = self.positions(self.table(ids))
        x = self.block2(self.block1(x, ids), ids)
        logits: Tensor = self.head(self.norm(self.mean(x, ids)))
        return logits


def _table(vocabulary: int, width: int) -> nn.Embedding:
    """Small at first, so that words which the public text lacks say little."""
    table = nn.Embedding(vocabulary, width)
    nn.init.normal_(table.weight, std=_SPREAD)
    return table


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=False)
