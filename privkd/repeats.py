"""A release that is repeated shows the same bytes, or is not made at all.

A round that was charged may be played again after an interruption, under the same noise. Were its answers
other ones, by as little as another order of sums, then two releases would be seen and one was charged for.
"""

import hmac
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from privkd.errors import RunError
from privkd.events import PartyId
from privkd.noise import NoiseRoot


class Notes(Protocol):
    """Where facts are noted once and for good: `store.RunFolder`."""

    def note(self, step: str, **facts: Any) -> Mapping[str, Any]:
        """Note ``facts``, durably; what was noted first under ``step`` is returned."""
        ...


class _Unkept:
    def note(self, step: str, **facts: Any) -> Mapping[str, Any]:
        """See `Notes.note`."""
        return facts


UNKEPT = _Unkept()
"""Notes nothing: for a game that nobody goes on with after an interruption."""


def check_repeats(
    notes: Notes, root: NoiseRoot, round: int, devices: Sequence[PartyId], answers: Tensor
) -> None:
    """Note what ``devices`` are about to answer, or check it where the round was begun before.

    Call it before the answers reach the channel. The digest is HMAC-SHA256 under the run's secret.

    Args:
        notes: of the run.
        root: the run's noise root.
        round: from 0.
        devices: who answers.
        answers: theirs, ``[device, query, class]``.

    Raises:
        RunError: the answers differ from those that were noted.
    """
    digest = hmac.new(root.subkey("answers", round), digestmod="sha256")
    digest.update(repr((tuple(devices), tuple(answers.shape), str(answers.dtype))).encode())
    digest.update(answers.detach().cpu().contiguous().numpy().tobytes())
    threads = str(torch.get_num_threads())
    noted = notes.note(f"answers {round}", hmac=digest.hexdigest(), threads=threads)
    if noted.get("hmac") != digest.hexdigest():
        raise RunError(
            f"the answers of round {round + 1} differ from those of the interrupted release, and a second "
            "one was not charged for: nothing was released; resume on the same machine, with the same "
            f"libraries and number of threads (OMP_NUM_THREADS={noted.get('threads')}; now {threads})"
        )
