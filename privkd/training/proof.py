"""What is proved of a model before it touches a private record, on public records of the run.

DP-SGD bounds one record's influence only where two things hold: the model answers each record as if it were
alone, and whatever computes per-record gradients computes those of plain autograd, record by record. Layer
lists promise neither: a model may fold another axis into the batch, use a weight twice, or mix records behind
a gate that is shut in the beginning. So both are tried out, on two batch sizes that share no factor, at the
model's own weights and at perturbed ones, on records of the run's own type and range and on extreme ones.

It is a proof by trial: a model that behaves otherwise on other inputs or at other weights is not found out
here (see docs/privacy.md); the audit that ends each run goes through the trained students once more.
"""

import copy
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from privkd.errors import ModelError
from privkd.models.architecture import Example
from privkd.models.features import FrontEnd, Parted
from privkd.models.inputs import InputType
from privkd.privacy.randomness import SeededRandomness
from privkd.training.losses import forward_loss
from privkd.training.recordwise import Recordwise, record_digests

BATCHES = (slice(0, 3), slice(3, 10))
"""The records of a probe as two batches, of three and of seven."""
_RECORDS = 10
_POOL = 256
_CLOSE, _NEGLIGIBLE = 1e-3, 1e-5
_CLOSE_LOGITS, _CLOSE_DOUBLES = 1e-3, 1e-7
_PERTURBED = 0.1
_KEPT = 8

ForRecords = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Probe:
    """Public records on which a model is tried out. Two with equal records are equal.

    Attributes:
        inputs: ``[10, *shape]``.
        labels: int64 ``[10]``.
        teacher_logits: ``[10, class]``, made up.
    """

    inputs: Tensor = field(compare=False)
    labels: Tensor = field(compare=False)
    teacher_logits: Tensor = field(compare=False)
    _digest: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(str(self.inputs.shape).encode())
        for tensor in (self.inputs, self.teacher_logits):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        object.__setattr__(self, "_digest", digest.digest())

    @classmethod
    def of(cls, public: Tensor, classes: int) -> Self:
        """Out of ``public`` inputs ``[record, *shape]``: some as they are, and extremes of their kind.

        Extremes are the least and the largest value of each feature, features of different records together,
        values drawn over the whole range, and, unless all values are whole numbers such as tokens, a record
        ten times as far out as any. Token ids stay such, and one extreme is a record of padding alone.
        """
        pool = public[:_POOL].detach().cpu()
        generator = torch.Generator().manual_seed(0)
        if not pool.is_floating_point():
            return cls._of(_token_records(pool, generator), classes, generator, public.device)
        low, high = pool.amin(0), pool.amax(0)
        spread = pool.max() - pool.min()
        whole = bool((pool == pool.round()).all())
        drawn = pool.min() + spread * torch.rand(low.shape, generator=generator)
        far = high + 10 * (spread if spread > 0 else torch.ones(())) if not whole else _mixed(pool, generator)
        extremes = [_mixed(pool, generator), low, high, drawn.round() if whole else drawn, far]
        ordinary = [pool[i % len(pool)] for i in range(_RECORDS - len(extremes))]
        records = torch.stack([*ordinary[:2], extremes[0], *ordinary[2:], *extremes[1:]])
        if not whole and not spread > 0:
            # Equal records would hide that they are mixed.
            records = records + 0.1 * torch.rand(records.shape, generator=generator)
        return cls._of(records.to(public.dtype), classes, generator, public.device)

    @classmethod
    def _of(cls, records: Tensor, classes: int, generator: torch.Generator, device: torch.device) -> Self:
        logits = 2 * torch.randn(_RECORDS, classes, generator=generator)
        return cls(records.to(device), torch.arange(_RECORDS) % classes, logits.to(device, torch.float32))

    @classmethod
    def made_up(cls, shape: Sequence[int], classes: int, like: Tensor) -> Self:
        """Out of made-up records, where no public ones are at hand; in the type of ``like``."""
        generator = torch.Generator().manual_seed(0)
        records = InputType(tuple(shape), like.dtype).made_up(_POOL // 8, generator=generator)
        return cls.of(records.to(like.device), classes)

    def through(self, front: ForRecords) -> "Probe":
        """The probe as it is after a front end."""
        return Probe(front(self.inputs), self.labels, self.teacher_logits)


def _token_records(pool: Tensor, generator: torch.Generator) -> Tensor:
    """Ids int64 ``[10, *shape]`` out of those of ``pool``: records as they are, and extremes."""
    known = pool.unique()
    drawn = known[torch.randint(len(known), pool.shape[1:], generator=generator)]
    extremes = [_mixed(pool, generator), pool.amin(0), pool.amax(0), drawn, torch.zeros_like(pool[0])]
    ordinary = [pool[i % len(pool)] for i in range(_RECORDS - len(extremes))]
    return torch.stack([*ordinary[:2], extremes[0], *ordinary[2:], *extremes[1:]])


def _mixed(pool: Tensor, generator: torch.Generator) -> Tensor:
    """A record each of whose features comes from a record of its own."""
    chosen = torch.randint(len(pool), (1, *pool.shape[1:]), generator=generator)
    return pool.gather(0, chosen)[0]


@torch.no_grad()
def perturbed(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with each weight moved by about a tenth of its tensor's size, at least by 0.01."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in moved.parameters():
        if parameter.is_floating_point():
            size = _PERTURBED * (parameter.abs().mean() + _PERTURBED)
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))
    return moved


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put the model's buffers back as they were: what a forward pass writes there is of its records."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, kept in before:
                buffer.copy_(kept)


