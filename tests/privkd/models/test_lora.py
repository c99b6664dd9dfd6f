"""Adapters: trained privately beside weights that stay, and merged into them on export."""

from pathlib import Path

import pytest
import torch
from on_device import box, clouds
from running import play
from torch import Tensor, nn

from privkd.config import DpSgdConfig, ModelConfig
from privkd.data.scenario import LabelledSet
from privkd.errors import ModelError
from privkd.export.export import export_student
from privkd.models.lora import Adapted, merged
from privkd.models.zoo import build, trained_parameters
from privkd.privacy.randomness import SeededRandomness
from privkd.runs.folder import RunFolder
from privkd.training.dpsgd import Mechanism, check_trainable, fastest_mode, train_private
from privkd.training.proof import Probe, gradients_alone
from privkd.training.vectorised import formulation, train_cohort

CLASSES, LENGTH, VOCABULARY = 3, 7, 20
NAMES = ["mlp", "transformer"]


def student(name: str, rank: int | None = 2, seed: int = 0) -> nn.Module:
    tokens = name == "transformer"
    config, shape = ModelConfig(name=name, width=16), (LENGTH,) if tokens else (1, 8, 8)
    vocabulary = VOCABULARY if tokens else None
    return build(config, input_shape=shape, classes=CLASSES, seed=seed, vocabulary=vocabulary, rank=rank)


def records(name: str, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    if name == "transformer":
        return torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    return torch.rand((count, 1, 8, 8), generator=generator)


def shard(name: str, count: int = 20) -> LabelledSet:
    return LabelledSet(records(name, count), torch.arange(count) % CLASSES)


def mechanism(name: str) -> Mechanism:
    recipe = DpSgdConfig(steps=5, sampling_rate=0.5, learning_rate=1.0, part="lora", rank=2)
    probe = Probe.of(records(name, 30), CLASSES)
    return Mechanism(recipe, 1.0, expected_batch_size=10.0, alpha=0.0, temperature=1.0, probe=probe)


@pytest.mark.parametrize("name", NAMES)
class TestTraining:
    def test_begins_as_the_student_without(self, name: str) -> None:
        x = records(name, 5)
        assert torch.equal(student(name)(x), student(name, None)(x))

    def test_adapters_and_the_head_alone_are_trained(self, name: str) -> None:
        before = student(name)
        trained = train_private(before, shard(name), None, mechanism(name), SeededRandomness(1))
        moved = {
            key
            for key, weight in trained.state_dict().items()
            if not torch.equal(weight, before.state_dict()[key])
        }
        expected = {
            key for key in before.state_dict() if ".down." in key or ".up." in key or key.startswith("head.")
        }
        assert moved == expected
        assert any(".up." in key for key in moved)
        assert sum(p.numel() for p in trained_parameters(before, "lora")) == sum(
            before.state_dict()[key].numel() for key in expected
        )

    def test_merged_answers_the_same_without_adapters(self, name: str) -> None:
        trained = train_private(student(name), shard(name), None, mechanism(name), SeededRandomness(1))
        plain, x = merged(trained), records(name, 40)
        assert not any(isinstance(layer, Adapted) for layer in plain.modules())
        assert list(plain.state_dict()) == list(student(name, None).state_dict())
        assert not torch.allclose(plain(x), student(name, None)(x), atol=1e-3)
        torch.testing.assert_close(plain(x), trained(x), rtol=1e-5, atol=1e-5)

    def test_one_by_one_equals_the_cohort(self, name: str) -> None:
        models = [student(name, seed=seed) for seed in range(2)]
        held = [shard(name), shard(name, 11)]
        sources = [SeededRandomness(seed) for seed in range(2)]
        cohort = train_cohort(models, held, None, mechanism(name), sources)
        for i, one in enumerate(cohort):
            alone = train_private(models[i], held[i], None, mechanism(name), SeededRandomness(i))
            for ours, theirs in zip(alone.parameters(), one.parameters(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def test_gradients_are_those_of_autograd(self, name: str) -> None:
        model, how = student(name), mechanism(name)
        trained = trained_parameters(model, "lora")
        truth = gradients_alone(model, trained, how.probe, alpha=0.0, temperature=1.0)  # type: ignore[arg-type]
        assert truth.norm(dim=1).min() > 0
        found = {mode: train_private(model, shard(name), None, how, SeededRandomness(3), mode=mode)
                 for mode in ("autograd", fastest_mode(model, records(name, 3), how))}  # fmt: skip
        one, other = (torch.cat([p.flatten() for p in each.parameters()]) for each in found.values())
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    def test_it_is_the_fast_program(self, name: str) -> None:
        shape, dtype = tuple(records(name, 1).shape[1:]), records(name, 1).dtype
        assert formulation(student(name), shape, dtype) == "bookkeeping"


class TestRefusals:
    @pytest.mark.parametrize("name", ["linear", "cnn"])
    def test_nothing_to_adapt(self, name: str) -> None:
        with pytest.raises(ModelError, match=r"no linear layer below the head .*lower student.dp.rank"):
            student(name, 16)

    def test_a_student_without_adapters(self) -> None:
        recipe = DpSgdConfig(part="lora")
        with pytest.raises(ModelError, match="nothing to train"):
            check_trainable(student("mlp", None), input_shape=(1, 8, 8), classes=CLASSES, recipe=recipe)


class TestRuns:
    SETTINGS = ("student.dp.part=lora", "student.dp.rank=2", "student.models=[{name='mlp', width=8}]")

    def test_the_export_has_no_more_layers(self, tmp_path: Path) -> None:
        result = play(tmp_path / "run", *self.SETTINGS)
        plain = 64 * 8 + 8 + 8 * 4 + 4 + 4 * 10 + 10
        assert result.student.parameters == plain + 2 * (64 + 8) + 2 * (8 + 4)
        with RunFolder.resume(tmp_path / "run") as folder:
            made = export_student(folder, "torch", 1, tmp_path / "student.pt2")
        assert made.parameters == plain
        assert made.check.difference < 1e-5

    def test_a_device_has_the_same_student(self, tmp_path: Path) -> None:
        cloud = clouds(*self.SETTINGS)
        answered, block = box(tmp_path / "device", cloud)(cloud.ask())
        assert answered.refused is None
        assert block
