"""The mechanism audit passes every sound mechanism and rejects every broken one, by one code path.

False alarms: each bound exceeds the truth with probability at most 0.1 % (confidence 99.9 %), each upper
bound is at least the truth, and all checks of one audit fail with probability at most 1e-6. So the 20 sound
cases of this file together raise one in at most 2 % of all seeds; the seeds are fixed.
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

import audits.mechanism_audit
import privkd.channels.channel
import privkd.engines.simulation
import privkd.training.vectorised.cohort
from audits.estimators.validation import Floats
from audits.findings import Finding, alarm_of
from audits.mechanism_audit import (
    Examined,
    Level,
    audit_channel,
    audit_devices,
    audit_dp_sgd,
    audit_records,
    released_by,
)
from audits.mechanisms.canaries import (
    DpSgdStep,
    Scores,
    bound_many_trials,
    bound_one_run,
    dirac_scores,
    noised_sums,
    probe,
)
from audits.mechanisms.neighbours import DpSgdGame, ObserveSums, ReleaseMany, fitted_log_ratio, observed
from cli import app
from privkd.channels.channel import NoisedChannel
from privkd.channels.registry import Canaries
from privkd.config import DpSgdConfig, load_config
from privkd.data.scenario import LabelledSet
from privkd.engines.simulation import Simulation
from privkd.errors import AuditAlarm, ModelError
from privkd.prepared import Prepared, prepare
from privkd.privacy.accounting import calibrate_noise_multiplier, price
from privkd.privacy.events import DpSgd, Unit
from privkd.privacy.noise import NoiseRoot
from privkd.privacy.randomness import Randomness, SeededRandomness, SystemRandomness
from privkd.training.dpsgd import Mechanism, check_trainable
from privkd.training.vectorised import train_cohort
from privkd.training.vectorised.layers import Conv2d

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


CLIP_NORM, RHO = 2.0, 0.5


def noised_release(rho: float | None, seed: int) -> ReleaseMany:
    """The noised channel by itself; each run is a device of its own."""
    return released_by(NoisedChannel(CLIP_NORM, rho, NoiseRoot.from_seed(seed)))


def audited(release: ReleaseMany, runs: int) -> Finding:
    return audit_channel(release, "noised", LEVEL, seed=1, runs=runs, clip_norm=CLIP_NORM, rho=RHO)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`privkd audit mechanism` with little in its tables, and ``installed`` in the module of its name."""
    sound = Examined(audited(noised_release(RHO, 5), runs=200))
    monkeypatch.setattr(audits.mechanism_audit, "_audit_noised_worlds", lambda level, seed: sound)
    for name, nothing in (("TRAININGS", ()), ("CHANNELS", {}), ("GAMES", ())):
        monkeypatch.setattr(audits.mechanism_audit, name, nothing)

    def run(**installed: object) -> Result:
        for name, value in installed.items():
            monkeypatch.setattr(audits.mechanism_audit, name, value)
        return CliRunner().invoke(app, ["audit", "mechanism"])

    return run


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[DpSgdStep], None]:
    """Puts another DP-SGD where the devices are trained."""

    def put(step: DpSgdStep) -> None:
        def called(*given: Any, progress: object) -> Models:
            return step(*given)

        monkeypatch.setattr(privkd.engines.simulation, "train_cohort", called)

    return put


@pytest.mark.parametrize("name", BROKEN_DP_SGD)
def test_a_broken_dp_sgd_is_rejected_by_the_command(
    name: str, command: Callable[..., Result], install: Callable[[DpSgdStep], None]
) -> None:
    step, game = BROKEN_DP_SGD[name]
    install(step)
    result = command(GAMES=(game,))
    assert result.exit_code == AuditAlarm.exit_code
    assert "ALARM" in result.stdout
    assert "epsilon is at least" in result.stderr


