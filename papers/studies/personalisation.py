"""Non-iid devices: what each device's own student is worth on its device's own distribution."""

from dataclasses import replace

from papers.measurements import Personal
from papers.studies.scales import DIGITS, MNIST, QUICK
from papers.study import Case, Claim, Difference, Figure, Scale, Study

_MEASURED = (Personal(),)


def _tested(scale: Scale, about: str, *settings: str) -> Scale:
    return replace(scale, about=f"{scale.about}, {about}", settings=(*scale.settings, *settings), seeds=5)


_DIRICHLET = "data.partition=dirichlet"
_WITHHELD = ("data.partition=classes", "data.classes_per_device=4", "data.gap=withheld")
_CASES = (
    Case("dirichlet-1", (_DIRICHLET, "data.dirichlet_alpha=1"), measurements=_MEASURED),
    Case("dirichlet-0.1", (_DIRICHLET, "data.dirichlet_alpha=0.1"), measurements=_MEASURED),
    Case("withheld", _WITHHELD, measurements=_MEASURED),
    Case(
        "dirichlet-0.1-open",
        (_DIRICHLET, "data.dirichlet_alpha=0.1", "privacy.epsilon=inf"),
        measurements=_MEASURED,
    ),
)
_ABOUT = {
    "dirichlet-1": "Dirichlet 1, epsilon 3",
    "dirichlet-0.1": "Dirichlet 0.1, epsilon 3",
    "withheld": "4 classes a device, half of all withheld from the public, epsilon 3",
    "dirichlet-0.1-open": "Dirichlet 0.1, no DP",
}


def _claims(case: str, about: str) -> tuple[Claim, ...]:
    names = ("student", "global", "teacher", "trained")
    own, shared, teacher, trained = (Figure(case, f"personal.{name}") for name in names)
    return (
        Claim(f"{about}: own student", "-", own, "%"),
        Claim(f"{about}: over the global student", "better", Difference(own, shared), "points"),
        Claim(f"{about}: over the teacher", "-", Difference(own, teacher), "points"),
        Claim(
            f"{about}: over itself before it learned from the last teacher",
            "-",
            Difference(own, trained),
            "points",
        ),
    )


STUDY = Study(
    name="personalisation",
    title="Du 2022: personalised students on non-iid devices",
    scales=(
        _tested(
            DIGITS, "30 test records a device", "data.records_per_device=120", "data.device_test_records=30"
        ),
        _tested(MNIST, "200 test records a device", "data.device_test_records=200"),
        _tested(
            QUICK, "30 test records a device", "data.records_per_device=120", "data.device_test_records=30"
        ),
    ),
    cases=_CASES,
    claims=tuple(claim for case, about in _ABOUT.items() for claim in _claims(case, about)),
)
