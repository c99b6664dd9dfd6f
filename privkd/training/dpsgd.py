"""One device: distil a student on private records under DP-SGD. The only importer of opacus.

This is the reference and the path of a real device; ``cohort`` computes the same for many at once.
"""

import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, Literal, Self, cast

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleExpandedWeights
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from privkd.config import DpSgdConfig, FitConfig, StudentConfig
from privkd.data.scenario import LabelledSet
from privkd.errors import ModelError
from privkd.models.architecture import Example
from privkd.models.features import Parted
from privkd.models.zoo import Part, trained_parameters
from privkd.privacy.events import Unit
from privkd.privacy.randomness import Randomness, SeededRandomness, Uniforms
from privkd.training.fit import fit
from privkd.training.losses import forward_loss
from privkd.training.proof import (
    BATCHES,
    Probe,
    agree,
    buffers_kept,
    check_apart,
    clipped,
    cure_of,
    gradients_alone,
    keep_statistics,
    perturbed,
    with_cure,
)
from privkd.training.recordwise import Recordwise, record_digests
from privkd.training.units import Chosen, Units

GradSampleMode = Literal["ew", "hooks", "functorch", "autograd"]
"""How per-record gradients are computed: by Opacus with torch's expanded weights, with a hook and a rule for
each layer, or with `torch.func` for each layer; or by plain autograd, one record after the other."""

StreamsOf = Callable[[Tensor], Sequence[Uniforms]]
"""What layers draw for records, given by number ``[record]``: a stream for each."""

_FASTEST_FIRST: tuple[GradSampleMode, ...] = ("ew", "hooks", "functorch")
_KEPT = 64
_AT_ONCE = 1 << 24
"""Bytes of per-record gradients that are summed in double precision at a time."""


@dataclass(frozen=True)
class Mechanism:
    """The public parameters of DP-SGD on one device.

    Attributes:
        recipe: clip norm, sampling rate, steps and optimiser.
        noise_multiplier: the noise's standard deviation over the clip norm.
        expected_batch_size: normaliser of the noised sum, ``sampling_rate`` times the nominal number of units
            on a device: a public constant, never taken from the private records.
        alpha: weight of the teacher in the loss.
        temperature: of the teacher's term.
        probe: public records of the run, on which every computation of gradients is proved before it is
            used; ``None`` for made-up ones.
        unit: what is sampled, and whose gradient is clipped: a record, or a person.
    """

    recipe: DpSgdConfig
    noise_multiplier: float
    expected_batch_size: float
    alpha: float
    temperature: float
    probe: Probe | None = None
    unit: Unit = Unit.RECORD

    @classmethod
    def of(
        cls,
        student: StudentConfig,
        noise_multiplier: float,
        expected_batch_size: float,
        probe: Probe,
        unit: Unit,
    ) -> Self | None:
        """That of a run with these settings and its calibrated noise; ``None`` where it asks for no DP."""
        if noise_multiplier == 0:
            return None
        recipe = with_capped_learning_rate(student.dp, noise_multiplier, expected_batch_size)
        return cls(
            recipe, noise_multiplier, expected_batch_size, student.alpha, student.temperature, probe, unit
        )


def with_capped_learning_rate(
    recipe: DpSgdConfig, noise_multiplier: float, expected_batch_size: float
) -> DpSgdConfig:
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
        self.chosen: Chosen | None = None

    def clip_and_accumulate(self) -> None:
        """Clip each unit's gradient and add them up in double precision.

        A gradient without a finite norm counts for nothing: scaled by ``clip / inf = 0``, an infinity would
        become NaN and the sum would betray its unit. Added in float32, many units' sum may move by more than
        the clip norm when one is added. Which record is whose says ``chosen``; each is its own without it.
        """
        samples = self.grad_samples
        if self.chosen is not None:
            samples = [self.chosen.summed(sample) for sample in samples]
        norms = torch.stack([s.flatten(1).norm(dim=1, dtype=torch.float64) for s in samples]).norm(dim=0)
        factors = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        broken = ~norms.isfinite()
        factors[broken] = 0.0
        for parameter, sample in zip(self.params, samples, strict=True):
            sample[broken] = 0.0
            parameter.summed_grad = _weighted_sum(factors, sample)

    def add_noise(self) -> None:
        """Add ``noise_multiplier * clip_norm`` times the supplied draws to the clipped sum.

        In float64, rounded once; see `Randomness.noise`.
        """
        parameters = self.params
        draws = self._randomness.noise(sum(p.numel() for p in parameters))
        scale = self.noise_multiplier * self.max_grad_norm
        for parameter, noise in zip(parameters, draws.split([p.numel() for p in parameters]), strict=True):
            noise = noise.to(parameter.device).view_as(parameter)
            noised = parameter.summed_grad.view_as(parameter) + scale * noise.double()
            parameter.grad = noised.to(parameter.dtype)


