"""The secure channel: devices share their answers among aggregators, and the cloud learns the mean alone."""

import contextlib
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privkd.channels.channel import Channel, noise_variance
from privkd.config import ChannelConfig
from privkd.errors import ChannelError, ConfigError, RefusalError
from privkd.messages import Question, Release, Upload
from privkd.privacy.events import PartyId
from privkd.privacy.noise import NoiseRoot, discrete_gaussian
from privkd.privacy.votes import VoteRule
from privkd.secure.client import ClientTls, ServiceLink, send, service_links
from privkd.secure.fixedpoint import FixedPoint
from privkd.secure.group import PartyGroup, PartyLink, Total, UnreachableError, relay
from privkd.secure.installed import check_crypten
from privkd.secure.local import LocalParties, local_links
from privkd.secure.party import MAX_PARTIES
from privkd.secure.shares import fitting_encoding
from privkd.secure.terms import RoundTerms, VoteTerms, distributed_variance, party_noise
from privkd.secure.upload import Upload as SealedUpload
from privkd.secure.upload import prepare

_LIFETIME = 86_400
_CLOCKS_APART = 600
"""Seconds by which a cloud's clock may be ahead of a device's."""


@dataclass(frozen=True)
class SecureOptions:
    """Where the parties run, and how rounds are held with them.

    Attributes:
        services: whether parties that are started for the channel are services, as they are deployed; else
            they are of this process, which is the quick way to simulate.
        urls: of services that run already: the aggregators, and the third party if there is one.
        ca: the authority whose certificates the services show; ``None`` for the system's.
        certificate: the cloud's own, where the services ask for one.
        key: of ``certificate``.
        pins: the aggregators' public keys by rank, in hexadecimal; none believes what they say.
        run: names the run, so that its rounds are never taken for those of another.
        roster: the devices that may contribute to a round; none for those that do.
        minimum: fewest devices over which a sum is released; ``None`` for all of the roster.
        noise: who adds the noise; see ``privkd.secure.terms``.
        projections: of the norm check (``privkd.secure.normcheck``), which needs a third party; 0 for none.
        votes: by which rule to hold a vote (``privkd.privacy.votes``), with a third party; else a mean.
        lifetime: seconds that a round waits for its devices; one interrupted for longer is attempted again.
    """

    services: bool = False
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

    @classmethod
    def of(
        cls, channel: ChannelConfig, *, run: bytes, roster: tuple[PartyId, ...], votes: VoteRule | None
    ) -> Self:
        """Those of a run with the settings ``channel``; the rest as of the attributes."""
        return cls(
            services=channel.through_services,
            urls=channel.aggregator_urls,
            ca=channel.ca,
            certificate=channel.certificate,
            key=channel.key,
            pins=channel.aggregator_keys,
            run=run,
            roster=roster,
            minimum=channel.minimum_devices,
            noise=channel.noise_from,
            projections=channel.norm_projections,
            votes=votes,
        )

    @property
    def tls(self) -> ClientTls | None:
        """What to trust and to show."""
        return None if self.ca is None else ClientTls(self.ca, self.certificate, self.key)


