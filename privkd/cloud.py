"""The cloud: train a teacher on public data, learn from what a channel released, and roll back what harms.

All of this acts on public inputs, the teacher, or releases: it is post-processing and costs nothing.

Where the cloud sees each device's answers, a rule that a hostile device cannot move far makes one answer a
query of them. A device that follows the protocol sends rows of probabilities, of L2 norm at most 1, and
perhaps noise on them; a hostile one sends anything. A block with an entry that is not finite counts for
nothing, under every rule. Of ``n`` devices, a hostile one moves an entry of the ``mean`` at will, of the
``clipped_mean`` (each row clipped to the longest honest norm) by at most ``2 / n`` where there is no noise,
and a share of the ``votes`` by at most ``1 / n``. The coordinate-wise ``median`` (Yin et al. 2018) stays
between honest answers as long as fewer than half of the devices are hostile.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privkd.config import Config, FitConfig, ModelConfig, ReverseConfig
from privkd.data.scenario import LabelledSet
from privkd.errors import ChannelError, InputError, ModelError
from privkd.messages import Question, Release, Task
from privkd.models.features import Parted
from privkd.models.zoo import build
from privkd.plan import Plan
from privkd.plugins import Registry
from privkd.privacy.randomness import derive_seed, seeded_generator, seeded_layers
from privkd.training.dpsgd import Mechanism, check_records_apart, check_trainable
from privkd.training.fit import accuracy, fit, logits_of
from privkd.training.losses import ReverseWeights, divergence, reverse_loss, soft_targets
from privkd.training.proof import Probe, check_apart


def choose_queries(
    teacher_logits: Tensor, count: int, selection: Literal["uncertain", "random"], generator: torch.Generator
) -> Tensor:
    """Indices of ``count`` proxy records to ask about, ascending, int64 ``[query]``.

    ``uncertain`` takes those of the highest entropy of the teacher's answer, a public and free criterion;
    ties fall to the lower index.
    """
    count = min(count, len(teacher_logits))
    if selection == "random":
        order = torch.randperm(len(teacher_logits), generator=generator)
    else:
        log_probabilities = F.log_softmax(teacher_logits, dim=-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
        order = entropy.argsort(descending=True, stable=True).cpu()
    return order[:count].sort().values


def project_on_simplex(points: Tensor) -> Tensor:
    """Nearest probability vectors in L2, over the last axis (Duchi et al. 2008, Figure 1)."""
    # The projection does not change along (1, ..., 1), and near 0 a unit is not lost beside huge values.
    points = points - points.amax(-1, keepdim=True)
    ordered = points.sort(dim=-1, descending=True).values
    ranks = torch.arange(1, points.shape[-1] + 1, device=points.device, dtype=points.dtype)
    excess = (ordered.cumsum(-1) - 1) / ranks
    support = (ordered > excess).sum(-1, keepdim=True)
    threshold = excess.gather(-1, support - 1)
    return (points - threshold).clamp_(min=0)


def shrink(noisy: Tensor, prior: Tensor, noise_variance: Tensor) -> Tensor:
    """Posterior mean of the true mean answer, given the known noise variance.

    Entries are modelled as ``true ~ N(prior, v)`` and ``noisy ~ N(true, noise_variance)``; ``v`` is
    estimated from the release itself by its second moment (empirical Bayes, Efron & Morris 1973).

    Args:
        noisy: ``[query, class]``.
        prior: the teacher's probabilities ``[query, class]``.
        noise_variance: ``[query]``, public.
    """
    difference = noisy - prior
    if not len(noisy):
        return prior
    variance = (difference.square().mean() - noise_variance.mean()).clamp(min=0)
    kept = variance / (variance + noise_variance).clamp(min=1e-12)
    return prior + kept[:, None] * difference


@dataclass(frozen=True)
class Targets:
    """What the teacher is asked to learn.

    Attributes:
        queries: proxy indices, int64 ``[query]``.
        probabilities: to learn, ``[query, class]``.
        weights: of each query, in [0, 1], ``[query]``.
        prior: what the teacher answers before, ``[query, class]``.
    """

    queries: Tensor
    probabilities: Tensor
    weights: Tensor
    prior: Tensor


def targets_of(buffer: Sequence[Release], prior: Tensor, config: ReverseConfig) -> Targets:
    """Combine the releases in ``buffer``, oldest first, into targets.

    Of each release the devices' answers are aggregated first: see `aggregate`, which raises. Per query the
    releases are averaged with weights ``memory ** age``, shrunk toward ``prior`` by the known noise variance,
    projected on the simplex, and only then sharpened: sharpening first would amplify the noise.

    Args:
        buffer: at least one release.
        prior: the teacher's probabilities on the whole proxy set ``[proxy, class]``.
        config: memory, sharpening and trust.

    Returns:
        Targets on the queries that were answered; none where nothing was.
    """
    total = torch.zeros(len(prior), dtype=torch.float64)
    sums = torch.zeros(prior.shape, dtype=torch.float64)
    variances = torch.zeros(len(prior), dtype=torch.float64)
    for age, release in zip(range(len(buffer) - 1, -1, -1), buffer, strict=True):
        weight = config.memory**age
        found = aggregate(release.answers + release.baseline, release.noise_std, config.aggregation)
        answered = (found.answers != 0).any(-1)
        queries = release.queries[answered]
        total[queries] += weight
        sums[queries] += weight * found.answers[answered]
        variances[queries] += (weight * found.noise_std) ** 2
    queries = torch.nonzero(total > 0).flatten()
    noise_variance = variances[queries] / total[queries].square()
    prior_there = prior.to("cpu", torch.float64)[queries]
    means = sums[queries] / total[queries, None]
    consensus = project_on_simplex(shrink(means, prior_there, noise_variance))
    weights = trust(consensus, prior_there, noise_variance.sqrt(), config)
    # Relative to the first choice, so that no power of it vanishes.
    sharpened = (consensus / consensus.amax(-1, keepdim=True)) ** config.sharpen
    sharpened = sharpened / sharpened.sum(-1, keepdim=True)
    return Targets(queries, sharpened.to(prior), weights.to(prior), prior[queries.to(prior.device)])


def trust(consensus: Tensor, prior: Tensor, noise_std: Tensor, config: ReverseConfig) -> Tensor:
    """1 where a target is worth learning, else 0, ``[query]``.

    Not learned: a consensus whose margin drowns in noise, and what the teacher already answers alike
    with ``confident`` probability.
    """
    best = consensus.topk(2, dim=-1).values
    clear = best[:, 0] - best[:, 1] >= config.margin * noise_std
    agrees = consensus.argmax(-1) == prior.argmax(-1)
    known = agrees & (prior.amax(-1) >= config.confident) & (config.confident < 1)
    return (clear & ~known).to(consensus.dtype)


@dataclass(frozen=True)
class PublicData:
    """All that the cloud holds: labelled ``train`` and ``validation``, and the unlabelled ``proxy``
    ``[query, *shape]``; inputs are token ids below ``vocabulary``, or numbers where that is ``None``."""

    train: LabelledSet
    validation: LabelledSet
    proxy: Tensor
    vocabulary: int | None = None

    @property
    def inputs(self) -> Tensor:
        """All public inputs on which a student is distilled, ``[record, *shape]``."""
        return torch.cat([self.train.inputs, self.proxy])


_SHARES = (1.0, 0.5, 0.25)


@dataclass(frozen=True)
class Update:
    """A teacher after an update, and the share of the update that the gate let through, 0 for none."""

    teacher: nn.Module
    accepted: float


def train_teacher(
    model: nn.Module, public: LabelledSet, config: FitConfig, generator: torch.Generator
) -> nn.Module:
    """The teacher trained on the public labelled data by cross-entropy."""

    parted = Parted.of(model)
    features = parted.features(public.inputs)

    def loss(trained: nn.Module, chosen: Tensor) -> Tensor:
        chosen = chosen.to(public.labels.device)
        return F.cross_entropy(trained(features[chosen]), public.labels[chosen])

    return parted.rejoined(fit(parted.rest, loss, records=len(public), config=config, generator=generator))


def distil_public(
    student: nn.Module,
    teacher: nn.Module,
    data: PublicData,
    temperature: float,
    config: FitConfig,
    generator: torch.Generator,
) -> nn.Module:
    """A student distilled from the teacher on all public inputs by ``T^2 KL(teacher || student)``.

    No private record is touched, so it costs no privacy.
    """
    inputs = data.inputs
    targets = soft_targets(logits_of(teacher, inputs), temperature)
    parted = Parted.of(student)
    features = parted.features(inputs)

    def loss(trained: nn.Module, chosen: Tensor) -> Tensor:
        chosen = chosen.to(inputs.device)
        return temperature**2 * divergence(targets[chosen], trained(features[chosen]), temperature).mean()

    return parted.rejoined(fit(parted.rest, loss, records=len(inputs), config=config, generator=generator))


def learn(
    teacher: nn.Module,
    targets: Targets,
    data: PublicData,
    config: ReverseConfig,
    generator: torch.Generator,
) -> Update:
    """The teacher after learning ``targets``, unless its public validation accuracy would fall.

    Without any targets the teacher stays as it is.
    """
    if not len(targets.queries):
        return Update(teacher, 0.0)
    weights = ReverseWeights(config.trust, config.anchor)
    device, parted = data.train.labels.device, Parted.of(teacher)
    known, proxy = parted.features(data.train.inputs), parted.features(data.proxy)

    def loss(trained: nn.Module, chosen: Tensor) -> Tensor:
        chosen = chosen.to(device)
        asked = torch.randint(len(targets.queries), (config.fit.batch_size,), generator=generator)
        return reverse_loss(
            trained(known[chosen]),
            data.train.labels[chosen],
            trained(proxy[targets.queries[asked]]),
            targets.probabilities[asked],
            targets.weights[asked],
            targets.prior[asked],
            weights,
        )

    learnt = fit(parted.rest, loss, records=len(data.train), config=config.fit, generator=generator)
    return gate(teacher, parted.rejoined(learnt), data.validation, config.tolerance)


def gate(old: nn.Module, proposal: nn.Module, validation: LabelledSet, tolerance: float) -> Update:
    """The largest part of an update that does not lower the public validation accuracy, or none of it.

    Tried are the whole update, then the halfway and quarter-way points between the old weights and the
    new: where the whole step forgets, a shorter one often does not.

    Args:
        old: the teacher before.
        proposal: the teacher after the whole update.
        validation: public labelled data; empty lets everything through.
        tolerance: a fall in accuracy that is still accepted.
    """
    if not len(validation):
        return Update(proposal, 1.0)
    before = accuracy(old, validation.inputs, validation.labels)
    for share in _SHARES:
        candidate = between(old, proposal, share)
        if accuracy(candidate, validation.inputs, validation.labels) >= before - tolerance - 1e-9:
            return Update(candidate, share)
    return Update(old, 0.0)


@torch.no_grad()
def between(old: nn.Module, new: nn.Module, share: float) -> nn.Module:
    """The model whose floating-point weights lie ``share`` of the way from ``old`` to ``new``."""
    blend = copy.deepcopy(new)
    start = old.state_dict()
    for name, tensor in blend.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.lerp(start[name], tensor, share))
    return blend


_TAIL = 6.0
"""An honest row's noise is longer than ``sqrt(classes) + 6`` standard deviations with probability 2e-8."""

