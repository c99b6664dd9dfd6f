"""A device that is honest and slow, and the naive truth of what one does: every question from the beginning.

It keeps what it sent for a round and terms, and nothing else: no checks, no budget, no restarts.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from privkd import device
from privkd.channels.channel import Channel
from privkd.channels.registry import open_channel
from privkd.channels.secure import SecureOptions
from privkd.data.scenario import LabelledSet
from privkd.deployment.published import PublishedPlan
from privkd.deployment.wire import Answer, Question, Reason, pack_answer, unpack_question
from privkd.device import Draws
from privkd.messages import Question as Asked
from privkd.messages import Task
from privkd.models.zoo import build
from privkd.privacy.noise import NoiseRoot
from privkd.privacy.randomness import SystemRandomness
from privkd.privacy.votes import VoteRule
from privkd.training.dpsgd import Mechanism, with_capped_learning_rate
from privkd.training.proof import Probe


def run_root(name: str, digest: str) -> NoiseRoot:
    """From which a device's noise in a run grows; its own root is made up from its name."""
    return NoiseRoot(NoiseRoot(name.encode().ljust(32, b"-")).subkey("run", digest))


def draws_of(name: str, digest: str, round: int) -> Draws:
    """What a device draws in a round."""
    return Draws(SystemRandomness(run_root(name, digest), round), torch.Generator().manual_seed(round))


def channel_of(plan: PublishedPlan, name: str, votes: VoteRule | None = None) -> Channel:
    """A device's own half of the channel."""
    settings = plan.config.channel
    return open_channel(
        settings.kind,
        clip_norm=plan.clip_norm,
        root=NoiseRoot(run_root(name, plan.digest).subkey("channel")),
        rho=plan.rho,
        aggregators=settings.aggregators,
        options=SecureOptions.of(settings, run=bytes.fromhex(plan.digest), roster=plan.roster, votes=votes),
    )


@dataclass
class Double:
    """A device by name, with the folder that its owner was given, and its records.

    ``refusing`` says for which round it refuses, and why; ``heard`` are all questions that reached it, and
    ``delivered`` what came after the last.
    """

    name: str
    folder: Path
    records: LabelledSet
    refusing: Callable[[int], Reason | None] = lambda round: None
    heard: list[bytes] = field(default_factory=list)
    delivered: list[bytes] = field(default_factory=list)
    students: dict[int, nn.Module] = field(default_factory=dict)
    sent: dict[tuple[int, bytes], bytes] = field(default_factory=dict)

    def __call__(self, message: bytes) -> bytes:
        head, tensors, invitation = unpack_question(message)
        assert head.device == self.name
        last = head.round == PublishedPlan.load(self.folder)[0].config.rounds
        (self.delivered if last else self.heard).append(message)
        refused = self.refusing(head.round)
        answer = Answer(run=head.run, device=self.name, round=head.round, refused=refused)
        if refused is not None or last:
            return pack_answer(answer)
        key = head.round, invitation
        if key not in self.sent:
            self.sent[key] = self._answered(head, tensors, invitation)
        told = answer.model_copy(update={"ledger": f"{head.round}:{self.name}"})
        return pack_answer(told, self.sent[key])

    def _answered(self, head: Question, tensors: Mapping[str, Tensor], invitation: bytes) -> bytes:
        plan, proxy = PublishedPlan.load(self.folder)
        assert plan.digest == head.run
        task, number = task_of(plan, proxy, head.round, plan.number(self.name), tensors)
        draws, before = draws_of(self.name, plan.digest, head.round), self.students.get(head.round - 1)
        found = device.answer(task, number, self.records, draws, before)
        self.students[head.round] = found.student
        with channel_of(plan, self.name, plan.checked(len(proxy)).votes) as channel:
            channel.accept(task.question, invitation)
            block = found.block.double().flatten().numpy()
            upload = channel.encode(task.question, block, self.name)
            return channel.deliver(upload, time.monotonic() + 60)


def task_of(
    plan: PublishedPlan, proxy: Tensor, round: int, number: int, tensors: Mapping[str, Tensor]
) -> tuple[Task, int]:
    """The task as the plan and a question's tensors give it."""
    config, classes = plan.config, len(plan.classes)

    def model(prefix: str, settings: object) -> nn.Module:
        built = build(settings, input_shape=plan.input_shape, classes=classes, seed=0)  # type: ignore[arg-type]
        start = f"{prefix}."
        built.load_state_dict(
            {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        )
        return built.eval()

    models = config.student.models
    given = any(key.startswith("start.") for key in tensors)
    start = model("start", models[number % len(models)]) if given else None
    teaches = config.student.alpha > 0
    teacher = model("teacher", config.teacher.model) if teaches else nn.Identity()
    checked = plan.checked(len(proxy))
    mechanism = None
    if checked.noise_multiplier:
        recipe = with_capped_learning_rate(
            config.student.dp, checked.noise_multiplier, checked.expected_batch_size
        )
        mechanism = Mechanism(
            recipe,
            checked.noise_multiplier,
            checked.expected_batch_size,
            config.student.alpha,
            config.student.temperature,
            Probe.of(proxy, classes),
        )
    queries = tensors["queries"]
    question = Asked(round, queries, proxy[queries], tensors["prior"], config.channel.sends)
    # One architecture is all that a device knows of: whatever its number, it begins from this one.
    starts = () if start is None else (start,)
    return Task(teacher, starts, config.student, mechanism, question), number
