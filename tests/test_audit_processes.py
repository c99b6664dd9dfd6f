"""The checks of the running secure channel: a sound one passes, a broken one fails, and the command says so.

A sound channel fails a check in 0.1 % of seeds; the seeds are fixed.
"""

import json
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import audits.mechanism
from audits.mechanism import Level, audit_mechanisms, audit_running
from audits.processes import AGGREGATORS, CLIP_NORM, RHO, OpenChannel, RunningChannel, secure_channel
from audits.release import ring_mean
from audits.verdict import raise_failed
from cli import app
from privkd.channel import ChannelBase, Release
from privkd.errors import AuditAlarm
from privkd.events import PartyId, PrivacyEvent, ZCdp
from privkd.noise import NoiseRoot
from privkd.progress import Silent

LEVEL = Level(confidence=0.999)


class RingChannel(ChannelBase):
    """The secure channel's arithmetic in this process; ``flaw`` is what a release goes through instead."""

    def __init__(self, rho: float | None, root: NoiseRoot, flaw: "Flaw | None" = None) -> None:
        super().__init__(CLIP_NORM, rho)
        self._root, self._flaw = root, flaw or sound

    @property
    def event(self) -> PrivacyEvent:
        return ZCdp(RHO)

    def release(self, answers: Tensor, *, devices: Sequence[PartyId], round: int) -> Release:
        mean = self._flaw(answers, self.rho, self._root, round)
        return Release(mean.float(), tuple(devices), 0.0, self.event)


Flaw = Callable[[Tensor, float | None, NoiseRoot, int], Tensor]


def sound(answers: Tensor, rho: float | None, root: NoiseRoot, round: int) -> Tensor:
    fresh = NoiseRoot(root.subkey("round", round, float(answers.sum()).hex()))
    return torch.from_numpy(ring_mean(answers, CLIP_NORM, rho, AGGREGATORS, fresh)[0])


def scaled(factor: float) -> Flaw:
    """Noise of ``factor`` times the right standard deviation."""

    def flaw(answers: Tensor, rho: float | None, root: NoiseRoot, round: int) -> Tensor:
        return sound(answers, None if rho is None else rho / factor**2, root, round)

    return flaw


def without_noise(answers: Tensor, rho: float | None, root: NoiseRoot, round: int) -> Tensor:
    return sound(answers, None, root, round)


def seed_reused(answers: Tensor, rho: float | None, root: NoiseRoot, round: int) -> Tensor:
    return sound(answers, rho, root, 0)


def unclipped(answers: Tensor, rho: float | None, root: NoiseRoot, round: int) -> Tensor:
    return sound(torch.zeros_like(answers), rho, root, round) + answers.mean(0)


def one_short(answers: Tensor, rho: float | None, root: NoiseRoot, round: int) -> Tensor:
    """An entry that is off by one unit of the encoding."""
    mean = sound(answers, rho, root, round)
    mean[0, 0] += 2.0**-18 / len(answers)
    return mean


def channel_with(flaw: Flaw) -> OpenChannel:
    return lambda rho, root: RingChannel(rho, root, flaw)


BROKEN = {
    "two thirds of the noise": (scaled(2 / 3), "noise variance is what the price demands"),
    "half as much noise again": (scaled(1.5), "noise variance is what the price demands"),
    "no noise": (without_noise, "noise variance is what the price demands"),
    "noise seed reused": (seed_reused, "noise is fresh in every round"),
    "no clipping": (unclipped, "released sum equals the clipped integer sum"),
    "off by one": (one_short, "released sum equals the clipped integer sum"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_channel_fails_its_check(name: str) -> None:
    flaw, failed = BROKEN[name]
    checks = RunningChannel(channel_with(flaw), seed=0).checks()
    assert failed in [check.name for check in checks if not check.passed]
    with pytest.raises(AuditAlarm, match="the secure channel fails the check"):
        raise_failed(checks)


@pytest.mark.parametrize("flaw", [scaled(1 / 3), without_noise, unclipped])
def test_too_little_noise_shows_in_the_bound(flaw: Flaw) -> None:
    assert audit_running(RunningChannel(channel_with(flaw), seed=0), LEVEL).verdict == "ALARM"


def test_a_sound_channel_passes() -> None:
    running = RunningChannel(channel_with(sound), seed=0)
    assert all(check.passed for check in running.checks())
    finding = audit_running(running, LEVEL)
    assert finding.verdict == "within bound"
    # All aggregators' noise is there, so the cloud alone learns less than the price of one's allows.
    assert finding.epsilon_lower > 0.3 * finding.epsilon_upper


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves of the mechanism audit what runs through the secure channel's processes."""
    sound_finding = audit_running(RunningChannel(channel_with(sound), seed=0), LEVEL)
    for name in ("audit_dirac", "audit_dp_sgd", "audit_channel"):
        monkeypatch.setattr(audits.mechanism, name, lambda *_, **__: sound_finding)


@pytest.mark.usefixtures("quick")
def test_a_failed_check_ends_in_exit_code_3(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = channel_with(seed_reused)
    monkeypatch.setattr(
        audits.mechanism, "audit_mechanisms", lambda seed, progress: audit_mechanisms(seed, progress, broken)
    )
    result = CliRunner().invoke(app, ["audit", "mechanism", "--json"])
    assert result.exit_code == AuditAlarm.exit_code
    tree = json.loads(result.stdout)
    assert [check["passed"] for check in tree["checks"]] == [True, True, False]
    assert "noise is fresh in every round" in result.stderr
    table = CliRunner().invoke(app, ["audit", "mechanism"])
    assert "FAILS: noise is fresh" in table.stdout
    assert "holds: released sum" in table.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_the_installed_channel_passes_through_its_processes() -> None:
    report = audit_mechanisms(0, Silent(), secure_channel)
    assert all(check.passed for check in report.checks), report.checks
    assert report.findings[-1].verdict == "within bound"
    assert report.findings[-1].epsilon_lower > 0.3 * report.findings[-1].epsilon_upper
