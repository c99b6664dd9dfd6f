"""One device: distil a student on private records under DP-SGD. The only importer of opacus.

This is the reference and the path of a real device; ``cohort`` computes the same for many at once.
"""

import copy
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from opacus import GradSampleModule
from opacus.grad_sample import AbstractGradSampleModule, GradSampleModuleExpandedWeights
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from privkd.config import DpSgdConfig, FitConfig
from privkd.data.scenario import LabelledSet
from privkd.distill import forward_loss
from privkd.errors import ModelError
from privkd.fitting import fit
from privkd.frontend import Parted
from privkd.models import trained_parameters
from privkd.randomness import Randomness, SeededRandomness

GradSampleMode = Literal["ew", "hooks", "functorch"]
"""How Opacus computes per-example gradients: torch's expanded weights, a hook and a rule for each layer, or
`torch.func` for each layer."""


@dataclass(frozen=True)
class Mechanism:
    """The public parameters of DP-SGD on one device.

    Attributes:
        recipe: clip norm, sampling rate, steps and optimiser.
        noise_multiplier: the noise's standard deviation over the clip norm.
        expected_batch_size: normaliser of the noised sum, ``sampling_rate`` times the nominal shard
            size: a public constant, never taken from the private records.
        alpha: weight of the teacher in the loss.
        temperature: of the teacher's term.
    """

    recipe: DpSgdConfig
    noise_multiplier: float
    expected_batch_size: float
    alpha: float
    temperature: float


def quieted(recipe: DpSgdConfig, noise_multiplier: float, expected_batch_size: float) -> DpSgdConfig:
    """``recipe`` with its learning rate lowered until ``step_noise`` holds.

    One step of SGD adds noise of standard deviation ``learning_rate * noise_multiplier * clip_norm /
    expected_batch_size`` to each weight: all of it public. Adam normalises its steps and is left alone.
    """
    if recipe.optimizer == "adam" or noise_multiplier == 0:
        return recipe
    limit = recipe.step_noise * expected_batch_size / (noise_multiplier * recipe.clip_norm)
    return recipe.model_copy(update={"learning_rate": min(recipe.learning_rate, limit)})


