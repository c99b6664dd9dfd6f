"""Abadi et al. 2016 and Tramer & Boneh 2021: private training of one student on one large data set."""

from dataclasses import replace

from papers.studies.scales import QUICK
from papers.study import Case, Claim, Difference, Figure, Scale, Study

_ONE_DEVICE = (
    "data.source=mnist",
    "data.gap=none",
    "data.devices=1",
    "data.records_per_device=50000",
    "data.device_test_records=0",
    "channel.kind=plain",
    "rounds=1",
    # What the teacher learns back is no part of these claims.
    "reverse.queries=10",
    "reverse.fit.steps=1",
    "student.alpha=0",
    # The teacher has seen 2,000 records and the student 50,000.
    "student.own_weight=1",
    "student.dp={sampling_rate=0.02, steps=1000, clip_norm=0.1, learning_rate=40.0, part='all'}",
    "student.direct_dp={clip_norm=0.1, learning_rate=40.0}",
)
_MNIST = Scale(
    "mnist",
    "MNIST, one device of 50,000 records, a CNN of 26,010 parameters or a linear student on scattering "
    "features, 2,000 public labels for our student",
    _ONE_DEVICE,
    seeds=3,
)
_QUICK = replace(
    QUICK,
    about="the embedded digits, one device of 700 records, small models and few steps",
    settings=(
        *QUICK.settings,
        "data.gap=none",
        "data.devices=1",
        "data.records_per_device=700",
        "data.device_test_records=0",
        "rounds=1",
    ),
)


def _cases(epsilon: float) -> tuple[Case, ...]:
    budget = f"privacy.epsilon={epsilon:g}"
    return (
        Case(f"epsilon-{epsilon:g}", (budget,)),
        Case(f"scatter-{epsilon:g}", (budget, "student.models=[{name='scatter'}]")),
    )


def _claims(epsilon: float, network: str, features: str) -> tuple[Claim, ...]:
    return (
        *_claims_of(f"epsilon-{epsilon:g}", f"epsilon {epsilon:g}, CNN", network),
        *_claims_of(f"scatter-{epsilon:g}", f"epsilon {epsilon:g}, ScatterNet", features),
    )


def _claims_of(case: str, text: str, published: str) -> tuple[Claim, ...]:
    direct, ours = Figure(case, "student.direct_private"), Figure(case, "student.mean")
    return (
        Claim(f"{text}: DP-SGD from scratch", published, direct, "%"),
        Claim(f"{text}: our student, publicly distilled first", published, ours, "%"),
        Claim(f"{text}: ours over from scratch", "-", Difference(ours, direct), "points"),
    )


ABADI = Study(
    name="abadi2016",
    title="Abadi et al. 2016: deep learning with differential privacy",
    scales=(_MNIST, _QUICK),
    cases=(*_cases(8), *_cases(2)),
    claims=(*_claims(8, "97 %", "97 %, no ScatterNet"), *_claims(2, "95 %", "95 %, no ScatterNet")),
)

TRAMER = Study(
    name="tramer2021",
    title="Tramer & Boneh 2021: better features or much more data",
    scales=(_MNIST, _QUICK),
    cases=_cases(2.93),
    claims=_claims(2.93, "98.1 % (recalled)", "98.7 % (recalled)"),
)
