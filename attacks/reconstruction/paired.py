"""What an adversary holds who wants to draw a class: public inputs, and two models' answers to them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
