"""A channel with attempts at a round, as the secure one has, which notes what is encoded."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from privkd.channels.channel import NoisedChannel
from privkd.channels.registry import KINDS, register
from privkd.errors import RefusalError
from privkd.messages import Question, Upload
from privkd.privacy.events import PartyId

KIND = "attempted"
ENCODED: list[tuple[bytes, int, int, bytes]] = []
"""Root, round, attempt and block of each encoding in this process."""


def terms(attempt: int, expires: int = 0) -> bytes:
    """What the cloud says of an attempt."""
    return json.dumps([attempt, expires]).encode()


class AttemptedChannel(NoisedChannel):
    """Other noise for each attempt."""

    attempt = 0

    def accept(self, question: Question, invitation: bytes) -> int:
        """See `Channel.accept`."""
        try:
            self.attempt, expires = json.loads(invitation)
        except (ValueError, TypeError):
            raise RefusalError(400, "malformed terms") from None
        if expires < 0:
            raise RefusalError(409, "expired")
        return self.attempt

    def encode(self, question: Question, block: NDArray[np.float64], device: PartyId) -> Upload:
        """See `Channel.encode`."""
        ENCODED.append((self.root.key, question.round, self.attempt, block.tobytes()))
        integers = self.encoding.encode(block[None])[0]
        return Upload(device, question.round, self.draw(integers, question.round, self.attempt).tobytes())


@contextmanager
def attempted_channel() -> Iterator[None]:
    """Have a kind of channel called `KIND`."""
    kept = dict(KINDS._values), dict(KINDS._makers)
    register(KIND, trust="The cloud sees each device's noised answers.")(AttemptedChannel)
    yield
    KINDS._values, KINDS._makers = kept
