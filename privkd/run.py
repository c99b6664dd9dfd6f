"""The front door: train a run, go on with one, and load a finished one as a value."""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import RenderableType
from torch import nn

from privkd.config import Config, config_tree, load_config, parse_config
from privkd.controls import class_accuracies, mean_accuracy, measured_devices, personal_accuracy
from privkd.data.scenario import LabelledSet
from privkd.errors import InputError, RunError
from privkd.federation import ClosingAudit, Played
from privkd.federation import run as play_rounds
from privkd.models.latency import latencies_ms
from privkd.models.zoo import parameter_count
from privkd.options import put
from privkd.plugins import hand_over, name_of
from privkd.prepared import Finished, Prepared, finished, prepare, reopen
from privkd.progress import Progress, Silent
from privkd.records import Value
from privkd.runs.checkpoint import load_state, load_teachers, saved
from privkd.runs.folder import RunFolder, default_folder
from privkd.runs.result import ClassResult, Result, StudentResult, TeacherResult, TestSet, ledger_table
from privkd.secure.installed import check_channel

Factory: TypeAlias = Callable[..., nn.Module]
"""A model of the user's own: ``factory(input_shape, classes)`` gives one that was not trained yet; it maps
``[record, *input_shape]`` to logits ``[record, class]``."""
Arrays: TypeAlias = tuple[Any, Any]
"""Inputs ``[record, *shape]`` and labels ``[record]``."""
Announce: TypeAlias = Callable[[Path, Prepared], None]
"""Told where a run goes and what it will do, before it starts."""


@dataclass(frozen=True)
class Spent(Value):
    """The ledger's statement of each unit in a ``result``; units are never added."""

    result: Result

    def tree(self) -> dict[str, Any]:
        """The JSON form, as in ``result.json``."""
        return {"ledger": self.result.tree()["ledger"]}

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One row a unit."""
        rows = [statement.tree() for statement in self.result.ledger]
        return [row | {"lower_bound": (row["lower_bound"] or {}).get("epsilon")} for row in rows]

    def __rich__(self) -> RenderableType:
        return ledger_table(self.result)


@dataclass(frozen=True)
class Run(Value):
    """A finished run: its folder and its result.

    Attributes:
        path: the folder.
        config: the settings.
        result: what came out.
    """

    path: Path
    config: Config
    result: Result

    @property
    def ledger(self) -> Spent:
        """What was spent on each unit, beside what was allowed."""
        return Spent(self.result)

    @property
    def teacher(self) -> nn.Module:
        """The cloud's last model; it maps scaled inputs ``[record, *shape]`` to logits ``[record, class]``.

        Raises:
            RunError: the folder is damaged, or the data or the code changed.
        """
        with RunFolder.resume(self.path) as folder:
            like = reopen(folder).cloud.untrained_teacher()
            return load_state(folder, saved(folder), like).teacher

    @property
    def alarm(self) -> str | None:
        """See `Result.alarm`."""
        return self.result.alarm

    def tree(self) -> dict[str, Any]:
        """The JSON form: that of ``result.json``."""
        return self.result.tree()

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One row a round; the first is before any."""
        return self.result.rows()

    def __rich__(self) -> RenderableType:
        return self.result.__rich__()


