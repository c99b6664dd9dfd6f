"""Du 2022, and a preprint on the same topic (sinoxiv 5476982): the method's own four claims."""

from collections.abc import Callable
from functools import partial

from papers.measurements import Latency
from papers.studies.scales import CIFAR10, DIGITS, MNIST, QUICK
from papers.study import Case, Change, Claim, Difference, Figure, Quantity, Share, Study, Unit

_ROUNDS = 5
_OPEN = Case("open", (f"rounds={_ROUNDS}", "privacy.epsilon=inf"), measurements=(Latency("torch"),))
_PRIVATE = Case("private", (f"rounds={_ROUNDS}", "privacy.epsilon=3"))
_SIXTH = Case(
    "sixth",
    (f"rounds={_ROUNDS}", "privacy.epsilon=inf", "controls=false"),
    on={
        "quick": ("data.records_per_device=23",),
        "digits": ("data.records_per_device=23",),
        "mnist": ("data.records_per_device=167",),
        "cifar10": ("data.records_per_device=167",),
    },
)


_open, _private, _sixth = (partial(Figure, case) for case in ("open", "private", "sixth"))
_GAIN = Difference(_open("student.mean"), _open("student.direct"))
_PRIVATE_GAIN = Difference(_private("student.mean"), _private("student.direct_private"))
_OVER_OPEN = Difference(_private("student.mean"), _private("student.direct"))
_TAUGHT = Difference(_open("teacher.after"), _open("teacher.control"))
_PRIVATE_TAUGHT = Difference(_private("teacher.after"), _private("teacher.control"))
_SPEED = Change(_open("export.student_ms"), _open("export.teacher_ms"))
_FEWER_RECORDS = Difference(_sixth("student.mean"), _open("teacher.after"))


def _later(of: Callable[[str], Figure], model: str) -> Difference:
    return Difference(of(f"rounds.{_ROUNDS}.{model}"), of(f"rounds.1.{model}"))


_CLAIMS: tuple[tuple[str, str, Quantity, Unit], ...] = (
    ("1. distilled student over the same trained directly, no DP", "+17.01 %", _GAIN, "points"),
    ("1. the same at epsilon 3, both under it", "-", _PRIVATE_GAIN, "points"),
    ("1. share of that gain kept at epsilon 3", "-", Share(_PRIVATE_GAIN, _GAIN), "%"),
    ("1. student at epsilon 3 over the one trained directly without DP", "-", _OVER_OPEN, "points"),
    ("1. share of the gain kept against that one", "-", Share(_OVER_OPEN, _GAIN), "%"),
    ("2. student's inference time against the teacher's", "-31.67 %", _SPEED, "%"),
    ("2. student with a sixth of the records, against the teacher", "-3.18 %", _FEWER_RECORDS, "points"),
    ("3. teacher over its zero-device control, no DP", "better", _TAUGHT, "points"),
    ("3. the same at epsilon 3", "-", _PRIVATE_TAUGHT, "points"),
    ("3. share of that gain kept at epsilon 3", "-", Share(_PRIVATE_TAUGHT, _TAUGHT), "%"),
    (f"4. teacher after round {_ROUNDS} over round 1, no DP", "better", _later(_open, "teacher"), "points"),
    (f"4. students after round {_ROUNDS} over round 1, no DP", "better", _later(_open, "students"), "points"),
    (f"4. teacher after round {_ROUNDS} over round 1, epsilon 3", "-", _later(_private, "teacher"), "points"),
    ("accuracy: teacher after, no DP", "-", _open("teacher.after"), "%"),
    ("accuracy: students, no DP", "-", _open("student.mean"), "%"),
    ("accuracy: teacher after, epsilon 3", "-", _private("teacher.after"), "%"),
    ("accuracy: students, epsilon 3", "-", _private("student.mean"), "%"),
)

STUDY = Study(
    name="du2022",
    title="Du 2022 and sinoxiv 5476982: distillation both ways",
    scales=(MNIST, DIGITS, CIFAR10, QUICK),
    cases=(_OPEN, _PRIVATE, _SIXTH),
    claims=tuple(Claim(*claim) for claim in _CLAIMS),
)
