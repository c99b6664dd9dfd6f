"""The settings of the runs that are given a fault, by name. Each is a run of a few seconds."""

SMALL = (
    "channel.kind=plain",
    "controls=false",
    "rounds=2",
    "data.devices=3",
    "data.records_per_device=30",
    "data.device_test_records=4",
    "data.proxy_records=40",
    "teacher.model={name='mlp', width=8}",
    "teacher.fit.steps=30",
    "student.models=[{name='mlp', width=8}]",
    "student.public_fit.steps=10",
    "student.delivery_fit.steps=4",
    "student.dp.steps=3",
    "student.dp.part=all",
    "reverse.fit.steps=8",
    "reverse.tolerance=1.0",
)
OPACUS = "student.engine=opacus"
SYSTEM = "privacy.noise=system"
PERSONS = (
    "data.source=mutants.models:writers",
    "data.group=writer",
    "data.gap=none",
    "data.public_records=60",
    "data.validation_records=30",
    "data.test_records=60",
    "data.records_per_device=60",
    "privacy.unit=person",
)
SAMPLED = ("student.dp.sampling_rate=0.2", "student.dp.steps=10")
NOISED = ("channel.kind=noised", "privacy.device_epsilon=8")
SECURE = ("channel.kind=secure", "privacy.device_epsilon=8")


def _student(model: str) -> str:
    return f"student.models=[{{name='mutants.models:{model}'}}]"


CNN = "student.models=[{name='cnn', width=4}]"

SETTINGS: dict[str, tuple[str, ...]] = {
    "cohort": (),
    "cohort, system noise": (SYSTEM,),
    "cohort, sampled": SAMPLED,
    "cohort, sampled, system noise": (*SAMPLED, SYSTEM),
    "cohort, cnn": (CNN,),
    "cohort, dropout": (_student("dropping"),),
    "opacus": (OPACUS,),
    "opacus, system noise": (OPACUS, SYSTEM),
    "opacus, sampled": (OPACUS, *SAMPLED),
    "opacus, cnn": (OPACUS, CNN),
    "opacus, dropout": (OPACUS, _student("dropping")),
    "opacus, buffer": (OPACUS, _student("counting")),
    "opacus, mixing student": (OPACUS, _student("mixing")),
    "opacus, remembering student": (OPACUS, _student("remembering")),
    "cohort, mixing teacher": ("teacher.model={name='mutants.models:mixing'}",),
    "opacus, mixing teacher": (OPACUS, "teacher.model={name='mutants.models:mixing'}"),
    "autograd": (OPACUS, _student("folding")),
    "autograd, sampled": (OPACUS, _student("folding"), *SAMPLED),
    "cohort, persons": PERSONS,
    "cohort, persons, sampled": (*PERSONS, *SAMPLED),
    "opacus, persons": (OPACUS, *PERSONS),
    "noised": NOISED,
    "secure": SECURE,
    "services": (*SECURE, "channel.parties=services"),
}
UNSOUND = ("opacus, mixing student", "opacus, remembering student", "cohort, mixing teacher",
           "opacus, mixing teacher")  # fmt: skip
"""Settings that name a model which is refused: they have no sound twin."""
