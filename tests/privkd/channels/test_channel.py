"""One contract for all channels: what the cloud receives, what it costs, and what is refused.

The noise comes from a fixed root, so nothing here can flake; each statistical bound states the rate at
which it would alarm over random roots.
"""

import math
from collections.abc import Iterator

import numpy as np
import own_channel
import pytest
import torch
from scipy import stats
from torch import Tensor

from privkd.channels.channel import Channel, NoisedChannel, PlainChannel
from privkd.channels.registry import KINDS, open_channel
from privkd.errors import ChannelError, ConfigError
from privkd.privacy.events import NoPrivacy, ZCdp
from privkd.privacy.noise import NoiseRoot
from privkd.secure.fixedpoint import content_digest

CLIP = 4.0
RHO = 0.8
ROOT = NoiseRoot.from_seed(3)
DEVICES = tuple(f"device-{i:04d}" for i in range(5))
CHANNELS: list[tuple[str, float | None]] = [
    (own_channel.NAME, None),
    (own_channel.NAME, RHO),
    ("plain", None),
    ("noised", None),
    ("noised", RHO),
    ("secure", None),
    ("secure", RHO),
]


@pytest.fixture(scope="module", params=CHANNELS, ids=[f"{kind}-{rho}" for kind, rho in CHANNELS])
def channel(request: pytest.FixtureRequest) -> Iterator[Channel]:
    kind, rho = request.param
    with own_channel.own_channel(), open_channel(kind, clip_norm=CLIP, rho=rho, root=ROOT) as opened:
        yield opened


@pytest.fixture
def answers() -> Tensor:
    """Five blocks of 300 x 4: two shorter than the clip norm, one equal to it, two longer."""
    blocks = torch.randn(5, 300, 4, generator=torch.Generator().manual_seed(0))
    norms = torch.tensor([0.5, 2.0, CLIP, 40.0, 4000.0])
    return blocks * (norms / blocks.flatten(1).norm(dim=1)).view(5, 1, 1)


def clipped(answers: Tensor) -> Tensor:
    """The twin: each block scaled to the clip norm, one at a time."""
    return torch.stack([block * min(1.0, CLIP / float(block.norm())) for block in answers.double()])


def test_shape_type_and_devices(channel: Channel, answers: Tensor) -> None:
    release = channel.release(answers, devices=DEVICES, round=0)
    each = KINDS[channel.kind].shows_each
    assert release.answers.shape == (answers.shape if each else answers.shape[1:])
    assert release.answers.dtype == torch.float32
    assert release.devices == DEVICES


def test_price_is_rho_or_no_guarantee(channel: Channel) -> None:
    rho = getattr(channel, "rho", None)
    if rho is None:
        assert isinstance(channel.event, NoPrivacy)
        assert channel.event.reason
    else:
        assert channel.event == ZCdp(RHO)


def test_release_is_the_clipped_answers_plus_noise_of_the_stated_size(
    channel: Channel, answers: Tensor
) -> None:
    """Over 1,200 entries or more: chi-square of the residual (1e-6), which sigma's 2/3 and 3/2 fail."""
    release = channel.release(answers, devices=DEVICES, round=1)
    exact = clipped(answers) if release.answers.ndim == 3 else clipped(answers).mean(0)
    residual = (release.answers.double() - exact).numpy().ravel()
    if release.noise_std == 0:
        # Truncation moves each device's entry by less than one step of the encoding.
        assert np.abs(residual).max() < CLIP * 2.0**-18
        return
    for factor, right in ((1.0, True), (2 / 3, False), (3 / 2, False)):
        tail = stats.chi2.cdf((residual**2).sum() / (factor * release.noise_std) ** 2, len(residual))
        assert (min(tail, 1 - tail) > 5e-7) == right
    assert abs(residual.mean()) < 5 * release.noise_std / math.sqrt(len(residual))
    if release.answers.ndim == 3:
        mean_residual = residual.reshape(len(DEVICES), -1).mean(0)
        tail = stats.chi2.cdf(
            (mean_residual**2).sum() * len(DEVICES) / release.noise_std**2, len(mean_residual)
        )
        assert 5e-7 < tail < 1 - 5e-7


