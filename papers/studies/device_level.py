"""PATE (Papernot et al. 2018) and PrivateKT (Qi et al. 2023): knowledge under device-level noise."""

from dataclasses import replace

from papers.quantity import Difference, Figure
from papers.studies.scales import QUICK
from papers.study import Case, Claim, Scale, Study

_MANY = (
    "data.source=mnist",
    "privacy.epsilon=inf",
    "student.private_fit={steps=60, batch_size=32}",
    "controls=false",
)


def _mnist(devices: int, records: int) -> Scale:
    about = f"MNIST, {devices:,} devices of {records} records, 2,000 public labels with half the classes rare"
    sizes = (f"data.devices={devices}", f"data.records_per_device={records}", "data.device_test_records=0")
    return Scale(f"mnist-{devices}", about, (*_MANY, *sizes), seeds=3)


_QUICK = replace(
    QUICK,
    about="the embedded digits, 40 devices of 18 records, small models and few steps, noised in one place",
    settings=(
        *QUICK.settings,
        "privacy.epsilon=inf",
        "controls=false",
        "channel.kind=noised",
        "data.devices=40",
        "data.records_per_device=18",
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
    scales=(_mnist(250, 150), _mnist(1000, 50), _QUICK),
    cases=tuple(Case(f"device-{e}", (f"privacy.device_epsilon={e}",)) for e in _EPSILONS),
    claims=tuple(claim for epsilon in _EPSILONS for claim in _claims(epsilon)),
)
