"""The cloud: train on public data, teach, absorb what the students released, and roll back what harms."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privkd.config import FitConfig, ReverseConfig
from privkd.data.scenario import LabelledSet
from privkd.distill import ReverseWeights, divergence, reverse_loss, soft_targets
from privkd.fitting import accuracy, fit, logits_of
from privkd.frontend import Parted
from privkd.reverse import Targets


@dataclass(frozen=True)
class PublicData:
    """All that the cloud holds: labelled ``train`` and ``validation``, and the unlabelled ``proxy``
    ``[query, *shape]``."""

    train: LabelledSet
    validation: LabelledSet
    proxy: Tensor

    @property
    def inputs(self) -> Tensor:
        """All public inputs on which a student is distilled, ``[record, *shape]``."""
        return torch.cat([self.train.inputs, self.proxy])


_SHARES = (1.0, 0.5, 0.25)


@dataclass(frozen=True)
class Absorbed:
    """A teacher after an update, and the share of the update that the gate let through, 0 for none."""

    teacher: nn.Module
    accepted: float


def train_teacher(
    model: nn.Module, public: LabelledSet, config: FitConfig, generator: torch.Generator
) -> nn.Module:
    """The teacher trained on the public labelled data by cross-entropy."""

    def loss(trained: nn.Module, chosen: Tensor) -> Tensor:
        chosen = chosen.to(public.labels.device)
        return F.cross_entropy(trained(public.inputs[chosen]), public.labels[chosen])

    return fit(model, loss, records=len(public), config=config, generator=generator)


def distil_public(
    student: nn.Module,
    teacher: nn.Module,
    data: PublicData,
    temperature: float,
    config: FitConfig,
    generator: torch.Generator,
) -> nn.Module:
    """A student distilled from the teacher on all public inputs by ``T^2 KL(teacher || student)``.

    No private record is touched, so it costs no privacy.
    """
    inputs = data.inputs
    targets = soft_targets(logits_of(teacher, inputs), temperature)
    parted = Parted.of(student)
    features = parted.features(inputs)

    def loss(trained: nn.Module, chosen: Tensor) -> Tensor:
        chosen = chosen.to(inputs.device)
        return temperature**2 * divergence(targets[chosen], trained(features[chosen]), temperature).mean()

    return parted.rejoined(fit(parted.rest, loss, records=len(inputs), config=config, generator=generator))


def absorb(
    teacher: nn.Module,
    targets: Targets,
    data: PublicData,
    config: ReverseConfig,
    generator: torch.Generator,
) -> Absorbed:
    """The teacher after learning ``targets``, unless its public validation accuracy would fall.

    Without any targets the teacher stays as it is.
    """
    if not len(targets.queries):
        return Absorbed(teacher, 0.0)
    weights = ReverseWeights(config.trust, config.anchor)
    device = data.train.labels.device

    def loss(trained: nn.Module, chosen: Tensor) -> Tensor:
        chosen = chosen.to(device)
        asked = torch.randint(len(targets.queries), (config.fit.batch_size,), generator=generator)
        queries = data.proxy[targets.queries[asked]]
        return reverse_loss(
            trained(data.train.inputs[chosen]),
            data.train.labels[chosen],
            trained(queries),
            targets.probabilities[asked],
            targets.weights[asked],
            targets.prior[asked],
            weights,
        )

    proposal = fit(teacher, loss, records=len(data.train), config=config.fit, generator=generator)
    return gate(teacher, proposal, data.validation, config.tolerance)


def gate(old: nn.Module, proposal: nn.Module, validation: LabelledSet, tolerance: float) -> Absorbed:
    """The largest part of an update that does not lower the public validation accuracy, or none of it.

    Tried are the whole update, then the halfway and quarter-way points between the old weights and the
    new: where the whole step forgets, a shorter one often does not.

    Args:
        old: the teacher before.
        proposal: the teacher after the whole update.
        validation: public labelled data; empty lets everything through.
        tolerance: a fall in accuracy that is still accepted.
    """
    if not len(validation):
        return Absorbed(proposal, 1.0)
    before = accuracy(old, validation.inputs, validation.labels)
    for share in _SHARES:
        candidate = between(old, proposal, share)
        if accuracy(candidate, validation.inputs, validation.labels) >= before - tolerance - 1e-9:
            return Absorbed(candidate, share)
    return Absorbed(old, 0.0)


@torch.no_grad()
def between(old: nn.Module, new: nn.Module, share: float) -> nn.Module:
    """The model whose floating-point weights lie ``share`` of the way from ``old`` to ``new``."""
    blend = copy.deepcopy(new)
    start = old.state_dict()
    for name, tensor in blend.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.lerp(start[name], tensor, share))
    return blend