def test_noise_is_that_of_sensitivity_clip_norm(channel: Channel, answers: Tensor) -> None:
    release = channel.release(answers, devices=DEVICES, round=1)
    if isinstance(channel.event, NoPrivacy):
        assert release.noise_std == 0
        return
    sigma = CLIP / math.sqrt(2 * RHO)
    devices = 1 if KINDS[channel.kind].shows_each else 5
    # The integer clip norm is rounded down, by less than 2^-19 of it.
    assert release.noise_std == pytest.approx(sigma * math.sqrt(channel.aggregators) / devices, rel=2.0**-19)


def test_the_same_release_repeats_bit_for_bit(channel: Channel, answers: Tensor) -> None:
    first = channel.release(answers, devices=DEVICES, round=2)
    again = channel.release(answers.clone(), devices=list(DEVICES), round=2)
    assert torch.equal(first.answers, again.answers)
    assert first.noise_std == again.noise_std


def test_other_rounds_and_other_answers_meet_other_noise(channel: Channel, answers: Tensor) -> None:
    """Else the difference of two releases would reveal the answers' exact change."""
    if isinstance(channel.event, NoPrivacy):
        return
    base = channel.release(answers, devices=DEVICES, round=3)
    changed = answers.clone()
    changed[0, 0, 0] += 0.25
    for other in (
        channel.release(answers, devices=DEVICES, round=4),
        channel.release(changed, devices=DEVICES, round=3),
    ):
        difference = (other.answers - base.answers).double()
        block = difference[0] if difference.ndim == 3 else difference
        # Independent noise doubles the variance: 1,200 entries, 6 standard errors (2e-9).
        assert block.std().item() == pytest.approx(math.sqrt(2) * base.noise_std, rel=6 / math.sqrt(2400))


def test_one_device_alone(channel: Channel, answers: Tensor) -> None:
    release = channel.release(answers[:1], devices=DEVICES[:1], round=0)
    assert release.answers.shape[-2:] == answers.shape[1:]
    assert release.devices == DEVICES[:1]


def test_input_is_left_alone_and_may_require_grad(channel: Channel, answers: Tensor) -> None:
    before = answers.clone()
    release = channel.release(answers.requires_grad_(), devices=DEVICES, round=0)
    assert torch.equal(answers, before)
    assert not release.answers.requires_grad
    doubles = answers.detach().double()
    channel.release(doubles, devices=DEVICES, round=0)
    assert torch.equal(doubles, before.double())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_answers_that_are_not_finite_are_released_as_zeros(
    channel: Channel, answers: Tensor, value: float
) -> None:
    """To the bit what the zeroed-out neighbour's release is: which of the two it was shows nowhere."""
    zeroed, broken = answers.clone(), answers.double()
    zeroed[3] = 0
    broken[3, 7, 1] = value
    before = broken.clone()
    found = channel.release(broken, devices=DEVICES, round=0)
    expected = channel.release(zeroed, devices=DEVICES, round=0)
    assert torch.equal(found.answers, expected.answers)
    assert (found.devices, found.noise_std) == (DEVICES, expected.noise_std)
    assert torch.equal(broken.nan_to_num(7.0), before.nan_to_num(7.0)), "the caller's answers are left alone"


def test_misfits_are_refused(channel: Channel, answers: Tensor) -> None:
    for wrong in (answers[0], answers[None], answers[:0], answers[:, :0], answers[:4], answers.long()):
        devices = DEVICES[: len(wrong)] if len(wrong) == 0 else DEVICES
        with pytest.raises(ChannelError):
            channel.release(wrong, devices=devices, round=0)
    with pytest.raises(ChannelError, match="twice"):
        channel.release(answers, devices=("a", "b", "c", "d", "a"), round=0)
    with pytest.raises(ChannelError, match="round"):
        channel.release(answers, devices=DEVICES, round=-1)


