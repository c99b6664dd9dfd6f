"""The devices of a run, elsewhere: a question for each over a carrier, and a release of what came back."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from privkd.channels.channel import Channel
from privkd.channels.registry import known
from privkd.deployment.carriers import Carrier
from privkd.deployment.wire import Answer, Question, Reason, pack_question, unpack_answer
from privkd.errors import ChannelError
from privkd.journal import Journal
from privkd.messages import Release, Task, Upload, dealt
from privkd.privacy.events import PartyId
from privkd.progress import Progress
from privkd.records import Count, Record, record_of
from privkd.runs.checkpoint import State
from privkd.runs.elsewhere import Elsewhere


class Asked(Record):
    """What came of asking the devices once in a round; public.

    Attributes:
        round: its number, from 0.
        answered: who did.
        refused: who will not, and why.
        missing: from whom nothing came, or nothing but ``later``.
        witnesses: the digest of its own ledger that each who answered told.
    """

    step: Literal["asked"] = "asked"
    round: Count
    answered: tuple[PartyId, ...]
    refused: dict[PartyId, Reason]
    missing: tuple[PartyId, ...]
    witnesses: dict[PartyId, str]

    @property
    def left_out(self) -> str:
        """Who is, by reason; empty where nobody is."""
        whom: dict[str, list[PartyId]] = {}
        for name, reason in self.refused.items():
            whom.setdefault(reason.value, []).append(name)
        if self.missing:
            whom["no answer"] = list(self.missing)
        return "; ".join(f"{why}: {', '.join(names)}" for why, names in whom.items())


def asked_in(journal: Journal) -> list[Asked]:
    """All that came of asking, oldest first.

    Raises:
        RunError: a row is not of this version's form.
    """
    return [record_of(Asked, row, journal.path) for row in journal if row.get("step") == "asked"]


def witnesses_in(journal: Journal) -> dict[PartyId, str]:
    """The newest digest of each device's own ledger. Raises as `asked_in`."""
    return {name: digest for row in asked_in(journal) for name, digest in row.witnesses.items()}


@dataclass(frozen=True)
class Patience:
    """How long a cloud waits, in seconds: ``round`` for all devices of one; after ``again`` it asks once more
    whom it has not heard, and between two questions to a device it pauses."""

    round: float
    again: float
    pause: float


class Questions(Mapping[PartyId, bytes]):
    """The questions of one round, each packed when it is sent: a thousand of them need no memory at once."""

    def __init__(
        self, where: Elsewhere, task: Task, invitation: bytes, witnesses: Mapping[PartyId, str]
    ) -> None:
        self._where, self._task = where, task
        self._invitation, self._witnesses = invitation, dict(witnesses)
        self._names = where.roster

    def of(self, names: Iterable[PartyId]) -> "Questions":
        """Those to ``names`` alone."""
        some = Questions(self._where, self._task, self._invitation, self._witnesses)
        some._names = tuple(names)
        return some

    def __getitem__(self, device: PartyId) -> bytes:
        if device not in self._names:
            raise KeyError(device)
        head = Question(
            run=self._where.run,
            device=device,
            round=self._task.question.round,
            witness=self._witnesses.get(device),
        )
        number = self._where.roster.index(device)
        return pack_question(head, tensors_of(self._task, number), self._invitation)

    def __iter__(self) -> Iterator[PartyId]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def tensors_of(task: Task, number: int) -> dict[str, Tensor]:
    """The public tensors of a question to the device of this number.

    ``queries`` int64 ``[query]``, indices of the plan's proxy set; ``prior`` float32 ``[query, class]``; the
    weights of the student of the device's own architecture as ``start.<name>``, in rounds that bring one; and
    of the teacher as ``teacher.<name>``, where students learn from it.
    """
    found = {"queries": task.question.queries, "prior": task.question.prior}
    if task.starts:
        found |= _named("start", dealt(task.starts, number))
    if task.training.alpha > 0:
        found |= _named("teacher", task.teacher)
    return found


def _named(prefix: str, model: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in model.state_dict().items()}


@dataclass
class _Heard:
    """What was heard so far in a round."""

    given: dict[PartyId, bytes] = field(default_factory=dict)
    refused: dict[PartyId, Reason] = field(default_factory=dict)
    witnesses: dict[PartyId, str] = field(default_factory=dict)

    def missing(self, names: Sequence[PartyId]) -> list[PartyId]:
        """From whom an answer is still to be had."""
        return [name for name in names if name not in self.given and name not in self.refused]


