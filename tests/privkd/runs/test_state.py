"""A run between two rounds: what it knows of each release, and its way to the disk and back."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from privkd.cloud import aggregate, targets_of
from privkd.config import Config, ReverseConfig
from privkd.controls import NoDeviceTeachers
from privkd.journal import Head
from privkd.messages import Release
from privkd.runs.checkpoint import RoundFigures, State, commit, load_state, load_transcript, saved
from privkd.runs.folder import RunFolder

DEVICES = ("device-0000", "device-0001", "device-0002", "device-0003")
BEFORE = RoundFigures(0.5, 0.25, 0.125, 0.75, 0.5, 1.5, math.inf, 0.5, devices=0)
AFTER = replace(BEFORE, devices=len(DEVICES))


def release(answers: Tensor, baseline: Tensor | None = None, noise_std: float = 0.0) -> Release:
    queries = torch.tensor([2, 5, 7])
    return Release(queries, answers, torch.zeros(3, 4) if baseline is None else baseline, noise_std, DEVICES)


def model(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(3, 2)


def state(*releases: Release) -> State:
    figures = (BEFORE, *[AFTER] * len(releases))
    return State(model(1), NoDeviceTeachers(model(2), model(3)), releases, figures)


class TestAggregation:
    def test_each_devices_answers_are_averaged_and_so_is_their_noise(self) -> None:
        answers = torch.rand(4, 3, 4).softmax(-1)
        found = aggregate(answers, 0.6, "clipped_mean")
        torch.testing.assert_close(found.answers, (sum(answers) / 4).double(), atol=1e-6, rtol=0)
        assert found.noise_std == pytest.approx(0.3)

    def test_a_mean_is_taken_as_it_is(self) -> None:
        answers = torch.rand(3, 4)
        found = aggregate(answers, 0.6, "clipped_mean")
        assert torch.equal(found.answers, answers.double())
        assert found.noise_std == 0.6

    @pytest.mark.parametrize("shared", [True, False])
    def test_residuals_are_relative_to_what_was_published_then(self, shared: bool) -> None:
        probabilities = torch.rand(4, 3, 4).softmax(-1)
        baseline = torch.rand(3, 4).softmax(-1)
        sent = probabilities - baseline
        learned = release(sent if shared else sent.mean(0), baseline)
        targets = targets_of([learned], torch.full((8, 4), 0.25), ReverseConfig(sharpen=1.0, margin=0.0))
        assert targets.queries.tolist() == [2, 5, 7]
        torch.testing.assert_close(targets.probabilities, probabilities.mean(0), atol=1e-5, rtol=0)


def test_the_control_is_the_better_of_two() -> None:
    assert BEFORE.control == 0.25
    assert replace(BEFORE, labels_only=0.375).control == 0.375


class TestToTheDiskAndBack:
    def test_bit_for_bit(self, tmp_path: Path) -> None:
        first = state()
        second = state(release(torch.rand(4, 3, 4), torch.rand(3, 4), noise_std=0.1))
        third = state(*second.releases, release(torch.rand(4, 3, 4), noise_std=1 / 3))
        with RunFolder.create(tmp_path, Config()) as folder:
            for number, each in enumerate((first, second, third)):
                commit(folder, each, Head(number + 1, "a" * 64))
        with RunFolder.resume(tmp_path) as folder:
            record = saved(folder)
            back = load_state(folder, record, model(90))
        assert record.ledger == Head(3, "a" * 64)
        assert back.round == 2
        assert back.figures == third.figures
        idle, kept = third.no_devices, back.no_devices
        pairs = [
            (back.teacher, third.teacher),
            (kept.self_distilled, idle.self_distilled),
            (kept.labels_only, idle.labels_only),
        ]
        for ours, theirs in pairs:
            assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        for ours, theirs in zip(back.releases, third.releases, strict=True):
            assert torch.equal(ours.answers, theirs.answers)
            assert torch.equal(ours.baseline, theirs.baseline)
            assert torch.equal(ours.queries, theirs.queries)
            assert (ours.noise_std, ours.devices) == (theirs.noise_std, theirs.devices)

    def test_what_crossed_the_release(self, tmp_path: Path) -> None:
        """Each round's answers beside the teacher that was published before them, and the last teacher."""
        answers = torch.rand(4, 3, 4)
        before, after = state(), state(release(answers))
        nn.init.constant_(after.teacher.weight, 7.0)
        with RunFolder.create(tmp_path, Config()) as folder:
            commit(folder, before, None)
            commit(folder, after, None)
            transcript = load_transcript(folder, model(90))
        (exchange,) = transcript.exchanges
        assert torch.equal(exchange.release.answers, answers)
        assert torch.equal(exchange.teacher.weight, before.teacher.weight)
        assert torch.equal(transcript.final_teacher.weight, after.teacher.weight)
