"""The audit that every run ends with: it comes near the ledger from below, and finds a broken mechanism.

False alarms: all bounds of one run together exceed the truth with probability at most 0.1 %. The sound runs
of this file, 24 in all, so raise an alarm in at most 2.4 % of all seeds; the seeds are fixed.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from running import SMALL, small
from typer.testing import CliRunner

import audits.closing
from audits.closing import CONFIDENCE, closing_audit, device_scores, record_scores
from audits.evidence.reading import read_run
from audits.gradient import log_ratio
from cli import app
from privkd.bounds import LowerBound
from privkd.cohort import train_cohort
from privkd.events import Unit
from privkd.federation import Game, open_game
from privkd.noise import NoiseRoot
from privkd.progress import Silent
from privkd.student import Mechanism

NOISED = ("channel.kind=noised", "privacy.device_epsilon=8")
SECURE = ("channel.kind=secure", "privacy.device_epsilon=8")


def bounds(*settings: str) -> dict[Unit, LowerBound]:
    return {bound.unit: bound for bound in closing_audit(open_game(small(*settings)), Silent())}


def halved(*arguments: Any) -> Any:
    """DP-SGD with half of the noise that its mechanism claims."""
    models, shards, logits, mechanism, sources = arguments
    quiet = replace(mechanism, noise_multiplier=mechanism.noise_multiplier / 2)
    return train_cohort(models, shards, logits, quiet, sources)


def unclipped(*arguments: Any) -> Any:
    """DP-SGD that clips at three times the norm that its noise is scaled to."""
    models, shards, logits, mechanism, sources = arguments
    recipe = mechanism.recipe.model_copy(update={"clip_norm": 3 * mechanism.recipe.clip_norm})
    loose = replace(mechanism, recipe=recipe, noise_multiplier=mechanism.noise_multiplier / 3)
    return train_cohort(models, shards, logits, loose, sources)


class TestSoundRuns:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("epsilon", [1, 3, 8])
    def test_of_records_come_near_from_below(self, epsilon: int, seed: int) -> None:
        """Over half of the ledger's epsilon, but where so few trials cannot tell: at 1."""
        found = bounds(f"privacy.epsilon={epsilon}", f"seed={seed}")
        assert set(found) == {Unit.RECORD}, "the plain channel protects no device"
        assert (0.3 if epsilon == 1 else epsilon / 2) < found[Unit.RECORD].epsilon < epsilon
        assert found[Unit.RECORD].confidence == CONFIDENCE

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("channel", [NOISED, SECURE], ids=["noised", "secure"])
    def test_of_devices_likewise(self, channel: tuple[str, ...], seed: int) -> None:
        found = bounds(*channel, f"seed={seed}")
        assert 4 < found[Unit.DEVICE].epsilon < 8
        assert 1.5 < found[Unit.RECORD].epsilon < 3
        assert 1 - found[Unit.DEVICE].confidence == pytest.approx((1 - CONFIDENCE) / 2), "both at once"

    def test_of_many_aggregators_count_one_as_honest(self) -> None:
        found = bounds(*SECURE, "channel.aggregators=4", "rounds=1")
        assert 4 < found[Unit.DEVICE].epsilon < 8

    @pytest.mark.parametrize("seed", range(3))
    def test_of_subsampled_records_stay_below(self, seed: int) -> None:
        found = bounds("student.dp={sampling_rate=0.2, steps=20}", f"seed={seed}")
        assert 0.3 < found[Unit.RECORD].epsilon < 3

    def test_of_the_reference_engine_go_through_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(audits.closing, "train_cohort", None)
        found = bounds("student.engine=opacus", "privacy.epsilon=8")
        assert 4 < found[Unit.RECORD].epsilon < 8

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
        assert bounds(*settings) == {}

    def test_give_the_same_bound_again(self) -> None:
        once = bounds(*SECURE, "rounds=1")
        assert bounds(*SECURE, "rounds=1") == once
        assert bounds(*SECURE, "rounds=1", "seed=1") != once


