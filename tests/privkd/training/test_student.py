"""One device's DP-SGD against a loop over records, and the guarantees that rest on it."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from opacus.layers import DPLSTM
from scipy import stats
from torch import Tensor, nn

from privkd.config import DpSgdConfig, FitConfig, ModelConfig
from privkd.data.scenario import LabelledSet
from privkd.errors import ModelError
from privkd.models.zoo import build, trained_parameters
from privkd.privacy.noise import NoiseRoot
from privkd.privacy.randomness import SeededRandomness, SystemRandomness
from privkd.training.dpsgd import (
    GradSampleMode,
    Mechanism,
    TailAverage,
    check_trainable,
    fastest_mode,
    seconds_per_step,
    train_private,
    train_unprotected,
    with_capped_learning_rate,
)
from privkd.training.losses import forward_loss
from privkd.training.vectorised import train_cohort

SHAPE, CLASSES = (1, 6, 6), 3
MODES: tuple[GradSampleMode, ...] = ("hooks", "functorch", "ew")


@dataclass
class Supplied:
    """Noise and samples that were decided beforehand, and a record of what was asked for."""

    chosen: Sequence[Tensor]
    noises: Sequence[Tensor]
    asked: list[tuple[int, float]] = field(default_factory=list)

    def sample(self, records: int, sampling_rate: float) -> Tensor:
        self.asked.append((records, sampling_rate))
        return self.chosen[len(self.asked) - 1][:records]

    def samples(self, steps: int, records: int, sampling_rate: float) -> Tensor:
        return torch.stack([self.sample(records, sampling_rate) for _ in range(steps)])

    def noise(self, size: int) -> Tensor:
        return self.noises[len(self.asked) - 1][:size]


def supplied(steps: int, *, rate: float = 0.6, noise: float = 1.0, seed: int = 0) -> Supplied:
    generator = torch.Generator().manual_seed(seed)
    samples = [torch.rand(64, generator=generator) < rate for _ in range(steps)]
    noises = [noise * torch.randn(100_000, generator=generator) for _ in range(steps)]
    return Supplied(samples, noises)


def recipe(**changes: Any) -> DpSgdConfig:
    settings = {
        "sampling_rate": 0.6, "steps": 3, "clip_norm": 0.5, "learning_rate": 0.3, "momentum": 0.0,
        "optimizer": "sgd", "part": "all", "averaging": 0.0,
    }  # fmt: skip
    return DpSgdConfig(**{**settings, **changes})


def mechanism(
    noise_multiplier: float = 0.7, *, batch: float = 5.0, alpha: float = 0.3, **changes: Any
) -> Mechanism:
    return Mechanism(recipe(**changes), noise_multiplier, batch, alpha, temperature=2.0)


def shard(records: int = 9, seed: int = 0) -> LabelledSet:
    generator = torch.Generator().manual_seed(seed)
    return LabelledSet(torch.rand(records, *SHAPE, generator=generator), torch.arange(records) % CLASSES)


def teacher_logits(records: int = 9) -> Tensor:
    return torch.randn(records, CLASSES, generator=torch.Generator().manual_seed(7))


def student(name: str = "cnn", seed: int = 0, activation: str = "tanh") -> nn.Module:
    return build(
        ModelConfig(name=name, width=8, activation=activation), input_shape=SHAPE, classes=CLASSES, seed=seed
    )


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def naive(
    model: nn.Module, data: LabelledSet, targets: Tensor | None, how: Mechanism, source: Supplied
) -> nn.Module:
    """Abadi et al. 2016, Algorithm 1, record by record, with a public normaliser."""
    trained = copy.deepcopy(model).train()
    parameters = trained_parameters(trained, how.recipe.part)
    velocity = [torch.zeros_like(p) for p in parameters]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    iterates, scale = [], how.noise_multiplier * how.recipe.clip_norm
    for step in range(1, how.recipe.steps + 1):
        chosen = source.sample(len(data), how.recipe.sampling_rate).nonzero().flatten().tolist()
        sums = [torch.zeros_like(p) for p in parameters]
        for i in chosen:
            trained.zero_grad()
            loss = forward_loss(
                trained(data.inputs[i : i + 1]), data.labels[i : i + 1],
                None if targets is None else targets[i : i + 1],
                alpha=how.alpha, temperature=how.temperature,
            )  # fmt: skip
            loss.sum().backward()
            gradients = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in parameters]
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
            for total, g in zip(sums, gradients, strict=True):
                total += g * min(1.0, how.recipe.clip_norm / norm)
        noise = source.noise(sum(p.numel() for p in parameters)).split([p.numel() for p in parameters])
        with torch.no_grad():
            for j, (p, total, z) in enumerate(zip(parameters, sums, noise, strict=True)):
                g = (total + scale * z.view_as(p)) / how.expected_batch_size
                if how.recipe.optimizer == "adam":
                    first, second = moments[j]
                    first.mul_(0.9).add_(g, alpha=0.1)
                    second.mul_(0.999).add_(g * g, alpha=0.001)
                    g = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
                else:
                    velocity[j] = how.recipe.momentum * velocity[j] + g
                    g = velocity[j]
                p -= how.recipe.learning_rate * g
        iterates.append([p.detach().clone() for p in parameters])
    last = max(1, round(how.recipe.averaging * how.recipe.steps))
    with torch.no_grad():
        for j, p in enumerate(parameters):
            p.copy_(torch.stack([iterate[j] for iterate in iterates[-last:]]).mean(0))
    return trained.eval()


class TestAgainstTheLoop:
    @pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
    @pytest.mark.parametrize("part", ["all", "last_block", "head"])
    def test_architectures_and_parts(self, name: str, part: str) -> None:
        how = mechanism(part=part)
        ours = train_private(student(name), shard(), teacher_logits(), how, supplied(3))
        torch.testing.assert_close(
            flat(ours),
            flat(naive(student(name), shard(), teacher_logits(), how, supplied(3))),
            atol=1e-5,
            rtol=0,
        )

    @pytest.mark.parametrize(
        "changes",
        [
            {"momentum": 0.9},
            {"optimizer": "adam", "learning_rate": 0.01},
            {"averaging": 1.0},
            {"averaging": 0.5, "steps": 5},
            {"clip_norm": 100.0},
            {"clip_norm": 1e-3},
            {"sampling_rate": 1.0},
            {"alpha": 0.0},
            {"alpha": 1.0},
            {"batch": 0.37},
        ],
    )
    def test_settings(self, changes: dict[str, Any]) -> None:
        how = mechanism(**changes)
        steps = how.recipe.steps
        ours = train_private(student("mlp"), shard(), teacher_logits(), how, supplied(steps))
        twin = naive(student("mlp"), shard(), teacher_logits(), how, supplied(steps))
        torch.testing.assert_close(flat(ours), flat(twin), atol=1e-5, rtol=0)

    def test_without_a_teacher(self) -> None:
        how = mechanism()
        ours = train_private(student("mlp"), shard(), None, how, supplied(3))
        torch.testing.assert_close(
            flat(ours), flat(naive(student("mlp"), shard(), None, how, supplied(3))), atol=1e-5, rtol=0
        )

    def test_empty_samples_take_a_step_of_noise(self) -> None:
        how = mechanism()
        source = supplied(3)
        source = Supplied([torch.zeros_like(s) for s in source.chosen], source.noises)
        ours = train_private(student("mlp"), shard(), teacher_logits(), how, source)
        step = 0.3 * 0.7 * 0.5 / 5.0
        expected = flat(student("mlp")) - step * sum(z[: len(flat(ours))] for z in source.noises)
        torch.testing.assert_close(flat(ours), expected, atol=1e-5, rtol=0)


class TestPublicNormaliser:
    def test_an_empty_shard_moves_by_noise_alone_of_the_predicted_size(self) -> None:
        """Learning rate x noise multiplier x clip norm / expected batch, whatever the shard holds."""
        how = mechanism(1.3, batch=4.0, steps=1, clip_norm=0.25, learning_rate=2.0)
        start, source = student("mlp"), supplied(1)
        moved = flat(train_private(start, shard(0), teacher_logits(0), how, source)) - flat(start)
        expected = -2.0 * 1.3 * 0.25 / 4.0 * source.noises[0][: len(moved)]
        torch.testing.assert_close(moved, expected, atol=1e-6, rtol=0)

    def test_one_record_more_moves_the_sum_by_at_most_the_clip_norm(self) -> None:
        """The sensitivity of a step, for "add or remove one record", with all else held."""
        how = mechanism(steps=1, sampling_rate=1.0, clip_norm=0.5, learning_rate=1.0, batch=5.0)
        everyone = Supplied([torch.ones(64, dtype=torch.bool)], supplied(1).noises)
        fewer, more = shard(8), shard(9)
        fewer = LabelledSet(more.inputs[:8], more.labels[:8])
        with_it = flat(train_private(student("mlp"), more, teacher_logits(9), how, everyone))
        everyone.asked.clear()
        without = flat(train_private(student("mlp"), fewer, teacher_logits(9)[:8], how, everyone))
        distance = float((with_it - without).norm()) * 5.0
        assert distance <= 0.5 + 1e-5
        assert distance > 0.4, "the test has power: the gradient was longer than the clip norm"

    def test_the_sampling_rate_is_the_recipes(self) -> None:
        source = supplied(3)
        train_private(student("mlp"), shard(), None, mechanism(sampling_rate=0.123), source)
        assert source.asked == [(9, 0.123)] * 3


class TestNoise:
    def test_standard_deviation(self) -> None:
        """Noise multiplier x clip norm / expected batch, added after clipping; the false-alarm rate of the
        chi-square interval is 1e-6, and a sigma of 2/3 or 3/2 of it would be refused."""
        how = mechanism(1.5, batch=8.0, steps=1, clip_norm=0.1, learning_rate=1.0)
        start = build(ModelConfig(name="mlp", width=64), input_shape=SHAPE, classes=CLASSES, seed=0)
        trained = train_private(start, shard(0), None, how, SeededRandomness(3, "a"))
        moved = (flat(trained) - flat(start)).double().numpy()
        sigma = 1.5 * 0.1 / 8.0

        def plausible(claimed: float) -> bool:
            low, high = stats.chi2(len(moved)).ppf([5e-7, 1 - 5e-7])
            return low <= (moved**2).sum() / claimed**2 <= high

        assert plausible(sigma)
        assert not plausible(sigma * 2 / 3)
        assert not plausible(sigma * 3 / 2)

    def test_every_step_and_every_parameter_has_its_own(self) -> None:
        source = SeededRandomness(1, "x")
        one, two = source.noise(500), source.noise(500)
        assert not torch.equal(one, two)
        assert len(set(one.tolist())) == 500

    @pytest.mark.parametrize("engine", ["opacus", "cohort"])
    @pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
    @pytest.mark.parametrize("value", [math.inf, math.nan, 3e38, 1e25])
    def test_no_record_betrays_itself_by_breaking_the_sum(self, engine: str, name: str, value: float) -> None:
        """A gradient that is not finite has no clipped form; left in, it would turn the model to NaN."""
        poisoned = shard()
        poisoned.inputs[4] = value
        poisoned.inputs[4, 0, 0] = -value
        how = mechanism(sampling_rate=1.0)
        source = Supplied([torch.ones(64, dtype=torch.bool)] * 3, supplied(3).noises)
        if engine == "opacus":
            trained = train_private(student(name), poisoned, None, how, source)
        else:
            (trained,) = train_cohort([student(name)], [poisoned], None, how, [source])
        assert flat(trained).isfinite().all()

    @pytest.mark.parametrize("engine", ["opacus", "cohort"])
    def test_and_its_influence_stays_bounded(self, engine: str) -> None:
        """Beside the eight sound records, a ninth that breaks moves one step by at most the clip norm."""
        sound = LabelledSet(shard().inputs[:8], shard().labels[:8])
        poisoned = shard()
        poisoned.inputs[8] = math.inf
        how = mechanism(steps=1, sampling_rate=1.0, learning_rate=1.0)
        weights = []
        for data in (sound, poisoned):
            source = Supplied([torch.ones(64, dtype=torch.bool)], supplied(1).noises)
            if engine == "opacus":
                weights.append(flat(train_private(student("mlp"), data, None, how, source)))
            else:
                weights.append(flat(train_cohort([student("mlp")], [data], None, how, [source])[0]))
        assert float((weights[0] - weights[1]).norm()) * 5.0 <= 0.5 + 1e-5


class TestQuieted:
    def test_noise_limits_the_step(self) -> None:
        """Lowered until learning rate x noise multiplier x clip norm / expected batch is the limit."""
        wild = recipe(learning_rate=8.0, step_noise=0.2, clip_norm=0.5)
        quiet = with_capped_learning_rate(wild, noise_multiplier=10.0, expected_batch_size=5.0)
        assert quiet.learning_rate * 10.0 * 0.5 / 5.0 == pytest.approx(0.2)
        assert quiet.model_copy(update={"learning_rate": 8.0}) == wild

    def test_and_leaves_quiet_steps_alone(self) -> None:
        gentle = recipe(learning_rate=0.1, step_noise=0.2, clip_norm=0.5)
        assert with_capped_learning_rate(gentle, noise_multiplier=1.0, expected_batch_size=5.0) == gentle
        assert with_capped_learning_rate(gentle, noise_multiplier=0.0, expected_batch_size=5.0) == gentle

    def test_and_adam(self) -> None:
        adam = recipe(learning_rate=8.0, step_noise=1e-3, optimizer="adam")
        assert with_capped_learning_rate(adam, noise_multiplier=10.0, expected_batch_size=5.0) == adam


class TestWhatItLeavesAlone:
    @pytest.mark.parametrize("part", ["head", "last_block"])
    def test_the_rest_of_the_student_is_bit_identical(self, part: str) -> None:
        start = student()
        trained = train_private(start, shard(), teacher_logits(), mechanism(part=part), supplied(3))
        kept = {id(p) for p in trained_parameters(start, part)}  # type: ignore[arg-type]
        for before, after in zip(start.parameters(), trained.parameters(), strict=True):
            assert torch.equal(before, after) == (id(before) not in kept)

    def test_its_arguments(self) -> None:
        start, data, targets = student(), shard(), teacher_logits()
        weights, inputs, logits = flat(start).clone(), data.inputs.clone(), targets.clone()
        train_private(start, data, targets, mechanism(), supplied(3))
        assert torch.equal(flat(start), weights)
        assert torch.equal(data.inputs, inputs)
        assert torch.equal(targets, logits)
        assert not any(hasattr(p, "grad_sample") for p in start.parameters())

    def test_the_result_is_a_plain_model(self) -> None:
        trained = train_private(student(), shard(), teacher_logits(), mechanism(part="head"), supplied(3))
        assert type(trained) is nn.Sequential
        assert not trained.training
        for parameter in trained.parameters():
            assert parameter.requires_grad
            assert parameter.grad is None
            assert not hasattr(parameter, "grad_sample")
        assert not any(module._forward_hooks or module._backward_hooks for module in trained.modules())
        copy.deepcopy(trained)(shard().inputs).sum().backward()

    def test_the_global_generator(self) -> None:
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        check_trainable(student(), input_shape=SHAPE, classes=CLASSES, recipe=recipe())
        train_private(student(), shard(), teacher_logits(), mechanism(), SeededRandomness(0))
        assert torch.equal(torch.rand(4), expected)


class TestTailAverage:
    @pytest.mark.parametrize(
        ("steps", "share", "expected"),
        [(4, 0.5, 3.5), (4, 0.0, 4.0), (4, 1.0, 2.5), (1, 0.5, 1.0), (5, 0.2, 5.0)],
    )
    def test_mean_of_the_last(self, steps: int, share: float, expected: float) -> None:
        parameter = nn.Parameter(torch.zeros(2))
        average = TailAverage([parameter], steps=steps, share=share)
        for step in range(1, steps + 1):
            with torch.no_grad():
                parameter.fill_(float(step))
            average.update([parameter])
        assert parameter[0].item() == steps, "the iterates are left alone until the end"
        average.write([parameter])
        torch.testing.assert_close(parameter.detach(), torch.full((2,), expected))


class TestUnprotected:
    def test_equals_plain_adam(self) -> None:
        config = FitConfig(steps=4, batch_size=5, learning_rate=0.01)
        ours = train_unprotected(
            student("mlp"),
            shard(),
            teacher_logits(),
            config,
            torch.Generator().manual_seed(1),
            alpha=0.3,
            temperature=2.0,
        )
        twin, batches = student("mlp").train(), torch.Generator().manual_seed(1)
        optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.0)
        for step in range(4):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 4)
            chosen = torch.randint(9, (5,), generator=batches)
            optimizer.zero_grad()
            losses = [
                forward_loss(
                    twin(shard().inputs[i : i + 1]), shard().labels[i : i + 1], teacher_logits()[i : i + 1],
                    alpha=0.3, temperature=2.0,
                )
                for i in chosen.tolist()
            ]  # fmt: skip
            (sum(losses).sum() / 5).backward()  # type: ignore[union-attr]
            optimizer.step()
        torch.testing.assert_close(flat(ours), flat(twin), atol=1e-5, rtol=0)

    def test_an_empty_shard_leaves_the_student_as_it_was(self) -> None:
        ours = train_unprotected(
            student(), shard(0), None, FitConfig(steps=3), torch.Generator(), alpha=0.3, temperature=2.0
        )
        assert torch.equal(flat(ours), flat(student()))


class Mixing(nn.Module):
    """Centres its batch, without any layer that would tell."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.linear(x - x.mean(0))


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cells = kind(6, 5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x[:, 0])[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = x[:, 0]
        return self.head(self.attention(rows, rows, rows)[0].flatten(1))


class Raising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("only made\nfor answering")
        return self.head(x.flatten(1))


def around(layer: nn.Module) -> nn.Module:
    """A convolution, the layer, a head."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.Flatten(), nn.Linear(64, CLASSES))


class TestModes:
    @pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
    @pytest.mark.parametrize("part", ["all", "head"])
    def test_every_mode_computes_the_same(self, name: str, part: str) -> None:
        how = mechanism(part=part)
        by_mode = [
            flat(train_private(student(name), shard(), teacher_logits(), how, supplied(3), mode=mode))
            for mode in MODES
        ]
        for other in by_mode[1:]:
            torch.testing.assert_close(other, by_mode[0], atol=1e-5, rtol=0)

    def test_a_layer_that_is_called_often(self) -> None:
        how, model = mechanism(), Recurrent(DPLSTM)
        expected = flat(naive(model, shard(), None, how, supplied(3)))
        ours = flat(train_private(model, shard(), None, how, supplied(3)))
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("mode", MODES)
    def test_an_empty_sample_and_a_broken_record_in_every_mode(self, mode: GradSampleMode) -> None:
        data = shard()
        data.inputs[2] = math.inf
        source = replace(supplied(3), chosen=[torch.arange(64) < limit for limit in (0, 9, 3)])
        trained = train_private(student("mlp"), data, None, mechanism(), source, mode=mode)
        rest = [i for i in range(9) if i != 2]
        without = replace(supplied(3), chosen=[torch.arange(64) < limit for limit in (0, 8, 2)])
        sane = LabelledSet(data.inputs[rest], data.labels[rest])
        expected = train_private(student("mlp"), sane, None, mechanism(), without, mode=mode)
        torch.testing.assert_close(flat(trained), flat(expected), atol=1e-5, rtol=0)

    @pytest.mark.parametrize(
        ("model", "expected"),
        [
            (student("cnn"), "ew"),
            (around(nn.GroupNorm(2, 4)), "ew"),
            (around(nn.PReLU()), "hooks"),
        ],
    )
    def test_the_fastest_that_knows_the_layers(self, model: nn.Module, expected: str) -> None:
        before = torch.get_rng_state()
        assert fastest_mode(model.train(), shard().inputs, mechanism()) == expected
        assert torch.equal(torch.get_rng_state(), before)
        assert all(p.grad is None and not hasattr(p, "grad_sample") for p in model.parameters())


class TestFrozenParameters:
    @pytest.mark.parametrize("frozen", ["block1.1.weight", "block1.1", "block3"])
    @pytest.mark.parametrize("mode", MODES)
    def test_stay_frozen(self, frozen: str, mode: GradSampleMode) -> None:
        model = student("cnn")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        trained = train_private(model, shard(), teacher_logits(), mechanism(), supplied(3), mode=mode)
        for (name, before), after in zip(model.named_parameters(), trained.parameters(), strict=True):
            assert before.requires_grad == after.requires_grad
            assert torch.equal(before, after) == name.startswith(frozen)

    def test_a_part_without_anything_to_train_is_refused(self) -> None:
        model = student("mlp")
        for parameter in model.get_submodule("head").parameters():
            parameter.requires_grad_(False)
        with pytest.raises(ModelError, match="nothing to train"):
            check_trainable(model, input_shape=SHAPE, classes=CLASSES, recipe=recipe(part="head"))


class TestCheckTrainable:
    def check(self, model: nn.Module, **changes: Any) -> None:
        check_trainable(model, input_shape=SHAPE, classes=CLASSES, recipe=recipe(**changes))

    @pytest.mark.parametrize(
        ("model", "expected"),
        [
            (around(nn.BatchNorm2d(4)), r"layer '1' \(BatchNorm2d\): use GroupNorm"),
            (around(nn.SyncBatchNorm(4)), r"layer '1' \(SyncBatchNorm\): use GroupNorm"),
            (nn.Sequential(nn.Flatten(), torch.nn.utils.weight_norm(nn.Linear(36, CLASSES))),
             r"layer '1' \(Linear\): use torch.nn.utils.parametrizations.weight_norm"),
            (Recurrent(nn.LSTM), r"layer 'cells' \(LSTM\): use opacus.layers.DPLSTM"),
            (Recurrent(nn.GRU), r"layer 'cells' \(GRU\): use opacus.layers.DPGRU"),
            (Attention(), r"\(MultiheadAttention\): use opacus.layers.DPMultiheadAttention"),
            (nn.Sequential(nn.InstanceNorm2d(1), Recurrent(nn.LSTM)), r"layer '1.cells' \(LSTM\)"),
            (Mixing(), "depends on the other records of the batch"),
            (Raising(), "it fails on public records: only made for answering"),
            (nn.Flatten(), "nothing to train"),
        ],
    )  # fmt: skip
    def test_names_the_layer_and_the_cure(self, model: nn.Module, expected: str) -> None:
        with pytest.raises(ModelError, match=expected) as refused:
            self.check(model)
        assert len(str(refused.value).splitlines()) == 1

    @pytest.mark.parametrize(
        "model",
        [
            around(nn.GroupNorm(2, 4)),
            around(nn.ReLU()),
            around(nn.ReLU(inplace=True)),
            around(nn.InstanceNorm2d(4)),
            around(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
            around(nn.Dropout(0.5)),
            Recurrent(DPLSTM),
            nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.PReLU(), nn.Flatten(), nn.Linear(64, CLASSES)
            ),
            nn.Sequential(
                nn.Flatten(), nn.LayerNorm(36), nn.Linear(36, 8), nn.PReLU(), nn.Linear(8, CLASSES)
            ),
        ],
    )
    @pytest.mark.parametrize("part", ["all", "head"])
    def test_lets_good_models_through_unchanged(self, model: nn.Module, part: str) -> None:
        before = flat(model)
        self.check(model, part=part)
        assert torch.equal(flat(model), before)

    @pytest.mark.parametrize("changes", [{"clip_norm": 1e-6}, {"sampling_rate": 1e-4}, {"steps": 1000}])
    def test_the_recipe_does_not_matter(self, changes: dict[str, Any]) -> None:
        self.check(student(), **changes)

    def test_says_how_long_a_step_takes(self) -> None:
        seconds = seconds_per_step(
            student(), inputs=torch.rand(3, *SHAPE), classes=CLASSES, recipe=recipe(), batch=20
        )
        assert math.isfinite(seconds)
        assert seconds > 0


class TestSystemNoise:
    def test_trains_a_student(self) -> None:
        def trained(how: Mechanism, round: int) -> Tensor:
            source = SystemRandomness(NoiseRoot.from_seed(2), "device-0000", round)
            return flat(train_private(student("mlp"), shard(), None, how, source))

        how = mechanism()
        assert torch.equal(trained(how, 0), trained(how, 0))
        assert not torch.equal(trained(how, 0), trained(how, 1))
        assert not torch.equal(trained(how, 0), trained(replace(how, noise_multiplier=0.9), 0))
