"""Noise that protects people: exact discrete Gaussians and normals from a keyed cryptographic stream.

Every draw comes from AES-256-CTR under a 32-byte key, so a draw repeats under the same key and cannot
be predicted without it. Keys form a tree: a ``NoiseRoot`` derives one key per purpose, round and party
by HKDF-SHA256 (RFC 5869), so no two uses ever share a stream.

The sampler of the discrete Gaussian is Algorithm 3 of Canonne, Kamath and Steinke, "The Discrete
Gaussian for Differential Privacy" (2020). Its two real-valued comparisons have the form
``U < exp(-gamma)``. They are made in float64 for all candidates at once; wherever float64's error could
change the outcome, interval arithmetic settles that candidate. The samples therefore follow the exact
law, on every machine the same ones. It does not run in constant time: keep it off clocks that an
adversary reads.
"""

import math
import os
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Self

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from mpmath.ctx_iv import MPIntervalContext
from numpy.typing import NDArray

KEY_BYTES = 32
MAX_SIGMA2 = Fraction(1 << 72)
"""Largest ``sigma2`` of the sampler. Above it the float64 margins would settle nothing."""

_LOG_MARGIN = 2.0**-48
_EXP_MARGIN = 2.0**-46
_ACCEPTANCE = 1.4
"""Candidates drawn per sample wanted: a little over 1 / 0.757, the acceptance rate for large sigma."""


class Keystream:
    """The AES-256-CTR keystream of one key, read once from front to back."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"key of {len(key)} bytes: expected {KEY_BYTES}")
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        return self._encryptor.update(bytes(size))

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next ``count`` 64-bit words, uniform, ``[count]``."""
        return np.frombuffer(self.read(8 * count), dtype="<u8").astype(np.uint64, copy=False)


@dataclass(frozen=True)
class NoiseRoot:
    """A secret 32-byte key from which every stream of noise is derived.

    Simulations use ``from_seed``; wherever noise protects people, use ``from_system``.
    """

    key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise ValueError(f"root key of {len(self.key)} bytes: expected {KEY_BYTES}")

    @classmethod
    def from_seed(cls, seed: int) -> Self:
        """Reproducible noise. Whoever knows the seed can subtract it: for simulation only."""
        return cls(_derive(b"", b"privkd simulated root", str(int(seed)).encode()))

    @classmethod
    def from_system(cls) -> Self:
        """Unpredictable noise, from the operating system's generator. No seed reaches it."""
        return cls(os.urandom(KEY_BYTES))

    def subkey(self, *labels: str | int | bytes) -> bytes:
        """The 32-byte key of one use, such as ``("noised", round, device)``.

        Distinct label sequences give independent keys: labels are encoded with their type and length.
        """
        return _derive(self.key, b"privkd noise", b"".join(_tagged(label) for label in labels))

    def stream(self, *labels: str | int | bytes) -> Keystream:
        """A fresh keystream under ``subkey(*labels)``; the same labels give the same stream again."""
        return Keystream(self.subkey(*labels))


