"""The audit of the open secure channel: a sound one passes, a broken one fails, and the command says so.

False alarms: a sound channel fails a check with probability at most 1e-6, and a bound at confidence 99.9 %
exceeds the truth in 0.1 % of seeds: 0.5 % for all sound cases of this file together. The seeds are fixed.
"""

import json
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import audits.mechanism_audit
from audits.mechanism_audit import CHANNELS, Examined, Level, audit_devices
from audits.mechanisms.on_channel import audit_releases, check_sum
from cli import app
from privkd.channels.channel import Channel
from privkd.channels.registry import Canaries
from privkd.channels.secure import OpenSum
from privkd.errors import AuditAlarm
from privkd.messages import Question, Release
from privkd.prepared import Prepared
from privkd.privacy.bounds import Check, failure
from privkd.privacy.events import PartyId
from privkd.privacy.noise import NoiseRoot
from privkd.secure.shares import fitting_encoding

LEVEL = Level(confidence=0.999)
CLIP_NORM, AGGREGATORS, RHO = 2.0, 2, 0.5


class RingChannel(OpenSum):
    """The secure channel's arithmetic in this process; ``flaw`` is what a release goes through instead.

    No aggregator tells its noise.
    """

    def __init__(self, clip_norm: float, rho: float | None, root: NoiseRoot, flaw: "Flaw") -> None:
        super().__init__(clip_norm, rho, root, aggregators=AGGREGATORS)
        self._flaw = flaw

    @property
    def unknown_noise(self) -> float:
        return float(AGGREGATORS)

    def carry(self, question: Question, answers: Tensor, devices: Sequence[PartyId]) -> Release:
        return Release.to(question, self._flaw(self, answers, question.round).float(), 0.0, devices)

    def mean(self, answers: Tensor, rho: float | None, root: NoiseRoot, silent: int = 0) -> Tensor:
        """Noised under ``root``, by all aggregators but ``silent`` ones."""
        names = [str(number) for number in range(len(answers))]
        summed = OpenSum(self.clip_norm, rho, root, aggregators=AGGREGATORS, colluding=silent)
        return summed.release(answers, devices=names, round=0).answers.double()

    def fresh(self, answers: Tensor, round: int) -> NoiseRoot:
        return NoiseRoot(self.root.subkey("round", round, answers.numpy().tobytes()))


Flaw = Callable[[RingChannel, Tensor, int], Tensor]


def sound(channel: RingChannel, answers: Tensor, round: int) -> Tensor:
    return channel.mean(answers, channel.rho, channel.fresh(answers, round))


def scaled(factor: float) -> Flaw:
    """Noise of ``factor`` times the right standard deviation."""

    def flaw(channel: RingChannel, answers: Tensor, round: int) -> Tensor:
        rho = None if channel.rho is None else channel.rho / factor**2
        return channel.mean(answers, rho, channel.fresh(answers, round))

    return flaw


def without_noise(channel: RingChannel, answers: Tensor, round: int) -> Tensor:
    return channel.mean(answers, None, channel.root)


def one_aggregator_silent(channel: RingChannel, answers: Tensor, round: int) -> Tensor:
    return channel.mean(answers, channel.rho, channel.fresh(answers, round), silent=1)


def same_in_every_round(channel: RingChannel, answers: Tensor, round: int) -> Tensor:
    return channel.mean(answers, channel.rho, channel.fresh(answers, 0))


def same_for_all_answers(channel: RingChannel, answers: Tensor, round: int) -> Tensor:
    return channel.mean(answers, channel.rho, channel.fresh(torch.zeros(1), round))


def same_on_every_entry(channel: RingChannel, answers: Tensor, round: int) -> Tensor:
    noise = sound(channel, torch.zeros_like(answers), round).flatten()[0]
    return channel.mean(answers, None, channel.root) + noise


def unclipped(channel: RingChannel, answers: Tensor, round: int) -> Tensor:
    return sound(channel, torch.zeros_like(answers), round) + answers.mean(0)


def one_short(channel: RingChannel, answers: Tensor, round: int) -> Tensor:
    """An entry that is off by one unit of the encoding."""
    mean = sound(channel, answers, round)
    encoding = fitting_encoding(channel.clip_norm, devices=len(answers), parties=AGGREGATORS, rho=None)
    mean[0, 0] += 2.0**-encoding.fraction_bits / len(answers)
    return mean


