"""Every way to answer, by real programs of devices: each release is what the devices' own blocks come to."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from on_device import Box
from secured import running_aggregators, secured
from sites import NAMES, Site, real_devices, site
from torch import Tensor, nn
from torch.nn import functional as F

from privkd import device
from privkd.channels.channel import NoisedChannel
from privkd.channels.secure import OpenSum
from privkd.deployment.agreement import Agreement, show
from privkd.deployment.asked_task import asked_task
from privkd.deployment.carriers import InProcessCarrier
from privkd.deployment.device import kept_student
from privkd.deployment.device_state import Asked, Trained, read_ledger, run_folder
from privkd.deployment.own_records import own_records
from privkd.deployment.wire import unpack_question
from privkd.device import Draws
from privkd.messages import Question, Task
from privkd.privacy.accounting import upper_bound
from privkd.privacy.events import DpSgd, Unit, ZCdp
from privkd.privacy.noise import NoiseRoot
from privkd.privacy.randomness import SystemRandomness


@dataclass
class Played:
    """A site that real devices play, and what each was asked and kept in each round."""

    found: Site
    devices: dict[str, Box]
    asked: dict[tuple[str, int], bytes] = field(default_factory=dict)
    kept: dict[tuple[str, int], dict[str, Tensor]] = field(default_factory=dict)

    def handler(self, name: str) -> Callable[[bytes], bytes]:
        """The device, started anew for every question."""

        def handle(message: bytes) -> bytes:
            box, round = self.devices[name], unpack_question(message)[0].round
            box.start()
            answer = box.raw(message)
            last = box.state.last(Trained, self.found.plan.digest)
            assert last is not None
            if last.round == round:
                self.asked[name, round] = message
                self.kept[name, round] = box.state.kept_round(last)
            return answer

        return handle

    def run(self, rounds: int | None = None) -> None:
        self.found.run(InProcessCarrier({name: self.handler(name) for name in NAMES}), rounds=rounds)

    def agreement(self, name: str) -> Agreement:
        run = self.found.plan.digest
        return Agreement.read(run_folder(self.devices[name].owner.state, run), name)

    def task(self, name: str, round: int) -> Task:
        """As the question gives it."""
        return asked_task(self.agreement(name), round, unpack_question(self.asked[name, round])[1])

    def question(self, round: int) -> Question:
        return self.task(NAMES[0], round).question

    def student(self, name: str, round: int) -> nn.Module:
        return kept_student(self.kept[name, round], self.agreement(name))

    def blocks(self, round: int) -> Tensor:
        """What each student answers, by hand, ``[device, query, class]``."""
        question, found = self.question(round), []
        for name in NAMES:
            with torch.no_grad():
                answers = F.softmax(self.student(name, round)(question.inputs), -1)
            if question.kind == "votes":
                answers = F.one_hot(answers.argmax(-1), answers.shape[-1]).float()
            found.append(answers - question.prior if question.kind == "residuals" else answers)
        return torch.stack(found)

    def check_ledgers(self, rounds: int) -> None:
        """Each device booked the plan's price of each round, once, and of nothing else."""
        plan, checked = self.found.plan, self.agreement(NAMES[0]).plan
        for box in self.devices.values():
            kept = read_ledger(box.owner)
            assert kept is not None
            name, delta = box.owner.name, box.owner.budget.delta
            releases = kept.events(Unit.DEVICE, name)
            assert releases == (checked.device_event,) * rounds
            assert plan.rho is None or checked.device_event == ZCdp(plan.rho)
            trainings = [each for each in kept.events(Unit.RECORD, name) if isinstance(each, DpSgd)]
            assert trainings == [checked.training_event] * rounds
            whole = upper_bound([checked.device_event] * checked.rounds, delta)
            assert whole == pytest.approx(plan.epsilon_device)


@pytest.fixture
def played(tmp_path: Path) -> Iterator[Callable[..., Played]]:
    with ExitStack() as stack:

        def play(found: Site, rounds: int | None = None, **owner: object) -> Played:
            made = Played(found, real_devices(found, **owner))
            for box in made.devices.values():
                stack.callback(box.stop)
            made.run(rounds)
            return made

        yield play


def student_settings(*lines: str) -> Callable[[str], str]:
    return lambda text: text.replace('engine = "opacus"', "\n".join(['engine = "opacus"', *lines]))


def test_residuals_over_noised_are_the_devices_own_with_their_own_noise(
    tmp_path: Path, played: Callable[..., Played]
) -> None:
    """Bit for bit: the clipped block, encoded, with the noise of the device's own root; and no other's."""
    found = site(tmp_path, "noised", with_residuals)
    made = played(found)
    plan = found.plan
    for round, release in enumerate(found.releases()):
        question, blocks = made.question(round), made.blocks(round)
        assert question.kind == "residuals"
        assert torch.equal(release.baseline, question.prior)
        uploads = []
        for name, block in zip(NAMES, blocks, strict=True):
            channel = NoisedChannel(plan.clip_norm, plan.rho, made.devices[name].state.run_root(plan.digest))
            uploads.append(channel.encode(question, block.double().flatten().numpy(), name))
        expected = NoisedChannel(plan.clip_norm, plan.rho).collect(question, uploads)
        assert torch.equal(release.answers, expected.answers)
        noise = (release.answers - blocks).double()
        # Each of 1,200 entries is beyond 6 standard deviations with 2e-9; their spread is 6 of its own off.
        assert noise.abs().max() < 6 * release.noise_std
        assert noise.std().item() == pytest.approx(release.noise_std, rel=0.13)
        across = np.corrcoef(noise.flatten(1).numpy()) - np.eye(3)
        assert abs(across).max() < 6 / 20, "no two devices draw the same"
    made.check_ledgers(2)


