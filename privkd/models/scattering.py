"""Wavelet scattering as a student's front end. The only importer of kymatio.

Scattering (Bruna & Mallat 2013) passes an image through fixed Morlet wavelets, takes moduli and averages:
features that small shifts and deformations hardly move. Tramer & Boneh 2021 found that a linear student on
them is trained better with DP-SGD than a network that must learn its features privately.

The wavelets are kymatio's. The transform is our own, as a few products with constant matrices for all
wavelets at once: on images so small a fast Fourier transform gains next to nothing, and runtimes on devices
have neither that nor complex numbers.
"""

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from privkd.errors import ConfigError, one_line
from privkd.models.features import FrontEnd

_ANGLES = 8
_LARGE = 16
_GROUPS = {1: 3, 2: 27}
"""In how many groups coefficients are normalised, by scales."""
_TINY = 1e-30
"""Below this a squared modulus has no gradient, where the root's is not finite."""


class Scattering(FrontEnd):
    """Images ``[record, channel, height, width]`` to normalised coefficients ``[record, feature, y, x]``.

    Two scales and both orders of moduli for images of at least 16x16: 81 coefficients for each channel, at a
    quarter of the height and width. One scale for smaller images: 9 coefficients, at half of each. They are
    normalised record by record within groups of coefficients, so no statistic of private data is needed.

    Raises:
        ConfigError: kymatio is not installed.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height = height
        self.width = width
        self.scales = 2 if min(height, width) >= _LARGE else 1
        self._wavelets(torch.device("cpu"), torch.float32)

    @property
    def key(self) -> Hashable:
        """See `FrontEnd.key`: filters depend on the size alone."""
        return type(self), self.height, self.width

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        if images.shape[0] == 0:
            return self(images.new_zeros((1, *images.shape[1:])))[:0]
        return F.group_norm(self.coefficients(images).flatten(1, 2), _GROUPS[self.scales])

    def coefficients(self, images: Tensor) -> Tensor:
        """Before they are normalised, ``[record, channel, coefficient, y, x]``."""
        wavelets = self._wavelets(images.device, images.dtype)
        return wavelets.scattered(images.flatten(0, 1)[:, None]).unflatten(0, images.shape[:2])

    def _wavelets(self, device: torch.device, dtype: torch.dtype) -> "_Wavelets":
        return _wavelets(self.scales, self.height, self.width, device, dtype)


class _Complex(NamedTuple):
    """A complex tensor as two real ones."""

    real: Tensor
    imag: Tensor


@dataclass(frozen=True)
class _Fourier:
    """Fourier matrices ``[out, in]`` over the rows and the columns of a field."""

    rows: _Complex
    columns: _Complex

    def of_real(self, field: Tensor) -> _Complex:
        """From a real ``field`` ``[..., in, in]``."""
        by_rows = _Complex(self.rows.real @ field, self.rows.imag @ field)
        return _product(by_rows, _Complex(self.columns.real.mT, self.columns.imag.mT))

    def modulus(self, field: _Complex) -> Tensor:
        """The modulus of what they make of a complex ``field`` ``[..., in, in]``."""
        by_columns = _product(field, _Complex(self.columns.real.mT, self.columns.imag.mT))
        found = _product(self.rows, by_columns)
        return (found.real.square() + found.imag.square()).clamp_min(_TINY).sqrt()


@dataclass(frozen=True)
class _Mean:
    """Local means, by real matrices ``[out, in]`` over the rows and the columns of a field."""

    rows: Tensor
    columns: Tensor

    def of(self, field: Tensor) -> Tensor:
        """From ``field`` ``[..., in, in]``."""
        return self.rows @ field @ self.columns.mT


@dataclass(frozen=True)
class _Scale:
    """The wavelets of one scale.

    Attributes:
        step: of the fields that are kept of them, ``2**scale`` points.
        spectra: ``[angle, y, x]`` over the frequencies of a padded image; they are real.
        back: from the frequencies of such a field to the field.
        mean: from the field to coefficients.
    """

    step: int
    spectra: Tensor
    back: _Fourier
    mean: _Mean

    def moduli(self, spectrum: _Complex) -> Tensor:
        """Of fields with ``spectrum`` ``[record, field, y, x]``: ``[record, field x angle, y, x]``."""
        products = ((part[:, :, None] * self.spectra).flatten(1, 2) for part in spectrum)
        return self.back.modulus(_Complex(*(_folded(product, self.step) for product in products)))


@dataclass(frozen=True)
class _Wavelets:
    """All constants for images of one size and one or two scales.

    Attributes:
        image: from an image to its spectrum when padded by reflection.
        image_mean: from an image to its coefficients of order zero, padded likewise.
        field: from a field of the finest scale to its spectrum.
        scales: the finest first.
    """

    image: _Fourier
    image_mean: _Mean
    field: _Fourier
    scales: tuple[_Scale, ...]

    def scattered(self, images: Tensor) -> Tensor:
        """Coefficients ``[record, coefficient, y, x]`` of ``images`` ``[record, 1, height, width]``."""
        spectrum = self.image.of_real(images)
        first = [scale.moduli(spectrum) for scale in self.scales]
        second = [scale.moduli(self.field.of_real(first[0])) for scale in self.scales[1:]]
        means = [
            scale.mean.of(moduli)
            for scale, moduli in zip((*self.scales, *self.scales[1:]), (*first, *second), strict=True)
        ]
        return torch.cat([self.image_mean.of(images), *means], dim=1)


def _folded(spectrum: Tensor, step: int) -> Tensor:
    """That of each ``step``-th point, times ``step**2``: frequencies that those cannot tell apart, summed."""
    for axis in (-2, -1):
        first, *others = spectrum.chunk(step, axis)
        spectrum = sum(others, start=first)
    return spectrum


def _product(one: _Complex, other: _Complex) -> _Complex:
    """The matrix product."""
    return _Complex(
        one.real @ other.real - one.imag @ other.imag,
        one.real @ other.imag + one.imag @ other.real,
    )


@functools.cache
def _wavelets(scales: int, height: int, width: int, device: torch.device, dtype: torch.dtype) -> _Wavelets:
    """Shared by all students: constants, not weights of one."""
    try:
        from kymatio.scattering2d.filter_bank import filter_bank
    except ImportError as error:
        raise ConfigError(
            f"model 'scatter' needs kymatio ({one_line(error)}); run: pip install 'privkd[scatter]'"
        ) from error
    constant = functools.partial(torch.as_tensor, dtype=dtype, device=device)
    step = 2**scales
    sizes = [(side // step + 2) * step for side in (height, width)]
    pads = [_padding(side, size) for side, size in zip((height, width), sizes, strict=True)]
    bank = filter_bank(*sizes, scales, _ANGLES)

    def fourier(matrices: list[NDArray[np.complex128]]) -> _Fourier:
        return _Fourier(*(_Complex(constant(m.real), constant(m.imag)) for m in matrices))

    def means(scale: int) -> list[NDArray[np.float64]]:
        window = np.asarray(bank["phi"]["levels"][scale], dtype=np.float64)
        # A Gaussian is a product of one over the rows and one over the columns.
        profiles = (window[:, 0], window[0] / window[0, 0])
        return [_averaging(profile, step >> scale) for profile in profiles]

    def scale_of(scale: int) -> _Scale:
        spectra = [wave["levels"][0] for wave in bank["psi"] if wave["j"] == scale]
        thinned = [size >> scale for size in sizes]
        return _Scale(
            step=2**scale,
            spectra=constant(np.stack(spectra)),
            back=fourier([_inverse(size, np.arange(size)) / 2**scale for size in thinned]),
            mean=_Mean(*map(constant, means(scale))),
        )

    return _Wavelets(
        image=fourier([_forward(size) @ pad for size, pad in zip(sizes, pads, strict=True)]),
        image_mean=_Mean(*(constant(mean @ pad) for mean, pad in zip(means(0), pads, strict=True))),
        field=fourier([_forward(size) for size in sizes]),
        scales=tuple(scale_of(scale) for scale in range(scales)),
    )


def _padding(side: int, size: int) -> NDArray[np.float64]:
    """The matrix ``[size, side]`` that reflects a line of pixels at both ends."""
    before = (size - side) // 2
    padded = np.pad(np.arange(side), (before, size - side - before), mode="reflect")
    return np.eye(side)[padded]


def _forward(size: int) -> NDArray[np.complex128]:
    """Fourier's matrix ``[frequency, point]``."""
    line = np.arange(size)
    return np.exp(-2j * np.pi * np.outer(line, line) / size)


def _inverse(size: int, points: NDArray[np.int64]) -> NDArray[np.complex128]:
    """Its inverse at some ``points`` alone: ``[point, frequency]``."""
    return np.exp(2j * np.pi * np.outer(points, np.arange(size)) / size) / size


def _averaging(profile: NDArray[np.float64], step: int) -> NDArray[np.float64]:
    """The circular convolution with a window of spectrum ``profile``, at each ``step``-th point.

    Without the first and the last of those, which lie in the padding.
    """
    size = len(profile)
    inside = np.arange(step, size - step, step)
    return np.asarray((_inverse(size, inside) @ np.diag(profile) @ _forward(size)).real)