@pytest.mark.parametrize(
    ("step", "game"),
    [
        (train_cohort, FULL),
        (train_cohort, POISSON),
        (train_cohort, replace(FULL, noise="system")),
        (train_cohort, replace(POISSON, noise="system")),
        (by_hand(probe_gradients, clipped_sum), replace(FULL, runs=3000)),
    ],
    ids=["cohort, full batch", "cohort, Poisson", "system, full batch", "system, Poisson", "by hand"],
)
def test_a_sound_dp_sgd_passes(
    step: DpSgdStep, game: DpSgdGame, install: Callable[[DpSgdStep], None]
) -> None:
    install(step)
    run = prepare(load_config(None, [f"privacy.noise={game.noise}"]))
    finding = audit_dp_sgd(observed(run.randomness_of), game, "sound", LEVEL, seed=1)
    assert finding.verdict == "within bound"


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
    result = command(observed=lambda randomness_of: in_batches(deal), GAMES=(replace(BATCHES, runs=runs),))
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
    "a third of the noise": noised_release(RHO * 9, seed=3),
}


@pytest.mark.parametrize("name", BROKEN_CHANNELS)
def test_a_broken_channel_is_rejected(name: str) -> None:
    assert "epsilon is at least" in str(alarm_of([audited(BROKEN_CHANNELS[name], runs=1000)]))


def test_a_sound_channel_passes() -> None:
    finding = audited(noised_release(RHO, 5), runs=1500)
    assert finding.verdict == "within bound"
    # Power: a bound of nothing would pass every channel.
    assert finding.epsilon_lower > 0.5 * finding.epsilon_upper


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_the_open_noised_channel_is_rejected_with_less_noise(
    factor: float, command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = privkd.channels.channel.discrete_gaussian

    def scaled(*given: Any) -> Any:
        return (factor * drawn(*given)).astype(np.int64)

    monkeypatch.setattr(privkd.channels.channel, "discrete_gaussian", scaled)
    result = command(
        CHANNELS={"noised": ("channel.kind=noised",)}, canaries_over=lambda settings: Canaries(devices=1000)
    )
    assert result.exit_code == AuditAlarm.exit_code, result.output
    assert "ALARM" in result.stdout
    assert "FAILS: noised, devices side by side: the channel's noise has the claimed" in result.stdout


def test_the_open_noised_channel_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audits.mechanism_audit, "canaries_over", lambda settings: Canaries(devices=4000))
    found = audit_devices("noised", LEVEL, seed=0)
    assert not rejected(found), found
    assert found.finding.unit is Unit.DEVICE
    assert 0.6 * found.finding.epsilon_upper < found.finding.epsilon_lower


MLP = ("student.models=[{name='mlp', width=8}]", "student.dp.part=all", "student.dp.steps=3")
SYSTEM, OPACUS, SOME = "privacy.noise=system", "student.engine=opacus", "student.dp.sampling_rate=0.2"


def rejected(examined: Examined) -> bool:
    """By an alarm or by a failed check."""
    return examined.finding.verdict == "ALARM" or not all(check.passed for check in examined.checks)


def scaled_noise(source: type[SeededRandomness | SystemRandomness], factor: float) -> Any:
    drawn = source.noise
    return source, "noise", lambda self, size: factor * drawn(self, size)


def fleet_of(change: Callable[[Mechanism], Mechanism]) -> Any:
    """The devices are trained under another mechanism than the claimed one."""
    trained = Simulation.train_private

    def train(self: Simulation, students: Any, targets: Any, mechanism: Mechanism, *rest: Any) -> Any:
        return trained(self, students, targets, change(mechanism), *rest)

    return Simulation, "train_private", train


def one_source(of_round: bool) -> Any:
    """The same for all rounds, or for all devices."""

    def randomness(self: Prepared, device: str, round: int) -> Randomness:
        label = (device,) if of_round else (round,)
        return SeededRandomness(self.config.seed, "device", *label)

    return Prepared, "_randomness", randomness


def in_turn(self: SystemRandomness, steps: int, records: int, sampling_rate: float) -> Tensor:
    """Batches in the records' order, at the claimed rate."""
    return (torch.arange(records) + torch.arange(steps)[:, None]) % round(1 / sampling_rate) == 0


def twice_clipped(mechanism: Mechanism) -> Mechanism:
    recipe = mechanism.recipe.model_copy(update={"clip_norm": 2 * mechanism.recipe.clip_norm})
    return replace(mechanism, recipe=recipe, noise_multiplier=mechanism.noise_multiplier / 2)


CNN = ("student.models=[{name='cnn', width=8}]", "student.dp.part=all", "student.dp.steps=2")
UNPROVED = (CNN[0].replace("8", "7"), *CNN[1:])
"""Of a width that no other test has, as what is found out about an architecture is kept."""


