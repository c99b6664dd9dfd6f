"""How far one round has come at one party: the journal's word, but for who was refused."""

import threading
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from privkd.privacy.events import PartyId
from privkd.secure.spool import RoundSpool


@dataclass
class Standing:
    """One attempt at a round.

    Attributes:
        spool: its terms and uploads.
        opened: whether it takes part in anything.
        closed: digest of the uploads that were held when it stopped taking more.
        agreed: digest of the set over which it is released.
        devices: that set.
        left_out: why the other devices are not in it.
        failure: why nothing will ever be released of it.
        abandoned: whether a next attempt may be made.
        posted: whether this party's share left it.
        pruned: whether the uploads were deleted.
        refused: why uploads were refused, by device.
        lock: held by whoever decides.
    """

    spool: RoundSpool
    opened: bool = False
    closed: str | None = None
    agreed: str | None = None
    devices: list[PartyId] = field(default_factory=list)
    left_out: dict[PartyId, str] = field(default_factory=dict)
    failure: str | None = None
    abandoned: bool = False
    posted: bool = False
    pruned: bool = False
    refused: dict[PartyId, str] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @cached_property
    def roster(self) -> frozenset[PartyId]:
        """The devices that may contribute."""
        return frozenset(self.spool.terms.roster)

    def recall(self, record: dict[str, Any]) -> None:
        """Take up one record of the journal."""
        match record["event"]:
            case "opened":
                self.opened = True
            case "closed":
                self.closed = record["held"]
            case "agreed":
                self.agreed = record["set"]
                self.devices, self.left_out = record["devices"], record["left_out"]
            case "failed":
                self.failure = record["reason"]
            case "abandoned":
                self.abandon()
            case "posted":
                self.posted = True

    def abandon(self) -> None:
        """From here on nothing is ever released of it."""
        self.abandoned = True
        self.failure = f"round {self.spool.terms.folder} was abandoned"

    @property
    def shared(self) -> bool:
        """Whether this party's share was made, so that it may have left."""
        return self.posted or self.spool.share is not None

    @property
    def finished(self) -> bool:
        """Whether the uploads serve nothing but repeating what was done."""
        return self.posted or self.failure is not None

    def absent(self, agreed: set[PartyId]) -> dict[PartyId, str]:
        """Why each device is left out: those on the roster, and strangers who tried."""
        reasons: dict[PartyId, str] = {}
        held = self.spool.held
        for device in (*self.spool.terms.roster, *sorted(self.refused)):
            if device in agreed or device in reasons:
                continue
            default = f"{device}: its upload is missing, or another one, at another aggregator"
            missing = self.refused.get(device, f"{device}: no upload")
            reasons[device] = default if device in held else missing
        return reasons