@dataclass(frozen=True)
class NoisyMean:
    """What the noisy sum of a round stands for. All of it is public.

    Attributes:
        encoding: of each device's block.
        sigma2: variance of one draw of the noise on the sum of integers; none for no noise.
    """

    encoding: FixedPoint
    sigma2: Fraction | None

    @classmethod
    def by_aggregators(cls, clip_norm: float, rho: float | None, *, devices: int, aggregators: int) -> Self:
        """That in which each of so many ``aggregators`` adds noise of the price ``rho``.

        Raises:
            ChannelError: the sum over ``devices`` would not fit the ring.
        """
        encoding = fitting_encoding(clip_norm, devices=devices, parties=aggregators, rho=rho)
        return cls(encoding, None if rho is None else noise_variance(encoding.bound, rho))

    @classmethod
    def by_devices(cls, clip_norm: float, rho: float | None, *, devices: int, minimum: int) -> Self:
        """That in which any ``minimum`` of at most ``devices`` add noise of the price ``rho`` together."""
        parties = -(-devices // minimum)
        encoding = fitting_encoding(clip_norm, devices=devices, parties=parties, rho=rho)
        return cls(encoding, None if rho is None else distributed_variance(encoding.bound, rho, minimum))

    def decode(self, integers: NDArray[np.int64], devices: int) -> NDArray[np.float64]:
        """The mean over so many ``devices`` of a sum ``integers``, of any shape."""
        return self.encoding.decode(integers) / devices

    def noise_std(self, draws: int | Fraction, devices: int) -> float:
        """Standard deviation of the noise on each entry of the mean, of so many ``draws``."""
        if self.sigma2 is None:
            return 0.0
        return math.ldexp(math.sqrt(self.sigma2 * draws), -self.encoding.fraction_bits) / devices


@dataclass(frozen=True)
class _Request:
    """What is asked of the parties in a round, beside its name and its devices."""

    entries: int
    mean: NoisyMean
    minimum: int
    votes: VoteTerms | None = None


@dataclass(frozen=True)
class _Opened:
    """A round that the parties have open."""

    request: _Request
    terms: RoundTerms


class _Parties:
    """A channel's parties, shared with the channels that are made of it for audits."""

    def __init__(
        self,
        aggregators: int,
        root: NoiseRoot,
        options: SecureOptions,
        deadline: float,
        start_deadline: float,
    ) -> None:
        self._aggregators = aggregators
        self._root = root
        self._options = options
        self._deadline = deadline
        self._start_deadline = start_deadline
        self._group: PartyGroup | None = None
        self._services: LocalParties | None = None
        self._needs_third_party = options.projections > 0 or options.votes is not None

    def noise_key(self, rank: int) -> bytes:
        """That of a party which is started here."""
        return self._root.subkey("aggregator", rank)

    def started(self) -> PartyGroup:
        """The group; its workers are on their way."""
        if self._group is None:
            self._group = self._start()
        return self._group

    def endpoints(self, deadline: float) -> list[ServiceLink]:
        """The running aggregators by rank, as a device reaches them: it starts no worker.

        Raises:
            ChannelError: one cannot be reached by ``deadline``, or its key is not the pinned one.
        """
        if self._group is None:
            self._group = PartyGroup(self._links(), pins=self._options.pins)
        self._group.keys(deadline)
        return [link for link in self._group.aggregators if isinstance(link, ServiceLink)]

    def _start(self) -> PartyGroup:
        run = self._options.run
        # A run that comes again need not wait for the sessions that it left.
        lease = hashlib.sha256(b"privkd lease" + run).hexdigest()[:16] if run else ""
        group = PartyGroup(self._links(), pins=self._options.pins, lease=lease)
        deadline = time.monotonic() + self._deadline
        found = len(group.keys(deadline))
        if found != self._aggregators:
            raise ConfigError(f"aggregators={self._aggregators}, but the services are a group of {found}")
        if self._needs_third_party and not group.third_party:
            raise ConfigError("votes and norm checks need a third party, and the services have none: "
                              "`privkd keys --third-party` makes one")  # fmt: skip
        # Another run may have the workers: then they are asked for when they are needed.
        with contextlib.suppress(UnreachableError):
            group.gather(deadline)
        return group

    def _links(self) -> Sequence[PartyLink]:
        options, third_party = self._options, self._needs_third_party
        if options.urls:
            return service_links(options.urls, options.tls)
        keys = tuple(self.noise_key(rank) for rank in range(self._aggregators + third_party))
        if not options.services:
            return local_links(
                self._aggregators,
                keys,
                third_party=third_party,
                step_seconds=self._deadline,
                start_seconds=self._start_deadline,
            )
        limits = {"step_seconds": self._deadline, "minimum_devices": 1}
        self._services = LocalParties(
            self._aggregators, third_party=third_party, limits=limits, noise_keys=keys
        )
        return service_links(self._services.urls, self._services.client_tls)

    def close(self) -> None:
        """End the parties that were started here; others go on. Idempotent."""
        if self._group is not None:
            self._group.disconnect()
            self._group = None
        if self._services is not None:
            self._services.stop()
            self._services = None


class SecureChannel(Channel):
    """Secret sharing among ``aggregators`` parties that run CrypTen; the cloud sees the noisy sum alone.

    With ``votes`` in its options it sees less: which class won on each query, where there is a consensus.

    Each device clips and encodes its answers with integer L2 norm at most ``C_int`` and shares them. With
    a ``rho`` each aggregator adds its own discrete Gaussian of ``sigma^2 = C_int^2 / (2 rho)``, so one
    honest aggregator makes the release ``rho``-zCDP per device against the cloud and all the others.

    This process plays the cloud and all devices, so it opens the rounds, uploads for every device that
    answers, and adds what the parties make of it. The release is over the devices that all parties hold, and
    never over fewer than the minimum; neither the noise nor the terms of a round depend on who falls silent.
    Parties that are started here, of this process or as services, have noise keys from ``root``, and make the
    same releases; they end with the channel. Running services have noise keys of their own.

    A repeated release of a round is bit-identical. Services keep what they agreed on, and refuse another set;
    parties of this process forget it, and give another set other noise.

    Trust: at least one aggregator is honest; the others and the cloud follow the protocol but may pool
    what they see. The separation of trust begins where the parties run on hosts of their own. For noise by
    the devices see ``privkd.secure.terms``.
    """

    kind = "secure"

    def __init__(
        self,
        clip_norm: float,
        rho: float | None,
        root: NoiseRoot,
        options: SecureOptions | None = None,
        *,
        aggregators: int = 2,
        deadline: float = 120.0,
        start_deadline: float = 300.0,
    ) -> None:
        """Check the settings; nothing is started or sent before ``start()``, or else the first release.

        Args:
            clip_norm: L2 bound on each device's whole ``[query, class]`` block.
            rho: price of one release to each device; ``None`` for no noise.
            root: where the devices' randomness comes from, and that of parties that are started here.
            options: see there.
            aggregators: how many there are, from 2 to 16.
            deadline: seconds that a step of parties of this process may take; with services the whole
                collecting of a release, restarts of workers included.
            start_deadline: seconds that the workers of parties of this process may take to come up.

        Raises:
            ConfigError: a setting is out of range, or CrypTen is needed here and not installed.
        """
        super().__init__(clip_norm, rho, root)
        options = SecureOptions() if options is None else options
        _check_parties(clip_norm, rho, aggregators, deadline=deadline, start_deadline=start_deadline)
        _check_options(options, rho)
        if options.urls:
            service_links(options.urls, options.tls)
        else:
            check_crypten()
        self.aggregators = aggregators
        self._options = options
        self._deadline = deadline
        self._parties = _Parties(aggregators, root, options, deadline, start_deadline)
        self._opened: _Opened | None = None
        self._last: tuple[Total, _Request] | None = None

    def start(self) -> None:
        """Start parties, or have running ones start their workers, without waiting for the workers."""
        self._parties.started()

    def for_audit(self) -> "SecureChannel":
        """See `Channel.for_audit`: the same parties, asked for rounds of another name and any roster.

        Not to be closed; it ends with this one.
        """
        options = replace(self._options, run=self._options.run + b" audit", roster=(), minimum=None)
        twin = SecureChannel(
            self.clip_norm,
            self.rho,
            self.root,
            options,
            aggregators=self.aggregators,
            deadline=self._deadline,
        )
        twin._parties = self._parties
        return twin

    @property
    def unknown_noise(self) -> float:
        """See `Channel.unknown_noise`: running services keep their keys to themselves."""
        return float(self.aggregators) if self._options.urls else 1.0

    def colluders_noise(self) -> NDArray[np.float64]:
        """See `Channel.colluders_noise`."""
        options = self._options
        if self._last is None or options.urls or options.votes is not None or options.noise == "devices":
            return np.zeros(1)
        total, request = self._last
        told = np.zeros(request.entries, np.int64)
        for rank in range(1, self.aggregators):
            root, sigma2 = NoiseRoot(self._parties.noise_key(rank)), request.mean.sigma2
            noise = party_noise(root, "service", total.round, total.agreed, sigma2, request.entries)
            told += 0 if noise is None else noise
        return request.mean.decode(told, len(total.devices))

    def close(self) -> None:
        """End the parties that were started here; others go on. Idempotent; a later release starts anew."""
        self._parties.close()

    def carry(self, question: Question, answers: Tensor, devices: Sequence[PartyId]) -> Release:
        """See `Channel.carry`. An error ends the parties that were started here; others are started then."""
        try:
            return super().carry(question, answers, devices)
        except BaseException:
            self.close()
            raise

    def open(self, question: Question, devices: Sequence[PartyId]) -> None:
        """Have the parties open a round for the roster, or for ``devices`` where there is none."""
        roster = self._options.roster or tuple(devices)
        request = self._request(question, len(roster), self._minimum(roster, devices))
        deadline = time.monotonic() + self._deadline
        group = self._parties.started()
        first = self._terms(group.keys(time.monotonic() + self._deadline), roster, question.round, request)
        terms = group.standing(first, deadline)
        group.open(terms, deadline)
        self._opened = _Opened(request, terms)

    def invitation(self) -> bytes:
        """See `Channel.invitation`: the round's terms."""
        return self._round().terms.pack()

    def accept(self, question: Question, invitation: bytes) -> int:
        """See `Channel.accept`: the terms are computed again, for the pinned keys and the roster.

        A cloud decides when a round expires and which attempt at it this is, and nothing else.

        Raises:
            RefusalError: they are others, or expire in the past or too far ahead.
        """
        options = self._options
        try:
            terms = RoundTerms.unpack(invitation)
        except ChannelError as error:
            raise RefusalError(400, str(error)) from None
        request = self._request(question, len(options.roster), self._minimum(options.roster, options.roster))
        own = self._terms(options.pins, options.roster, question.round, request)
        if terms != own.model_copy(update={"attempt": terms.attempt, "expires": terms.expires}):
            raise RefusalError(409, "the round's terms are not those that the plan gives")
        if not time.time() < terms.expires <= own.expires + _CLOCKS_APART:
            raise RefusalError(409, f"the round expires at {terms.expires}, which is over or too far ahead")
        self._opened = _Opened(request, terms)
        return terms.attempt

    def deliver(self, upload: Upload, deadline: float) -> bytes:
        """See `Channel.deliver`: each aggregator is sent its envelope, and the cloud nothing."""
        endpoints = self._parties.endpoints(deadline)
        send(SealedUpload.unpack(upload.payload), endpoints, deadline=deadline)
        return b""

    def encode(self, question: Question, block: NDArray[np.float64], device: PartyId) -> Upload:
        """The clipped block as integers, shared among the aggregators, each share sealed to one of them."""
        opened = self._round()
        if self._options.votes is not None:
            _check_votes(block.reshape(question.prior.shape))
        sealed = prepare(block, opened.terms, device, self.root.subkey("device", device))
        return Upload(device, question.round, sealed.pack())

    def collect(self, question: Question, uploads: Sequence[Upload]) -> Release:
        """What the parties make of the ``uploads``, over the devices on which they agreed.

        The answers of a vote are one-hot rows without noise; a row of zeros is a query without consensus.
        """
        opened, group = self._round(), self._parties.started()
        request, deadline = opened.request, time.monotonic() + self._deadline
        sealed = [SealedUpload.unpack(upload.payload) for upload in uploads]
        # What a party refused is left to all of them to count.
        refused = relay(sealed, group.aggregators, deadline=deadline)
        try:
            total = group.close(opened.terms, deadline)
        except RefusalError as error:
            raise ChannelError("; ".join([str(error), *refused]) + "; nothing was released") from error
        self._last, count = (total, request), len(total.devices)
        if request.votes is not None:
            outcome, noise_std = total.integers.astype(np.float64), 0.0
        else:
            outcome = request.mean.decode(total.integers, count)
            noise_std = request.mean.noise_std(self._draws(request, count), count)
        answers = torch.from_numpy(outcome.astype(np.float32)).reshape(question.prior.shape)
        return Release.to(question, answers, noise_std, total.devices)

    def _round(self) -> "_Opened":
        if self._opened is None:
            raise ChannelError("no round is open: open one before devices encode their answers")
        return self._opened

    def _request(self, question: Question, roster: int, minimum: int) -> _Request:
        queries, classes = question.prior.shape
        rule = self._options.votes
        if rule is not None:
            if queries != rule.queries:
                raise ChannelError(f"{queries} queries, but the vote was priced for {rule.queries}")
            bound = math.isqrt(queries - 1) + 1
            votes = VoteTerms(
                classes=classes, threshold=rule.threshold, threshold_sigma2=_spelt(rule.threshold_sigma2)
            )
            counts = NoisyMean(FixedPoint(0, bound), rule.sigma2)
            return _Request(queries * classes, counts, minimum, votes)
        if self._options.noise == "devices":
            mean = NoisyMean.by_devices(self.clip_norm, self.rho, devices=roster, minimum=minimum)
        else:
            mean = NoisyMean.by_aggregators(
                self.clip_norm, self.rho, devices=roster, aggregators=self.aggregators
            )
        return _Request(queries * classes, mean, minimum)

    def _draws(self, request: _Request, devices: int) -> int | Fraction:
        """How many times the request's variance there is on a sum over so many ``devices``."""
        by_aggregators = self._options.noise == "aggregators"
        return self.aggregators if by_aggregators else Fraction(devices, request.minimum)

    def _minimum(self, roster: Sequence[PartyId], devices: Sequence[PartyId]) -> int:
        strangers = set(devices).difference(roster)
        if strangers:
            raise ChannelError(f"{min(strangers)} is not on the roster; nothing was released")
        minimum = self._options.minimum or len(roster)
        if minimum > len(devices):
            few = f"{len(devices)} devices, fewer than minimum_devices={minimum}"
            raise ChannelError(f"{few}; nothing was released")
        return minimum

    def _terms(
        self, keys: tuple[str, ...], roster: tuple[PartyId, ...], round: int, request: _Request
    ) -> RoundTerms:
        """The terms of a round's first attempt."""
        return RoundTerms(
            round=self._name(round),
            keys=keys,
            entries=request.entries,
            minimum=request.minimum,
            fraction_bits=request.mean.encoding.fraction_bits,
            bound=request.mean.encoding.bound,
            sigma2=_spelt(request.mean.sigma2),
            noise=self._options.noise,
            projections=self._options.projections,
            votes=request.votes,
            roster=roster,
            expires=int(time.time() + self._deadline) + self._options.lifetime,
        )

    def _name(self, round: int) -> int:
        """Names the round among all that these services will ever see."""
        digest = hashlib.sha256(b"privkd round" + self._options.run + round.to_bytes(8, "big")).digest()
        return int.from_bytes(digest[:8], "big")


class OpenSum(Channel):
    """What the secure channel's parties add up, in the open: clip, encode, sum, noise, decode.

    The shares of a sum cancel exactly, so they are left out; all else is the channel's own.

    Args:
        clip_norm: as of `SecureChannel`.
        rho: likewise.
        root: of the noise of one release.
        aggregators: how many hold shares and add noise.
        colluding: of them, who tell the adversary their noise, which is as good as none.
    """

    kind = "secure"

    def __init__(
        self,
        clip_norm: float,
        rho: float | None,
        root: NoiseRoot,
        *,
        aggregators: int = 2,
        colluding: int = 0,
    ) -> None:
        super().__init__(clip_norm, rho, root)
        self.aggregators, self._colluding = aggregators, colluding
        self._mean = self._over(1)

    def _over(self, devices: int) -> NoisyMean:
        return NoisyMean.by_aggregators(
            self.clip_norm, self.rho, devices=devices, aggregators=self.aggregators
        )

    def resolution(self, devices: int) -> float:
        """See `Channel.resolution`. Each device truncates, and so its errors add up as its answers do."""
        return math.ldexp(1.0, -self._over(devices).encoding.fraction_bits)

    def open(self, question: Question, devices: Sequence[PartyId]) -> None:
        """Fit the encoding to the number of ``devices``."""
        self._mean = self._over(len(devices))

    def encode(self, question: Question, block: NDArray[np.float64], device: PartyId) -> Upload:
        """The clipped block as integers."""
        return Upload(device, question.round, self._mean.encoding.encode(block[None])[0].tobytes())

    def collect(self, question: Question, uploads: Sequence[Upload]) -> Release:
        """The noisy mean; its known noise is that which nobody tells."""
        mean, count = self._mean, len(uploads)
        total = np.stack([np.frombuffer(upload.payload, np.int64) for upload in uploads]).sum(axis=0)
        if mean.sigma2 is not None:
            for party in range(self._colluding, self.aggregators):
                total += discrete_gaussian(mean.sigma2, total.size, self.root.stream("aggregator", party))
        answers = torch.from_numpy(mean.decode(total, count).astype(np.float32))
        noise_std = mean.noise_std(self.aggregators - self._colluding, count)
        devices = [upload.device for upload in uploads]
        return Release.to(question, answers.reshape(question.prior.shape), noise_std, devices)


def _check_parties(clip_norm: float, rho: float | None, aggregators: int, **seconds: float) -> None:
    """Raise ``ConfigError`` if a setting is out of range."""
    if not 2 <= aggregators <= MAX_PARTIES:
        raise ConfigError(f"aggregators={aggregators}: expected 2 to {MAX_PARTIES}")
    for name, value in seconds.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name}={value}: expected seconds above 0")
    try:
        fitting_encoding(clip_norm, devices=1, parties=aggregators, rho=rho)
    except ChannelError as error:
        raise ConfigError(str(error)) from error


