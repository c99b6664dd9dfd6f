"""Students with fixed features: the same results, however they are computed, and features computed once."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from running import play
from safetensors.torch import load_file
from torch import Tensor, nn

from audits.membership_audit import audit_membership
from audits.requests import MembershipRequest
from privkd.cloud import PublicData, distil_public
from privkd.config import DpSgdConfig, FitConfig, ModelConfig
from privkd.data.constants import Constants
from privkd.data.scenario import LabelledSet
from privkd.errors import ModelError
from privkd.export.export import export_model
from privkd.export.formats import suffix_of
from privkd.models import features
from privkd.models.features import FrontEnd, Parted
from privkd.models.zoo import build
from privkd.privacy.randomness import SeededRandomness, seeded_generator
from privkd.progress import Silent
from privkd.runs.folder import RunFolder
from privkd.training.dpsgd import Mechanism, check_trainable, train_private, train_unprotected
from privkd.training.fit import logits_of
from privkd.training.vectorised import (
    cohort_answers,
    fit_cohort,
    formulation,
    same_architecture,
    train_cohort,
)

SHAPE, CLASSES = (1, 8, 8), 4
SIZES = (30, 0, 11)


class Counted(FrontEnd):
    """Squares of the pixels; counts the records that went through."""

    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.seen += len(x)
        return x.flatten(1).square()


class Plain(nn.Module):
    """The same, but no front end."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).square()