def _weighted_sum(factors: Tensor, samples: Tensor) -> Tensor:
    """``sum_record factors[record] * samples[record]`` in double precision, ``[*shape]``."""
    total = samples.new_zeros(samples[0].numel() if len(samples) else samples.shape[1:].numel()).double()
    size = max(1, _AT_ONCE // max(1, 8 * total.numel()))
    for some, weights in zip(samples.flatten(1).split(size), factors.split(size), strict=True):
        total += weights @ some.double()
    return total.view(samples.shape[1:])


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
    2016, Algorithm 1), for the relation "add or remove one unit", a record or a person: see `units`. An empty
    sample still takes a noised step, and an empty shard trains on noise alone: neither reveals itself. The
    returned weights are the average of the last ``averaging`` share of the iterates, which is
    post-processing. A unit whose gradient is not finite counts for nothing, so that none can betray itself by
    breaking the sum.

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
        DataError: persons are the units, and nothing says whose the records are.
    """
    recipe, parted = mechanism.recipe, Parted.of(model)
    units = Units.on(shard, mechanism.unit)
    features = replace(shard, inputs=parted.features(shard.inputs))
    if mode is None:
        mode = fastest_mode(model, shard.inputs, mechanism)
    with full_precision():
        device = _Device.of(parted.rest, mode, mechanism)
        optimizer = _SuppliedNoiseOptimizer(
            _plain_optimizer(device.parameters, recipe), mechanism, randomness
        )
        average = TailAverage(device.parameters, steps=recipe.steps, share=recipe.averaging)
        digests = cache(lambda: record_digests(features.inputs, features.labels))
        for step in range(recipe.steps):
            chosen = units.chosen(randomness.sample(units.count, recipe.sampling_rate))

            def streams(numbers: Tensor, step: int = step) -> Sequence[Uniforms]:
                return randomness.layers(step, [digests()[i] for i in numbers.tolist()])

            records = chosen.records.to(shard.labels.device)
            device.compute(features, teacher_logits, records, streams)
            optimizer.chosen = chosen
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(device.parameters)
        average.write(device.parameters)
    return parted.rejoined(device.finished(parted.rest))


@dataclass(frozen=True)
class _Device:
    """One student in training, and how its per-record gradients come to be.

    Attributes:
        model: the student; its own module, or Opacus' around it.
        names: of the parameters in training.
        parameters: those.
        mode: how the gradients are computed.
        mechanism: the public parameters.
        draws: whether its layers may draw random numbers.
    """

    model: nn.Module
    names: tuple[str, ...]
    parameters: list[nn.Parameter]
    mode: GradSampleMode
    mechanism: Mechanism
    draws: bool

    @classmethod
    def of(cls, model: nn.Module, mode: GradSampleMode, mechanism: Mechanism) -> Self:
        """A copy of ``model`` with the recipe's part in training.

        Raises:
            ModelError: every parameter of the part in training is frozen.
        """
        part = mechanism.recipe.part
        copied = copy.deepcopy(model).train()
        kept = {id(parameter) for parameter in trained_parameters(copied, part)}
        if not kept:
            raise ModelError(f"the student has nothing to train: part={part!r} is frozen or empty")
        named = [(name, p) for name, p in copied.named_parameters() if id(p) in kept]
        for parameter in copied.parameters():
            parameter.requires_grad_(id(parameter) in kept)
        keep_statistics(copied, [p for _, p in named])
        names, parameters = zip(*named, strict=True)
        draws = any(not _is_settled(module) for module in copied.modules())
        return cls(_wrapped(copied, mode), names, list(parameters), mode, mechanism, draws)

    def compute(
        self,
        shard: LabelledSet,
        teacher_logits: Tensor | None,
        chosen: Tensor,
        streams: StreamsOf,
    ) -> None:
        """Leave each parameter its ``grad_sample`` ``[record, *shape]`` of the records ``chosen``, by number.

        Layers draw from ``streams``. Whatever the model writes to its buffers is undone.
        """
        if not len(chosen):
            for parameter in self.parameters:
                _keep(parameter, torch.zeros((0, *parameter.shape), device=parameter.device))
            return
        if self.mode == "autograd":
            self._one_by_one(shard, teacher_logits, chosen, streams)
            return
        with warnings.catch_warnings():
            # Opacus' hooks need no gradient with respect to the records, of which torch warns.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            self._losses(shard, teacher_logits, chosen, streams).sum().backward()
        for parameter in self.parameters:
            if getattr(parameter, "grad_sample", None) is None:  # it is not used
                _keep(parameter, parameter.new_zeros((len(chosen), *parameter.shape)))

    def _one_by_one(
        self,
        shard: LabelledSet,
        teacher_logits: Tensor | None,
        chosen: Tensor,
        streams: StreamsOf,
    ) -> None:
        rows = []
        for number in chosen.split(1):
            losses = self._losses(shard, teacher_logits, number, streams)
            rows.append(torch.autograd.grad(losses.sum(), self.parameters, allow_unused=True))
        for parameter, found in zip(self.parameters, zip(*rows, strict=True), strict=True):
            _keep(parameter, torch.stack([torch.zeros_like(parameter) if g is None else g for g in found]))

    def _losses(
        self,
        shard: LabelledSet,
        teacher_logits: Tensor | None,
        chosen: Tensor,
        streams: StreamsOf,
    ) -> Tensor:
        drawing = Recordwise(len(chosen), lambda: streams(chosen)) if self.draws else contextlib.nullcontext()
        with buffers_kept(self.model), drawing:
            logits = self.model(shard.inputs[chosen])
        return forward_loss(
            logits,
            shard.labels[chosen],
            None if teacher_logits is None else teacher_logits[chosen],
            alpha=self.mechanism.alpha,
            temperature=self.mechanism.temperature,
        )

    @torch.no_grad()
    def finished(self, original: nn.Module) -> nn.Module:
        """A copy of ``original`` with the trained weights, in evaluation mode.

        Nothing else of what was trained is kept: a buffer, or a tensor that a layer holds on to, may say what
        the records were.
        """
        student = copy.deepcopy(original).eval()
        own = dict(student.named_parameters())
        for name, trained in zip(self.names, self.parameters, strict=True):
            own[name].copy_(trained)
            own[name].grad = None
        return student


def _keep(parameter: nn.Parameter, samples: Tensor) -> None:
    setattr(parameter, "grad_sample", samples)  # noqa: B010


def _is_settled(module: nn.Module) -> bool:
    """Whether it is one of torch's own layers, and one that draws nothing."""
    own = type(module).__module__.startswith(("torch.nn.", "opacus.layers"))
    return own and not isinstance(module, _DRAWING)