class TestScores:
    """The adversary's scores, against a loop over canaries that says the same thing slowly."""

    def test_of_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a canary's score is made of: each round's own entry, and the Gaussians' ratio at it."""
        monkeypatch.setattr(audits.closing, "_MOST", 500)
        game = open_game(small(*SECURE))
        scores = device_scores(game, 5)
        coins = torch.from_numpy(scores.inside)
        seen, spread = audits.closing._summed(game, coins, NoiseRoot.from_seed(5))
        plan = game.plan
        assert spread / plan.clip_norm == pytest.approx(1 / math.sqrt(2 * (plan.rho or 0)), rel=1e-3)
        slowly = [
            sum(
                log_ratio(np.asarray(seen[round, canary] / plan.clip_norm), spread / plan.clip_norm, 1.0)
                for round in range(plan.rounds)
            )
            for canary in range(500)
        ]
        assert scores.values == pytest.approx(np.asarray(slowly))
        apart = (scores.members.mean() - scores.nonmembers.mean()) / scores.nonmembers.std()
        assert apart == pytest.approx(math.sqrt(2 * (plan.rho or 0) * plan.rounds), rel=0.15)

    def test_of_a_long_run_rest_on_fewer_canaries(self) -> None:
        game = open_game(small("student.dp={sampling_rate=0.5, steps=200}"))
        assert len(record_scores(game, 0).values) == 5_000


def too_quiet(game: Game) -> Game:
    """A channel whose releases cost four times what the ledger is told."""
    assert game.plan.rho is not None
    return replace(game, plan=replace(game.plan, rho=4 * game.plan.rho))


class TestBrokenTwins:
    @pytest.mark.parametrize("step", [halved, unclipped])
    def test_of_records_are_found(self, step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(audits.closing, "train_cohort", step)
        assert bounds()[Unit.RECORD].epsilon > 3

    @pytest.mark.parametrize("channel", [NOISED, SECURE], ids=["noised", "secure"])
    def test_of_devices_are_found(self, channel: tuple[str, ...]) -> None:
        found = closing_audit(too_quiet(open_game(small(*channel, "privacy.epsilon=inf"))), Silent())
        assert found[0].epsilon > 8


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
        assert (
            "the run's own mechanisms, 20,000 per record and 20,000 per device; confidence 99.95 %" in words
        )
        ledger = json.loads((out / "result.json").read_text())["ledger"]
        for unit in ("record", "device"):
            assert 0 < ledger[unit]["lower_bound"]["epsilon"] < ledger[unit]["epsilon"]
        facts = read_run(out)
        assert {bound.unit: bound.epsilon for bound in facts.closing} == {
            Unit(name): row["lower_bound"]["epsilon"] for name, row in ledger.items()
        }
        assert facts.standing == "not audited", "no attack was made on what the run shows"

    def test_what_was_not_measured_is_null(self, tmp_path: Path) -> None:
        found = self.run("--out", tmp_path / "run", "--epsilon", "inf", "--json")
        ledger = json.loads(found.stdout)["ledger"]
        assert [row["lower_bound"] for row in ledger.values()] == [None, None]

    def test_bounds_that_cross_are_said_loudly(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Exit code 3, after both were printed; the report of the run says it again."""
        monkeypatch.setattr(audits.closing, "train_cohort", halved)
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


def test_a_mechanism_is_passed_on_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's own clip norm, noise and sampling rate, and as many steps as all its rounds take."""
    asked = []

    def noted(step: Any, mechanism: Mechanism, steps: int, **rest: Any) -> Any:
        asked.append((mechanism, steps))
        return real(step, mechanism, steps, **rest)

    real = audits.closing.dirac_scores
    monkeypatch.setattr(audits.closing, "dirac_scores", noted)
    game = open_game(small())
    closing_audit(game, Silent())
    assert asked == [(game.mechanism, game.plan.steps * game.plan.rounds)]
