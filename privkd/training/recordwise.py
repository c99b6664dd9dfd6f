"""What layers draw while a device trains, for each record by itself.

A dropout mask that torch draws from one generator for a whole batch makes every record's gradient depend on
which records stand before it: one record more, and all masks shift. Here each record has a stream of its own
(`randomness.Randomness.layers`), and every random operation of torch takes a record's numbers from there.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from privkd.errors import ModelError
from privkd.privacy.randomness import Uniforms


def record_digests(inputs: Tensor, labels: Tensor) -> list[bytes]:
    """A digest of each record's contents, ``[record]``, by which its random stream is known.

    Takes ``inputs`` ``[record, *shape]`` and ``labels`` ``[record]``.
    """
    rows = inputs.detach().cpu().contiguous().flatten(1).numpy()
    return [
        hashlib.sha256(row.tobytes() + label.to_bytes(8, "big", signed=True)).digest()
        for row, label in zip(rows, labels.tolist(), strict=True)
    ]


class Recordwise(TorchDispatchMode):
    """Inside it, random operations draw for each record of the batch from its own stream.

    A draw's first axis must be the records, or consist of as many equal parts, as after folding another axis
    into the batch. Anything else would be shared between records.
    """

    def __init__(self, records: int, streams: Callable[[], Sequence[Uniforms]]) -> None:
        """``streams`` gives one for each of the batch's ``records``, in order, when something is drawn."""
        super().__init__()
        self._records = records
        self._open = streams
        self._streams: Sequence[Uniforms] = ()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, on the records' own numbers where it is a random one.

        Raises:
            ModelError: it draws what cannot be drawn for each record by itself.
        """
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or _drops_nothing(func, args, kwargs):
            return func(*args, **kwargs)
        if not self._streams:
            self._streams = self._open()
        name = func.overloadpacket.__name__
        draw = _DRAWS.get(name)
        if draw is None:
            raise ModelError(
                f"the student draws random numbers by torch's {name.rstrip('_')!r}, which cannot be drawn "
                "for each record by itself: use nn.Dropout, torch.rand or torch.randn"
            )
        return draw(self._uniform, func, *args, **kwargs)

    def _uniform(self, like: Tensor) -> Tensor:
        """Uniform numbers in [0, 1), float64, in the shape and on the device of ``like``."""
        records, shape = self._records, like.shape
        if not shape or shape[0] % records:
            if records != 1:
                raise ModelError(
                    f"the student draws random numbers of shape {list(shape)} for {records} records at once: "
                    "draw them for each record, along the first axis"
                )
            return self._streams[0](math.prod(shape)).view(shape).to(like.device)
        each = math.prod(shape) // records
        return torch.cat([stream(each) for stream in self._streams]).view(shape).to(like.device)


def _drops_nothing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it could draw for a dropout alone, as attention does, and there is none."""
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return False
    place = names.index("dropout_p")
    given = args[place] if place < len(args) else kwargs.get("dropout_p", 0.0)
    return bool(given == 0.0)


Draw = Callable[..., Any]


def _fresh(uniform: Callable[[Tensor], Tensor], func: Any, size: Sequence[int], **kwargs: Any) -> Tensor:
    """Draws of a given size, in the type and on the device asked for."""
    kwargs.pop("generator", None)
    like = torch.empty(size, **kwargs)
    return _LAWS[func.overloadpacket.__name__](uniform(like)).to(like)


def _like(uniform: Callable[[Tensor], Tensor], func: Any, like: Tensor, **kwargs: Any) -> Tensor:
    """Draws in the shape of another tensor."""
    kwargs.pop("memory_format", None)
    kept = torch.empty(like.shape, **{"dtype": like.dtype, "device": like.device, **kwargs})
    law = _LAWS[func.overloadpacket.__name__.removesuffix("_like")]
    return law(uniform(kept)).to(kept)


def _uniform_(
    uniform: Callable[[Tensor], Tensor], func: Any, x: Tensor, low: float = 0.0, high: float = 1.0, **_: Any
) -> Tensor:
    return x.copy_(low + (high - low) * uniform(x))


def _normal_(
    uniform: Callable[[Tensor], Tensor], func: Any, x: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any
) -> Tensor:
    return x.copy_(mean + std * _normals(uniform(x)))


def _normal(
    uniform: Callable[[Tensor], Tensor], func: Any, mean: Any, std: Any = 1.0, *rest: Any, **_: Any
) -> Tensor:
    if rest:
        like = torch.empty(rest[0])
        return (mean + std * _normals(uniform(like))).to(like)
    like = mean if isinstance(mean, Tensor) else std
    return (mean + std * _normals(uniform(like))).to(like)


def _bernoulli_(uniform: Callable[[Tensor], Tensor], func: Any, x: Tensor, p: Any = 0.5, **_: Any) -> Tensor:
    return x.copy_(uniform(x) < p)


def _bernoulli(uniform: Callable[[Tensor], Tensor], func: Any, x: Tensor, p: Any = None, **_: Any) -> Tensor:
    return (uniform(x) < (x if p is None else p)).to(x)


def _native_dropout(
    uniform: Callable[[Tensor], Tensor], func: Any, x: Tensor, p: float, train: bool | None
) -> tuple[Tensor, Tensor]:
    if train is False:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    kept = uniform(x) >= p
    return x * kept / (1 - p if p < 1 else 1.0), kept


def _randint(uniform: Callable[[Tensor], Tensor], func: Any, *args: Any, **kwargs: Any) -> Tensor:
    *bounds, size = args
    low, high = bounds if len(bounds) == 2 else (0, *bounds)
    kwargs.pop("generator", None)
    like = torch.empty(size, **{"dtype": torch.int64, **kwargs})
    return (low + (uniform(like) * (high - low)).floor()).to(like)


def _exponential_(
    uniform: Callable[[Tensor], Tensor], func: Any, x: Tensor, rate: float = 1.0, **_: Any
) -> Tensor:
    return x.copy_(-torch.log1p(-uniform(x)) / rate)


def _normals(uniforms: Tensor) -> Tensor:
    return torch.special.ndtri(uniforms.clamp(min=2.0**-54))


_LAWS: dict[str, Callable[[Tensor], Tensor]] = {"rand": lambda u: u, "randn": _normals}
_DRAWS: dict[str, Draw] = {
    "rand": _fresh,
    "randn": _fresh,
    "rand_like": _like,
    "randn_like": _like,
    "uniform_": _uniform_,
    "normal_": _normal_,
    "normal": _normal,
    "bernoulli_": _bernoulli_,
    "bernoulli": _bernoulli,
    "native_dropout": _native_dropout,
    "randint": _randint,
    "exponential_": _exponential_,
}
