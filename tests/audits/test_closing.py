"""The audit that every run ends with: it comes near the ledger from below, and finds a broken mechanism.

False alarms: all bounds of one run together exceed the truth with probability at most 0.1 %, and its checks
of records and of the channel fail with 1e-6 each. The sound runs of this file, 25 in all, so raise an alarm
in at most 2.6 % of all seeds; the seeds are fixed.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from running import SMALL, federation_of, small
from torch import Tensor
from typer.testing import CliRunner

import audits.mechanisms.closing
import privkd.engines.simulation
from audits.evidence import read_run
from audits.mechanism_audit import opened
from audits.mechanisms.canaries import LOUD, log_ratio
from audits.mechanisms.closing import CONFIDENCE, closing_audit
from audits.mechanisms.on_channel import ReleaseAudit, audit_releases
from audits.mechanisms.on_device import audit_training
from cli import app
from privkd.channels.channel import Channel, NoisedChannel
from privkd.config import Config
from privkd.engines.simulation import Simulation
from privkd.prepared import Prepared, prepare
from privkd.privacy.bounds import Audited, LowerBound
from privkd.privacy.events import Unit
from privkd.privacy.noise import NoiseRoot
from privkd.privacy.randomness import seeded_generator
from privkd.progress import Silent
from privkd.training.vectorised import train_cohort

NOISED = ("channel.kind=noised", "privacy.device_epsilon=8")
SECURE = ("channel.kind=secure", "privacy.device_epsilon=8")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer canaries than a run has."""

    def releases(channel: Channel, rounds: int, seed: int, *, most: int) -> ReleaseAudit:
        fewer = 2_000 if isinstance(channel, NoisedChannel) else 600
        return audit_releases(channel, rounds, seed, most=min(fewer, most))

    monkeypatch.setattr(audits.mechanisms.closing, "audit_training", partial(audit_training, most=4_000))
    monkeypatch.setattr(audits.mechanisms.closing, "audit_releases", releases)


def audited(config: Config, game: Prepared | None = None) -> Audited:
    """The audit of a run that ends before its first round, with its channel open."""
    game = game or prepare(config)
    with opened(game, game.plan.rho) as channel:
        federation = federation_of(game, channel)
        return closing_audit(federation, federation.begin(), Silent())


def sound_bounds(*settings: str) -> dict[Unit, LowerBound]:
    """Of a run all of whose checks pass."""
    found = audited(small(*settings))
    assert all(check.passed for check in found.checks), found.checks
    return {bound.unit: bound for bound in found.bounds}


def halved(*arguments: Any, progress: Any = None) -> Any:
    """DP-SGD with half of the noise that its mechanism claims."""
    models, shards, logits, mechanism, sources = arguments
    quiet = replace(mechanism, noise_multiplier=mechanism.noise_multiplier / 2)
    return train_cohort(models, shards, logits, quiet, sources)


def unclipped(*arguments: Any, progress: Any = None) -> Any:
    """DP-SGD that clips at three times the norm that its noise is scaled to."""
    models, shards, logits, mechanism, sources = arguments
    recipe = mechanism.recipe.model_copy(update={"clip_norm": 3 * mechanism.recipe.clip_norm})
    loose = replace(mechanism, recipe=recipe, noise_multiplier=mechanism.noise_multiplier / 3)
    return train_cohort(models, shards, logits, loose, sources)


