"""The secure channel as it runs: real aggregators, worst-case devices, and checks of what comes out.

Two things are checked beside the epsilon bound, each against what the release's price demands and not against
what the code says of itself: without noise the release is the clipped integer sum, and with it what is left
beside that sum is noise of the right size, drawn afresh in every round.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import chi2
from torch import Tensor

from audits.estimators import FixedThreshold, epsilon_lower_bound, gaussian
from audits.gradient import LOUD, Scores, log_ratio
from privkd.bounds import Check
from privkd.channel import Channel
from privkd.noise import NoiseRoot
from privkd.randomness import derive_seed, seeded_generator
from privkd.secure.channel import SecureChannel
from privkd.secure.shares import fitting_encoding

Floats = NDArray[np.float64]

CLIP_NORM, AGGREGATORS = 2.0, 2
RHO = 0.5
"""Of one release: mu = 1 for a Gaussian of the same sensitivity."""
FALSE_ALARM = 1e-3
"""Of all checks of one report together: a sound channel fails one with this probability."""
_DEVICES, _ROUNDS = 200, 20
_BLOCK = (5, 400, 5)
"""Devices, queries and classes of the checks: 2,000 entries a round."""
_NOISY_ROUNDS = 4

OpenChannel = Callable[[float | None, NoiseRoot], Channel]
"""A channel of clip norm ``CLIP_NORM`` at this price of a release, over ``AGGREGATORS`` parties."""


def secure_channel(rho: float | None, root: NoiseRoot) -> Channel:
    """The installed secure channel; its processes start at once."""
    channel = SecureChannel(CLIP_NORM, rho, root, aggregators=AGGREGATORS)
    channel.start()
    return channel


class RunningChannel:
    """Both channels of one audit, with noise and without. Their processes start as it is opened."""

    def __init__(self, opened: OpenChannel, seed: int) -> None:
        self._seed = derive_seed(seed, "audit", "processes")
        self._noisy = opened(RHO, NoiseRoot.from_seed(self._seed))
        self._exact = opened(None, NoiseRoot.from_seed(self._seed))

    def close(self) -> None:
        """End the processes."""
        self._noisy.close()
        self._exact.close()

    def checks(self) -> tuple[Check, ...]:
        """The exact sum, the noise's size and its freshness; see `FALSE_ALARM`."""
        blocks = self._blocks()
        noise = np.stack([self._residual(self._noisy, RHO, blocks, round) for round in range(_NOISY_ROUNDS)])
        left = self._residual(self._exact, None, blocks, 0)
        return _exact_sum(left), _noise_size(noise, FALSE_ALARM / 2), _fresh_noise(noise, FALSE_ALARM / 2)

    def canaries(self) -> Scores:
        """Devices whose blocks are far too long and orthogonal, or zero, by a fair coin each and round."""
        generator = seeded_generator(self._seed, "coins")
        inside = torch.rand((_ROUNDS, _DEVICES), generator=generator) < 0.5
        names = [f"device-{number:03d}" for number in range(_DEVICES)]
        loud = torch.eye(_DEVICES) * (LOUD * CLIP_NORM)
        seen = [
            self._noisy.release(
                (loud * coins[:, None])[:, :, None], devices=names, round=_NOISY_ROUNDS + round
            ).answers.flatten()
            for round, coins in enumerate(inside)
        ]
        values = torch.stack(seen).double().numpy() * _DEVICES / CLIP_NORM
        spread = math.sqrt(AGGREGATORS / (2 * RHO))
        return Scores(log_ratio(values, spread, 1.0).reshape(-1), inside.numpy().reshape(-1))

    def _blocks(self) -> Tensor:
        """Ordinary answers, and one device whose block is far too long."""
        blocks = torch.randn(_BLOCK, generator=seeded_generator(self._seed, "answers"))
        blocks *= 0.5 * CLIP_NORM / (_BLOCK[1] * _BLOCK[2]) ** 0.5
        blocks[0] *= LOUD
        return blocks

    def _residual(self, channel: Channel, rho: float | None, blocks: Tensor, round: int) -> Floats:
        """What a release is beside the mean of the clipped blocks, in standard deviations of its noise, or in
        float32's last places where there is none."""
        names = [f"device-{number}" for number in range(len(blocks))]
        released = channel.release(blocks, devices=names, round=round).answers.double().numpy().reshape(-1)
        encoding = fitting_encoding(CLIP_NORM, devices=len(blocks), parties=AGGREGATORS, rho=rho)
        integers = encoding.encode(blocks.double().numpy().reshape(len(blocks), -1)).sum(axis=0)
        clipped = encoding.decode(integers) / len(blocks)
        if rho is None:
            return (released - clipped) / np.spacing(np.abs(clipped.astype(np.float32)))
        spread = math.ldexp(encoding.bound * math.sqrt(AGGREGATORS / (2 * rho)), -encoding.fraction_bits)
        return (released - clipped) * len(blocks) / spread


def bound_canaries(scores: Scores, *, delta: float, confidence: float) -> float:
    """Device-level epsilon lower bound; each device of each round is a trial of a Gaussian mechanism."""
    return epsilon_lower_bound(
        scores.members,
        scores.nonmembers,
        rule=FixedThreshold(0.0),
        estimator=gaussian,
        delta=delta,
        confidence=confidence,
    )


def _exact_sum(left: Floats) -> Check:
    wrong = int((np.abs(left) > 1).sum())
    return Check(
        "released sum equals the clipped integer sum", wrong == 0, f"{wrong} of {left.size:,} entries differ"
    )


def _noise_size(noise: Floats, false_alarm: float) -> Check:
    """Two-sided chi-squared test of the noise's variance ``[round, entry]`` against the price's."""
    ratio = float((noise**2).mean())
    low, high = (
        float(chi2.ppf(tail, noise.size)) / noise.size for tail in (false_alarm / 2, 1 - false_alarm / 2)
    )
    return Check(
        "noise variance is what the price demands",
        low <= ratio <= high,
        f"{ratio:.4f} of it over {noise.size:,} draws; {low:.3f} to {high:.3f} is within chance",
    )


def _fresh_noise(noise: Floats, false_alarm: float) -> Check:
    """The largest correlation between two rounds' noise ``[round, entry]``, over all pairs."""
    rounds, entries = noise.shape
    pairs = np.triu_indices(rounds, 1)
    # Without any noise there is no correlation, and nothing fresh either.
    correlations = np.nan_to_num(np.atleast_2d(np.corrcoef(noise)), nan=1.0)
    largest = float(np.abs(correlations[pairs]).max())
    most = float(-ndtri(false_alarm / (2 * len(pairs[0])))) / math.sqrt(entries)
    return Check(
        "noise is fresh in every round",
        largest <= most,
        f"correlation of {largest:.3f} at most between two rounds; up to {most:.3f} is within chance",
    )
