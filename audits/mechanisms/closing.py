"""The audit that every training run ends with: canaries through the run itself.

It meets what the run claims for a record and for a device with the worst case that the accountant assumes,
on the path that the run took: its students through the call that trained them (`on_device`), their answers
through the channel while it is open (`on_channel`). It takes seconds, or a tenth of the run;
`audits.membership_audit` attacks what the run really shows.
"""

from audits.mechanisms.canaries import bound_many_trials
from audits.mechanisms.on_channel import audit_releases
from audits.mechanisms.on_device import audit_training, of_person
from privkd.channels.channel import Channel
from privkd.channels.registry import KINDS
from privkd.federation import Federation
from privkd.models.zoo import PARTS
from privkd.prepared import Prepared
from privkd.privacy.bounds import Audited, LowerBound
from privkd.privacy.events import Unit
from privkd.privacy.randomness import derive_seed
from privkd.progress import Progress
from privkd.runs.checkpoint import State

CONFIDENCE = 0.999
"""Of all bounds of one run together. Its checks add `audits.mechanisms.on_device.FALSE_ALARM` each."""
_LEAST_NOISE = 0.2
"""Noise multiplier below which DP-SGD is not audited."""


def closing_audit(federation: Federation, state: State, progress: Progress) -> Audited:
    """A lower bound for each unit that the run protects, and checks of its mechanisms.

    There is no bound for a unit without protection, for votes, for noise that the devices add together, and
    over a channel that says why.
    Neighbouring relations are the ledger's: add or remove one record or person, zero out one device.

    Args:
        federation: the run, its channel open.
        state: its end; canary devices begin from students that are distilled from its teacher.
        progress: told of the audit.
    """
    run = federation.prepared
    progress.stage("audit: canaries through the run's own devices and channel")
    seed = derive_seed(run.config.seed, "audit", "closing")
    plan, settings = run.plan, run.config.channel
    counted = plan.rho is not None and plan.votes is None and settings.noise_from == "aggregators"
    counted &= not KINDS[settings.kind].unaudited
    # Less noise is lost in the rounding of float32 weights, and its epsilon of hundreds promises nothing.
    records = run.mechanism is not None and plan.noise_multiplier >= _LEAST_NOISE
    confidence = 1 - (1 - CONFIDENCE) / max(1, records + counted)
    found = []
    if records:
        found.append(_of_records(run, state, confidence, seed))
    if counted:
        found.append(_of_devices(run, federation.channel, confidence, seed))
    return Audited(
        tuple(bound for audited in found for bound in audited.bounds),
        tuple(check for audited in found for check in audited.checks),
    )


def _of_records(run: Prepared, state: State, confidence: float, seed: int) -> Audited:
    plan, student = run.plan, run.config.student
    starts = run.cloud.public_students(state.teacher, round=state.round)
    audit = audit_training(run, state.teacher, starts, seed)
    epsilon = bound_many_trials(
        audit.scores, sampling_rate=plan.sampling_rate, delta=plan.delta, confidence=confidence, seed=seed
    )
    part = PARTS[student.dp.part]
    kinds = "student" if len(starts) == 1 else f"{len(starts)} kinds of student"
    crafted = f", {of_person(run)} records a person" if plan.unit is Unit.PERSON else ""
    path = (
        f"the run's own {kinds}, {part} trained by engine {student.engine}, "
        f"noise from {_SOURCES[run.config.privacy.noise]}{crafted}"
    )
    return Audited(
        (LowerBound(plan.unit, epsilon, confidence, len(audit.scores.values), path),), audit.checks
    )


_SOURCES = {"seeded": "the seed", "system": "the system's cryptographic source"}


def _of_devices(run: Prepared, opened: Channel, confidence: float, seed: int) -> Audited:
    plan, settings = run.plan, run.config.channel
    channel, canaries = opened.for_audit(), KINDS[settings.kind].canaries(settings)
    audit = audit_releases(channel, plan.rounds, seed, most=canaries.uploads // max(2, plan.rounds))
    epsilon = bound_many_trials(
        audit.scores, sampling_rate=1.0, delta=plan.delta, confidence=confidence, seed=seed
    )
    path = f"the run's own {settings.kind} channel{canaries.behind}"
    return Audited(
        (LowerBound(Unit.DEVICE, epsilon, confidence, len(audit.scores.values), path),), audit.checks
    )
