"""What crosses between the cloud and one device, as bytes: a question down, an answer up. No engine's.

A message is a JSON head behind its length, and tensors as safetensors. A question is public. An answer holds
no count, no loss, no spent epsilon and no words of an error: a reason out of `Reason`, the digest of the
device's ledger, and what its channel gives the cloud itself, which has one size for all devices of a run.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, TypeVar

from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors
from torch import Tensor

from privkd.errors import ChannelError
from privkd.privacy.events import PartyId
from privkd.records import Count, Record, faults

PROTOCOL = 1
"""Number of this form. A device refuses any other in words."""
ANSWER_BYTES = 512
"""Size of an answer, but for what its channel gives the cloud."""
MAX_MESSAGE = 1 << 30
_LENGTH = struct.Struct("<I")
Head = TypeVar("Head", bound=Record)
_DIGEST = "^[0-9a-f]{64}$"

RunName = Annotated[str, Field(pattern=_DIGEST)]
"""SHA-256 of the published plan."""


class Reason(StrEnum):
    """Why a device does not answer. There are no others, and no words of its own."""

    PROTOCOL = "protocol"
    """The message is of another version, malformed, or for another device."""
    NOT_AGREED = "not-agreed"
    """The owner has not agreed to the run."""
    ROUND_OVER = "round-over"
    """The round lies behind the last one that was answered, or beyond the plan's."""
    CHANGED = "changed"
    """The round was asked before with other models or queries."""
    QUESTION = "question"
    """Models or queries are not those that the plan allows."""
    TERMS = "terms"
    """The channel's terms are not those that the plan gives."""
    BUDGET = "budget"
    """The owner's budget, for good or for one run, does not allow it."""
    WITNESS = "witness"
    """The ledger that the cloud saw before is ahead of the device's: it was restored from a copy."""
    LATER = "later"
    """The device cannot answer now, and may be asked again: closed hours, an aggregator away, no space."""


class Question(Record):
    """The head of a question to one device.

    Attributes:
        protocol: `PROTOCOL`.
        run: the run's name.
        device: whom it is for.
        round: its number, from 0; one past the plan's last brings the last teacher.
        witness: the digest of the device's ledger that the cloud saw last; ``None`` before the first answer.
    """

    protocol: Count = PROTOCOL
    run: RunName
    device: PartyId
    round: Count
    witness: Annotated[str, Field(max_length=128)] | None = None


class Answer(Record):
    """The head of an answer.

    Attributes:
        protocol: `PROTOCOL`.
        run: as of the question; ``None`` where that could not be read.
        device: who answers.
        round: as of the question.
        refused: why not; ``None`` where it did answer.
        ledger: digest of the device's ledger, for the cloud to keep as a witness; ``None`` where nothing was
            charged.
    """

    protocol: Count = PROTOCOL
    run: RunName | None
    device: PartyId
    round: Count | None
    refused: Reason | None = None
    ledger: Annotated[str, Field(max_length=128)] | None = None


def pack_question(head: Question, tensors: Mapping[str, Tensor], invitation: bytes) -> bytes:
    """A question, with its public ``tensors`` and the channel's ``invitation``."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return _packed(head, invitation, serialise_tensors(plain))


def unpack_question(message: bytes) -> tuple[Question, dict[str, Tensor], bytes]:
    """Head, tensors and invitation of a question.

    Raises:
        ChannelError: it is malformed.
    """
    head, invitation, body = _parts(Question, message)
    try:
        return head, parse_tensors(body), invitation
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ChannelError(f"a question whose tensors are malformed ({error})") from None


def substance(message: bytes) -> str:
    """SHA-256 of what decides a device's answer: run, device, round and tensors.

    Neither the witness nor the terms of an attempt are part of it.
    """
    head, _, body = _parts(Question, message)
    digest = hashlib.sha256(json.dumps([head.run, head.device, head.round]).encode())
    digest.update(body)
    return digest.hexdigest()


def pack_answer(head: Answer, given: bytes = b"") -> bytes:
    """An answer; the head is padded to `ANSWER_BYTES`. ``given`` is what the channel gives the cloud."""
    return _packed(head, b"", given, size=ANSWER_BYTES)


def unpack_answer(message: bytes) -> tuple[Answer, bytes]:
    """Head of an answer, and what the channel gives the cloud.

    Raises:
        ChannelError: it is malformed.
    """
    head, _, given = _parts(Answer, message)
    return head, given


def _packed(head: Record, middle: bytes, body: bytes, size: int = 0) -> bytes:
    text = json.dumps(head.tree(), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    text = text.ljust(size - 2 * _LENGTH.size)
    return b"".join((_LENGTH.pack(len(text)), text, _LENGTH.pack(len(middle)), middle, body))


def _parts(kind: type[Head], message: bytes) -> tuple[Head, bytes, bytes]:
    try:
        text, rest = _cut(message)
        middle, body = _cut(rest)
        return kind.model_validate_json(text), middle, body
    except ValidationError as error:
        raise ChannelError(f"a message whose head is malformed ({faults(error)})") from None
    except (struct.error, ValueError, RecursionError) as error:
        raise ChannelError(f"a malformed message ({error})") from None


def _cut(message: bytes) -> tuple[bytes, bytes]:
    (length,) = _LENGTH.unpack_from(message)
    end = _LENGTH.size + length
    if end > len(message):
        raise ValueError("cut off")
    return message[_LENGTH.size : end], message[end:]
