"""The mechanism audit passes every sound mechanism and rejects every broken one, by one code path.

False alarms: each bound exceeds the truth with probability at most 0.1 % (confidence 99.9 %), and each
upper bound is at least the truth, so all sound cases of this file together raise one in at most 1 % of all
seeds; the seeds are fixed.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from torch import Tensor, nn
from typer.testing import CliRunner

import audits.mechanism
from audits.gradient import DpSgdStep, Scores, bound_one_run, dirac_scores, noised_sums, one_by_one, probe
from audits.mechanism import (
    RHO,
    Level,
    audit_channel,
    audit_dirac,
    audit_dp_sgd,
    noised_release,
    secure_release,
)
from audits.release import Floats
from audits.verdict import Finding, raise_alarm
from audits.worlds import DpSgdGame, ObserveSums, ReleaseMany, fitted_log_ratio, observed
from cli import app
from privkd.accounting import calibrate_noise_multiplier, price
from privkd.cohort import train_cohort
from privkd.config import DpSgdConfig
from privkd.data.scenario import LabelledSet
from privkd.errors import AuditAlarm, ModelError
from privkd.events import DpSgd
from privkd.randomness import Randomness
from privkd.student import Mechanism, check_trainable

LEVEL = Level(confidence=0.999)
FULL = DpSgdGame(noise_multiplier=4.0, sampling_rate=1.0, steps=4, base=4, runs=600)
POISSON = DpSgdGame(noise_multiplier=2.0, sampling_rate=0.5, steps=8, base=0, runs=800)
Models, Shards, Sources = Sequence[nn.Module], Sequence[LabelledSet], Sequence[Randomness]


def with_mechanism(change: Callable[[Mechanism], Mechanism]) -> DpSgdStep:
    """DP-SGD under a mechanism that differs from the claimed one."""

    def step(models: Models, shards: Shards, logits: None, mechanism: Mechanism, sources: Sources) -> Models:
        return train_cohort(models, shards, logits, change(mechanism), sources)

    return step


def no_clipping(mechanism: Mechanism) -> Mechanism:
    """A clip norm that never binds, under noise of the claimed size."""
    loose = mechanism.recipe.clip_norm * 1e6
    recipe = mechanism.recipe.model_copy(update={"clip_norm": loose})
    return replace(mechanism, recipe=recipe, noise_multiplier=mechanism.noise_multiplier / 1e6)


def private_length(
    models: Models, shards: Shards, logits: None, mechanism: Mechanism, sources: Sources
) -> Models:
    """The expected batch size is taken from the private data set."""
    own = replace(mechanism, expected_batch_size=float(len(shards[0])))
    return train_cohort(models, shards, logits, own, sources)


class SameNoise:
    """Draws noise once and repeats it."""

    kept: dict[int, Tensor] = {}  # noqa: RUF012

    def __init__(self, source: Randomness) -> None:
        self.source = source

    def sample(self, records: int, sampling_rate: float) -> Tensor:
        return self.source.sample(records, sampling_rate)

    def samples(self, steps: int, records: int, sampling_rate: float) -> Tensor:
        return self.source.samples(steps, records, sampling_rate)

    def noise(self, size: int) -> Tensor:
        return self.kept.setdefault(id(self.source), self.source.noise(size))


def with_sources(wrap: Callable[[Randomness], Randomness]) -> DpSgdStep:
    def step(models: Models, shards: Shards, logits: None, mechanism: Mechanism, sources: Sources) -> Models:
        return train_cohort(models, shards, logits, mechanism, [wrap(source) for source in sources])

    return step


def by_hand(
    gradients: Callable[[LabelledSet], Tensor],
    after: Callable[[Tensor, Mechanism], Tensor],
    noise: float = 1.0,
) -> DpSgdStep:
    """A full-batch step of its own: ``after`` turns the gradients ``[record, class, feature]`` into a sum."""

    def step(models: Models, shards: Shards, logits: None, mechanism: Mechanism, sources: Sources) -> Models:
        total = after(gradients(shards[0]), mechanism)
        scale = noise * mechanism.noise_multiplier * mechanism.recipe.clip_norm
        trained = []
        for source in sources:
            model = nn.Linear(total.shape[1], 2, bias=False)
            noised = total + scale * source.noise(total.numel()).view_as(total)
            model.weight.data = -noised / mechanism.expected_batch_size
            trained.append(model)
        return trained

    return step


def probe_gradients(shard: LabelledSet) -> Tensor:
    """Of a probe at zero with two classes: ``(p - y) x``."""
    residual = 0.5 - torch.nn.functional.one_hot(shard.labels, 2).float()
    return residual[:, :, None] * shard.inputs[:, None, :]


def batch_normed(shard: LabelledSet) -> Tensor:
    """Likewise behind a batch normalisation, which lets one record move all others' gradients."""
    normed = nn.BatchNorm1d(shard.inputs.shape[1], affine=False).train()(shard.inputs.sign())
    return probe_gradients(LabelledSet(normed * 1e3, shard.labels))