class _SuppliedNoiseOptimizer(DPOptimizer):
    """Opacus' optimiser with the noise drawn by the caller's source instead of torch's generator."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, mechanism: Mechanism, randomness: Randomness
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.recipe.clip_norm,
            expected_batch_size=mechanism.expected_batch_size,
            loss_reduction="mean",
        )
        self._randomness = randomness

    def clip_and_accumulate(self) -> None:
        """Clip each record's gradient and add them up; a gradient without a finite norm counts for nothing.

        Scaled by ``clip / inf = 0``, an infinity would become NaN and the sum would betray its record.
        """
        samples = self.grad_samples
        if len(samples[0]):
            norms = torch.stack([sample.reshape(len(sample), -1).norm(dim=1) for sample in samples])
            broken = ~norms.norm(dim=0).isfinite()
            for sample in samples:
                sample[broken] = 0.0
        super().clip_and_accumulate()

    def add_noise(self) -> None:
        """Add ``noise_multiplier * clip_norm`` times the supplied draws to the clipped sum.

        In float64, rounded once; see `Randomness.noise`.
        """
        parameters = self.params
        draws = self._randomness.noise(sum(p.numel() for p in parameters))
        scale = self.noise_multiplier * self.max_grad_norm
        for parameter, noise in zip(parameters, draws.split([p.numel() for p in parameters]), strict=True):
            noise = noise.to(parameter.device).view_as(parameter)
            noised = parameter.summed_grad.view_as(parameter).double() + scale * noise.double()
            parameter.grad = noised.to(parameter.dtype)


def train_private(
    model: nn.Module,
    shard: LabelledSet,
    teacher_logits: Tensor | None,
    mechanism: Mechanism,
    randomness: Randomness,
    *,
    mode: GradSampleMode | None = None,
) -> nn.Module:
    """Train a copy of ``model`` on a device's private ``shard`` with DP-SGD, and return it.

    ``recipe.steps`` Poisson-sampled steps of per-example clipping in L2 and Gaussian noise (Abadi et al.
    2016, Algorithm 1), for the relation "add or remove one record". An empty sample still takes a noised
    step, and an empty shard trains on noise alone: neither reveals itself. The returned weights are the
    average of the last ``averaging`` share of the iterates, which is post-processing. A record whose gradient
    is not finite counts for nothing, so that no record can betray itself by breaking the sum.

    Args:
        model: the student before this round; left unchanged.
        shard: private records; its length never leaves this function.
        teacher_logits: the frozen teacher's answers on the shard ``[record, class]``, or ``None``.
        mechanism: the public parameters.
        randomness: source of the samples and of the noise.
        mode: how per-example gradients are computed; by default the fastest, see `fastest_mode`. All modes
            compute the same.

    Raises:
        ModelError: every parameter of the part in training is frozen.
    """
    recipe, parted = mechanism.recipe, Parted.of(model)
    shard = replace(shard, inputs=parted.features(shard.inputs))
    trained = copy.deepcopy(parted.rest).train()
    frozen = {name for name, parameter in trained.named_parameters() if not parameter.requires_grad}
    kept = {id(parameter) for parameter in trained_parameters(trained, recipe.part)}
    for parameter in trained.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    if not kept:
        raise ModelError(f"the student has nothing to train: part={recipe.part!r} is frozen or empty")
    wrapped = _wrapped(trained, mode or fastest_mode(trained, shard.inputs))
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = _SuppliedNoiseOptimizer(_plain_optimizer(parameters, recipe), mechanism, randomness)
    average = TailAverage(parameters, steps=recipe.steps, share=recipe.averaging)
    for _ in range(recipe.steps):
        chosen = randomness.sample(len(shard), recipe.sampling_rate).to(shard.labels.device)
        _per_example_gradients(wrapped, parameters, shard, teacher_logits, chosen, mechanism)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(parameters)
    average.write(parameters)
    wrapped.to_standard_module()
    for name, parameter in trained.named_parameters():
        parameter.requires_grad_(name not in frozen)
        parameter.grad = None
    return parted.rejoined(trained.eval())


def fastest_mode(model: nn.Module, inputs: Tensor) -> GradSampleMode:
    """``ew`` where torch's expanded weights know every layer in training, else ``hooks``.

    A fixed rule, so that runs repeat; ``benchmarks/cohort.py`` measures it. On two made-up records like
    ``inputs`` ``[record, *shape]``, the per-example gradients must equal those of each record by itself.
    Ghost clipping is left out: it is slower but for wide dense layers.
    """
    probed = copy.deepcopy(model).eval()
    parameters = [parameter for parameter in probed.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(0)
    records = torch.rand((2, *inputs.shape[1:]), generator=generator).to(inputs)
    try:
        alone = [torch.autograd.grad(_curved(probed(record)), parameters) for record in records.split(1)]
        _curved(_wrapped(probed, "ew")(records)).backward()
        found: list[Tensor] = [getattr(parameter, "grad_sample") for parameter in parameters]  # noqa: B009
        same = all(
            torch.allclose(each, torch.stack(truth), rtol=1e-3, atol=1e-5)
            for each, truth in zip(found, zip(*alone, strict=True), strict=True)
        )
    except Exception:  # whatever a model raises here, the hooks take it or say why not
        return "hooks"
    return "ew" if same else "hooks"


def _curved(logits: Tensor) -> Tensor:
    """A loss that gives every record and logit its own output gradient."""
    return logits.square().sum()


def _wrapped(model: nn.Module, mode: GradSampleMode) -> AbstractGradSampleModule:
    if mode == "ew":
        return GradSampleModuleExpandedWeights(model, loss_reduction="sum")
    return GradSampleModule(model, loss_reduction="sum", force_functorch=mode == "functorch")


def train_unprotected(
    model: nn.Module,
    shard: LabelledSet,
    teacher_logits: Tensor | None,
    config: FitConfig,
    generator: torch.Generator,
    *,
    alpha: float,
    temperature: float,
) -> nn.Module:
    """Train a copy of ``model`` on a device's records without any protection, and return it.

    For runs that ask for none, and for controls. Arguments as for `train_private`; batches and optimiser
    are those of `fitting.fit`, the loss is the batch mean of `distill.forward_loss`.
    """

    parted = Parted.of(model)
    features = parted.features(shard.inputs)

    def loss(trained: nn.Module, chosen: Tensor) -> Tensor:
        chosen = chosen.to(shard.labels.device)
        targets = None if teacher_logits is None else teacher_logits[chosen]
        losses = forward_loss(
            trained(features[chosen]), shard.labels[chosen], targets, alpha=alpha, temperature=temperature
        )
        return losses.mean()

    return parted.rejoined(fit(parted.rest, loss, records=len(shard), config=config, generator=generator))


def _plain_optimizer(parameters: Sequence[nn.Parameter], recipe: DpSgdConfig) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=recipe.learning_rate)
    return torch.optim.SGD(parameters, lr=recipe.learning_rate, momentum=recipe.momentum)


def _per_example_gradients(
    wrapped: AbstractGradSampleModule,
    parameters: Sequence[nn.Parameter],
    shard: LabelledSet,
    teacher_logits: Tensor | None,
    chosen: Tensor,
    mechanism: Mechanism,
) -> None:
    if not bool(chosen.any()):
        for parameter in parameters:
            setattr(parameter, "grad_sample", torch.zeros((0, *parameter.shape), device=parameter.device))  # noqa: B010
        return
    targets = None if teacher_logits is None else teacher_logits[chosen]
    losses = forward_loss(
        wrapped(shard.inputs[chosen]),
        shard.labels[chosen],
        targets,
        alpha=mechanism.alpha,
        temperature=mechanism.temperature,
    )
    with warnings.catch_warnings():
        # Opacus' hooks need no gradient with respect to the records, of which torch warns.
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        losses.sum().backward()


class TailAverage:
    """Running mean of the iterates of the last ``share`` of ``steps`` (Polyak averaging)."""

    def __init__(self, parameters: Sequence[Tensor], *, steps: int, share: float) -> None:
        self._skip = steps - max(1, round(steps * share))
        self._seen = 0
        self._means = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor]) -> None:
        """Take in one iterate."""
        self._seen += 1
        count = self._seen - self._skip
        if count <= 0:
            return
        for mean, parameter in zip(self._means, parameters, strict=True):
            mean.lerp_(parameter.detach(), 1.0 / count)

    @torch.no_grad()
    def write(self, parameters: Sequence[Tensor]) -> None:
        """Put the mean into ``parameters``."""
        for mean, parameter in zip(self._means, parameters, strict=True):
            parameter.copy_(mean)


def check_trainable(
    model: nn.Module, *, input_shape: tuple[int, ...], classes: int, recipe: DpSgdConfig
) -> None:
    """Prove by one real DP step on made-up records that ``model`` can be trained privately.

    Raises:
        ModelError: a layer is unsupported; the message names it and the cure.
    """
    problems = ModuleValidator.validate(copy.deepcopy(model).train(), strict=False)
    if problems:
        raise ModelError(f"the student cannot be trained with DP-SGD: {_with_cure(model, str(problems[0]))}")
    try:
        _check_records_apart(model, input_shape)
        _made_up_step(model, input_shape, classes, recipe, batch=3)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"the student failed one DP-SGD step on made-up records: {_with_cure(model, str(error))}"
        ) from error


@torch.no_grad()
def _check_records_apart(model: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Clipping bounds one record's influence only where no record's logits depend on another record."""
    trained = copy.deepcopy(model).train()
    records = torch.rand((4, *input_shape), generator=torch.Generator().manual_seed(0))
    logits = []
    for others in (records[1:3], records[2:]):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            logits.append(trained(torch.cat([records[:1], others]))[0])
    if not torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-5):
        raise ModelError(
            "the student cannot be trained with DP-SGD: its answer to a record depends on the other records "
            "of the batch; treat each record by itself"
        )


