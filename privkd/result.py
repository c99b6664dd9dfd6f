"""A finished run as plain figures: for the final table, for ``--json`` and for the run folder."""

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from privkd.config import Config
from privkd.controls import mean_accuracy, measured_devices, personal_accuracy
from privkd.data.scenario import LabelledSet
from privkd.errors import AuditAlarm
from privkd.federation import ClosingAudit, Run, run
from privkd.latency import latencies_ms
from privkd.models.zoo import parameter_count
from privkd.prepared import Finished, Prepared, finished, prepare, reopen
from privkd.privacy.bounds import Check, LowerBound, raise_failed
from privkd.privacy.events import Unit
from privkd.privacy.ledger import Statement
from privkd.progress import Progress
from privkd.runs.checkpoint import RoundFigures
from privkd.runs.folder import RunFolder


@dataclass(frozen=True)
class TeacherResult:
    """Accuracies on the global test set, and the time to answer one record on one CPU thread.

    ``control`` is the better of the two that learned with zero devices: ``self_distilled``, ``labels_only``.
    """

    before: float
    after: float
    control: float
    self_distilled: float
    labels_only: float
    latency_ms: float
    parameters: int


@dataclass(frozen=True)
class StudentResult:
    """Mean accuracies over the devices, 20 of them at most, on the global test set; ``personal`` on each
    device's own.

    ``mean`` and ``personal`` are of the students that the devices are left with, ``trained`` of those that
    answered in the last round. ``direct``, ``direct_private`` and ``public_only`` are the controls; ``None``,
    or NaN, was not computed.
    """

    mean: float
    personal: float
    trained: float
    direct: float | None
    direct_private: float | None
    public_only: float
    latency_ms: float
    parameters: int


@dataclass(frozen=True)
class TestSet:
    """The global test set: how many ``records``, and the SHA-256 of their inputs and labels."""

    records: int
    digest: str


@dataclass(frozen=True)
class Result:
    """What ``privkd train`` reports. ``ledger`` has one statement for each unit, never a sum.

    The ledger's epsilons are upper bounds; ``lower_bounds`` has one for each unit that was audited, and
    ``checks`` what was asked of its mechanisms beside them. ``warnings`` and ``taken`` are the plan's.
    """

    run: str
    seed: int
    channel: str
    test: TestSet
    teacher: TeacherResult
    student: StudentResult
    ledger: tuple[Statement, ...]
    lower_bounds: tuple[LowerBound, ...]
    checks: tuple[Check, ...]
    rounds: tuple[RoundFigures, ...]
    noise: str
    warnings: tuple[str, ...]
    taken: Mapping[str, str]
    seconds: float

    def lower_bound(self, unit: Unit) -> LowerBound | None:
        """That of ``unit``, if it was audited."""
        return next((bound for bound in self.lower_bounds if bound.unit is unit), None)


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
    bounds that cross are the caller's to raise, by `raise_crossed`.
    """
    start = time.monotonic()
    prepared = prepared or (reopen(folder) if resumed else prepare(config))
    done = run(prepared, folder, progress, resumed=resumed, audit=audit)
    left_with = _left_with(prepared, folder, done, progress)
    result = _result(done, left_with, config, folder.path, start)
    folder.write_json("result.json", result_tree(result))
    folder.journal.append({"step": "finished", "result": folder.digest("result.json")})
    return result


def raise_crossed(result: Result) -> None:
    """Do nothing, unless a lower bound lies above the ledger's upper bound, or a check failed.

    Raises:
        AuditAlarm: it names the unit and both bounds, or the check.
    """
    raise_failed(result.checks)
    for statement in result.ledger:
        bound = result.lower_bound(statement.unit)
        alarm = bound and bound.alarm(statement.epsilon.high, statement.delta)
        if alarm:
            raise AuditAlarm(
                f"{alarm}; do not release {result.run}, the mechanism or its accounting is broken"
            )


def result_tree(result: Result) -> dict[str, Any]:
    """The result as JSON values: infinity is ``"inf"``, what was not computed is ``null``."""
    tree = asdict(result)
    del tree["lower_bounds"]
    tree["ledger"] = {
        statement.unit.value: _statement_tree(statement, result.lower_bound(statement.unit))
        for statement in result.ledger
    }
    tree["rounds"] = [asdict(figures) for figures in result.rounds]
    return {key: plain(value) for key, value in tree.items()}


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
    return Result(
        run=str(path),
        seed=config.seed,
        channel=config.channel.kind,
        test=_test_set(done.test),
        teacher=teacher,
        student=student,
        ledger=done.ledger.statement(),
        lower_bounds=done.audited.bounds,
        checks=done.audited.checks,
        rounds=figures,
        noise=config.privacy.noise,
        warnings=done.plan.warnings,
        taken=done.plan.taken,
        seconds=time.monotonic() - start,
    )


def _test_set(test: LabelledSet) -> TestSet:
    digest = hashlib.sha256(test.inputs.cpu().numpy().tobytes())
    digest.update(test.labels.cpu().numpy().tobytes())
    return TestSet(len(test), digest.hexdigest())


def _statement_tree(statement: Statement, lower_bound: LowerBound | None) -> dict[str, Any]:
    audited = lower_bound and {
        "epsilon": lower_bound.epsilon,
        "confidence": lower_bound.confidence,
        "canaries": lower_bound.canaries,
        "path": lower_bound.path,
    }
    return {
        "epsilon": statement.epsilon.high,
        "epsilon_low": statement.epsilon.low,
        "epsilon_estimate": statement.epsilon.estimate,
        "lower_bound": audited,
        "delta": statement.delta,
        "budget": statement.budget,
        "neighbouring_relation": statement.neighbouring_relation,
        "parties": statement.parties,
        "charges": statement.charges,
        "method": statement.method,
        "reasons": list(statement.reasons),
    }


def plain(value: Any) -> Any:
    """``value`` as JSON spells it: infinities as ``"inf"``, ``"-inf"``; NaN as ``null``, tuples as lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def epsilon_of(result: Result, unit: Unit) -> float:
    """The upper bound that the run spent on ``unit``, at its worst party."""
    return next(s.epsilon.high for s in result.ledger if s.unit is unit)
