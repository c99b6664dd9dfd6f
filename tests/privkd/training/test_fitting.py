"""Memory layouts: quicker, and nothing else about a model changes."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privkd.config import FitConfig, ModelConfig
from privkd.models.zoo import build
from privkd.training.fit import fit, logits_of, quick_layout


class Viewing(nn.Module):
    """Someone's layer that counts on the usual layout."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)


def pooling(last: nn.Module | None = None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(2, 4, 3), nn.Tanh(), nn.MaxPool2d(2, 1), last or nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(4 * 5 * 5, 3))


def images(records: int, *shape: int) -> Tensor:
    return torch.rand((records, *shape), generator=torch.Generator().manual_seed(1))


def strides(model: nn.Module) -> list[tuple[int, ...]]:
    return [parameter.stride() for parameter in model.parameters()]


class TestLayout:
    @pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
    def test_answers_are_the_same_up_to_rounding(self, shape: tuple[int, ...]) -> None:
        model = build(ModelConfig(name="cnn", width=16), input_shape=shape, classes=10, seed=0).eval()
        records = images(300, *shape)
        with torch.no_grad():
            expected = model(records)
        torch.testing.assert_close(logits_of(model, records), expected, atol=1e-5, rtol=1e-5)

    def test_what_pools_changes_and_what_does_not_stays(self) -> None:
        model, plain = pooling(), nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten())
        first = next(quick_layout(model).parameters())
        assert first.is_contiguous(memory_format=torch.channels_last)
        assert not first.is_contiguous()
        assert strides(quick_layout(plain)) == strides(plain)

    @torch.no_grad()
    def test_a_single_channel_is_answered_with_channels_last(self) -> None:
        """Its weights look alike in both layouts but for their strides."""
        model = build(ModelConfig(name="cnn"), input_shape=(1, 28, 28), classes=10, seed=0)
        first = next(quick_layout(model).children())
        assert first(images(2, 1, 28, 28)).is_contiguous(memory_format=torch.channels_last)

    def test_someones_own_layer_keeps_what_it_counts_on(self) -> None:
        model = pooling(Viewing())
        assert strides(quick_layout(model)) == strides(model)
        assert logits_of(model, images(2, 2, 8, 8)).shape == (2, 3)

    def test_leaves_its_argument_alone(self) -> None:
        model = pooling().train()
        before = strides(model)
        logits_of(model, images(2, 2, 8, 8))
        assert strides(model) == before
        assert model.training

    def test_training_ends_in_the_usual_layout(self) -> None:
        model, records = pooling(), images(8, 2, 8, 8)
        labels = torch.arange(8) % 3

        def loss(trained: nn.Module, chosen: Tensor) -> Tensor:
            return F.cross_entropy(trained(records[chosen]), labels[chosen])

        generator = torch.Generator().manual_seed(0)
        trained = fit(model, loss, records=8, config=FitConfig(steps=2), generator=generator)
        assert strides(trained) == strides(model)
        assert all(parameter.is_contiguous() for parameter in trained.parameters())


def test_without_records_there_are_no_logits() -> None:
    assert logits_of(pooling(), images(0, 2, 8, 8)).shape == (0, 3)