def whole_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their norms count for nothing when a record is clipped, and the proof of the gradients is blind."""
    booked = Conv2d.book

    def book(self: Conv2d, *given: Any) -> Any:
        found = booked(self, *given)
        norms = found.squared_norms
        object.__setattr__(found, "squared_norms", lambda: 0 * norms())
        return found

    monkeypatch.setattr(Conv2d, "book", book)
    monkeypatch.setattr(privkd.training.vectorised.cohort, "agree", lambda *_: True)


BROKEN_PATHS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "system noise halved": (lambda: scaled_noise(SystemRandomness, 0.5), (*MLP, SYSTEM)),
    "system noise missing": (lambda: scaled_noise(SystemRandomness, 0.0), (*MLP, SYSTEM, SOME)),
    "seeded noise halved, Opacus": (lambda: scaled_noise(SeededRandomness, 0.5), (*MLP, OPACUS)),
    "the fleet adds half of the noise": (
        lambda: fleet_of(lambda m: replace(m, noise_multiplier=m.noise_multiplier / 2)),
        MLP,
    ),
    "the fleet clips at twice the norm": (lambda: fleet_of(twice_clipped), MLP),
    "the same noise in every round": (lambda: one_source(of_round=True), MLP),
    "the same noise on every device": (lambda: one_source(of_round=False), MLP),
    "batches in turn": (lambda: (SystemRandomness, "samples", in_turn), (*MLP, SYSTEM, SOME)),
}


@pytest.mark.parametrize("name", BROKEN_PATHS)
def test_a_fault_on_the_devices_path_is_rejected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, settings = BROKEN_PATHS[name]
    monkeypatch.setattr(audits.mechanism_audit, "_TRIALS", {"cohort": 1000, "opacus": 500})
    monkeypatch.setattr(*fault())
    assert rejected(audit_records(settings, LEVEL, seed=0))


def test_convolutions_that_are_not_clipped_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audits.mechanism_audit, "_TRIALS", {"cohort": 1000})
    whole_convolutions(monkeypatch)
    found = audit_records(UNPROVED, LEVEL, seed=0)
    assert rejected(found)
    assert not found.checks[0].passed, "a record moves the sum by more than the clip norm"


@pytest.mark.parametrize(
    "settings",
    [MLP, (*MLP, SYSTEM), (*MLP, SYSTEM, SOME), (*MLP, OPACUS), CNN],
    ids=["default", "system", "subsampled", "Opacus", "CNN"],
)
def test_the_sound_path_passes(settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audits.mechanism_audit, "_TRIALS", {"cohort": 3000, "opacus": 1500})
    found = audit_records(settings, LEVEL, seed=0)
    assert not rejected(found), found
    assert 2.9 < found.finding.epsilon_upper < 3
    # Power: a bound of nothing would pass every path. Subsampled, so few canaries tell little.
    assert SOME in settings or found.finding.epsilon_lower > 0.3 * found.finding.epsilon_upper


@pytest.mark.slow
@pytest.mark.parametrize("settings", audits.mechanism_audit.TRAININGS)
def test_what_is_installed_comes_near_the_ledger(settings: tuple[str, ...]) -> None:
    found = audit_records(settings, LEVEL, seed=0)
    assert not rejected(found), found
    assert SOME in settings or found.finding.epsilon_lower > 0.4 * found.finding.epsilon_upper


def test_gradient_canaries_audit_within_a_tenth_of_the_ledger() -> None:
    mechanism = Mechanism(DpSgdConfig(sampling_rate=1.0), 1.0, 100.0, 0.0, 1.0)
    scores = dirac_scores(train_cohort, mechanism, 1, canaries=100_000, block=250, seed=0)
    lower = bound_many_trials(scores, sampling_rate=1.0, delta=1e-5, confidence=0.95, seed=0)
    upper = price([DpSgd(1.0, 1.0, 1)], 1e-5).high
    assert 0.9 * upper < lower <= upper


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
    finding = audited(noised_release(None, 0), runs=200)
    claimed: Finding = finding.against(float("inf"))
    assert claimed.verdict == "no bound claimed"
    assert alarm_of([claimed]) is None