def clipped_sum(gradients: Tensor, mechanism: Mechanism) -> Tensor:
    norms = gradients.flatten(1).norm(dim=1).clamp_min(1e-12)
    kept = (mechanism.recipe.clip_norm / norms).clamp(max=1)
    return (gradients * kept[:, None, None]).sum(0)


def clipped_mean(gradients: Tensor, mechanism: Mechanism) -> Tensor:
    """Clip the average instead of each gradient; scaled back to a sum."""
    return clipped_sum(gradients.mean(0, keepdim=True), mechanism) * mechanism.expected_batch_size


BROKEN_DP_SGD: dict[str, tuple[DpSgdStep, DpSgdGame]] = {
    "sensitivity divided by the batch size": (
        with_mechanism(lambda m: replace(m, noise_multiplier=m.noise_multiplier / m.expected_batch_size)),
        FULL,
    ),
    "no noise": (with_mechanism(lambda m: replace(m, noise_multiplier=0.0)), FULL),
    "no clipping": (with_mechanism(no_clipping), FULL),
    "noise / sqrt(T)": (
        by_hand(probe_gradients, clipped_sum, noise=1 / FULL.steps**0.5),
        replace(FULL, runs=3000),
    ),
    "batch size from the private length": (private_length, FULL),
    "clipping after averaging": (by_hand(probe_gradients, clipped_mean), replace(FULL, base=1, runs=3000)),
    "BatchNorm left in": (by_hand(batch_normed, clipped_sum), FULL),
    "noise seed reused": (with_sources(SameNoise), replace(POISSON, noise_multiplier=4.0)),
}


class NotRunning:
    """Stands for the secure channel's processes, which are audited elsewhere."""

    def __init__(self, opened: object, seed: int) -> None:
        pass

    def checks(self) -> tuple[()]:
        return ()

    def close(self) -> None:
        pass


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`privkd audit mechanism` with another DP-SGD or noised channel installed, and sound ones elsewhere."""
    sound = audit_channel(noised_release(RHO, 5), "sound", LEVEL, seed=1, runs=200)
    for name in ("audit_dirac", "audit_running"):
        monkeypatch.setattr(audits.mechanism, name, lambda *_, **__: sound)
    monkeypatch.setattr(audits.mechanism, "RunningChannel", NotRunning)

    def run(**installed: object) -> Result:
        for name in {"audit_channel", "GAMES"} - installed.keys():
            monkeypatch.setattr(audits.mechanism, name, () if name == "GAMES" else lambda *_, **__: sound)
        for name, value in installed.items():
            monkeypatch.setattr(audits.mechanism, name, value)
        return CliRunner().invoke(app, ["audit", "mechanism"])

    return run


@pytest.mark.parametrize("name", BROKEN_DP_SGD)
def test_a_broken_dp_sgd_is_rejected_by_the_command(name: str, command: Callable[..., Result]) -> None:
    step, game = BROKEN_DP_SGD[name]
    result = command(train_cohort=step, GAMES=(game,))
    assert result.exit_code == AuditAlarm.exit_code
    assert "ALARM" in result.stdout
    assert "epsilon is at least" in result.stderr


@pytest.mark.parametrize(
    ("step", "game"),
    [
        (train_cohort, FULL),
        (train_cohort, POISSON),
        (by_hand(probe_gradients, clipped_sum), replace(FULL, runs=3000)),
    ],
    ids=["cohort, full batch", "cohort, Poisson", "by hand"],
)
def test_a_sound_dp_sgd_passes(step: DpSgdStep, game: DpSgdGame) -> None:
    assert audit_dp_sgd(observed(step), game, "sound", LEVEL, seed=1).verdict == "within bound"


Deal = Callable[[tuple[int, int], int, np.random.Generator], tuple[Floats, Floats]]
"""Of one epoch's batches ``[run, step]`` and so many other records: how many of those each batch has, and
whether it has the canary, if that is there."""


def in_batches(deal: Deal) -> ObserveSums:
    """Clipped, summed and noised over batches that ``deal`` picks, all runs and steps at once."""

    def observe(shard: LabelledSet, game: DpSgdGame, seed: int) -> Tensor:
        rng = np.random.default_rng(seed % 2**63)
        gradients = probe_gradients(shard).flatten(1)
        clipped = gradients / gradients.norm(dim=1, keepdim=True).clamp_min(game.clip_norm)
        epoch = round(1 / game.sampling_rate)
        dealt = [deal((game.runs, epoch), game.base, rng) for _ in range(game.steps // epoch)]
        others, place = (torch.from_numpy(np.concatenate(part, axis=1)) for part in zip(*dealt, strict=True))
        total = others[..., None] * clipped[0]
        if len(shard) > game.base:
            total += place[..., None] * clipped[-1]
        return total + game.noise_multiplier * torch.from_numpy(rng.standard_normal(total.shape))

    return observe


def poisson(batches: tuple[int, int], others: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    rate = 1 / batches[1]
    return rng.binomial(others, rate, batches).astype(float), (rng.random(batches) < rate).astype(float)


def in_order(batches: tuple[int, int], others: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Batches of one record in the records' order, as a plain loader deals them; the canary is the last."""
    place = np.zeros(batches)
    place[:, -1] = 1.0
    return 1 - place, place


