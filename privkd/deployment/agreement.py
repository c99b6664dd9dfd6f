"""What an owner agrees to: a cloud's plan as the device computes it again, and the models as it proves them.

Nothing that a cloud wrote is believed where it can be computed: noise, price, encoding and architectures come
from the plan's settings, by this machine's own code.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from privkd.channels.registry import KINDS, known
from privkd.config import ModelConfig
from privkd.deployment.device_state import agree_to, agreed_runs, private_folder, read_ledger, run_folder
from privkd.deployment.owner import Owner
from privkd.deployment.published import PublishedPlan
from privkd.errors import BudgetError, ConfigError, RunError
from privkd.models.zoo import build, named
from privkd.plan import Plan
from privkd.privacy.accounting import upper_bound
from privkd.privacy.events import PartyId, PrivacyEvent, Unit
from privkd.records import Plain, Real, Record, Value
from privkd.training.proof import Probe

if TYPE_CHECKING:
    from rich.console import RenderableType

    from privkd.training.dpsgd import Mechanism


@dataclass(frozen=True)
class Agreement:
    """A published plan on one device.

    Attributes:
        published: as the cloud wrote it.
        proxy: its public inputs ``[record, *shape]``.
        plan: its figures, computed again.
        number: the device's place on the roster.
        encoders: what the owner offers below the models, among which the plan's are looked for.
    """

    published: PublishedPlan
    proxy: Tensor
    plan: Plan
    number: int
    encoders: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path, device: PartyId, encoders: Sequence[str] = ()) -> Self:
        """That of the two files in ``folder``. Raises as `PublishedPlan.load`, ``checked`` and ``number``."""
        published, proxy = PublishedPlan.load(folder)
        KINDS.check(published.config.channel.kind)
        return cls(published, proxy, published.checked(len(proxy)), published.number(device), tuple(encoders))

    @property
    def run(self) -> str:
        """The run's name."""
        return self.published.digest

    @cached_property
    def probe(self) -> Probe:
        """Public records on which models are proved."""
        return Probe.of(self.proxy, len(self.published.classes))

    @cached_property
    def mechanism(self) -> "Mechanism | None":
        """DP-SGD of one round; none where the run asks for no DP."""
        from privkd.training.dpsgd import Mechanism

        student, plan = self.published.config.student, self.plan
        return Mechanism.of(student, plan.noise_multiplier, plan.expected_batch_size, self.probe, plan.unit)

    def student(self) -> nn.Module:
        """A student of this device's architecture, before its weights are known."""
        models = self.published.config.student.models
        return self._built(models[self.number % len(models)], self.published.config.student.rank)

    def teacher(self) -> nn.Module:
        """Likewise, the cloud's teacher."""
        return self._built(self.published.config.teacher.model)

    def check_models(self) -> None:
        """Prove that the student can be trained privately and the teacher teaches record by record.

        Raises:
            ConfigError: an architecture is unknown.
            ModelError: one cannot be built, or mixes records.
        """
        from privkd.training.dpsgd import check_trainable
        from privkd.training.proof import check_apart

        student = self.published.config.student
        teacher = self.teacher().eval() if student.needs_teacher else None
        if teacher is not None and student.alpha and self.mechanism is not None:
            check_apart(teacher, self.probe, "teacher")
        check_trainable(
            self.student(),
            input_shape=self.published.input_shape,
            classes=len(self.published.classes),
            recipe=student.dp,
            probe=self.probe,
        )

    def _built(self, model: ModelConfig, rank: int | None = None) -> nn.Module:
        published = self.published
        return build(
            model.on(published.config.encoder),
            input_shape=published.input_shape,
            classes=len(published.classes),
            seed=0,
            vocabulary=published.scale.vocabulary,
            offered=self.encoders,
            rank=rank,
        )


class Cost(Record):
    """What a run costs one unit, at the owner's delta: ``epsilon`` of all its rounds, what other runs cost
    ``before``, what all comes to ``after``, and the ``budget`` for good."""

    unit: Unit
    epsilon: Real
    before: Real
    after: Real
    budget: Real


