"""Wavelet scattering as a student's front end. The only importer of kymatio.

Scattering (Bruna & Mallat 2013) passes an image through fixed Morlet wavelets, takes moduli and averages:
features that small shifts and deformations hardly move. Tramer & Boneh 2021 found that a linear student on
them is trained better with DP-SGD than a network that must learn its features privately.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from privkd.errors import ConfigError, one_line
from privkd.frontend import FrontEnd

_ANGLES = 8
_LARGE = 16
_GROUPS = {1: 3, 2: 27}
"""In how many groups coefficients are normalised, by scales."""

Transform = Callable[[Tensor], Tensor]


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
        _transform(self.scales, height, width, torch.device("cpu"))

    def same_as(self, other: FrontEnd) -> bool:
        """See `FrontEnd.same_as`: filters depend on the size alone."""
        size = (self.height, self.width)
        return isinstance(other, Scattering) and size == (other.height, other.width)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        if images.shape[0] == 0:
            return self(images.new_zeros((1, *images.shape[1:])))[:0]
        transform = _transform(self.scales, self.height, self.width, images.device)
        coefficients = transform(images.contiguous()).flatten(1, 2)
        return F.group_norm(coefficients, _GROUPS[self.scales])


@functools.cache
def _transform(scales: int, height: int, width: int, device: torch.device) -> Transform:
    """Kymatio's transform, shared by all students: its filters are constants, not weights of one."""
    try:
        # By its own module: that of all transforms asks for a function that SciPy 1.17 has removed.
        from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D
    except ImportError as error:
        raise ConfigError(
            f"model 'scatter' needs kymatio ({one_line(error)}); run: pip install 'privkd[scatter]'"
        ) from error
    found: Transform = ScatteringTorch2D(J=scales, shape=(height, width), L=_ANGLES).to(device)
    return found
