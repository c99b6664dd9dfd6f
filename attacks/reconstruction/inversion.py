"""Drawing a class from answers to public inputs: paired-logits inversion, its ancestor, the class prototype.

Paired-logits inversion (Takahashi, Liu and Liu, CVPR 2023) has a decoder learn to draw public inputs from
two models' answers to them. Asked with answers that a sure holder of the class would give, it draws the
class. The prototype needs no training: the mean of the public inputs, weighted by how much more of the class
the release sees in them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from attacks.reconstruction.similarity import ssim, total_variation
from privkd.errors import InputError

Floats = NDArray[np.float64]

_FLOOR = 1e-4
"""A probability of zero is taken as this: noise may leave none, and its logarithm must be finite."""


@dataclass(frozen=True)
class PairedAnswers:
    """A view of one round, for several trials.

    Attributes:
        inputs: the public inputs that were asked, float64 ``[query, *shape]``.
        reference: probabilities of a model that has not seen the class ``[query, class]``, such as the
            published teacher's.
        released: what the view shows of the model that has ``[trial, query, class]``; noise may leave
            anything there.
        noise_std: public standard deviation of that noise on each entry.
        slot: the class to be drawn.

    Raises:
        InputError: the shapes do not fit, or a value is not finite.
    """

    inputs: Floats
    reference: Floats
    released: Floats
    noise_std: float
    slot: int

    def __post_init__(self) -> None:
        shapes = (self.inputs.shape, self.reference.shape, self.released.shape)
        fits = self.released.ndim == 3 and self.released.shape[1:] == self.reference.shape
        if not fits or len(self.inputs) != len(self.reference) or not len(self.inputs):
            raise InputError(f"inputs, reference and released of shapes {shapes} do not fit")
        if not (np.isfinite(self.released).all() and np.isfinite(self.inputs).all()):
            raise InputError("the released answers or the inputs hold values that are not finite")
        if not 0 <= self.slot < self.reference.shape[1]:
            raise InputError(f"slot={self.slot}: expected a class of 0 to {self.reference.shape[1] - 1}")

    @property
    def probabilities(self) -> Floats:
        """The released answers as probabilities ``[trial, query, class]``.

        Shrunk toward the reference by the known noise (Efron and Morris 1973), then clipped and normalised.
        """
        difference = self.released - self.reference
        second_moment = (difference**2).mean(axis=(1, 2), keepdims=True)
        signal = np.maximum(second_moment - self.noise_std**2, 0.0)
        kept = np.where(second_moment > 0, signal / np.maximum(second_moment, _FLOOR**4), 1.0)
        return normalised(self.reference + np.maximum(kept, _FLOOR) * difference)

    @property
    def excess(self) -> Floats:
        """By how much the released probability of the slot exceeds the reference's ``[trial, query]``."""
        return self.released[:, :, self.slot] - self.reference[:, self.slot]


def normalised(values: Floats) -> Floats:
    """Positive rows that sum to 1 over the last axis."""
    positive = np.maximum(values, _FLOOR)
    return np.asarray(positive / positive.sum(axis=-1, keepdims=True), dtype=np.float64)


def softened(probabilities: Floats, temperature: float) -> Floats:
    """``softmax(log p / temperature)`` over the last axis."""
    powers = np.maximum(probabilities, _FLOOR) ** (1 / temperature)
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), dtype=np.float64)


_SHARPNESS = 2
"""Power of the excess: the clearest inputs speak most."""
_TINY = 1e-300


def class_prototypes(seen: PairedAnswers) -> Floats:
    """One drawing of the slot for each trial ``[trial, *shape]``.

    A trial without any excess gives the mean of all inputs.
    """
    positive = np.maximum(seen.excess, 0.0)
    peak = positive.max(axis=1, keepdims=True)
    relative = np.where(peak > 0, positive / np.maximum(peak, _TINY), 1.0)
    weights = relative**_SHARPNESS
    weights /= weights.sum(axis=1, keepdims=True)
    drawn = weights @ seen.inputs.reshape(len(seen.inputs), -1)
    return np.asarray(drawn.reshape(len(weights), *seen.inputs.shape[1:]), dtype=np.float64)


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


