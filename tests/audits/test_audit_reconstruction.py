"""The reconstruction audit: secrets, replays, views, ceilings, grids, and the command that plays it."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import audits.reconstructions.audit
from audits.findings import ReconstructionFinding, Success, alarm_of
from audits.game import ReplayContext
from audits.reconstructions.audit import audit_reconstruction, draw_grid, plan_attacks
from audits.reconstructions.drawings import Drawn, paired_answers
from audits.reconstructions.replays import Replays, draw_classes, draw_records, without_classes
from audits.requests import ReconstructionRequest
from audits.tables import ReconstructionReport
from cli import app
from privkd.config import load_config
from privkd.errors import AuditAlarm, ConfigError, DataError
from privkd.prepared import Prepared, prepare
from privkd.privacy.events import Unit
from privkd.progress import Silent
from privkd.run import train_in
from privkd.runs.checkpoint import load_transcript
from privkd.runs.folder import RunFolder

SMALL = {
    "data.devices": 3,
    "data.records_per_device": 100,
    "data.device_test_records": 5,
    "data.proxy_records": 120,
    "data.gap": "withheld",
    "rounds": 2,
    "controls": False,
    "teacher.model.name": "mlp",
    "teacher.fit.steps": 60,
    "reverse.fit.steps": 5,
    "student.models": [{"name": "mlp", "width": 16}],
    "student.public_fit.steps": 60,
    "student.private_fit.steps": 120,
    "student.private_fit.learning_rate": 0.02,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"channel.kind": "plain", "privacy.epsilon": "inf"},
    "secure": {"channel.kind": "secure", "privacy.epsilon": 3.0, "privacy.device_epsilon": 3.0},
}
FEW = ReconstructionRequest(trials=12, shadows=2, candidates=3)
OPTIONS = ["--trials", "12", "--shadows", "2", "--candidates", "3"]


@pytest.fixture(scope="module", params=SETTINGS)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run."""
    return _finished(request.param, tmp_path_factory.mktemp("runs") / request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _finished("plain", tmp_path_factory.mktemp("runs") / "plain")


def _finished(kind: str, path: Path, **more: Any) -> Path:
    with RunFolder.create(path, load_config(None, (), SMALL | SETTINGS[kind] | more)) as folder:
        train_in(folder.config, folder, Silent())
    return path


@pytest.fixture
def replays(plain: Path) -> Iterator[Replays]:
    with RunFolder.resume(plain) as folder:
        game = prepare(folder.config)
        side = ReplayContext.of(game, load_transcript(folder, game.cloud.untrained_teacher()))
        yield Replays(side, folder, FEW, Silent())


def game(**more: Any) -> Prepared:
    return prepare(load_config(None, (), SMALL | SETTINGS["plain"] | more))


def test_the_secret_class_is_filed_under_one_label_and_drawn_fairly() -> None:
    scenario = game().scenario
    drawn = draw_classes(scenario, 1, 2000, seed=0)
    assert drawn.classes == scenario.gap_classes
    assert drawn.appearances.shape == (5, 1, 8, 8)
    known = {
        row.numpy().tobytes(): int(y)
        for d in scenario.devices
        for row, y in zip(*_pairs(d.train), strict=True)
    }
    for secret, shard in zip(drawn.secrets[:20], drawn.shards, strict=False):
        truths = [known[row.numpy().tobytes()] for row in shard.inputs]
        hidden = [
            truth for truth, label in zip(truths, shard.labels.tolist(), strict=True) if label == drawn.slot
        ]
        assert set(hidden) == {drawn.classes[secret]}
        assert set(truths) - {drawn.classes[secret]} <= set(range(10)) - set(drawn.classes)
    counts = np.bincount(drawn.secrets, minlength=5)
    # Five standard deviations: a false alarm in 3e-6 of all seeds.
    assert (abs(counts - 400) < 5 * (2000 * 0.2 * 0.8) ** 0.5).all()
    again = draw_classes(scenario, 1, 2000, seed=0)
    assert again.secrets.tolist() == drawn.secrets.tolist()
    assert draw_classes(scenario, 1, 2000, seed=1).secrets.tolist() != drawn.secrets.tolist()


def _pairs(records: Any) -> tuple[Any, Any]:
    return records.inputs, records.labels


def test_every_candidate_record_meets_the_same_known_ones() -> None:
    scenario = game().scenario
    secret = draw_records(scenario, 0, candidates=4, trials=10, shadows=6, seed=0)
    assert len(secret.known) == len(scenario.devices[0].train) - 1
    assert (len(secret.candidates), len(secret.public), secret.secrets.shape) == (4, 6, (10,))
    held_out = {row.numpy().tobytes() for row in scenario.test.inputs}
    assert all(row.numpy().tobytes() in held_out for row in secret.candidates.inputs)
    shard = secret.shard(type(secret.known)(secret.candidates.inputs[:1], secret.candidates.labels[:1]))
    assert torch.equal(shard.inputs[:-1], secret.known.inputs)


def test_games_refuse_what_cannot_be_played() -> None:
    scenario = game().scenario
    with pytest.raises(ConfigError, match="device=3"):
        draw_classes(scenario, 3, 10, 0)
    with pytest.raises(ConfigError, match="device=3"):
        draw_records(scenario, 3, candidates=2, trials=10, shadows=2, seed=0)
    with pytest.raises(ConfigError, match=r"data\.gap=withheld"):
        draw_classes(replace(scenario, gap_classes=(3,)), 0, 10, 0)
    with pytest.raises(DataError, match="held-out"):
        draw_records(scenario, 0, candidates=10_000, trials=10, shadows=2, seed=0)
    bare = without_classes(scenario.test, scenario.gap_classes[:1])
    with pytest.raises(DataError, match="no private or no held-out"):
        draw_classes(replace(scenario, test=bare), 0, 10, 0)


def test_only_the_audited_device_holds_the_class(replays: Replays) -> None:
    assert replays.class_trials.answers.shape[:2] == (12, 1)
    assert replays.class_others.shape[:2] == (2, 1)
    slot = replays.classes.slot
    seen = paired_answers(replays, "per_client_logits")
    assert seen.excess.max() > 0.5 > 2 * replays.class_others[..., slot].numpy().max()


def test_equal_candidates_meet_equal_randomness(replays: Replays) -> None:
    """The record replays share their streams across candidates: with one candidate twice, they are equal."""
    secret = replays.records
    shard = secret.shard(type(secret.known)(secret.candidates.inputs[:1], secret.candidates.labels[:1]))
    side = replays.side
    played = side.replay([shard] * 3, [0] * 3, 0, "twin", lambda done, of: None, [0, 1, 0]).answers
    assert torch.allclose(played[0], played[2], atol=1e-5)
    assert not torch.allclose(played[0], played[1], atol=1e-5)


def test_replays_are_read_back(replays: Replays, monkeypatch: pytest.MonkeyPatch) -> None:
    first = replays.record_trials
    again = Replays(replays.side, replays.cache.folder, FEW, Silent())
    monkeypatch.setattr(ReplayContext, "replay", None)
    assert torch.equal(again.record_trials.answers, first.answers)


def test_every_view_of_a_run_is_found(finished: Path) -> None:
    with RunFolder.resume(finished) as folder:
        report = audit_reconstruction(folder, FEW, Silent())
    secure = finished.name == "secure"
    wires = ["secure_sum", "secure_sum_colluding"] if secure else ["per_client_logits"]
    views = list(dict.fromkeys(finding.view for finding in report.findings))
    assert views == [*wires, "student", *(["gradient"] if secure else [])]
    for finding in report.findings:
        of_class = finding.target.startswith("the class")
        assert finding.success.chance == pytest.approx(1 / 5 if of_class else 1 / 3)
        bounded = secure and not (of_class and finding.view == "student")
        assert finding.verdict == ("within bound" if bounded else "no bound claimed")
        assert finding.unit is (Unit.DEVICE if of_class else finding.unit)
        assert (finding.ssim is None) == (finding.view == "gradient")
    assert len(report.grids) == len(report.findings) - secure
    for name in report.grids:
        with Image.open(finished / name) as grid:
            assert grid.format == "PNG"
        assert (finished / name).stat().st_size < 150_000


def test_the_class_that_plain_answers_show_is_picked(plain: Path) -> None:
    """Chance is 1/5: 12 of 24 right come by chance in one of a thousand seeds."""
    request = replace(FEW, view="per_client_logits", attack="class-prototype", trials=24)
    with RunFolder.resume(plain) as folder:
        (finding,) = audit_reconstruction(folder, request, Silent()).findings
    assert finding.success.estimate >= 0.5
    assert finding.likeness is not None
    assert finding.likeness.reconstruction_ssim > finding.likeness.public_ssim


def test_the_teacher_is_a_view_of_its_own(plain: Path) -> None:
    request = replace(FEW, view="teacher", attack="class-prototype")
    with RunFolder.resume(plain) as folder:
        report = audit_reconstruction(folder, request, Silent())
    assert [finding.view for finding in report.findings] == ["teacher"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"view": "wire"}, "view='wire'"),
        ({"attack": "guess"}, "attack='guess'"),
        ({"trials": 2}, "trials=2"),
        ({"shadows": 1}, "shadows=1"),
        ({"candidates": 1}, "candidates=1"),
        ({"device": -1}, "device=-1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_a_bad_request_is_one_line(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ReconstructionRequest(**given)


def test_what_the_run_lacks_is_refused_or_left_out() -> None:
    withheld = game()
    with pytest.raises(ConfigError, match="plain channel the cloud sees per_client_logits"):
        plan_attacks(withheld, ReconstructionRequest(view="secure_sum"))
    with pytest.raises(ConfigError, match="without DP-SGD"):
        plan_attacks(withheld, ReconstructionRequest(view="gradient"))
    with pytest.raises(ConfigError, match="view per_client_logits takes one of"):
        plan_attacks(withheld, ReconstructionRequest(view="per_client_logits", attack="informed-adversary"))
    whole = game(**{"data.gap": "none"})
    wanted, notes = plan_attacks(whole, ReconstructionRequest())
    assert {attack for _, attack in wanted} == {"prior-matching", "informed-adversary"}
    assert "data.gap=withheld" in notes[0]
    with pytest.raises(ConfigError, match="lacks no class"):
        plan_attacks(whole, ReconstructionRequest(attack="paired-logits"))


def table(tmp_path: Path) -> Path:
    """Binary profiles of six classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(600) % 6
    profiles = (rng.random((600, 30)) < np.where(rng.random((6, 30)) < 0.3, 0.9, 0.1)[labels]).astype(
        np.uint8
    )
    np.savez(tmp_path / "profiles.npz", x=profiles, y=labels)
    return tmp_path / "profiles.npz"


def test_tables_have_their_attributes_rebuilt(tmp_path: Path) -> None:
    source = {"data.source": str(table(tmp_path)), "data.records_per_device": 60, "data.proxy_records": 100}
    path = _finished("plain", tmp_path / "run", **source)
    with RunFolder.resume(path) as folder:
        report = audit_reconstruction(folder, FEW, Silent())
        with pytest.raises(ConfigError, match="in place of the image decoders"):
            audit_reconstruction(folder, replace(FEW, attack="paired-logits"), Silent())
    assert {finding.attack for finding in report.findings} == {
        "class-prototype",
        "prior-matching",
        "informed-adversary",
    }
    assert not report.grids
    assert "attributes are rebuilt" in report.notes[0]
    for finding in report.findings:
        assert finding.ssim is None
        assert finding.attributes is not None
        assert 0 < finding.attributes.constant < 1
    drawn = next(f for f in report.findings if f.attack == "class-prototype")
    assert drawn.attributes is not None
    assert drawn.attributes.advantage > 0


KEYS = {"view", "attack", "unit", "neighbouring_relation", "prior", "reidentification", "ceiling", "verdict"}


def test_the_command_prints_one_object_and_writes_it(plain: Path) -> None:
    arguments = ["audit", "reconstruction", str(plain), "--view", "student", "--attack", "class-prototype"]
    result = CliRunner().invoke(app, [*arguments, *OPTIONS, "--json"])
    assert result.exit_code == 0, result.output
    tree = json.loads(result.stdout)
    (found,) = tree["views"]
    assert found.keys() >= KEYS
    assert found["ceiling"] is None
    assert found["tpr_at_fpr"]["reason"].startswith("TPR at FPR 5 % needs at least 200")
    assert tree == json.loads((plain / "audit" / "reconstruction.json").read_text())
    shown = CliRunner().invoke(app, [*arguments, *OPTIONS])
    assert "no bound" in shown.stdout
    assert "refused" in shown.stdout
    assert tree["grids"][0] in shown.stdout


def test_a_run_whose_mechanism_is_broken_ends_in_exit_code_3(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's ledger claims epsilon 3; the installed step adds a fifth of the noise."""
    if finished.name != "secure":
        pytest.skip("the run without DP claims nothing")
    sound = audits.reconstructions.audit.train_cohort

    def broken(models: Any, shards: Any, logits: Any, mechanism: Any, sources: Any) -> Any:
        less = replace(mechanism, noise_multiplier=mechanism.noise_multiplier / 5)
        return sound(models, shards, logits, less, sources)

    monkeypatch.setattr(audits.reconstructions.audit, "train_cohort", broken)
    arguments = ["audit", "reconstruction", str(finished), "--view", "gradient", "--json", *OPTIONS]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == AuditAlarm.exit_code == 3
    assert {found["verdict"] for found in json.loads(result.stdout)["views"]} == {"ALARM"}
    assert "the ledger allows at most" in result.stderr


def test_bad_arguments_end_in_one_line_and_exit_code_2(tmp_path: Path, plain: Path) -> None:
    for arguments in (
        [str(tmp_path)],
        [str(plain), "--view", "secure_sum"],
        [str(plain), "--attack", "guess"],
        [str(plain), "--trials", "many"],
        [str(plain), "--device", "9", *OPTIONS],
    ):
        result = CliRunner().invoke(app, ["audit", "reconstruction", *arguments])
        assert result.exit_code == 2, arguments
        assert len([line for line in result.stderr.splitlines() if "privkd:" in line]) == 1


def finding(**changes: Any) -> ReconstructionFinding:
    success = Success(0.5, 0.4, 0.6, 0.1, 100, 0.95)
    fields: dict[str, Any] = {
        "view": "student",
        "attack": "prior-matching",
        "target": "one record of the device",
        "unit": Unit.RECORD,
        "prior": "uniform over 10 records",
        "success": success,
        "ceiling": 0.45,
        "attributes": None,
        "tpr_at_fpr": None,
        "likeness": None,
        "alarm_low": 0.41,
    }
    return ReconstructionFinding(**fields | changes)


def test_only_success_above_the_ceiling_and_its_interval_is_an_alarm() -> None:
    assert alarm_of([finding(), finding(alarm_low=0.9, ceiling=None)]) is None
    said = alarm_of([finding(), finding(alarm_low=0.46)])
    assert re.search(r"in at least 46 % of the trials .* at most 45 %", str(said))


def test_what_does_not_apply_is_null() -> None:
    report = ReconstructionReport(run="run", channel="plain", findings=(finding(),), grids=(), notes=())
    (tree,) = report.tree()["views"]
    assert tree["ssim"] is tree["attributes"] is tree["public_already_looks_like_this"] is None


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_grids_show_each_target_first_and_equal_ones_are_equal_files(channels: int) -> None:
    rng = np.random.default_rng(0)
    images, public = rng.random((30, channels, 8, 8)), rng.random((20, channels, 8, 8))
    secrets = np.arange(30) % 4
    drawn = Drawn(images, rng.random((4, channels, 8, 8)), rng.random((30, 4)), secrets)
    grid = draw_grid(finding(), drawn, public)
    assert grid == draw_grid(finding(), drawn, public)
    with Image.open(BytesIO(grid)) as picture:
        assert picture.width > picture.height
