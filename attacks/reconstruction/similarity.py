"""How alike images are. The only importer of scikit-image.

Images are float ``[image, channel, height, width]`` in [0, 1]; values outside are clipped first.
"""

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

from privkd.errors import InputError

Floats = NDArray[np.float64]

_WINDOW = 7
_SMALLEST = 3
_LEAST_MSE = 1e-10
"""An error of zero has no logarithm: the peak signal-to-noise ratio ends at 100 decibels."""


def ssim(left: Floats, right: Floats) -> Floats:
    """Structural similarity of each pair of images ``[image]`` (Wang et al. 2004), 1 for equal ones.

    The mean over all places and channels, with uniform windows of 7 pixels a side, or fewer where an image
    has fewer.

    Raises:
        InputError: no images, of different shapes, or under 3 pixels a side.
    """
    first, second = _checked(left), _checked(right)
    if first.shape != second.shape:
        raise InputError(f"images of shapes {first.shape} and {second.shape} cannot be compared")
    images, _, height, width = first.shape
    window = min(_WINDOW, *((side - 1) // 2 * 2 + 1 for side in (height, width)))
    if not images:
        return np.zeros(0)
    _, local = structural_similarity(
        first.reshape(-1, height, width),
        second.reshape(-1, height, width),
        win_size=window,
        data_range=1.0,
        channel_axis=0,
        full=True,
    )
    # The window's sums are whole only where it lies inside the image.
    edge = window // 2
    inner = local[:, edge : height - edge, edge : width - edge]
    return np.asarray(inner.reshape(images, -1).mean(axis=1), dtype=np.float64)


def mse(left: Floats, right: Floats) -> Floats:
    """Mean squared error of each pair of images ``[image]``."""
    return ((_checked(left) - _checked(right)) ** 2).reshape(len(left), -1).mean(axis=1)


def psnr(left: Floats, right: Floats) -> Floats:
    """Peak signal-to-noise ratio of each pair of images in decibels ``[image]``, at most 100."""
    return -10 * np.log10(np.maximum(mse(left, right), _LEAST_MSE))


def total_variation(images: Floats) -> Floats:
    """Mean absolute difference of neighbouring pixels ``[image]``: high for noise, low for smooth shapes."""
    values = _checked(images)
    across = np.abs(np.diff(values, axis=3)).reshape(len(values), -1).mean(axis=1)
    down = np.abs(np.diff(values, axis=2)).reshape(len(values), -1).mean(axis=1)
    return np.asarray(across + down, dtype=np.float64)


def nearest(images: Floats, pool: Floats) -> NDArray[np.int64]:
    """Index of the nearest image of ``pool``, in squared error, for each of ``images`` ``[image]``."""
    flat, others = images.reshape(len(images), -1), pool.reshape(len(pool), -1)
    distances = (others**2).sum(axis=1) - 2 * flat @ others.T
    return np.asarray(distances.argmin(axis=1), dtype=np.int64)


def is_image(shape: tuple[int, ...]) -> bool:
    """Whether records of this shape are images that can be compared: ``[channel, height, width]``."""
    return len(shape) == 3 and min(shape[1:]) >= _SMALLEST


def _checked(images: Floats) -> Floats:
    values = np.asarray(images, dtype=np.float64)
    if not is_image(values.shape[1:]):
        raise InputError(
            f"records of shape {values.shape[1:]} are no images [channel, height, width] of at least "
            f"{_SMALLEST} pixels a side"
        )
    return np.clip(values, 0.0, 1.0)
