"""The secure channel: devices share their answers among aggregators, and the cloud learns the mean alone."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privkd.channels.channel import Channel, contributions, noise_variance
from privkd.errors import ChannelError, ConfigError
from privkd.messages import Question, Release
from privkd.privacy.events import NoPrivacy, PartyId, PrivacyEvent, ZCdp
from privkd.privacy.noise import NoiseRoot
from privkd.secure.aggregator import agreed_digest, party_noise
from privkd.secure.envelope import UPLOAD_ID_BYTES, Header, seal, upload_identifier
from privkd.secure.fixedpoint import FixedPoint, content_digest
from privkd.secure.installed import check_crypten
from privkd.secure.parties import Session, party_key
from privkd.secure.shares import fitting_encoding, reconstruct, split
from privkd.secure.wire import Frame, Kind, RoundNotice, SharePost

_MAX_AGGREGATORS = 16


@dataclass(frozen=True)
class _Told:
    """What all parties know of a release: its notice, the digest of the agreed set, and how many devices."""

    notice: RoundNotice
    digest: bytes
    devices: int


class SecureChannel(Channel):
    """Secret sharing among ``aggregators`` processes that run CrypTen; the cloud sees the noisy sum alone.

    The aggregators are processes of this one, over pipes. The shares, the sealing, the agreement, CrypTen's
    sum and the noise are those of the services (``ServiceChannel``); what is left out is what one machine
    under one owner has no use for: the network, certificates, spool and journal. A failed round is simply
    played again, with the same noise. That makes it the quick way to simulate; wherever the aggregators
    should be somebody else's, use services.

    Each device clips and encodes its answers with integer L2 norm at most ``C_int`` and shares them. With
    a ``rho`` each aggregator adds its own discrete Gaussian of ``sigma^2 = C_int^2 / (2 rho)``, so one
    honest aggregator makes the release ``rho``-zCDP per device against the cloud and all the others.

    Trust: at least one aggregator is honest; the others and the cloud follow the protocol but may pool
    what they see. The separation of trust begins where the parties run on hosts of their own.
    """

    def __init__(
        self,
        clip_norm: float,
        rho: float | None,
        root: NoiseRoot,
        *,
        aggregators: int = 2,
        deadline: float = 120.0,
        start_deadline: float = 300.0,
    ) -> None:
        """Check the settings. Processes start with ``start()``, or else with the first release.

        Args:
            clip_norm: L2 bound on each device's whole ``[query, class]`` block.
            rho: price of one release to each device, per honest aggregator; ``None`` for no noise.
            root: where the aggregators' noise comes from.
            aggregators: how many, from 2 to 16.
            deadline: seconds a release may take once the parties are up.
            start_deadline: seconds the parties may take to come up.

        Raises:
            ConfigError: a setting is out of range, or CrypTen is not installed.
        """
        super().__init__(clip_norm, rho)
        checked_parties(clip_norm, rho, aggregators, deadline=deadline, start_deadline=start_deadline)
        self.aggregators = aggregators
        self._root = root
        self._deadline = deadline
        self._start_deadline = start_deadline
        self._session: Session | None = None
        self._last: _Told | None = None

    @property
    def event(self) -> PrivacyEvent:
        """``rho``-zCDP, or no guarantee without noise."""
        if self.rho is None:
            return NoPrivacy("secure aggregation without noise: the exact sum of all devices is revealed")
        return ZCdp(self.rho)

    def start(self) -> None:
        """Start the aggregators' processes, without waiting for them. Idempotent."""
        if self._session is None:
            self._session = Session(self.aggregators, self._root)

    def close(self) -> None:
        """End the aggregators' processes. Idempotent; a later release starts them again."""
        if self._session is not None:
            self._session.stop()
            self._session = None

    def colluders_noise(self) -> NDArray[np.float64]:
        """See `Channel.colluders_noise`."""
        if self._last is None or self._last.notice.variance is None:
            return np.zeros(1)
        notice, told = self._last.notice, np.zeros(self._last.notice.entries)
        for rank in range(1, self.aggregators):
            noise = party_noise(NoiseRoot(party_key(self._root, rank)), notice, self._last.digest)
            told += 0 if noise is None else noise
        return np.ldexp(told, -notice.fraction_bits) / self._last.devices

    def carry(self, question: Question, answers: Tensor, devices: Sequence[PartyId]) -> Release:
        """Send the mean of the devices' blocks of ``answers`` to the cloud; see ``Channel.carry``.

        After an error all aggregators are ended, and the next release starts them afresh.
        """
        blocks = contributions(answers, devices, question.round)
        encoding = fitting_encoding(
            self.clip_norm, devices=len(devices), parties=self.aggregators, rho=self.rho
        )
        sigma2 = None if self.rho is None else noise_variance(encoding.bound, self.rho)
        integers = encoding.encode(blocks)
        notice = RoundNotice(
            round=question.round,
            entries=integers.shape[1],
            minimum=len(devices),
            fraction_bits=encoding.fraction_bits,
            bound=encoding.bound,
            sigma2=None if sigma2 is None else str(sigma2),
        )
        try:
            total = self._aggregate(notice, integers, devices)
        except ChannelError as error:
            self.close()
            raise ChannelError(f"{error}; nothing was released") from error
        except BaseException:
            self.close()
            raise
        mean = encoding.decode(total) / len(devices)
        return Release.to(
            question,
            torch.from_numpy(mean.astype(np.float32)).reshape(answers.shape[1:]),
            self._noise_std(encoding, len(devices)),
            tuple(devices),
        )

    def _noise_std(self, encoding: FixedPoint, devices: int) -> float:
        if self.rho is None:
            return 0.0
        variance = noise_variance(encoding.bound, self.rho) * self.aggregators
        return math.ldexp(math.sqrt(variance), -encoding.fraction_bits) / devices

    def _aggregate(
        self, notice: RoundNotice, integers: NDArray[np.int64], devices: Sequence[PartyId]
    ) -> NDArray[np.int64]:
        """The noisy integer sum ``[entry]`` of ``integers`` ``[device, entry]``, by way of the parties."""
        self.start()
        session = self._session
        assert session is not None
        session.check()
        keys = session.public_keys(time.monotonic() + self._start_deadline)
        deadline = time.monotonic() + self._deadline
        session.broadcast(Frame(Kind.ROUND, notice.pack()), deadline)
        identifiers = []
        for device, block in zip(devices, integers, strict=True):
            # Named by its content under the root key: the same block again is the same upload.
            upload_id = self._root.subkey("upload", notice.round, device, content_digest(block))
            upload_id = upload_id[:UPLOAD_ID_BYTES]
            identifiers.append(upload_identifier(notice.round, device, upload_id))
            for party, envelope in zip(
                session.parties, _sealed(notice.round, device, upload_id, block, keys), strict=True
            ):
                party.send(Frame(Kind.UPLOAD, envelope), deadline)
        session.broadcast(Frame(Kind.FINISH), deadline)
        posts = [SharePost.unpack(body) for body in session.collect(Kind.SHARE, deadline)]
        expected = agreed_digest(notice, identifiers)
        for party, post in zip(session.parties, posts, strict=True):
            if post.agreed != expected or len(post.share) != notice.entries:
                raise ChannelError(f"{party.name} posted a share of another round or set")
        self._last = _Told(notice, expected, len(devices))
        return reconstruct([post.share for post in posts])


def checked_parties(
    clip_norm: float, rho: float | None, aggregators: int, *, local: bool = True, **seconds: float
) -> None:
    """Raise ``ConfigError`` if a setting is out of range, or if ``local`` parties lack CrypTen."""
    if not 2 <= aggregators <= _MAX_AGGREGATORS:
        raise ConfigError(f"aggregators={aggregators}: expected 2 to {_MAX_AGGREGATORS}")
    for name, value in seconds.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name}={value}: expected seconds above 0")
    try:
        fitting_encoding(clip_norm, devices=1, parties=aggregators, rho=rho)
    except ChannelError as error:
        raise ConfigError(str(error)) from error
    if local:
        check_crypten()


def _sealed(
    round: int, device: PartyId, upload_id: bytes, block: NDArray[np.int64], keys: Sequence[bytes]
) -> list[bytes]:
    """One device's work: its block ``[entry]`` shared, and each share sealed to its aggregator."""
    return [
        seal(
            Header(round, device, upload_id, party, len(keys), len(block), share.form),
            share,
            recipient,
        )
        for party, (share, recipient) in enumerate(zip(split(block, len(keys)), keys, strict=True))
    ]
