"""What each view of the channel shows of replayed devices, by the channel's own code."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privkd.channel import ChannelKind, NoisedChannel, PlainChannel, Release, noise_variance
from privkd.noise import NoiseRoot, discrete_gaussian
from privkd.plan import Plan
from privkd.secure.backend import LocalGroup, RingBackend
from privkd.secure.fixedpoint import FixedPoint, clip_rows
from privkd.secure.shares import fitting_encoding, reconstruct, split

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Released:
    """One view of the channel.

    Attributes:
        view: its name.
        answers: what the adversary sees, float64 ``[model, round, query, class]``.
        noise_std: public standard deviation of the noise on each entry.
        clean: the same before the noise, as shadow statistics want it.
        resolution: how near to a device's real answers the encoding comes, noise apart.
    """

    view: str
    answers: Floats
    noise_std: float
    clean: Floats
    resolution: float


def per_client(blocks: Tensor, plan: Plan, root: NoiseRoot, kind: ChannelKind = "noised") -> Released:
    """Each device's own release, through the ``plain`` or the ``noised`` channel.

    ``blocks`` are bounded answers ``[model, round, query, class]``, of one device each.
    """
    names = [f"replay-{number:04d}" for number in range(len(blocks))]
    rounds = range(blocks.shape[1])
    plain = PlainChannel(plan.clip_norm)
    own = plain if kind == "plain" else NoisedChannel(plan.clip_norm, plan.rho, root)
    clean = [plain.release(blocks[:, r], devices=names, round=r) for r in rounds]
    seen = [own.release(blocks[:, r], devices=names, round=r) for r in rounds]
    resolution = (
        float(np.finfo(np.float32).tiny)
        if kind == "plain"
        else math.ldexp(1.0, -FixedPoint.for_clip_norm(plan.clip_norm).fraction_bits)
    )
    return Released("per_client_logits", _stacked(seen), seen[0].noise_std, _stacked(clean), resolution)


@dataclass(frozen=True)
class Crowd:
    """The devices beside the audited one, and how the secure channel adds all of them up.

    Attributes:
        plan: clip norm and noise.
        aggregators: how many add their noise.
        others: what the others send beside each model, ``[model, other, round, query, class]``.
    """

    plan: Plan
    aggregators: int
    others: Tensor

    def secure_sum(self, blocks: Tensor, root: NoiseRoot) -> Released:
        """The mean over all devices, as the cloud sees it; ``blocks`` as for `per_client`."""
        together = torch.cat([blocks[:, None], self.others], dim=1)
        clip_norm, rho = self.plan.clip_norm, self.plan.rho
        seen, noise_std = [], 0.0
        for model, devices in enumerate(together):
            for round in range(devices.shape[1]):
                key = NoiseRoot(root.subkey("audit", model, round))
                mean, noise_std = ring_mean(devices[:, round], clip_norm, rho, self.aggregators, key)
                seen.append(mean)
        answers = np.stack(seen).reshape(blocks.shape)
        clean = np.stack([_clipped(devices, clip_norm).mean(0) for devices in together])
        # Each device truncates, so its errors add up in the sum as its answers do.
        encoding = fitting_encoding(clip_norm, devices=together.shape[1], parties=self.aggregators, rho=rho)
        return Released("secure_sum", answers, noise_std, clean, math.ldexp(1.0, -encoding.fraction_bits))

    def colluding(self, blocks: Tensor, seen: Released) -> Released:
        """What is left of the sum for colluders who take their own contributions off it."""
        n = 1 + self.others.shape[1]
        known = np.stack([_clipped(others, self.plan.clip_norm).sum(0) for others in self.others])
        clean = _clipped(blocks, self.plan.clip_norm)
        left = seen.answers * n - known
        return Released("secure_sum_colluding", left, seen.noise_std * n, clean, seen.resolution * n)


def ring_mean(
    blocks: Tensor,
    clip_norm: float,
    rho: float | None,
    aggregators: int,
    root: NoiseRoot,
    *,
    colluding: int = 0,
) -> tuple[Floats, float]:
    """The secure channel's arithmetic without its processes: clip, encode, share, sum, noise, decode.

    Every step is the channel's own, with the numpy ring behind the aggregators.

    Args:
        blocks: ``[device, query, class]``.
        clip_norm: L2 bound on a device's block.
        rho: price of the release, ``None`` for no noise.
        aggregators: how many hold shares and add noise.
        root: of the noise, one for each release.
        colluding: aggregators who tell the adversary their noise, which is as good as none.

    Returns:
        The mean ``[query, class]``, and the standard deviation of its unknown noise.
    """
    count = len(blocks)
    encoding = fitting_encoding(clip_norm, devices=count, parties=aggregators, rho=rho)
    integers = encoding.encode(blocks.reshape(count, -1).to(torch.float64).numpy())
    shares = [split(block, aggregators) for block in integers]
    sigma2 = None if rho is None else noise_variance(encoding.bound, rho)
    group = LocalGroup(aggregators)
    sums = []
    for party in range(aggregators):
        held = [own[party].expand(integers.shape[1]) for own in shares]
        noise = (
            None
            if sigma2 is None or party < colluding
            else discrete_gaussian(sigma2, integers.shape[1], root.stream("aggregator", party))
        )
        sums.append(RingBackend(party, group).noisy_sum(held, noise))
    mean = encoding.decode(reconstruct(sums)) / count
    spread = 0.0 if sigma2 is None else math.sqrt(sigma2 * (aggregators - colluding))
    return mean.reshape(tuple(blocks.shape[1:])), math.ldexp(spread, -encoding.fraction_bits) / count


def _clipped(blocks: Tensor, clip_norm: float) -> Floats:
    """Each device's block of each round ``[device, round, query, class]``, clipped."""
    rows = blocks.reshape(blocks.shape[0] * blocks.shape[1], -1).to(torch.float64).numpy()
    return clip_rows(rows, clip_norm).reshape(tuple(blocks.shape))


def _stacked(releases: Sequence[Release]) -> Floats:
    return np.stack([release.answers.numpy().astype(np.float64) for release in releases], axis=1)
