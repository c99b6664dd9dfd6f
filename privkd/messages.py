"""What passes between the cloud and the devices, and nothing else does.

    cloud -- Task --> device -- Upload --> channel -- Release --> cloud

A task is public. What a device makes of it is private until its channel has encoded it: an upload is all that
leaves the device, a release all that the cloud sees.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor, nn

from privkd.config import StudentConfig
from privkd.privacy.events import PartyId, Unit

# A message is read long before anybody trains.
if TYPE_CHECKING:
    from privkd.training.dpsgd import Mechanism

AnswerKind: TypeAlias = Literal["probabilities", "votes", "residuals"]
"""What a device sends for a query: probabilities, a one-hot first choice, or probabilities less the prior."""


@dataclass(frozen=True)
class Question:
    """What all devices are asked in one round; public.

    Attributes:
        round: its number, from 0.
        queries: indices of the public proxy records, ascending, int64 ``[query]``.
        inputs: those records ``[query, *shape]``.
        prior: the published teacher's probabilities on them ``[query, class]``.
        kind: how the devices answer.
    """

    round: int
    queries: Tensor
    inputs: Tensor
    prior: Tensor
    kind: AnswerKind

    @classmethod
    def of_shape(cls, round: int, queries: int, classes: int) -> "Question":
        """A question whose answers are made up, such as an audit's."""
        nothing = torch.zeros(queries, classes)
        return cls(round, torch.arange(queries), nothing[:, :0], nothing, "probabilities")

    @cached_property
    def baseline(self) -> Tensor:
        """What devices subtract from their answers ``[query, class]``: zero unless they send residuals."""
        return self.prior.cpu() if self.kind == "residuals" else torch.zeros(self.prior.shape)


@dataclass(frozen=True)
class Task:
    """What the cloud publishes to every device in one round; public.

    Attributes:
        teacher: the cloud's model.
        starts: a student of each architecture, distilled from the teacher on public data. They are dealt to
            the devices in turn.
        training: how students learn on their devices.
        mechanism: DP-SGD of the round, or ``None`` where the run asks for no DP.
        question: what each device answers then.
    """

    teacher: nn.Module
    starts: tuple[nn.Module, ...]
    training: StudentConfig
    mechanism: "Mechanism | None"
    question: Question

    def start(self, number: int, before: nn.Module | None = None) -> nn.Module:
        """What the device of this number begins with, whose student was ``before``.

        Where every round starts from the teacher, and before the first, that is the published student.
        """
        if before is not None and self.training.start == "own":
            return before
        return dealt(self.starts, number)

    def dealt(self, numbers: Sequence[int], before: Sequence[nn.Module] = ()) -> list[nn.Module]:
        """`start` for the devices of ``numbers``, whose students were ``before``, if they had any."""
        befores: Sequence[nn.Module | None] = before or [None] * len(numbers)
        return [self.start(*each) for each in zip(numbers, befores, strict=True)]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that the task says: equal tasks have equal ones."""
        digest = hashlib.sha256()
        for part in self._parts():
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
        return digest.hexdigest()

    def _parts(self) -> Iterator[bytes]:
        yield self.training.model_dump_json().encode()
        mechanism = self.mechanism
        if mechanism is not None:
            public = (mechanism.noise_multiplier, mechanism.expected_batch_size, mechanism.alpha)
            yield f"{mechanism.recipe.model_dump_json()} {public} {mechanism.temperature}".encode()
            if mechanism.unit is not Unit.RECORD:
                yield mechanism.unit.encode()
        question = self.question
        yield f"{question.round} {question.kind}".encode()
        for tensor in (question.queries, question.inputs, question.prior):
            yield _bytes(tensor)
        for model in (self.teacher, *self.starts):
            yield repr(model).encode()
            for name, tensor in model.state_dict().items():
                yield name.encode()
                yield _bytes(tensor)


@dataclass(frozen=True)
class Upload:
    """What one device sends: its clipped answers as its channel encodes them.

    Attributes:
        device: whose.
        round: of the question, from 0.
        payload: the encoded block; how is the channel's.
    """

    device: PartyId
    round: int
    payload: bytes


@dataclass(frozen=True)
class Release:
    """What the cloud receives in one round. To use it again is post-processing and costs nothing.

    Attributes:
        queries: indices of the proxy records that were asked about, int64 ``[query]``.
        answers: float32, ``[device, query, class]`` where the cloud sees each device, or the mean over the
            devices ``[query, class]`` where it sees the sum alone. Under a vote a row of zeros is a query
            without consensus.
        baseline: what the answers are relative to, ``[query, class]``: see `Question.baseline`.
        noise_std: known standard deviation of the noise on each entry of ``answers``.
        devices: who contributed, in the order of ``answers``' first axis where it has one.
    """

    queries: Tensor
    answers: Tensor
    baseline: Tensor
    noise_std: float
    devices: tuple[PartyId, ...]

    @classmethod
    def to(
        cls, question: Question, answers: Tensor, noise_std: float, devices: Sequence[PartyId]
    ) -> "Release":
        """What a channel made of the answers to ``question``."""
        return cls(question.queries, answers, question.baseline, noise_std, tuple(devices))


def dealt(models: Sequence[nn.Module], number: int) -> nn.Module:
    """The one of ``models``, one of each architecture, that falls to the device of this number."""
    return models[number % len(models)]


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    return f"{tuple(plain.shape)} {plain.dtype} ".encode() + plain.numpy().tobytes()
