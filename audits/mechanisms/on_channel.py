"""Worst-case devices through the very channel that a run opened: its processes, or its services.

A device's block is far too long and lies along one entry, or is zero, by a fair coin. The adversary sees
every release, knows all other coins, and has been told the noise of all aggregators but one. Neighbouring
relation: zero out one device's whole contribution, the number of devices public.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

from audits.mechanisms.canaries import LOUD, Scores, log_ratio
from audits.mechanisms.on_device import mean_square
from privkd.channels.channel import Channel
from privkd.privacy.bounds import Check
from privkd.privacy.randomness import seeded_generator
from privkd.secure.shares import fitting_encoding

Floats: TypeAlias = NDArray[np.float64]

FALSE_ALARM = 1e-6
"""Of all checks of one audit together: a sound channel fails one with at most this probability."""
_TOGETHER = 100
"""Canary devices in one release, each with an entry of its own."""
_FEWEST = 400
_ORDINARY = (5, 400, 5)
"""Devices, queries and classes of the exact sum."""


@dataclass(frozen=True)
class ReleaseAudit:
    """What came out: scores of the canary devices, and checks of the sum and of its noise."""

    scores: Scores
    checks: tuple[Check, ...]


def audit_releases(channel: Channel, rounds: int, seed: int, *, most: int) -> ReleaseAudit:
    """Play the game on ``most`` canary devices, or a few hundred where they are fewer.

    Args:
        channel: as opened by the run, with noise.
        rounds: that the run took; a device plays all of them with one coin.
        seed: of the coins.
    """
    assert channel.rho is not None
    generator, together = seeded_generator(seed, "audit", "device coins"), max(2, rounds)
    played = [
        _play(channel, torch.rand(_TOGETHER, generator=generator) < 0.5, group, together)
        for group in range(-(-max(_FEWEST, most) // _TOGETHER))
    ]
    inside = np.concatenate([group.inside for group in played])
    spread = math.sqrt(channel.unknown_noise / (2 * channel.rho))
    values = np.concatenate([group.left for group in played], axis=1)[:rounds]
    scores = Scores(log_ratio(values, spread, 1.0).sum(axis=0), inside)
    noise = np.concatenate([group.noise for group in played], axis=1)
    shared = [group.shared for group in played if group.shared is not None]
    between = np.concatenate(shared, axis=1) if shared else None
    return ReleaseAudit(scores, (*_noise_checks(noise, between, FALSE_ALARM / 4), _repeated(channel)))


@dataclass(frozen=True)
class _Group:
    """One group of canary devices.

    Attributes:
        inside: whose block was not zero, bool ``[device]``.
        left: what each device's entry holds for the adversary, in clip norms, ``[round, device]``.
        noise: what it holds beside its device's clipped block, in standard deviations of the claim, likewise.
        shared: the sum of all devices' noise at that entry over the root of their number, which is a standard
            normal too where each draws its own, likewise; ``None`` where the cloud sees no single device.
    """

    inside: NDArray[np.bool_]
    left: Floats
    noise: Floats
    shared: Floats | None


@dataclass(frozen=True)
class _Seen:
    """One release of blocks ``[device, device]``, of which each device fills an entry of its own.

    Attributes:
        own: each device's own entry, in clip norms ``[device]``.
        told: the colluders' noise in it, likewise.
        total: the sum of all devices at each entry, likewise; ``None`` where that is all that is seen.
        spread: the standard deviation of all noise on an entry that the price claims, in clip norms.
    """

    own: Floats
    told: Floats
    total: Floats | None
    spread: float


def _play(channel: Channel, coins: Tensor, group: int, rounds: int) -> _Group:
    names = [f"audit-{group:04d}-{number:04d}" for number in range(len(coins))]
    blocks = torch.diag(coins * (LOUD * channel.clip_norm))
    seen = [_released(channel, blocks, names, group * rounds + round) for round in range(rounds)]
    inside, root = coins.numpy(), math.sqrt(len(coins))
    totals = [(each.total - inside) / (each.spread * root) for each in seen if each.total is not None]
    return _Group(
        inside,
        np.stack([each.own - each.told for each in seen]),
        np.stack([(each.own - inside) / each.spread for each in seen]),
        np.stack(totals) if totals else None,
    )


def _released(channel: Channel, blocks: Tensor, names: Sequence[str], round: int) -> _Seen:
    """One release of ``blocks`` ``[device, device]``."""
    release = channel.release(blocks[:, :, None], devices=names, round=round)
    answers, scale = release.answers.double().numpy(), channel.clip_norm
    spread = math.sqrt(1 / (2 * (channel.rho or 0)))
    if answers.ndim == 3:
        entries = answers[:, :, 0] / scale
        return _Seen(np.diagonal(entries), np.zeros(len(names)), entries.sum(axis=0), spread)
    count = len(release.devices)
    told = np.broadcast_to(channel.colluders_noise() * count / scale, (len(names),))
    return _Seen(answers[:, 0] * count / scale, told, None, spread * math.sqrt(channel.aggregators))


def _noise_checks(noise: Floats, shared: Floats | None, false_alarm: float) -> list[Check]:
    """The noise's size ``[round, device]``, and whether rounds or devices share some of it.

    ``shared``: see `_Group`; ``false_alarm``: of each check.
    """
    checks = []
    ratio, low, high = mean_square(noise, false_alarm)
    checks.append(
        Check(
            "the channel's noise has the claimed variance",
            low <= ratio <= high,
            f"{ratio:.4f} of it over {noise.size:,} draws; {low:.3f} to {high:.3f} is within chance",
        )
    )
    ratio, _, high = mean_square(noise.mean(axis=0) * math.sqrt(len(noise)), false_alarm)
    checks.append(
        Check(
            "the channel's noise is fresh in every round",
            ratio <= high,
            f"the mean's variance is {ratio:.4f} of fresh noise's; up to {high:.3f} is within chance",
        )
    )
    checks.append(_between_devices(noise, shared, false_alarm / 2))
    return checks


def _between_devices(noise: Floats, shared: Floats | None, false_alarm: float) -> Check:
    """Whether all entries share some noise, or all devices do at an entry; ``false_alarm``: of each."""
    most = float(-ndtri(false_alarm / (2 * len(noise))))
    largest = float(np.abs(noise.mean(axis=1) * math.sqrt(noise.shape[1])).max())
    seen = f"their mean is {largest:.2f} standard deviations off; up to {most:.2f} is within chance"
    passed = largest <= most
    if shared is not None:
        ratio, _, high = mean_square(shared, false_alarm)
        seen += f"; their sum's variance is {ratio:.4f} of fresh noise's; up to {high:.3f} is within chance"
        passed &= ratio <= high
    return Check("the channel's noise is fresh for every device", passed, seen)


def _repeated(channel: Channel) -> Check:
    """Whether a round that is asked again for other blocks meets other noise."""
    names = [f"audit-again-{number:04d}" for number in range(_TOGETHER)]
    loud = torch.eye(_TOGETHER) * (LOUD * channel.clip_norm)
    first = _released(channel, loud, names, 1 << 20)
    name = "the channel's noise is fresh in every attempt"
    try:
        again = _released(channel, 0 * loud, names, 1 << 20)
    except Exception as error:  # parties that keep what they released refuse, which is as good
        return Check(name, True, f"a second set is refused: {str(error)[:80]}")
    if np.array_equal(first.own, again.own):
        return Check(name, True, "the first set's release is repeated, and nothing is told of a second")
    apart = (first.own - 1 - again.own) / (math.sqrt(2) * first.spread)
    ratio, low, _ = mean_square(apart, FALSE_ALARM / 4)
    seen = f"two attempts differ by {ratio:.3f} of fresh noise; from {low:.3f} on is within chance"
    return Check(name, ratio >= low, seen)


def check_sum(channel: Channel, seed: int) -> Check:
    """Whether a secure channel without noise releases exactly the mean of the clipped integer blocks.

    Among ordinary answers one device's block is far too long.

    Args:
        channel: as opened by a run, with no noise.
        seed: of the answers.
    """
    assert channel.rho is None
    devices, *block = _ORDINARY
    blocks = torch.randn(_ORDINARY, generator=seeded_generator(seed, "audit", "answers"))
    blocks *= 0.5 * channel.clip_norm / math.prod(block) ** 0.5
    blocks[0] *= LOUD
    names = [f"audit-sum-{number}" for number in range(devices)]
    released = channel.release(blocks, devices=names, round=0).answers.double().numpy().reshape(-1)
    encoding = fitting_encoding(channel.clip_norm, devices=devices, parties=channel.aggregators, rho=None)
    integers = encoding.encode(blocks.double().numpy().reshape(devices, -1)).sum(axis=0)
    mean = encoding.decode(integers) / devices
    # All that may lie between them is the release's rounding to float32.
    wrong = int((np.abs(released - mean) > np.spacing(np.abs(mean.astype(np.float32)))).sum())
    return Check(
        "released sum equals the clipped integer sum", wrong == 0, f"{wrong} of {mean.size:,} entries differ"
    )