def _derive(secret: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(hashes.SHA256(), KEY_BYTES, salt, info).derive(secret)


def _tagged(label: str | int | bytes) -> bytes:
    if isinstance(label, bytes):
        tag, body = b"b", label
    else:
        tag, body = (b"s", label.encode()) if isinstance(label, str) else (b"i", str(int(label)).encode())
    return tag + len(body).to_bytes(8, "big") + body


def discrete_gaussian(sigma2: int | Fraction, size: int, stream: Keystream) -> NDArray[np.int64]:
    """Exact samples ``[size]`` of ``P(x) ~ exp(-x^2 / (2 sigma2))`` over the integers.

    Added to an integer vector of L2 sensitivity ``D`` they give ``D^2 / (2 sigma2)``-zCDP
    (Canonne, Kamath, Steinke 2020, Theorem 4). Equal streams give equal samples on every machine: how
    much of the stream is read depends on mathematical facts alone, never on float64's rounding.

    Args:
        sigma2: the variance parameter, above 0 and at most ``MAX_SIGMA2``.
        size: number of samples.
        stream: where the randomness comes from.

    Raises:
        ValueError: ``sigma2`` is out of range or ``size`` is negative.
    """
    variance = Fraction(sigma2)
    if not 0 < variance <= MAX_SIGMA2:
        raise ValueError(f"sigma2={float(variance):g}: expected above 0 and at most 2^72")
    if size < 0:
        raise ValueError(f"size={size}: expected 0 or more")
    samples = np.empty(size, np.int64)
    done = 0
    while done < size:
        fresh = _accepted(variance, int((size - done) * _ACCEPTANCE) + 16, stream)[: size - done]
        samples[done : done + len(fresh)] = fresh
        done += len(fresh)
    return samples


def _accepted(variance: Fraction, count: int, stream: Keystream) -> NDArray[np.int64]:
    """The samples that survive of ``count`` candidates from the discrete Laplace of scale ``t``."""
    t = math.isqrt(math.floor(variance)) + 1
    words, uniforms = stream.words(count), stream.words(count)
    negative = (words & np.uint64(1)).astype(bool)
    magnitudes = _geometric(words >> np.uint64(1), t, stream)
    accept = _bernoulli_exp(uniforms, magnitudes, variance, t, stream)
    # Zero has two signs, so one of them is struck out, or zero would come twice as often.
    accept &= ~(negative & (magnitudes == 0))
    return np.where(negative, -magnitudes, magnitudes)[accept]


def _geometric(uniforms: NDArray[np.uint64], t: int, stream: Keystream) -> NDArray[np.int64]:
    """``floor(-t ln U)``, so that ``P(x >= k) = exp(-k / t)``; ``U`` lies in ``[u, u + 1] / 2^63``.

    The float64 value may be off by

    * ``t * 2^-51`` from rounding ``u + 1/2`` and its product with ``2^-63`` (moves ln U by at most 2^-51),
    * ``(p + 1) * y * 2^-53`` from the logarithm (``p`` ulp) and the product with ``t``,
    * ``t / (u + 1/2)`` from the width of U's interval, for ``u >= 1``.

    The first two are under ``_LOG_MARGIN * max(y, t)`` for a logarithm good to 20 ulp; numpy's is good to 4.
    For the third we allow twice as much, which makes every ``u < 2t`` doubtful, ``u = 0`` among them.
    """
    centre = uniforms.astype(np.float64) + 0.5
    y = -t * np.log(centre * 2.0**-63)
    error = np.maximum(y, t) * _LOG_MARGIN + 2.0 * t / centre
    floor = np.floor(y)
    doubtful = (y - floor < error) | (floor + 1 - y < error)
    values = floor.astype(np.int64)
    for i in np.flatnonzero(doubtful):
        values[i] = _LazyUniform(int(uniforms[i]), 63, stream).floor_log(t)
    return values


def _bernoulli_exp(
    uniforms: NDArray[np.uint64],
    magnitudes: NDArray[np.int64],
    variance: Fraction,
    t: int,
    stream: Keystream,
) -> NDArray[np.bool_]:
    """True with probability ``exp(-gamma)``, ``gamma = (x - variance / t)^2 / (2 variance)``, per candidate.

    Float64's error in ``gamma`` is at most ``(6 gamma + 2 sqrt(2 gamma)) * 2^-53``: the distance to
    ``variance / t <= sigma`` is off by ``2^-53`` of either term. That moves ``exp(-gamma)`` by under
    ``4 * 2^-53``; the exponential (4 ulp) and the uniform's rounding and width add under ``6 * 2^-53``.
    ``_EXP_MARGIN`` is 12 times their sum.
    """
    centre = variance / t
    distance = magnitudes.astype(np.float64) - float(centre)
    probability = np.exp(-distance * distance / (2 * float(variance)))
    gap = uniforms.astype(np.float64) * 2.0**-64 - probability
    accept = gap < 0
    for i in np.flatnonzero(np.abs(gap) < _EXP_MARGIN):
        gamma = (int(magnitudes[i]) - centre) ** 2 / (2 * variance)
        accept[i] = _LazyUniform(int(uniforms[i]), 64, stream).below_exp(gamma)
    return accept


class _LazyUniform:
    """A real uniform on (0, 1) of which the leading ``bits`` are known; more are drawn when they matter."""

    def __init__(self, leading: int, bits: int, stream: Keystream) -> None:
        self._leading = leading
        self._bits = bits
        self._stream = stream
        self._intervals: Any = MPIntervalContext()

    def _extend(self) -> None:
        self._leading = (self._leading << 64) | int(self._stream.words(1)[0])
        self._bits += 64

    def below_exp(self, gamma: Fraction) -> bool:
        """Whether ``U < exp(-gamma)``, decided by enclosures of both sides."""
        while True:
            intervals = self._intervals
            intervals.prec = self._bits + 80
            bound = intervals.exp(-intervals.mpf(gamma.numerator) / gamma.denominator)
            scaled = bound * intervals.mpf(1 << self._bits)
            if intervals.mpf(self._leading + 1) <= scaled:
                return True
            if intervals.mpf(self._leading) >= scaled:
                return False
            self._extend()

    def floor_log(self, t: int) -> int:
        """``floor(-t ln U)``, from a float estimate that exact comparisons then correct."""
        while self._leading < 2 * t:
            self._extend()
        estimate = t * (self._bits * math.log(2) - math.log(self._leading))
        value = max(0, math.floor(estimate))
        while self.below_exp(Fraction(value + 1, t)):
            value += 1
        while value and not self.below_exp(Fraction(value, t)):
            value -= 1
        return value


def standard_normal(shape: int | tuple[int, ...], stream: Keystream) -> NDArray[np.float64]:
    """Standard normals of ``shape`` in float64 (Box and Muller 1958), from 64-bit uniforms.

    The tail reaches 9.4 standard deviations. Unlike ``discrete_gaussian`` this is the real normal up to
    float64's rounding: add it in float64 and round the sum once, as the low bits of a float can
    otherwise betray what was added (Mironov 2012).
    """
    dimensions = (shape,) if isinstance(shape, int) else shape
    count = math.prod(dimensions)
    pairs = (count + 1) // 2
    radius = np.sqrt(-2 * np.log((stream.words(pairs).astype(np.float64) + 0.5) * 2.0**-64))
    angle = stream.words(pairs).astype(np.float64) * (2 * math.pi * 2.0**-64)
    normals = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return normals[:count].reshape(dimensions)
