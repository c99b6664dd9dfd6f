"""The class prototype: public inputs, weighted by how much more of the class the release sees in them.

Where a device knows a class that the public labels lack, its answers stand out on those unlabelled inputs
that show the class. Their weighted mean is the image of it; no model is trained, and noise averages out as
far as the number of queries allows.
"""

import numpy as np

from attacks.reconstruction.paired import Floats, PairedAnswers

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
