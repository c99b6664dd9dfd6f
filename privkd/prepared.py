"""A run that was checked and may begin. It has neither a ledger nor a channel, so it cannot release anything.

Whoever trains a finished run's students again, replays or exports them, or forecasts a run works on this. A
simulation draws the same randomness again, so nothing new is shown and nothing more is spent.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from privkd.cloud import RULES, Cloud, PublicData
from privkd.config import Config
from privkd.data import build_scenario
from privkd.data.scenario import Scenario, public_scenario
from privkd.engines.simulation import Draws, RandomnessOf, Simulation
from privkd.errors import RunError
from privkd.messages import dealt
from privkd.models.zoo import parameter_count, torch_device
from privkd.plan import Plan, check_elsewhere, facts_of, make_plan
from privkd.plugins import load_plugins
from privkd.privacy.events import PartyId
from privkd.privacy.joint import Joint
from privkd.privacy.noise import NoiseRoot
from privkd.privacy.randomness import (
    Randomness,
    SeededRandomness,
    SystemRandomness,
    derive_seed,
    seeded_layers,
)
from privkd.progress import Progress
from privkd.records import Value, plain
from privkd.runs.checkpoint import State, load_state, load_teachers, saved
from privkd.runs.elsewhere import Elsewhere, elsewhere_of
from privkd.runs.fingerprints import check_bound, check_files
from privkd.runs.folder import RunFolder
from privkd.runs.result import NO_RECORD_DP, epsilon_text, joint_lines, taken_lines, warned
from privkd.training.dpsgd import Mechanism, seconds_per_step
from privkd.training.proof import Probe

HELD_BY_DEVICES = (
    "and holds no students: each is on its device alone, where privkd.export.export.export_model writes it; "
    "or name a simulation's folder"
)


@dataclass(frozen=True)
class Prepared:
    """The settings, the data and the plan of a run, and its two sides.

    Attributes:
        config: the settings.
        scenario: who holds what.
        plan: what the run does and costs.
        cloud: the cloud's side.
        root: where protective noise comes from in a deployment.
        elsewhere: where the devices are; ``None`` where this process plays them.
    """

    config: Config
    scenario: Scenario
    plan: Plan
    cloud: Cloud
    root: NoiseRoot
    elsewhere: Elsewhere | None = None

    @property
    def names(self) -> tuple[PartyId, ...]:
        """Who may take part, in order."""
        return self.simulation.names if self.elsewhere is None else self.elsewhere.roster

    @property
    def simulation(self) -> Simulation:
        """The devices' side."""
        return Simulation(self.scenario.devices, self.config.student, names_diverged=self.plan.rho is None)

    @property
    def simulated(self) -> bool:
        """Whether private students may be looked at, by whoever plays all devices."""
        return self.config.privacy.noise == "seeded" and self.elsewhere is None

    @property
    def mechanism(self) -> Mechanism | None:
        """DP-SGD of one round, or ``None`` where the run asks for no DP."""
        return self.cloud.mechanism

    def draws(self, round: int) -> Draws:
        """What the devices draw in ``round``."""
        return Draws(self.randomness_of(round), derive_seed(self.config.seed, "device", round))

    def randomness_of(self, round: int) -> RandomnessOf:
        """Each device's source of samples, noise and layers' draws in ``round``, by the device's name."""
        return lambda device: self._randomness(device, round)

    def _randomness(self, device: PartyId, round: int) -> Randomness:
        if self.simulated:
            return SeededRandomness(self.config.seed, "device", device, round)
        return SystemRandomness(self.root, device, round)

    def students_after(self, teachers: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
        """The devices' students after the rounds in which ``teachers`` were published, trained again.

        The same randomness is drawn, so they come out the same and show nothing new. Where every round starts
        from the teacher, the last one is all that is trained.
        """
        students: list[nn.Module] = []
        first = 0 if self.config.student.start == "own" else len(teachers) - 1
        for round, teacher in list(enumerate(teachers))[first:]:
            with seeded_layers(self.config.seed, "round", round):
                task = self.cloud.publish(teacher, round)
                starts = task.dealt(range(self.plan.devices), students)
                students = self.simulation.train(task, starts, self.draws(round), lambda done: None)
        return tuple(students)

    def last_students(self, state: State) -> tuple[nn.Module, ...]:
        """A student of each architecture, freshly distilled from the last teacher: see `personalised`."""
        return self.cloud.public_students(state.teacher, round=state.round)

    def personalised(
        self, finished: "Finished", numbers: Sequence[int], progress: Progress
    ) -> list[nn.Module]:
        """The students that the devices of ``numbers`` are left with; see `student.own_weight`.

        Each is distilled on all public inputs toward the weighted mean of its own answers and the last
        teacher's, from a student freshly distilled from that teacher: it is better than the one that the last
        round's students began from, and a device's student knows what is peculiar to the device. It is
        post-processing of what DP-SGD has paid for.

        Raises:
            TrainingError: a student's weights are not finite.
        """
        own, state = [finished.students[number] for number in numbers], finished.state
        weight = self.config.student.own_weight
        if weight == 1:
            return own
        progress.stage("students: learning from the last teacher")
        with seeded_layers(self.config.seed, "deliver"):
            shared = self.last_students(state)
            starts = [dealt(shared, number) for number in numbers]
            if weight == 0:
                return starts
            return self.simulation.part(numbers).merge(
                own,
                state.teacher,
                starts,
                self.cloud.data.inputs,
                derive_seed(self.config.seed, "deliver"),
                lambda done: progress.advance(done, len(numbers)),
            )


def prepare(config: Config, *, public: bool = False) -> Prepared:
    """The run that ``config`` describes, checked, with nothing trained, released or written.

    Args:
        config: the settings.
        public: the devices are elsewhere with their records, so that only public data are read.

    Raises:
        InputError: bad settings, plug-ins, data or models.
        BudgetError: no noise reaches the budget.
    """
    load_plugins(config.plugins)
    if public:
        check_elsewhere(config)
    RULES.check(config.reverse.aggregation)
    config.check_channel()
    deployment = config.privacy.noise == "system"
    scenario = (
        public_scenario(config.data, config.seed)
        if public
        else build_scenario(config.data, config.seed, deployment=deployment)
    ).to(torch_device(config.device))
    plan = make_plan(config, replace(facts_of(scenario), devices=config.data.devices))
    data = PublicData(scenario.public, scenario.validation, scenario.proxy, scenario.constants.vocabulary)
    probe = Probe.of(scenario.proxy, scenario.classes)
    cloud = Cloud(config, plan, data, probe, scenario.classes)
    cloud.check_models()
    return Prepared(config, scenario, plan, cloud, NoiseRoot.from_seed(config.seed))


def reopen(folder: RunFolder) -> Prepared:
    """The run in ``folder``, to go on with. One that was not begun yet is prepared like a new one.

    Raises:
        RunError: the data or the code changed since the run was started; it names what did.
        InputError: otherwise as `prepare`.
    """
    check_files(folder)
    elsewhere = elsewhere_of(folder.journal, folder.journal.path)
    prepared = replace(prepare(folder.config, public=elsewhere is not None), elsewhere=elsewhere)
    check_bound(folder, prepared.scenario)
    return prepared


def reopen_simulation(folder: RunFolder, why: str) -> Prepared:
    """The simulation in ``folder``, for whatever trains its students again or replays them.

    Args:
        folder: of the run.
        why: that cannot be done to a deployment, and what to do instead, for the message.

    Raises:
        RunError: as `reopen`; or it is a deployment.
    """
    check_simulated(folder, folder.config, why)
    return reopen(folder)


def check_simulated(folder: RunFolder, config: Config, why: str) -> None:
    """Do nothing where the run's noise comes from the seed.

    Raises:
        RunError: it is a deployment; ``why`` says what that means here.
    """
    if config.privacy.noise != "seeded":
        raise RunError(f"{folder.path} is a deployment (privacy.noise='system') {why}")


@dataclass(frozen=True)
class Finished:
    """A finished run: its last ``state``, and its devices' ``students``, which no run folder keeps."""

    state: State
    students: tuple[nn.Module, ...]


def finished(prepared: Prepared, folder: RunFolder) -> Finished:
    """The simulation in ``folder``, of whose settings ``prepared`` is, with its students trained again.

    Raises:
        RunError: the run is not finished, is damaged, or is a deployment, whose students are on their devices
            and whose noise nobody can repeat.
    """
    record = saved(folder)
    done = max(len(record.rounds) - 1, 0)
    if done < prepared.plan.rounds:
        raise RunError(
            f"{folder.path}: {done} of {prepared.plan.rounds} rounds are finished; "
            f"go on with `privkd train --resume {folder.path}`"
        )
    check_simulated(folder, prepared.config, HELD_BY_DEVICES)
    check_bound(folder, prepared.scenario)
    blank = prepared.cloud.untrained_teacher()
    state = load_state(folder, record, blank)
    return Finished(state, prepared.students_after(load_teachers(folder, record, blank)[: state.round]))


@dataclass(frozen=True)
class Forecast(Value):
    """A plan and what it takes: the student's ``parameters``, and about how many ``seconds`` the devices'
    private training would take one after the other on this machine, from one real step on made-up records.
    ``joints`` are the plan's."""

    plan: Plan
    parameters: int
    seconds: float
    joints: tuple[Joint, ...] = ()

    def tree(self) -> dict[str, Any]:
        """The JSON form."""
        found: dict[str, Any] = plain(asdict(self))
        return found

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One row, of the plan's figures."""
        figures = {
            name: value for name, value in self.tree()["plan"].items() if not isinstance(value, dict | list)
        }
        return [figures | {"parameters": self.parameters, "seconds": self.seconds}]

    def __rich__(self) -> RenderableType:
        plan = self.plan
        table = Table(title="Plan (nothing was trained, nothing was spent)", title_justify="left")
        table.add_column("what")
        table.add_column("value", justify="right")
        rows = [
            ("rounds x devices", f"{plan.rounds} x {plan.devices}"),
            ("devices that fall silent in each round", f"{plan.silent_devices}"),
            ("DP-SGD steps a round", str(plan.steps)),
            ("sampling rate", f"{plan.sampling_rate:g}"),
            ("noise multiplier", f"{plan.noise_multiplier:.4f}"),
            ("expected batch size", f"{plan.expected_batch_size:g}"),
            (f"epsilon per {plan.unit}, whole run (delta {plan.delta:g})", epsilon_text(plan.training.high)),
            (f"epsilon per device, whole run (delta {plan.delta:g})", epsilon_text(plan.device.high)),
            ("channel noise (rho per release)", "none" if plan.rho is None else f"{plan.rho:.4g}"),
            ("queries a round", str(plan.queries)),
            ("clip norm of a device's answers", f"{plan.clip_norm:.4g}"),
            ("upload per device and round", f"{plan.upload_bytes:,} bytes"),
            ("student parameters", f"{self.parameters:,}"),
            ("private training, one device after the other", f"about {self.seconds:.1f} s"),
        ]
        for row in rows + _vote_rows(plan):
            table.add_row(*row)
        remarks = [*taken_lines(plan.taken), *joint_lines(plan.persons, self.joints)]
        remarks += [NO_RECORD_DP] if math.isinf(plan.training.high) else []
        inferred = [_inferred(plan.inferred)] if plan.inferred else []
        return Group(table, *remarks, *inferred, *warned(plan.warnings))


def _inferred(constants: tuple[str, ...]) -> Text:
    said = f"Simulation: read from all records, private ones too: {', '.join(constants)}."
    return Text(f"{said} A deployment must be given them as settings under data.", style="yellow")


def _vote_rows(plan: Plan) -> list[tuple[str, str]]:
    votes = plan.votes
    if votes is None:
        return []
    noise = "none"
    if votes.sigma2 is not None and votes.threshold_sigma2 is not None:
        noise = f"{math.sqrt(votes.threshold_sigma2):.3g} / {math.sqrt(votes.sigma2):.3g}"
    return [
        ("votes for one class that make a consensus", f"{votes.threshold} of {plan.devices}"),
        ("each aggregator's noise, threshold / count (std, in votes)", noise),
    ]


def forecast(config: Config) -> Forecast:
    """What a run would do and cost. Raises as `prepare` does."""
    prepared = prepare(config)
    plan, student = prepared.plan, prepared.cloud.untrained_students()[0].cpu()
    step = seconds_per_step(
        student,
        inputs=prepared.scenario.public.inputs.cpu(),
        classes=prepared.scenario.classes,
        recipe=config.student.dp,
        batch=math.ceil(plan.expected_batch_size),
    )
    seconds = step * plan.steps * plan.rounds * plan.devices
    return Forecast(plan, parameter_count(student), seconds, plan.joints)
