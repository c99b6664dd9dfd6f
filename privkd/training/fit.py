"""Ordinary training without DP: on public data, and on devices of runs that ask for no protection."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from privkd.config import FitConfig
from privkd.errors import TrainingError
from privkd.models.features import Parted

_NUMBERS_AT_ONCE = 200_000
"""How many input numbers are answered in one batch: their activations should stay in a core's caches."""

BatchLoss = Callable[[nn.Module, Tensor], Tensor]
"""Maps a model and the indices of a batch, int64 ``[record]``, to the batch's mean loss."""


def fit(
    model: nn.Module, loss: BatchLoss, *, records: int, config: FitConfig, generator: torch.Generator
) -> nn.Module:
    """Train a copy of ``model`` by AdamW with a learning rate that falls linearly to zero, and return it.

    Args:
        model: left unchanged.
        loss: see `BatchLoss`.
        records: number of records; each step draws ``config.batch_size`` of them with replacement.
            With none, the copy is returned untrained.
        config: steps, batch size, learning rate and weight decay.
        generator: on the CPU; source of the batches.

    Raises:
        TrainingError: a loss on the way, or a weight at the end, is not finite.
    """
    trained = quick_layout(model).train()
    finite = torch.tensor(True)
    if records:
        optimizer = torch.optim.AdamW(
            trained.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.steps)
        for _ in range(config.steps):
            chosen = torch.randint(records, (config.batch_size,), generator=generator)
            optimizer.zero_grad(set_to_none=True)
            value = loss(trained, chosen)
            value.backward()
            # An infinite loss may leave gradients finite, and gathered here it costs no synchronisation.
            finite = finite.to(value.device) & value.detach().isfinite()
            optimizer.step()
            schedule.step()
    for parameter in trained.parameters():
        parameter.grad = None
    _forget_graphs(trained)
    check_finite(trained, "the model", config.learning_rate)
    if not bool(finite):
        raise TrainingError(
            f"a loss was not finite in training at learning rate {config.learning_rate:g}: lower it, or "
            "scale the inputs"
        )
    return _laid_out(trained, torch.contiguous_format).eval()


def _forget_graphs(model: nn.Module) -> None:
    """Detach what layers hold on to, such as their last features: a model with a graph cannot be copied."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if not name.startswith("_") and _holds_graph(value):
                setattr(module, name, _detached(value))


def _holds_graph(value: Any) -> bool:
    if type(value) in (list, tuple, dict):
        return any(map(_holds_graph, value.values() if type(value) is dict else value))
    return isinstance(value, Tensor) and value.grad_fn is not None


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) in (list, tuple):
        return type(value)(map(_detached, value))
    return {key: _detached(item) for key, item in value.items()} if type(value) is dict else value


def quick_layout(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose weights lie in memory as its layers are fastest on a CPU.

    torch pools images with channels last several times faster. Only rounding differs. A user's own layer may
    count on the usual layout, so a model with one keeps it.
    """
    copied = copy.deepcopy(model)
    layers = list(copied.modules())
    pools = any(isinstance(layer, nn.MaxPool2d) for layer in layers)
    known = all(type(layer).__module__.startswith("torch.nn.") for layer in layers)
    on_cpu = all(tensor.device.type == "cpu" for tensor in copied.parameters())
    return _laid_out(copied, torch.channels_last) if pools and known and on_cpu else copied


def _laid_out(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """``model`` itself, its image weights in ``layout``."""
    moved: nn.Module = cast(Any, model).to(memory_format=layout)  # torch's stubs leave this keyword out
    return moved


def check_finite(model: nn.Module, name: str, learning_rate: float) -> None:
    """Raise `TrainingError` if a weight, or a running statistic, is NaN or infinite."""
    if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
        raise TrainingError(f"{name} diverged in training at learning rate {learning_rate:g}: lower it")


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """The model's logits ``[record, class]`` in evaluation mode, in bounded batches."""
    return logits_of_each(model, [inputs])[0]


@torch.no_grad()
def logits_of_each(model: nn.Module, sets: Sequence[Tensor]) -> list[Tensor]:
    """`logits_of` for several sets of inputs, each by itself."""
    parted = Parted.of(model)
    answering = quick_layout(parted.rest).eval()
    found = []
    for inputs in sets:
        if not len(inputs):
            found.append(copy.deepcopy(model).eval()(inputs))
            continue
        features = parted.features(inputs)
        batch = max(1, _NUMBERS_AT_ONCE // max(1, features[0].numel()))
        found.append(torch.cat([answering(part) for part in features.split(batch)]))
    return found


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Share of records whose label is the model's first choice; NaN without records."""
    if len(labels) == 0:
        return float("nan")
    return float((logits_of(model, inputs).argmax(-1) == labels).double().mean())
