"""What each view of an audit shows of replayed devices, by a channel of its kind, and attacks on it.

The channel's views show released answers; the teacher's is the teacher after it learned from a release;
distillation LiRA (Jagielski et al. 2023, arXiv 2303.03446; Shi 2025, arXiv 2502.08001) queries a surrogate
distilled from the releases alone; label-distribution inference guesses a device's class histogram, which no
record-level guarantee protects.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attacks.evidence import ChannelEvidence
from attacks.release import label_distribution, label_divergence
from audits.estimators.rates import mean_of
from audits.estimators.validation import Floats
from audits.findings import LabelFinding
from audits.game import Cache, Pool, ReplayContext, Report, Role, Traces, others_answers, shard_of
from audits.scoring import Released, Signals
from privkd.channels.channel import Channel, PlainChannel
from privkd.channels.registry import KINDS, open_replay
from privkd.cloud import project_on_simplex
from privkd.config import FitConfig
from privkd.data.scenario import LabelledSet
from privkd.messages import Release
from privkd.prepared import Prepared
from privkd.privacy.noise import NoiseRoot
from privkd.privacy.randomness import derive_seed, seeded_generator
from privkd.progress import Progress
from privkd.secure.fixedpoint import clip_rows
from privkd.training.fit import logits_of
from privkd.training.vectorised import cohort_answers, fit_cohort


def released(
    run: Prepared, view: str, blocks: Tensor, others: Callable[[], Tensor], root: NoiseRoot
) -> Released:
    """What a view of the run's channel shows of replayed devices: by a channel of its kind.

    Args:
        run: its settings and plan.
        view: of its channel.
        blocks: bounded answers of one device each, ``[model, round, query, class]``.
        others: what the run's other devices send beside each of them, ``[other, round, query, class]``; asked
            for where the cloud sees a sum alone.
        root: of the channel's noise.
    """
    kind = KINDS[run.config.channel.kind]
    if kind.shows_each:
        return _each(run, view, blocks, root)
    beside = others()
    total = _sum(run, kind.views[0], blocks, beside, root)
    return total if view == total.view else _left(run, view, blocks, beside, total)


def rest_of(run: Prepared, others: Tensor, root: NoiseRoot) -> Floats:
    """What the ``others`` ``[other, round, query, class]`` release on their own; none where a sum is all that
    the cloud sees."""
    kind = KINDS[run.config.channel.kind]
    if not kind.shows_each or not len(others):
        return np.asarray(others[:0].to(torch.float64).numpy(), dtype=np.float64)
    return _each(run, kind.views[0], others, root).answers


def _opened(run: Prepared, root: NoiseRoot) -> Channel:
    plan, settings = run.plan, run.config.channel
    return open_replay(
        settings.kind, clip_norm=plan.clip_norm, rho=plan.rho, root=root, aggregators=settings.aggregators
    )


def _each(run: Prepared, view: str, blocks: Tensor, root: NoiseRoot) -> Released:
    """Each device's own release."""
    names = [f"replay-{number:04d}" for number in range(len(blocks))]
    rounds = range(blocks.shape[1])
    plain, own = PlainChannel(run.plan.clip_norm), _opened(run, root)
    clean = [plain.release(blocks[:, r], devices=names, round=r) for r in rounds]
    seen = [own.release(blocks[:, r], devices=names, round=r) for r in rounds]
    return Released(view, _stacked(seen), seen[0].noise_std, _stacked(clean), own.resolution(1))


def _sum(run: Prepared, view: str, blocks: Tensor, others: Tensor, root: NoiseRoot) -> Released:
    """The mean over each device and the ``others``, as the cloud sees it."""
    seen, clean, clip_norm = [], [], run.plan.clip_norm
    names = [f"replay-{number:04d}" for number in range(1 + len(others))]
    for model, block in enumerate(blocks):
        together = torch.cat([block[None], others])
        clean.append(_clipped(together, clip_norm).mean(0))
        for round in range(blocks.shape[1]):
            channel = _opened(run, NoiseRoot(root.subkey("audit", model, round)))
            seen.append(channel.release(together[:, round], devices=names, round=round))
    answers = np.stack([release.answers.numpy().astype(np.float64) for release in seen])
    resolution = channel.resolution(len(names))
    return Released(view, answers.reshape(blocks.shape), seen[0].noise_std, np.stack(clean), resolution)


def _left(run: Prepared, view: str, blocks: Tensor, others: Tensor, seen: Released) -> Released:
    """What is left of the sum for colluders who take their own contributions off it."""
    n, clip_norm = 1 + len(others), run.plan.clip_norm
    left = seen.answers * n - _clipped(others, clip_norm).sum(0)
    return Released(view, left, seen.noise_std * n, _clipped(blocks, clip_norm), seen.resolution * n)


