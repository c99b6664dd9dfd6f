"""Label-distribution inference: a device's class histogram, guessed from what the channel shows.

Record-level privacy does not stop it, for it speaks of all records at once; noise on the channel does
(Shi 2025, arXiv 2502.08001). The devices of this game are replays on records
whose classes are drawn unevenly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from attacks.channel import label_distribution, label_divergence
from audits.canaries import Pool
from audits.game import DeviceSide, Report, shard_of
from audits.intervals import mean_of
from audits.release import Floats
from audits.traces import Cache
from privkd.randomness import derive_seed

_STRENGTHS = np.concatenate([[0.0], np.geomspace(0.05, 50, 31)])
"""By which an answer's shift may be scaled; 0 leaves the blind guess."""


@dataclass(frozen=True)
class LabelFinding:
    """How much nearer a view brings the adversary to devices' class histograms.

    Attributes:
        view: what the adversary sees.
        divergence: KL(true || guess) in nats, mean over the devices.
        blind: the same of the best guess without any answer, which is even.
        gain: mean of what the answers save of it, at most ``blind``; ``low`` and ``high`` are the ends of its
            interval by Student's t.
        low: see ``gain``.
        high: see ``gain``.
        confidence: of the interval.
        devices: attacked.
        epsilon_upper: the ledger's, of one device's whole contribution.
    """

    view: str
    divergence: float
    blind: float
    gain: float
    low: float
    high: float
    confidence: float
    devices: int
    epsilon_upper: float

    @property
    def reveals(self) -> bool:
        """Whether the interval of the gain lies above zero."""
        return self.low > 0


@dataclass(frozen=True)
class UnevenDevices:
    """Replays on uneven records: true class ``shares`` ``[device, class]`` and bounded ``answers``
    ``[device, round, query, class]``."""

    shares: Floats
    answers: Tensor


def uneven_devices(
    side: DeviceSide, pool: Pool, cache: Cache, role: str, devices: int, report: Report
) -> UnevenDevices:
    """Replay devices whose class shares are drawn evenly from the simplex (Dirichlet's law, alpha 1)."""
    labels = pool.candidates.labels.cpu().numpy()
    classes, seed = side.game.scenario.classes, derive_seed(cache.key.seed, "audit", "labels", role)
    inside = draw_uneven(labels, classes, devices, seed)

    def compute() -> dict[str, Tensor]:
        shards = [shard_of(pool, coins) for coins in inside]
        replayed = side.replay(shards, [cache.key.device] * devices, seed, "labels", report)
        return {"answers": replayed.answers}

    answers = cache.tensors({"what": f"labels-{role}", "models": devices}, compute)["answers"]
    counts = inside @ np.eye(classes)[labels]
    return UnevenDevices(counts / counts.sum(axis=1, keepdims=True), answers)


def draw_uneven(labels: NDArray[np.int64], classes: int, devices: int, seed: int) -> NDArray[np.bool_]:
    """Which records each device holds, bool ``[device, record]``: about half of them, at least one.

    Each device's wished shares are uniform on the simplex; a class gives at most what it has.
    """
    rng = np.random.default_rng(seed % 2**63)
    wished = rng.dirichlet(np.ones(classes), size=devices) * len(labels) / 2
    rate = wished / np.maximum(np.bincount(labels, minlength=classes), 1)
    inside = rng.random((devices, len(labels))) < rate[:, labels]
    inside[np.arange(devices), rng.integers(len(labels), size=devices)] = True
    return inside


def infer_labels(
    view: str,
    targets: tuple[Floats, Tensor],
    shadows: tuple[Floats, Tensor],
    epsilon_upper: float,
) -> LabelFinding:
    """Guess the targets' histograms, with the shadows' mean as reference.

    ``targets`` and ``shadows`` are true shares ``[device, class]`` and released log-probabilities ``[device,
    round, query, class]``. How far a shift in the answers is to be believed is learned on the shadows.
    """
    reference = shadows[1].mean(dim=(0, 1)).numpy()
    even = np.full(reference.shape[1], 1 / reference.shape[1])

    def divergences(strength: float, devices: tuple[Floats, Tensor]) -> Floats:
        shift = strength * (devices[1].mean(dim=1).numpy() - reference)
        return label_divergence(devices[0], label_distribution(reference + shift, reference, even))

    strength = _best(lambda s: float(divergences(s, shadows).mean()))
    found, blind = divergences(strength, targets), divergences(0.0, targets)
    gain = mean_of(blind - found)
    return LabelFinding(
        view=view,
        divergence=float(found.mean()),
        blind=float(blind.mean()),
        gain=gain.estimate,
        low=gain.low,
        high=gain.high,
        confidence=gain.confidence,
        devices=gain.n,
        epsilon_upper=epsilon_upper,
    )


def _best(loss: Callable[[float], float]) -> float:
    return min((float(strength) for strength in _STRENGTHS), key=loss)