_MEDIAN_LOSS = math.sqrt(math.pi / 2)
"""Standard deviation of the median over that of the mean, for many normals; it is smaller for few."""


@dataclass(frozen=True)
class Aggregate:
    """One answer a query, float64 ``[query, class]``, and a bound on the standard deviation of the known
    noise on each entry."""

    answers: Tensor
    noise_std: float


Rule: TypeAlias = Callable[[Tensor, float], Aggregate]
"""From each device's finite answers, float64 ``[device, query, class]``, and the known standard deviation of
the noise on each entry."""


def aggregate(answers: Tensor, noise_std: float, rule: str) -> Aggregate:
    """What the devices answer together.

    Args:
        answers: probabilities as they were received, ``[device, query, class]``; or ``[query, class]`` where
            the channel itself took the mean, which is then taken as it is.
        noise_std: known standard deviation of the noise on each entry.
        rule: of `RULES`.

    Raises:
        ChannelError: no device sent finite answers.
        InputError: a plug-in's rule fails, or returns something else.
    """
    answers = answers.detach().to("cpu", torch.float64)
    if answers.ndim == 2:
        if not bool(answers.isfinite().all()):
            raise ChannelError("the released mean is not finite: nothing can be learned from it")
        return Aggregate(answers, noise_std)
    finite = answers[answers.flatten(1).isfinite().all(1)]
    if not len(finite):
        raise ChannelError("no device sent finite answers: nothing can be learned from this round")
    with RULES.guarded(rule):
        return _checked(RULES[rule](finite, noise_std), finite, rule)


