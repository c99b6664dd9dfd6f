"""READ FIRST: a whole run, as its rounds.

    publish -> train and answer -> release -> learn, and again: the better teacher teaches the next round.

Every step debits the ledger before anything private is used for a release; a budget that would be
overspent stops the run before it starts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TypeAlias

from torch import Tensor, nn

from privkd.channels.channel import Channel
from privkd.channels.registry import open_channel
from privkd.channels.secure import SecureOptions
from privkd.cloud import Cloud
from privkd.controls import Controls, NoDeviceTeachers, mean_accuracy, measure_controls, personal_accuracy
from privkd.data.scenario import LabelledSet
from privkd.errors import RunError
from privkd.fleet import Fleet, SimulatedFleet
from privkd.messages import Release, Task, dealt
from privkd.plan import Plan, budgets
from privkd.prepared import Prepared
from privkd.privacy.bounds import Audited, note_audit, noted_audit
from privkd.privacy.events import PrivacyEvent, Unit
from privkd.privacy.ledger import Charge, Ledger
from privkd.privacy.randomness import seeded_layers
from privkd.progress import Progress
from privkd.runs.checkpoint import (
    State,
    commit,
    load_state,
    load_teachers,
    saved,
)
from privkd.runs.credentials import noise_root, run_name
from privkd.runs.fingerprints import bind
from privkd.runs.folder import RunFolder
from privkd.runs.result import RoundFigures
from privkd.training.fit import accuracy


@dataclass(frozen=True)
class Played:
    """A finished run: its last state and what it is measured against.

    ``students`` are the devices', none where no round was left to play. ``public_only`` is the mean accuracy
    of the students after public distillation alone, ``student`` an untrained one, ``example`` one public
    input.
    """

    plan: Plan
    state: State
    students: tuple[nn.Module, ...]
    student: nn.Module
    example: Tensor
    public_only: float
    controls: Controls
    ledger: Ledger
    test: LabelledSet
    audited: Audited


ClosingAudit: TypeAlias = Callable[["Federation", State, Progress], Audited]
"""Audits a run that is about to end, while its channel is open."""


def run(
    prepared: Prepared,
    folder: RunFolder,
    progress: Progress,
    *,
    resumed: bool = False,
    audit: ClosingAudit | None = None,
) -> Played:
    """Play all rounds of ``prepared`` in ``folder``, or those that are left where ``resumed``, and audit it.

    A run is audited once: what came out is noted in the folder, and found there again.

    Raises:
        InputError: other data or code than the run began with, or a repeated round that comes out otherwise;
            nothing was spent or released.
        BudgetError: the run would overspend; it does not start.
        ChannelError: a release failed; resume the run to try the round again.
    """
    seed, rounds = prepared.config.seed, prepared.plan.rounds
    ledger, state = _begun(prepared, folder, resumed=resumed)
    students: tuple[nn.Module, ...] = ()
    audited = noted_audit(folder.journal)
    if state is None or state.round < rounds or (audit is not None and audited is None):
        with _opened(prepared, folder, ledger, progress, _simulated) as federation:
            if state is None or state.round < rounds:
                state, students = _play_on(federation, folder, state)
            if audit is not None:
                with seeded_layers(seed, "audit"):
                    audited = audit(federation, state, progress)
                note_audit(folder.journal, audited)
    with seeded_layers(seed, "finish"):
        done = _finish(prepared, state, students, ledger, audited or Audited(), progress)
    folder.forget_secrets()
    return done


def advance(
    prepared: Prepared,
    folder: RunFolder,
    progress: Progress,
    muster: "Muster",
    *,
    resumed: bool,
    enough: Callable[[State], bool],
) -> State:
    """Play rounds of ``prepared`` in ``folder`` with the devices of ``muster``, until it is ``enough``.

    It is asked after each round. Once all are played, `run` has nothing left to do but to measure. Raises as
    `run` does.
    """
    ledger, state = _begun(prepared, folder, resumed=resumed)
    if state is None or state.round < prepared.plan.rounds:
        with _opened(prepared, folder, ledger, progress, muster) as federation:
            state, _ = _play_on(federation, folder, state, enough)
    return state


def _begun(prepared: Prepared, folder: RunFolder, *, resumed: bool) -> tuple[Ledger, State | None]:
    """The run's ledger, and its last committed state, if there is one."""
    record = saved(folder)
    ledger = Ledger.open(
        folder.ledger_path,
        budgets(prepared.config),
        must_exist=resumed and bool(record.rounds),
        at_least=record.ledger,
    )
    if not record.rounds:
        return ledger, None
    return ledger, load_state(folder, record, prepared.cloud.untrained_teacher())