def reshuffled(batches: tuple[int, int], others: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """The same in a new order every epoch, as a shuffling loader does."""
    runs, steps = batches
    place = (np.arange(steps) == rng.integers(0, steps, (runs, 1))).astype(float)
    return 1 - place, place


BATCHES = DpSgdGame(noise_multiplier=1.0, sampling_rate=1 / 32, steps=320, base=31, runs=40_000, features=2)


@pytest.mark.parametrize(
    ("deal", "runs"), [(in_order, 4_000), pytest.param(reshuffled, 40_000, marks=pytest.mark.slow)]
)
def test_fixed_batches_accounted_as_poisson_are_rejected_by_the_command(
    deal: Deal, runs: int, command: Callable[..., Result]
) -> None:
    result = command(observed=lambda step: in_batches(deal), GAMES=(replace(BATCHES, runs=runs),))
    assert result.exit_code == AuditAlarm.exit_code, result.output


@pytest.mark.slow
def test_poisson_batches_pass() -> None:
    sound = audit_dp_sgd(in_batches(poisson), BATCHES, "poisson", LEVEL, seed=1)
    assert sound.verdict == "within bound"
    # Power: a bound of nothing would pass every sampler.
    assert sound.epsilon_lower > 0.2 * sound.epsilon_upper


def softmax_only(blocks: Tensor) -> Floats:
    """Noise on the softmax, beside logits as they are."""
    noised = noised_release(RHO, seed=3)(blocks.softmax(-1))
    return np.concatenate([noised.reshape(len(blocks), -1), blocks.reshape(len(blocks), -1).numpy()], axis=1)


def unclipped(blocks: Tensor) -> Floats:
    """The channel's noise on answers that nobody clipped."""
    return noised_release(RHO, seed=3)(torch.zeros_like(blocks)) + blocks.numpy()


BROKEN_CHANNELS = {
    "unclipped logits": unclipped,
    "noise on the softmax only": softmax_only,
    "noised channel without noise": noised_release(None, seed=3),
    "secure aggregation with zero noise": secure_release(None, seed=3),
    "a third of the noise": noised_release(RHO * 9, seed=3),
}


@pytest.mark.parametrize("name", BROKEN_CHANNELS)
def test_a_broken_channel_is_rejected_by_the_command(name: str, command: Callable[..., Result]) -> None:
    def quick(release: ReleaseMany, *given: Any, runs: int) -> Finding:
        return audit_channel(release, *given, runs=1000)

    result = command(audit_channel=quick, noised_release=lambda rho, seed: BROKEN_CHANNELS[name])
    assert result.exit_code == AuditAlarm.exit_code, result.output
    assert "ALARM" in result.stdout


@pytest.mark.parametrize("release", [noised_release, secure_release])
def test_a_sound_channel_passes(release: Callable[[float, int], Callable[[Tensor], Floats]]) -> None:
    finding = audit_channel(release(RHO, 5), "sound", LEVEL, seed=1, runs=1500)
    assert finding.verdict == "within bound"
    # Power: a bound of nothing would pass every channel.
    assert finding.epsilon_lower > 0.5 * finding.epsilon_upper


@pytest.mark.parametrize("step", [train_cohort, one_by_one])
def test_orthogonal_canaries_come_near_the_ledger(step: DpSgdStep) -> None:
    finding = audit_dirac(step, "sound", Level(), seed=0, canaries=10_000)
    assert 0.8 * finding.epsilon_upper < finding.epsilon_lower <= finding.epsilon_upper


def test_gradient_canaries_audit_within_a_tenth_of_the_ledger() -> None:
    finding = audit_dirac(train_cohort, "sound", Level(), seed=0, canaries=100_000)
    assert 0.9 * finding.epsilon_upper < finding.epsilon_lower <= finding.epsilon_upper


def test_one_run_of_a_student_at_epsilon_four_shows_more_than_1_8() -> None:
    recipe = DpSgdConfig(steps=10, sampling_rate=1.0)
    noise = calibrate_noise_multiplier(epsilon=4.0, delta=1e-5, sampling_rate=1.0, steps=10)
    mechanism = Mechanism(recipe, noise, 140.0, 0.1, 2.0)
    scores = dirac_scores(train_cohort, mechanism, recipe.steps, canaries=10_000, block=250, seed=0)
    lower = bound_one_run(scores, sampling_rate=1.0, delta=1e-5, confidence=0.95)
    assert 1.8 < lower < price([DpSgd(noise, 1.0, 10)], 1e-5).high


def test_one_run_finds_nothing_in_scores_without_signal() -> None:
    rng = np.random.default_rng(0)
    scores = Scores(rng.normal(size=2000), rng.random(2000) < 0.5)
    assert bound_one_run(scores, sampling_rate=1.0, delta=1e-5, confidence=0.999) == 0.0


def test_noised_sums_read_the_clipped_gradient_back() -> None:
    mechanism = Mechanism(
        DpSgdConfig(steps=1, clip_norm=3.0, momentum=0.0, averaging=0.0), 0.0, 7.0, 0.0, 1.0
    )
    shard = LabelledSet(torch.tensor([[5e3, 0.0]]), torch.tensor([0]))
    trained = by_hand(probe_gradients, clipped_sum)([probe(2)], [shard], None, mechanism, [_Zeros()])
    assert noised_sums(trained, mechanism).flatten().tolist() == pytest.approx([-(0.5**0.5), 0, 0.5**0.5, 0])


class _Zeros:
    def sample(self, records: int, sampling_rate: float) -> Tensor:
        return self.samples(1, records, sampling_rate)[0]

    def samples(self, steps: int, records: int, sampling_rate: float) -> Tensor:
        return torch.ones((steps, records), dtype=torch.bool)

    def noise(self, size: int) -> Tensor:
        return torch.zeros(size)


def test_a_constant_feature_does_not_break_the_fit() -> None:
    ratio = fitted_log_ratio(np.zeros((50, 2)), np.column_stack([np.ones(50), np.zeros(50)]))
    assert ratio(np.array([[1.0, 0.0]]))[0] > 100 > -100 > ratio(np.array([[0.0, 0.0]]))[0]


def test_batch_norm_is_refused_before_any_training() -> None:
    student = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    with pytest.raises(ModelError, match="GroupNorm"):
        check_trainable(student, input_shape=(3,), classes=2, recipe=DpSgdConfig())


def test_a_finding_without_a_claim_is_no_alarm() -> None:
    finding = audit_channel(noised_release(None, 0), "plain", LEVEL, seed=1, runs=200)
    claimed: Finding = finding.against(float("inf"))
    assert claimed.verdict == "no bound claimed"
    raise_alarm([claimed])
