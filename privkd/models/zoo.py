"""Teachers and students: by name, or the user's own as ``package.module:factory``.

The named architectures are `torch.nn.Sequential` of blocks, the last of which is the linear head. They
hold GroupNorm without affine parameters and never BatchNorm, whose batch statistics mix records and so
break per-example clipping.
"""

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from privkd.config import ModelConfig
from privkd.errors import ConfigError, ModelError
from privkd.models.encoder import Encoder, encoder_named
from privkd.models.inputs import InputType
from privkd.models.lora import Adapted, adapted
from privkd.models.scattering import Scattering
from privkd.models.text import HEADS, Convolved, Embedded, Transformer
from privkd.plugins import users_callable

Shape = tuple[int, ...]
Part = Literal["all", "last_block", "head", "lora"]

_GROUPS = 4
_SMALLEST = 4
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


class Residual(nn.Module):
    """``x + body(x)`` with a strided 1x1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: str) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1),
            nn.GroupNorm(_GROUPS, outputs, affine=False),
            _ACTIVATIONS[activation](),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.GroupNorm(_GROUPS, outputs, affine=False),
        )
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride=stride)
        self.activation = _ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """``[record, channel, height, width]`` to the same with ``outputs`` channels, strided."""
        out: Tensor = self.activation(self.skip(x) + self.body(x))
        return out


def _linear(config: ModelConfig, shape: Shape, classes: int) -> nn.Sequential:
    head = nn.Linear(math.prod(shape), classes)
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), head=head))


def _mlp(config: ModelConfig, shape: Shape, classes: int) -> nn.Sequential:
    width, narrow = config.width, max(config.width // 2, 1)
    activation = _ACTIVATIONS[config.activation]
    first = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), width), activation())
    second = nn.Sequential(nn.Linear(width, narrow), activation())
    return nn.Sequential(OrderedDict(block1=first, block2=second, head=nn.Linear(narrow, classes)))


def _cnn(config: ModelConfig, shape: Shape, classes: int) -> nn.Sequential:
    """Two convolutions and two linear layers, after Tramer & Boneh 2021, Table 8, with GroupNorm."""
    channels, height, width = _image_shape(config, shape)
    few, many = _grouped(config.width // 2), _grouped(config.width)
    activation = _ACTIVATIONS[config.activation]
    small = min(height, width) <= 12
    convolutions = (
        (nn.Conv2d(channels, few, 3, padding=1), nn.Conv2d(few, many, 4, stride=2, padding=1))
        if small
        else (nn.Conv2d(channels, few, 8, stride=2, padding=3), nn.Conv2d(few, many, 4, stride=2))
    )
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    for number, convolution in enumerate(convolutions, 1):
        layers = [convolution, nn.GroupNorm(_GROUPS, convolution.out_channels, affine=False), activation()]
        blocks[f"block{number}"] = nn.Sequential(*layers, *([] if small else [nn.MaxPool2d(2, 1)]))
    with torch.no_grad():
        flat = nn.Sequential(*blocks.values())(torch.zeros(1, *shape)).numel()
    blocks["block3"] = nn.Sequential(nn.Flatten(), nn.Linear(flat, config.width), activation())
    blocks["head"] = nn.Linear(config.width, classes)
    return nn.Sequential(blocks)


def _resnet(config: ModelConfig, shape: Shape, classes: int) -> nn.Sequential:
    channels, _, _ = _image_shape(config, shape)
    few, many = _grouped(config.width // 2), _grouped(config.width)
    stem = nn.Sequential(
        nn.Conv2d(channels, few, 3, padding=1),
        nn.GroupNorm(_GROUPS, few, affine=False),
        _ACTIVATIONS[config.activation](),
    )
    return nn.Sequential(
        OrderedDict(
            stem=stem,
            block1=Residual(few, few, 1, config.activation),
            block2=Residual(few, many, 2, config.activation),
            block3=Residual(many, many, 2, config.activation),
            pool=nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
            head=nn.Linear(4 * many, classes),
        )
    )


def _scatter(config: ModelConfig, shape: Shape, classes: int) -> nn.Sequential:
    """Fixed scattering features and a linear head: Tramer & Boneh 2021's ScatterNet."""
    _, height, width = _image_shape(config, shape)
    features = Scattering(height, width)
    with torch.no_grad():
        flat = features(torch.zeros(1, *shape)).numel()
    head = nn.Linear(flat, classes)
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), head=head))


