"""One path from a device's records to the release: however devices are simulated, the same comes out of it.

One by one is `device.answer` for each device alone, to the bit. Vectorised, sums of float32 run in another
order: weights agree to rounding, and so do the answers before a channel, whose noise is bound to every bit.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from running import fleet_of, small
from torch import nn

from privkd import device
from privkd.channels.channel import Channel, NoisedChannel, PlainChannel
from privkd.channels.secure import SecureChannel
from privkd.errors import ChannelError
from privkd.federation import Federation
from privkd.messages import Release, Task
from privkd.plan import budgets
from privkd.prepared import Prepared, prepare
from privkd.privacy.ledger import Ledger
from privkd.progress import Silent

ROUNDING = 1e-5
NOISED = ("privacy.device_epsilon=8",)
TWO_KINDS = ("student.models=[{name='mlp', width=8}, {name='mlp', width=6}]",)
CHANNELS = {
    "plain": (),
    "noised": NOISED,
    "secure": (),
    "secure, noised": NOISED,
}


def opened(run: Prepared) -> Channel:
    plan, kind = run.plan, run.config.channel.kind
    if kind == "plain":
        return PlainChannel(plan.clip_norm)
    if kind == "noised":
        return NoisedChannel(plan.clip_norm, plan.rho, run.root)
    return SecureChannel(plan.clip_norm, plan.rho, run.root)


def described(channel: str, engine: str, *more: str) -> Prepared:
    kind = channel.partition(",")[0]
    settings = (f"channel.kind={kind}", f"student.engine={engine}", *CHANNELS[channel], *more)
    return prepare(small(*settings))


class Alone:
    """Every device by itself: it sees the task, its own records and its own randomness, and uploads."""

    def __init__(self, run: Prepared, channel: Channel) -> None:
        self.run, self.channel = run, channel
        self.students: list[nn.Module] = []

    def release(self, task: Task) -> Release:
        draws, owners = self.run.draws(task.question.round), self.run.scenario.devices
        self.channel.open(task.question, [owner.name for owner in owners])
        uploads, students = [], []
        for number, owner in enumerate(owners):
            before = self.students[number] if self.students else None
            found = device.answer(task, number, owner.train, draws.of(owner.name), before)
            block = found.block.double().flatten().numpy()
            uploads.append(self.channel.encode(task.question, block, owner.name))
            students.append(found.student)
        self.students = students
        return self.channel.collect(task.question, uploads)


def played(run: Prepared, folder: Path) -> tuple[list[Release], Sequence[nn.Module], list[dict[str, Any]]]:
    """All rounds at once: the releases, the last students, and what the ledger books."""
    ledger = Ledger.open(folder / "ledger.jsonl", budgets(run.config), must_exist=False, at_least=None)
    with opened(run) as channel:
        federation = Federation(run, ledger, channel, Silent(), fleet_of(run))
        state, students = federation.begin(), tuple[nn.Module, ...]()
        for _ in range(run.plan.rounds):
            state, students = federation.play(state, students)
    lines = (folder / "ledger.jsonl").read_text().splitlines()
    return list(state.releases), students, [json.loads(line)["record"] for line in lines]


def apart(ours: nn.Module, theirs: nn.Module) -> float:
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return max(float((one - other).detach().abs().max()) for one, other in pairs)


@pytest.mark.parametrize("more", [(), ("student.start=own",), ("privacy.epsilon=inf",), TWO_KINDS], ids=str)
@pytest.mark.parametrize("channel", CHANNELS)
def test_one_device_at_a_time_and_all_at_once_give_equal_bits(
    channel: str, more: tuple[str, ...], tmp_path: Path
) -> None:
    run = described(channel, "opacus", *more)
    releases, students, _ = played(run, tmp_path)
    teacher = run.cloud.trained_teacher()
    with opened(run) as own:
        alone = Alone(run, own)
        for round, release in enumerate(releases):
            task = run.cloud.publish(teacher, round)
            found = alone.release(task)
            assert torch.equal(found.answers, release.answers)
            assert torch.equal(found.queries, release.queries)
            assert (found.devices, found.noise_std) == (release.devices, release.noise_std)
            targets = run.cloud.targets(teacher, releases[: round + 1])
            teacher = run.cloud.update(teacher, targets, round).teacher
    assert all(apart(*pair) == 0 for pair in zip(alone.students, students, strict=True))


@pytest.mark.parametrize("more", [(), ("student.start=own",), TWO_KINDS], ids=str)
def test_vectorised_devices_answer_alike_and_book_the_same(more: tuple[str, ...], tmp_path: Path) -> None:
    found = {}
    for engine in ("opacus", "cohort"):
        (tmp_path / engine).mkdir()
        found[engine] = played(described("plain", engine, *more, "rounds=1"), tmp_path / engine)
    (one, students, book), (other, twins, again) = found["opacus"], found["cohort"]
    assert book == again
    assert max(apart(*pair) for pair in zip(students, twins, strict=True)) < ROUNDING
    for ours, theirs in zip(one, other, strict=True):
        assert torch.equal(ours.queries, theirs.queries)
        torch.testing.assert_close(ours.answers, theirs.answers, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("channel", CHANNELS)
def test_every_device_is_charged_for_its_records_and_for_itself(channel: str, tmp_path: Path) -> None:
    run = described(channel, "cohort")
    _, _, book = played(run, tmp_path)
    charged = [charge for line in book for charge in line.get("charges", ())]
    for unit in ("record", "device"):
        booked = {(one["party"], one["round"]) for one in charged if one["unit"] == unit}
        names, rounds = run.simulation.names, range(run.plan.rounds)
        assert booked == {(name, round) for name in names for round in rounds}


def test_a_task_is_named_by_all_that_it_says() -> None:
    run = described("plain", "cohort")
    teacher = run.cloud.trained_teacher()
    first, again, later = (run.cloud.publish(teacher, round) for round in (0, 0, 1))
    assert first.digest == again.digest != later.digest
    with torch.no_grad():
        next(iter(again.teacher.parameters())).add_(1.0)
    other = run.cloud.publish(again.teacher, 0)
    assert other.digest != first.digest


def test_nothing_can_be_encoded_for_parties_that_await_nothing() -> None:
    run = described("secure", "cohort")
    question = run.cloud.question(run.cloud.untrained_teacher(), 0)
    with SecureChannel(1.0, None, run.root) as channel, pytest.raises(ChannelError, match="no round is open"):
        channel.encode(question, question.prior.double().flatten().numpy(), "device-0000")