class Mixing(FrontEnd):
    """Looks at the whole batch, which DP-SGD forbids."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) - x.flatten(1).mean(0)


def student(front: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [
        ("front", front),
        ("body", nn.Linear(64, 6)),
        ("tanh", nn.Tanh()),
        ("head", nn.Linear(6, CLASSES)),
    ]
    return nn.Sequential(OrderedDict(layers))


def shards(sizes: Sequence[int] = SIZES) -> list[LabelledSet]:
    generator = torch.Generator().manual_seed(5)
    return [
        LabelledSet(
            torch.rand((n, *SHAPE), generator=generator), torch.randint(CLASSES, (n,), generator=generator)
        )
        for n in sizes
    ]


def mechanism(part: str = "all", steps: int = 7) -> Mechanism:
    recipe = DpSgdConfig(steps=steps, sampling_rate=0.5, learning_rate=1.0, part=part)  # type: ignore[arg-type]
    return Mechanism(recipe, 1.0, expected_batch_size=15.0, alpha=0.3, temperature=2.0)


def distance(one: nn.Module, other: nn.Module) -> float:
    assert list(one.state_dict()) == list(other.state_dict())
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


class TestParted:
    def test_parts_and_joins(self) -> None:
        whole = student(Counted())
        parted = Parted.of(whole)
        assert isinstance(parted.front, Counted)
        x = shards()[0].inputs
        torch.testing.assert_close(parted.rest(parted.features(x)), whole(x))
        joined = parted.rejoined(parted.rest)
        assert same_architecture([whole, joined])
        assert list(joined.state_dict()) == list(whole.state_dict())

    def test_a_layer_that_is_used_twice_stays_twice(self) -> None:
        tanh = nn.Tanh()
        whole = nn.Sequential(Counted(), tanh, nn.Linear(64, 6), tanh, nn.Linear(6, CLASSES))
        parted, x = Parted.of(whole), shards()[0].inputs
        torch.testing.assert_close(parted.rest(parted.features(x)), whole(x))
        torch.testing.assert_close(parted.rejoined(parted.rest)(x), whole(x))
        assert list(parted.rejoined(parted.rest).state_dict()) == list(whole.state_dict())

    @pytest.mark.parametrize("front", [Plain(), nn.Flatten()])
    def test_a_student_without_one_stays_whole(self, front: nn.Module) -> None:
        whole = student(front)
        parted = Parted.of(whole)
        assert parted.front is None
        assert parted.rest is whole
        assert parted.rejoined(whole) is whole

    def test_one_with_tensors_stays_in_training(self) -> None:
        front = Counted()
        front.register_buffer("mean", torch.zeros(1))
        assert Parted.of(student(front)).front is None
        front = Counted()
        front.scale = nn.Parameter(torch.ones(1))
        assert Parted.of(student(front)).front is None


class TestTraining:
    @pytest.mark.parametrize("part", ["all", "head"])
    def test_equals_the_student_without_a_front_end(self, part: str) -> None:
        held = shards()[0]
        logits = torch.randn(len(held), CLASSES)
        ours, theirs = (
            train_private(student(front), held, logits, mechanism(part), SeededRandomness(1))
            for front in (Counted(), Plain())
        )
        assert distance(ours, theirs) < 1e-6
        ours, theirs = (
            train_unprotected(
                student(front),
                held,
                logits,
                FitConfig(steps=20),
                seeded_generator(1),
                alpha=0.5,
                temperature=2.0,
            )
            for front in (Counted(), Plain())
        )
        assert distance(ours, theirs) < 1e-6

    def test_public_distillation_too(self) -> None:
        held = shards((30,))[0]
        data = PublicData(held, held, held.inputs)
        teacher = student(Plain(), seed=9)
        ours, theirs = (
            distil_public(student(front), teacher, data, 2.0, FitConfig(steps=20), seeded_generator(1))
            for front in (Counted(), Plain())
        )
        assert distance(ours, theirs) < 1e-6
        assert isinstance(Parted.of(ours).front, Counted)

    @pytest.mark.parametrize("name", ["own", "scatter"])
    def test_both_engines_agree(self, name: str) -> None:
        held = shards()
        models = [
            student(Counted(), seed)
            if name == "own"
            else build(ModelConfig(name="scatter"), input_shape=SHAPE, classes=CLASSES, seed=seed)
            for seed in range(len(held))
        ]
        logits = [torch.randn(len(shard), CLASSES) for shard in held]
        sources = [SeededRandomness(3, i) for i in range(len(held))]
        ours = train_cohort(models, held, logits, mechanism(), sources)
        for i, (found, model) in enumerate(zip(ours, models, strict=True)):
            alone = train_private(model, held[i], logits[i], mechanism(), SeededRandomness(3, i))
            assert distance(found, alone) < 1e-5
            assert distance(found, model) > 1e-3
        answers = cohort_answers(ours, held[0].inputs)
        torch.testing.assert_close(answers, torch.stack([logits_of(model, held[0].inputs) for model in ours]))
        assert cohort_answers(ours, held[1].inputs).shape == (3, 0, CLASSES)

    def test_fitted_cohort_agrees(self) -> None:
        held = shards((20, 13))
        models = [student(Counted(), seed) for seed in range(2)]
        config, options = FitConfig(steps=15), {"alpha": 0.0, "temperature": 1.0}
        ours = fit_cohort(models, held, None, config, [seeded_generator(2, i) for i in range(2)], **options)
        for i, (found, model) in enumerate(zip(ours, models, strict=True)):
            alone = train_unprotected(model, held[i], None, config, seeded_generator(2, i), **options)
            assert distance(found, alone) < 1e-5

    def test_features_are_computed_once(self) -> None:
        held, steps = shards((40,)), 50
        records = []
        for train in (
            lambda: train_private(
                student(Counted()), held[0], None, mechanism(steps=steps), SeededRandomness(1)
            ),
            lambda: train_cohort(
                [student(Counted())], held, None, mechanism(steps=steps), [SeededRandomness(1)]
            ),
        ):
            Counted.seen = 0
            train()
            records.append(Counted.seen)
        # The engines also ask for the shape of the features, and prove themselves on ten records.
        assert max(records) <= 40 + 11

    def test_kept_while_the_records_live(self) -> None:
        front, records = Counted(), shards()[0].inputs
        parted = Parted.of(student(front))
        first = parted.features(records)
        Counted.seen = 0
        assert parted.features(records) is first
        assert Counted.seen == 0
        other = Parted.of(student(Counted())).features(records)
        assert other is not first
        records.mul_(2)
        torch.testing.assert_close(parted.features(records), 4 * first)
        scatter, twin = (
            Parted.of(build(ModelConfig(name="scatter"), input_shape=SHAPE, classes=CLASSES, seed=seed))
            for seed in range(2)
        )
        assert scatter.features(records) is twin.features(records)
        held = len(features._kept)
        del records
        assert len(features._kept) == held - 1

    def test_too_many_are_not_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(features, "_MOST_KEPT", 0)
        parted, records = Parted.of(student(Counted())), shards()[0].inputs
        assert torch.equal(parted.features(records), parted.features(records))
        assert parted.features(records) is not parted.features(records)

    def test_it_is_the_fast_program(self) -> None:
        scatter = build(ModelConfig(name="scatter"), input_shape=SHAPE, classes=CLASSES, seed=0)
        assert formulation(scatter, SHAPE) == "bookkeeping"

    def test_a_tight_memory_budget_changes_nothing(self) -> None:
        held = shards((30, 22, 18))
        models = [student(Counted(), seed) for seed in range(3)]
        sources = [SeededRandomness(3, i) for i in range(3)]
        wide = train_cohort(models, held, None, mechanism(), sources)
        tight = train_cohort(
            models, held, None, mechanism(), [SeededRandomness(3, i) for i in range(3)], memory_budget=50_000
        )
        assert max(distance(a, b) for a, b in zip(wide, tight, strict=True)) < 1e-5


class TestChecks:
    def test_scatter_can_be_trained(self) -> None:
        scatter = build(ModelConfig(name="scatter"), input_shape=SHAPE, classes=CLASSES, seed=0)
        check_trainable(scatter, input_shape=SHAPE, classes=CLASSES, recipe=DpSgdConfig())

    def test_a_front_end_that_mixes_records_is_refused(self) -> None:
        with pytest.raises(ModelError, match="depends on the other records"):
            check_trainable(student(Mixing()), input_shape=SHAPE, classes=CLASSES, recipe=DpSgdConfig())


class TestInTheLoop:
    @pytest.mark.parametrize("epsilon", ["3", "inf"])
    def test_both_engines_play_the_same_run(self, tmp_path: Path, epsilon: str) -> None:
        """Also with a device that has no records."""
        for engine in ("opacus", "cohort"):
            play(
                tmp_path / engine, "student.models=['scatter']", f"student.engine={engine}", "controls=true",
                f"privacy.epsilon={epsilon}", "data.partition=dirichlet", "data.dirichlet_alpha=0.001",
                "data.devices=15", "data.records_per_device=10", "rounds=1",
            )  # fmt: skip
        for file in sorted((tmp_path / "opacus").rglob("*.safetensors")):
            one, other = (
                load_file(file),
                load_file(tmp_path / "cohort" / file.relative_to(tmp_path / "opacus")),
            )
            for name, tensor in one.items():
                torch.testing.assert_close(other[name], tensor, atol=1e-4, rtol=1e-4, msg=f"{file}: {name}")

    @pytest.mark.parametrize("form", ["torch", "onnx", "executorch"])
    @pytest.mark.parametrize("shape", [SHAPE, (1, 28, 28), (3, 16, 20)])
    def test_it_is_exported(self, tmp_path: Path, form: str, shape: tuple[int, ...]) -> None:
        pytest.importorskip({"onnx": "onnxruntime"}.get(form, form))
        scatter = build(ModelConfig(name="scatter"), input_shape=shape, classes=CLASSES, seed=0)
        records = torch.randint(0, 17, (20, *shape), generator=torch.Generator().manual_seed(3)) / 16
        path, names = tmp_path / f"student{suffix_of(form)}", [str(number) for number in range(CLASSES)]
        sixteenths = Constants(16.0, None, None, "sixteenths")
        assert export_model(scatter, records, sixteenths, names, form, path).check.difference < 1e-5

    def test_shadows_are_trained_with_it(self, tmp_path: Path) -> None:
        play(tmp_path / "run", "student.models=['scatter']", "rounds=1")
        with RunFolder.resume(tmp_path / "run") as folder:
            request = MembershipRequest(view="student", attack="lira-online", shadows=8, targets=2)
            (finding,) = audit_membership(folder, request, Silent()).findings
        assert finding.epsilon_lower <= finding.epsilon_upper