def keep_statistics(model: nn.Module, trained: Sequence[nn.Parameter]) -> nn.Module:
    """Leave layers with running statistics in evaluation mode where none of their own weights is ``trained``.

    In training mode such a layer would normalise by the statistics of its batch, which mixes records.
    """
    kept = {id(parameter) for parameter in trained}
    for module in model.modules():
        tracks = getattr(module, "running_mean", None) is not None
        if tracks and not any(id(p) in kept for p in module.parameters(recurse=False)):
            module.eval()
    return model


def check_apart(model: nn.Module, probe: Probe, who: str) -> None:
    """Refuse a model whose answer to a record depends on other records: of its batch, or seen before.

    ``model`` is tried in the mode it is in, with its own weights and with perturbed ones; in double precision
    where it can, so that nothing hides in rounding. ``who`` is ``student`` or ``teacher``, for the message.

    Raises:
        ModelError: it does; the layer and a cure are named. Or it cannot answer the probe at all.
    """
    parted = Parted.of(model)
    if parted.front is not None and parted.front.opened() is not parted.front:
        _check_encoder(Example.of(parted.front), probe)
        model, probe = parted.rest, probe.through(parted.features)
    for tried in (copy.deepcopy(model), perturbed(model)):
        try:
            exact = probe.inputs.double() if probe.inputs.is_floating_point() else probe.inputs
            found = _dependence(copy.deepcopy(tried).double(), exact, probe, _CLOSE_DOUBLES)
        except ModelError:
            raise
        except Exception:  # not every model knows doubles
            found = _in_its_own_type(tried, probe)
        if found is not None:
            raise ModelError(f"the {who} {_CANNOT[who]}: {found}")


@lru_cache(maxsize=_KEPT)
def _check_encoder(example: Example, probe: Probe) -> None:
    """Refuse an encoder whose features of a record are not those of the record alone, and always the same."""
    assert isinstance(example.model, FrontEnd)
    encoder = example.model.opened().eval()
    try:
        found = _own_features(encoder, probe)
    except ModelError:
        raise
    except Exception as error:
        found = f"it fails on public records: {with_cure(encoder, str(error))}"
    if found is not None:
        raise ModelError(f"the encoder cannot stand below what is trained privately: {found}")


def _own_features(encoder: nn.Module, probe: Probe) -> str | None:
    whole = not probe.inputs.is_floating_point()
    encoder, inputs = encoder.double(), probe.inputs if whole else probe.inputs.double()
    first, again = (_drawn_features(encoder, inputs[:1], seed) for seed in (0, 1))
    if not torch.equal(first, again):
        return "it gives a record other features the next time: draw nothing, and keep nothing between calls"
    return _dependence(encoder, inputs, probe, _CLOSE_DOUBLES)


