"""The scattering front end against its definition in numpy, and what it is known for."""

import sys
from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from privkd.config import ModelConfig
from privkd.errors import ConfigError, ModelError
from privkd.models.scattering import Scattering, _wavelets
from privkd.models.zoo import build, parameter_count, trained_parameters

Array = NDArray[np.float64]
ANGLES = 8


def gabor(
    size: tuple[int, int], sigma: float, theta: float, xi: float, slant: float
) -> NDArray[np.complex128]:
    """A periodic Gaussian window, narrower along ``theta`` by ``slant``, on a wave of ``xi``."""
    turn = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
    curvature = turn @ np.diag([1, slant**2]) @ turn.T / (2 * sigma**2)
    total = np.zeros(size, dtype=np.complex128)
    for shift_y, shift_x in product(range(-2, 3), repeat=2):
        y, x = np.mgrid[: size[0], : size[1]]
        y, x = y + shift_y * size[0], x + shift_x * size[1]
        window = curvature[0, 0] * y**2 + 2 * curvature[0, 1] * y * x + curvature[1, 1] * x**2
        total += np.exp(-window + 1j * xi * (y * np.cos(theta) + x * np.sin(theta)))
    return total / (2 * np.pi * sigma**2 / slant)


def wavelet(size: tuple[int, int], scale: int, angle: int) -> NDArray[np.complex128]:
    """A Morlet wavelet: a Gabor function made to have mean zero."""
    theta = (ANGLES / 2 - 1 - angle) * np.pi / ANGLES
    shape = (0.8 * 2**scale, theta)
    wave = gabor(size, *shape, 0.75 * np.pi / 2**scale, 4 / ANGLES)
    window = gabor(size, *shape, 0.0, 4 / ANGLES)
    return wave - wave.sum() / window.sum() * window


def convolved(image: Array, kernel: NDArray[np.complex128]) -> NDArray[np.complex128]:
    """Circular convolution, pixel by pixel."""
    out = np.zeros(image.shape, dtype=np.complex128)
    for y, x in np.ndindex(*image.shape):
        out += image[y, x] * np.roll(kernel, (y, x), axis=(0, 1))
    return out