@dataclass(frozen=True)
class RemoteFleet:
    """Devices that are other processes; see `privkd.fleet.Fleet`.

    Attributes:
        where: the run by name, and its roster.
        carrier: brings questions and answers.
        patience: how long to wait.
        rounds: of the run.
        minimum: fewest devices over which a release is made.
        journal: of the run's folder: keeps who answered, and the witnesses.
        progress: told of each step.
    """

    where: Elsewhere
    carrier: Carrier
    patience: Patience
    rounds: int
    minimum: int
    journal: Journal
    progress: Progress

    @property
    def names(self) -> tuple[PartyId, ...]:
        """See `Fleet.names`."""
        return self.where.roster

    def again(self, state: State, teachers: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
        """See `Fleet.again`: devices keep their students themselves."""
        return ()

    def release(
        self, task: Task, students: Sequence[nn.Module], channel: Channel
    ) -> tuple[Release, tuple[nn.Module, ...]]:
        """See `Fleet.release`; no student is ever here."""
        question = task.question
        self._stage(question.round, f"asking {len(self.names)} devices")
        channel.open(question, self.names)
        asked = Questions(self.where, task, channel.invitation(), witnesses_in(self.journal))
        heard = self._hear(asked, task, channel)
        found = Asked(
            round=question.round,
            answered=tuple(name for name in self.names if name in heard.given),
            refused=heard.refused,
            missing=tuple(heard.missing(self.names)),
            witnesses=heard.witnesses,
        )
        self.journal.append(found.tree())
        self._check(found)
        self._stage(question.round, f"{channel.kind} channel, {len(found.answered)} devices")
        uploads = [Upload(name, question.round, heard.given[name]) for name in found.answered]
        # Behind a channel with parties devices have brought their uploads to these.
        return channel.collected(question, () if known(channel.kind).has_parties else uploads), ()

    def _hear(self, asked: Questions, task: Task, channel: Channel) -> _Heard:
        """Ask until all have answered or refused, or the patience is over."""
        heard, until = _Heard(), time.monotonic() + self.patience.round
        while waiting := heard.missing(self.names):
            left = until - time.monotonic()
            if left <= 0:
                break
            answers = self.carrier.ask(asked.of(waiting), min(left, self.patience.again))
            for name, message in answers.items():
                self._take(name, message, heard, task, channel)
            self.progress.advance(len(heard.given), len(self.names))
            if heard.missing(self.names):
                time.sleep(max(0.0, min(self.patience.pause, until - time.monotonic())))
        return heard

    def _take(self, name: PartyId, message: bytes, heard: _Heard, task: Task, channel: Channel) -> None:
        """Note an answer; one that is malformed, or another's, is as good as none."""
        try:
            answer, given = unpack_answer(message)
        except ChannelError:
            return
        if not self._fits(answer, name, task.question.round):
            return
        if answer.refused is None and _readable(channel, task, Upload(name, task.question.round, given)):
            heard.given[name] = given
            if answer.ledger is not None:
                heard.witnesses[name] = answer.ledger
        elif answer.refused is not None and answer.refused is not Reason.LATER:
            heard.refused[name] = answer.refused

    def _fits(self, answer: Answer, name: PartyId, round: int) -> bool:
        # A device that could not read the question knows neither run nor round.
        asked = answer.run in (self.where.run, None) and answer.round in (round, None)
        return answer.device == name and asked and (answer.refused is not None or answer.run is not None)

    def _check(self, found: Asked) -> None:
        if found.left_out:
            self._stage(found.round, f"left out ({found.left_out})")
        if len(found.answered) < self.minimum:
            counts = f"{len(found.answered)} of {len(self.names)} devices answered, fewer than {self.minimum}"
            raise ChannelError(
                f"round {found.round + 1}: {counts} ({found.left_out}); nothing was released: "
                "`privkd cloud run` asks again"
            )

    def _stage(self, round: int, what: str) -> None:
        self.progress.stage(f"round {round + 1} of {self.rounds}: {what}")


def _readable(channel: Channel, task: Task, upload: Upload) -> bool:
    """Whether the channel can make something of a device's ``upload`` by itself; of nothing, where devices
    bring uploads to its parties."""
    if known(channel.kind).has_parties:
        return not upload.payload
    try:
        channel.collect(task.question, (upload,))
    except (ChannelError, ValueError):
        return False
    return True
