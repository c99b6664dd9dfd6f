"""The layers with parameters, for many students at once.

A layer computes its output for all students, and from its input and output gradient the book for per-example
clipping or, without privacy, the plain sums. Autograd carries gradients between layers only: weights are
never differentiated.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, bmm, channels_last
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from privkd.training.vectorised.clipping import (
    Book,
    PerExample,
    by_unit,
    dense_book,
    dense_sums,
    ghost_is_cheaper,
    ghost_norms,
    owned,
    record_blocks,
)


@dataclass(frozen=True)
class Activations:
    """One layer's input or output for every student.

    Attributes:
        tensor: stacked ``[student, record, *shape]``, or, when ``folded``, images
            ``[record, student * channel, height, width]`` in channels-last memory, in which one grouped
            convolution serves all students.
        students: number of students.
        folded: which layout ``tensor`` has.
    """

    tensor: Tensor
    students: int
    folded: bool = False

    @property
    def records(self) -> int:
        """Number of records of each student."""
        return self.tensor.shape[0 if self.folded else 1]

    def stack(self) -> "Activations":
        """The same in the stacked layout."""
        if not self.folded:
            return self
        records, _, height, width = self.tensor.shape
        split = self.tensor.permute(0, 2, 3, 1).reshape(records, height, width, self.students, -1)
        return Activations(split.permute(3, 0, 4, 1, 2), self.students)

    def fold(self) -> "Activations":
        """The same in the folded layout; the activations must be images."""
        if self.folded:
            return self
        _, records, _, height, width = self.tensor.shape
        spread = self.tensor.permute(1, 3, 4, 0, 2)
        # Of a single channel, torch may keep strides that its kernels take for the other memory format.
        merged = spread.new_empty(spread.shape).copy_(spread).view(records, height, width, -1)
        return Activations(merged.permute(0, 3, 1, 2), self.students, folded=True)

    def images(self) -> Tensor:
        """Images as ``[student, record, height, width, channel]``."""
        return self.stack().tensor.permute(0, 1, 3, 4, 2)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Activations":
        """Apply a function that keeps the layout."""
        return Activations(function(self.tensor), self.students, self.folded)


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        y = torch.add(x, x).sigmoid_().mul_(2).sub_(1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        (g,) = gradients
        return torch.ops.aten.tanh_backward(g, y)


def fast_tanh(x: Tensor) -> Tensor:
    """``tanh(x)`` as ``2 sigmoid(2x) - 1``: within 2e-7, and several times faster on CPUs."""
    out: Tensor = _Tanh.apply(x)
    return out


Parameters = Mapping[str, Tensor]
"""Every student's parameters by name, ``[student, *shape]``."""

_PATCH_BYTES = 4 << 20
"""Memory for a convolution's patches at a time: they are many times their images, and best kept in cache."""


@dataclass(frozen=True)
class Layer(ABC):
    """One layer of every student. ``weight`` and ``bias`` name its parameters."""

    weight: str
    bias: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in the module's order."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def is_split(self, trained: Collection[str]) -> bool:
        """Whether ``trained`` names one of weight and bias alone: a book holds both."""
        return 0 < len(set(self.names).intersection(trained)) < len(self.names)

    @abstractmethod
    def arrange(self, x: Activations) -> Activations:
        """The input in the layout that the other methods expect."""

    @abstractmethod
    def forward(self, x: Activations, parameters: Parameters) -> Activations:
        """The layer's output."""

    @abstractmethod
    def book(self, x: Activations, g: Activations, slots: int = 1) -> Book:
        """The book for clipping, from the input and the gradient of the output.

        Units are ``slots`` records, one behind the other, whose gradients are added up.
        """

    @abstractmethod
    def sums(self, x: Activations, g: Activations) -> list[Tensor]:
        """Per parameter, the gradients summed over the records, ``[student, *shape]``."""

    def bias_of(self, parameters: Parameters) -> Tensor | None:
        """The bias ``[student, output]``, if there is one."""
        return None if self.bias is None else parameters[self.bias]