_DRAWING = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.RNNBase, nn.MultiheadAttention)


def fastest_mode(model: nn.Module, inputs: Tensor, mechanism: Mechanism) -> GradSampleMode:
    """The fastest way that is proved to compute the per-record gradients of plain autograd for ``model``.

    Tried at the model's own weights and at perturbed ones, on the mechanism's probe, or on made-up records of
    the shape of ``inputs`` ``[record, *shape]`` without one: their number and values, and the clipped sum.
    ``autograd``, which needs no proof, is the last. The order is fixed, so that runs repeat;
    ``benchmarks/cohort.py`` measures it. Ghost clipping is left out: it is slower but for wide dense layers.
    """
    parted, blank = Parted.of(model), inputs.new_zeros((1, *inputs.shape[1:]))
    probe = mechanism.probe
    if probe is None:
        with torch.no_grad(), buffers_kept(model):
            classes = int(copy.deepcopy(model).eval()(blank).shape[-1])
        probe = Probe.made_up(inputs.shape[1:], classes, blank)
    if parted.front is not None:
        probe = probe.through(parted.features)
    example = Example.of(parted.rest)
    find = _fastest_mode if example.architecture.by_value else _fastest_mode.__wrapped__
    return find(example, probe, replace(mechanism, probe=None))


@lru_cache(maxsize=_KEPT)
def _fastest_mode(example: Example, probe: Probe, mechanism: Mechanism) -> GradSampleMode:
    modes = (mode for mode in _FASTEST_FIRST if _is_proved(example.model, mode, probe, mechanism))
    return next(modes, "autograd")


def _is_proved(model: nn.Module, mode: GradSampleMode, probe: Probe, mechanism: Mechanism) -> bool:
    """Whether ``mode`` gives the gradients, and their clipped sum, that plain autograd gives."""
    for tried in (model, perturbed(model)):
        plain = _Device.of(tried, "autograd", mechanism)
        truth = gradients_alone(
            plain.model, plain.parameters, probe, alpha=mechanism.alpha, temperature=mechanism.temperature
        )
        try:
            if not _agrees(_Device.of(tried, mode, mechanism), truth, probe):
                return False
        except Exception:  # whatever a model raises in this mode, another takes it
            return False
    return True