def with_residuals(text: str) -> str:
    return text.replace('kind = "noised"', 'kind = "noised"\nanswers = "residuals"')


def test_heterogeneous_students_answer_by_the_rosters_order(
    tmp_path: Path, played: Callable[..., Played]
) -> None:
    """Widths 8, 6 and 8 again, each trained on its own records and asked the same."""
    found = site(tmp_path)
    made = played(found)
    for round, release in enumerate(found.releases()):
        widths = [next(made.student(name, round).parameters()).shape[0] for name in NAMES]
        assert widths == [8, 6, 8]
        torch.testing.assert_close(release.answers, made.blocks(round), atol=1e-6, rtol=0)
        assert release.devices == NAMES
    made.check_ledgers(2)


def test_own_students_go_on_over_three_rounds_and_restarts(
    tmp_path: Path, played: Callable[..., Played]
) -> None:
    """By hand: each round begins with the student that the device kept, and the first with the published."""
    own = student_settings('start = "own"')
    found = site(tmp_path, change=lambda text: own(text).replace("rounds = 2", "rounds = 3"))
    made = played(found)
    run = found.plan.digest
    assert len(found.releases()) == 3
    for number, name in enumerate(NAMES):
        state, before = made.devices[name].state, None
        records = own_records(made.devices[name].owner.records, found.plan)
        for round, release in enumerate(found.releases()):
            task, asked = made.task(name, round), state.last(Asked, run, round=round)
            assert asked is not None
            assert bool(task.starts) == (round == 0)
            private = SystemRandomness(state.run_root(run), name, round, asked.substance)
            expected = device.answer(task, number, records, Draws(private, torch.Generator()), before)
            assert torch.equal(release.answers[number], expected.block)
            before = expected.student
    made.check_ledgers(3)


@pytest.fixture(scope="module")
def aggregators() -> Iterator[str]:
    with running_aggregators() as table:
        yield table


@pytest.fixture
def summed(tmp_path: Path, aggregators: str, played: Callable[..., Played]) -> Callable[..., Played]:
    """A round over the aggregators, whom the owners pinned, and of which they want three devices in a sum."""

    def play(*more: str, text: str = "") -> Played:
        found = secured(tmp_path, aggregators, *more, text=text)
        channel = found.plan.config.channel
        pinned = {"urls": channel.aggregator_urls, "keys": channel.aggregator_keys}
        return played(found, 1, aggregators=pinned, bounds={"minimum_devices": 3})

    return play


@pytest.mark.slow
class TestOverAggregators:
    def test_a_vote_is_what_most_devices_say(self, summed: Callable[..., Played]) -> None:
        made = summed('aggregation = "votes"', "vote_threshold = 0.6")
        counts = made.blocks(0).sum(0)
        assert torch.equal(counts.sum(-1), torch.full((len(counts),), 3.0))
        (release,) = made.found.releases()
        assert torch.equal(release.answers, (counts >= 2).float()), "two of three, without noise"
        made.check_ledgers(1)

    def test_the_norm_check_lets_honest_devices_through(self, summed: Callable[..., Played]) -> None:
        made = summed("norm_projections = 64")
        (release,) = made.found.releases()
        assert release.devices == NAMES
        assert torch.equal(release.answers, naive_sum(made))
        made.check_ledgers(1)

    def test_the_devices_noise_is_of_the_known_size(self, summed: Callable[..., Played]) -> None:
        made = summed('noise_from = "devices"', text="\n[run.privacy]\ndevice_epsilon = 8.0\n")
        (release,) = made.found.releases()
        noise = (release.answers - made.blocks(0).mean(0)).double()
        assert release.noise_std > 0
        asks = show(made.devices["ada"].owner, made.found.config.parent / "published").asks
        assert str(asks["noise on the answers"]).endswith("if 3 devices add their parts honestly")
        # Each of 400 entries is beyond 6 standard deviations with 2e-9; their spread is 6 of its own off.
        assert noise.abs().max() < 6 * release.noise_std
        assert noise.std().item() == pytest.approx(release.noise_std, rel=0.22)
        made.check_ledgers(1)

    def test_residuals_are_summed(self, summed: Callable[..., Played]) -> None:
        made = summed('answers = "residuals"')
        (release,) = made.found.releases()
        assert torch.equal(release.baseline, made.question(0).prior)
        assert torch.equal(release.answers, naive_sum(made))


def naive_sum(made: Played) -> Tensor:
    """The first round's, in the open: no shares, no noise."""
    channel = OpenSum(made.found.plan.clip_norm, None, NoiseRoot.from_seed(0))
    return channel.carry(made.question(0), made.blocks(0), NAMES).answers
