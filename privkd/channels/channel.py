"""How the devices' answers reach the cloud: the ``Channel`` contract, and the channels without sharing.

``plain`` and ``noised`` show the cloud each device's own answers; ``secure`` (``privkd.channels.secure``)
shows it their mean alone. What is known of each kind stands in ``privkd.channels.registry``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privkd.channels.registry import KINDS, known, price_of
from privkd.errors import ChannelError, ConfigError, InputError, RefusalError
from privkd.messages import Question, Release, Upload
from privkd.privacy.events import PartyId, PrivacyEvent
from privkd.privacy.noise import MAX_SIGMA2, NoiseRoot, discrete_gaussian
from privkd.secure.fixedpoint import FixedPoint, clip_rows, content_digest, finite_or_zero


class Channel(ABC):
    """One way for answers to leave the devices. Use as a context manager: real processes may stand behind.

    Args:
        clip_norm: L2 bound on each device's whole ``[query, class]`` block; a public constant.
        rho: zCDP price of one release to each device, or ``None`` for no noise.
        root: where its noise comes from; ``None`` for the system's cryptographic source.

    Raises:
        ConfigError: one is out of range.
    """

    kind: ClassVar[str]
    """Of `privkd.channels.registry.KINDS`."""
    aggregators: int = 1
    """How many add noise of the whole price to a sum."""

    def __init__(self, clip_norm: float, rho: float | None = None, root: NoiseRoot | None = None) -> None:
        if not (math.isfinite(clip_norm) and clip_norm > 0):
            raise ConfigError(f"clip_norm={clip_norm}: expected a finite number above 0")
        if rho is not None and not (math.isfinite(rho) and rho > 0):
            raise ConfigError(f"rho={rho}: expected a finite number above 0, or none for no noise")
        self.clip_norm = clip_norm
        self.rho = rho
        self.root = NoiseRoot.from_system() if root is None else root

    @property
    def event(self) -> PrivacyEvent:
        """Device-level price of one release, known (and debited) before it happens."""
        return price_of(self.kind, self.rho)

    @cached_property
    def encoding(self) -> FixedPoint:
        """Of one device's block as integers, clipped to the clip norm."""
        return FixedPoint.for_clip_norm(self.clip_norm)

    @cached_property
    def sigma2(self) -> Fraction | None:
        """Variance of the noise on integers of `encoding` that makes a release ``rho``-zCDP.

        Raises:
            ConfigError: the price is so small that the noise could not be drawn.
        """
        return None if self.rho is None else noise_variance(self.encoding.bound, self.rho)

    @property
    def draw_std(self) -> float:
        """Standard deviation of one draw of that noise, decoded."""
        return math.ldexp(math.sqrt(self.sigma2 or 0), -self.encoding.fraction_bits)

    def draw(self, integers: NDArray[np.int64], *labels: str | int) -> NDArray[np.int64]:
        """``integers`` with one draw of that noise, if there is any.

        There is a stream for all ``labels`` and each content: different answers never meet the same noise.
        """
        if self.sigma2 is None:
            return integers
        stream = self.root.stream(*labels, str(self.sigma2), content_digest(integers))
        return integers + discrete_gaussian(self.sigma2, integers.size, stream).reshape(integers.shape)

    def resolution(self, devices: int) -> float:
        """How near a release over so many ``devices`` comes to their clipped answers, noise apart."""
        return math.ldexp(1.0, -self.encoding.fraction_bits)

    def open(self, question: Question, devices: Sequence[PartyId]) -> None:  # noqa: B027
        """Have whatever stands behind the channel await answers to ``question`` of at most ``devices``."""

    def invitation(self) -> bytes:
        """The cloud's half: what a device elsewhere must be told of the round that is open, to encode for it.

        Public; empty where the question says all.
        """
        return b""

    def accept(self, question: Question, invitation: bytes) -> int:
        """The device's half: take part in a round that a cloud elsewhere has opened.

        Returns:
            Which attempt at the round it is, from 0: each is a release of its own.

        Raises:
            RefusalError: it is not the round that this channel's settings give.
        """
        if invitation:
            raise RefusalError(409, f"the {self.kind} channel needs no terms, but the cloud sent some")
        return 0

    def deliver(self, upload: Upload, deadline: float) -> bytes:
        """The device's half: bring ``upload`` to whatever stands behind the channel; may be repeated.

        Returns:
            What is left to send to the cloud itself.

        Raises:
            ChannelError: a party cannot be reached by ``deadline``, on ``time.monotonic``, or refuses.
        """
        return upload.payload

    @abstractmethod
    def encode(self, question: Question, block: NDArray[np.float64], device: PartyId) -> Upload:
        """The device's half: what ``device`` sends for its finite ``block`` ``[query * class]``."""

    @abstractmethod
    def collect(self, question: Question, uploads: Sequence[Upload]) -> Release:
        """The cloud's half: what it sees of the ``uploads`` for ``question``."""

    def carry(self, question: Question, answers: Tensor, devices: Sequence[PartyId]) -> Release:
        """Send each device's block of ``answers`` to ``question`` ``[device, query, class]`` to the cloud.

        Each block is one contribution, clipped in L2 to the channel's clip norm before any noise. A block
        with a value that is not finite is sent as zeros, as the zeroed-out neighbour's is: neither an error
        nor a name tells which device it was. Noise is a function of the channel's root key, the round and
        what each device contributes, so a repeated release is bit-identical, and different answers never meet
        the same noise.

        Raises:
            ChannelError: a party failed, or the blocks do not fit the devices; nothing was released.
            InputError: a plug-in's channel fails, or releases something else.
        """
        blocks = contributions(answers, devices, question.round)
        with KINDS.guarded(self.kind):
            self.open(question, devices)
            encoded = [self.encode(question, *each) for each in zip(blocks, devices, strict=True)]
            return self.collected(question, encoded)

    def collected(self, question: Question, uploads: Sequence[Upload]) -> Release:
        """`collect`, and a look at what a plug-in's channel made of the uploads.

        Raises:
            ChannelError: a party failed; nothing was released.
            InputError: a plug-in's channel fails, or releases something else.
        """
        with KINDS.guarded(self.kind):
            return self._checked(self.collect(question, uploads), question)

    def _checked(self, release: Release, question: Question) -> Release:
        block, found = tuple(question.prior.shape), tuple(release.answers.shape)
        expected = (len(release.devices), *block) if known(self.kind).shows_each else block
        if found != expected:
            raise InputError(
                f"channel.kind {self.kind!r}: released answers of shape {list(found)}; "
                f"expected {list(expected)}"
            )
        return release

    def release(self, answers: Tensor, *, devices: Sequence[PartyId], round: int) -> Release:
        """`carry` for answers ``[device, query, class]`` that are made up, to no question of any run."""
        if answers.ndim != 3:
            raise ChannelError(f"answers of shape {tuple(answers.shape)}: expected [device, query, class]")
        return self.carry(Question.of_shape(round, *answers.shape[1:]), answers, devices)

    def colluders_noise(self) -> NDArray[np.float64]:
        """What all parties but one added to the last release, as they could tell an adversary.

        In the units of the release, ``[entry]``; zeros where one party adds all of the noise, or where the
        parties' keys are not this process's own.
        """
        return np.zeros(1)

    @property
    def unknown_noise(self) -> float:
        """How many times the price's own variance is left in a release to whom `colluders_noise` is told."""
        return 1.0

    def for_audit(self) -> "Channel":
        """The same channel, by the same parties, for devices and rounds that are not the run's."""
        return self

    def start(self) -> None:  # noqa: B027  nothing stands behind a channel unless it says so
        """Begin to set up whatever stands behind the channel, without waiting for it. Idempotent."""

    def close(self) -> None:  # noqa: B027
        """Stop whatever stands behind the channel. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PlainChannel(Channel):
    """Every device's clipped answers, as they are. Trust: the cloud sees all."""

    kind = "plain"

    def resolution(self, devices: int) -> float:
        """See `Channel.resolution`: that of float32."""
        return float(np.finfo(np.float32).tiny)

    def encode(self, question: Question, block: NDArray[np.float64], device: PartyId) -> Upload:
        """The clipped block, as it is."""
        clipped = clip_rows(block[None], self.clip_norm)[0].astype(np.float32)
        return Upload(device, question.round, clipped.tobytes())

    def collect(self, question: Question, uploads: Sequence[Upload]) -> Release:
        """All blocks, as they came."""
        blocks = [np.frombuffer(upload.payload, np.float32) for upload in uploads]
        return _shown(question, np.stack(blocks), 0.0, uploads)