@dataclass(frozen=True)
class Linear(Layer):
    """`torch.nn.Linear` as one batched matrix product over students."""

    def arrange(self, x: Activations) -> Activations:
        """See `Layer.arrange`."""
        return x.stack()

    def forward(self, x: Activations, parameters: Parameters) -> Activations:
        """See `Layer.forward`."""
        weight, bias = parameters[self.weight].transpose(1, 2), self.bias_of(parameters)
        rows = x.tensor.flatten(1, -2)
        out = bmm(rows, weight)
        if bias is not None:
            out += bias.unsqueeze(1)  # cheaper than baddbmm, which copies the bias row by row first
        return Activations(out.view(*x.tensor.shape[:-1], -1), x.students)

    def book(self, x: Activations, g: Activations, slots: int = 1) -> Book:
        """See `Layer.book`."""
        inputs, outputs = (owned(_positions(each.tensor), slots) for each in (x, g))
        return dense_book(inputs, outputs, bias=self.bias is not None)

    def sums(self, x: Activations, g: Activations) -> list[Tensor]:
        """See `Layer.sums`."""
        return dense_sums(_positions(x.tensor), _positions(g.tensor), bias=self.bias is not None)


def _positions(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(2) if tensor.dim() == 3 else tensor.flatten(2, -2)


@dataclass(frozen=True)
class Conv2d(Layer):
    """`torch.nn.Conv2d` as one grouped convolution, a group a student."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def arrange(self, x: Activations) -> Activations:
        """See `Layer.arrange`."""
        return x.fold()

    def forward(self, x: Activations, parameters: Parameters) -> Activations:
        """See `Layer.forward`."""
        weight = parameters[self.weight].flatten(0, 1).contiguous(memory_format=channels_last)
        bias = self.bias_of(parameters)
        flat = None if bias is None else bias.flatten()
        return x.map(lambda t: F.conv2d(t, weight, flat, self.stride, self.padding, groups=x.students))

    def book(self, x: Activations, g: Activations, slots: int = 1) -> Book:
        """See `Layer.book`."""
        images, outputs = self.images_and_outputs(x, g)
        images, outputs = images.unflatten(0, (-1, slots)), outputs.unflatten(0, (-1, slots)).flatten(1, 2)
        count, positions, channels = outputs.shape
        width, size = self.kernel[0] * self.kernel[1] * images.shape[-1], (x.students, x.records // slots)
        ghost = ghost_is_cheaper(positions=positions, inputs=width, outputs=channels)
        at_once = min(count, max(1, _PATCH_BYTES // (positions * width * images.element_size())))
        buffer = images.new_empty(at_once * slots, positions // slots, width)
        found = images.new_empty((count,) if ghost else (count, channels, width))
        for start in range(0, count, at_once):
            part = slice(start, start + at_once)
            patches = self.patches(images[part].flatten(0, 1), buffer).view(-1, positions, width)
            if ghost:
                found[part] = ghost_norms(patches, outputs[part], bias=self.bias is not None)
            else:
                bmm(outputs[part].transpose(1, 2), patches, out=found[part])
        if ghost:
            return _GhostConv(self, x, g, found.view(size), slots)
        bias = [] if self.bias is None else [outputs.sum(1).view(*size, -1)]
        return _ProductConv(self, PerExample((found.view(*size, channels, width), *bias)))

    def sums(self, x: Activations, g: Activations) -> list[Tensor]:
        """See `Layer.sums`."""
        shape = (g.tensor.shape[1], x.tensor.shape[1] // x.students, *self.kernel)
        weight = conv2d_weight(
            x.tensor, shape, g.tensor, self.stride, self.padding, groups=x.students
        ).unflatten(0, (x.students, -1))
        return [weight] if self.bias is None else [weight, g.tensor.sum((0, 2, 3)).view(x.students, -1)]

    @staticmethod
    def images_and_outputs(x: Activations, g: Activations) -> tuple[Tensor, Tensor]:
        """Inputs ``[student * record, height, width, channel]``, contiguous, and output gradients
        ``[student * record, column * row, channel]``."""
        outputs = g.images().transpose(2, 3).flatten(2, 3).flatten(0, 1)
        return x.images().flatten(0, 1).contiguous(), outputs

    def restore(self, weight: Tensor) -> Tensor:
        """A gradient ``[student, output, kernel * channel]`` in the shape of the module's weight."""
        return weight.unflatten(2, (*self.kernel, -1)).permute(0, 1, 4, 2, 3)

    def patches(self, images: Tensor, buffer: Tensor) -> Tensor:
        """The receptive field of every output, ``[image, column * row, kernel * channel]``, in ``buffer``.

        Takes contiguous images ``[image, height, width, channel]``.
        """
        (kernel_y, kernel_x), (stride_y, stride_x), (pad_y, pad_x) = self.kernel, self.stride, self.padding
        padded = F.pad(images, (0, 0, pad_x, pad_x, pad_y, pad_y)) if pad_x or pad_y else images
        count, height, width, channels = padded.shape
        rows, columns = (height - kernel_y) // stride_y + 1, (width - kernel_x) // stride_x + 1
        line, strip = width * channels, kernel_x * channels
        # First along x, into strips in which a receptive field is one run of memory; then along y.
        strips = padded.as_strided(
            (count, columns, height, strip),
            (height * line, stride_x * channels, line, 1),
            padded.storage_offset(),
        ).contiguous()
        fields = strips.as_strided(
            (count, columns, rows, kernel_y * strip),
            (columns * height * strip, height * strip, stride_y * strip, 1),
        )
        patches = buffer[:count]
        patches.view(fields.shape).copy_(fields)
        return patches


@dataclass(frozen=True)
class _ProductConv:
    """The book of a convolution whose per-example gradients were formed."""

    layer: Conv2d
    products: PerExample

    def squared_norms(self) -> Tensor:
        return self.products.squared_norms()

    def weighted_sums(self, factors: Tensor) -> list[Tensor]:
        weight, *bias = self.products.weighted_sums(factors)
        return [self.layer.restore(weight), *bias]


@dataclass(frozen=True)
class _GhostConv:
    """The book of a convolution of which only the norms were."""

    layer: Conv2d
    inputs: Activations
    outputs: Activations
    squared: Tensor
    slots: int

    def squared_norms(self) -> Tensor:
        return self.squared

    def weighted_sums(self, factors: Tensor) -> list[Tensor]:
        layer, bias = self.layer, self.layer.bias is not None
        images, outputs = layer.images_and_outputs(self.inputs, self.outputs)
        factors = factors.repeat_interleave(self.slots, dim=1)
        students, records = factors.shape
        images, outputs = images.unflatten(0, factors.shape), outputs.unflatten(0, factors.shape)
        positions, channels = outputs.shape[2:]
        width = layer.kernel[0] * layer.kernel[1] * images.shape[-1]
        sums: list[Tensor] = []
        for part in record_blocks(records, 8 * students * positions * (width + channels)):
            some = images[:, part].flatten(0, 1)
            patches = layer.patches(some, some.new_empty(len(some), positions, width))
            scaled = outputs[:, part].double() * factors[:, part, None, None].double()
            found = dense_sums(patches.view(students, -1, positions, width).double(), scaled, bias=bias)
            sums = [total + more for total, more in zip(sums, found, strict=True)] if sums else found
        weight, *rest = sums
        return [layer.restore(weight), *rest]


@dataclass(frozen=True)
class Embedding(Layer):
    """`torch.nn.Embedding` of ``rows``, looked up by ids ``[student, record, position]``."""

    rows: int

    def arrange(self, x: Activations) -> Activations:
        """See `Layer.arrange`."""
        return x.stack()

    def forward(self, x: Activations, parameters: Parameters) -> Activations:
        """See `Layer.forward`."""
        table = parameters[self.weight]
        return Activations(table.flatten(0, 1)[_own_rows(x.tensor, table.shape[1])], x.students)

    def book(self, x: Activations, g: Activations, slots: int = 1) -> Book:
        """See `Layer.book`."""
        ids, gradients = x.tensor.flatten(2), g.tensor.flatten(2, -2)
        return _Rows(owned(ids, slots), owned(gradients, slots), self.rows)

    def sums(self, x: Activations, g: Activations) -> list[Tensor]:
        """See `Layer.sums`."""
        return [_added_rows(x.tensor.flatten(2), g.tensor.flatten(2, -2), self.rows)]


def _own_rows(ids: Tensor, rows: int) -> Tensor:
    """Of ids ``[student, ...]`` into each student's own table of ``rows``, those into all tables in a row."""
    students = torch.arange(len(ids), device=ids.device)
    return ids + rows * students.view(-1, *[1] * (ids.dim() - 1))


def _added_rows(ids: Tensor, gradients: Tensor, rows: int) -> Tensor:
    """Gradients of each row of the tables, ``[student, row, width]``.

    Takes ids ``[student, record, position]`` and gradients ``[student, record, position, width]``.
    """
    students, width = len(ids), gradients.shape[-1]
    total = gradients.new_zeros((students * rows, width))
    total.index_add_(0, _own_rows(ids, rows).flatten(), gradients.reshape(-1, width))
    return total.view(students, rows, width)


@dataclass(frozen=True)
class _Rows:
    """The book of a table whose ``ids`` ``[student, record, position]`` were looked up, with output gradients
    ``[student, record, position, width]``. No gradient of the table's size is formed for a record."""

    ids: Tensor
    gradients: Tensor
    rows: int

    def squared_norms(self) -> Tensor:
        """Positions with the same id add up before they are squared: in doubles, as they may cancel."""
        students, records, positions, width = self.gradients.shape
        parts = []
        for part in record_blocks(records, 8 * students * positions * (positions + width)):
            gradients, ids = self.gradients[:, part].double(), self.ids[:, part]
            same = ids.unsqueeze(-1) == ids.unsqueeze(-2)
            parts.append((same * (gradients @ gradients.transpose(-1, -2))).sum((-1, -2)))
        return torch.cat(parts, dim=1).clamp_(min=0.0)

    def weighted_sums(self, factors: Tensor) -> list[Tensor]:
        scaled = self.gradients.double() * factors[:, :, None, None].double()
        return [_added_rows(self.ids, scaled, self.rows)]


@dataclass(frozen=True)
class GroupNorm(Layer):
    """`torch.nn.GroupNorm` with a scale and a shift for each channel."""

    groups: int
    epsilon: float

    def arrange(self, x: Activations) -> Activations:
        """See `Layer.arrange`."""
        return x.fold() if x.tensor.dim() == 5 else x

    def forward(self, x: Activations, parameters: Parameters) -> Activations:
        """See `Layer.forward`."""
        out = group_norm(x, self.groups, self.epsilon)
        scale, shift = (self._broadcast(parameters[name], x) for name in self.names)
        return out.map(lambda t: t * scale + shift)

    def book(self, x: Activations, g: Activations, slots: int = 1) -> Book:
        """See `Layer.book`."""
        normalised = group_norm(x, self.groups, self.epsilon)
        scale, shift = _per_channel(g.map(lambda t: t * normalised.tensor)), _per_channel(g)
        return PerExample((by_unit(scale, slots), by_unit(shift, slots)))

    def sums(self, x: Activations, g: Activations) -> list[Tensor]:
        """See `Layer.sums`."""
        book = self.book(x, g)
        return book.weighted_sums(g.tensor.new_ones(()).expand(x.students, x.records))

    @staticmethod
    def _broadcast(parameter: Tensor, x: Activations) -> Tensor:
        return parameter.reshape(1, -1, 1, 1) if x.folded else parameter.unsqueeze(1)


def group_norm(x: Activations, groups: int, epsilon: float) -> Activations:
    """Group normalisation without parameters."""
    if x.folded:
        return x.map(lambda t: F.group_norm(t, groups * x.students, eps=epsilon))
    return x.map(lambda t: F.group_norm(t.flatten(0, 1), groups, eps=epsilon).view(t.shape))


def _per_channel(g: Activations) -> Tensor:
    """Sums over the image, ``[student, record, channel]``."""
    if not g.folded:
        return g.tensor
    return g.tensor.sum((2, 3)).unflatten(1, (g.students, -1)).transpose(0, 1).contiguous()
