"""What the cloud publishes when it opens a round, what that costs, and what each party makes of it.

**The noise's source.** ``aggregators`` (default): each adds a discrete Gaussian of variance ``sigma^2``.
Price: exactly ``rho = C^2 / (2 sigma^2)`` per device, against the cloud and all other aggregators together.
Trust: one aggregator that keeps its noise key and its shares to itself. Cost: a standard deviation
``sqrt(K)`` as high.

``devices``: each adds one of variance ``sigma^2 / n_min``. The sum of discrete Gaussians is not quite one:
its price is that of Kairouz, Liu and Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated
Learning with Secure Aggregation", Proposition 14. Trust: ``n_min`` of the devices in the sum add their noise
and keep it to themselves, and one aggregator keeps its shares, as without it the others see each device's
answers under a ``n_min``-th of the noise only. Cost: where more than ``n_min`` devices contribute, more noise
than needed.

**Partial results.** Of a sum: the agreed set's digest, then a party's noisy share ``[entry]`` in Z_2^32. Of a
vote: the digest, then the session in which it was made, then a share of one bit an entry. Shares of a sum are
functions of the set and may be made apart; those of a vote fit together only if one session made them.

**Totals.** A cloud that departs from the protocol can ask the same device round after round, each time at a
price that a single round may have. So an aggregator with a ``max_rho_total`` adds up, for each device by its
name, the rho of every attempt at a round of which it makes a share: zCDP composes additively, also where a
round is chosen after the ones before were seen (Bun and Steinke 2016). A round without noise counts as
infinite. The totals are of what is public: who took part in which round, and under how much noise. The
journal keeps them, also of rounds that it forgot.

Neighbouring relation of all prices: zero out one device's whole contribution, in every round, the number of
devices public.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Annotated, Any, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from privkd.errors import ChannelError, ConfigError
from privkd.privacy.events import PartyId
from privkd.privacy.noise import MAX_SIGMA2, NoiseRoot, discrete_gaussian
from privkd.privacy.votes import vote_rho
from privkd.secure.normcheck import MAX_PROJECTIONS
from privkd.secure.shares import reconstruct

MAX_ROUND = 2**64 - 1
MAX_DEVICE_NAME = 256
_MAX_ENTRIES = 1 << 26
_MAX_BOUND = 1 << 31
MAX_CHECKED_BOUND = 1 << 22
MAX_ATTEMPTS = 1000
_VOTE_RANGE = 1 << 30
_TAIL = 12
_GRAINS = 1 << 64
ROUNDING = Fraction(1 + 2**-40)
"""How far rho may lie above a limit: both are often made of floats, and a fitting price should fit."""
_MARGIN = Fraction(1 + 2.0**-30)
_DIGEST, _WORD = 32, 4


Whole: TypeAlias = Annotated[int, Field(strict=True)]
"""An integer, and neither a truth value nor text."""


class _Terms(BaseModel):
    """Frozen, and an unknown key is an error. Devices and workers load no settings of a run for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class VoteTerms(_Terms):
    """A vote in place of a sum: Confident-GNMax; see ``privkd.privacy.votes``.

    Attributes:
        classes: each device's block is ``[query, class]``, one-hot in every row.
        threshold: fewest votes for one class, before noise, that make a consensus.
        threshold_sigma2: variance of each aggregator's noise on the comparison with ``threshold``, as
            ``"p/q"``; none for no noise. That on the votes themselves is the round's ``sigma2``.
    """

    classes: Annotated[Whole, Field(ge=2)]
    threshold: Annotated[Whole, Field(ge=0, lt=_VOTE_RANGE)]
    threshold_sigma2: str | None

    @field_validator("threshold_sigma2")
    @classmethod
    def _a_variance(cls, sigma2: str | None) -> str | None:
        return checked_variance(sigma2)

    @property
    def variance(self) -> Fraction | None:
        """``threshold_sigma2`` as a number."""
        return None if self.threshold_sigma2 is None else Fraction(self.threshold_sigma2)