def _check_options(options: SecureOptions, rho: float | None) -> None:
    """Raise ``ConfigError`` if options contradict each other, or the price ``rho``."""
    if options.noise == "devices" and (options.projections or options.votes):
        what = "norm_projections" if options.projections else "aggregation: votes"
        raise ConfigError(f"{what}: the devices' noise would spoil it; take the aggregators'")
    if options.votes is not None and (options.votes.rho is None) != (rho is None):
        raise ConfigError(f"rho={rho}: not that of the votes' rule, {options.votes.rho}")
    if options.votes is not None and rho is not None and (options.votes.rho or 0) > rho:
        raise ConfigError(f"rho={rho}: less than the votes' rule costs")
    if options.minimum is not None and options.minimum < 1:
        raise ConfigError(f"minimum_devices={options.minimum}: expected at least 1")


def _spelt(variance: Fraction | None) -> str | None:
    return None if variance is None else str(variance)


def _check_votes(block: NDArray[np.float64]) -> None:
    """Raise `ChannelError` unless every row of a device's ``block`` ``[query, class]`` is one-hot, or all are
    zeros: where its answers were not finite."""
    one_hot = ((block == 0) | (block == 1)).all() and (block.sum(-1) == 1).all()
    if block.any() and not one_hot:
        raise ChannelError("votes that are not one-hot; nothing was released")