_TEMPERATURE, _UNSURE = 3.0, 5.0
"""tau and alpha of the paper."""
_PRIOR_WEIGHT = 0.03
_VARIATION_WEIGHT = 0.1
_CLEAREST = (3, 10, 30)
"""So many of the clearest public inputs give a query each, beside the ideal one."""
_KEPT = 4
"""Entries that a truncated answer keeps."""


def paired_logits_inversion(seen: PairedAnswers, *, seed: int) -> Floats:
    """Draw the slot from ``[softmax(server / tau), softmax(client / tau)]``, ``[trial, *shape]``.

    The ideal query pairs a server that is unsure, ``p_j = e^(1/alpha) / (n - 1 + e^(1/alpha))`` for the
    slot, with a client that is sure. Beside it stand the mean pairs of the inputs on which the client's
    probability of the slot rises most. Of their drawings the one that most resembles the others and varies
    least is taken.
    """

    def paired(server: Floats, client: Floats) -> Floats:
        return np.concatenate(
            [
                softened(np.broadcast_to(server, client.shape), _TEMPERATURE),
                softened(client, _TEMPERATURE),
            ],
            axis=-1,
        )

    return _drawn(seen, paired, seed)


def training_based_inversion(seen: PairedAnswers, *, seed: int) -> Floats:
    """Draw the slot from truncated answers of the client alone (Yang et al. 2019), ``[trial, *shape]``."""

    def truncated(_: Floats, client: Floats) -> Floats:
        least = np.sort(client, axis=-1)[..., -min(_KEPT, client.shape[-1]), None]
        return np.log(normalised(np.where(client >= least, client, 0.0)))

    return _drawn(seen, truncated, seed)


def least_varied(drawings: Floats) -> NDArray[np.int64]:
    """Index of the drawing to keep among several of each trial ``[trial, drawing, *shape]``.

    It has the largest mean structural similarity to the others, less a tenth of its total variation. (Where
    drawings stem from different devices, the paper takes the least similar one instead: it finds the
    holder of the class. Here all stem from one release.)
    """
    trials, several = drawings.shape[:2]
    images = drawings.reshape(-1, *drawings.shape[2:])
    table = np.zeros((trials, several, several))
    for first, second in zip(*np.triu_indices(several, 1), strict=True):
        table[:, first, second] = table[:, second, first] = ssim(drawings[:, first], drawings[:, second])
    likeness = table.sum(axis=2) / max(several - 1, 1)
    variation = total_variation(images).reshape(trials, several)
    return np.asarray((likeness - _VARIATION_WEIGHT * variation).argmax(axis=1), dtype=np.int64)


def _drawn(seen: PairedAnswers, features: Callable[[Floats, Floats], Floats], seed: int) -> Floats:
    client = seen.probabilities
    learned = features(seen.reference, client)
    decoders = train_decoders(
        learned, seen.inputs, seen.inputs.mean(axis=0), prior_weight=_PRIOR_WEIGHT, seed=seed
    )
    drawings = decoders.draw(np.concatenate([_ideal(seen, features), _clearest(seen, learned)], axis=1))
    return np.asarray(drawings[np.arange(len(drawings)), least_varied(drawings)], dtype=np.float64)


def _ideal(seen: PairedAnswers, features: Callable[[Floats, Floats], Floats]) -> Floats:
    """What a sure client and an unsure server would answer ``[trial, 1, feature]``."""
    classes = seen.reference.shape[1]
    raised = np.exp(1 / _UNSURE)
    server = np.full(classes, 1 / (classes - 1 + raised))
    server[seen.slot] = raised / (classes - 1 + raised)
    client = np.zeros((len(seen.released), 1, classes))
    client[:, :, seen.slot] = 1.0
    return features(server, normalised(client))


def _clearest(seen: PairedAnswers, learned: Floats) -> Floats:
    """Mean features of the inputs with the most excess of the slot ``[trial, query, feature]``."""
    order = np.argsort(-seen.excess, axis=1)
    ranked = np.take_along_axis(learned, order[:, : max(_CLEAREST), np.newaxis], axis=1)
    return np.stack([ranked[:, :count].mean(axis=1) for count in _CLEAREST], axis=1)