class RoundTerms(_Terms):
    """The public parameters of one round.

    Attributes:
        round: names the round; never used for two.
        run: 64 hexadecimal digits that name the run, under which devices derive their sealing keys; empty
            in a simulation, whose devices' secrets are of one run anyway.
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

    round: Annotated[Whole, Field(ge=0, le=MAX_ROUND)]
    run: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    attempt: Annotated[Whole, Field(ge=0, lt=MAX_ATTEMPTS)] = 0
    keys: Annotated[tuple[str, ...], Field(min_length=2)]
    entries: Annotated[Whole, Field(ge=1, le=_MAX_ENTRIES)]
    minimum: Annotated[Whole, Field(ge=1)]
    fraction_bits: Whole
    bound: Annotated[Whole, Field(ge=1, le=_MAX_BOUND)]
    sigma2: str | None
    noise: Literal["aggregators", "devices"] = "aggregators"
    roster: Annotated[tuple[PartyId, ...], Field(min_length=1)]
    expires: Annotated[Whole, Field(ge=0, lt=2**63)]
    projections: Annotated[Whole, Field(ge=0, le=MAX_PROJECTIONS)] = 0
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
        """The 64 bits by which envelopes, uploads and journals know this attempt at the round."""
        return attempt_label(self.round, self.attempt)

    @property
    def folder(self) -> str:
        """``label``, safe in paths and addresses."""
        return f"{self.label:016x}"

    def pack(self) -> bytes:
        """As JSON, equal for equal terms."""
        return _packed(self)

    def substance(self) -> bytes:
        """``pack`` of what decides the sum and its noise: neither the keys nor when the round expires."""
        return _substance(self)

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


# Kept for a few terms, as a process that plays all devices asks for them once a device.
@lru_cache(maxsize=8)
def _packed(terms: RoundTerms) -> bytes:
    return json.dumps(terms.model_dump(), sort_keys=True, separators=(",", ":")).encode()


@lru_cache(maxsize=8)
def _substance(terms: RoundTerms) -> bytes:
    fields = terms.model_dump(exclude={"keys", "expires"}) | {"parties": len(terms.keys)}
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


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


def distributed_rho(sensitivity: float, variance: Fraction, summands: int, entries: int) -> float:
    """The rho of zCDP of a sum of ``summands`` discrete Gaussians of ``variance``, on ``entries`` integers.

    With ``s^2`` the variance, ``n`` the summands, ``d`` the entries, ``S = sqrt(n) s`` and
    ``tau = 10 sum_{k=1}^{n-1} exp(-2 pi^2 s^2 k / (k + 1))``, Proposition 14 bounds the Renyi divergence of
    order alpha by ``alpha`` times either of

        (D2^2 / S^2 + 2 D1 tau / S + tau^2 d) / 2      and      (D2 / S + sqrt(d) tau)^2 / 2

    whose smaller one is therefore rho. ``D1 <= D2^2``, as the entries are integers, and ``<= sqrt(d) D2``.

    Args:
        sensitivity: in L2, an integer bound on one device's block: ``D2``.
        variance: parameter of each summand.
        summands: honest ones; others only add.
        entries: of a block.
    """
    s2, d2 = float(variance), float(sensitivity)
    spread = math.sqrt(summands * s2)
    tau = _tau(s2, summands)
    d1 = min(d2 * d2, math.sqrt(entries) * d2)
    second = d2 * d2 / (spread * spread) + 2 * d1 * tau / spread + tau * tau * entries
    third = (d2 / spread + math.sqrt(entries) * tau) ** 2
    return min(second, third) / 2


def _tau(s2: float, summands: int) -> float:
    # The terms fall with k, so from the thousandth on they are bounded by its value.
    exact = min(summands - 1, 1000)
    terms = math.fsum(math.exp(-2 * math.pi**2 * s2 * k / (k + 1)) for k in range(1, exact + 1))
    rest = max(0, summands - 1 - exact) * math.exp(-2 * math.pi**2 * s2 * 1000 / 1001)
    return 10 * (terms + rest)


def distributed_variance(bound: int, rho: float, minimum: int) -> Fraction:
    """``sigma^2`` of which each device adds a ``minimum``-th, such that the sum is ``rho``-zCDP.

    Raises:
        ConfigError: the noise is out of the sampler's range, or each device's part of it so small that
            the sum is too far from a discrete Gaussian.
    """
    total = Fraction(bound * bound) / (2 * Fraction(rho)) * _MARGIN
    if total > MAX_SIGMA2:
        raise ConfigError(
            f"rho={rho:g}: too small, the noise would drown every answer; raise the device budget"
        )
    if distributed_rho(bound, total / minimum, minimum, _MAX_ENTRIES) > rho:
        raise ConfigError(
            f"rho={rho:g} over {minimum} devices: each would add too little noise for the sum to be priced; "
            "lower the device budget or the minimum, or let the aggregators add the noise"
        )
    return total


def party_noise(
    root: NoiseRoot, purpose: str, round: int, digest: bytes, variance: Fraction | None, count: int
) -> NDArray[np.int64] | None:
    """What the party whose key is ``root`` adds for one ``purpose`` to a round's agreed set, ``[count]``.

    A function of its arguments: a re-run over the same set repeats it. ``None`` without a ``variance``.
    """
    if variance is None:
        return None
    return discrete_gaussian(variance, count, root.stream(purpose, round, digest))


def partial_sum(digest: bytes, share: NDArray[np.uint32]) -> bytes:
    """The partial result of a sum: a party's ``share`` ``[entry]``."""
    return digest + share.astype("<u4", copy=False).tobytes()


def partial_vote(digest: bytes, session: str, share: NDArray[np.bool_]) -> bytes:
    """The partial result of a vote: a party's ``share``, bits of any shape."""
    return digest + session_mark(session) + np.packbits(share).tobytes()


def session_mark(session: str) -> bytes:
    """The 32 bytes that stand for a session."""
    return hashlib.sha256(session.encode()).digest()


def lease_of(session: str) -> str:
    """Whose a session is: its name up to the first ``-``. Sessions of one lease take each other's place."""
    return session.partition("-")[0]


