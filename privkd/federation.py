"""READ FIRST: a whole run, as its rounds.

    publish -> students -> channel -> absorb, and again: the better teacher teaches the next round.

Every step debits the ledger before anything private is used for a release; a budget that would be
overspent stops the run before it starts.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privkd.channels.channel import Channel, PlainChannel, Release, open_channel
from privkd.cloud import (
    RULES,
    Absorbed,
    PublicData,
    absorb,
    bounded_answers,
    choose_queries,
    distil_public,
    targets_of,
    train_teacher,
)
from privkd.config import ModelConfig, RunConfig
from privkd.controls import Controls, ZeroDevices, mean_accuracy, measure_controls, personal_accuracy
from privkd.credentials import noise_root, service_options
from privkd.data import build_scenario
from privkd.data.scenario import LabelledSet, Scenario
from privkd.engines.simulation import Fleet, RandomnessOf
from privkd.models.zoo import build, torch_device
from privkd.plan import Plan, budgets, facts_of, make_plan
from privkd.plugins import load_plugins
from privkd.privacy.bounds import Audited, note_audit, noted_audit
from privkd.privacy.events import PartyId, PrivacyEvent, Unit
from privkd.privacy.ledger import Charge, Ledger
from privkd.privacy.noise import NoiseRoot
from privkd.privacy.randomness import (
    Randomness,
    SeededRandomness,
    SystemRandomness,
    derive_seed,
    seeded_generator,
    seeded_layers,
)
from privkd.privacy.votes import VoteRule, data_dependent_rdp, rdp_epsilon
from privkd.progress import Progress, Silent
from privkd.runs.checkpoint import (
    RoundFigures,
    State,
    Wire,
    commit,
    load_state,
    load_teachers,
    saved,
)
from privkd.runs.fingerprints import UNKEPT, Notes, bind, check_repeats
from privkd.runs.folder import RunFolder
from privkd.training.dpsgd import Mechanism, check_records_apart, check_trainable, quieted
from privkd.training.fit import accuracy, logits_of
from privkd.training.proof import Probe, check_apart

_SLOWLY = ", one record at a time: no faster computation gives this student's own gradients"


@dataclass(frozen=True)
class Run:
    """A finished run: its last state and what it is measured against.

    ``public_only`` is the mean accuracy of the students after public distillation alone, ``student`` an
    untrained one, ``example`` one public input.
    """

    plan: Plan
    state: State
    student: nn.Module
    example: Tensor
    public_only: float
    controls: Controls
    ledger: Ledger
    test: LabelledSet
    audited: Audited


ClosingAudit: TypeAlias = Callable[["Game", State, Progress], Audited]
"""Audits a run that is about to end, while its channel is open."""


def run(
    game: "Game",
    folder: RunFolder,
    progress: Progress,
    *,
    resumed: bool = False,
    audit: ClosingAudit | None = None,
) -> Run:
    """Play all rounds of ``game`` in ``folder``, from the last committed one where ``resumed``, and audit it.

    A run is audited once: what came out is noted in the folder, and found there again.

    Raises:
        InputError: other data or code than the run began with, or a repeated round that comes out otherwise;
            nothing was spent or released.
        BudgetError: the run would overspend; it does not start.
        ChannelError: a release failed; resume the run to try the round again.
    """
    config = game.config
    record = saved(folder)
    ledger = Ledger.open(
        folder.ledger_path,
        budgets(config),
        must_exist=resumed and bool(record.rounds),
        at_least=record.ledger,
    )
    game = replace(game, ledger=ledger, progress=progress)
    state = load_state(folder, record, game.blank()[0]) if record.rounds else None
    audited = noted_audit(folder.journal)
    if state is None or state.round < game.plan.rounds or (audit is not None and audited is None):
        with _opened(game, folder) as game:
            if state is None or state.round < game.plan.rounds:
                state = _play_on(game, folder, state)
            if audit is not None:
                with seeded_layers(config.seed, "audit"):
                    audited = audit(game, state, progress)
                note_audit(folder.journal, audited)
    with seeded_layers(config.seed, "finish"):
        finished = game.finish(state, audited or Audited())
    folder.forget_secrets()
    return finished


@contextmanager
def _opened(game: "Game", folder: RunFolder) -> Iterator["Game"]:
    """``game`` with the channel and the noise of the run in ``folder``."""
    config, plan = game.config, game.plan
    root = noise_root(config, folder)
    bind(folder, game.scenario, root)
    with open_channel(
        config.channel.kind,
        clip_norm=plan.clip_norm,
        root=root,
        rho=plan.rho,
        aggregators=config.channel.aggregators,
        deadline=config.channel.deadline,
        services=service_options(config, folder, game.fleet.names, plan.votes),
    ) as channel:
        yield replace(game, channel=channel, root=root, notes=folder)


def _play_on(game: "Game", folder: RunFolder, state: State | None) -> State:
    """The rounds that are left, each committed before the next."""
    config, plan = game.config, game.plan
    game.channel.start()
    if state is None:
        with seeded_layers(config.seed, "begin"):
            state = game.begin()
        commit(folder, state, game.ledger.head)
    elif config.student.start == "own":
        published = load_teachers(folder, saved(folder), game.blank()[0])[: state.round]
        state = replace(state, students=game.students_after(published))
        game.check_repeated(state)
    for round in range(state.round, plan.rounds):
        with seeded_layers(config.seed, "round", round):
            state = game.play(state)
        commit(folder, state, game.ledger.head)
    return state


def open_game(config: RunConfig) -> "Game":
    """The run that ``config`` describes, checked, with nothing trained, released or written.

    Raises:
        InputError: bad settings, plug-ins, data or models.
        BudgetError: no noise reaches the budget.
    """
    load_plugins(config.plugins)
    RULES.check(config.reverse.aggregation)
    device = torch_device(config.device)
    deployment = config.privacy.noise == "system"
    scenario = build_scenario(config.data, config.seed, deployment=deployment).to(device)
    plan = make_plan(config, facts_of(scenario))
    channel = PlainChannel(plan.clip_norm)
    root = NoiseRoot.from_seed(config.seed)
    probe = Probe.of(scenario.proxy, scenario.classes)
    game = Game(config, scenario, plan, Ledger(None, budgets(config)), channel, root, Silent(), probe)
    game.check_models()
    return game


@dataclass(frozen=True)
class Game:
    """The rounds. One method is one step; ``play`` reads like the paper."""

    config: RunConfig
    scenario: Scenario
    plan: Plan
    ledger: Ledger
    channel: Channel
    root: NoiseRoot
    progress: Progress
    probe: Probe
    notes: Notes = UNKEPT
    _distilled: dict[int, tuple[nn.Module, RunConfig, list[nn.Module]]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def begin(self) -> State:
        """Train the teacher on public data, and distil a first student from it."""
        self.progress.stage("teacher: training on public data")
        teacher, _ = self.blank()
        generator = self._generator("teacher")
        teacher = train_teacher(teacher, self.scenario.public, self.config.teacher.fit, generator)
        students = tuple(self.fleet.dealt(self.public_students(teacher, round=0)))
        idle = ZeroDevices(teacher, teacher)
        return State(teacher, idle, students, (), (self._figures(teacher, idle, students, 1.0, 0),))

    def play(self, state: State) -> State:
        """One round."""
        students = self._train_students(state.teacher, state.students, state.round)
        wire = self._release(state, students)
        wires = (*state.wires, wire)
        absorbed, idle = self._absorb(state, wires)
        figures = self._figures(absorbed.teacher, idle, students, absorbed.accepted, len(wire.devices))
        return State(absorbed.teacher, idle, tuple(students), wires, (*state.figures, figures))

    def students_after(self, teachers: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
        """The devices' students after the rounds in which ``teachers`` were published, trained again.

        A resumed run draws the same randomness, so they come out the same and show nothing new. Where every
        round starts from the teacher, the last one is all that is trained.
        """
        students: Sequence[nn.Module] = ()
        first = 0 if self.config.student.start == "own" else len(teachers) - 1
        for round, teacher in list(enumerate(teachers))[first:]:
            with seeded_layers(self.config.seed, "round", round):
                students = self._train_students(teacher, students, round)
        return tuple(students)

    def _train_students(self, teacher: nn.Module, before: Sequence[nn.Module], round: int) -> list[nn.Module]:
        self._stage(round, "distilling students on public data")
        # Before the first round the same students were distilled already, unless the run was resumed there.
        go_on = bool(before) and (round == 0 or self.config.student.start == "own")
        starts = before if go_on else self.fleet.dealt(self.public_students(teacher, round=round))
        mechanism = self.mechanism
        if mechanism is not None:
            self._check_records_apart(teacher, () if go_on and round else starts)
        slow = mechanism is not None and self.fleet.goes_one_by_one(starts, mechanism)
        self._stage(round, f"training students on their devices{_SLOWLY if slow else ''}")
        targets = self.fleet.teach(teacher)
        self._debit(Unit.RECORD, self.plan.record_event, round)
        total = len(self.fleet.devices)
        if mechanism is None:
            return self.fleet.fit(
                starts,
                targets,
                self.config.student.private_fit,
                derive_seed(self.config.seed, "device", round),
                lambda done: self.progress.advance(done, total),
            )
        return self.fleet.train_private(
            starts,
            targets,
            mechanism,
            self.randomness_of(round),
            lambda done: self.progress.advance(done, total),
        )

    def _check_records_apart(self, teacher: nn.Module, public: Sequence[nn.Module]) -> None:
        """Prove once more, at this round's weights, that neither the teacher nor the students mix records.

        ``public``: students as the public distillation left them.
        """
        if self.config.student.alpha:
            check_apart(copy.deepcopy(teacher).eval(), self.probe, "teacher")
        for student in {id(student): student for student in public}.values():
            check_records_apart(student, self.config.student.dp.part, self.probe)

    def _release(self, state: State, students: Sequence[nn.Module]) -> Wire:
        self._stage(state.round, f"{self.config.channel.kind} channel")
        proxy = self.scenario.proxy
        teacher_logits = logits_of(state.teacher, proxy)
        queries = choose_queries(
            teacher_logits,
            self.plan.queries,
            self.config.reverse.selection,
            self._generator("queries", state.round),
        )
        prior = F.softmax(teacher_logits[queries], dim=-1)
        names, answers = self._answers(students, queries, prior, state.round)
        # Who falls silent is not known beforehand, so all are charged.
        self._debit(Unit.DEVICE, self.channel.event, state.round)
        self.ledger.post_process(
            Unit.RECORD, *self.fleet.names, round=state.round, of="a DP-SGD student's answers"
        )
        check_repeats(self.notes, self.root, state.round, names, answers)
        release = self.channel.release(answers, devices=names, round=state.round)
        if self.plan.votes is not None:
            voted = torch.tensor([name in release.devices for name in names])
            self._report_votes(answers[voted.to(answers.device)], release, self.plan.votes)
        baseline = prior.cpu() if self.config.channel.sends == "residuals" else torch.zeros(prior.shape)
        return Wire(queries, release.answers, baseline, release.noise_std, release.devices)

    def _answers(
        self, students: Sequence[nn.Module], queries: Tensor, prior: Tensor, round: int
    ) -> tuple[tuple[PartyId, ...], Tensor]:
        """Who answers in ``round``, and what: bounded, ``[device, query, class]``, before the channel."""
        silence = self._generator("silence", round)
        present = self.fleet.present(self.config.silent_devices, silence)
        logits = self.fleet.answer([students[number] for number in present], self.scenario.proxy[queries])
        names = tuple(self.fleet.names[number] for number in present)
        return names, bounded_answers(logits, prior, self.config.channel.sends)

    def check_repeated(self, state: State) -> None:
        """Refuse students that were trained again and answer otherwise than in their last round.

        They repeat that round's noise, so other ones would show what the noise had hidden.

        Raises:
            RunError: they do; nothing was released.
        """
        if state.wires:
            wire, last = state.wires[-1], state.round - 1
            place = self.scenario.proxy.device
            queries, prior = wire.queries.to(place), wire.baseline.to(place)
            check_repeats(self.notes, self.root, last, *self._answers(state.students, queries, prior, last))

    def _report_votes(self, votes: Tensor, release: Release, rule: VoteRule) -> None:
        """Say how many queries were answered, and in a simulation what that cost given the votes: private."""
        answered = {"answered": float(release.answers.any(-1).sum())}
        if self.simulated:
            counts = votes.cpu().sum(0).to(torch.int64).numpy()
            rdp = data_dependent_rdp(counts, rule, self.config.channel.aggregators)
            if rdp is not None:
                answered["epsilon_votes"] = rdp_epsilon(rdp, self.plan.delta)
        self.progress.figures(**answered)

    def _absorb(self, state: State, wires: Sequence[Wire]) -> tuple[Absorbed, ZeroDevices]:
        self._stage(state.round, "teacher: learning from the release")
        prior = F.softmax(logits_of(state.teacher, self.scenario.proxy), dim=-1)
        reverse = self.config.reverse
        targets = targets_of([wire.knowledge(reverse.aggregation) for wire in wires], prior, reverse)
        batches = partial(self._generator, "absorb", state.round)
        absorbed = absorb(state.teacher, targets, self.data, reverse, batches())
        return absorbed, state.zero_devices.after(targets.queries, self.data, reverse, batches)

    def finish(self, state: State, audited: Audited) -> Run:
        """Measure the controls beside the finished rounds."""
        _, fresh = self.blank()
        controls = (
            measure_controls(
                self.fleet,
                fresh,
                self.mechanism,
                rounds=self.plan.rounds,
                test=self.scenario.test,
                seed=self.config.seed,
                progress=self.progress,
            )
            if self.simulated and self.config.controls
            else Controls(None, None)
        )
        return Run(
            self.plan,
            state,
            student=fresh[0],
            example=self.scenario.public.inputs[:1],
            public_only=state.figures[0].students,
            controls=controls,
            ledger=self.ledger,
            test=self.scenario.test,
            audited=audited,
        )

    def blank(self) -> tuple[nn.Module, list[nn.Module]]:
        """An untrained teacher, and an untrained student for each device."""
        return self._build(self.config.teacher.model, "teacher"), self.fleet.dealt(self._fresh_students())

    def check_models(self) -> None:
        """Prove that the teacher can be built and every student trained privately, before anything is spent.

        Raises:
            ConfigError: a name is unknown.
            ModelError: a model cannot be built, or a layer is unsupported; the message names the cure.
        """
        teacher = self._build(self.config.teacher.model, "teacher")
        if self.config.student.alpha and self.mechanism is not None:
            check_apart(teacher.eval(), self.probe, "teacher")
        for student in self._fresh_students():
            check_trainable(
                student,
                input_shape=self.scenario.input_shape,
                classes=self.scenario.classes,
                recipe=self.config.student.dp,
                probe=self.probe,
            )

    @property
    def fleet(self) -> Fleet:
        """The devices."""
        return Fleet(self.scenario.devices, self.config.student, names_diverged=self.plan.rho is None)

    @property
    def data(self) -> PublicData:
        """All that the cloud holds."""
        return PublicData(self.scenario.public, self.scenario.validation, self.scenario.proxy)

    @property
    def mechanism(self) -> Mechanism | None:
        """DP-SGD of one round, or ``None`` where the run asks for no DP."""
        if self.plan.noise_multiplier == 0:
            return None
        plan = self.plan
        return Mechanism(
            quieted(self.config.student.dp, plan.noise_multiplier, plan.expected_batch_size),
            plan.noise_multiplier,
            plan.expected_batch_size,
            self.config.student.alpha,
            self.config.student.temperature,
            self.probe,
        )

    def _build(self, model: ModelConfig, *purpose: str | int) -> nn.Module:
        seed = derive_seed(self.config.seed, "init", *purpose)
        built = build(model, input_shape=self.scenario.input_shape, classes=self.scenario.classes, seed=seed)
        return built.to(self.scenario.proxy.device)

    def _fresh_students(self) -> list[nn.Module]:
        models = self.config.student.models[: len(self.scenario.devices)]
        return [self._build(model, "student", number) for number, model in enumerate(models)]

    def public_students(self, teacher: nn.Module, *, round: int) -> list[nn.Module]:
        """A student of each architecture, distilled on public data from the ``teacher`` of ``round``.

        The last ones are kept for who asks again.
        """
        known = self._distilled.get(round)
        if known is not None and known[0] is teacher and known[1] is self.config:
            return copy.deepcopy(known[2])
        with seeded_layers(self.config.seed, "distil", round):
            students = [
                distil_public(
                    student,
                    teacher,
                    self.data,
                    self.config.student.temperature,
                    self.config.student.public_fit,
                    self._generator("distil", round, number),
                )
                for number, student in enumerate(self._fresh_students())
            ]
        self._distilled.clear()
        self._distilled[round] = (teacher, self.config, students)
        return copy.deepcopy(students)

    def _debit(self, unit: Unit, event: PrivacyEvent, round: int) -> None:
        self.ledger.debit_all([Charge(unit, name, event, round) for name in self.fleet.names])

    def randomness_of(self, round: int) -> RandomnessOf:
        """Each device's source of samples, noise and layers' draws in ``round``, by the device's name."""
        return lambda device: self._randomness(device, round)

    def _randomness(self, device: PartyId, round: int) -> Randomness:
        if self.config.privacy.noise == "system":
            return SystemRandomness(self.root, device, round)
        return SeededRandomness(self.config.seed, "device", device, round)

    def _generator(self, *purpose: str | int) -> torch.Generator:
        return seeded_generator(self.config.seed, *purpose)

    def _figures(
        self,
        teacher: nn.Module,
        idle: ZeroDevices,
        students: Sequence[nn.Module],
        accepted: float,
        devices: int,
    ) -> RoundFigures:
        test = self.scenario.test
        # Nobody sees a private student in a deployment; before the first charge they are public.
        shown = self.simulated or not self.ledger.parties(Unit.RECORD)
        on_test = cache(lambda model: accuracy(model, test.inputs, test.labels))
        figures = RoundFigures(
            teacher=on_test(teacher),
            self_distilled=on_test(idle.self_distilled),
            labels_only=on_test(idle.labels_only),
            students=mean_accuracy(students, test) if shown else math.nan,
            accepted=accepted,
            epsilon_record=self.ledger.spent(Unit.RECORD).high,
            epsilon_device=self.ledger.spent(Unit.DEVICE).high,
            personal=personal_accuracy(students, self.scenario.devices) if self.simulated else math.nan,
            devices=devices,
        )
        self.progress.figures(**asdict(figures))
        return figures

    @property
    def simulated(self) -> bool:
        """Whether noise is drawn from the seed, and so protects nobody."""
        return self.config.privacy.noise == "seeded"

    def _stage(self, round: int, name: str) -> None:
        self.progress.stage(f"round {round + 1} of {self.plan.rounds}: {name}")
