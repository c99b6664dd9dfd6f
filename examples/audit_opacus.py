"""A training with Opacus that privkd knows nothing of, sound and with a fault, for ``privkd audit model``.

Both clip each record's gradient, add the same noise, and are accounted as if every step drew its records by
Poisson sampling. `train` does; `train_shuffled` deals shuffled batches instead, as most loaders do.

``records`` are the worst case that the accountant allows: all gradients point one way but for a record with a
wrong label. The adversary sees the weights after every step, and takes the likelihood ratio of shuffling.
"""

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.accountants import PRVAccountant
from opacus.data_loader import DPDataLoader
from opacus.optimizers import DPOptimizer
from scipy.special import logsumexp
from torch.utils.data import DataLoader, TensorDataset

NOISE, BATCH, STEPS = 1.0, 5, 100
DELTA = 1e-5


def records():
    """600 records on one line, the sign of each being its class."""
    labels = np.arange(600) % 2
    inputs = np.zeros((600, 4), dtype=np.float32)
    inputs[:, 0] = np.where(labels == 0, 10.0, -10.0)
    return inputs, labels


def claimed_epsilon():
    """What Opacus says of either."""
    accountant = PRVAccountant()
    accountant.history = [(NOISE, 1 / STEPS, STEPS)]
    return accountant.get_epsilon(DELTA)


def train(inputs, labels, seed):
    torch.manual_seed(seed)
    data = TensorDataset(torch.from_numpy(inputs), torch.from_numpy(labels))
    return _trained(DPDataLoader(data, sample_rate=1 / STEPS))


def train_shuffled(inputs, labels, seed):
    torch.manual_seed(seed)
    data = TensorDataset(torch.from_numpy(inputs), torch.from_numpy(labels))
    return _trained(DataLoader(data, batch_size=BATCH, shuffle=True))


def _trained(loader):
    """Weights after every step ``[step, class, feature]``; the first are zero."""
    model = torch.nn.Linear(4, 2, bias=False)
    torch.nn.init.zeros_(model.weight)
    private = GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-4),
        noise_multiplier=NOISE,
        max_grad_norm=1.0,
        expected_batch_size=BATCH,
    )
    seen = [torch.zeros(2, 4)]
    for inputs, labels in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(private(inputs), labels).backward()
        optimizer.step()
        seen.append(model.weight.detach().clone())
    return Seen(torch.stack(seen).double().numpy())


class Seen:
    """What the adversary has: every step's weights."""

    def __init__(self, weights):
        self.sums = -np.diff(weights, axis=0) * BATCH / 1e-4

    def membership(self, inputs, labels):
        """log-ratio of a shuffled epoch with the record and without it ``[record]``."""
        scores = []
        for record, label in zip(inputs, labels, strict=True):
            direction = np.outer(0.5 - np.eye(2)[label], record)
            along = np.tensordot(self.sums, direction / np.linalg.norm(direction)) + BATCH
            # With it one batch of five sums to -3 instead of -5, any of them; without it the last one to -4.
            inside = logsumexp((4 * along - 4) / (2 * NOISE**2)) - np.log(len(along))
            scores.append(inside - (2 * along[-1] - 1) / (2 * NOISE**2))
        return np.array(scores)
