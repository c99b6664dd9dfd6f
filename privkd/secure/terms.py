"""What the cloud publishes when it opens a round, and how the parties name what they agreed on."""

import hashlib
import json
import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from privkd.config import Settings
from privkd.errors import ChannelError
from privkd.privacy.events import PartyId
from privkd.privacy.noise import MAX_SIGMA2
from privkd.privacy.votes import vote_rho
from privkd.secure.normcheck import MAX_PROJECTIONS

MAX_ROUND = 2**64 - 1
MAX_DEVICE_NAME = 256
_MAX_ENTRIES = 1 << 26
_MAX_BOUND = 1 << 31
MAX_CHECKED_BOUND = 1 << 22
MAX_ATTEMPTS = 1000
_VOTE_RANGE = 1 << 30
_TAIL = 12


class VoteTerms(Settings):
    """A vote in place of a sum: Confident-GNMax; see ``privkd.privacy.votes``.

    Attributes:
        classes: each device's block is ``[query, class]``, one-hot in every row.
        threshold: fewest votes for one class, before noise, that make a consensus.
        threshold_sigma2: variance of each aggregator's noise on the comparison with ``threshold``, as
            ``"p/q"``; none for no noise. That on the votes themselves is the round's ``sigma2``.
    """

    classes: Annotated[int, Field(ge=2)]
    threshold: Annotated[int, Field(ge=0, lt=_VOTE_RANGE)]
    threshold_sigma2: str | None

    @field_validator("threshold_sigma2")
    @classmethod
    def _a_variance(cls, sigma2: str | None) -> str | None:
        return checked_variance(sigma2)

    @property
    def variance(self) -> Fraction | None:
        """``threshold_sigma2`` as a number."""
        return None if self.threshold_sigma2 is None else Fraction(self.threshold_sigma2)


