"""The cloud: the gate on constructed models, and learning that really improves on given targets."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privkd.cloud import (
    PublicData,
    Targets,
    between,
    distil_public,
    gate,
    learn,
    train_teacher,
)
from privkd.config import FitConfig, ReverseConfig
from privkd.data.scenario import LabelledSet
from privkd.errors import TrainingError
from privkd.training.fit import accuracy, fit, logits_of

FIT = FitConfig(steps=60, batch_size=32, learning_rate=0.02)


class Slope(nn.Module):
    """Class 1 where ``weight * x > 0``: between the weights -1 and 1, all of its accuracy turns at 0."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x), self.weight * x], dim=1)


def positives(records: int = 10) -> LabelledSet:
    return LabelledSet(torch.ones(records, 1), torch.ones(records, dtype=torch.int64))


def blobs(records: int, seed: int, classes: int = 4) -> LabelledSet:
    """Well separated clusters on a circle."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(records) % classes
    angle = labels * (2 * torch.pi / classes)
    centres = torch.stack([angle.cos(), angle.sin()], dim=1) * 3
    return LabelledSet(centres + 0.5 * torch.randn(records, 2, generator=generator), labels)


def network(seed: int = 0, classes: int = 4) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, classes))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestBetween:
    def test_the_ends_and_the_middle(self) -> None:
        old, new = network(0), network(1)
        for share in (0.0, 0.25, 1.0):
            blend = between(old, new, share)
            for a, b, c in zip(old.parameters(), new.parameters(), blend.parameters(), strict=True):
                torch.testing.assert_close(c, a + share * (b - a))

    def test_counters_are_the_new_models(self) -> None:
        old, new = Slope(-1.0), Slope(1.0)
        new.steps += 5
        blend = between(old, new, 0.5)
        assert int(blend.steps) == 12

    def test_leaves_its_arguments_alone(self) -> None:
        old, new = network(0), network(1)
        before = copy.deepcopy(old.state_dict()), copy.deepcopy(new.state_dict())
        between(old, new, 0.5)
        for kept, model in zip(before, (old, new), strict=True):
            assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())


class TestGate:
    def test_a_whole_step_that_does_no_harm(self) -> None:
        absorbed = gate(Slope(1.0), Slope(2.0), positives(), tolerance=0.0)
        assert absorbed.accepted == 1.0
        assert absorbed.teacher.weight.item() == 2.0

    def test_half_a_step_where_the_whole_one_harms(self) -> None:
        """From 1 to -0.5 accuracy falls at 0: the half-way point 0.25 is still right."""
        absorbed = gate(Slope(1.0), Slope(-0.5), positives(), tolerance=0.0)
        assert absorbed.accepted == 0.5
        assert absorbed.teacher.weight.item() == pytest.approx(0.25)

    def test_a_quarter(self) -> None:
        absorbed = gate(Slope(1.0), Slope(-2.0), positives(), tolerance=0.0)
        assert absorbed.accepted == 0.25
        assert absorbed.teacher.weight.item() == pytest.approx(0.25)

    def test_rolled_back(self) -> None:
        old = Slope(1.0)
        absorbed = gate(old, Slope(-9.0), positives(), tolerance=0.0)
        assert absorbed.accepted == 0.0
        assert absorbed.teacher is old

    def test_tolerance(self) -> None:
        """One record in ten turns wrong: a fall of 0.1."""
        validation = LabelledSet(torch.ones(10, 1), torch.ones(10, dtype=torch.int64))
        validation.inputs[0] = -1.0
        validation.labels[0] = 0
        worse = LabelledSet(validation.inputs.clone(), validation.labels.clone())
        worse.labels[0] = 1
        assert gate(Slope(-1.0), Slope(1.0), worse, tolerance=0.0).accepted == 1.0
        assert gate(Slope(1.0), Slope(-9.0), validation, tolerance=0.9).accepted == 0.0
        assert gate(Slope(1.0), Slope(-9.0), validation, tolerance=1.0).accepted == 1.0

    def test_equal_accuracy_is_no_fall(self) -> None:
        assert gate(Slope(-1.0), Slope(-3.0), positives(), tolerance=0.0).accepted == 1.0

    def test_without_validation_all_goes_through(self) -> None:
        assert gate(Slope(1.0), Slope(-9.0), positives(0), tolerance=0.0).accepted == 1.0


class TestTraining:
    def test_teacher_learns_and_its_start_is_left_alone(self) -> None:
        start = network()
        before = copy.deepcopy(start.state_dict())
        trained = train_teacher(start, blobs(80, 1), FIT, generator())
        test = blobs(200, 2)
        assert accuracy(trained, test.inputs, test.labels) > 0.95
        assert all(torch.equal(before[name], tensor) for name, tensor in start.state_dict().items())
        assert not trained.training

    def test_equal_seeds_give_equal_weights(self) -> None:
        one, two = (train_teacher(network(), blobs(80, 1), FIT, generator(5)) for _ in range(2))
        other = train_teacher(network(), blobs(80, 1), FIT, generator(6))
        assert torch.equal(one[0].weight, two[0].weight)
        assert not torch.equal(one[0].weight, other[0].weight)

    def test_student_follows_its_teacher_and_not_the_labels(self) -> None:
        """The teacher calls class 3 class 0; its student, shown wrong labels, says what the teacher says."""
        public = blobs(120, 1)
        merged = LabelledSet(public.inputs, torch.where(public.labels == 3, 0, public.labels))
        teacher = train_teacher(network(), merged, FIT, generator())
        lying = LabelledSet(public.inputs, (public.labels + 1) % 4)
        data = PublicData(lying, positives(0), blobs(100, 3).inputs)
        student = distil_public(network(9), teacher, data, 2.0, FIT, generator(1))
        test = blobs(200, 4).inputs
        agree = logits_of(student, test).argmax(-1) == logits_of(teacher, test).argmax(-1)
        assert float(agree.float().mean()) > 0.95

    def test_no_records_leave_the_model_as_it_was(self) -> None:
        start = network()
        trained = fit(
            start, lambda m, i: m(torch.zeros(1, 2)).sum(), records=0, config=FIT, generator=generator()
        )
        assert all(torch.equal(a, b) for a, b in zip(start.parameters(), trained.parameters(), strict=True))

    def test_divergence_is_an_error(self) -> None:
        """A loss that overflows once leaves NaN behind, and NaN must not pass silently."""
        config = FitConfig(steps=20, batch_size=8, learning_rate=0.25)

        def loss(model: nn.Module, chosen: Tensor) -> Tensor:
            return model(torch.full((1, 1), 1e30)).square().sum()

        with pytest.raises(TrainingError, match=r"diverged in training at learning rate 0\.25: lower it"):
            fit(Slope(1.0), loss, records=8, config=config, generator=generator())

    def test_a_nan_in_the_data_is_an_error(self) -> None:
        public = blobs(40, 1)
        public.inputs[:] = torch.nan
        with pytest.raises(TrainingError):
            train_teacher(network(), public, FIT, generator())


class TestAbsorb:
    """The teacher knows classes 0 to 2; the release knows all four on the proxy set."""

    CONFIG = ReverseConfig(fit=FIT, trust=2.0, anchor=0.1, tolerance=0.0)

    def scene(self) -> tuple[nn.Module, PublicData, Targets, LabelledSet]:
        public = blobs(80, 1)
        known = public.labels < 3
        public = LabelledSet(public.inputs[known], public.labels[known])
        validation = blobs(40, 5)
        kept = validation.labels < 3
        proxy = blobs(100, 3)
        teacher = train_teacher(network(), public, FIT, generator())
        data = PublicData(public, LabelledSet(validation.inputs[kept], validation.labels[kept]), proxy.inputs)
        answers = F.one_hot(proxy.labels, 4) * 0.9 + 0.025
        prior = F.softmax(logits_of(teacher, proxy.inputs), dim=-1)
        return teacher, data, Targets(torch.arange(100), answers, torch.ones(100), prior), blobs(200, 4)

    def test_learns_what_the_release_knows(self) -> None:
        teacher, data, targets, test = self.scene()
        before = accuracy(teacher, test.inputs, test.labels)
        absorbed = learn(teacher, targets, data, self.CONFIG, generator(2))
        after = accuracy(absorbed.teacher, test.inputs, test.labels)
        assert before < 0.8
        assert after > 0.95
        assert absorbed.accepted == 1.0

    def test_untrusted_targets_are_not_learned(self) -> None:
        teacher, data, targets, test = self.scene()
        untrusted = replace(targets, weights=torch.zeros(100))
        absorbed = learn(teacher, untrusted, data, self.CONFIG, generator(2))
        assert accuracy(absorbed.teacher, test.inputs, test.labels) < 0.8

    def test_some_queries_only(self) -> None:
        """Targets are rows of the queries asked, not of the whole proxy set."""
        teacher, data, targets, test = self.scene()
        asked = torch.arange(1, 100, 2)
        part = Targets(asked, targets.probabilities[asked], torch.ones(len(asked)), targets.prior[asked])
        absorbed = learn(teacher, part, data, self.CONFIG, generator(2))
        assert accuracy(absorbed.teacher, test.inputs, test.labels) > 0.95

    def test_a_lie_is_rolled_back(self) -> None:
        teacher, data, targets, _ = self.scene()
        lies = replace(targets, probabilities=targets.probabilities.roll(1, dims=1))
        config = self.CONFIG.model_copy(update={"trust": 1000.0})
        absorbed = learn(teacher, lies, data, config, generator(2))
        validation = data.validation
        before = accuracy(teacher, validation.inputs, validation.labels)
        assert accuracy(absorbed.teacher, validation.inputs, validation.labels) >= before
        assert absorbed.accepted < 1.0

    def test_the_anchor_holds_the_teacher_back(self) -> None:
        teacher, data, targets, _ = self.scene()
        old = F.softmax(logits_of(teacher, data.proxy), dim=-1)

        def moved(anchor: float) -> float:
            config = self.CONFIG.model_copy(update={"anchor": anchor})
            new = learn(teacher, targets, data, config, generator(2)).teacher
            return float((F.softmax(logits_of(new, data.proxy), dim=-1) - old).abs().sum())

        assert moved(100.0) < 0.2 * moved(0.0)

    def test_leaves_the_old_teacher_alone(self) -> None:
        teacher, data, targets, _ = self.scene()
        before = copy.deepcopy(teacher.state_dict())
        learn(teacher, targets, data, self.CONFIG, generator(2))
        assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