def _agrees(device: _Device, truth: Tensor, probe: Probe) -> bool:
    """Whether the device's gradients are those of ``truth`` ``[record, parameter]`` on the probe."""
    shard = LabelledSet(probe.inputs, probe.labels.to(probe.inputs.device))
    digests = record_digests(probe.inputs, probe.labels)
    recipe = device.mechanism.recipe
    plain = _plain_optimizer(device.parameters, recipe)
    optimizer = _SuppliedNoiseOptimizer(plain, device.mechanism, SeededRandomness(0))

    def streams(numbers: Tensor) -> Sequence[Uniforms]:
        return SeededRandomness(0).layers(0, [digests[i] for i in numbers.tolist()])

    for batch in BATCHES:
        chosen = torch.arange(len(digests))[batch].to(shard.labels.device)
        device.compute(shard, probe.teacher_logits, chosen, streams)
        found = torch.cat([_left(p, "grad_sample").flatten(1) for p in device.parameters], dim=1)
        if not agree(found, truth[batch]):
            return False
        optimizer.clip_and_accumulate()
        total = torch.cat([_left(p, "summed_grad").flatten() for p in device.parameters])
        if not agree(total[None], clipped(truth[batch], recipe.clip_norm).sum(0)[None]):
            return False
        optimizer.zero_grad(set_to_none=True)
    return True


def _left(parameter: nn.Parameter, name: str) -> Tensor:
    """What Opacus keeps with a parameter."""
    return cast(Tensor, getattr(parameter, name))


def _wrapped(model: nn.Module, mode: GradSampleMode) -> nn.Module:
    if mode == "autograd":
        return model
    if mode == "ew":
        return GradSampleModuleExpandedWeights(model, loss_reduction="sum")
    return GradSampleModule(model, loss_reduction="sum", force_functorch=mode == "functorch")


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Have a GPU compute in float32 as it says: TF32 moves norms and clipped sums by parts in a thousand."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


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
    model: nn.Module,
    *,
    input_shape: tuple[int, ...],
    classes: int,
    recipe: DpSgdConfig,
    probe: Probe | None = None,
) -> None:
    """Prove that ``model`` treats each record by itself, and take one real DP step on made-up records.

    ``probe``: public records of the run, for the first; made-up ones without it.

    Raises:
        ModelError: a layer mixes records or is unsupported; the message names it and the cure.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) and (cure := cure_of(module)):
            raise ModelError(
                f"the student cannot be trained with DP-SGD: layer {name!r} ({type(module).__name__}): {cure}"
            )
    if not trained_parameters(model, recipe.part):
        raise ModelError(
            f"the student has nothing to train: part={recipe.part!r} is frozen or empty; take another "
            "student.dp.part, or let that part be trained (requires_grad_(True))"
        )
    blank = next(model.parameters()).new_zeros((0, *input_shape))
    probe = probe or Probe.made_up(input_shape, classes, blank)
    try:
        check_records_apart(model, recipe.part, probe)
        _step_on(model, probe.inputs[:3], classes, recipe)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"the student failed one DP-SGD step on public records: {with_cure(model, str(error))}"
        ) from error


def check_records_apart(model: nn.Module, part: Part, probe: Probe) -> None:
    """Refuse a student that mixes records while its ``part`` is trained. Raises as `proof.check_apart`."""
    trained = copy.deepcopy(model).train()
    check_apart(keep_statistics(trained, trained_parameters(trained, part)), probe, "student")


def seconds_per_step(
    model: nn.Module, *, inputs: Tensor, classes: int, recipe: DpSgdConfig, batch: int
) -> float:
    """How long one DP-SGD step on ``batch`` records takes here, once their features are computed.

    They are public ``inputs`` ``[record, *shape]``, at least one, over and over.
    """
    parted = Parted.of(model)
    features = parted.features(inputs[:batch].clone())
    repeated = features[torch.arange(batch) % len(features)]
    _step_on(parted.rest, repeated[:1], classes, recipe)
    start = time.perf_counter()
    _step_on(parted.rest, repeated, classes, recipe)
    return time.perf_counter() - start


def _step_on(model: nn.Module, inputs: Tensor, classes: int, recipe: DpSgdConfig) -> None:
    """One DP-SGD step on public ``inputs`` ``[record, *shape]`` with made-up labels."""
    batch = len(inputs)
    shard = LabelledSet(inputs, torch.arange(batch, device=inputs.device) % classes)
    step = recipe.model_copy(update={"steps": 1, "sampling_rate": 1.0})
    mechanism = Mechanism(step, 1.0, expected_batch_size=float(batch), alpha=0.5, temperature=2.0)
    logits = torch.zeros((batch, classes), device=inputs.device)
    train_private(model, shard, logits, mechanism, SeededRandomness(0))