SUM = "released sum equals the clipped integer sum"
SIZE = "the channel's noise has the claimed variance"
BROKEN = {
    "two thirds of the noise": (scaled(2 / 3), SIZE),
    "half of the noise": (scaled(1 / 2), SIZE),
    "half as much noise again": (scaled(1.5), SIZE),
    "no noise": (without_noise, SIZE),
    "noise missing at an aggregator": (one_aggregator_silent, SIZE),
    "the same noise in every round": (same_in_every_round, "the channel's noise is fresh in every round"),
    "the same noise for all answers": (same_for_all_answers, "the channel's noise is fresh in every attempt"),
    "the same noise on every entry": (same_on_every_entry, "the channel's noise is fresh for every device"),
    "no clipping": (unclipped, SUM),
    "off by one": (one_short, SUM),
}


def checks_of(flaw: Flaw) -> tuple[Check, ...]:
    noised, exact = (RingChannel(CLIP_NORM, rho, NoiseRoot.from_seed(0), flaw) for rho in (RHO, None))
    return (*audit_releases(noised, 4, seed=0, most=400).checks, check_sum(exact, seed=0))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_channel_fails_its_check(name: str) -> None:
    flaw, failed = BROKEN[name]
    checks = checks_of(flaw)
    assert failed in [check.name for check in checks if not check.passed]
    assert "do not release, the mechanism is broken" in str(failure(checks))


def test_a_sound_channel_passes() -> None:
    assert failure(checks_of(sound)) is None


class Repeating(RingChannel):
    """Gives the first release of a round again, whatever it is asked for then, as services do."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        self.kept: dict[int, Release] = {}

    def carry(self, question: Question, answers: Tensor, devices: Sequence[PartyId]) -> Release:
        return self.kept.setdefault(question.round, super().carry(question, answers, devices))


def test_a_release_that_is_only_repeated_passes() -> None:
    channel = Repeating(CLIP_NORM, RHO, NoiseRoot.from_seed(0), sound)
    assert failure(audit_releases(channel, 2, seed=0, most=400).checks) is None


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Callable[[Flaw], Examined]:
    """What is found of a secure channel with a flaw, where the audit opens a run's."""
    monkeypatch.setattr(audits.mechanism_audit, "canaries_over", lambda settings: Canaries(devices=1000))

    def examined(flaw: Flaw) -> Examined:
        def opened(run: Prepared, rho: float | None) -> Channel:
            return RingChannel(run.plan.clip_norm, rho, run.root, flaw)

        monkeypatch.setattr(audits.mechanism_audit, "opened", opened)
        return audit_devices("secure, processes", LEVEL, seed=0)

    return examined


@pytest.mark.parametrize("flaw", [scaled(1 / 3), without_noise, unclipped])
def test_too_little_noise_shows_in_the_bound(flaw: Flaw, devices: Callable[[Flaw], Examined]) -> None:
    assert devices(flaw).finding.verdict == "ALARM"


def test_a_sound_channel_comes_near_from_below(devices: Callable[[Flaw], Examined]) -> None:
    found = devices(sound)
    assert all(check.passed for check in found.checks), found.checks
    assert found.finding.verdict == "within bound"
    # All aggregators' noise is there, so the cloud alone learns less than the price of one's allows.
    assert found.finding.epsilon_lower > 0.3 * found.finding.epsilon_upper


def test_a_failed_check_ends_in_exit_code_3(
    devices: Callable[[Flaw], Examined], monkeypatch: pytest.MonkeyPatch
) -> None:
    within = devices(one_short)
    for name, nothing in (("TRAININGS", ()), ("GAMES", ())):
        monkeypatch.setattr(audits.mechanism_audit, name, nothing)
    monkeypatch.setattr(audits.mechanism_audit, "CHANNELS", {"secure, processes": ()})
    monkeypatch.setattr(
        audits.mechanism_audit, "_audit_noised_worlds", lambda level, seed: Examined(within.finding)
    )
    result = CliRunner().invoke(app, ["audit", "mechanism", "--json"])
    assert result.exit_code == AuditAlarm.exit_code
    tree = json.loads(result.stdout)
    assert sorted(tree) == ["checks", "false_alarm", "mechanisms", "version"]
    assert tree["false_alarm"] == pytest.approx(1e-6)
    assert [check["name"] for check in tree["checks"] if not check["passed"]] == [
        f"secure, processes, devices side by side: {SUM}"
    ]
    assert SUM in result.stderr
    table = CliRunner().invoke(app, ["audit", "mechanism"])
    assert f"FAILS: secure, processes, devices side by side: {SUM}" in " ".join(table.stdout.split())
    assert "1 of 5 FAIL" in table.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CHANNELS if name.startswith("secure")])
def test_the_installed_channel_passes_through_its_parties(name: str) -> None:
    found = audit_devices(name, LEVEL, seed=0)
    assert all(check.passed for check in found.checks), found.checks
    assert found.finding.verdict == "within bound"
    assert found.finding.epsilon_lower > 0.4 * found.finding.epsilon_upper
