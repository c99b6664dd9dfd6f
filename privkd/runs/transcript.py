"""All that crossed a wire, and what each adversary sees of it."""

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor, nn

from privkd.errors import InputError
from privkd.privacy.events import PartyId


class Adversary(StrEnum):
    """Who looks at a run."""

    CLOUD = "cloud"
    LATER_USER = "later_user"


@dataclass(frozen=True)
class Exchange:
    """One round on the wire.

    Attributes:
        round: its number, from 0.
        teacher: the model that the cloud published to the devices.
        queries: indices of the proxy records that the students answered, int64 ``[query]``.
        devices: who contributed.
        answers: what the cloud received: ``[device, query, class]`` where it sees each device, else the
            mean ``[query, class]``.
        noise_std: known standard deviation of the noise on each entry of ``answers``.
    """

    round: int
    teacher: nn.Module
    queries: Tensor
    devices: tuple[PartyId, ...]
    answers: Tensor
    noise_std: float

    @property
    def name(self) -> str:
        """The view that these answers give the cloud."""
        return "per_client_logits" if self.answers.ndim == 3 else "secure_sum"


@dataclass(frozen=True)
class Transcript:
    """Every exchange of a run, in order, and the teacher that came of them."""

    exchanges: tuple[Exchange, ...]
    final_teacher: nn.Module


@dataclass(frozen=True)
class View:
    """What one adversary sees: ``teachers`` in the order of their publication, and ``exchanges``, empty
    for those who see models alone. ``name`` is the threat view that a report states."""

    name: str
    teachers: tuple[nn.Module, ...]
    exchanges: tuple[Exchange, ...]


def view(transcript: Transcript, adversary: Adversary) -> View:
    """What ``adversary`` sees of a run; the public inputs are part of every view.

    Raises:
        InputError: nothing crossed a wire.
    """
    if not transcript.exchanges:
        raise InputError("the run has no finished round: there is nothing to see")
    teachers = (*(exchange.teacher for exchange in transcript.exchanges), transcript.final_teacher)
    if adversary is Adversary.LATER_USER:
        return View("teacher", teachers, ())
    return View(transcript.exchanges[0].name, teachers, transcript.exchanges)
