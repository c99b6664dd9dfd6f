"""Aggregation of what devices sent: each rule against a loop, and how far hostile devices move it."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import play
from safetensors.torch import load_file
from torch import Tensor

from privkd.channels.channel import PlainChannel, Release
from privkd.cloud import aggregate, project_on_simplex
from privkd.errors import ChannelError

RULES = ("mean", "clipped_mean", "median", "votes")
ROBUST = tuple(rule for rule in RULES if rule != "mean")
CLASSES = 4


def answers(devices: int, queries: int = 5, seed: int = 0) -> Tensor:
    draws = torch.randn(devices, queries, CLASSES, generator=torch.Generator().manual_seed(seed))
    return (2 * draws).softmax(-1)


def naive(blocks: Tensor, noise_std: float, rule: str) -> list[list[float]]:
    """Entry by entry, with the standard library."""
    kept = [
        block for block in blocks.double().tolist() if all(math.isfinite(v) for row in block for v in row)
    ]
    out = []
    for query in range(len(kept[0])):
        rows = [block[query] for block in kept]
        if rule == "clipped_mean":
            bound = 1 + noise_std * (math.sqrt(CLASSES) + 6)
            rows = [[v * min(1.0, bound / max(math.hypot(*row), 1e-300)) for v in row] for row in rows]
        if rule == "votes":
            rows = [[float(c == row.index(max(row))) for c in range(CLASSES)] for row in rows]
        middle: Callable[[list[float]], float] = statistics.median if rule == "median" else statistics.fmean
        out.append([middle([row[c] for row in rows]) for c in range(CLASSES)])
    return out


@pytest.mark.parametrize("rule", RULES)
class TestEveryRule:
    @given(devices=st.integers(1, 9), seed=st.integers(0, 1000), noise=st.sampled_from([0.0, 0.3, 5.0]))
    def test_equals_a_loop(self, rule: str, devices: int, seed: int, noise: float) -> None:
        blocks = answers(devices, seed=seed)
        blocks = blocks + noise * torch.randn(blocks.shape, generator=torch.Generator().manual_seed(seed))
        blocks[seed % devices] *= 10.0 ** (seed % 7)
        found = aggregate(blocks, noise, rule)
        expected = torch.tensor(naive(blocks, noise, rule), dtype=torch.float64)
        torch.testing.assert_close(found.answers, expected, atol=1e-9, rtol=1e-9)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_leaves_out_what_is_not_finite(self, rule: str, bad: float) -> None:
        blocks = answers(4)
        spoilt = blocks.clone()
        spoilt[2, 1, 3] = bad
        kept = aggregate(blocks[[0, 1, 3]], 0.1, rule)
        found = aggregate(spoilt, 0.1, rule)
        assert torch.equal(found.answers, kept.answers)
        assert found.noise_std == kept.noise_std
        with pytest.raises(ChannelError, match="no device sent finite answers"):
            aggregate(spoilt[2:3], 0.1, rule)

    def test_takes_a_mean_as_it_is(self, rule: str) -> None:
        mean = answers(1)[0]
        found = aggregate(mean, 0.25, rule)
        assert torch.equal(found.answers, mean.double())
        assert found.noise_std == 0.25
        with pytest.raises(ChannelError, match="the released mean is not finite"):
            aggregate(mean * math.nan, 0.25, rule)

    def test_agrees_where_all_devices_do(self, rule: str) -> None:
        sure = torch.eye(CLASSES).expand(7, CLASSES, CLASSES)
        assert torch.equal(aggregate(sure, 0.0, rule).answers, torch.eye(CLASSES).double())

    def test_the_noise_it_states_bounds_the_noise_there_is(self, rule: str) -> None:
        """Standard deviation over 4,000 entries of honest answers with a clear choice: within 5 % (its own
        error is 1.1 %, so false alarms are below 1e-4), and not below a third of what is stated."""
        noise = 0.05
        blocks = torch.eye(CLASSES)[:1].expand(9, 1000, CLASSES)
        noised = blocks + noise * torch.randn(blocks.shape, generator=torch.Generator().manual_seed(3))
        found = aggregate(noised, noise, rule)
        spread = float((found.answers - aggregate(blocks, 0.0, rule).answers).std())
        assert spread <= 1.05 * found.noise_std
        assert rule == "votes" or spread >= found.noise_std / 1.4


class TestHostile:
    @given(st.integers(0, 10_000), st.sampled_from([1e-3, 1.0, 1e3, 1e30]))
    def test_one_in_ten_moves_an_entry_no_further_than_is_stated(self, seed: int, length: float) -> None:
        honest = answers(10, seed=seed)
        hostile = honest.clone()
        hostile[9] = length * torch.randn(honest[9].shape, generator=torch.Generator().manual_seed(seed))
        moved = {
            rule: float(
                (aggregate(hostile, 0.0, rule).answers - aggregate(honest, 0.0, rule).answers).abs().max()
            )
            for rule in ROBUST
        }
        assert moved["clipped_mean"] <= 2 / 10 + 1e-6
        assert moved["votes"] <= 1 / 10 + 1e-6
        low, high = honest[:9].double().amin(0), honest[:9].double().amax(0)
        middle = aggregate(hostile, 0.0, "median").answers
        assert bool(((middle >= low) & (middle <= high)).all())

    def test_the_mean_is_moved_at_will(self) -> None:
        """The broken twin: the same attack that the others bear."""
        hostile = answers(10)
        hostile[9] = 1e6
        assert float(aggregate(hostile, 0.0, "mean").answers.min()) > 1e4

    @pytest.mark.parametrize("rule", ROBUST)
    def test_colluders_do_not_turn_a_clear_choice(self, rule: str) -> None:
        """Three in ten vote alike for a wrong class; seven are sure of the right one."""
        blocks = torch.full((10, 1, CLASSES), 0.05)
        blocks[:7, :, 0] = 0.85
        blocks[7:] = torch.eye(CLASSES)[1]
        assert int(aggregate(blocks, 0.0, rule).answers.argmax()) == 0

    def test_honest_noise_is_not_clipped(self) -> None:
        """Of 100,000 noised rows not one: under the bound stated, 2e-8 are expected to be."""
        noised = answers(20, 5000) + 3.0 * torch.randn(
            20, 5000, CLASSES, generator=torch.Generator().manual_seed(1)
        )
        clipped, plain = (aggregate(noised, 3.0, rule) for rule in ("clipped_mean", "mean"))
        torch.testing.assert_close(clipped.answers, plain.answers, atol=1e-12, rtol=0)


class TestThroughARun:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("sent", [math.nan, -math.inf, 3e38])
    def test_one_hostile_device_stops_nobody(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, sent: float
    ) -> None:
        """What it put on the wire is kept as it was received, and every weight stays finite."""
        inner = PlainChannel.carry

        def carry(channel: PlainChannel, *arguments: Any) -> Release:
            found = inner(channel, *arguments)
            found.answers[-1] = sent
            found.answers[-1, :, 0] /= 2
            return found

        monkeypatch.setattr(PlainChannel, "carry", carry)
        play(tmp_path / "run", f"reverse.aggregation={rule}")
        files = {
            file.relative_to(tmp_path / "run"): load_file(file) for file in tmp_path.rglob("*.safetensors")
        }
        for path, tensors in files.items():
            if path.name == "wire.safetensors":
                assert tensors["answers"][-1].nan_to_num(1.0).unique().numel() <= 2
            else:
                assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())

    def test_a_huge_answer_is_still_projected(self) -> None:
        points = torch.tensor([[1e30, 0.0, 3.0], [-1e30, 0.25, 0.75]], dtype=torch.float64)
        expected = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.25, 0.75]], dtype=torch.float64)
        torch.testing.assert_close(project_on_simplex(points), expected)