class Proposal(Record, Value):
    """What a plan asks of this device, in words.

    Attributes:
        run: the plan's digest, which is the run's name.
        device: this one.
        costs: for each unit.
        delta: of all of them.
        asks: what is asked, by what it is called.
        refused: why the owner's settings do not allow it; ``None`` where they do.
        agreed: whether the owner has agreed to it.
        warnings: what must be said beside the plan's figures.
    """

    run: str
    device: PartyId
    costs: tuple[Cost, ...]
    delta: Real
    asks: Mapping[str, Plain]
    refused: str | None
    agreed: bool
    warnings: tuple[str, ...]

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One for each unit."""
        return [{"run": self.run, **cost.model_dump()} for cost in self.costs]

    def __rich__(self) -> "RenderableType":
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"Run {self.run}, asked of {self.device}", title_justify="left")
        table.add_column("what")
        table.add_column("value")
        for cost in self.costs:
            table.add_row(f"epsilon per {cost.unit} (delta {self.delta:g})", _cost_text(cost))
        for name, value in self.asks.items():
            table.add_row(name, str(value))
        return Group(table, *map(Text, (self._verdict, *self.warnings)))

    @property
    def _verdict(self) -> str:
        if self.refused is not None:
            return f"Not allowed by device.toml: {self.refused}"
        if self.agreed:
            return "Agreed: this device answers the run."
        return f"Within the bounds of device.toml. To agree: privkd device agree FOLDER --digest {self.run}"


def show(owner: Owner, folder: Path) -> Proposal:
    """What the plan in ``folder`` asks of the owner's device; nothing is agreed.

    Raises:
        RunError: the plan is damaged, or its figures are not those of its settings.
        ConfigError: it makes no plan, or the device is not on its roster.
    """
    return _proposal(owner, Agreement.read(folder, owner.name, owner.encoders))


def agree(owner: Owner, folder: Path, digest: str) -> Proposal:
    """Agree to the plan of this ``digest`` in ``folder``: it is proved, copied into the state, journalled.

    Raises:
        RunError: it is another plan, damaged, or its figures are not those of its settings.
        ConfigError: a bound, a pin, or the records of ``device.toml`` do not allow it.
        BudgetError: all its rounds would overspend the owner's budget.
        ModelError: a model mixes records or cannot be trained privately.
        DataError: the records do not fit.
    """
    from privkd.deployment.own_records import own_records

    agreement = Agreement.read(folder, owner.name, owner.encoders)
    if agreement.run != digest:
        raise RunError(f"{folder} holds run {agreement.run}, not {digest}: agree to what you were shown")
    # Before any model is built, as one may be code of its own.
    owner.check(agreement.published)
    proposal = _proposal(owner, agreement)
    if proposal.refused is not None:
        raise BudgetError(proposal.refused)
    agreement.check_models()
    own_records(owner.records, agreement.published)
    private_folder(owner.state)
    copied = run_folder(owner.state, digest)
    copied.mkdir(mode=0o700, parents=True, exist_ok=True)
    agreement.published.write(copied, agreement.proxy)
    agree_to(owner, digest)
    return proposal.model_copy(update={"agreed": True})


def _proposal(owner: Owner, agreement: Agreement) -> Proposal:
    published, plan = agreement.published, agreement.plan
    costs = (
        _cost(owner, agreement.run, Unit.RECORD, [plan.training_event] * plan.rounds),
        _cost(owner, agreement.run, Unit.DEVICE, [plan.device_event] * plan.rounds),
    )
    return Proposal(
        run=agreement.run,
        device=owner.name,
        costs=costs,
        delta=owner.budget.delta,
        asks=_asks(published, plan, agreement.number),
        refused=_refusal(owner, published, costs),
        agreed=agreement.run in agreed_runs(owner),
        warnings=plan.warnings,
    )


def _cost(owner: Owner, run: str, unit: Unit, events: list[PrivacyEvent]) -> Cost:
    ledger, delta = read_ledger(owner), owner.budget.delta
    booked = () if ledger is None else ledger.charges(unit, owner.name)
    before = [charge.event for charge in booked if not charge.label.startswith(run)]
    budgets = owner.budget.budgets if ledger is None else ledger.budgets
    return Cost(
        unit=unit,
        epsilon=upper_bound(events, delta),
        before=upper_bound(before, delta),
        after=upper_bound([*before, *events], delta),
        budget=next(budget.epsilon for budget in budgets if budget.unit is unit),
    )


def _refusal(owner: Owner, published: PublishedPlan, costs: Sequence[Cost]) -> str | None:
    try:
        owner.check(published)
    except ConfigError as error:
        return str(error)
    bounds = owner.bounds
    mosts = {Unit.RECORD: bounds.max_epsilon_per_run, Unit.DEVICE: bounds.max_device_epsilon_per_run}
    for cost in costs:
        if cost.epsilon > mosts[cost.unit]:
            return (
                f"the run costs {cost.epsilon:.4g} per {cost.unit}, and a run may cost {mosts[cost.unit]:g}"
            )
        if cost.after > cost.budget:
            return f"epsilon per {cost.unit} would come to {cost.after:.4g} of {cost.budget:g} for good"
    return None


def _cost_text(cost: Cost) -> str:
    if math.isinf(cost.budget):
        return f"{cost.epsilon:.4g}, without a limit; {cost.before:.4g} spent before"
    left = max(0.0, cost.budget - cost.after)
    spent = f"{cost.before:.4g} spent before, {left:.4g} left then"
    return f"{cost.epsilon:.4g} of {cost.budget:g} for good; {spent}"


def _asks(published: PublishedPlan, plan: Plan, number: int) -> dict[str, Any]:
    config = published.config
    models = config.student.models
    return {
        "rounds": plan.rounds,
        "who sees the answers": _seen_by(published),
        "noise on the answers": "none"
        if plan.rho is None
        else f"rho {plan.rho:.4g} a release{_by(published)}",
        "noise of the training": f"multiplier {plan.noise_multiplier:.4f}, {plan.steps} steps a round",
        "answers a round": f"{plan.queries} of {len(published.classes)} classes, {config.channel.sends}",
        "student": _called(models[number % len(models)].on(config.encoder), published),
        "teacher on this device": _called(config.teacher.model.on(config.encoder), published)
        if config.student.needs_teacher
        else "not needed",
        "student left here in the end": _left_here(config.student.own_weight),
        "devices on the roster": len(published.roster),
        "nominal records a device": published.records_per_device,
        "classes": ", ".join(published.classes),
        "inputs": f"{list(published.input_shape)}, {published.constants.words}",
        "answers at multiples of": f"{published.answer_seconds:g} s",
    }


def _called(model: ModelConfig, published: PublishedPlan) -> str:
    if model.encoder is None:
        return named(model, published.input_shape, published.scale.vocabulary)
    return f"{model.name} on the encoder {model.encoder}"


def _by(published: PublishedPlan) -> str:
    channel = published.config.channel
    if not known(channel.kind).has_parties:
        return ""
    if channel.noise_from == "aggregators":
        return ", by each aggregator"
    fewest = channel.minimum_devices or len(published.roster)
    return f", if {fewest} devices add their parts honestly"


def _left_here(own_weight: float) -> str:
    if own_weight == 1:
        return "its own"
    return f"distilled from the last teacher, its own weighs {own_weight:g}; costs nothing"


def _seen_by(published: PublishedPlan) -> str:
    channel = published.config.channel
    if known(channel.kind).shows_each:
        return f"the cloud, each device's by itself ({channel.kind} channel)"
    fewest = channel.minimum_devices or len(published.roster)
    what = "votes' winners" if channel.aggregation == "votes" else "a sum"
    return f"the cloud, as {what} over at least {fewest} devices, by {channel.aggregators} aggregators"
