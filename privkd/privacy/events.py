"""What happened to private data, as frozen facts. What it costs is the ledger's business.

Each event names the mechanism's public parameters and nothing secret. Neighbouring relations:

* ``Unit.RECORD``: add or remove one record of one device (Poisson-sampled DP-SGD).
* ``Unit.DEVICE``: zero out one device's whole contribution; the number of devices is public.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

PartyId: TypeAlias = str
"""Names who is protected: a device such as ``device-0003``."""


class Unit(StrEnum):
    """The unit of privacy. Epsilons of different units are never added."""

    RECORD = "record"
    DEVICE = "device"

    @property
    def neighbouring_relation(self) -> str:
        """The neighbouring relation in words, as every report states it."""
        if self is Unit.RECORD:
            return "add or remove one record of one device"
        return "zero out one device's whole contribution (number of devices public)"


@dataclass(frozen=True)
class DpSgd:
    """``steps`` Poisson-subsampled Gaussian mechanisms (Abadi et al. 2016, Algorithm 1).

    ``noise_multiplier`` is the noise's standard deviation over the per-example clip norm;
    ``sampling_rate`` the probability with which each record joins a step.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int


@dataclass(frozen=True)
class ZCdp:
    """A mechanism that is ``rho``-zCDP, such as the discrete Gaussian with
    ``rho = sensitivity^2 / (2 sigma^2)`` (Canonne, Kamath, Steinke 2020, Theorem 4)."""

    rho: float


@dataclass(frozen=True)
class PostProcessing:
    """A function of what was already charged; costs nothing more. ``of`` says of what."""

    of: str


@dataclass(frozen=True)
class NoPrivacy:
    """A release without any guarantee: epsilon is infinite, never zero."""

    reason: str


PrivacyEvent: TypeAlias = DpSgd | ZCdp | PostProcessing | NoPrivacy