class RoundTerms(Settings):
    """The public parameters of one round.

    Attributes:
        round: names the round; never used for two.
        attempt: 0, and one more each time that a round comes to nothing and is abandoned by all aggregators.
        keys: the aggregators' X25519 public keys in hexadecimal, by rank.
        entries: length of each device's block.
        minimum: fewest devices over which the sum may be released.
        fraction_bits: see ``FixedPoint``.
        bound: see ``FixedPoint``: the integer L2 clip norm.
        sigma2: variance of the noise, as ``"p/q"``; none for no noise.
        noise: who adds it: each of the ``aggregators`` all of it, or each of the ``devices`` a
            ``minimum``-th of it.
        roster: the devices that may contribute.
        expires: Unix time in seconds after which neither uploads nor a first closing are accepted.
        projections: random projections of the norm check; 0 for no check.
        votes: what is released in place of the sum, if anything.
        ring_bits: logarithm of the ring's size.
    """

    round: Annotated[int, Field(ge=0, le=MAX_ROUND)]
    attempt: Annotated[int, Field(ge=0, lt=MAX_ATTEMPTS)] = 0
    keys: Annotated[tuple[str, ...], Field(min_length=2)]
    entries: Annotated[int, Field(ge=1, le=_MAX_ENTRIES)]
    minimum: Annotated[int, Field(ge=1)]
    fraction_bits: int
    bound: Annotated[int, Field(ge=1, le=_MAX_BOUND)]
    sigma2: str | None
    noise: Literal["aggregators", "devices"] = "aggregators"
    roster: Annotated[tuple[PartyId, ...], Field(min_length=1)]
    expires: int
    projections: Annotated[int, Field(ge=0, le=MAX_PROJECTIONS)] = 0
    votes: VoteTerms | None = None
    ring_bits: Literal[32] = 32

    @field_validator("sigma2")
    @classmethod
    def _a_variance(cls, sigma2: str | None) -> str | None:
        return checked_variance(sigma2)

    @model_validator(mode="after")
    def _a_roster(self) -> Self:
        if len(set(self.roster)) != len(self.roster):
            raise ValueError("a device is on the roster twice")
        if self.projections and (self.noise == "devices" or self.bound > MAX_CHECKED_BOUND):
            raise ValueError("the norm check needs noise by the aggregators and a bound of at most 2^22")
        if self.votes is not None:
            self._check_votes(self.votes)
        if not all(0 < len(device.encode()) <= MAX_DEVICE_NAME for device in self.roster):
            raise ValueError(f"a device's name is empty or longer than {MAX_DEVICE_NAME} bytes")
        return self

    def _check_votes(self, votes: VoteTerms) -> None:
        if self.entries % votes.classes:
            raise ValueError(f"votes: {self.entries} entries are no whole number of rows of {votes.classes}")
        if self.noise == "devices" or self.fraction_bits != 0:
            raise ValueError("votes are whole numbers, with noise by the aggregators")
        if (self.sigma2 is None) != (votes.threshold_sigma2 is None):
            raise ValueError("votes need noise on both the votes and the threshold, or on neither")
        largest = max(self.total, votes.variance or Fraction(0))
        if len(self.roster) + _TAIL * math.sqrt(len(self.keys) * largest) >= _VOTE_RANGE:
            raise ValueError("votes: the noise would overflow the ring; raise the device budget")

    @property
    def variance(self) -> Fraction | None:
        """What each aggregator draws its noise with; none where it adds none."""
        return None if self.sigma2 is None or self.noise == "devices" else Fraction(self.sigma2)

    @property
    def device_variance(self) -> Fraction | None:
        """What each device draws its noise with; none where it adds none."""
        return None if self.sigma2 is None or self.noise == "aggregators" else self.total / self.minimum

    @property
    def total(self) -> Fraction:
        """``sigma2`` as a number, 0 for none."""
        return Fraction(self.sigma2 or 0)

    @property
    def rho(self) -> Fraction | None:
        """Price of the release to each device in zCDP, per honest aggregator; none without noise."""
        if not self.total:
            return None
        if self.votes is None or self.votes.variance is None:
            return Fraction(self.bound**2) / (2 * self.total)
        return vote_rho(self.entries // self.votes.classes, self.votes.variance, self.total)

    @property
    def needs_third_party(self) -> bool:
        """Whether the aggregators need correlated randomness."""
        return self.projections > 0 or self.votes is not None

    @property
    def label(self) -> int:
        """The 64 bits by which envelopes, spools and journals know this attempt at the round."""
        return attempt_label(self.round, self.attempt)

    @property
    def folder(self) -> str:
        """``label``, safe in paths and addresses."""
        return f"{self.label:016x}"

    def pack(self) -> bytes:
        """As JSON, equal for equal terms."""
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":")).encode()

    def substance(self) -> bytes:
        """``pack`` of what decides the sum and its noise: neither the keys nor when the round expires."""
        fields = self.model_dump(exclude={"keys", "expires"}) | {"parties": len(self.keys)}
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """From ``pack``.

        Raises:
            ChannelError: malformed or out of range.
        """
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(step) for step in first["loc"])
            raise ChannelError(f"terms of a round: {where}: {first['msg']}") from None


def attempt_label(round: int, attempt: int) -> int:
    """The label of one attempt at a round: ``round`` itself for the first."""
    if attempt == 0:
        return round
    digest = hashlib.sha256(b"privkd attempt" + round.to_bytes(8, "big") + attempt.to_bytes(8, "big"))
    return int.from_bytes(digest.digest()[:8], "big")


def checked_variance(sigma2: str | None) -> str | None:
    """``sigma2``. Raises ``ValueError`` if it is no variance that can be drawn with."""
    try:
        possible = sigma2 is None or 0 < Fraction(sigma2) <= MAX_SIGMA2
    except (ValueError, ZeroDivisionError):
        possible = False
    if not possible:
        raise ValueError("expected a fraction above 0, at most 2^72")
    return sigma2


def set_digest(terms: RoundTerms, identifiers: Iterable[bytes]) -> bytes:
    """SHA-256 of the substance of a round's terms and of uploads' identifiers, in any order."""
    digest = hashlib.sha256(terms.substance())
    for identifier in sorted(identifiers):
        digest.update(identifier)
    return digest.digest()
