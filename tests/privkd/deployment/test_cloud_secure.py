"""A cloud's rounds over the secure channel: devices' uploads go to aggregators, and none to the cloud."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from double import draws_of
from running import StopAt, charges
from secured import running_aggregators, secured
from sites import NAMES, Picky, Site

from privkd import device
from privkd.channels.secure import OpenSum
from privkd.deployment import cloud
from privkd.deployment.carriers import InProcessCarrier
from privkd.deployment.cloud_status import status
from privkd.deployment.wire import unpack_answer, unpack_question
from privkd.errors import ChannelError, InterruptError
from privkd.messages import Task
from privkd.prepared import reopen
from privkd.privacy.noise import NoiseRoot
from privkd.runs.folder import RunFolder


@pytest.fixture(scope="module")
def aggregators() -> Iterator[str]:
    with running_aggregators() as table:
        yield table


def task_of(found: Site) -> Task:
    """The first round's, by hand."""
    with RunFolder.resume(found.folder) as folder:
        prepared = reopen(folder)
    return prepared.cloud.publish(prepared.cloud.trained_teacher(), 0)


def blocks_of(found: Site) -> list[torch.Tensor]:
    """What each device answers to it."""
    task, run = task_of(found), found.plan.digest
    return [
        device.answer(task, number, double.records, draws_of(name, run, 0)).block
        for number, (name, double) in enumerate(found.doubles.items())
    ]


def test_the_release_is_the_sum_of_what_devices_sent_and_the_cloud_is_sent_nothing(
    tmp_path: Path, aggregators: str
) -> None:
    """By hand and in the open: each device's block, added up."""
    found = secured(tmp_path, aggregators)
    found.run(rounds=1)
    assert all(unpack_answer(double(double.heard[0]))[1] == b"" for double in found.doubles.values())
    task, blocks = task_of(found), blocks_of(found)
    summed = OpenSum(found.plan.clip_norm, None, NoiseRoot.from_seed(0))
    expected = summed.carry(task.question, torch.stack(blocks), NAMES)
    assert torch.equal(found.releases()[0].answers, expected.answers)
    assert found.releases()[0].devices == NAMES
    kept = b"".join(file.read_bytes() for file in found.folder.rglob("*") if file.is_file())
    assert expected.answers.numpy().tobytes() in kept, "the twin: what was released is found"
    for double, block in zip(found.doubles.values(), blocks, strict=True):
        assert block.numpy().tobytes() not in kept
        assert not any(record.numpy().tobytes() in kept for record in double.records.inputs)


def test_interrupted_after_the_parties_released_it_gets_the_same_again(
    tmp_path: Path, aggregators: str
) -> None:
    """A stage later it is committed; here the cloud has seen the release and forgotten it."""
    budget = "\n[run.privacy]\ndevice_epsilon = 8.0\n"
    found = secured(tmp_path, aggregators, text=budget)
    with pytest.raises(InterruptError):
        cloud.run(found.config, StopAt(4), carry=lambda *_: InProcessCarrier(found.doubles))
    seen = [unpack_question(double.heard[0])[2] for double in found.doubles.values()]
    found.run()
    again = [unpack_question(double.heard[1])[2] for double in found.doubles.values()]
    assert seen == again, "the same terms"
    assert len(charges(found.folder)) == 3 * 2 * 3, "three kinds of charge, two rounds, three devices: once"
    assert [release.devices for release in found.releases()] == [NAMES, NAMES]
    assert found.releases()[0].noise_std > 0


def test_a_straggler_is_left_out_where_the_minimum_allows_it(tmp_path: Path, aggregators: str) -> None:
    found = secured(tmp_path / "two", aggregators, "minimum_devices = 2")
    found.run(Picky(found.doubles, {0: {"cy"}}))
    assert [release.devices for release in found.releases()] == [("ada", "bob"), NAMES]
    strict = secured(tmp_path / "all", aggregators)
    with pytest.raises(ChannelError, match=r"2 of 3 devices answered, fewer than 3 \(no answer: cy\)"):
        strict.run(Picky(strict.doubles, {0: {"cy"}}))
    strict.run(rounds=1)
    assert strict.releases()[0].devices == NAMES, "the same round, asked again"


def test_votes_are_held_by_devices_elsewhere(tmp_path: Path, aggregators: str) -> None:
    found = secured(tmp_path, aggregators, 'aggregation = "votes"', "vote_threshold = 0.6")
    assert found.run(rounds=1) is None
    counts = torch.stack(blocks_of(found)).sum(0)
    assert torch.equal(found.releases()[0].answers, (counts >= 2).float()), "two of three, without noise"


def test_the_report_and_status_name_the_aggregators(tmp_path: Path, aggregators: str) -> None:
    found = secured(tmp_path, aggregators)
    done = found.run()
    assert len(done.result.ran.aggregators) == 3
    assert status(found.config).finished