Muster: TypeAlias = Callable[[Prepared, RunFolder, Progress], Fleet]
"""Gives a run's devices, once it is known that it goes on with its own data."""


def _simulated(prepared: Prepared, folder: RunFolder, progress: Progress) -> Fleet:
    if prepared.elsewhere is not None:
        raise RunError(f"{folder.path}: its devices are elsewhere; go on with it by `privkd cloud run`")
    return SimulatedFleet(prepared, progress, folder)


@contextmanager
def _opened(
    prepared: Prepared, folder: RunFolder, ledger: Ledger, progress: Progress, muster: Muster
) -> Iterator["Federation"]:
    """The run in ``folder`` with its channel, its noise and its devices."""
    config, plan = prepared.config, prepared.plan
    root = noise_root(config, folder)
    bind(folder, prepared.scenario, root)
    prepared = replace(prepared, root=root)
    fleet, elsewhere = muster(prepared, folder, progress), prepared.elsewhere
    options = SecureOptions.of(
        config.channel,
        run=run_name(config, folder) if elsewhere is None else bytes.fromhex(elsewhere.run),
        roster=prepared.names,
        votes=plan.votes,
    )
    with open_channel(
        config.channel.kind,
        clip_norm=plan.clip_norm,
        root=root,
        rho=plan.rho,
        aggregators=config.channel.aggregators,
        deadline=config.channel.deadline,
        options=options,
    ) as channel:
        yield Federation(prepared, ledger, channel, progress, fleet)


def _never(state: State) -> bool:
    return False


def _play_on(
    federation: "Federation",
    folder: RunFolder,
    state: State | None,
    enough: Callable[[State], bool] = _never,
) -> tuple[State, tuple[nn.Module, ...]]:
    """The rounds that are left, each committed before the next, until it is ``enough``."""
    prepared, ledger = federation.prepared, federation.ledger
    seed, students = prepared.config.seed, tuple[nn.Module, ...]()
    federation.channel.start()
    if state is None:
        with seeded_layers(seed, "begin"):
            state = federation.begin()
        commit(folder, state, ledger.head)
    elif prepared.config.student.start == "own":
        blank = prepared.cloud.untrained_teacher()
        teachers = load_teachers(folder, saved(folder), blank)[: state.round]
        students = federation.fleet.again(state, teachers)
    for round in range(state.round, prepared.plan.rounds):
        with seeded_layers(seed, "round", round):
            state, students = federation.play(state, students)
        commit(folder, state, ledger.head)
        if enough(state):
            break
    return state, students


