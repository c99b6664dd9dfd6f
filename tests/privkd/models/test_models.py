"""Models by name and by factory: shapes, seeds, parts, and refusals."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from privkd.config import ModelConfig
from privkd.errors import ConfigError, ModelError
from privkd.models.zoo import Residual, build, parameter_count, trained_parameters

IMAGES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 4, 4), (2, 12, 13), (1, 5, 64)]
TABLES = [(30,), (1,), (2, 3, 3), (4, 9), (7, 3, 50)]


def logits(model: nn.Module, shape: tuple[int, ...], records: int = 3) -> Tensor:
    with torch.no_grad():
        return model(torch.rand(records, *shape, generator=torch.Generator().manual_seed(1)))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class TestNamed:
    @pytest.mark.parametrize("shape", IMAGES)
    @pytest.mark.parametrize("name", ["auto", "mlp", "cnn", "resnet"])
    def test_images(self, name: str, shape: tuple[int, ...]) -> None:
        model = build(ModelConfig(name=name, width=8), input_shape=shape, classes=10, seed=0)
        assert logits(model, shape).shape == (3, 10)
        assert logits(model, shape).isfinite().all()

    @pytest.mark.parametrize("shape", TABLES)
    def test_anything_else_by_default_is_an_mlp(self, shape: tuple[int, ...]) -> None:
        model = build(ModelConfig(), input_shape=shape, classes=2, seed=0)
        twin = build(ModelConfig(name="mlp"), input_shape=shape, classes=2, seed=0)
        assert logits(model, shape).shape == (3, 2)
        assert torch.equal(flat(model), flat(twin))
        assert not any(isinstance(module, nn.Conv2d) for module in model.modules())

    def test_images_by_default_are_a_cnn(self) -> None:
        model = build(ModelConfig(), input_shape=(1, 8, 8), classes=10, seed=0)
        assert torch.equal(
            flat(model), flat(build(ModelConfig(name="cnn"), input_shape=(1, 8, 8), classes=10, seed=0))
        )

    @pytest.mark.parametrize("shape", TABLES)
    @pytest.mark.parametrize("name", ["cnn", "resnet"])
    def test_no_image_is_refused_with_the_cure(self, name: str, shape: tuple[int, ...]) -> None:
        with pytest.raises(ModelError, match=r"needs images.*use 'mlp'"):
            build(ModelConfig(name=name), input_shape=shape, classes=2, seed=0)

    @pytest.mark.parametrize("width", [1, 2, 3, 7, 64])
    @pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
    def test_any_width(self, name: str, width: int) -> None:
        model = build(ModelConfig(name=name, width=width), input_shape=(1, 8, 8), classes=3, seed=0)
        assert logits(model, (1, 8, 8)).shape == (3, 3)

    @pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
    @pytest.mark.parametrize("error", [RuntimeError("not enough memory"), MemoryError("not enough memory")])
    def test_a_model_that_no_memory_holds(
        self, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(nn, "Linear", fail)
        with pytest.raises(ModelError, match="of width 8 cannot be built: not enough memory"):
            build(ModelConfig(name=name, width=8), input_shape=(1, 8, 8), classes=3, seed=0)

    @pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
    def test_no_batch_statistics(self, name: str) -> None:
        """In training mode too, a record's logits do not depend on the records beside it."""
        model = build(ModelConfig(name=name, width=8), input_shape=(1, 8, 8), classes=10, seed=0).train()
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        records = torch.rand(4, 1, 8, 8)
        with torch.no_grad():
            alone = torch.cat([model(record[None]) for record in records])
            torch.testing.assert_close(model(records), alone, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
    def test_activation_is_a_setting(self, name: str) -> None:
        for activation, kind in (("tanh", nn.Tanh), ("relu", nn.ReLU)):
            config = ModelConfig(name=name, width=8, activation=activation)
            model = build(config, input_shape=(1, 8, 8), classes=10, seed=0)
            kinds = {type(m) for m in model.modules() if isinstance(m, nn.Tanh | nn.ReLU)}
            assert kinds == {kind}
            assert not any(getattr(m, "inplace", False) for m in model.modules())

    def test_the_residual_block_is_a_sum(self) -> None:
        same = Residual(8, 8, 1, "relu")
        x = torch.rand(2, 8, 6, 6)
        with torch.no_grad():
            torch.testing.assert_close(same(x), torch.relu(x + same.body(x)))
            assert Residual(8, 12, 2, "tanh")(x).shape == (2, 12, 3, 3)

    @pytest.mark.parametrize("name", ["mpl", "", "resnet18", "a.b.c"])
    def test_unknown_name(self, name: str) -> None:
        config = ModelConfig.model_construct(name=name, width=8, activation="tanh")
        with pytest.raises(
            ConfigError,
            match="expected one of auto, cnn, linear, mlp, resnet, scatter, text-embedding, text-cnn, "
            "transformer, or package",
        ):
            build(config, input_shape=(1, 8, 8), classes=2, seed=0)


class TestSeeds:
    @pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
    def test_the_seed_alone_decides(self, name: str) -> None:
        def made(seed: int) -> Tensor:
            return flat(build(ModelConfig(name=name, width=8), input_shape=(1, 8, 8), classes=10, seed=seed))

        first = made(5)
        torch.rand(7)
        assert torch.equal(first, made(5))
        assert not torch.equal(first, made(6))

    def test_the_global_generator_is_left_alone(self) -> None:
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        build(ModelConfig(), input_shape=(1, 8, 8), classes=10, seed=0)
        assert torch.equal(torch.rand(4), expected)

    def test_also_where_building_fails(self) -> None:
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        with pytest.raises(ModelError):
            build(ModelConfig(name="cnn"), input_shape=(3,), classes=10, seed=0)
        assert torch.equal(torch.rand(4), expected)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def names(model: nn.Module, part: str) -> set[str]:
    kept = {id(parameter) for parameter in trained_parameters(model, part)}  # type: ignore[arg-type]
    return {name for name, parameter in model.named_parameters() if id(parameter) in kept}


class TestParts:
    @pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
    def test_named_models(self, name: str) -> None:
        model = build(ModelConfig(name=name, width=8), input_shape=(1, 8, 8), classes=10, seed=0)
        every = {name for name, _ in model.named_parameters()}
        assert names(model, "all") == every
        assert names(model, "head") == {"head.weight", "head.bias"}
        block = {"mlp": "block2.", "cnn": "block3.", "resnet": "block3."}[name]
        assert names(model, "last_block") == {n for n in every if n.startswith((block, "head."))}

    def test_order_is_the_models(self) -> None:
        model = build(ModelConfig(width=8), input_shape=(1, 8, 8), classes=10, seed=0)
        order = [id(parameter) for parameter in model.parameters()]
        for part in ("all", "last_block", "head"):
            positions = [order.index(id(parameter)) for parameter in trained_parameters(model, part)]
            assert positions == sorted(positions)

    def test_children_without_parameters_do_not_count(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2), nn.Identity(), nn.Dropout(0.0))
        assert names(model, "head") == {"2.weight", "2.bias"}
        assert names(model, "last_block") == {"0.weight", "0.bias", "2.weight", "2.bias"}

    def test_a_wrapped_model_is_looked_into(self) -> None:
        model = Wrapped(Wrapped(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))))
        assert names(model, "head") == {"inner.inner.1.weight", "inner.inner.1.bias"}

    def test_a_single_layer_is_its_own_head(self) -> None:
        for model in (
            nn.Sequential(nn.Flatten(), nn.Linear(3, 2)),
            Wrapped(nn.Linear(3, 2)),
            nn.Linear(3, 2),
            Bare(),
        ):
            for part in ("head", "last_block", "all"):
                assert names(model, part) == {name for name, _ in model.named_parameters()}

    def test_count(self) -> None:
        assert parameter_count(nn.Linear(3, 2)) == 8
        assert parameter_count(Bare()) == 6


