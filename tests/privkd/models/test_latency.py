"""Answer times: models take turns on one thread, and a busy while slows all of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from privkd.models.latency import latencies_ms


class _Clock:
    """A clock that only the models move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_models_take_turns_so_that_a_busy_while_slows_all(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = _Clock(), list[str]()
    monkeypatch.setattr("privkd.models.latency.time.perf_counter", clock)

    def model(name: str, seconds: float) -> Callable[[Tensor], Tensor]:
        def answer(record: Tensor) -> Tensor:
            assert record.shape == (1, 3)
            assert torch.get_num_threads() == 1
            assert not torch.is_grad_enabled()
            calls.append(name)
            clock.now += seconds * (10 if len(calls) > 8 else 1)
            return record

        return answer

    inputs = torch.zeros(5, 3)
    found = latencies_ms((model("student", 0.001), inputs), (model("teacher", 0.004), inputs), turns=9)
    assert calls == ["student", "teacher"] * 10
    assert found == pytest.approx([10, 40])


def test_modules_answer_as_in_use_and_threads_are_given_back() -> None:
    threads = torch.get_num_threads()
    module = nn.Sequential(nn.Linear(3, 2), nn.Dropout()).train()
    (found,) = latencies_ms((module, torch.zeros(1, 3)), turns=3)
    assert found > 0
    assert not module.training
    assert torch.get_num_threads() == threads
