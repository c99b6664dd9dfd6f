"""The secure channel through services: running ones by their addresses, or a local group of its own."""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privkd.channels.channel import Channel, contributions, noise_variance
from privkd.errors import ChannelError, ConfigError
from privkd.messages import Question, Release
from privkd.privacy.events import NoPrivacy, PartyId, PrivacyEvent, ZCdp
from privkd.privacy.noise import NoiseRoot
from privkd.privacy.votes import VoteRule
from privkd.secure.channel import checked_parties
from privkd.secure.cloud import PartyGroup, Total
from privkd.secure.device import prepare, relay
from privkd.secure.endpoint import ClientTls, RefusedError
from privkd.secure.fixedpoint import FixedPoint
from privkd.secure.local import LocalParties
from privkd.secure.parties import party_key
from privkd.secure.posts import service_noise
from privkd.secure.shares import fitting_encoding
from privkd.secure.splits import distributed_variance
from privkd.secure.terms import RoundTerms, VoteTerms

_LIFETIME = 86_400


@dataclass(frozen=True)
class ServiceOptions:
    """Which services, and how rounds are held with them.

    Attributes:
        urls: of the aggregators, and of the third party if there is one; none starts a local group.
        ca: the authority whose certificates the services show; ``None`` for the system's.
        certificate: the cloud's own, where the services ask for one.
        key: of ``certificate``.
        pins: the aggregators' public keys by rank, in hexadecimal; none believes what they say.
        run: names the run, so that its rounds are never taken for those of another.
        roster: the devices that may contribute to a round; none for those that do.
        minimum: fewest devices over which a sum is released; ``None`` for all of the roster.
        noise: who adds the noise; see ``privkd.secure.splits``.
        projections: of the norm check (``privkd.secure.normcheck``), which needs a third party; 0 for none.
        votes: by which rule to hold a vote (``privkd.privacy.votes``), with a third party; else a mean.
        lifetime: seconds that a round waits for its devices; one interrupted for longer is attempted again.
    """

    urls: tuple[str, ...] = ()
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    pins: tuple[str, ...] = ()
    run: bytes = b""
    roster: tuple[PartyId, ...] = ()
    minimum: int | None = None
    noise: Literal["aggregators", "devices"] = "aggregators"
    projections: int = 0
    votes: VoteRule | None = None
    lifetime: int = _LIFETIME

    @property
    def tls(self) -> ClientTls | None:
        """What to trust and to show."""
        return None if self.ca is None else ClientTls(self.ca, self.certificate, self.key)


@dataclass(frozen=True)
class _Request:
    """What is asked of the parties in a round, beside its name and its devices."""

    entries: int
    encoding: FixedPoint
    sigma2: Fraction | None
    minimum: int
    votes: VoteTerms | None = None


