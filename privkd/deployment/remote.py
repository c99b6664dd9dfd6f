"""The devices of a run, elsewhere: a question for each over a carrier, and a release of what came back."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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


class _Unanswered(Record):
    """Who did not answer when devices were asked; public.

    Attributes:
        refused: who will not, and why.
        missing: from whom nothing came, or nothing but ``later``.
    """

    refused: dict[PartyId, Reason]
    missing: tuple[PartyId, ...]

    @property
    def left_out(self) -> str:
        """Who is, by reason; empty where nobody is."""
        whom: dict[str, list[PartyId]] = {}
        for name, reason in self.refused.items():
            whom.setdefault(reason.value, []).append(name)
        if self.missing:
            whom["no answer"] = list(self.missing)
        return "; ".join(f"{why}: {', '.join(names)}" for why, names in whom.items())


class Asked(_Unanswered):
    """What came of asking the devices once in a round; public.

    Attributes:
        round: its number, from 0.
        answered: who did.
        witnesses: the digest of its own ledger that each who answered told.
    """

    step: Literal["asked"] = "asked"
    round: Count
    answered: tuple[PartyId, ...]
    witnesses: dict[PartyId, str]


class Delivered(_Unanswered):
    """Who has taken the last teacher ``to`` itself; public."""

    step: Literal["delivered"] = "delivered"
    to: tuple[PartyId, ...]


def asked_in(journal: Journal) -> list[Asked]:
    """All that came of asking, oldest first.

    Raises:
        RunError: a row is not of this version's form.
    """
    return [record_of(Asked, row, journal.path) for row in journal if row.get("step") == "asked"]


def witnesses_in(journal: Journal) -> dict[PartyId, str]:
    """The newest digest of each device's own ledger. Raises as `asked_in`."""
    return {name: digest for row in asked_in(journal) for name, digest in row.witnesses.items()}


def delivered_in(journal: Journal) -> frozenset[PartyId]:
    """Who has taken the last teacher. Raises as `asked_in`."""
    rows = [record_of(Delivered, row, journal.path) for row in journal if row.get("step") == "delivered"]
    return frozenset(name for row in rows for name in row.to)


@dataclass(frozen=True)
class Patience:
    """How long a cloud waits, in seconds: ``round`` for all devices of one; after ``again`` it asks once more
    whom it has not heard, and between two questions to a device it pauses."""

    round: float
    again: float
    pause: float


@dataclass(frozen=True)
class Questions(Mapping[PartyId, bytes]):
    """The questions of one round, each packed when it is sent: a thousand of them need no memory at once.

    Attributes:
        where: the run by name, and its roster.
        names: whom they are for.
        round: its number.
        tensors: what a device is asked, by its number.
        invitation: the channel's.
        witnesses: of each device's ledger, as it told last.
    """

    where: Elsewhere
    names: tuple[PartyId, ...]
    round: int
    tensors: Callable[[int], Mapping[str, Tensor]]
    invitation: bytes
    witnesses: Mapping[PartyId, str]

    def of(self, names: Iterable[PartyId]) -> "Questions":
        """Those to ``names`` alone."""
        return replace(self, names=tuple(names))

    def __getitem__(self, device: PartyId) -> bytes:
        if device not in self.names:
            raise KeyError(device)
        head = Question(
            run=self.where.run, device=device, round=self.round, witness=self.witnesses.get(device)
        )
        return pack_question(head, self.tensors(self.where.roster.index(device)), self.invitation)

    def __iter__(self) -> Iterator[PartyId]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


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


def delivery_of(
    teacher: nn.Module, starts: Sequence[nn.Module], own_weight: float, number: int
) -> dict[str, Tensor]:
    """The public tensors of a delivery to the device of this number: see `privkd.deployment.delivery`."""
    found = _named("start", dealt(starts, number))
    return found | (_named("teacher", teacher) if own_weight > 0 else {})


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
        asked = self._questions(question.round, partial(tensors_of, task), channel.invitation())
        heard = self._hear(asked, partial(_readable, channel, task))
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

    @property
    def lacking(self) -> tuple[PartyId, ...]:
        """Who has not taken the last teacher yet."""
        has = delivered_in(self.journal)
        return tuple(name for name in self.names if name not in has)

    def deliver(self, teacher: nn.Module, starts: Sequence[nn.Module], own_weight: float) -> None:
        """Bring the last ``teacher`` to all who lack it, with one of ``starts``, as long as patience lasts.

        Nobody must take it. What came of it is in the journal.
        """
        lacking = self.lacking
        self.progress.stage(f"delivering the last teacher to {len(lacking)} devices")
        tensors = partial(delivery_of, teacher, starts, own_weight)
        heard = self._hear(self._questions(self.rounds, tensors, b"").of(lacking), _is_empty)
        found = Delivered(
            to=tuple(name for name in lacking if name in heard.given),
            refused=heard.refused,
            missing=tuple(heard.missing(lacking)),
        )
        self.journal.append(found.tree())
        if found.left_out:
            self.progress.stage(f"not delivered ({found.left_out}): `privkd cloud run` tries again")

    def _questions(
        self, round: int, tensors: Callable[[int], Mapping[str, Tensor]], invitation: bytes
    ) -> Questions:
        return Questions(self.where, self.names, round, tensors, invitation, witnesses_in(self.journal))

    def _hear(self, asked: Questions, readable: Callable[[Upload], bool]) -> _Heard:
        """Ask until all have answered or refused, or the patience is over."""
        heard, until = _Heard(), time.monotonic() + self.patience.round
        while waiting := heard.missing(asked.names):
            left = until - time.monotonic()
            if left <= 0:
                break
            answers = self.carrier.ask(asked.of(waiting), min(left, self.patience.again))
            for name, message in answers.items():
                self._take(name, message, heard, asked.round, readable)
            self.progress.advance(len(heard.given), len(asked))
            if heard.missing(asked.names):
                time.sleep(max(0.0, min(self.patience.pause, until - time.monotonic())))
        return heard

    def _take(
        self, name: PartyId, message: bytes, heard: _Heard, round: int, readable: Callable[[Upload], bool]
    ) -> None:
        """Note an answer; one that is malformed, or another's, is as good as none."""
        try:
            answer, given = unpack_answer(message)
        except ChannelError:
            return
        if not self._fits(answer, name, round):
            return
        if answer.refused is None and readable(Upload(name, round, given)):
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


def _is_empty(upload: Upload) -> bool:
    return not upload.payload


def _readable(channel: Channel, task: Task, upload: Upload) -> bool:
    """Whether the channel can make something of a device's ``upload`` by itself; of nothing, where devices
    bring uploads to its parties."""
    if known(channel.kind).has_parties:
        return _is_empty(upload)
    try:
        channel.collect(task.question, (upload,))
    except (ChannelError, ValueError):
        return False
    return True