def halved(kernel: NDArray[np.complex128]) -> NDArray[np.complex128]:
    """A kernel for fields thinned out by two: without the frequencies that these cannot hold."""
    spectrum = np.fft.fft2(kernel)
    for axis, side in enumerate(kernel.shape):
        low = np.r_[: side // 4, side - side // 4 : side]
        spectrum = spectrum.take(low, axis=axis)
    return np.fft.ifft2(spectrum)


def scattered(image: Array, scales: int) -> Array:
    """Every coefficient of ``image`` by the definition: ``| |x * psi| * psi | * phi``, thinned out."""
    step = 2**scales
    padded = [(side // step + 2) * step - side for side in image.shape]
    image = np.pad(image, [(p // 2, p - p // 2) for p in padded], mode="reflect")
    phi = gabor(image.shape, 0.8 * 2 ** (scales - 1), 0.0, 0.0, 1.0)

    def averaged(field: Array, thinned: int) -> Array:
        kernel = phi if thinned == 1 else halved(phi)
        return convolved(field, kernel).real[:: step // thinned, :: step // thinned][1:-1, 1:-1]

    first = {
        (j, a): np.abs(convolved(image, wavelet(image.shape, j, a)))[:: 2**j, :: 2**j]
        for j, a in product(range(scales), range(ANGLES))
    }
    second = [
        np.abs(convolved(field, wavelet(image.shape, later, angle)))[:: 2**later, :: 2**later]
        for (j, _), field in first.items()
        for later, angle in product(range(j + 1, scales), range(ANGLES))
        if j == 0
    ]
    found = [averaged(image, 1), *(averaged(field, 2**j) for (j, _), field in first.items())]
    return np.stack(found + [averaged(field, 2) for field in second])


def coefficients(images: Tensor) -> Tensor:
    """Before normalisation, ``[record, channel, coefficient, y, x]``."""
    return Scattering(*images.shape[2:]).coefficients(images)


def smooth(size: int, seed: int = 0) -> Tensor:
    """A picture of a few blobs ``[1, 1, size, size]``."""
    noise = torch.randn((1, 1, size, size), generator=torch.Generator().manual_seed(seed))
    return F.avg_pool2d(noise, 5, stride=1, padding=2)


class TestDefinition:
    @pytest.mark.parametrize(("size", "scales"), [((8, 8), 1), ((9, 6), 1), ((16, 16), 2)])
    def test_equals_the_slow_twin(self, size: tuple[int, int], scales: int) -> None:
        image = torch.rand((1, 1, *size), generator=torch.Generator().manual_seed(1))
        twin = scattered(image[0, 0].double().numpy(), scales)
        found = coefficients(image)[0, 0].double().numpy()
        assert found.shape == twin.shape
        # Kymatio's pi is 3.1415.
        np.testing.assert_allclose(found, twin, rtol=1e-4, atol=2e-6)

    @pytest.mark.parametrize("size", [(28, 28), (32, 32), (16, 19), (8, 8), (3, 2)])
    def test_equals_kymatio(self, size: tuple[int, int]) -> None:
        from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D

        images = torch.rand((3, 2, *size), generator=torch.Generator().manual_seed(1))
        theirs = ScatteringTorch2D(J=Scattering(*size).scales, shape=size, L=ANGLES)(images)
        torch.testing.assert_close(coefficients(images), theirs, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("shape", "features"),
        [
            ((1, 28, 28), (81, 7, 7)),
            ((3, 32, 32), (243, 8, 8)),
            ((1, 8, 8), (9, 4, 4)),
            ((2, 4, 5), (18, 2, 2)),
        ],
    )
    def test_shapes(self, shape: tuple[int, ...], features: tuple[int, ...]) -> None:
        front = Scattering(*shape[1:])
        assert front(torch.rand((3, *shape))).shape == (3, *features)
        assert front(torch.rand((0, *shape))).shape == (0, *features)

    def test_normalised_record_by_record(self) -> None:
        images = torch.rand((5, 1, 16, 16), generator=torch.Generator().manual_seed(2))
        front = Scattering(16, 16)
        features = front(images)
        grouped = features.unflatten(1, (27, 3)).flatten(2)
        torch.testing.assert_close(grouped.mean(-1), torch.zeros(5, 27), atol=1e-5, rtol=0)
        alone = torch.cat([front(image[None]) for image in images])
        torch.testing.assert_close(features, alone, rtol=1e-5, atol=1e-5)
        assert bool(front(torch.zeros(1, 1, 16, 16)).isfinite().all())

    def test_a_blank_image_has_a_gradient(self) -> None:
        blank = torch.zeros((1, 1, 16, 16), requires_grad=True)
        Scattering(16, 16)(blank).square().sum().backward()
        assert blank.grad is not None
        assert bool(blank.grad.isfinite().all())


class TestProperties:
    """Bruna & Mallat 2013: scattering loses no more energy than it must, and small shifts hardly move it."""

    def test_most_energy_is_in_the_first_orders(self) -> None:
        found = coefficients(smooth(32))[0, 0].square().sum((-2, -1))
        assert found[17:].sum() < found[1:17].sum() / 10

    def test_a_shift_moves_it_less_than_the_image(self) -> None:
        for seed in range(5):
            image = smooth(32, seed)
            shifted = image.roll(1, dims=-1)
            moved = (coefficients(shifted) - coefficients(image)).norm() / coefficients(image).norm()
            assert moved < 0.5 * (shifted - image).norm() / image.norm()

    def test_never_grows_a_difference(self) -> None:
        for seed in range(5):
            one, other = smooth(32, seed), smooth(32, seed + 100)
            # One coefficient stands for 4x4 pixels.
            assert 4 * (coefficients(one) - coefficients(other)).norm() < (one - other).norm()


class TestStudent:
    def test_a_linear_head_is_all_that_is_trained(self) -> None:
        model = build(ModelConfig(name="scatter"), input_shape=(1, 28, 28), classes=10, seed=0)
        assert parameter_count(model) == (81 * 49 + 1) * 10
        for part in ("all", "last_block", "head"):
            assert sum(p.numel() for p in trained_parameters(model, part)) == parameter_count(model)
        assert set(model.state_dict()) == {"head.weight", "head.bias"}

    def test_images_only(self) -> None:
        with pytest.raises(ModelError, match=r"'scatter' needs images .* use 'mlp'"):
            build(ModelConfig(name="scatter"), input_shape=(12,), classes=3, seed=0)

    def test_without_kymatio(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "kymatio.scattering2d.filter_bank", None)
        _wavelets.cache_clear()
        with pytest.raises(ConfigError, match=r"needs kymatio .*pip install 'privkd\[scatter\]'"):
            build(ModelConfig(name="scatter"), input_shape=(1, 8, 8), classes=3, seed=0)