class ServiceChannel(Channel):
    """Secret sharing among parties that run as services; the cloud sees the noisy sum alone.

    With ``votes`` in its options it sees less: which class won on each query, where there is a consensus.

    This process plays the cloud and all devices, so it opens the rounds, uploads for every device that
    answers, and adds what the parties post. The release is over the devices that all parties hold, and never
    over fewer than the minimum; neither the noise nor the terms of a round depend on who falls silent.
    Without addresses it starts a group of services on this machine, whose noise then comes from ``root``, and
    ends them with the channel. Running services have noise keys of their own.

    A repeated release of a round is bit-identical: the parties keep what they agreed on, and refuse another
    set. For the trust model see ``privkd.secure.splits``.
    """

    def __init__(
        self,
        clip_norm: float,
        rho: float | None,
        root: NoiseRoot,
        options: ServiceOptions,
        *,
        aggregators: int = 2,
        deadline: float = 120.0,
    ) -> None:
        """Check the settings; nothing is started or sent.

        Args:
            clip_norm: L2 bound on each device's whole ``[query, class]`` block.
            rho: price of one release to each device; ``None`` for no noise.
            root: where the devices' randomness comes from, and that of local parties.
            options: see there.
            aggregators: how many there are.
            deadline: seconds a release may take, restarts of workers included.

        Raises:
            ConfigError: a setting is out of range, or CrypTen is needed here and not installed.
        """
        super().__init__(clip_norm, rho)
        checked_parties(clip_norm, rho, aggregators, deadline=deadline, local=not options.urls)
        if options.noise == "devices" and (options.projections or options.votes):
            what = "norm_projections" if options.projections else "aggregation: votes"
            raise ConfigError(f"{what}: the devices' noise would spoil it; take the aggregators'")
        if options.votes is not None and (options.votes.rho is None) != (rho is None):
            raise ConfigError(f"rho={rho}: not that of the votes' rule, {options.votes.rho}")
        if options.votes is not None and rho is not None and (options.votes.rho or 0) > rho:
            raise ConfigError(f"rho={rho}: less than the votes' rule costs")
        if options.minimum is not None and options.minimum < 1:
            raise ConfigError(f"minimum_devices={options.minimum}: expected at least 1")
        self.aggregators = aggregators
        self._root = root
        self._options = options
        self._deadline = deadline
        self._group: PartyGroup | None = None
        self._local: LocalParties | None = None
        self._last: tuple[Total, _Request] | None = None
        if options.urls:
            PartyGroup(options.urls, options.tls, pins=options.pins).disconnect()

    @property
    def event(self) -> PrivacyEvent:
        """``rho``-zCDP, or no guarantee without noise."""
        if self.rho is None:
            what = "sum of all devices" if self._options.votes is None else "consensus of all devices"
            return NoPrivacy(f"secure aggregation without noise: the exact {what} is revealed")
        return ZCdp(self.rho)

    def start(self) -> None:
        """Start local services, or have running ones start their workers, without waiting for these."""
        self._started()

    def _started(self) -> PartyGroup:
        if self._group is not None:
            return self._group
        urls, tls = self._options.urls, self._options.tls
        if not urls:
            third_party = self._needs_third_party
            members = range(self.aggregators + third_party)
            keys = tuple(party_key(self._root, rank) for rank in members)
            limits = {"step_seconds": self._deadline, "minimum_devices": 1}
            self._local = LocalParties(
                self.aggregators, third_party=third_party, limits=limits, noise_keys=keys
            )
            urls, tls = self._local.urls, self._local.client_tls
        group = self._group = PartyGroup(urls, tls, pins=self._options.pins)
        deadline = time.monotonic() + self._deadline
        found = len(group.keys(deadline))
        if found != self.aggregators:
            raise ConfigError(f"aggregators={self.aggregators}, but the services are a group of {found}")
        if self._needs_third_party and not group.third_party:
            raise ConfigError("votes and norm checks need a third party, and the services have none: "
                              "`privkd keys --third-party` makes one")  # fmt: skip
        group.gather(deadline)
        return group

    @property
    def _needs_third_party(self) -> bool:
        return self._options.projections > 0 or self._options.votes is not None

    def for_audit(self) -> "ServiceChannel":
        """See `Channel.for_audit`: the same services, asked for rounds of another name and any roster.

        Not to be closed; it ends with this one.
        """
        options = replace(self._options, run=self._options.run + b" audit", roster=(), minimum=None)
        twin = ServiceChannel(
            self.clip_norm,
            self.rho,
            self._root,
            options,
            aggregators=self.aggregators,
            deadline=self._deadline,
        )
        twin._group = self._started()
        return twin

    @property
    def unknown_noise(self) -> float:
        """See `Channel.unknown_noise`: running services keep their keys to themselves."""
        return float(self.aggregators) if self._options.urls else 1.0

    def colluders_noise(self) -> NDArray[np.float64]:
        """See `Channel.colluders_noise`."""
        if self._last is None or self._options.urls:
            return np.zeros(1)
        total, request = self._last
        told = np.zeros(request.entries)
        for rank in range(1, self.aggregators):
            root = NoiseRoot(party_key(self._root, rank))
            noise = service_noise(root, "service", total.round, total.agreed, request.sigma2, request.entries)
            told += 0 if noise is None else noise
        return np.ldexp(told, -request.encoding.fraction_bits) / len(total.devices)

    def close(self) -> None:
        """End the local services; running ones go on. Idempotent."""
        if self._group is not None:
            self._group.disconnect()
            self._group = None
        if self._local is not None:
            self._local.stop()
            self._local = None

    def carry(self, question: Question, answers: Tensor, devices: Sequence[PartyId]) -> Release:
        """Send what the devices' blocks of ``answers`` come to to the cloud; see ``Channel.carry``.

        ``Release.devices`` are those over which the parties agreed. The answers of a vote are one-hot rows
        without noise; a row of zeros is a query without consensus.
        """
        blocks = contributions(answers, devices, question.round)
        roster = self._options.roster or tuple(devices)
        minimum = self._minimum(roster, devices)
        request = self._request(blocks.reshape(answers.shape), len(roster), minimum)
        try:
            group = self._started()
            total = self._aggregate(
                group, blocks, devices, self._terms(group, roster, question.round, request)
            )
        except BaseException:
            self.close()
            raise
        self._last = (total, request)
        if request.votes is not None:
            outcome, noise_std = total.integers.astype(np.float64), 0.0
        else:
            outcome = request.encoding.decode(total.integers) / len(total.devices)
            noise_std = self._noise_std(request, len(total.devices))
        return Release.to(
            question,
            torch.from_numpy(outcome.astype(np.float32)).reshape(answers.shape[1:]),
            noise_std,
            total.devices,
        )

    def _request(self, answers: NDArray[np.float64], roster: int, minimum: int) -> _Request:
        _, queries, classes = answers.shape
        rule = self._options.votes
        if rule is not None:
            _check_votes(answers, rule)
            bound = math.isqrt(queries - 1) + 1
            votes = VoteTerms(
                classes=classes, threshold=rule.threshold, threshold_sigma2=_spelt(rule.threshold_sigma2)
            )
            return _Request(queries * classes, FixedPoint(0, bound), rule.sigma2, minimum, votes)
        draws = self.aggregators if self._options.noise == "aggregators" else -(-roster // minimum)
        encoding = fitting_encoding(self.clip_norm, devices=roster, parties=draws, rho=self.rho)
        return _Request(queries * classes, encoding, self._sigma2(encoding, minimum), minimum)

    def _minimum(self, roster: Sequence[PartyId], devices: Sequence[PartyId]) -> int:
        strangers = set(devices).difference(roster)
        if strangers:
            raise ChannelError(f"{min(strangers)} is not on the roster; nothing was released")
        minimum = self._options.minimum or len(roster)
        if minimum > len(devices):
            few = f"{len(devices)} devices, fewer than minimum_devices={minimum}"
            raise ChannelError(f"{few}; nothing was released")
        return minimum

    def _sigma2(self, encoding: FixedPoint, minimum: int) -> Fraction | None:
        if self.rho is None:
            return None
        if self._options.noise == "devices":
            return distributed_variance(encoding.bound, self.rho, minimum)
        return noise_variance(encoding.bound, self.rho)

    def _noise_std(self, request: _Request, devices: int) -> float:
        if request.sigma2 is None:
            return 0.0
        by_aggregators = self._options.noise == "aggregators"
        draws = self.aggregators if by_aggregators else Fraction(devices, request.minimum)
        std = math.sqrt(request.sigma2 * draws)
        return math.ldexp(std, -request.encoding.fraction_bits) / devices

    def _terms(
        self, group: PartyGroup, roster: tuple[PartyId, ...], round: int, request: _Request
    ) -> RoundTerms:
        """The terms of a round's first attempt."""
        return RoundTerms(
            round=self._name(round),
            keys=group.keys(time.monotonic() + self._deadline),
            entries=request.entries,
            minimum=request.minimum,
            fraction_bits=request.encoding.fraction_bits,
            bound=request.encoding.bound,
            sigma2=_spelt(request.sigma2),
            noise=self._options.noise,
            projections=self._options.projections,
            votes=request.votes,
            roster=roster,
            expires=int(time.time() + self._deadline) + self._options.lifetime,
        )

    def _aggregate(
        self, group: PartyGroup, blocks: NDArray[np.float64], devices: Sequence[PartyId], terms: RoundTerms
    ) -> Total:
        deadline = time.monotonic() + self._deadline
        terms = group.standing(terms, deadline)
        group.open(terms, deadline)
        uploads = [
            prepare(block, terms, device, self._root.subkey("device", device))
            for device, block in zip(devices, blocks, strict=True)
        ]
        # What a party refused is left to all of them to count.
        refused = relay(uploads, group.aggregators, deadline=deadline)
        try:
            return group.close(terms, deadline)
        except RefusedError as error:
            raise ChannelError("; ".join([str(error), *refused]) + "; nothing was released") from error

    def _name(self, round: int) -> int:
        """Names the round among all that these services will ever see."""
        digest = hashlib.sha256(b"privkd round" + self._options.run + round.to_bytes(8, "big")).digest()
        return int.from_bytes(digest[:8], "big")


def _spelt(variance: Fraction | None) -> str | None:
    return None if variance is None else str(variance)


def _check_votes(answers: NDArray[np.float64], rule: VoteRule) -> None:
    """Raise `ChannelError` unless every row of ``answers`` ``[device, query, class]`` is one-hot, but for the
    blocks of zeros: those of devices whose answers were not finite."""
    if answers.shape[1] != rule.queries:
        raise ChannelError(f"{answers.shape[1]} queries, but the vote was priced for {rule.queries}")
    silent = ~answers.any(axis=(1, 2))
    one_hot = ((answers == 0) | (answers == 1)).all() and (answers[~silent].sum(-1) == 1).all()
    if not one_hot:
        raise ChannelError("votes that are not one-hot; nothing was released")
