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

import torch
from torch import Tensor, nn

from privkd.channels.channel import Channel
from privkd.channels.registry import open_channel
from privkd.channels.secure import SecureOptions
from privkd.cloud import Cloud
from privkd.controls import Controls, NoDeviceTeachers, mean_accuracy, measure_controls, personal_accuracy
from privkd.data.scenario import LabelledSet
from privkd.engines.simulation import Simulation
from privkd.messages import Question, Release, Task, dealt
from privkd.plan import Plan, budgets
from privkd.prepared import Prepared
from privkd.privacy.bounds import Audited, note_audit, noted_audit
from privkd.privacy.events import PartyId, PrivacyEvent, Unit
from privkd.privacy.ledger import Charge, Ledger
from privkd.privacy.randomness import seeded_generator, seeded_layers
from privkd.privacy.votes import VoteRule, data_dependent_rdp, rdp_epsilon
from privkd.progress import Progress
from privkd.runs.checkpoint import (
    State,
    commit,
    load_state,
    load_teachers,
    saved,
)
from privkd.runs.credentials import noise_root, run_name
from privkd.runs.fingerprints import Notes, bind, check_repeats
from privkd.runs.folder import RunFolder
from privkd.runs.result import RoundFigures
from privkd.training.fit import accuracy

_SLOWLY = ", one record at a time: no faster computation gives this student's own gradients"


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
    record = saved(folder)
    ledger = Ledger.open(
        folder.ledger_path,
        budgets(prepared.config),
        must_exist=resumed and bool(record.rounds),
        at_least=record.ledger,
    )
    state = load_state(folder, record, prepared.cloud.untrained_teacher()) if record.rounds else None
    students: tuple[nn.Module, ...] = ()
    audited = noted_audit(folder.journal)
    if state is None or state.round < rounds or (audit is not None and audited is None):
        with _opened(prepared, folder, ledger, progress) as federation:
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


