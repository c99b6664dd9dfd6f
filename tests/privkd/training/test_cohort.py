"""What the cohort computes equals what each student computes by itself."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privkd.config import DpSgdConfig, FitConfig, ModelConfig
from privkd.data.scenario import LabelledSet
from privkd.models.zoo import build
from privkd.privacy.randomness import SeededRandomness, seeded_generator
from privkd.training.dpsgd import Mechanism, train_private, train_unprotected
from privkd.training.fit import logits_of
from privkd.training.vectorised import (
    cohort_answers,
    fit_cohort,
    formulation,
    group_by_architecture,
    same_architecture,
    train_cohort,
)
from privkd.training.vectorised.clipping import ghost_norms
from privkd.training.vectorised.memory import flushed_denormals

SHAPE, CLASSES = (1, 8, 8), 10
STEPS = 50
SIZES = (40, 7, 0, 23)


class Own(nn.Module):
    """A user's module that is no sequence of known layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))
        self.first = nn.Linear(64, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.sin(self.first(x.flatten(1) * 2)))
        return out


def students(name: str, count: int) -> list[nn.Module]:
    config = ModelConfig(name=name, width=32)
    return [build(config, input_shape=SHAPE, classes=CLASSES, seed=seed) for seed in range(count)]


def shards(sizes: Sequence[int] = SIZES) -> list[LabelledSet]:
    generator = torch.Generator().manual_seed(5)
    return [
        LabelledSet(
            torch.rand((size, *SHAPE), generator=generator),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for size in sizes
    ]


def teachers(held: Sequence[LabelledSet]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    return [torch.randn((len(shard), CLASSES), generator=generator) for shard in held]


def farthest(ours: Sequence[nn.Module], theirs: Sequence[nn.Module]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(
        float((a - b).abs().max())
        for one, other in pairs
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


def by_opacus(
    models: Sequence[nn.Module], held: Sequence[LabelledSet], soft: list[Tensor] | None, mechanism: Mechanism
) -> list[nn.Module]:
    return [
        train_private(model, shard, None if soft is None else soft[i], mechanism, SeededRandomness(3, "d", i))
        for i, (model, shard) in enumerate(zip(models, held, strict=True))
    ]


def mechanism_of(recipe: DpSgdConfig, alpha: float = 0.3) -> Mechanism:
    return Mechanism(recipe, noise_multiplier=1.1, expected_batch_size=12.0, alpha=alpha, temperature=2.0)


RECIPES = {
    "sgd, large batches": DpSgdConfig(steps=STEPS, sampling_rate=0.6, learning_rate=0.3),
    "momentum, tail average": DpSgdConfig(
        steps=STEPS, sampling_rate=0.3, learning_rate=0.1, momentum=0.9, averaging=0.25
    ),
    "adam": DpSgdConfig(steps=STEPS, sampling_rate=0.3, learning_rate=0.005, optimizer="adam"),
    "many empty batches": DpSgdConfig(steps=STEPS, sampling_rate=0.02, learning_rate=0.1),
    "head alone": DpSgdConfig(steps=STEPS, sampling_rate=0.5, learning_rate=0.3, part="head"),
    "last block alone": DpSgdConfig(steps=STEPS, sampling_rate=0.5, learning_rate=0.3, part="last_block"),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_private_training_equals_opacus(name: str, recipe: DpSgdConfig) -> None:
    models, held = students(name, len(SIZES)), shards()
    mechanism = mechanism_of(recipe)
    before = [copy.deepcopy(model.state_dict()) for model in models]
    ours = train_cohort(
        models, held, teachers(held), mechanism, [SeededRandomness(3, "d", i) for i in range(len(SIZES))]
    )
    assert farthest(ours, by_opacus(models, held, teachers(held), mechanism)) < 1e-5
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_loss_mix_is_the_students_own(alpha: float) -> None:
    models, held = students("mlp", 2), shards((20, 9))
    mechanism = mechanism_of(RECIPES["sgd, large batches"], alpha)
    ours = train_cohort(
        models, held, teachers(held), mechanism, [SeededRandomness(3, "d", i) for i in range(2)]
    )
    assert farthest(ours, by_opacus(models, held, teachers(held), mechanism)) < 1e-5


@pytest.mark.parametrize(
    "make", [lambda: students("resnet", 2), lambda: [Own(), Own()]], ids=["resnet", "own"]
)
def test_other_architectures_equal_opacus(make: object) -> None:
    assert callable(make)
    models, held = make(), shards((11, 6))
    if formulation(models[0], SHAPE) == "loop":
        pytest.fail("a module of ordinary layers must be vectorised")
    recipe = DpSgdConfig(steps=8, sampling_rate=0.5, learning_rate=0.1)
    if isinstance(models[0], Own):  # Opacus knows no bare parameters: train the layers alone.
        recipe = recipe.model_copy(update={"part": "last_block"})
    mechanism = mechanism_of(recipe)
    ours = train_cohort(models, held, None, mechanism, [SeededRandomness(3, "d", i) for i in range(2)])
    assert farthest(ours, by_opacus(models, held, None, mechanism)) < 1e-5


@pytest.mark.parametrize("frozen", ["block1", "block3.1.bias"])
def test_frozen_parameters_stay_frozen(frozen: str) -> None:
    """A whole layer, and one of a layer's two parameters; as a factory may leave them."""
    models, held = students("cnn", 2), shards((20, 9))
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
    mechanism = mechanism_of(DpSgdConfig(steps=10, sampling_rate=0.6, learning_rate=0.3))
    ours = train_cohort(models, held, None, mechanism, [SeededRandomness(3, "d", i) for i in range(2)])
    assert farthest(ours, by_opacus(models, held, None, mechanism)) < 1e-5
    for before, after in zip(models, ours, strict=True):
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
            assert old.requires_grad == new.requires_grad
            assert torch.equal(old, new) == name.startswith(frozen)


def product_norms(inputs: Tensor, outputs: Tensor) -> Tensor:
    """The twin of a ghost norm: the gradients themselves, in double precision."""
    a = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=2).double()
    return torch.bmm(outputs.double().transpose(1, 2), a).flatten(1).square().sum(1)


def test_ghost_norms_equal_the_gradients_norms() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn((50, 9, 30), generator=generator)
    outputs = torch.randn((50, 9, 20), generator=generator)
    found = ghost_norms(inputs, outputs, bias=True)
    torch.testing.assert_close(found.double(), product_norms(inputs, outputs), rtol=1e-5, atol=0)


@pytest.mark.parametrize("left_over", [1e-2, 3e-4, 1e-5, 0.0])
def test_a_record_whose_positions_cancel_is_not_clipped_too_little(left_over: float) -> None:
    """Positions with almost the same input and opposite output gradients: adversarial for float32."""
    generator = torch.Generator().manual_seed(0)
    inputs = 10 + left_over * torch.randn((200, 8, 30), generator=generator)
    half = torch.randn((200, 4, 20), generator=generator)
    outputs = torch.cat([half, -half], dim=1)
    exact = product_norms(inputs, outputs)
    safe = ghost_norms(inputs, outputs, bias=True).double()
    assert (safe >= 0.999 * exact).all()
    gram = torch.bmm(inputs, inputs.transpose(1, 2)) + 1
    bare = (gram * torch.bmm(outputs, outputs.transpose(1, 2))).sum((1, 2)).double()
    if 0 < left_over < 1e-3:  # the test's power: float32 alone falls far below
        assert (bare < 0.5 * exact).any()


def test_chunks_change_nothing() -> None:
    models, held = students("cnn", 4), shards()
    mechanism = mechanism_of(DpSgdConfig(steps=10, sampling_rate=0.5, learning_rate=0.1))

    def train(budget: int) -> list[nn.Module]:
        randomness = [SeededRandomness(3, "d", i) for i in range(4)]
        return train_cohort(models, held, None, mechanism, randomness, memory_budget=budget)

    assert farthest(train(1 << 30), train(1)) < 1e-5


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_training_without_dp_equals_one_by_one(name: str) -> None:
    """In double precision: Adam blows up the rounding of a gradient that is itself near zero."""
    models = [model.double() for model in students(name, len(SIZES))]
    held = [LabelledSet(shard.inputs.double(), shard.labels) for shard in shards()]
    soft = [logits.double() for logits in teachers(held)]
    config = FitConfig(steps=STEPS, batch_size=8, learning_rate=2e-3, weight_decay=0.01)
    generators = [seeded_generator(1, i) for i in range(len(SIZES))]
    ours = fit_cohort(models, held, soft, config, generators, alpha=0.4, temperature=2.0)
    theirs = [
        train_unprotected(m, s, t, config, seeded_generator(1, i), alpha=0.4, temperature=2.0)
        for i, (m, s, t) in enumerate(zip(models, held, soft, strict=True))
    ]
    assert farthest(ours, theirs) < 1e-10


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
def test_answers_equal_each_students_own(name: str) -> None:
    models = students(name, 3)
    queries = torch.rand((17, *SHAPE), generator=torch.Generator().manual_seed(2))
    expected = torch.stack([logits_of(model, queries) for model in models])
    torch.testing.assert_close(
        torch.stack(list(cohort_answers(models, queries))), expected, atol=1e-5, rtol=1e-5
    )


def test_a_wrong_clip_norm_is_noticed() -> None:
    """The power of the comparison above: clipping a tenth higher is far outside its tolerance."""
    models, held = students("mlp", 2), shards((20, 9))
    recipe = RECIPES["sgd, large batches"]
    wrong = mechanism_of(recipe.model_copy(update={"clip_norm": 1.1 * recipe.clip_norm}))
    ours = train_cohort(models, held, None, wrong, [SeededRandomness(3, "d", i) for i in range(2)])
    assert farthest(ours, by_opacus(models, held, None, mechanism_of(recipe))) > 1e-3


def test_architectures_are_told_apart() -> None:
    mixed = [*students("mlp", 2), *students("cnn", 1), *students("mlp", 1)]
    assert group_by_architecture(mixed) == [[0, 1, 3], [2]]
    assert same_architecture(mixed[:2])
    assert not same_architecture(mixed)


def test_tied_parameters_are_an_architecture_of_their_own() -> None:
    def pair() -> nn.Sequential:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, CLASSES))

    loose, tied = pair(), pair()
    tied[2].weight = tied[1].weight
    assert not same_architecture([loose, tied])


class Switched(nn.Module):
    """Computes what its settings say, and they can be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = {"slope": 1.0}
        self.first = nn.Linear(64, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1))
        out: Tensor = self.head(F.leaky_relu(hidden, self.settings["slope"]))
        return out


def test_a_plan_is_not_kept_for_settings_that_may_change() -> None:
    held, mechanism = shards((20, 9)), mechanism_of(DpSgdConfig(steps=5, sampling_rate=0.5))
    torch.manual_seed(0)
    model = Switched()
    for slope in (1.0, 0.0):
        model.settings["slope"] = slope
        randomness = [SeededRandomness(3, "d", i) for i in range(2)]
        ours = train_cohort([model, model], held, None, mechanism, randomness)
        assert farthest(ours, by_opacus([model, model], held, None, mechanism)) < 1e-5
        assert ours[0].settings == {"slope": slope}
        assert ours[0].settings is not model.settings


class Counted(nn.Linear):
    """Says itself how it is copied."""

    copies = 0

    def __deepcopy__(self, memo: dict[int, object]) -> "Counted":
        type(self).copies += 1
        twin = Counted(self.in_features, self.out_features)
        twin.load_state_dict(self.state_dict())
        return twin


@pytest.mark.parametrize("last", [nn.Linear, Counted])
def test_trained_models_are_whole_copies(last: type[nn.Linear]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8, bias=False), nn.Tanh(), last(8, CLASSES)).train()
    model[1].register_forward_hook(lambda *_: None)
    mechanism = mechanism_of(DpSgdConfig(steps=5, sampling_rate=0.5))
    randomness = [SeededRandomness(3, "d", i) for i in range(2)]
    one, two = train_cohort([model, model], shards((20, 9)), None, mechanism, randomness)
    for twin in (one, two):
        assert type(twin[3]) is last
        assert not any(module.training for module in twin.modules())
        assert all(p.grad is None and p.requires_grad and p.is_leaf for p in twin.parameters())
        assert len(twin[1]._forward_hooks) == 1
        assert twin[1]._forward_hooks is not model[1]._forward_hooks
    memory = [p.untyped_storage().data_ptr() for m in (model, one, two) for p in m.parameters()]
    assert len(set(memory)) == len(memory)
    assert model.training


def test_denormals_are_flushed_only_while_training() -> None:
    with flushed_denormals():
        assert torch.tensor(1e-40).mul(1.0) == 0
    assert torch.tensor(1e-40).mul(1.0) != 0
