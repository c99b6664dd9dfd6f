"""``privkd audit mechanism``: the worst case through the product's own path, without any run.

Every audit prepares a run as ``privkd train`` does, at the default run's settings but for those in the tables
below, with models that nobody trained:

* DP-SGD: crafted records through the call that trains a run's devices (`mechanisms.on_device`), with both
  engines, both sources of randomness, the head or every layer in training, full and subsampled batches, for
  runs that protect records and such that protect persons;
* the channels, opened as a run opens them: canary devices (`mechanisms.on_channel`), and of the secure ones
  the exact sum where nothing is noised;
* two neighbouring inputs of DP-SGD and of the noised channel (`mechanisms.neighbours`), which find what
  nobody foresaw.

Each claims events; the ledger's price of them is the upper bound that the audit sets its lower bound beside.
A sound mechanism comes near it from below; a broken one goes above, or fails a check.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np
from torch import Tensor

from audits.estimators.validation import Floats
from audits.findings import Finding
from audits.mechanisms import on_channel, on_device
from audits.mechanisms.canaries import Scores, bound_many_trials
from audits.mechanisms.neighbours import (
    Bounded,
    DpSgdGame,
    ObserveSums,
    ReleaseMany,
    bound_worlds,
    channel_worlds,
    dp_sgd_worlds,
    observed,
)
from audits.tables import MechanismReport, check_name
from privkd.channels.channel import Channel
from privkd.channels.registry import KINDS, Canaries, open_channel
from privkd.channels.secure import SecureOptions
from privkd.config import ChannelConfig, load_config
from privkd.models.zoo import PARTS
from privkd.prepared import Prepared, prepare
from privkd.privacy.accounting import price
from privkd.privacy.bounds import Check
from privkd.privacy.events import DpSgd, PrivacyEvent, Unit, ZCdp
from privkd.privacy.randomness import derive_seed
from privkd.progress import Progress, Silent

_DELTA = 1e-5
_CONFIDENCE = 0.95

Settings: TypeAlias = tuple[str, ...]
"""Of a run, beside the defaults, as on the command line."""

_SUBSAMPLED, _EVERY_LAYER = "student.dp.sampling_rate=0.2", "student.dp.part=all"
_OPACUS, _SYSTEM = "student.engine=opacus", "privacy.noise=system"
_PERSONS: Settings = (
    "data.source=audits.mechanisms.persons:digits",
    "data.group=owner",
    "data.scale=16",
    "privacy.unit=person",
)
TRAININGS: tuple[Settings, ...] = (
    (),
    (_EVERY_LAYER, _SYSTEM),
    (_SUBSAMPLED, _SYSTEM),
    (_OPACUS, _EVERY_LAYER),
    (_OPACUS, _SUBSAMPLED, _SYSTEM),
    _PERSONS,
    (*_PERSONS, _OPACUS, _EVERY_LAYER),
)
"""The first is the default run; the last ones protect persons."""

_SHORT: Settings = ("rounds=2", "student.dp.steps=3")
"""The noise is calibrated to the steps, so that fewer of them are as tight, and cheaper."""

_NOISED: Settings = ("channel.kind=noised",)
CHANNELS: dict[str, Settings] = {
    "noised": _NOISED,
    "secure, processes": ("channel.kind=secure", "channel.parties=processes"),
    "secure, services": ("channel.kind=secure", "channel.parties=services"),
}
_DEVICE_BUDGET: Settings = ("rounds=2", "privacy.device_epsilon=8")

FULL_BATCH = DpSgdGame(noise_multiplier=2.0, sampling_rate=1.0, steps=4, base=4, runs=3000)
"""Exactly Gaussian: mu = sqrt(steps) / noise multiplier = 1."""

GAMES = (
    FULL_BATCH,
    replace(FULL_BATCH, base=1, noise="system"),
    DpSgdGame(noise_multiplier=2.0, sampling_rate=0.5, steps=8, base=0, runs=2000, noise="system"),
)
"""One other record, which the canary just outweighs, shows what is clipped after the average."""

_TRIALS = {"cohort": 4_000, "opacus": 1_500}
"""Canaries at most, by engine."""


@dataclass(frozen=True)
class Level:
    """How sure a bound must be: at ``delta``, with probability ``confidence``."""

    delta: float = _DELTA
    confidence: float = _CONFIDENCE


@dataclass(frozen=True)
class Examined:
    """One mechanism's lower bound beside the ledger's price, and the checks that it was put to."""

    finding: Finding
    checks: tuple[Check, ...] = ()


def mechanism(*, seed: int = 0, progress: Progress | None = None) -> MechanismReport:
    """Audit all mechanisms as they are installed. All lower bounds hold together with 95 % confidence.

    Neighbouring relations: add or remove one record, or person; zero out one device, whose number is public.

    Args:
        seed: decides the trials.
        progress: told of each mechanism.
    """
    audits: list[Callable[[Level], Examined]] = [
        *(partial(audit_records, settings, seed=seed) for settings in TRAININGS),
        *(partial(audit_devices, name, seed=seed) for name in CHANNELS),
        partial(_audit_noised_worlds, seed=seed),
        *(partial(_audit_worlds, game, seed=seed) for game in GAMES),
    ]
    level = Level(confidence=1 - (1 - _CONFIDENCE) / len(audits))
    examined = []
    for number, audit in enumerate(audits):
        (progress or Silent()).stage(f"mechanism audit {number + 1} of {len(audits)}")
        examined.append(audit(level))
    false_alarm = len(TRAININGS) * on_device.FALSE_ALARM + len(CHANNELS) * on_channel.FALSE_ALARM
    return MechanismReport(
        findings=tuple(each.finding for each in examined),
        checks=tuple(
            replace(check, name=check_name(each.finding, check.name))
            for each in examined
            for check in each.checks
        ),
        false_alarm=false_alarm,
    )


def audit_records(settings: Settings, level: Level, *, seed: int) -> Examined:
    """Crafted records through DP-SGD as a run of these ``settings`` trains its devices, over all its rounds.

    Raises:
        InputError: no run can have these settings.
    """
    run = prepare(load_config(None, [*_SHORT, *settings, f"seed={seed}"]))
    plan, student = run.plan, run.config.student
    teacher, students = run.cloud.untrained_teacher(), run.cloud.untrained_students()
    audit = on_device.audit_training(
        run, teacher, students[:1], derive_seed(seed, "mechanism", *settings), most=_TRIALS[student.engine]
    )
    bounded = _bounded(audit.scores, plan.sampling_rate, level, seed)
    part, of = PARTS[student.dp.part], ", persons" if plan.unit is Unit.PERSON else ""
    crafted = f"{part}, q={plan.sampling_rate:g}, {run.config.privacy.noise}{of}"
    estimator = "gaussian" if plan.sampling_rate == 1 else "clopper_pearson"
    claim = [plan.training_event] * plan.rounds
    name = f"DP-SGD, {student.engine}"
    return Examined(_finding(name, crafted, plan.unit, claim, bounded, level, estimator), audit.checks)


def audit_devices(name: str, level: Level, *, seed: int) -> Examined:
    """Worst-case devices through the channel ``name`` of `CHANNELS`, over all rounds of its run."""
    run = _with_device_budget(CHANNELS[name], seed)
    plan, settings = run.plan, run.config.channel
    coins = derive_seed(seed, "mechanism", name)
    most = canaries_over(settings).devices
    with opened(run, plan.rho) as channel:
        audit = on_channel.audit_releases(channel.for_audit(), plan.rounds, coins, most=most)
    bounded = _bounded(audit.scores, 1.0, level, seed)
    claim = [plan.device_event] * plan.rounds
    finding = _finding(name, "devices side by side", Unit.DEVICE, claim, bounded, level, "gaussian")
    return Examined(finding, (*audit.checks, *_exact_sum(run, coins)))


def canaries_over(settings: ChannelConfig) -> Canaries:
    """How many worst-case devices go over a channel of these ``settings``."""
    return KINDS[settings.kind].canaries(settings)


def _with_device_budget(settings: Settings, seed: int) -> Prepared:
    return prepare(load_config(None, [*_DEVICE_BUDGET, *settings, f"seed={seed}"]))


def _exact_sum(run: Prepared, seed: int) -> Iterator[Check]:
    """What the parties of a channel release where they add no noise."""
    if KINDS[run.config.channel.kind].has_parties:
        with opened(run, None) as channel:
            yield on_channel.check_sum(channel.for_audit(), seed)


def opened(run: Prepared, rho: float | None) -> Channel:
    """The channel as ``run`` opens it, at the price ``rho`` of a release; to be closed."""
    settings = run.config.channel
    return open_channel(
        settings.kind,
        clip_norm=run.plan.clip_norm,
        root=run.root,
        rho=rho,
        aggregators=settings.aggregators,
        deadline=settings.deadline,
        options=SecureOptions(services=settings.through_services),
    )


def _audit_worlds(game: DpSgdGame, level: Level, *, seed: int) -> Examined:
    run = prepare(load_config(None, [f"privacy.noise={game.noise}", f"seed={seed}"]))
    return Examined(audit_dp_sgd(observed(run.randomness_of), game, "DP-SGD, cohort", level, seed))


def audit_dp_sgd(observe: ObserveSums, game: DpSgdGame, name: str, level: Level, seed: int) -> Finding:
    """One canary joins other records, or does not; see `dp_sgd_worlds`."""
    label = f"canary beside {game.base}, q={game.sampling_rate:g}, {game.noise}"
    worlds = dp_sgd_worlds(observe, game, derive_seed(seed, "mechanism", name, label))
    full = game.sampling_rate == 1
    bounded = bound_worlds(
        worlds, gaussian_curve=full, delta=level.delta, confidence=level.confidence, seed=seed
    )
    claim = [DpSgd(game.noise_multiplier, game.sampling_rate, game.steps)]
    estimator = "gaussian" if full else "clopper_pearson"
    return _finding(name, label, Unit.RECORD, claim, bounded, level, estimator)


def _audit_noised_worlds(level: Level, *, seed: int) -> Examined:
    run = _with_device_budget(_NOISED, seed)
    plan = run.plan
    assert plan.rho is not None
    with opened(run, plan.rho) as channel:
        release, runs = released_by(channel), canaries_over(run.config.channel).devices
        return Examined(
            audit_channel(release, "noised", level, seed, runs=runs, clip_norm=plan.clip_norm, rho=plan.rho)
        )


def audit_channel(
    release: ReleaseMany, name: str, level: Level, seed: int, *, runs: int, clip_norm: float, rho: float
) -> Finding:
    """One device's block is far too long, or zero; see `channel_worlds`."""
    worlds = channel_worlds(release, clip_norm=clip_norm, runs=runs)
    bounded = bound_worlds(
        worlds, gaussian_curve=True, delta=level.delta, confidence=level.confidence, seed=seed
    )
    return _finding(name, "a huge block or none", Unit.DEVICE, [ZCdp(rho)], bounded, level, "gaussian")


def released_by(channel: Channel) -> ReleaseMany:
    """One release of many devices, each a run of its own, over a channel that shows each device."""

    def release(blocks: Tensor) -> Floats:
        names = [f"audit-{number:05d}" for number in range(len(blocks))]
        return channel.release(blocks, devices=names, round=0).answers.numpy().astype(np.float64)

    return release


def _bounded(scores: Scores, sampling_rate: float, level: Level, seed: int) -> Bounded:
    lower = bound_many_trials(
        scores, sampling_rate=sampling_rate, delta=level.delta, confidence=level.confidence, seed=seed
    )
    return Bounded(lower, min(len(scores.members), len(scores.nonmembers)))


def _finding(
    name: str,
    game: str,
    unit: Unit,
    claim: Sequence[PrivacyEvent],
    bounded: Bounded,
    level: Level,
    estimator: str,
) -> Finding:
    return Finding(
        view=name,
        attack=game,
        unit=unit,
        auc=None,
        tpr_at_fpr=(),
        epsilon_lower=bounded.epsilon,
        epsilon_upper=price(claim, level.delta).high,
        delta=level.delta,
        confidence=_CONFIDENCE,
        members=bounded.runs,
        nonmembers=bounded.runs,
        estimator=estimator,
    )
