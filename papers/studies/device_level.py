"""PATE (Papernot et al. 2018) and PrivateKT (Qi et al. 2023): knowledge under device-level noise."""

from dataclasses import replace

from papers.studies.scales import QUICK
from papers.study import Case, Claim, Difference, Figure, Scale, Study

_MANY = (
    "data.source=mnist",
    "data.device_test_records=0",
    "rounds=1",
    "privacy.epsilon=inf",
    "teacher.model.width=64",
    "teacher.fit.steps=600",
    "student.public_fit={steps=400, learning_rate=5e-3}",
    "student.private_fit={steps=60, batch_size=32, learning_rate=5e-3}",
    "student.alpha=0",
    "channel.answers=votes",
    "channel.dropout=0.3",
    "reverse.fit={steps=300, learning_rate=2e-3}",
    "reverse.trust=8",
    "reverse.sharpen=20",
    "reverse.margin=1",
    "reverse.anchor=0",
    "controls=false",
    # What the devices are left with is no part of these claims.
    "student.own_weight=1",
)
"""What won: the students learn the labels alone and vote, and the teacher learns the noisy first choices."""


def _mnist(devices: int, records: int, *, seeds: int) -> Scale:
    about = (
        f"MNIST, {devices:,} devices of {records} records, 30 % of them silent, 2,000 public labels with "
        "half of the classes rare"
    )
    sizes = (
        f"data.devices={devices}",
        f"data.records_per_device={records}",
        f"channel.minimum_devices={devices * 7 // 10}",
    )
    return Scale(f"mnist-{devices}", about, (*_MANY, *sizes), seeds=seeds)


_QUICK = replace(
    QUICK,
    about="the embedded digits, 40 devices of 18 records, 30 % of them silent, each adds noise, small models",
    settings=(
        *QUICK.settings,
        "privacy.epsilon=inf",
        "controls=false",
        "channel.kind=noised",
        "data.devices=40",
        "data.records_per_device=18",
        "channel.dropout=0.3",
        "data.device_test_records=0",
    ),
)
_EPSILONS = (5, 3)
_PUBLISHED = {
    5: "95.1-95.5 % at 5 a round (PrivateKT)",
    3: "98.5 % at 1.97 (PATE, recalled)",
}


def _claims(epsilon: int) -> tuple[Claim, ...]:
    case = f"device-{epsilon}"
    after, control = Figure(case, "teacher.after"), Figure(case, "teacher.control")
    return (
        Claim(f"device epsilon {epsilon}, all rounds: teacher", _PUBLISHED[epsilon], after, "%"),
        Claim(f"device epsilon {epsilon}: over zero devices", "-", Difference(after, control), "points"),
    )


STUDY = Study(
    name="device-level",
    title="PATE 2018 and PrivateKT 2023: device-level privacy",
    scales=(_mnist(250, 200, seeds=5), _mnist(1000, 50, seeds=5), _QUICK),
    cases=tuple(Case(f"device-{e}", (f"privacy.device_epsilon={e}",)) for e in _EPSILONS),
    claims=tuple(claim for epsilon in _EPSILONS for claim in _claims(epsilon)),
)