def _checked(found: Aggregate, answers: Tensor, rule: str) -> Aggregate:
    entries = found.answers.to("cpu", torch.float64)
    finite = bool(entries.isfinite().all()) and 0 <= found.noise_std < math.inf
    if entries.shape != answers.shape[1:] or not finite:
        raise InputError(
            f"reverse.aggregation {rule!r}: returned answers of shape {list(entries.shape)} and "
            f"noise_std={found.noise_std!r}; expected finite ones of {list(answers.shape[1:])}, and 0 or more"
        )
    return Aggregate(entries, found.noise_std)


def _mean(answers: Tensor, noise_std: float) -> Aggregate:
    return Aggregate(answers.mean(0), noise_std / len(answers) ** 0.5)


def _clipped_mean(answers: Tensor, noise_std: float) -> Aggregate:
    bound = 1 + noise_std * (math.sqrt(answers.shape[-1]) + _TAIL)
    norms = torch.linalg.vector_norm(answers, dim=-1, keepdim=True)
    return _mean(answers * (bound / norms.clamp(min=bound)), noise_std)


def _median(answers: Tensor, noise_std: float) -> Aggregate:
    loss = _MEDIAN_LOSS if len(answers) > 2 else 1.0
    ordered, n = answers.sort(dim=0).values, len(answers)
    return Aggregate((ordered[(n - 1) // 2] + ordered[n // 2]) / 2, loss * noise_std / n**0.5)


def _votes(answers: Tensor, noise_std: float) -> Aggregate:
    """Noise may turn any vote: the standard deviation of their share is then at most ``0.5 / sqrt(n)``."""
    votes = F.one_hot(answers.argmax(-1), answers.shape[-1]).to(torch.float64)
    return Aggregate(votes.mean(0), 0.5 / len(answers) ** 0.5 if noise_std else 0.0)


RULES: Registry[Rule] = Registry(
    "reverse.aggregation",
    {"mean": _mean, "clipped_mean": _clipped_mean, "median": _median, "votes": _votes},
)

R = TypeVar("R", bound=Rule)


def register(name: str) -> Callable[[R], R]:
    """Add the decorated function to `RULES`: an aggregation rule that ``reverse.aggregation`` may name.

    Raises:
        ConfigError: the name is taken.
    """

    def enter(rule: R) -> R:
        RULES.add(name, rule, rule)
        return rule

    return enter


@dataclass(frozen=True)
class Cloud:
    """The cloud's side of a run: all that it holds is public, but what was released to it.

    Attributes:
        config: of the run.
        plan: of the run.
        data: all that it holds.
        probe: public records on which models are proved.
        classes: number of classes.
    """

    config: Config
    plan: Plan
    data: PublicData
    probe: Probe
    classes: int
    _distilled: dict[int, tuple[nn.Module, tuple[nn.Module, ...]]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def untrained_teacher(self) -> nn.Module:
        """A teacher as it is before it learned anything."""
        return self._build(self.config.teacher.model, "teacher")

    def untrained_students(self) -> list[nn.Module]:
        """A student of each architecture that is dealt, as it is before it learned anything."""
        models = self.config.student.models[: self.plan.devices]
        rank = self.config.student.rank
        return [self._build(model, "student", number, rank=rank) for number, model in enumerate(models)]

    def check_models(self) -> None:
        """Prove that the teacher can be built and every student trained privately, before anything is spent.

        Raises:
            ConfigError: a name is unknown.
            ModelError: a model cannot be built, or a layer is unsupported; the message names the cure.
        """
        teacher = self.untrained_teacher()
        if not any(parameter.requires_grad for parameter in teacher.parameters()):
            raise ModelError(
                "the teacher has nothing to train, all its parameters are frozen: let its head be trained "
                "(requires_grad_(True)), or name what is frozen as its encoder, below a teacher 'linear'"
            )
        if self.config.student.alpha and self.mechanism is not None:
            check_apart(teacher.eval(), self.probe, "teacher")
        for student in self.untrained_students():
            check_trainable(
                student,
                input_shape=self.input_shape,
                classes=self.classes,
                recipe=self.config.student.dp,
                probe=self.probe,
            )

    def check_records_apart(self, task: Task) -> None:
        """Prove once more, at a round's weights, that neither its teacher nor its students mix records.

        Raises:
            ModelError: one does.
        """
        if self.config.student.alpha:
            check_apart(copy.deepcopy(task.teacher).eval(), self.probe, "teacher")
        for student in task.starts:
            check_records_apart(student, self.config.student.dp.part, self.probe)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the record axis."""
        return tuple(self.data.train.inputs.shape[1:])

    @cached_property
    def mechanism(self) -> Mechanism | None:
        """DP-SGD of one round, or ``None`` where the run asks for no DP."""
        plan = self.plan
        return Mechanism.of(
            self.config.student, plan.noise_multiplier, plan.expected_batch_size, self.probe, plan.unit
        )

    def trained_teacher(self) -> nn.Module:
        """The first teacher, trained on public labelled data."""
        fit, generator = self.config.teacher.fit, self._generator("teacher")
        return train_teacher(self.untrained_teacher(), self.data.train, fit, generator)

    def public_students(self, teacher: nn.Module, *, round: int) -> tuple[nn.Module, ...]:
        """A student of each architecture, distilled on public data from the ``teacher`` of ``round``.

        The last ones are kept for who asks again.
        """
        known = self._distilled.get(round)
        if known is None or known[0] is not teacher:
            student, generator = self.config.student, partial(self._generator, "distil", round)
            with seeded_layers(self.config.seed, "distil", round):
                students = tuple(
                    distil_public(
                        fresh, teacher, self.data, student.temperature, student.public_fit, generator(number)
                    )
                    for number, fresh in enumerate(self.untrained_students())
                )
            self._distilled.clear()
            known = self._distilled[round] = (teacher, students)
        return copy.deepcopy(known[1])

    def publish(self, teacher: nn.Module, round: int) -> Task:
        """What all devices are to do in ``round``: learn from ``teacher``, and answer.

        Where devices go on with their own students, they are given new ones in the first round alone.
        """
        given = round == 0 or self.config.student.start == "teacher"
        starts = self.public_students(teacher, round=round) if given else ()
        return Task(teacher, starts, self.config.student, self.mechanism, self.question(teacher, round))

    def question(self, teacher: nn.Module, round: int) -> Question:
        """What the devices are asked about, chosen by the teacher's own answers alone."""
        reverse, logits = self.config.reverse, logits_of(teacher, self.data.proxy)
        generator = self._generator("queries", round)
        queries = choose_queries(logits, self.plan.queries, reverse.selection, generator)
        prior = F.softmax(logits[queries], dim=-1)
        return Question(round, queries, self.data.proxy[queries], prior, self.config.channel.sends)

    def targets(self, teacher: nn.Module, releases: Sequence[Release]) -> Targets:
        """What ``teacher`` is asked to learn of all releases so far; raises as `aggregate`."""
        prior = F.softmax(logits_of(teacher, self.data.proxy), dim=-1)
        return targets_of(releases, prior, self.config.reverse)

    def update(self, teacher: nn.Module, targets: Targets, round: int) -> Update:
        """``teacher`` after learning ``targets`` in ``round``."""
        return learn(teacher, targets, self.data, self.config.reverse, self._generator("absorb", round))

    def _build(self, model: ModelConfig, *purpose: str | int, rank: int | None = None) -> nn.Module:
        seed = derive_seed(self.config.seed, "init", *purpose)
        built = build(
            model.on(self.config.encoder),
            input_shape=self.input_shape,
            classes=self.classes,
            seed=seed,
            vocabulary=self.data.vocabulary,
            rank=rank,
        )
        return built.to(self.data.proxy.device)

    def _generator(self, *purpose: str | int) -> torch.Generator:
        return seeded_generator(self.config.seed, *purpose)