def agreed_in(partial: bytes) -> str:
    """The digest of the set that a partial result is over, in hexadecimal."""
    return partial[:_DIGEST].hex()


def made_in(partial: bytes) -> str:
    """The mark of the session that made the partial result of a vote, in hexadecimal."""
    return partial[_DIGEST : 2 * _DIGEST].hex()


def combine(terms: RoundTerms, partials: Sequence[bytes]) -> NDArray[np.int64]:
    """What the aggregators' partial results come to: the noisy sum, or the vote's one-hot rows, ``[entry]``.

    A row of a vote is zero where there was no consensus.

    Raises:
        ChannelError: they are not of one set, one session, or the round's size.
    """
    head = _DIGEST if terms.votes is None else 2 * _DIGEST
    size = _WORD * terms.entries if terms.votes is None else -(-terms.entries // 8)
    if len({part[:head] for part in partials}) != 1 or any(len(part) != head + size for part in partials):
        raise ChannelError("the aggregators' shares are not of one set; nothing was released")
    if terms.votes is None:
        return reconstruct([np.frombuffer(part[head:], "<u4").astype(np.uint32) for part in partials])
    shares = np.stack([np.frombuffer(part[head:], np.uint8) for part in partials])
    bits = np.unpackbits(np.bitwise_xor.reduce(shares, axis=0))
    return bits[: terms.entries].astype(np.int64)


class DeviceTotals:
    """The devices' totals at one aggregator, in rho of zCDP. For one thread at a time.

    Attributes:
        limit: the most for each device; ``None`` for no limit.
    """

    def __init__(self, limit: float | None) -> None:
        """Nothing is charged yet."""
        self.limit = limit
        # In whole grains, each price rounded up: fractions would grow with every round.
        self._spent: Counter[PartyId] = Counter()
        self._without_noise: Counter[PartyId] = Counter()
        self._charged: dict[int, tuple[tuple[PartyId, ...], Fraction | None]] = {}
        # Of rounds that were forgotten; part of the above.
        self._forgotten: tuple[Counter[PartyId], Counter[PartyId]] = Counter(), Counter()

    @classmethod
    def recalled(cls, limit: float | None, records: Iterable[dict[str, Any]]) -> Self:
        """The totals that a party's journal comes to, whatever its limit was when it was written."""
        totals = cls(limit)
        prices: dict[int, Fraction | None] = {}
        for record in records:
            if record["event"] == "compacted":
                totals._take(record)
                continue
            label = int(record["round"], 16)
            match record["event"]:
                case "opened":
                    prices[label] = RoundTerms.model_validate(record["terms"]).rho
                case "agreed":
                    totals.charge(label, record["devices"], prices.get(label))
                case "abandoned":
                    totals.refund(label)
        return totals

    def beyond(self, devices: Iterable[PartyId], rho: Fraction | None) -> list[PartyId]:
        """Those of ``devices`` whose totals would exceed the limit with ``rho`` more; ``None``: no noise."""
        if self.limit is None:
            return []
        if rho is None:
            return list(devices)
        most = math.floor(Fraction(self.limit) * ROUNDING * _GRAINS) - _grains(rho)
        return [device for device in devices if self._without_noise[device] or self._spent[device] > most]

    def charge(self, label: int, devices: Sequence[PartyId], rho: Fraction | None) -> None:
        """Charge ``devices`` for the attempt ``label`` at a round: once, however often it is repeated."""
        if label not in self._charged:
            self._charged[label] = tuple(devices), rho
            self._add(devices, rho, 1)

    def refund(self, label: int) -> None:
        """Take back what an attempt cost, which was abandoned, so that no share was or will be made of it."""
        if label in self._charged:
            devices, rho = self._charged.pop(label)
            self._add(devices, rho, -1)

    def forgotten(self, labels: Collection[int]) -> dict[str, Any]:
        """A record, for `recalled`, of what these attempts cost and those that were forgotten before."""
        spent, without_noise = (counter.copy() for counter in self._forgotten)
        for label in labels:
            devices, rho = self._charged.get(label, ((), None))
            for device in devices:
                if rho is None:
                    without_noise[device] += 1
                else:
                    spent[device] += _grains(rho)
        return {"event": "compacted", "spent": dict(spent), "without_noise": dict(without_noise)}

    def forget(self, labels: Collection[int]) -> None:
        """Keep what these attempts cost, but not which they were: they are over for good."""
        record = self.forgotten(labels)
        self._forgotten = Counter(record["spent"]), Counter(record["without_noise"])
        for label in labels:
            self._charged.pop(label, None)

    def _take(self, record: dict[str, Any]) -> None:
        for name, forgotten, total in (
            ("spent", self._forgotten[0], self._spent),
            ("without_noise", self._forgotten[1], self._without_noise),
        ):
            forgotten.update(record[name])
            total.update(record[name])

    def _add(self, devices: Sequence[PartyId], rho: Fraction | None, sign: int) -> None:
        for device in devices:
            if rho is None:
                self._without_noise[device] += sign
            else:
                self._spent[device] += sign * _grains(rho)


def _grains(rho: Fraction) -> int:
    return math.ceil(rho * _GRAINS)
