"""Du 2022, and a preprint on the same topic (sinoxiv 5476982): the method's own four claims."""

from papers.probes import Latency
from papers.quantity import Change, Difference, Figure, Share
from papers.studies.scales import CIFAR10, DIGITS, MNIST, QUICK
from papers.study import Case, Claim, Study

_ROUNDS = 5
_OPEN = Case("open", (f"rounds={_ROUNDS}", "privacy.epsilon=inf"), probes=(Latency("torch"),))
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


def _of(case: str, name: str) -> Figure:
    return Figure(case, name)


_STUDENT_GAIN = Difference(_of("open", "student.mean"), _of("open", "student.direct"))
_PRIVATE_STUDENT_GAIN = Difference(_of("private", "student.mean"), _of("private", "student.direct_private"))
_STUDENT_OVER_OPEN_DIRECT = Difference(_of("private", "student.mean"), _of("private", "student.direct"))
_TEACHER_GAIN = Difference(_of("open", "teacher.after"), _of("open", "teacher.control"))
_PRIVATE_TEACHER_GAIN = Difference(_of("private", "teacher.after"), _of("private", "teacher.control"))

STUDY = Study(
    name="du2022",
    title="Du 2022 and sinoxiv 5476982: distillation both ways",
    scales=(MNIST, DIGITS, CIFAR10, QUICK),
    cases=(_OPEN, _PRIVATE, _SIXTH),
    claims=(
        Claim(
            "1. distilled student over the same trained directly, no DP", "+17.01 %", _STUDENT_GAIN, "points"
        ),
        Claim(
            "1. the same at epsilon 3, both under it",
            "-",
            _PRIVATE_STUDENT_GAIN,
            "points",
        ),
        Claim(
            "1. share of that gain kept at epsilon 3",
            "-",
            Share(_PRIVATE_STUDENT_GAIN, _STUDENT_GAIN),
            "%",
        ),
        Claim(
            "1. student at epsilon 3 over the one trained directly without DP",
            "-",
            _STUDENT_OVER_OPEN_DIRECT,
            "points",
        ),
        Claim(
            "1. share of the gain kept against that one",
            "-",
            Share(_STUDENT_OVER_OPEN_DIRECT, _STUDENT_GAIN),
            "%",
        ),
        Claim(
            "2. student's inference time against the teacher's",
            "-31.67 %",
            Change(_of("open", "export.student_ms"), _of("open", "export.teacher_ms")),
            "%",
        ),
        Claim(
            "2. student with a sixth of the records, against the teacher",
            "-3.18 %",
            Difference(_of("sixth", "student.mean"), _of("open", "teacher.after")),
            "points",
        ),
        Claim("3. teacher over its zero-device control, no DP", "better", _TEACHER_GAIN, "points"),
        Claim("3. the same at epsilon 3", "-", _PRIVATE_TEACHER_GAIN, "points"),
        Claim(
            "3. share of that gain kept at epsilon 3", "-", Share(_PRIVATE_TEACHER_GAIN, _TEACHER_GAIN), "%"
        ),
        Claim(
            f"4. teacher after round {_ROUNDS} over round 1, no DP",
            "better",
            Difference(_of("open", f"rounds.{_ROUNDS}.teacher"), _of("open", "rounds.1.teacher")),
            "points",
        ),
        Claim(
            f"4. students after round {_ROUNDS} over round 1, no DP",
            "better",
            Difference(_of("open", f"rounds.{_ROUNDS}.students"), _of("open", "rounds.1.students")),
            "points",
        ),
        Claim(
            f"4. teacher after round {_ROUNDS} over round 1, epsilon 3",
            "-",
            Difference(_of("private", f"rounds.{_ROUNDS}.teacher"), _of("private", "rounds.1.teacher")),
            "points",
        ),
        Claim("accuracy: teacher after, no DP", "-", _of("open", "teacher.after"), "%"),
        Claim("accuracy: students, no DP", "-", _of("open", "student.mean"), "%"),
        Claim("accuracy: teacher after, epsilon 3", "-", _of("private", "teacher.after"), "%"),
        Claim("accuracy: students, epsilon 3", "-", _of("private", "student.mean"), "%"),
    ),
)
