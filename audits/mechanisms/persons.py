"""Records whose owners are made up, for the mechanism audit's run that protects persons."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_EACH = 4


def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """The embedded digits, and of each record whose it would be if everybody wrote four in a row."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    labels = np.asarray(found.target, dtype=np.int64)
    return np.asarray(found.images, dtype=np.uint8), labels, np.arange(len(labels)) // _EACH