GOOD = """
import torch
from torch import nn
def factory(input_shape, classes):
    size = 1
    for axis in input_shape:
        size *= axis
    return nn.Sequential(nn.Flatten(), nn.Linear(size, classes))
def lazy(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(9), nn.Tanh(), nn.LazyLinear(classes))
def wrong_classes(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes + 1))
def wrong_inputs(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(7, classes))
def no_module(input_shape, classes):
    return 3
def raising(input_shape, classes):
    raise RuntimeError("boom\\nand more")
def leaving(input_shape, classes):
    raise SystemExit(3)
def fewer_arguments():
    return None
class Pair(nn.Module):
    def forward(self, x):
        return x, x
def pair(input_shape, classes):
    return Pair()
value = 7
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Writes a module into the working directory, and returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", __import__("sys").path[:])

    def write(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
        return name

    return write


class TestFactories:
    def test_a_good_one(self, module: Callable[[str, str], str]) -> None:
        name = module("good_models_of_mine", GOOD)
        config = ModelConfig(name=f"{name}:factory")
        model = build(config, input_shape=(1, 8, 8), classes=10, seed=4)
        assert logits(model, (1, 8, 8)).shape == (3, 10)
        again = build(config, input_shape=(1, 8, 8), classes=10, seed=4)
        assert torch.equal(flat(model), flat(again)), "the seed reaches a user's initial weights"
        assert not torch.equal(flat(model), flat(build(config, input_shape=(1, 8, 8), classes=10, seed=5)))

    def test_lazy_layers_are_drawn_from_the_seed(self, module: Callable[[str, str], str]) -> None:
        """Their weights come with the first input: in the same place, and the global generator unmoved."""
        config = ModelConfig(name=f"{module('lazy_models_of_mine', GOOD)}:lazy")

        def made(seed: int) -> Tensor:
            return flat(build(config, input_shape=(1, 8, 8), classes=10, seed=seed))

        torch.manual_seed(3)
        first, after = made(4), torch.rand(4)
        assert torch.equal(made(4), first)
        assert not torch.equal(made(5), first)
        torch.manual_seed(3)
        assert torch.equal(torch.rand(4), after)

    @pytest.mark.parametrize(
        ("attribute", "expected"),
        [
            ("missing", "cannot be imported .*missing"),
            ("wrong_classes", r"returned \[2, 11\] for 2 inputs, expected logits \[2, 10\]"),
            ("wrong_inputs", r"does not accept inputs of shape \[2, 1, 8, 8\]"),
            ("no_module", "returned int, not a torch.nn.Module"),
            ("raising", r"factory\(input_shape, classes\) failed: boom"),
            ("leaving", r"factory\(input_shape, classes\) failed: 3"),
            ("fewer_arguments", "failed: .*positional argument"),
            ("pair", "returned tuple for 2 inputs"),
            ("value", "is a int, not a function"),
            ("", "cannot be imported"),
        ],
    )
    def test_bad_ones(self, module: Callable[[str, str], str], attribute: str, expected: str) -> None:
        name = module("bad_models_of_mine", GOOD)
        with pytest.raises(ModelError, match=expected) as refused:
            build(ModelConfig(name=f"{name}:{attribute}"), input_shape=(1, 8, 8), classes=10, seed=0)
        assert f"{name}:{attribute}" in str(refused.value)

    @pytest.mark.parametrize(
        "text",
        ["import nothing_of_that_name", "def", "raise RuntimeError('boom')", "raise SystemExit(3)", "1 / 0"],
    )
    def test_a_module_that_fails(self, module: Callable[[str, str], str], text: str) -> None:
        name = module("failing_models_of_mine", text)
        with pytest.raises(ModelError, match="cannot be imported"):
            build(ModelConfig(name=f"{name}:factory"), input_shape=(1, 8, 8), classes=10, seed=0)

    @pytest.mark.parametrize(
        "name", ["no_such_package:f", "no.such.package:f", ":f", ".relative:f", "a:b:c", "os:"]
    )
    def test_no_module(self, name: str) -> None:
        with pytest.raises(ModelError, match="cannot be imported"):
            build(ModelConfig(name=name), input_shape=(1, 8, 8), classes=10, seed=0)

    def test_parameters_are_counted_as_they_are(self) -> None:
        model = build(ModelConfig(name="mlp", width=6), input_shape=(1, 8, 8), classes=10, seed=0)
        assert parameter_count(model) == (64 * 6 + 6) + (6 * 3 + 3) + (3 * 10 + 10)
        assert parameter_count(model) == sum(math.prod(p.shape) for p in model.parameters())