_NAMED: dict[str, Callable[[ModelConfig, Shape, int], nn.Sequential]] = {
    "linear": _linear,
    "mlp": _mlp,
    "cnn": _cnn,
    "resnet": _resnet,
    "scatter": _scatter,
}


def _embedded(config: ModelConfig, vocabulary: int, classes: int) -> nn.Module:
    return Embedded(vocabulary, config.width, classes)


def _convolved(config: ModelConfig, vocabulary: int, classes: int) -> nn.Module:
    return Convolved(vocabulary, config.width, classes, _ACTIVATIONS[config.activation])


def _transformer(config: ModelConfig, vocabulary: int, classes: int) -> nn.Module:
    width = max(HEADS, config.width // HEADS * HEADS)
    return Transformer(vocabulary, width, classes, _ACTIVATIONS[config.activation])


_OF_TOKENS: dict[str, Callable[[ModelConfig, int, int], nn.Module]] = {
    "text-embedding": _embedded,
    "text-cnn": _convolved,
    "transformer": _transformer,
}
"""From settings, the size of the vocabulary and the number of classes."""


def build(
    config: ModelConfig,
    *,
    input_shape: Shape,
    classes: int,
    seed: int,
    vocabulary: int | None = None,
    offered: Sequence[str] = (),
    rank: int | None = None,
) -> nn.Module:
    """A freshly initialised model from ``[record, *input_shape]`` to logits ``[record, classes]``.

    The initial weights are a function of ``seed`` alone; the global generator is left as it was. Inputs are
    numbers or, with a ``vocabulary``, token ids below it, int64. A model on an encoder is an `nn.Sequential`
    of that and of the architecture that takes its features; see `encoder.encoder_named` for ``offered``. With
    a ``rank`` it has adapters; see `lora.adapted`.

    Raises:
        ConfigError: the name is unknown.
        ModelError: the model cannot be built, or does not map inputs to ``classes`` logits.
    """
    if config.encoder is not None:
        encoder = encoder_named(config.encoder, _input_type(input_shape, vocabulary), offered)
        return _on_encoder(encoder, config, classes, seed, rank)
    config = config.model_copy(update={"name": named(config, input_shape, vocabulary)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _made(config, input_shape, classes, vocabulary)
        return model if rank is None else adapted(model, rank, head_of(model))


def _made(config: ModelConfig, input_shape: Shape, classes: int, vocabulary: int | None) -> nn.Module:
    if config.name in _NAMED or config.name in _OF_TOKENS:
        return _named(config, input_shape, classes, vocabulary)
    if ":" not in config.name:
        names = ", ".join(["auto", *sorted(_NAMED), *_OF_TOKENS])
        raise ConfigError(f"model {config.name!r}: expected one of {names}, or package.module:factory")
    model = _from_factory(config.name, input_shape, classes, vocabulary)
    # Lazy layers draw their weights in this first pass, so it is seeded too.
    _check_logits(config.name, model, _input_type(input_shape, vocabulary), classes)
    return model


def _input_type(shape: Shape, vocabulary: int | None) -> InputType:
    return InputType(shape, torch.float32 if vocabulary is None else torch.int64)


def _on_encoder(
    encoder: Encoder, config: ModelConfig, classes: int, seed: int, rank: int | None
) -> nn.Module:
    above = build(
        config.model_copy(update={"encoder": None}),
        input_shape=encoder.shape,
        classes=classes,
        seed=seed,
        rank=rank,
    )
    children = above.named_children() if type(above) is nn.Sequential else [("model", above)]
    return nn.Sequential(OrderedDict([("encoder", encoder), *children]))


def named(config: ModelConfig, input_shape: Shape, vocabulary: int | None = None) -> str:
    """The architecture's name; ``auto`` is told apart by the inputs."""
    if config.name != "auto":
        return config.name
    if vocabulary is not None:
        return "text-embedding"
    return "cnn" if len(input_shape) == 3 and min(input_shape[1:]) >= _SMALLEST else "mlp"


PARTS: dict[Part, str] = {
    "all": "all layers",
    "last_block": "the last block",
    "head": "the head",
    "lora": "adapters and the head",
}
"""In words."""


def trained_parameters(model: nn.Module, part: Part) -> list[nn.Parameter]:
    """The parameters of the ``part`` that is trained privately, in the model's order.

    The head is the last child that holds parameters; the last block is the child before it and the head.
    A model that wraps a single child is looked into. Parameters that are frozen (``requires_grad`` is false)
    stay so and are left out. ``lora`` is the adapters and the head.
    """
    return [parameter for parameter in _parameters_of(model, part) if parameter.requires_grad]


def _parameters_of(model: nn.Module, part: Part) -> list[nn.Parameter]:
    if part == "all":
        return list(model.parameters())
    if part == "lora":
        adapters = [each for each in model.modules() if isinstance(each, Adapted)]
        layers = [layer for each in adapters for layer in (each.down, each.up)]
        wanted = {id(p) for layer in [*layers, head_of(model)] for p in layer.parameters()}
        return [p for p in model.parameters() if adapters and id(p) in wanted]
    if part == "head":
        return list(head_of(model).parameters())
    children = [child for child in model.children() if any(True for _ in child.parameters())]
    if len(children) == 1 and any(True for _ in children[0].children()):
        return _parameters_of(children[0], part)
    return [parameter for child in children[-2:] for parameter in child.parameters()] or list(
        model.parameters()
    )


def head_of(model: nn.Module) -> nn.Module:
    """The last child that holds parameters, of a model that wraps a single child its head; else itself."""
    children = [child for child in model.children() if any(True for _ in child.parameters())]
    if len(children) == 1 and any(True for _ in children[0].children()):
        return head_of(children[0])
    return children[-1] if children else model


def parameter_count(model: nn.Module) -> int:
    """Number of scalar parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def _image_shape(config: ModelConfig, shape: Shape) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape[1:]) < _SMALLEST:
        raise ModelError(
            f"model {config.name!r} needs images [channel, height, width] of at least 4x4, "
            f"but the data have shape {list(shape)}: use 'mlp'"
        )
    return shape[0], shape[1], shape[2]


def _grouped(channels: int) -> int:
    return max(_GROUPS, channels // _GROUPS * _GROUPS)


def _named(config: ModelConfig, input_shape: Shape, classes: int, vocabulary: int | None) -> nn.Module:
    of_tokens = config.name in _OF_TOKENS
    if of_tokens != (vocabulary is not None):
        others = _NAMED if of_tokens else _OF_TOKENS
        takes = "token ids, and the data are none" if of_tokens else "numbers, and the data are token ids"
        raise ModelError(f"model {config.name!r} takes {takes}: use one of {', '.join(others)}")
    try:
        if vocabulary is not None:
            return _OF_TOKENS[config.name](config, vocabulary, classes)
        return _NAMED[config.name](config, input_shape, classes)
    except (RuntimeError, MemoryError) as error:
        raise ModelError(f"model {config.name!r} of width {config.width} cannot be built: {error}") from error


def _from_factory(path: str, input_shape: Shape, classes: int, vocabulary: int | None) -> nn.Module:
    factory = users_callable(path, "model", ModelError)
    try:
        more = {} if vocabulary is None or not _takes(factory, "vocabulary") else {"vocabulary": vocabulary}
        model = factory(input_shape, classes, **more)
    except (Exception, SystemExit) as error:
        raise ModelError(f"model {path!r}: factory(input_shape, classes) failed: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model {path!r}: the factory returned {type(model).__name__}, not a torch.nn.Module"
        )
    _check_layers(path, model)
    return model


def _check_layers(path: str, model: nn.Module) -> None:
    """Refuse what cannot be copied and trained here, by the layer's name."""
    for name, layer in model.named_modules():
        if isinstance(layer, torch.jit.ScriptModule):
            raise ModelError(
                f"model {path!r}: layer {name!r} ({type(layer).__name__}) is compiled by torch.jit and "
                "cannot be trained here: return the module that it was made of"
            )
        for parameter in layer.parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                raise ModelError(
                    f"model {path!r}: layer {name!r} ({type(layer).__name__}) has weights of "
                    f"{parameter.dtype}, and inputs are float32: return the model's .float()"
                )


def _takes(factory: Callable[..., Any], name: str) -> bool:
    """Whether ``factory`` has a parameter of this name."""
    try:
        return name in inspect.signature(factory).parameters
    except (TypeError, ValueError):  # not every callable tells
        return False


def _check_logits(name: str, model: nn.Module, inputs: InputType, classes: int) -> None:
    try:
        with torch.no_grad():
            logits = model(inputs.zeros(2))
    except Exception as error:
        shape = ", ".join(map(str, (2, *inputs.shape)))
        raise ModelError(f"model {name!r} does not accept inputs of shape [{shape}]: {error}") from error
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"model {name!r} returned {found} for 2 inputs, expected logits [2, {classes}]")


def torch_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        ConfigError: CUDA was asked for and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda': this machine has no CUDA device; take cpu or auto")
    return torch.device(name)
