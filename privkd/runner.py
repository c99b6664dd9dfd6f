"""A whole run: play it in its folder, audit it, and write its result there."""

import hashlib
import math
import time
from dataclasses import dataclass
from pathlib import Path

from privkd.config import Config
from privkd.controls import mean_accuracy, measured_devices, personal_accuracy
from privkd.data.scenario import LabelledSet
from privkd.federation import ClosingAudit, Run, run
from privkd.latency import latencies_ms
from privkd.models.zoo import parameter_count
from privkd.prepared import Finished, Prepared, finished, prepare, reopen
from privkd.progress import Progress
from privkd.result import Result, StudentResult, TeacherResult, TestSet
from privkd.runs.folder import RunFolder


def train(
    config: Config,
    folder: RunFolder,
    progress: Progress,
    *,
    resumed: bool = False,
    prepared: Prepared | None = None,
    audit: ClosingAudit | None = None,
) -> Result:
    """Run ``config`` in ``folder``, audit it, and write ``result.json`` there.

    ``prepared`` is that of ``config``, if there is one already. Raises as `prepare` and `federation.run` do;
    bounds that cross are the result's alarm.
    """
    start = time.monotonic()
    prepared = prepared or (reopen(folder) if resumed else prepare(config))
    done = run(prepared, folder, progress, resumed=resumed, audit=audit)
    left_with = _left_with(prepared, folder, done, progress)
    result = _result(done, left_with, config, folder.path, start)
    folder.write_json("result.json", result.tree())
    folder.journal.append({"step": "finished", "result": folder.digest("result.json")})
    return result


@dataclass(frozen=True)
class _LeftWith:
    """Accuracies of the students that the devices are left with: see `StudentResult`."""

    mean: float
    personal: float


def _left_with(prepared: Prepared, folder: RunFolder, done: Run, progress: Progress) -> _LeftWith:
    """NaN in a deployment, where no budget of a device covers them."""
    if not prepared.simulated:
        return _LeftWith(math.nan, math.nan)
    ended = Finished(done.state, done.students) if done.students else finished(prepared, folder)
    devices = prepared.scenario.devices
    numbers = measured_devices(len(devices))
    students = prepared.personalised(ended, numbers, progress)
    personal = personal_accuracy(students, [devices[number] for number in numbers])
    return _LeftWith(mean_accuracy(students, prepared.scenario.test), personal)


def _result(
    done: Run,
    left_with: _LeftWith,
    config: Config,
    path: Path,
    start: float,
) -> Result:
    state, controls, figures = done.state, done.controls, done.state.figures
    teacher_ms, student_ms = latencies_ms((state.teacher, done.example), (done.student, done.example))
    teacher = TeacherResult(
        before=figures[0].teacher,
        after=figures[-1].teacher,
        control=figures[-1].control,
        self_distilled=figures[-1].self_distilled,
        labels_only=figures[-1].labels_only,
        latency_ms=teacher_ms,
        parameters=parameter_count(state.teacher),
    )
    student = StudentResult(
        mean=left_with.mean,
        personal=left_with.personal,
        trained=figures[-1].students,
        direct=controls.direct,
        direct_private=controls.direct_private,
        public_only=done.public_only,
        latency_ms=student_ms,
        parameters=parameter_count(done.student),
    )
    bounds = {bound.unit: bound for bound in done.audited.bounds}
    return Result(
        run=str(path),
        seed=config.seed,
        channel=config.channel.kind,
        test=_test_set(done.test),
        teacher=teacher,
        student=student,
        ledger=tuple(
            row.model_copy(update={"lower_bound": bounds.get(row.unit)}) for row in done.ledger.statement()
        ),
        checks=done.audited.checks,
        rounds=figures,
        noise=config.privacy.noise,
        warnings=done.plan.warnings,
        taken=dict(done.plan.taken),
        seconds=time.monotonic() - start,
    )


def _test_set(test: LabelledSet) -> TestSet:
    digest = hashlib.sha256(test.inputs.cpu().numpy().tobytes())
    digest.update(test.labels.cpu().numpy().tobytes())
    return TestSet(len(test), digest.hexdigest())