def _clipped(blocks: Tensor, clip_norm: float) -> Floats:
    """Each device's block of each round ``[device, round, query, class]``, clipped."""
    rows = blocks.reshape(blocks.shape[0] * blocks.shape[1], -1).to(torch.float64).numpy()
    return clip_rows(rows, clip_norm).reshape(tuple(blocks.shape))


def _stacked(releases: Sequence[Release]) -> Floats:
    return np.stack([release.answers.numpy().astype(np.float64) for release in releases], axis=1)


def learned_logits(
    side: ReplayContext,
    released: Released,
    others: Floats,
    pool: Pool,
    cache: Cache,
    role: str,
    report: Report,
) -> tuple[Floats, Floats]:
    """Logits of each model's teacher after the last round ``[model, record, class]``.

    Each teacher is the one that the run published in its last round, after it learned from that round's
    release of the replayed device and of the others, with the run's releases of the rounds before in its
    memory. The teacher before is the same for all models and public. ``others`` are what the other devices
    released on their own ``[other, round, query, class]``, if the channel shows that.

    Returns:
        On the candidates and on the population.
    """

    def compute() -> dict[str, Tensor]:
        candidates, population = [], []
        for model in range(len(released.answers)):
            teacher = _learned(side, _last_release(side, released, others, model))
            candidates.append(logits_of(teacher, pool.candidates.inputs).cpu())
            population.append(logits_of(teacher, pool.population.inputs).cpu())
            report(model + 1, len(released.answers))
        return {"candidates": torch.stack(candidates), "population": torch.stack(population)}

    found = cache.tensors({"what": f"teacher-{role}", "models": len(released.answers)}, compute)
    return _floats(found["candidates"]), _floats(found["population"])


def _floats(values: Tensor) -> Floats:
    return np.asarray(values.to(torch.float64).numpy(), dtype=np.float64)


def _learned(side: ReplayContext, release: Release) -> nn.Module:
    """The teacher after the last round, had ``release`` been what the channel released in it."""
    last = side.rounds - 1
    teacher = copy.deepcopy(side.transcript.exchanges[last].teacher)
    before = [exchange.release for exchange in side.transcript.exchanges[:last]]
    cloud = side.run.cloud
    return cloud.update(teacher, cloud.targets(teacher, [*before, release]), last).teacher


def _last_release(side: ReplayContext, released: Released, others: Floats, model: int) -> Release:
    """What the channel would have released in the last round with a replayed device in it."""
    last = side.rounds - 1
    answers = released.answers[model, last]
    if KINDS[side.run.config.channel.kind].shows_each:
        answers = np.concatenate([answers[None], others[:, last]])
    return Release.to(side.question(last), torch.from_numpy(answers), released.noise_std, ())


_FIT = FitConfig(steps=300, batch_size=64, learning_rate=5e-3)
_NOISY_FIT = _FIT.model_copy(update={"steps": 100})
"""Longer, a surrogate learns the noise."""
_MATCHING = 5.0
"""Temperature at which answers without noise are learned: hot enough that a surrogate matches all logits,
those of small probabilities included, which tell most about a record (Hinton et al. 2015, section 2.1)."""
FLOOR = 1e-4
"""A released probability below this is taken as this where its logarithm would tell of noise alone."""


def surrogate_logits(
    side: ReplayContext, released: Released, inputs: Tensor, seed: int, report: Callable[[int], None]
) -> Tensor:
    """Logits of one surrogate for each model ``[model, record, class]`` on ``inputs``, float32 on the CPU.

    Each surrogate starts from the public student of the last round and learns the released answers by
    ``KL(released || surrogate)``. All are trained as one vectorised program. Without noise it learns the last
    round's answers alone, which are one student's; noise is worth averaging over the students of all rounds.
    """
    start = side.last_starts[0]
    noisy = released.noise_std > 0
    rounds = range(side.rounds) if noisy else range(side.rounds - 1, side.rounds)
    queries = torch.cat([side.question(round).inputs for round in rounds])
    unlabelled = torch.zeros(len(queries), dtype=torch.int64, device=inputs.device)
    logs = log_probabilities(side, released, FLOOR if noisy else released.resolution)
    targets = list(logs[:, list(rounds)].flatten(1, 2).to(inputs.device, torch.float32))
    models: list[nn.Module] = fit_cohort(
        [start] * len(targets),
        [LabelledSet(queries, unlabelled)] * len(targets),
        targets,
        _NOISY_FIT if noisy else _FIT,
        [seeded_generator(seed, "audit", "surrogate", model) for model in range(len(targets))],
        alpha=1.0,
        temperature=1.0 if noisy else _MATCHING,
        progress=report,
    )
    return cohort_answers(models, inputs).cpu()


def log_probabilities(side: ReplayContext, released: Released, floor: float) -> Tensor:
    """The releases' log-probabilities, at least ``log(floor)``: float64 ``[model, round, query, class]``."""
    answers = torch.from_numpy(released.answers)
    answers = answers + torch.stack([side.question(round).baseline for round in range(side.rounds)])
    return project_on_simplex(answers).clamp_min(floor).log()