@torch.no_grad()
def _drawn_features(encoder: nn.Module, inputs: Tensor, seed: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        features: Tensor = encoder(inputs)
    return features


def _in_its_own_type(model: nn.Module, probe: Probe) -> str | None:
    try:
        return _dependence(model, probe.inputs, probe, _CLOSE_LOGITS)
    except ModelError:
        raise
    except Exception as error:
        return f"it fails on public records: {with_cure(model, str(error))}"


def with_cure(model: nn.Module, problem: str) -> str:
    """A layer that is known to make problems, with its cure; else the problem in one line."""
    for name, module in model.named_modules():
        if cure := cure_of(module):
            return f"layer {name!r} ({type(module).__name__}): {cure}"
    return f"{' '.join(problem.split())}; every layer must treat each record by itself"


_CANNOT = {"student": "cannot be trained with DP-SGD", "teacher": "cannot teach private records"}


@torch.no_grad()
def _dependence(model: nn.Module, inputs: Tensor, probe: Probe, tolerance: float) -> str | None:
    """How the answers depend on other records, in words; ``None`` where they do not."""
    digests = record_digests(probe.inputs, probe.labels)

    def answer(records: slice) -> Tensor:
        with buffers_kept(model), seeded_draws(digests[records]):
            out: Tensor = model(inputs[records])
        return out

    alone = torch.cat([answer(slice(i, i + 1)) for i in range(len(inputs))])
    if not _close(answer(slice(0, 1)), alone[:1], tolerance):
        return "its answer to a record depends on the records that it saw before: keep nothing between calls"
    for batch in BATCHES:
        try:
            together = answer(batch)
        except ModelError:  # of random draws that records would share: computed one at a time, they do not
            return None
        if together.shape != alone[batch].shape or not _close(together, alone[batch], tolerance):
            return (
                "its answer to a record depends on the other records of the batch; "
                f"{_culprit(model, inputs, batch, tolerance)}"
            )
    return None


def _close(found: Tensor, truth: Tensor, tolerance: float) -> bool:
    scale = float(truth[truth.isfinite()].abs().max()) if bool(truth.isfinite().any()) else 0.0
    return torch.allclose(
        found, truth, rtol=tolerance, atol=tolerance * 1e-2 * max(1.0, scale), equal_nan=True
    )


def _culprit(model: nn.Module, inputs: Tensor, batch: slice, tolerance: float) -> str:
    """The innermost layer that takes a record alike and gives it back otherwise, and what to do about it."""
    first = slice(batch.start, batch.start + 1)
    alone, together = (_rows_of(model, inputs[records]) for records in (first, batch))
    for (name, module, x, y), (_, _, other_x, other_y) in zip(alone, together, strict=False):
        if x.shape != other_x.shape or y.shape != other_y.shape:
            continue
        if _close(other_x, x, tolerance) and not _close(other_y, y, tolerance):
            cure = cure_of(module) or "treat each record by itself"
            where = f"layer {name!r} ({type(module).__name__})" if name else "its own forward()"
            return f"{where}: {cure}"
    return "treat each record by itself"


def _rows_of(model: nn.Module, inputs: Tensor) -> list[tuple[str, nn.Module, Tensor, Tensor]]:
    """What each layer takes and gives for the first record, in the order in which they end."""
    seen: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def first(value: Any) -> Tensor | None:
        if not isinstance(value, Tensor) or not value.dim() or len(value) % len(inputs):
            return None
        return value[: len(value) // len(inputs)].clone()

    def note(name: str, module: nn.Module, given: Any, returned: Any) -> None:
        x, y = first(given[0] if given else None), first(returned)
        if x is not None and y is not None:
            seen.append((name, module, x, y))

    hooks = [
        module.register_forward_hook(lambda m, x, y, name=name: note(name, m, x, y))
        for name, module in model.named_modules()
    ]
    try:
        with buffers_kept(model), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def cure_of(module: nn.Module) -> str | None:
    """What to take in place of a layer that mixes records, or has no per-record gradients."""
    kind = type(module).__name__
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "use GroupNorm, which does not mix records, or freeze its weights"
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return f"use opacus.layers.DP{kind}"
    old = {type(hook).__name__ for hook in module._forward_pre_hooks.values()}
    for hook, name in (("WeightNorm", "weight_norm"), ("SpectralNorm", "spectral_norm")):
        if hook in old:
            return f"use torch.nn.utils.parametrizations.{name}"
    return None


def gradients_alone(
    model: nn.Module, parameters: Sequence[nn.Parameter], probe: Probe, *, alpha: float, temperature: float
) -> Tensor:
    """Each record's gradient by plain autograd on the record alone, ``[record, parameter]``.

    Layers draw as in `seeded_draws`.
    """
    digests = record_digests(probe.inputs, probe.labels)
    rows = []
    for i in range(len(probe.inputs)):
        one = slice(i, i + 1)
        with buffers_kept(model), seeded_draws(digests[one]):
            losses = forward_loss(
                model(probe.inputs[one]),
                probe.labels[one].to(probe.inputs.device),
                probe.teacher_logits[one],
                alpha=alpha,
                temperature=temperature,
            )
        found = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(parameters, found, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def seeded_draws(digests: Sequence[bytes]) -> Recordwise:
    """What layers draw for the records of these ``digests`` while a proof tries them."""
    return Recordwise(len(digests), lambda: SeededRandomness(0).layers(0, digests))


def clipped(gradients: Tensor, clip_norm: float) -> Tensor:
    """The gradients ``[record, parameter]`` as DP-SGD adds them up: clipped, and zero where not finite."""
    norms = gradients.double().norm(dim=1, keepdim=True)
    safe = torch.where(norms.isfinite(), gradients.double(), 0.0)
    return safe * (clip_norm / (norms + 1e-6)).clamp(max=1.0).nan_to_num(0.0)


def agree(found: Tensor, truth: Tensor) -> bool:
    """Whether gradients ``[record, parameter]`` are those of ``truth``, as far as rounding allows."""
    if found.shape != truth.shape:
        return False
    found, truth = found.double(), truth.double()
    finite = truth.isfinite().all(1)
    truth = truth[finite]
    norms = truth.norm(dim=1)
    largest = norms.max() if len(norms) else torch.zeros(())
    apart = (found[finite] - truth).norm(dim=1)
    return bool((apart <= _CLOSE * norms + _NEGLIGIBLE * largest).all())


def one_hots(count: int) -> Iterator[Tensor]:
    """Weights that choose each of ``count`` records by itself, and then all of them."""
    return itertools.chain(torch.eye(count), [torch.ones(count)])
