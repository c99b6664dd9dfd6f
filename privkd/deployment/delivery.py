"""What a cloud delivers after the last round, and the student that the device is left with by it.

``start.NAME`` are the weights of a student of the device's architecture, freshly distilled from the last
teacher, and ``teacher.NAME`` those of that teacher, where the device's own student has a part in the result.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from privkd.deployment.agreement import Agreement
from privkd.deployment.asked_task import loaded
from privkd.errors import ChannelError, TrainingError


def delivered_models(
    agreement: Agreement, tensors: Mapping[str, Tensor], invitation: bytes
) -> tuple[nn.Module, nn.Module | None]:
    """The start and the teacher of a delivery of the agreed run; no teacher where none has a part.

    Raises:
        ChannelError: there is more or less than that, or weights are of another architecture or not finite.
    """
    groups = {name.partition(".")[0] for name in tensors}
    expected = {"start", "teacher"} if _merges(agreement) else {"start"}
    if groups != expected or invitation:
        raise ChannelError(f"a delivery of {sorted(groups)}: expected {sorted(expected)}, and no terms")
    start = loaded(agreement.student(), tensors, "start")
    return start, loaded(agreement.teacher(), tensors, "teacher") if _merges(agreement) else None


def left_with(
    agreement: Agreement,
    own: nn.Module | None,
    start: nn.Module,
    teacher: nn.Module | None,
    generator: torch.Generator,
) -> nn.Module:
    """The student that the device is left with, distilled on the plan's proxy inputs; see `device.merge`.

    It is ``start`` where its own student has no part, or there is none: the device answered in no round, or
    its training diverged.
    """
    from privkd.device import merge

    if own is None or teacher is None:
        return start
    training = agreement.published.config.student
    try:
        return merge(own, teacher, start, training, agreement.proxy, generator)
    except TrainingError:
        return start


def _merges(agreement: Agreement) -> bool:
    return agreement.published.config.student.own_weight > 0
