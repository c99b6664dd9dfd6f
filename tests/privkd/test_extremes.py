"""Settings and data at their ends, through the command: each works with finite figures, or says why not."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import Answer, Commands
from running import SMALL
from safetensors.torch import load_file
from torch import Tensor, nn

from privkd.config import FitConfig
from privkd.errors import TrainingError
from privkd.training.fit import check_finite, fit

TINY = (*SMALL, "data.device_test_records=0", "teacher.fit.steps=5", "student.public_fit.steps=3", "rounds=1")
ONE_RECORD = ("data.devices=1", "data.records_per_device=1")
EMPTY_SHARDS = ("data.partition=dirichlet", "data.dirichlet_alpha=0.001", "data.devices=15",
                "data.records_per_device=10")  # fmt: skip


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with Commands(tmp_path_factory.mktemp("commands")) as server:
        yield server


def train(commands: Commands, folder: Path, *settings: str) -> Answer:
    words = [word for setting in (*TINY, *settings) for word in ("--set", setting)]
    return commands.run("train", *words, "--json", "--out", folder / "run", cwd=folder)


def numbers(tree: Any) -> list[float]:
    """All numbers in a JSON value."""
    if isinstance(tree, dict | list):
        return [n for item in (tree.values() if isinstance(tree, dict) else tree) for n in numbers(item)]
    return [float(tree)] if isinstance(tree, int | float) else []


WORKS = {
    "epsilon 0.01": ("privacy.epsilon=0.01",),
    "epsilon 100": ("privacy.epsilon=100",),
    "epsilon 1e-6": ("privacy.epsilon=1e-6",),
    "delta 0.5": ("privacy.delta=0.5", "privacy.allow_large_delta=true"),
    "delta 1e-30": ("privacy.delta=1e-30",),
    "device epsilon 0.01": ("channel.kind=noised", "privacy.device_epsilon=0.01"),
    "device epsilon 100": ("channel.kind=noised", "privacy.device_epsilon=100"),
    "one device, one record": ONE_RECORD,
    "one record, Opacus": (*ONE_RECORD, "student.engine=opacus"),
    "one device, secure": ("data.devices=1", "channel.kind=secure"),
    "one class a device": (
        "data.partition=classes",
        "data.classes_per_device=1",
        "data.records_per_device=20",
    ),
    "an empty shard": EMPTY_SHARDS,
    "an empty shard, no DP": (*EMPTY_SHARDS, "privacy.epsilon=inf"),
    "one proxy record": ("data.proxy_records=1",),
    "one query": ("reverse.queries=1",),
    "one public record": ("data.public_records=1", "data.validation_records=1"),
    "one step": ("student.dp.steps=1", "reverse.fit.steps=1"),
    "sampling rate 1e-6": ("student.dp.sampling_rate=1e-6",),
    "a huge learning rate": ("student.dp.learning_rate=1e9", "student.dp.step_noise=1e9"),
    "median of one": ("data.devices=1", "reverse.aggregation=median"),
}


@pytest.mark.parametrize("case", WORKS)
def test_works(commands: Commands, tmp_path: Path, case: str) -> None:
    answer = train(commands, tmp_path, *WORKS[case])
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    assert all(math.isfinite(number) for number in numbers(result))
    for name in ("before", "after", "control"):
        assert 0 <= result["teacher"][name] <= 1
    budget = result["ledger"]["record"]["budget"]
    assert budget == "inf" or result["ledger"]["record"]["epsilon"] <= budget
    for file in (tmp_path / "run").rglob("*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(file).values()), file.name


def npz(folder: Path, name: str, **changes: Any) -> None:
    rng = np.random.default_rng(0)
    arrays = {"inputs": rng.random((400, 6)).astype(np.float32), "labels": rng.integers(0, 3, 400)}
    np.savez(folder / name, **(arrays | {key: change(arrays[key]) for key, change in changes.items()}))


REFUSED = {
    "no proxy set": (("data.proxy_records=0",), 2, "proxy set is empty"),
    "one class": (("data.source=one.npz",), 2, "at least two classes"),
    "values at float32's end": (
        ("data.source=huge.npz", "data.standardise=no", "teacher.model={name='mlp', width=128}"),
        1,
        "diverged in training",
    ),
    "delta 0": (("privacy.delta=0",), 2, "privacy.delta"),
    "a large delta": (("privacy.delta=0.5",), 2, "privacy.allow_large_delta=true"),
    "no device": (("data.devices=0",), 2, "data.devices"),
    "no round": (("rounds=0",), 2, "rounds"),
    "device epsilon 1e-12": (
        ("channel.kind=noised", "privacy.device_epsilon=1e-12", "privacy.delta=1e-30"), 2, "cannot be kept",
    ),
    "median of a sum": (("channel.kind=secure", "reverse.aggregation=median"), 2, "their sum alone"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_says_why_not(commands: Commands, tmp_path: Path, case: str) -> None:
    settings, code, expected = REFUSED[case]
    npz(tmp_path, "one.npz", labels=lambda labels: labels * 0)
    npz(tmp_path, "huge.npz", inputs=lambda inputs: inputs * 3e38)
    answer = train(commands, tmp_path, *settings)
    assert answer.code == code, answer.err
    assert "Traceback" not in answer.err
    assert answer.err.splitlines()[-1].startswith("privkd: ")
    assert expected in answer.err.splitlines()[-1]
    ledger = tmp_path / "run" / "ledger.jsonl"
    assert not ledger.exists() or "dp_sgd" not in ledger.read_text().lower(), "nothing was spent"


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_no_loss_that_is_not_finite_passes_silently(bad: float) -> None:
    """Not even one among many whose gradient, and so every weight, stays finite."""
    calls: list[None] = []

    def loss(model: nn.Module, _: Tensor) -> Tensor:
        calls.append(None)
        return model(torch.ones(1, 2)).sum() + (bad if len(calls) == 3 else 0.0)

    with pytest.raises(TrainingError, match="a loss was not finite in training at learning rate"):
        fit(nn.Linear(2, 1), loss, records=4, config=FitConfig(steps=5), generator=torch.Generator())


def test_nor_a_running_statistic() -> None:
    model = nn.BatchNorm1d(2)
    assert model.running_var is not None
    model.running_var.fill_(math.inf)
    with pytest.raises(TrainingError, match="the model diverged"):
        check_finite(model, "the model", 0.1)
