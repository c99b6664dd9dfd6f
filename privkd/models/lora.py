"""Low-rank adapters (LoRA, Hu et al. 2022): what is trained beside linear layers whose own weights stay.

DP-SGD adds noise to each weight in training, so the fewer these are, the less noise there is. The weights
that stay are public; what the adapters learned is merged into them when a student leaves for its device.
"""

import copy

import torch
from torch import Tensor, nn

from privkd.errors import ModelError


class Adapted(nn.Module):
    """A linear layer and a change of it of low rank: ``base(x) + up(down(x))``.

    In the beginning nothing is changed: ``up`` is zero.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One linear layer that does the same."""
        layer = copy.deepcopy(self.base)
        layer.weight += self.up.weight @ self.down.weight
        return layer


def adapted(model: nn.Module, rank: int, head: nn.Module) -> nn.Module:
    """``model`` itself, an adapter of ``rank`` beside each of its linear layers but those of its ``head``.

    A layer that has no more than ``rank`` inputs or outputs is left as it is.

    Raises:
        ModelError: none is left to adapt.
    """
    whole = set(head.modules())
    found = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear
        and layer not in whole
        and rank < min(layer.in_features, layer.out_features)
    ]
    if not found:
        raise ModelError(
            f"part='lora' of rank {rank} finds no linear layer below the head with more inputs and outputs: "
            "lower student.dp.rank, take part='head', or a model with torch.nn.Linear layers"
        )
    made: dict[nn.Linear, Adapted] = {}
    for parent, name, layer in found:
        # A layer that is used twice keeps one adapter.
        setattr(parent, name, made.setdefault(layer, Adapted(layer, rank)))
    return model


def merged(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with its adapters merged into the layers beside which they stand."""
    copied = copy.deepcopy(model)
    done: dict[Adapted, nn.Linear] = {}
    for parent in list(copied.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Adapted):
                setattr(parent, name, done.setdefault(child, child.merged()))
    return copied
