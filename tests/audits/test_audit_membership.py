"""The membership game: coins, canaries, replays, views, verdicts, and the command that plays it."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import audits.membership_audit
from attacks import rescaled_logit
from audits.findings import Refused
from audits.game import (
    Cache,
    GameKey,
    Pool,
    ReplayContext,
    draw_halves,
    draw_pool,
    flip_coins,
    shard_of,
    traces,
)
from audits.membership_audit import audit_membership, views_of
from audits.requests import MembershipRequest, attacks_of, latest
from audits.roc import draw, roc
from audits.scoring import features_of
from audits.views import draw_uneven, infer_labels, released
from cli import app
from privkd.channels.registry import KINDS, open_channel, open_replay
from privkd.channels.secure import OpenSum
from privkd.config import load_config
from privkd.errors import AuditAlarm, ConfigError, DataError, RunError
from privkd.prepared import prepare
from privkd.privacy.noise import NoiseRoot
from privkd.progress import Silent
from privkd.run import train_in
from privkd.runs.checkpoint import load_transcript
from privkd.runs.folder import RunFolder

SMALL = {
    "data.devices": 3,
    "data.records_per_device": 40,
    "data.device_test_records": 5,
    "data.proxy_records": 30,
    "rounds": 2,
    "controls": False,
    "teacher.model.name": "mlp",
    "teacher.fit.steps": 20,
    "reverse.fit.steps": 5,
    "student.models": [{"name": "mlp", "width": 4}],
    "student.public_fit.steps": 10,
    "student.private_fit.steps": 60,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"channel.kind": "plain", "privacy.epsilon": "inf"},
    "secure": {"channel.kind": "secure", "privacy.epsilon": 3.0},
}


@pytest.fixture(scope="module", params=SETTINGS)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run."""
    return _finished(request.param, tmp_path_factory.mktemp("runs") / request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _finished("plain", tmp_path_factory.mktemp("runs") / "plain")


def _finished(kind: str, path: Path) -> Path:
    with RunFolder.create(path, load_config(None, (), SMALL | SETTINGS[kind])) as folder:
        train_in(folder.config, folder, Silent())
    return path


@pytest.fixture
def side(plain: Path) -> Iterator[tuple[RunFolder, ReplayContext]]:
    with RunFolder.resume(plain) as folder:
        game = prepare(folder.config)
        yield folder, ReplayContext.of(game, load_transcript(folder, game.cloud.untrained_teacher()))


def test_coins_are_fair_and_do_not_depend_on_how_many_models_there_are() -> None:
    coins = flip_coins(0, 50, 400)
    assert coins[:7].tolist() == flip_coins(0, 7, 400).tolist()
    assert coins.tolist() != flip_coins(1, 50, 400).tolist()
    # Six standard deviations: a false alarm in 2e-9 of all seeds.
    assert abs(coins.mean() - 0.5) < 6 * 0.5 / 20_000**0.5


def test_every_candidate_is_in_half_of_the_shadows() -> None:
    assert (draw_halves(0, 9, 100).sum(axis=0) == 4).all()
    assert draw_halves(0, 9, 100).tolist() != draw_halves(1, 9, 100).tolist()


@pytest.mark.parametrize("kind", ["natural", "mislabelled", "crafted"])
def test_pools_hold_what_their_kind_says(kind: str) -> None:
    scenario = prepare(load_config(None, (), SMALL)).scenario
    pool = draw_pool(scenario, 1, kind, seed=0)
    own = scenario.devices[1].train
    assert len(pool.candidates) == (2 if kind == "natural" else 1) * len(own)
    assert len(pool.always) == (0 if kind == "natural" else len(own) // 2)
    known = {row.numpy().tobytes() for row in scenario.test.inputs}
    mixed = [row.numpy().tobytes() in known for row in pool.candidates.inputs]
    assert (sum(mixed) == 0) == (kind == "crafted")
    rest = {row.numpy().tobytes() for row in pool.population.inputs}
    assert rest.isdisjoint(row.numpy().tobytes() for row in pool.candidates.inputs)
    again = draw_pool(scenario, 1, kind, seed=0)
    assert torch.equal(pool.candidates.inputs, again.candidates.inputs)


def test_pools_refuse_what_cannot_be_played() -> None:
    scenario = prepare(load_config(None, (), SMALL)).scenario
    with pytest.raises(ConfigError, match="device=7"):
        draw_pool(scenario, 7, "natural", 0)
    with pytest.raises(ConfigError, match="canaries='odd'"):
        draw_pool(scenario, 0, "odd", 0)
    empty = replace(scenario.test, inputs=scenario.test.inputs[:3], labels=scenario.test.labels[:3])
    with pytest.raises(DataError, match="held-out"):
        draw_pool(replace(scenario, test=empty), 0, "natural", 0)


def test_a_shard_is_what_the_coins_say() -> None:
    pool = draw_pool(prepare(load_config(None, (), SMALL)).scenario, 0, "mislabelled", 0)
    inside = np.zeros(len(pool.candidates), dtype=bool)
    inside[3] = True
    shard = shard_of(pool, inside)
    assert len(shard) == len(pool.always) + 1
    assert torch.equal(shard.inputs[-1], pool.candidates.inputs[3])


def test_shadows_are_never_trained_twice(side: tuple[RunFolder, ReplayContext]) -> None:
    folder, device = side
    pool = draw_pool(device.run.scenario, 0, "natural", 0)
    calls: list[int] = []
    cache = Cache(folder, GameKey("natural", 0, 0))
    first = traces(device, pool, cache, "shadow", 3, lambda done, of: calls.append(done))
    trained = len(calls)
    second = traces(device, pool, cache, "shadow", 3, lambda done, of: calls.append(done))
    assert trained
    assert len(calls) == trained
    assert torch.equal(first.answers, second.answers)
    other = Cache(folder, GameKey("natural", 0, 1))
    traces(device, pool, other, "shadow", 3, lambda done, of: calls.append(done))
    assert len(calls) > trained


def test_the_cache_knows_the_records_and_the_libraries(
    side: tuple[RunFolder, ReplayContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, device = side
    pool = draw_pool(device.run.scenario, 0, "natural", 0)
    cache = Cache(folder, GameKey("natural", 0, 7))
    calls: list[int] = []

    def trained(records: Pool) -> bool:
        before = len(calls)
        traces(device, records, cache, "target", 1, lambda done, of: calls.append(done))
        return len(calls) > before

    assert trained(pool)
    assert not trained(pool)
    brighter = replace(pool.candidates, inputs=pool.candidates.inputs + 0.1)
    assert trained(replace(pool, candidates=brighter))
    monkeypatch.setattr("audits.game.versions", lambda: {"torch": "of tomorrow"})
    assert trained(pool)


def test_a_damaged_cache_is_computed_again(side: tuple[RunFolder, ReplayContext]) -> None:
    folder, device = side
    pool = draw_pool(device.run.scenario, 0, "natural", 5)
    cache = Cache(folder, GameKey("natural", 0, 5))
    first = traces(device, pool, cache, "target", 2, lambda done, of: None)
    for path in (folder.path / "audit").glob("target-*.safetensors"):
        path.write_bytes(b"damaged")
    second = traces(device, pool, cache, "target", 2, lambda done, of: None)
    assert torch.equal(first.answers, second.answers)


@pytest.mark.parametrize("audited", range(4))
def test_silent_devices_are_no_part_of_a_round(tmp_path: Path, audited: int) -> None:
    """Else the sum of an audit would hide a device among more than the run's did."""
    silent = SMALL | SETTINGS["plain"] | {"data.devices": 4, "channel.dropout": 0.3, "rounds": 4}
    with RunFolder.create(tmp_path / "run", load_config(None, (), silent)) as folder:
        train_in(folder.config, folder, Silent())
        game = prepare(folder.config)
        side = ReplayContext.of(game, load_transcript(folder, game.cloud.untrained_teacher()))
    others = [number for number in range(4) if number != audited]
    answers = torch.tensor(others)[:, None, None, None].expand(3, 4, 30, 10)
    beside = side.beside(others, answers)
    assert beside.shape == (2, 4, 30, 10), "with the audited device three of four"
    assert len({exchange.release.devices for exchange in side.transcript.exchanges}) > 1
    for round, exchange in enumerate(side.transcript.exchanges):
        sent = {game.simulation.names[int(number)] for number in beside[:, round, 0, 0]}
        assert sent <= set(exchange.release.devices) - {game.simulation.names[audited]}


def test_views_agree_about_the_same_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand((2, 1, 30, 10), generator=generator)
    others = torch.rand((2, 1, 30, 10), generator=generator)
    root, seen = NoiseRoot.from_seed(0), {}
    for channel in ("plain", "secure"):
        game = prepare(load_config(None, (), SMALL | SETTINGS["plain"] | {"channel.kind": channel}))
        for view in KINDS[channel].views:
            seen[view] = released(game, view, blocks, lambda: others, root)
    alone, total, left = seen.values()
    assert alone.noise_std == total.noise_std == left.noise_std == 0
    assert np.allclose(alone.answers, alone.clean, atol=1e-4)
    assert np.allclose(total.answers, total.clean, atol=1e-4)
    # Taking the others off the sum leaves the device's own answers.
    assert np.allclose(left.answers, alone.answers, atol=1e-3)


def test_the_rings_noise_is_what_it_says() -> None:
    """A chi-squared of 20,000 draws leaves 6 % about its mean in fewer than 1e-8 of all seeds."""
    blocks, found = torch.zeros((2, 2000, 10)), []
    for colluding in (0, 1):
        channel = OpenSum(1.0, 0.5, NoiseRoot.from_seed(0), colluding=colluding)
        found.append(channel.release(blocks, devices=("a", "b"), round=0))
        assert found[-1].answers.std().item() == pytest.approx(found[-1].noise_std, rel=0.03)
    both, one = found
    assert one.noise_std == pytest.approx(both.noise_std / 2**0.5)


def test_what_is_replayed_in_the_open_is_the_secure_channels_own() -> None:
    """Without noise to the bit, and with it of the same size and price."""
    blocks = torch.rand((3, 40, 10), generator=torch.Generator().manual_seed(0))
    named = {"clip_norm": 2.0, "root": NoiseRoot.from_seed(0), "aggregators": 2}
    for rho in (None, 0.5):
        with open_channel("secure", rho=rho, **named) as parties:
            own, open_sum = parties, open_replay("secure", rho=rho, **named)
            devices = ("a", "b", "c")
            one, other = (each.release(blocks, devices=devices, round=0) for each in (own, open_sum))
        assert (own.event, one.noise_std) == (open_sum.event, other.noise_std)
        assert rho is not None or torch.equal(one.answers, other.answers)


def test_every_view_of_a_run_is_found(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audits.membership_audit, "_TRIALS", 5000)
    request = MembershipRequest(shadows=8, targets=2)
    with RunFolder.resume(finished) as folder:
        report = audit_membership(folder, request, Silent())
    secure = finished.name == "secure"
    wires = ["secure_sum", "secure_sum_colluding"] if secure else ["per_client_logits"]
    assert list(dict.fromkeys(f.view for f in report.findings)) == [
        *wires,
        "student",
        *(["gradient"] if secure else []),
    ]
    for finding in report.findings:
        assert finding.verdict == ("within bound" if secure else "no bound claimed")
        assert finding.members + finding.nonmembers in (2 * 80, 5000, 10_000)
        assert any(isinstance(rate, Refused) for rate in finding.tpr_at_fpr) or finding.view == "gradient"


def test_the_teacher_is_a_view_of_its_own(plain: Path) -> None:
    request = MembershipRequest(view="teacher", attack="lira-online", shadows=8, targets=2)
    with RunFolder.resume(plain) as folder:
        report = audit_membership(folder, request, Silent())
    assert [finding.view for finding in report.findings] == ["teacher"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"view": "wire"}, "view='wire'"),
        ({"attack": "guess"}, "attack='guess'"),
        ({"canaries": "odd"}, "canaries='odd'"),
        ({"shadows": 2}, "shadows=2"),
        ({"targets": 0}, "targets=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_a_bad_request_is_one_line(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        MembershipRequest(**given)


def test_a_view_that_the_run_lacks_is_refused() -> None:
    game = prepare(load_config(None, (), SMALL | SETTINGS["plain"]))
    with pytest.raises(ConfigError, match="plain channel the cloud sees per_client_logits"):
        views_of(game, "secure_sum")
    with pytest.raises(ConfigError, match="without DP-SGD"):
        views_of(game, "gradient")


def test_an_attack_of_another_view_is_refused(plain: Path) -> None:
    request = MembershipRequest(view="student", attack="matched-filter")
    with RunFolder.resume(plain) as folder, pytest.raises(ConfigError, match="view student takes one of"):
        audit_membership(folder, request, Silent())


KEYS = {
    "view",
    "attack",
    "auc",
    "tpr_at_fpr",
    "epsilon_lower",
    "epsilon_upper",
    "confidence",
    "members",
    "nonmembers",
    "verdict",
}


def test_the_command_prints_one_object_and_draws_curves(plain: Path) -> None:
    arguments = ["audit", "membership", str(plain), "--view", "student", "--attack", "lira-online"]
    result = CliRunner().invoke(app, [*arguments, "--shadows", "8", "--targets", "2", "--json"])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["views"]
    assert found.keys() >= KEYS
    assert found["epsilon_upper"] == "inf"
    assert found["tpr_at_fpr"][1]["reason"].startswith("TPR at FPR 0.1 % needs at least 10,000 non-members")
    assert (plain / "audit" / "roc.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (plain / "audit" / "roc.svg").read_bytes()
    table = CliRunner().invoke(app, [*arguments, "--shadows", "8", "--targets", "2"])
    assert "no bound" in table.stdout
    assert "replay" in table.stdout


def test_the_table_keeps_its_verdicts_in_a_pipe(plain: Path) -> None:
    arguments = ["audit", "membership", str(plain), "--view", "student", "--shadows", "8", "--targets", "2"]
    lines = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"}).stdout.splitlines()
    rows = [line for line in lines if line.strip().startswith(attacks_of("student"))]
    assert len(rows) == len(attacks_of("student"))
    assert all(row.rstrip().endswith("no bound") for row in rows)


def test_quantile_regression_reads_public_features_alone(side: tuple[RunFolder, ReplayContext]) -> None:
    _, device = side
    pool = draw_pool(device.run.scenario, 0, "natural", 0)
    features = features_of(device.last_starts[0], pool)
    classes = device.run.scenario.classes
    assert features.candidates.shape == (len(pool.candidates), 2 * classes + 1)
    assert features.population.shape == (len(pool.population), 2 * classes + 1)
    labels = pool.candidates.labels.numpy()
    assert (features.candidates[:, classes:-1].argmax(axis=1) == labels).all()
    np.testing.assert_allclose(
        features.candidates[:, -1], rescaled_logit(features.candidates[:, :classes], labels)
    )


def test_classes_are_guessed_through_the_command(finished: Path) -> None:
    arguments = ["audit", "membership", str(finished), "--attack", "label-distribution"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    tree = json.loads(result.stdout)
    assert tree["views"] == []
    wires = ["secure_sum", "secure_sum_colluding"] if finished.name == "secure" else ["per_client_logits"]
    assert [found["view"] for found in tree["label_distributions"]] == wires
    for found in tree["label_distributions"]:
        assert found["low"] <= found["gain"] <= found["high"]
        assert found["gain"] == pytest.approx(found["blind"] - found["divergence"])
        assert (found["unit"], found["epsilon_upper"]) == ("device", "inf")
    # Without any noise or privacy the answers show what a device mostly holds.
    assert finished.name == "secure" or tree["label_distributions"][0]["reveals"]
    table = CliRunner().invoke(app, arguments)
    assert "label-distribution" in table.stdout


def test_labels_are_no_attack_on_students(plain: Path) -> None:
    arguments = [str(plain), "--view", "student", "--attack", "label-distribution"]
    result = CliRunner().invoke(app, ["audit", "membership", *arguments])
    assert result.exit_code == 2
    assert "view student takes one of" in result.stderr


def test_uneven_devices_hold_about_half_of_the_records_and_never_none() -> None:
    """Wished shares sum to half; what a class lacks is missing, so half is the most on average."""
    labels = np.repeat(np.arange(10), 28)
    inside = draw_uneven(labels, 10, 500, seed=0)
    assert inside.any(axis=1).all()
    assert 0.35 < inside.mean() < 0.5
    shares = inside @ np.eye(10)[labels] / inside.sum(axis=1, keepdims=True)
    assert shares.std(axis=0).min() > 0.05
    assert inside.tolist() == draw_uneven(labels, 10, 500, seed=0).tolist()


def test_noise_is_not_believed_when_classes_are_guessed() -> None:
    """Bayes-optimal answers tell the shares; pure noise ends in the blind guess, whatever it says."""
    rng = np.random.default_rng(0)
    shares = [rng.dirichlet(np.ones(4), size=200) for _ in range(2)]
    evidence = torch.from_numpy(rng.normal(size=(1, 1, 30, 4)))
    telling = [torch.from_numpy(np.log(part))[:, None, None, :] + evidence for part in shares]
    found = infer_labels("v", (shares[0], telling[0]), (shares[1], telling[1]), math.inf)
    assert found.reveals
    assert found.divergence < 0.4 * found.blind
    noise = [torch.from_numpy(rng.normal(size=(200, 1, 30, 4))) for _ in range(2)]
    nothing = infer_labels("v", (shares[0], noise[0]), (shares[1], noise[1]), 1.0)
    assert nothing.divergence == pytest.approx(nothing.blind, rel=0.1)


def test_a_run_whose_mechanism_is_broken_ends_in_exit_code_3(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's ledger claims epsilon 3; the installed step adds a tenth of the noise."""
    if finished.name != "secure":
        pytest.skip("the run without DP claims nothing")
    sound = audits.membership_audit.train_cohort

    def broken(models: Any, shards: Any, logits: Any, mechanism: Any, sources: Any) -> Any:
        less = replace(mechanism, noise_multiplier=mechanism.noise_multiplier / 10)
        return sound(models, shards, logits, less, sources)

    monkeypatch.setattr(audits.membership_audit, "train_cohort", broken)
    monkeypatch.setattr(audits.membership_audit, "_TRIALS", 5000)
    result = CliRunner().invoke(app, ["audit", "membership", str(finished), "--view", "gradient", "--json"])
    assert result.exit_code == AuditAlarm.exit_code == 3
    assert {found["verdict"] for found in json.loads(result.stdout)["views"]} == {"ALARM"}
    assert "epsilon is at least" in result.stderr


def test_a_gaussian_pair_stands_beside_gradient_canaries(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "secure" not in finished.name:
        pytest.skip("the run without DP has no gradient view")
    monkeypatch.setattr(audits.membership_audit, "_TRIALS", 5000)
    words = ["audit", "membership", str(finished), "--view", "gradient", "--json", "--out", str(tmp_path)]
    found = json.loads(CliRunner().invoke(app, words).stdout)["views"]
    for finding in found:
        (pair,) = finding["bounds"]
        assert (pair["estimator"], pair["counts"]) == ("gaussian_pair", False)
        assert finding["epsilon_lower"] < pair["epsilon_lower"] < 3.1
        assert finding["estimator"] in ("f_dp_one_run", "gaussian")
    assert json.loads((tmp_path / "membership.json").read_text())["views"] == found
    assert {path.name for path in tmp_path.iterdir()} >= {
        "roc.csv", "roc.pdf", "scores.csv", "table.md", "table.tex",
    }  # fmt: skip


def test_bad_arguments_end_in_one_line_and_exit_code_2(tmp_path: Path, plain: Path) -> None:
    for arguments in (
        [str(tmp_path)],
        [str(plain), "--view", "secure_sum"],
        [str(plain), "--canaries", "odd"],
        [str(plain), "--shadows", "many"],
    ):
        result = CliRunner().invoke(app, ["audit", "membership", *arguments])
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1


def test_the_latest_run_is_the_default(tmp_path: Path, plain: Path) -> None:
    with pytest.raises(RunError, match="privkd train"):
        latest(tmp_path / "runs", "run")
    shutil.copytree(plain, tmp_path / "runs" / "one")
    (tmp_path / "runs" / "notes").mkdir()
    assert latest(tmp_path / "runs", "run") == tmp_path / "runs" / "one"


def test_roc_calls_ties_together() -> None:
    curve = roc("tied", np.array([1.0, 2.0, 2.0]), np.array([2.0, 0.0]))
    assert curve.true_positive.tolist() == pytest.approx([2 / 3, 1, 1])
    assert curve.false_positive.tolist() == pytest.approx([0.5, 0.5, 1])


def test_long_curves_stay_small_files() -> None:
    rng = np.random.default_rng(0)
    curve = roc("long", rng.normal(1, 1, 50_000), rng.normal(0, 1, 50_000))
    assert len(draw({"gradient": [curve]}, 1e-4)["svg"]) < 200_000


def test_equal_curves_are_equal_files() -> None:
    curve = roc("one", np.array([1.0, 3.0]), np.array([0.0, 2.0]))
    assert draw({"student": [curve]}, 0.01)["png"] == draw({"student": [curve]}, 0.01)["png"]
