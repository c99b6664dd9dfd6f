"""The control of the reverse flow: what the cloud's teacher becomes where no device takes part."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privkd.config import ReverseConfig
from privkd.fitting import logits_of
from privkd.reverse import Targets
from privkd.teacher import PublicData, absorb


@dataclass(frozen=True)
class ZeroDevices:
    """Two teachers that learn as long as the run's, on the same batches and behind the same gate, but from no
    device.

    Neither is always the stronger: own answers hold a teacher that would overfit, and hold back one that
    would not. What devices add is measured against the better of the two.

    Attributes:
        self_distilled: learns its own answers in place of each release.
        labels_only: learns the public labels alone, as the run's teacher does where it trusts nothing
            that was released.
    """

    self_distilled: nn.Module
    labels_only: nn.Module

    def after(
        self,
        queries: Tensor,
        data: PublicData,
        config: ReverseConfig,
        generator: Callable[[], torch.Generator],
    ) -> "ZeroDevices":
        """Both after one more update.

        Args:
            queries: proxy indices that the run's teacher learns from, int64 ``[query]``.
            data: all that the cloud holds.
            config: as for the run's teacher.
            generator: gives the update's batches, each time from their beginning.
        """

        def learned(teacher: nn.Module, weight: float) -> nn.Module:
            own = F.softmax(logits_of(teacher, data.proxy[queries]), dim=-1)
            targets = Targets(queries, own, own.new_full((len(queries),), weight), own)
            return absorb(teacher, targets, data, config, generator()).teacher

        return ZeroDevices(learned(self.self_distilled, 1.0), learned(self.labels_only, 0.0))
