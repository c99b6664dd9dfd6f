"""How fast models answer: one record, one CPU thread, side by side."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_TURNS = 51


def latencies_ms(*asked: tuple[Callable[[Tensor], Tensor], Tensor], turns: int = _TURNS) -> list[float]:
    """Median milliseconds of each model to answer one record on one CPU thread.

    The models take turns, so that whatever slows the machine for a while slows all of them: their ratios
    are steadier than the times.

    Args:
        asked: each model and its inputs ``[record, *shape]``, of which the first is answered.
        turns: how often each answers, after one time that does not count.
    """
    calls = [(_at_rest(model), inputs[:1].cpu()) for model, inputs in asked]
    times: list[list[float]] = [[] for _ in calls]
    with torch.no_grad(), _one_thread():
        for model, record in calls:
            model(record)
        for _ in range(turns):
            for (model, record), taken in zip(calls, times, strict=True):
                start = time.perf_counter()
                model(record)
                taken.append(time.perf_counter() - start)
    return [1000 * statistics.median(taken) for taken in times]


def _at_rest(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return model.cpu().eval() if isinstance(model, nn.Module) else model


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
