"""The losses of distillation against loops that say the same slowly, and against torch's own."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from privkd.training.losses import ReverseWeights, divergence, forward_loss, reverse_loss, soft_targets


def random(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def naive_softmax(logits: list[float], temperature: float) -> list[float]:
    largest = max(logits)
    powers = [math.exp((value - largest) / temperature) for value in logits]
    return [power / sum(powers) for power in powers]


def naive_divergence(targets: list[float], logits: list[float], temperature: float) -> float:
    """``sum p log(p / q)``, teacher first."""
    predictions = naive_softmax(logits, temperature)
    return sum(p * math.log(p / q) for p, q in zip(targets, predictions, strict=True) if p > 0)


def naive_cross_entropy(logits: list[float], label: int) -> float:
    return -math.log(naive_softmax(logits, 1.0)[label])


class TestSoftTargets:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_naive_twin(self, temperature: float) -> None:
        logits = random(5, 3)
        expected = [naive_softmax(row, temperature) for row in logits.tolist()]
        torch.testing.assert_close(
            soft_targets(logits, temperature), torch.tensor(expected, dtype=torch.float64)
        )

    def test_heat_softens(self) -> None:
        logits = random(100, 10)
        assert (soft_targets(logits, 4.0).amax(-1) < soft_targets(logits, 1.0).amax(-1)).all()


class TestDivergence:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_naive_twin(self, temperature: float) -> None:
        targets, logits = soft_targets(random(7, 4, seed=1), 1.0), random(7, 4, seed=2)
        expected = [
            naive_divergence(p, z, temperature)
            for p, z in zip(targets.tolist(), logits.tolist(), strict=True)
        ]
        torch.testing.assert_close(
            divergence(targets, logits, temperature), torch.tensor(expected, dtype=torch.float64)
        )

    def test_direction_is_teacher_first(self) -> None:
        """Torch's own takes (log student, teacher): the same value. The other direction is another."""
        teacher, student = random(6, 5, seed=1), random(6, 5, seed=2)
        kl = nn.KLDivLoss(reduction="none")
        p, q = teacher.softmax(-1), student.softmax(-1)
        ours = divergence(p, student)
        torch.testing.assert_close(ours, kl(student.log_softmax(-1), p).sum(-1))
        backwards = kl(teacher.log_softmax(-1), q).sum(-1)
        assert ((ours - backwards).abs() > 1e-3).all(), "the test can tell the directions apart"

    def test_zero_where_equal_and_positive_elsewhere(self) -> None:
        logits = random(50, 6)
        assert divergence(logits.softmax(-1), logits).abs().max() < 1e-12
        assert (divergence(logits.softmax(-1), random(50, 6, seed=9)) > 0).all()

    def test_votes_are_targets_too(self) -> None:
        """A one-hot target costs its cross-entropy; its zeros contribute nothing, and no NaN."""
        logits = random(4, 3).requires_grad_()
        labels = torch.tensor([0, 1, 2, 0])
        ours = divergence(nn.functional.one_hot(labels, 3).double(), logits)
        torch.testing.assert_close(ours, nn.functional.cross_entropy(logits, labels, reduction="none"))
        ours.sum().backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()

    def test_far_apart_logits_stay_finite(self) -> None:
        logits = torch.tensor([[1e4, -1e4, 0.0]])
        assert divergence(torch.full((1, 3), 1 / 3), logits).isfinite().all()

    @given(st.lists(st.floats(-50, 50), min_size=2, max_size=6), st.floats(0.1, 10))
    def test_never_negative(self, values: list[float], temperature: float) -> None:
        logits = torch.tensor(values, dtype=torch.float64)
        targets = soft_targets(logits.flip(0), temperature)
        assert divergence(targets, logits, temperature) >= -1e-9