def train(
    config: Config | None = None,
    *,
    data: str | Path | Arrays | Callable[[], Arrays] | None = None,
    teacher: str | Factory | None = None,
    student: str | Factory | Sequence[str | Factory] | None = None,
    channel: str | None = None,
    out: Path | str | None = None,
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> Run:
    """Play a whole run, audit it, and keep it in a folder.

    Args:
        config: the settings; the default ones where it is ``None``. What follows goes before them.
        data: as ``data.source`` names it, or the records themselves, or a function that returns them.
        teacher: as ``teacher.model.name`` names it, or a factory.
        student: as ``student.models`` names them, or factories.
        channel: as ``channel.kind`` names it.
        out: the run's folder, a new one under ``runs/`` by default.
        progress: told of every stage.
        announce: see `Announce`.

    A function or a class that another process cannot import by its name lives as long as this one: a run
    that was given one is resumed and audited where it was given again.

    Raises:
        InputError: bad settings, data or models; there is no folder then, and nothing was spent.
        BudgetError: the run would overspend.
        ChannelError: a release failed; `resume` goes on.
    """
    config = _with_objects(config or Config(), data, teacher, student, channel)
    check_channel(config.channel)
    prepared = prepare(config)
    with RunFolder.create(Path(out) if out is not None else default_folder(), config) as folder:
        if announce is not None:
            announce(folder.path, prepared)
        return _played(folder, prepared, progress or Silent())


def resume(
    path: Path | str,
    *,
    data: Arrays | Callable[[], Arrays] | None = None,
    teacher: Factory | None = None,
    student: Factory | Sequence[Factory] | None = None,
    progress: Progress | None = None,
) -> Run:
    """Go on with the run in ``path``, with the settings that it was started with.

    Args:
        path: the run's folder.
        data: what was handed over to `train` in another process.
        teacher: likewise.
        student: likewise.
        progress: told of every stage.

    Raises:
        InputError: something else is given than was handed over.
        RunError: its data or code changed, or it is damaged.
        PrivkdError: otherwise as `train`.
    """
    with RunFolder.resume(Path(path)) as folder:
        _give_again(folder.config, data, teacher, student)
        return _played(folder, None, progress or Silent())


def load(
    path: Path | str,
    *,
    data: Arrays | Callable[[], Arrays] | None = None,
    teacher: Factory | None = None,
    student: Factory | Sequence[Factory] | None = None,
) -> Run:
    """The finished run in ``path``.

    Args:
        path: the run's folder.
        data: what was handed over to `train` in another process, for whatever plays the run again.
        teacher: likewise.
        student: likewise.

    Raises:
        RunError: there is none, it is not finished, or it is damaged.
        InputError: something else is given than was handed over.
    """
    folder = Path(path)
    if not (folder / "result.json").is_file():
        raise RunError(f"{folder}: no finished run; go on with one by `privkd train --resume {folder}`")
    config = load_config(folder / "config.toml")
    _give_again(config, data, teacher, student)
    return Run(folder, config, Result.read(folder / "result.json"))


def _give_again(config: Config, data: Any, teacher: Any, student: Any) -> None:
    """Hand over what `train` was given in another process; `None` is nothing."""
    if data is not None:
        hand_over(config.data.source, _returning(data) if isinstance(data, tuple) else data)
    if teacher is not None:
        hand_over(config.teacher.model.name, teacher)
    if student is not None:
        several, models = student if isinstance(student, Sequence) else (student,), config.student.models
        if len(several) != len(models):
            raise InputError(f"{len(several)} students given again, but the run has {len(models)}")
        for model, one in zip(models, several, strict=True):
            hand_over(model.name, one)


def _with_objects(config: Config, data: Any, teacher: Any, student: Any, channel: str | None) -> Config:
    """``config`` with the names of what was handed over in its settings."""
    several = student if isinstance(student, Sequence) and not isinstance(student, str) else (student,)
    given: dict[str, Any] = {}
    if data is not None:
        arrays = isinstance(data, tuple)
        given["data.source"] = name_of(_returning(data), "records") if arrays else name_of(data, "records")
    if teacher is not None:
        given["teacher.model.name"] = name_of(teacher, "teacher")
    if student is not None:
        given["student.models"] = [name_of(one, "student") for one in several]
    if channel is not None:
        given["channel.kind"] = channel
    tree = config_tree(config)
    for setting, value in given.items():
        tree = put(tree, setting, value)
    return parse_config(tree) if given else config


def _returning(arrays: Arrays) -> Callable[[], Arrays]:
    return lambda: arrays


def _played(folder: RunFolder, prepared: Prepared | None, progress: Progress) -> Run:
    """Start ``prepared``, or go on with the folder's run where there is none."""
    # The red team stands above: it is looked up by name.
    audit: ClosingAudit = import_module("audits").closing_audit
    resumed = prepared is None
    result = train_in(folder.config, folder, progress, resumed=resumed, prepared=prepared, audit=audit)
    return Run(folder.path, folder.config, result)


def train_in(
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
    done = play_rounds(prepared, folder, progress, resumed=resumed, audit=audit)
    left_with = _left_with(prepared, folder, done, progress)
    result = _result(done, left_with, config, folder.path, start)
    classes = _by_class(prepared, folder, done)
    result = result.model_copy(update={"ran": prepared.elsewhere, "classes": classes})
    folder.write_json("result.json", result.tree())
    folder.journal.append({"step": "finished", "result": folder.digest("result.json")})
    return result


@dataclass(frozen=True)
class _LeftWith:
    """Accuracies of the students that the devices are left with: see `StudentResult`."""

    mean: float
    personal: float


def _left_with(prepared: Prepared, folder: RunFolder, done: Played, progress: Progress) -> _LeftWith:
    """NaN in a deployment, where no budget of a device covers them."""
    if not prepared.simulated:
        return _LeftWith(math.nan, math.nan)
    ended = Finished(done.state, done.students) if done.students else finished(prepared, folder)
    devices = prepared.scenario.devices
    numbers = measured_devices(len(devices))
    students = prepared.personalised(ended, numbers, progress)
    personal = personal_accuracy(students, [devices[number] for number in numbers])
    return _LeftWith(mean_accuracy(students, prepared.scenario.test), personal)


def _by_class(prepared: Prepared, folder: RunFolder, done: Played) -> tuple[ClassResult, ...]:
    """How well the teacher knows each class, before the first round and after the last."""
    test, names = done.test, prepared.scenario.labels
    blank = prepared.cloud.untrained_teacher()
    first = load_teachers(folder, saved(folder), blank)[0]
    before, after = (class_accuracies(teacher, test, len(names)) for teacher in (first, done.state.teacher))
    records = test.labels.cpu().bincount(minlength=len(names)).tolist()
    return tuple(map(ClassResult, names, records, before, after))


def _result(
    done: Played,
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
        persons=done.plan.persons,
        joints=done.plan.joints,
        seconds=time.monotonic() - start,
    )


def _test_set(test: LabelledSet) -> TestSet:
    digest = hashlib.sha256(test.inputs.cpu().numpy().tobytes())
    digest.update(test.labels.cpu().numpy().tobytes())
    return TestSet(len(test), digest.hexdigest())