class NoisedChannel(Channel):
    """Every device clips its answers and adds its own discrete Gaussian. Trust: each device, in itself alone.

    The clipped block is encoded in integers with L2 norm at most ``C_int``; the noise has
    ``sigma^2 = C_int^2 / (2 rho)``, so each release is exactly ``rho``-zCDP per device.
    """

    kind = "noised"

    def __init__(self, clip_norm: float, rho: float | None = None, root: NoiseRoot | None = None) -> None:
        super().__init__(clip_norm, rho, root)
        _ = self.draw_std  # refuses a price that is too small

    def encode(self, question: Question, block: NDArray[np.float64], device: PartyId) -> Upload:
        """The clipped block as integers, with the device's own noise."""
        # One stream a device: in a deployment each draws under its own key.
        integers = self.draw(self.encoding.encode(block[None])[0], "noised", question.round, device)
        return Upload(device, question.round, integers.tobytes())

    def collect(self, question: Question, uploads: Sequence[Upload]) -> Release:
        """All noised blocks, decoded."""
        integers = np.stack([np.frombuffer(upload.payload, np.int64) for upload in uploads])
        return _shown(question, self.encoding.decode(integers), self.draw_std, uploads)


def noise_variance(bound: int, rho: float) -> Fraction:
    """``sigma^2`` of the discrete Gaussian that makes sensitivity ``bound`` exactly ``rho``-zCDP.

    Raises:
        ConfigError: ``rho`` is so small that the noise could not be drawn.
    """
    sigma2 = Fraction(bound * bound) / (2 * Fraction(rho))
    if sigma2 > MAX_SIGMA2:
        raise ConfigError(
            f"rho={rho:g}: too small, the noise would drown every answer; raise the device budget"
        )
    return sigma2