class TestForwardLoss:
    @pytest.mark.parametrize("alpha", [0.0, 0.1, 0.7, 1.0])
    @pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
    def test_naive_twin(self, alpha: float, temperature: float) -> None:
        logits, teacher = random(5, 4, seed=1), random(5, 4, seed=2)
        labels = torch.tensor([0, 3, 1, 1, 2])
        expected = [
            (1 - alpha) * naive_cross_entropy(z, label)
            + alpha * temperature**2 * naive_divergence(naive_softmax(t, temperature), z, temperature)
            for z, t, label in zip(logits.tolist(), teacher.tolist(), labels.tolist(), strict=True)
        ]
        ours = forward_loss(logits, labels, teacher, alpha=alpha, temperature=temperature)
        torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))

    def test_alpha_zero_and_no_teacher_are_plain_cross_entropy(self) -> None:
        logits, labels = random(5, 4), torch.tensor([0, 3, 1, 1, 2])
        direct = nn.functional.cross_entropy(logits, labels, reduction="none")
        unused = torch.full_like(logits, math.nan)
        torch.testing.assert_close(forward_loss(logits, labels, unused, alpha=0.0, temperature=2.0), direct)
        torch.testing.assert_close(forward_loss(logits, labels, None, alpha=0.9, temperature=2.0), direct)

    def test_alpha_one_ignores_the_labels(self) -> None:
        logits, teacher = random(5, 4), random(5, 4, seed=3)
        one, other = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([3, 2, 1, 0, 3])
        losses = [forward_loss(logits, y, teacher, alpha=1.0, temperature=2.0) for y in (one, other)]
        torch.testing.assert_close(losses[0], losses[1])

    def test_gradient(self) -> None:
        """``(1 - a)(q - y) + a T (q_T - p_T)``: the factor T^2 keeps the soft term's size as T grows."""
        alpha, temperature = 0.3, 2.5
        logits, teacher = random(6, 4, seed=1).requires_grad_(), random(6, 4, seed=2)
        labels = torch.tensor([0, 3, 1, 1, 2, 0])
        forward_loss(logits, labels, teacher, alpha=alpha, temperature=temperature).sum().backward()
        q = logits.detach().softmax(-1)
        soft = (logits.detach() / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
        expected = (1 - alpha) * (q - nn.functional.one_hot(labels, 4)) + alpha * temperature * soft
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad, expected)

    def test_losses_are_per_example(self) -> None:
        """One example's loss is its own: clipping relies on it."""
        logits, teacher = random(6, 4, seed=1), random(6, 4, seed=2)
        labels = torch.tensor([0, 3, 1, 1, 2, 0])
        together = forward_loss(logits, labels, teacher, alpha=0.5, temperature=2.0)
        alone = [
            forward_loss(logits[i : i + 1], labels[i : i + 1], teacher[i : i + 1], alpha=0.5, temperature=2.0)
            for i in range(6)
        ]
        torch.testing.assert_close(together, torch.cat(alone))

    def test_leading_axes(self) -> None:
        logits, teacher, labels = (
            random(2, 3, 4, seed=1),
            random(2, 3, 4, seed=2),
            torch.tensor([[0, 1, 2], [3, 3, 0]]),
        )
        ours = forward_loss(logits, labels, teacher, alpha=0.5, temperature=2.0)
        assert ours.shape == (2, 3)
        for device in range(2):
            row = forward_loss(logits[device], labels[device], teacher[device], alpha=0.5, temperature=2.0)
            torch.testing.assert_close(ours[device], row)

    def test_no_records(self) -> None:
        empty = torch.zeros(0, 4)
        for teacher in (None, empty):
            loss = forward_loss(empty, torch.zeros(0, dtype=torch.int64), teacher, alpha=0.5, temperature=2.0)
            assert loss.shape == (0,)


class TestReverseLoss:
    @pytest.mark.parametrize(("trust", "anchor"), [(2.0, 0.1), (0.5, 0.0), (1.0, 3.0)])
    def test_naive_twin(self, trust: float, anchor: float) -> None:
        public, labels = random(5, 4, seed=1), torch.tensor([0, 3, 1, 1, 2])
        proxy = random(7, 4, seed=2)
        targets, old = soft_targets(random(7, 4, seed=3), 1.0), soft_targets(random(7, 4, seed=4), 1.0)
        trusted = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 0.0, 0.25], dtype=torch.float64)
        expected = (
            sum(
                naive_cross_entropy(z, label)
                for z, label in zip(public.tolist(), labels.tolist(), strict=True)
            )
            / 5
        )
        for query in range(7):
            z = proxy[query].tolist()
            learned = naive_divergence(targets[query].tolist(), z, 1.0)
            kept = naive_divergence(old[query].tolist(), z, 1.0)
            expected += (trust * float(trusted[query]) * learned + anchor * kept) / 7
        ours = reverse_loss(public, labels, proxy, targets, trusted, old, ReverseWeights(trust, anchor))
        assert float(ours) == pytest.approx(expected, rel=1e-9)

    def test_an_untrusted_query_teaches_nothing(self) -> None:
        public, labels = random(3, 4, seed=1), torch.tensor([0, 3, 1])
        proxy = random(2, 4, seed=2).requires_grad_()
        targets = old = soft_targets(random(2, 4, seed=3), 1.0)
        trusted = torch.tensor([0.0, 1.0], dtype=torch.float64)
        reverse_loss(public, labels, proxy, targets, trusted, old, ReverseWeights(2.0, 0.0)).backward()
        assert proxy.grad is not None
        assert proxy.grad[0].abs().max() == 0
        assert proxy.grad[1].abs().max() > 0

    def test_gradient_pulls_towards_target_and_old(self) -> None:
        proxy = random(3, 4, seed=2).requires_grad_()
        targets, old = soft_targets(random(3, 4, seed=3), 1.0), soft_targets(random(3, 4, seed=4), 1.0)
        public, labels = random(2, 4, seed=1), torch.tensor([0, 1])
        reverse_loss(public, labels, proxy, targets, torch.ones(3), old, ReverseWeights(2.0, 0.5)).backward()
        q = proxy.detach().softmax(-1)
        assert proxy.grad is not None
        torch.testing.assert_close(proxy.grad, (2.0 * (q - targets) + 0.5 * (q - old)) / 3)