@dataclass(frozen=True)
class Federation:
    """A run that releases: nothing is released but over its channel, and after its ledger was debited.

    Attributes:
        prepared: settings, data, plan, the cloud and the devices.
        ledger: where charges are booked before a release.
        channel: over which devices answer.
        progress: told of each step.
        fleet: the devices.
    """

    prepared: Prepared
    ledger: Ledger
    channel: Channel
    progress: Progress
    fleet: Fleet

    def begin(self) -> State:
        """Train the teacher on public data, and look at the first students that are distilled from it."""
        self.progress.stage("teacher: training on public data")
        teacher = self.cloud.trained_teacher()
        idle, public = NoDeviceTeachers(teacher, teacher), self.cloud.public_students(teacher, round=0)
        students = [dealt(public, number) for number in range(self.prepared.plan.devices)]
        return State(teacher, idle, (), (self._figures(teacher, idle, students, 1.0, 0),))

    def play(self, state: State, students: Sequence[nn.Module] = ()) -> tuple[State, tuple[nn.Module, ...]]:
        """One round, in which devices go on from their ``students`` where they do not begin anew."""
        self._stage(state.round, "distilling students on public data")
        task = self.cloud.publish(state.teacher, state.round)
        if task.mechanism is not None:
            self.cloud.check_records_apart(task)
        release, trained = self._release(task, students)
        self._stage(state.round, "teacher: learning from the release")
        return self._learn(state, release, trained), trained

    def _release(self, task: Task, students: Sequence[nn.Module]) -> tuple[Release, tuple[nn.Module, ...]]:
        """Have the devices answer over the channel; what it costs is booked before any of them is asked."""
        round = task.question.round
        # Who falls silent is not known beforehand, so all are charged.
        unit = self.prepared.plan.unit
        self._debit(unit, self.prepared.plan.training_event, round)
        self._debit(Unit.DEVICE, self.channel.event, round)
        self.ledger.post_process(unit, *self.fleet.names, round=round, of="a DP-SGD student's answers")
        return self.fleet.release(task, students, self.channel)

    def _learn(self, state: State, release: Release, students: Sequence[nn.Module]) -> State:
        """The cloud after the round."""
        releases = (*state.releases, release)
        targets = self.cloud.targets(state.teacher, releases)
        update = self.cloud.update(state.teacher, targets, state.round)
        idle = state.no_devices.after(self.cloud, targets.queries, state.round)
        figures = self._figures(update.teacher, idle, students, update.accepted, len(release.devices))
        return State(update.teacher, idle, releases, (*state.figures, figures))

    @property
    def cloud(self) -> Cloud:
        """The cloud's side."""
        return self.prepared.cloud

    def _debit(self, unit: Unit, event: PrivacyEvent, round: int) -> None:
        self.ledger.debit_all([Charge(unit, name, event, round) for name in self.fleet.names])

    def _figures(
        self,
        teacher: nn.Module,
        idle: NoDeviceTeachers,
        students: Sequence[nn.Module],
        accepted: float,
        devices: int,
    ) -> RoundFigures:
        simulated, scenario = self.prepared.simulated, self.prepared.scenario
        test = scenario.test
        # Nobody sees a private student in a deployment; before the first charge they are public.
        shown = simulated or not self.ledger.parties(self.prepared.plan.unit)
        on_test = cache(lambda model: accuracy(model, test.inputs, test.labels))
        figures = RoundFigures(
            teacher=on_test(teacher),
            self_distilled=on_test(idle.self_distilled),
            labels_only=on_test(idle.labels_only),
            students=mean_accuracy(students, test) if shown else math.nan,
            accepted=accepted,
            epsilon_record=self._spent(Unit.RECORD),
            epsilon_person=self._spent(Unit.PERSON),
            epsilon_device=self.ledger.spent(Unit.DEVICE).high,
            personal=personal_accuracy(students, scenario.devices) if simulated else math.nan,
            devices=devices,
        )
        self.progress.figures(**asdict(figures))
        return figures

    def _spent(self, unit: Unit) -> float:
        """NaN where the run protects another unit."""
        return self.ledger.spent(unit).high if unit is self.prepared.plan.unit else math.nan

    def _stage(self, round: int, what: str) -> None:
        self.progress.stage(f"round {round + 1} of {self.prepared.plan.rounds}: {what}")


def _finish(
    prepared: Prepared,
    state: State,
    students: tuple[nn.Module, ...],
    ledger: Ledger,
    audited: Audited,
    progress: Progress,
) -> Played:
    """Measure the controls beside the finished rounds."""
    scenario, fresh = prepared.scenario, prepared.cloud.untrained_students()
    controls = Controls(None, None)
    if prepared.simulated and prepared.config.controls:
        controls = measure_controls(
            prepared.simulation,
            [dealt(fresh, number) for number in range(prepared.plan.devices)],
            prepared.mechanism,
            rounds=prepared.plan.rounds,
            test=scenario.test,
            seed=prepared.config.seed,
            progress=progress,
        )
    return Played(
        prepared.plan,
        state,
        students,
        student=fresh[0],
        example=scenario.public.inputs[:1],
        public_only=state.figures[0].students,
        controls=controls,
        ledger=ledger,
        test=scenario.test,
        audited=audited,
    )