@contextmanager
def _opened(
    prepared: Prepared, folder: RunFolder, ledger: Ledger, progress: Progress
) -> Iterator["Federation"]:
    """The run in ``folder`` with its channel and its noise."""
    config, plan = prepared.config, prepared.plan
    root = noise_root(config, folder)
    bind(folder, prepared.scenario, root)
    options = SecureOptions.of(
        config.channel,
        run=run_name(config, folder),
        roster=prepared.simulation.names,
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
        yield Federation(replace(prepared, root=root), ledger, channel, progress, folder)


def _play_on(
    federation: "Federation", folder: RunFolder, state: State | None
) -> tuple[State, tuple[nn.Module, ...]]:
    """The rounds that are left, each committed before the next."""
    prepared, ledger = federation.prepared, federation.ledger
    seed, students = prepared.config.seed, tuple[nn.Module, ...]()
    federation.channel.start()
    if state is None:
        with seeded_layers(seed, "begin"):
            state = federation.begin()
        commit(folder, state, ledger.head)
    elif prepared.config.student.start == "own":
        blank = prepared.cloud.untrained_teacher()
        students = prepared.students_after(load_teachers(folder, saved(folder), blank)[: state.round])
        federation.check_repeated(state, students)
    for round in range(state.round, prepared.plan.rounds):
        with seeded_layers(seed, "round", round):
            state, students = federation.play(state, students)
        commit(folder, state, ledger.head)
    return state, students


@dataclass(frozen=True)
class Federation:
    """A run that releases: nothing is released but over its channel, and after its ledger was debited.

    Attributes:
        prepared: settings, data, plan, the cloud and the devices.
        ledger: where charges are booked before a release.
        channel: over which devices answer.
        progress: told of each step.
        notes: of the run's folder, by which a repeated round is known again.
    """

    prepared: Prepared
    ledger: Ledger
    channel: Channel
    progress: Progress
    notes: Notes

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
        students = self._train(task, students)
        self._stage(state.round, f"{self.prepared.config.channel.kind} channel")
        release = self._release(task.question, students)
        self._stage(state.round, "teacher: learning from the release")
        return self._learn(state, release, students), tuple(students)

    def _train(self, task: Task, before: Sequence[nn.Module]) -> list[nn.Module]:
        """Train the devices' students, charged before."""
        devices, round = self.devices, task.question.round
        if task.mechanism is not None:
            self.cloud.check_records_apart(task)
        starts = task.dealt(range(len(devices.devices)), before)
        slow = task.mechanism is not None and devices.goes_one_by_one(starts, task.mechanism)
        self._stage(round, f"training students on their devices{_SLOWLY if slow else ''}")
        self._debit(Unit.RECORD, self.prepared.plan.record_event, round)
        total = len(devices.devices)
        return devices.train(
            task, starts, self.prepared.draws(round), lambda done: self.progress.advance(done, total)
        )

    def _release(self, question: Question, students: Sequence[nn.Module]) -> Release:
        """Have the devices answer over the channel, charged before."""
        round = question.round
        names, blocks = self._answers(question, students)
        # Who falls silent is not known beforehand, so all are charged.
        self._debit(Unit.DEVICE, self.channel.event, round)
        self.ledger.post_process(
            Unit.RECORD, *self.devices.names, round=round, of="a DP-SGD student's answers"
        )
        check_repeats(self.notes, self.prepared.root, round, names, blocks)
        release = self.channel.carry(question, blocks, names)
        if self.prepared.plan.votes is not None:
            voted = torch.tensor([name in release.devices for name in names])
            self._report_votes(blocks[voted.to(blocks.device)], release, self.prepared.plan.votes)
        return release

    def _answers(
        self, question: Question, students: Sequence[nn.Module]
    ) -> tuple[tuple[PartyId, ...], Tensor]:
        """Who answers, and what: bounded, ``[device, query, class]``, before the channel."""
        config, devices = self.prepared.config, self.devices
        silence = seeded_generator(config.seed, "silence", question.round)
        present = devices.present(config.silent_devices, silence)
        blocks = devices.respond([students[number] for number in present], question)
        return tuple(devices.names[number] for number in present), blocks

    def check_repeated(self, state: State, students: Sequence[nn.Module]) -> None:
        """Refuse students that were trained again and answer otherwise than in their last round.

        They repeat that round's noise, so other ones would show what the noise had hidden.

        Raises:
            RunError: they do; nothing was released.
        """
        if state.releases:
            release, last = state.releases[-1], state.round - 1
            proxy = self.cloud.data.proxy
            queries = release.queries.to(proxy.device)
            prior, kind = release.baseline.to(proxy.device), self.prepared.config.channel.sends
            question = Question(last, queries, proxy[queries], prior, kind)
            check_repeats(self.notes, self.prepared.root, last, *self._answers(question, students))

    def _report_votes(self, votes: Tensor, release: Release, rule: VoteRule) -> None:
        """Say how many queries were answered, and in a simulation what that cost given the votes: private."""
        answered = {"answered": float(release.answers.any(-1).sum())}
        if self.prepared.simulated:
            counts = votes.cpu().sum(0).to(torch.int64).numpy()
            rdp = data_dependent_rdp(counts, rule, self.prepared.config.channel.aggregators)
            if rdp is not None:
                answered["epsilon_votes"] = rdp_epsilon(rdp, self.prepared.plan.delta)
        self.progress.figures(**answered)

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

    @property
    def devices(self) -> Simulation:
        """The devices' side."""
        return self.prepared.simulation

    def _debit(self, unit: Unit, event: PrivacyEvent, round: int) -> None:
        self.ledger.debit_all([Charge(unit, name, event, round) for name in self.devices.names])

    def _figures(
        self,
        teacher: nn.Module,
        idle: NoDeviceTeachers,
        students: Sequence[nn.Module],
        accepted: float,
        devices: int,
    ) -> RoundFigures:
        simulated, test = self.prepared.simulated, self.prepared.scenario.test
        # Nobody sees a private student in a deployment; before the first charge they are public.
        shown = simulated or not self.ledger.parties(Unit.RECORD)
        on_test = cache(lambda model: accuracy(model, test.inputs, test.labels))
        figures = RoundFigures(
            teacher=on_test(teacher),
            self_distilled=on_test(idle.self_distilled),
            labels_only=on_test(idle.labels_only),
            students=mean_accuracy(students, test) if shown else math.nan,
            accepted=accepted,
            epsilon_record=self.ledger.spent(Unit.RECORD).high,
            epsilon_device=self.ledger.spent(Unit.DEVICE).high,
            personal=personal_accuracy(students, self.devices.devices) if simulated else math.nan,
            devices=devices,
        )
        self.progress.figures(**asdict(figures))
        return figures

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