_STRENGTHS = np.concatenate([[0.0], np.geomspace(0.05, 50, 31)])
"""By which an answer's shift may be scaled; 0 leaves the blind guess."""


@dataclass(frozen=True)
class UnevenDevices:
    """Replays on uneven records: true class ``shares`` ``[device, class]`` and bounded ``answers``
    ``[device, round, query, class]``."""

    shares: Floats
    answers: Tensor


def uneven_devices(
    side: ReplayContext, pool: Pool, cache: Cache, role: str, devices: int, report: Report
) -> UnevenDevices:
    """Replay devices whose class shares are drawn evenly from the simplex (Dirichlet's law, alpha 1)."""
    labels = pool.candidates.labels.cpu().numpy()
    classes, seed = side.run.scenario.classes, derive_seed(cache.key.seed, "audit", "labels", role)
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


_LEAST_DEVICES = 16


@dataclass(frozen=True)
class Replays:
    """The replays of both roles, on one pool."""

    pool: Pool
    targets: Traces
    shadows: Traces


class Wires:
    """What the channel's views show; the other devices are replayed once for all of them."""

    def __init__(self, side: ReplayContext, cache: Cache, progress: Progress) -> None:
        self._side = side
        self._cache = cache
        self._seed = cache.key.seed
        self._progress = progress

    def evidence(self, view: str, replays: Replays) -> ChannelEvidence:
        """What the attacks on one of these views look at."""
        seen = self._released(view, replays.targets.answers, "target")
        learned = self._released(view, replays.shadows.answers, "shadow")
        return ChannelEvidence(
            view=view,
            released=seen.answers,
            shadows=learned.answers,
            clean=learned.clean,
            log_released=log_probabilities(self._side, seen, FLOOR).numpy(),
            log_shadows=log_probabilities(self._side, learned, FLOOR).numpy(),
            noise_std=seen.noise_std,
            inside=replays.shadows.inside,
            labels=replays.pool.candidates.labels.cpu().numpy(),
            distil=lambda: (
                self._surrogates(seen, replays.pool, "target"),
                self._surrogates(learned, replays.pool, "shadow"),
            ),
        )

    def labels(self, view: str, pool: Pool, devices: int, epsilon_upper: float) -> LabelFinding:
        """Label-distribution inference on so many devices, learned from as many others."""
        count = max(devices, _LEAST_DEVICES)
        self._progress.stage(f"audit: devices of uneven classes ({view})")
        found = []
        for role in ("target", "shadow"):
            uneven = uneven_devices(self._side, pool, self._cache, role, count, self._progress.advance)
            shown = self._released(view, uneven.answers, f"labels-{role}")
            found.append((uneven.shares, log_probabilities(self._side, shown, FLOOR)))
        return infer_labels(view, found[0], found[1], epsilon_upper)

    def teacher_signals(self, replays: Replays) -> Signals:
        """The teacher after it learned from each replay's release."""
        run, root = self._side.run, NoiseRoot.from_seed(derive_seed(self._seed, "audit", "rest"))
        rest, view = rest_of(run, self._others, root), KINDS[run.config.channel.kind].views[0]

        def absorbed(role: Role, models: Traces) -> tuple[Floats, Floats]:
            shown = self._released(view, models.answers, role)
            self._progress.stage(f"audit: teachers of the {role}s")
            return learned_logits(
                self._side, shown, rest, replays.pool, self._cache, role, self._progress.advance
            )

        (targets, seen), (shadows, there) = (
            absorbed("target", replays.targets),
            absorbed("shadow", replays.shadows),
        )
        return Signals(targets, shadows, seen, there, replays.shadows.inside)

    def _released(self, view: str, answers: Tensor, role: str) -> Released:
        root = NoiseRoot.from_seed(derive_seed(self._seed, "audit", "channel", role))
        return released(self._side.run, view, answers, lambda: self._others, root)

    def _surrogates(self, released: Released, pool: Pool, role: str) -> Floats:
        """Logits of one surrogate a model on the candidates ``[model, candidate, class]``."""
        count = len(released.answers)

        def compute() -> dict[str, Tensor]:
            self._progress.stage(f"audit: surrogates of the {role}s ({released.view})")
            advance = partial(self._progress.advance, total=count)
            inputs = pool.candidates.inputs
            return {"logits": surrogate_logits(self._side, released, inputs, self._seed, advance)}

        what: dict[str, str | int] = {"what": f"surrogate-{role}", "view": released.view, "models": count}
        return self._cache.tensors(what, compute)["logits"].to(torch.float64).numpy()

    @cached_property
    def _others(self) -> Tensor:
        self._progress.stage("audit: the other devices")
        return others_answers(self._side, self._cache, self._progress.advance)
