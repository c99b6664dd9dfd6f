"""Decoders from answers to images: one small network for each trial, all trained as one program."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from attacks.reconstruction.paired import Floats
from privkd.errors import InputError

_HIDDEN, _STEPS, _BATCH, _RATE = 96, 300, 64, 4e-3
_CHUNK = 16
"""Trials at a time: bounds the memory."""


@dataclass(frozen=True)
class Decoders:
    """Two-layer networks ``[trial]`` from features to pixels in [0, 1]; see `train_decoders`."""

    weights: tuple[Tensor, ...]
    centre: Tensor
    spread: Tensor
    shape: tuple[int, ...]

    def draw(self, features: Floats) -> Floats:
        """Images ``[trial, query, *shape]`` of features ``[trial, query, feature]``."""
        with torch.no_grad():
            flat = _decode(self.weights, (_tensor(features) - self.centre) / self.spread)
        return flat.numpy().astype(np.float64).reshape(*features.shape[:2], *self.shape)


def train_decoders(
    features: Floats, images: Floats, prior: Floats, *, prior_weight: float, seed: int
) -> Decoders:
    """Learn images from features, by ``MSE + prior_weight * MSE to the prior`` (Takahashi et al. 2023).

    Args:
        features: ``[trial, query, feature]``.
        images: in [0, 1], the same for all trials ``[query, *shape]``.
        prior: the image to lean to where the features say little ``[*shape]``.
        prior_weight: see above.
        seed: of the initial weights and the batches.

    Raises:
        InputError: the shapes do not fit.
    """
    if features.ndim != 3 or features.shape[1] != len(images):
        raise InputError(f"features of shape {features.shape} for {len(images)} images: give one each")
    generator = torch.Generator().manual_seed(seed)
    centre = _tensor(features.mean(axis=1, keepdims=True))
    spread = _tensor(features.std(axis=1, keepdims=True)).clamp_min(1e-3)
    targets, lean = _tensor(images.reshape(len(images), -1)), _tensor(prior.reshape(-1))
    parts = []
    for start in range(0, len(features), _CHUNK):
        part = slice(start, start + _CHUNK)
        inputs = (_tensor(features[part]) - centre[part]) / spread[part]
        parts.append(_fitted(inputs, targets, lean, prior_weight, generator))
    weights = tuple(torch.cat(layers) for layers in zip(*parts, strict=True))
    return Decoders(weights, centre, spread, tuple(images.shape[1:]))


def _fitted(
    inputs: Tensor, targets: Tensor, prior: Tensor, prior_weight: float, generator: torch.Generator
) -> tuple[Tensor, ...]:
    weights = _fresh(len(inputs), inputs.shape[2], targets.shape[1], generator)
    optimizer = torch.optim.Adam(weights, lr=_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / _STEPS)
    for _ in range(_STEPS):
        chosen = torch.randint(len(targets), (_BATCH,), generator=generator)
        drawn = _decode(weights, inputs[:, chosen])
        loss = F.mse_loss(drawn, targets[chosen].expand_as(drawn))
        loss = loss + prior_weight * F.mse_loss(drawn, prior.expand_as(drawn))
        optimizer.zero_grad(set_to_none=True)
        # Each trial's network has a loss of its own; the mean over trials would shrink its steps.
        (loss * len(inputs)).backward()
        optimizer.step()
        schedule.step()
    return tuple(weight.detach() for weight in weights)


def _fresh(trials: int, features: int, pixels: int, generator: torch.Generator) -> list[Tensor]:
    def layer(inputs: int, outputs: int) -> Tensor:
        # All trials start alike, so that they differ by what they saw alone.
        drawn = torch.randn((1, inputs, outputs), generator=generator) / math.sqrt(inputs)
        return drawn.repeat(trials, 1, 1).requires_grad_()

    def bias(outputs: int) -> Tensor:
        return torch.zeros((trials, 1, outputs), requires_grad=True)

    return [layer(features, _HIDDEN), bias(_HIDDEN), layer(_HIDDEN, pixels), bias(pixels)]


def _decode(weights: tuple[Tensor, ...] | list[Tensor], inputs: Tensor) -> Tensor:
    first, first_bias, second, second_bias = weights
    hidden = torch.relu(torch.baddbmm(first_bias, inputs, first))
    return torch.sigmoid(torch.baddbmm(second_bias, hidden, second))


def _tensor(values: Floats) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
