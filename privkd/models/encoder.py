"""Frozen encoders as a model's front end: what all the world knows already, computed once for each record.

An encoder is the user's own, ``package.module:function``, or a folder in Hugging Face's layout
(`privkd.models.hub`). Its weights are public constants: they are in no model's parameters, so they are
neither trained nor noised, sent or kept with a round. Models of one encoder share them, and a digest tells
them.
"""

import copy
import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from privkd.errors import ModelError, one_line
from privkd.models.features import FrontEnd
from privkd.models.inputs import InputType
from privkd.plugins import users_callable

DIGEST = "sha256:"
"""With it begins the name of an encoder that is known by its weights alone, as a published plan names it."""
_LOADED = 8


@dataclass(frozen=True, eq=False)
class _Constants:
    """An encoder's module, shared: two with equal keys are equal.

    ``key`` is the digest of the weights, and where and in which precision they are kept.
    """

    module: nn.Module
    key: tuple[str, str, str]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Constants) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @classmethod
    def of(cls, module: nn.Module, digest: str, like: Tensor) -> Self:
        return cls(module, (digest, str(like.device), str(like.dtype)))


_shared: WeakValueDictionary[tuple[str, str, str], _Constants] = WeakValueDictionary()
"""Whatever lives of each encoder, so that a thousand models on a GPU hold one copy there."""


class Encoder(FrontEnd):
    """A frozen encoder: records ``[record, *shape]`` to features ``[record, *features]``.

    Attributes:
        digest: ``sha256:...`` of its layers and weights.
        shape: of a record's features.
    """

    def __init__(self, module: nn.Module, digest: str, shape: tuple[int, ...]) -> None:
        """``module`` is taken over: frozen, and in evaluation mode for good."""
        super().__init__()
        self.digest = digest
        self.shape = shape
        module = module.requires_grad_(False).eval()
        self._constants = _Constants.of(module, digest, _example(module))

    def forward(self, records: Tensor) -> Tensor:
        """See the class."""
        if not len(records):
            return self(records.new_zeros((1, *records.shape[1:])))[:0]
        features: Tensor = self._constants.module(records)
        return features

    @property
    def key(self) -> Hashable:
        """See `FrontEnd.key`: equal weights give equal features."""
        return self._constants.key

    def opened(self) -> nn.Module:
        """See `FrontEnd.opened`."""
        return copy.deepcopy(self._constants.module)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Whatever moves a model, or changes its precision, comes by here.
        before = self._constants
        like = fn(_example(before.module).detach()[..., :0])
        key = (self.digest, str(like.device), str(like.dtype))
        if key != before.key:
            moved = _shared.get(key)
            if moved is None:
                module = copy.deepcopy(before.module)._apply(fn)
                moved = _shared[key] = _Constants.of(module, self.digest, like)
            self._constants = moved
        return self


def encoder_named(name: str, inputs: InputType, offered: Sequence[str] = ()) -> Encoder:
    """The encoder that a setting names, for such ``inputs``.

    Args:
        name: ``package.module:function``, a folder in Hugging Face's layout, or ``sha256:...``.
        inputs: what it takes.
        offered: names of the first two kinds, among which the last is looked for.

    Raises:
        ModelError: it is missing or damaged, cannot be loaded, or gives no features of such records.
        ConfigError: what it needs is not installed.
    """
    if not name.startswith(DIGEST):
        return copy.deepcopy(_loaded(name, inputs, _source(name)))
    found = (_loaded(each, inputs, _source(each)) for each in offered)
    encoder = next((each for each in found if each.digest == name), None)
    if encoder is None:
        raise ModelError(f"encoder {name}: none of {list(offered)} is it; name its folder in `encoders`")
    return copy.deepcopy(encoder)


def is_folder(name: str) -> bool:
    """Whether ``name`` is a path, and neither a function's name nor a digest."""
    return ":" not in name


def _source(name: str) -> Any:
    """What is read or called; of a folder, in the state that its files are in."""
    if not is_folder(name):
        return users_callable(name, "encoder", ModelError)
    from privkd.models.hub import files_in

    states = [(path, path.stat()) for path in files_in(Path(name).expanduser())]
    return tuple((path, state.st_mtime_ns, state.st_size) for path, state in states)


@lru_cache(maxsize=_LOADED)
def _loaded(name: str, inputs: InputType, source: Any) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _from_factory(name, inputs, source) if callable(source) else _from_folder(name, inputs)
        module.requires_grad_(False).eval()
        shape = _features_shape(name, module, inputs)
    return Encoder(module, _digest(module), shape)


def _from_folder(name: str, inputs: InputType) -> nn.Module:
    from privkd.models.hub import load_folder

    return load_folder(Path(name).expanduser(), inputs)


def _from_factory(name: str, inputs: InputType, factory: Callable[..., Any]) -> nn.Module:
    try:
        module = factory(inputs.shape)
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"encoder {name!r}: {name.partition(':')[2]}({inputs.shape}) failed: {one_line(error)}"
        ) from error
    # A compiled module hides the one that can be copied and exported.
    module = getattr(module, "_orig_mod", module)
    if not isinstance(module, nn.Module):
        raise ModelError(f"encoder {name!r}: returned {type(module).__name__}, not a torch.nn.Module")
    return module


def _features_shape(name: str, module: nn.Module, inputs: InputType) -> tuple[int, ...]:
    try:
        with torch.no_grad():
            features = module(inputs.zeros(2))
    except Exception as error:
        raise ModelError(
            f"encoder {name!r} does not take records of shape {list(inputs.shape)}: {one_line(error)}"
        ) from error
    if not isinstance(features, Tensor) or features.dim() < 2 or len(features) != 2:
        found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ModelError(f"encoder {name!r} returned {found} for 2 records: expected features [2, ...]")
    if not features.is_floating_point():
        raise ModelError(f"encoder {name!r} returned features of {features.dtype}: expected floating point")
    return tuple(features.shape[1:])


def _digest(module: nn.Module) -> str:
    """Of the layers as they print themselves, and of all tensors by name, type, shape and value."""
    digest = hashlib.sha256(repr(module).encode())
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)} ".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return f"{DIGEST}{digest.hexdigest()}"


def _example(module: nn.Module) -> Tensor:
    """A tensor as the module keeps its own: floating point where any is."""
    tensors = [*module.parameters(), *module.buffers()]
    return next((each for each in tensors if each.is_floating_point()), torch.zeros(1))