class TestSoundRuns:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("epsilon", [1, 3, 8])
    def test_of_records_come_near_from_below(
        self, epsilon: int, seed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Over half of the ledger's epsilon, but where even all of a run's trials cannot tell: at 1."""
        if epsilon == 1:
            monkeypatch.setattr(audits.mechanisms.closing, "audit_training", audit_training)
        found = sound_bounds(f"privacy.epsilon={epsilon}", f"seed={seed}")
        assert set(found) == {Unit.RECORD}, "the plain channel protects no device"
        assert (0.3 if epsilon == 1 else epsilon / 2) < found[Unit.RECORD].epsilon < epsilon
        assert found[Unit.RECORD].confidence == CONFIDENCE

    @pytest.mark.parametrize(
        ("channel", "seed"),
        [
            *((NOISED, seed) for seed in range(3)),
            (SECURE, 0),
            pytest.param((*SECURE, "channel.parties=services"), 0, marks=pytest.mark.slow),
            *(pytest.param(SECURE, seed, marks=pytest.mark.slow) for seed in (1, 2)),
        ],
    )
    def test_of_devices_likewise(self, channel: tuple[str, ...], seed: int) -> None:
        found = sound_bounds(*channel, f"seed={seed}")
        assert 3 < found[Unit.DEVICE].epsilon < 8
        assert 1.5 < found[Unit.RECORD].epsilon < 3
        assert 1 - found[Unit.DEVICE].confidence == pytest.approx((1 - CONFIDENCE) / 2), "both at once"

    @pytest.mark.slow
    def test_of_many_aggregators_count_one_as_honest(self) -> None:
        found = sound_bounds(*SECURE, "channel.aggregators=4", "rounds=1")
        assert 3 < found[Unit.DEVICE].epsilon < 8

    @pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
    def test_of_subsampled_records_stay_below(self, seed: int) -> None:
        found = sound_bounds("student.dp={sampling_rate=0.2, steps=20}", f"seed={seed}")
        assert 0.1 < found[Unit.RECORD].epsilon < 3

    def test_of_the_reference_engine_go_through_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(privkd.engines.simulation, "train_cohort", None)
        monkeypatch.setattr(audits.mechanisms.closing, "audit_training", partial(audit_training, most=1_000))
        found = sound_bounds("student.engine=opacus", "privacy.epsilon=8")
        assert 4 < found[Unit.RECORD].epsilon < 8
        assert "engine opacus" in found[Unit.RECORD].path

    @pytest.mark.parametrize(
        "settings",
        [
            ("privacy.epsilon=inf",),
            ("privacy.epsilon=inf", "channel.kind=secure"),
            ("privacy.epsilon=inf", *SECURE, "channel.noise_from=devices", "channel.minimum_devices=2"),
        ],
        ids=["no DP", "no noise", "noise of the devices"],
    )
    def test_that_claim_nothing_here_get_no_bound(self, settings: tuple[str, ...]) -> None:
        assert sound_bounds(*settings) == {}

    def test_give_the_same_bound_again(self) -> None:
        once = sound_bounds(*NOISED, "rounds=1")
        assert sound_bounds(*NOISED, "rounds=1") == once
        assert sound_bounds(*NOISED, "rounds=1", "seed=1") != once


class TestScores:
    """The adversary's scores, against a loop over canaries that says the same thing slowly."""

    def test_of_devices(self) -> None:
        """What a canary's score is made of: each round's own entry, and the Gaussians' ratio at it."""
        plan = prepare(small(*NOISED)).plan
        assert plan.rho is not None
        channel = NoisedChannel(plan.clip_norm, plan.rho, NoiseRoot.from_seed(0))
        scores = audit_releases(channel, plan.rounds, 5, most=4_000).scores
        assert len(scores.values) == 4_000
        coins = torch.rand(100, generator=seeded_generator(5, "audit", "device coins")) < 0.5
        assert coins.tolist() == scores.inside[:100].tolist()
        blocks = torch.diag(coins * LOUD * plan.clip_norm)[:, :, None]
        slowly = np.zeros(100)
        for round in range(plan.rounds):
            names = [f"audit-0000-{number:04d}" for number in range(100)]
            answers = channel.release(blocks, devices=names, round=round).answers.double().numpy()
            for canary in range(100):
                own = np.asarray(answers[canary, canary, 0] / plan.clip_norm)
                slowly[canary] += log_ratio(own, 1 / math.sqrt(2 * plan.rho), 1.0)
        assert scores.values[:100] == pytest.approx(slowly)
        apart = (scores.members.mean() - scores.nonmembers.mean()) / scores.nonmembers.std()
        assert apart == pytest.approx(math.sqrt(2 * plan.rho * plan.rounds), rel=0.1)

    def test_of_a_long_run_rest_on_fewer_canaries(self) -> None:
        game = prepare(small("student.dp={sampling_rate=0.5, steps=200}"))
        teacher, students = game.cloud.untrained_teacher(), game.cloud.untrained_students()
        assert len(audit_training(game, teacher, students[:1], 0).scores.values) < 4_000


def too_quiet(game: Prepared) -> Prepared:
    """A channel whose releases cost four times what the ledger is told."""
    assert game.plan.rho is not None
    return replace(game, plan=replace(game.plan, rho=4 * game.plan.rho))


class TestBrokenTwins:
    @pytest.mark.parametrize("step", [halved, unclipped])
    def test_of_records_are_found(self, step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(privkd.engines.simulation, "train_cohort", step)
        found = audited(small())
        assert found.bounds[0].epsilon > 3
        assert not all(check.passed for check in found.checks)

    @pytest.mark.parametrize("channel", [NOISED, SECURE], ids=["noised", "secure"])
    def test_of_devices_are_found(self, channel: tuple[str, ...]) -> None:
        config = small(*channel, "privacy.epsilon=inf")
        (bound,) = audited(config, too_quiet(prepare(config))).bounds
        assert bound.unit is Unit.DEVICE
        assert bound.epsilon > 8


class TestCommand:
    def run(self, *arguments: object) -> Result:
        sets = [word for setting in (*SMALL, "rounds=1") for word in ("--set", setting)]
        return CliRunner().invoke(app, ["train", *sets, *map(str, arguments)])

    def test_both_bounds_stand_side_by_side(self, tmp_path: Path) -> None:
        out = tmp_path / "run"
        shown = self.run("--out", out, "--channel", "noised", "--device-epsilon", "8")
        assert shown.exit_code == 0, shown.output
        words = " ".join(shown.output.split())
        assert "at least" in words
        assert "the run's own mechanisms, 3,990 per record and 2,000 per device; confidence 99.95 %" in words
        ledger = json.loads((out / "result.json").read_text())["ledger"]
        for unit in ("record", "device"):
            assert 0 < ledger[unit]["lower_bound"]["epsilon"] < ledger[unit]["epsilon"]
        facts = read_run(out)
        assert {bound.unit: bound.epsilon for bound in facts.closing.bounds} == {
            Unit(name): row["lower_bound"]["epsilon"] for name, row in ledger.items()
        }
        assert facts.standing == "not audited", "no attack was made on what the run shows"

    def test_what_was_not_measured_is_null(self, tmp_path: Path) -> None:
        found = self.run("--out", tmp_path / "run", "--epsilon", "inf", "--json")
        ledger = json.loads(found.stdout)["ledger"]
        assert [row["lower_bound"] for row in ledger.values()] == [None, None]

    def test_bounds_that_cross_are_said_loudly(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Exit code 3, after both were printed; the report of the run says it again."""
        monkeypatch.setattr(privkd.engines.simulation, "train_cohort", halved)
        out = tmp_path / "run"
        alarmed = self.run("--out", out)
        assert alarmed.exit_code == 3
        assert "do not release" in alarmed.output
        assert "at least" in alarmed.output
        facts = read_run(out)
        assert facts.standing == "ALARM"
        assert "the run's own mechanism" in facts.alarm_words[0]
        reported = CliRunner().invoke(app, ["report", str(out)])
        assert reported.exit_code == 3
        assert "ALARM" in (out / "report.md").read_text()


def test_the_devices_are_trained_as_the_runs_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the run's own call, with its clip norm, noise, sampling rate and part; its steps, its randomness."""
    asked: list[tuple[Any, Sequence[str]]] = []
    trained = Simulation.train_private

    def noted(
        devices: Simulation, students: Any, targets: list[Tensor], mechanism: Any, randomness: Any, *rest: Any
    ) -> Any:
        drawn = [getattr(randomness(name), "_source", None) for name in devices.names[:1]]
        asked.append((mechanism, [type(source).__name__ for source in drawn]))
        return trained(devices, students, targets, mechanism, randomness, *rest)

    monkeypatch.setattr(Simulation, "train_private", noted)
    game = prepare(small("privacy.noise=system"))
    audited(small(), game)
    own = game.mechanism
    assert own is not None
    for mechanism, _ in asked:
        same = {"clip_norm", "sampling_rate", "part"}
        assert mechanism.recipe.model_dump(include=same) == own.recipe.model_dump(include=same)
        assert replace(mechanism, recipe=own.recipe) == own
    noisy = [mechanism.recipe.steps for mechanism, sources in asked if sources == ["SystemRandomness"]]
    assert noisy.count(game.plan.steps) == game.plan.rounds