def contributions(answers: Tensor, devices: Sequence[PartyId], round: int) -> NDArray[np.float64]:
    """``answers`` ``[device, query, class]`` as finite blocks ``[device, entry]`` in float64.

    A block with a value that is not finite becomes zeros; see ``Channel.carry``.

    Raises:
        ChannelError: wrong shape, no answers, or devices that do not match.
    """
    if answers.ndim != 3:
        raise ChannelError(f"answers of shape {tuple(answers.shape)}: expected [device, query, class]")
    if answers.numel() == 0:
        raise ChannelError(f"answers of shape {tuple(answers.shape)}: there is nothing to release")
    if not answers.is_floating_point():
        raise ChannelError(f"answers of type {answers.dtype}: expected floating point")
    if len(devices) != len(answers):
        raise ChannelError(f"{len(devices)} devices named for {len(answers)} blocks of answers")
    if len(set(devices)) != len(devices):
        raise ChannelError("a device is named twice: each contributes one block a round")
    if round < 0:
        raise ChannelError(f"round={round}: expected 0 or more")
    return finite_or_zero(answers.detach().to("cpu", torch.float64).reshape(len(answers), -1).numpy())


def _shown(
    question: Question, blocks: NDArray[np.floating[Any]], noise_std: float, uploads: Sequence[Upload]
) -> Release:
    """Blocks ``[device, entry]`` as the cloud sees them."""
    answers = blocks.astype(np.float32).reshape(len(uploads), *question.prior.shape)
    return Release.to(question, torch.from_numpy(answers), noise_std, [each.device for each in uploads])