def test_huge_finite_answers_are_clipped_not_overflowed(channel: Channel, answers: Tensor) -> None:
    huge = answers.double()
    huge[4] = 1e300
    release = channel.release(huge, devices=DEVICES, round=0)
    block = release.answers[4] if release.answers.ndim == 3 else release.answers * len(DEVICES)
    assert torch.isfinite(release.answers).all()
    noise = release.noise_std * (1 if release.answers.ndim == 3 else len(DEVICES))
    # 1,200 equal entries of a block of norm CLIP, beside the four others of norm CLIP at most.
    assert block.abs().max() < 5 * CLIP + 7 * noise


def test_a_closed_channel_stays_closed_quietly(answers: Tensor) -> None:
    for kind in ("plain", "noised"):
        closing = open_channel(kind, clip_norm=CLIP, root=ROOT)
        closing.start()
        closing.close()
        closing.close()


def test_plain_blocks_are_clipped_in_l2(answers: Tensor) -> None:
    release = PlainChannel(CLIP).release(answers, devices=DEVICES, round=0)
    norms = release.answers.double().flatten(1).norm(dim=1)
    np.testing.assert_allclose(norms, [0.5, 2.0, CLIP, CLIP, CLIP], rtol=1e-6)


def test_each_device_draws_its_own_noise(answers: Tensor) -> None:
    same = answers[:1].expand(5, -1, -1)
    release = NoisedChannel(CLIP, RHO, ROOT).release(same, devices=DEVICES, round=0)
    noise = (release.answers - release.answers[:1])[1:].flatten(1)
    # Differences of independent noise: variance doubled, 6 standard errors (2e-9).
    np.testing.assert_allclose(noise.std(dim=1), math.sqrt(2) * release.noise_std, rtol=6 / math.sqrt(2400))


def test_a_device_s_noise_ignores_its_company(answers: Tensor) -> None:
    channel = NoisedChannel(CLIP, RHO, ROOT)
    together = channel.release(answers, devices=DEVICES, round=0)
    alone = channel.release(answers[2:3], devices=DEVICES[2:3], round=0)
    assert torch.equal(together.answers[2], alone.answers[0])


def test_content_digest_tells_blocks_apart() -> None:
    block = np.arange(4)
    assert content_digest(block) == content_digest(block.copy())
    assert content_digest(block) != content_digest(block[::-1])


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("kind", ["plain", "noised", "secure"])
def test_bad_clip_norms_are_refused(kind: str, clip_norm: float) -> None:
    with pytest.raises(ConfigError, match="clip_norm"):
        open_channel(kind, clip_norm=clip_norm, root=ROOT)


@pytest.mark.parametrize("rho", [0.0, -1.0, math.nan, math.inf, 1e-30])
@pytest.mark.parametrize("kind", ["noised", "secure"])
def test_bad_rhos_are_refused(kind: str, rho: float) -> None:
    with pytest.raises(ConfigError, match="rho"):
        open_channel(kind, clip_norm=1.0, rho=rho, root=ROOT)


def test_other_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="plain channel adds no noise"):
        open_channel("plain", clip_norm=1.0, rho=1.0, root=ROOT)
    with pytest.raises(ConfigError, match="nosied"):
        open_channel("nosied", clip_norm=1.0, root=ROOT)
    for aggregators in (0, 1, 17):
        with pytest.raises(ConfigError, match="aggregators"):
            open_channel("secure", clip_norm=1.0, root=ROOT, aggregators=aggregators)
    for deadline in (0.0, math.nan):
        with pytest.raises(ConfigError, match="deadline"):
            open_channel("secure", clip_norm=1.0, root=ROOT, deadline=deadline)