def seconds_per_step(
    model: nn.Module, *, input_shape: tuple[int, ...], classes: int, recipe: DpSgdConfig, batch: int
) -> float:
    """How long one DP-SGD step on ``batch`` made-up records takes here, once their features are computed."""
    parted = Parted.of(model)
    shape = tuple(parted.features(torch.zeros((1, *input_shape))).shape[1:])
    _made_up_step(parted.rest, shape, classes, recipe, batch=1)
    start = time.perf_counter()
    _made_up_step(parted.rest, shape, classes, recipe, batch=batch)
    return time.perf_counter() - start


def _made_up_step(
    model: nn.Module, input_shape: tuple[int, ...], classes: int, recipe: DpSgdConfig, batch: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    shard = LabelledSet(torch.rand((batch, *input_shape), generator=generator), torch.arange(batch) % classes)
    step = recipe.model_copy(update={"steps": 1, "sampling_rate": 1.0})
    mechanism = Mechanism(step, 1.0, expected_batch_size=float(batch), alpha=0.5, temperature=2.0)
    train_private(model, shard, torch.zeros(batch, classes), mechanism, SeededRandomness(0))


def _with_cure(model: nn.Module, problem: str) -> str:
    line = " ".join(problem.split())
    for name, module in model.named_modules():
        cure = _cure(module)
        if cure:
            return f"layer {name!r} ({type(module).__name__}): {cure}"
    if "inplace" in line:
        for name, module in model.named_modules():
            if getattr(module, "inplace", False):
                return f"layer {name!r} ({type(module).__name__}) works in place: set inplace=False"
    return f"{line}; every layer must treat each record by itself and have per-sample gradients in Opacus"


def _cure(module: nn.Module) -> str | None:
    """What to take in place of a layer that Opacus refuses."""
    kind = type(module).__name__
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "use GroupNorm, which does not mix records"
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
        return "set track_running_stats=False, or use GroupNorm"
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return f"use opacus.layers.DP{kind}"
    return None
