"""Worst-case records through the very call that trains a run's devices.

The run's own students, its part in training, its engine, its randomness and its teacher's soft targets: only
the records are the audit's, crafted out of public ones so that their clipped gradients are as long as they
may be and nearly orthogonal. A device holds some of them by fair coins. The adversary sees the noised sum of
every step and knows all but one coin; the audit knows more, as it can play a device again without its noise.
Neighbouring relation: add or remove one record. Where training protects persons, each crafted record stands
for a person with several of it, whose gradients all push one way: add or remove one person.

Three kinds of things are looked at. What one record moves without noise (`_Crafted`, `_InCompany`), which
clipping bounds, and whether it leaves anything but that. The noise by itself, which must be of the claimed
size for every weight and fresh on every device and in every round (`_noise_checks`), and the batches, which
must be independent draws. And what the noised sums tell of the coins: a lower bound on epsilon.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import qr, solve_triangular
from scipy.special import gammaln, logsumexp, ndtri
from scipy.stats import chi2
from torch import Tensor, nn

from audits.mechanisms.canaries import Scores
from privkd.data.scenario import Device, LabelledSet
from privkd.engines.simulation import RandomnessOf, Simulation
from privkd.models.features import Parted
from privkd.models.zoo import trained_parameters
from privkd.prepared import Prepared
from privkd.privacy.bounds import Check
from privkd.privacy.events import Unit
from privkd.privacy.randomness import Randomness, SeededRandomness, Uniforms, seeded_generator
from privkd.training.dpsgd import Mechanism
from privkd.training.vectorised import is_vectorised

Floats: TypeAlias = NDArray[np.float64]

FALSE_ALARM = 1e-6
"""Of all checks of one audit together: a sound run fails one with at most this probability."""
_POOL, _LABELS, _MOST_TOGETHER, _LEAST_LENGTH = 32, 3, 32, 0.95
_COMPANY = 24
_FEWEST_OF_PERSON, _MOST_OF_PERSON = 2, 8
"""Records of a crafted person, whatever persons of the run have."""
_TOLERANCE, _SLACK = 1e-3, 0.02
"""Rounding of float32 weights, and of integers in the channel: on lengths in clip norms, and on variances."""
_MOST_TRIALS, _MOST_DRAWS, _MOST_STEPS = 20_000, 40_000_000, 1_000
_MOST_NUMBERS, _LEAST_POOL = 1 << 26, 8
"""Numbers of what the crafted records move, in double precision."""
_MOST_ONE_BY_ONE, _MOST_POOL_ONE_BY_ONE = 2_000, 96
"""Device-steps of students that are trained one by one, which takes milliseconds for each."""
_CALLS, _MOST_DEVICE_CALLS, _FEWEST_DEVICES = 16, 2_000, 8
_QUIET_STEP, _NOISY_STEP, _LEAST_STEP = 0.1, 1e-4, 1e-6
"""What a record moves the weights by in one step without noise, what noise moves them by, and the least of
the first beside noise that float32 still holds."""


@dataclass(frozen=True)
class TrainingAudit:
    """What came out: scores of the canaries, and checks of clipping, noise and batches."""

    scores: Scores
    checks: tuple[Check, ...]


def audit_training(
    run: Prepared, teacher: nn.Module, starts: Sequence[nn.Module], seed: int, *, most: int = _MOST_TRIALS
) -> TrainingAudit:
    """Play the game on canary devices, for as many rounds and steps as the run took.

    Args:
        run: the run; its mechanism, engine and source of randomness.
        teacher: the published one.
        starts: a student of each architecture, as the public distillation left it.
        seed: of the coins and of the crafted records.
        most: canaries that are played at most.
    """
    mechanism = run.mechanism
    assert mechanism is not None
    kinds = [_Crafted.of(run, start, teacher, mechanism, seed) for start in starts]
    company = [_InCompany.of(kind) for kind in kinds]
    unit = mechanism.unit
    clipping = [
        _length_check(f"a {unit} by itself", [kind.longest for kind in kinds]),
        _length_check(f"a {unit} among others", [found.longest for found in company]),
        *(check for found in company for check in found.checks()),
    ]
    played = [_play(run, kind, mechanism, most, len(kinds), seed) for kind in kinds]
    each = FALSE_ALARM / len(kinds)
    noise = [check for found in played for check in found.checks(mechanism, each)]
    values = np.concatenate([found.values.reshape(-1) for found in played])
    inside = np.concatenate([found.inside.reshape(-1) for found in played])
    return TrainingAudit(Scores(values, inside), _merged([*clipping, *noise]))


class _Quiet:
    """A device's own samples and layers' draws, with zeros for noise."""

    def __init__(self, source: Randomness, *, everything: bool = False) -> None:
        self._source = source
        self._everything = everything

    def sample(self, records: int, sampling_rate: float) -> Tensor:
        """See `Randomness.sample`; all records where the audit asks for everything."""
        return self.samples(1, records, sampling_rate)[0]

    def samples(self, steps: int, records: int, sampling_rate: float) -> Tensor:
        """See `Randomness.samples`."""
        if self._everything:
            return torch.ones((steps, records), dtype=torch.bool)
        return self._source.samples(steps, records, sampling_rate)

    def noise(self, size: int) -> Tensor:
        """None."""
        return torch.zeros(size, dtype=torch.float64)

    def layers(self, step: int, records: Sequence[bytes]) -> list[Uniforms]:
        """See `Randomness.layers`."""
        return self._source.layers(step, records)


class _Settled:
    """A device's own samples and noise; in every step layers draw for a record what it was crafted with.

    Else its sum would be another one in each step, and tell neither whether it was there nor how often.
    """

    def __init__(self, source: Randomness, seed: int) -> None:
        self._source = source
        self._crafted = SeededRandomness(seed)

    def sample(self, records: int, sampling_rate: float) -> Tensor:
        """See `Randomness.sample`."""
        return self._source.sample(records, sampling_rate)

    def samples(self, steps: int, records: int, sampling_rate: float) -> Tensor:
        """See `Randomness.samples`."""
        return self._source.samples(steps, records, sampling_rate)

    def noise(self, size: int) -> Tensor:
        """See `Randomness.noise`."""
        return self._source.noise(size)

    def layers(self, step: int, records: Sequence[bytes]) -> list[Uniforms]:
        """See `Randomness.layers`; of the step for which the records were crafted."""
        return self._crafted.layers(0, records)


def _plain_steps(mechanism: Mechanism, steps: int, movement: float) -> Mechanism:
    """The mechanism with plain steps, whose sum alone moves the weights.

    ``movement``: of one record in one step, learning rate times the clip norm over the normaliser.
    """
    rate = movement * mechanism.expected_batch_size / mechanism.recipe.clip_norm
    recipe = mechanism.recipe.model_copy(
        update={
            "steps": steps,
            "learning_rate": rate,
            "momentum": 0.0,
            "optimizer": "sgd",
            "averaging": 0.0,
        }
    )
    return replace(mechanism, recipe=recipe)


@dataclass(frozen=True)
class _Canaries:
    """Devices with crafted records, and what the published teacher tells each of them."""

    devices: Simulation
    start: nn.Module
    targets: Sequence[Tensor] | None

    @classmethod
    def of(
        cls, run: Prepared, start: nn.Module, teacher: nn.Module, shards: Sequence[LabelledSet]
    ) -> "_Canaries":
        """A device a shard, all with the student ``start``; each record stands for a unit."""
        held = [_as_units(shard, run) for shard in shards]
        devices = tuple(Device(f"audit-{number:05d}", shard, shard) for number, shard in enumerate(held))
        simulation = Simulation(devices, run.config.student)
        return cls(simulation, start, simulation.taught(teacher))

    def sums(self, mechanism: Mechanism, randomness: RandomnessOf) -> Floats:
        """What each device's weights moved by through the run's own call, as the sum of all steps' gradients
        in clip norms ``[device, parameter]``."""
        return self.moved(self.trained(mechanism, randomness), mechanism)

    def trained(self, mechanism: Mechanism, randomness: RandomnessOf) -> list[nn.Module]:
        """What the run's own call leaves each device with."""
        students = [self.start] * len(self.devices.devices)
        return self.devices.train_private(students, self.targets, mechanism, randomness, lambda done: None)

    def moved(self, trained: Sequence[nn.Module], mechanism: Mechanism) -> Floats:
        """See `sums`."""
        before = _trained_weights(self.start, mechanism)
        after = torch.stack([_trained_weights(student, mechanism) for student in trained])
        recipe = mechanism.recipe
        scale = mechanism.expected_batch_size / (recipe.learning_rate * recipe.clip_norm)
        return ((before - after) * scale).cpu().numpy()


def _as_units(records: LabelledSet, run: Prepared) -> LabelledSet:
    """Each of ``records`` as a unit that the run protects: itself, or a person who has it several times."""
    if run.plan.unit is Unit.RECORD:
        return records
    count = of_person(run)
    persons = torch.arange(len(records)).repeat_interleave(count)
    return replace(records.part(persons.to(records.labels.device)), persons=persons)


def of_person(run: Prepared) -> int:
    """How many records a crafted person has: as many as the run's persons may have, within limits."""
    assert run.plan.persons is not None
    return min(max(run.plan.persons.most_records, _FEWEST_OF_PERSON), _MOST_OF_PERSON)


def _trained_weights(model: nn.Module, mechanism: Mechanism) -> Tensor:
    return torch.cat(
        [p.detach().flatten().double() for p in trained_parameters(model, mechanism.recipe.part)]
    )


@dataclass(frozen=True)
class _Crafted:
    """Canaries for the students of one architecture.

    Attributes:
        run: the run.
        start: the student.
        teacher: the published one.
        mechanism: of the run.
        records: the canaries.
        directions: orthonormal, ``[parameter, canary]``.
        lengths: upper triangular ``[canary, canary]``: the canaries' sums in the directions, in clip norms.
        longest: the length of the longest sum of one record, of all that were tried.
    """

    run: Prepared
    start: nn.Module
    teacher: nn.Module
    mechanism: Mechanism
    records: LabelledSet
    directions: Floats
    lengths: Floats
    longest: float

    @classmethod
    def of(
        cls, run: Prepared, start: nn.Module, teacher: nn.Module, mechanism: Mechanism, seed: int
    ) -> "_Crafted":
        """Of a pool of crafted records, those whose sums are the least alike."""
        weights = sum(p.numel() for p in trained_parameters(start, mechanism.recipe.part))
        most = max(_LEAST_POOL, _MOST_NUMBERS // weights)
        most = min(most, _MOST_POOL_ONE_BY_ONE) if _one_by_one(run, start) else most
        pool = _pool(run, seed, most)
        for model in (start, teacher):
            # Kept from here on, each record by itself.
            Parted.of(model).features(pool.inputs)
        once = _plain_steps(mechanism, 1, _QUIET_STEP)
        alone = [LabelledSet(pool.inputs[i : i + 1], pool.labels[i : i + 1]) for i in range(len(pool))]
        quiet = _Quiet(SeededRandomness(seed), everything=True)
        sums = _Canaries.of(run, start, teacher, alone).sums(once, lambda name: quiet)
        factors = qr(sums.T, mode="economic", pivoting=True)
        directions, lengths = (np.asarray(part, dtype=np.float64) for part in factors[:2])
        order, longest = factors[2], np.abs(np.diag(lengths))
        usable = longest >= min(_LEAST_LENGTH, 0.99 * float(longest[0]))
        kept = max(1, min(_MOST_TOGETHER, int(usable.sum())))
        signs = np.sign(np.diag(lengths)[:kept])
        chosen = torch.from_numpy(order[:kept].astype(np.int64))
        return cls(
            run,
            start,
            teacher,
            mechanism,
            LabelledSet(pool.inputs[chosen], pool.labels[chosen]),
            directions[:, :kept] * signs,
            lengths[:kept, :kept] * signs[:, None],
            float(np.linalg.norm(sums, axis=1).max()),
        )

    def on(self, shards: Sequence[LabelledSet]) -> _Canaries:
        """Devices with these shards."""
        return _Canaries.of(self.run, self.start, self.teacher, shards)


def _pool(run: Prepared, seed: int, most: int) -> LabelledSet:
    """Public records far out of range and as they are, noise, and the probe's extremes, under any labels.

    Of token ids: public records, the probe's, ids drawn from them, and one of them over and over. of them at
    the most, drawn by the seed.
    """
    generator = seeded_generator(seed, "audit", "crafted")
    public = run.scenario.proxy.cpu()
    chosen = public[torch.randperm(len(public), generator=generator)[:_POOL]]
    inputs = [chosen, run.cloud.probe.inputs.cpu()]
    if not public.is_floating_point():
        known = public.unique()
        made_up = known[torch.randint(len(known), chosen.shape, generator=generator)]
        inputs += [made_up, made_up[:, :1].expand_as(made_up)]
    elif not bool((public == public.round()).all()):
        size = public.abs().max().clamp(min=1.0)
        noise = torch.rand((_POOL, *public.shape[1:]), generator=generator) - 0.5
        inputs += [30 * chosen, -30 * chosen, 100 * size * noise]
    records = torch.cat(inputs).repeat_interleave(_LABELS, 0)
    labels = torch.randint(run.scenario.classes, (len(records),), generator=generator)
    device = run.scenario.proxy.device
    drawn = torch.randperm(len(records), generator=generator)[:most]
    return LabelledSet(records[drawn].to(device), labels[drawn].to(device))


@dataclass(frozen=True)
class _InCompany:
    """What one of several records moves when it goes.

    Attributes:
        longest: how far it moves the sum at most, in clip norms.
        apart: how far that is at most from what it moves by itself: zero, unless others answer for it.
        changed: names of what training changed beside the weights in training.
        unit: of training.
    """

    longest: float
    apart: float
    changed: tuple[str, ...]
    unit: Unit

    @classmethod
    def of(cls, kind: _Crafted) -> "_InCompany":
        """Of the canaries and some public records, the first, one in the middle and the last."""
        public = kind.run.scenario.proxy[:_COMPANY]
        company = LabelledSet(
            torch.cat([kind.records.inputs, public]),
            torch.cat([kind.records.labels, kind.records.labels.new_zeros(len(public))]),
        )
        gone = [0, len(kind.records) - 1, len(company) - 1]
        alone = [LabelledSet(company.inputs[i : i + 1], company.labels[i : i + 1]) for i in gone]
        canaries = kind.on([company, *(_without(company, number) for number in gone), *alone])
        once = _plain_steps(kind.mechanism, 1, _QUIET_STEP)
        own_source = kind.run.randomness_of(0)
        trained = canaries.trained(once, lambda name: _Quiet(own_source("audit"), everything=True))
        everybody, others, own = np.split(canaries.moved(trained, once), [1, 1 + len(gone)])
        return cls(
            float(np.linalg.norm(everybody - others, axis=1).max()),
            float(np.linalg.norm(everybody - others - own, axis=1).max()),
            tuple(dict.fromkeys(name for student in trained for name in _changed(kind, student))),
            kind.mechanism.unit,
        )

    def checks(self) -> Iterator[Check]:
        """That a record is by itself, and leaves nothing beside its part of the sum. Without chance."""
        yield Check(
            f"a {self.unit} among others moves the sum as it does by itself",
            self.apart <= _TOLERANCE,
            f"{self.apart:.3g} clip norms apart",
        )
        yield Check(
            "training changes nothing but the weights in training",
            not self.changed,
            f"{self.changed[0]!r} is not what it was" if self.changed else "nothing else is changed",
        )


def _changed(kind: _Crafted, student: nn.Module) -> Iterator[str]:
    """Names of what a trained student holds otherwise than the one it began as, the trained weights apart."""
    before, after = (_held(model, kind.mechanism) for model in (kind.start, student))
    for name in {**before, **after}:
        was, now = before.get(name), after.get(name)
        if was is None or now is None or was.shape != now.shape or not _same(was, now):
            yield name


def _held(model: nn.Module, mechanism: Mechanism) -> dict[str, Tensor]:
    """Every tensor of a model's layers and its gradients by name, the weights in training apart."""
    in_training = {id(parameter) for parameter in trained_parameters(model, mechanism.recipe.part)}
    found: dict[str, Tensor] = {}
    for place, module in model.named_modules():
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items():
            if not isinstance(value, Tensor):
                continue
            if id(value) not in in_training:
                found[f"{place}.{name}"] = value.detach()
            if value.is_leaf and value.grad is not None:
                found[f"{place}.{name}.grad"] = value.grad
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _without(records: LabelledSet, number: int) -> LabelledSet:
    kept = [i for i in range(len(records)) if i != number]
    return LabelledSet(records.inputs[kept], records.labels[kept])


def _length_check(of: str, lengths: Sequence[float]) -> Check:
    longest = max(lengths)
    return Check(
        f"{of} moves the sum by at most the clip norm",
        longest <= 1 + _TOLERANCE,
        f"by {longest:.4g} clip norms",
    )


@dataclass(frozen=True)
class _Played:
    """What the canary devices of one architecture showed.

    Attributes:
        inside: which canaries were there, bool ``[device, canary]``.
        values: log-likelihood ratios of the canaries' being there, over the run's rounds, likewise.
        noise: of each round in standard deviations of the claim, ``[round, device, parameter]``.
        taken: how often each canary was in a batch, by call ``[call, device, canary]``.
        steps: of each call.
        names: of the weights in training, with the number of each.
    """

    inside: NDArray[np.bool_]
    values: Floats
    noise: Floats
    taken: Floats
    steps: tuple[int, ...]
    names: tuple[tuple[str, int], ...]

    def checks(self, mechanism: Mechanism, false_alarm: float) -> Iterator[Check]:
        """Whether noise and batches are as claimed; a sound mechanism fails one with ``false_alarm``."""
        each = false_alarm / 5
        yield from _noise_checks(self.noise, self.names, each)
        yield from self._batches(mechanism.recipe.sampling_rate, mechanism.unit, each)

    def _batches(self, rate: float, unit: Unit, false_alarm: float) -> Iterator[Check]:
        """Full batches hold each unit once; else each unit joins each step by a coin of its own."""
        steps = np.array(self.steps, dtype=np.float64)
        if rate == 1:
            away = np.abs(self.taken - steps[:, None, None] * self.inside).max()
            yield Check(
                f"every {unit} is in every batch",
                bool(away < 0.25 * steps.max()),
                f"{away / steps.max():.3g} of a {unit} off at most",
            )
            return
        records, sizes = self.taken.sum(axis=0)[self.inside], self.taken.sum(axis=2)
        among = self.inside.sum(axis=1) * steps[:, None]
        for what, found in (
            (f"{unit}s", _spread(records, np.full(len(records), steps.sum()), rate)),
            ("batches", _spread(sizes[among > 0], among[among > 0], rate)),
        ):
            bound = float(-ndtri(false_alarm / 4))
            yield Check(
                f"{what} are drawn by Poisson sampling at the claimed rate",
                max(abs(z) for z in found) <= bound,
                f"{max(found, key=abs):+.2f} standard deviations; up to {bound:.2f} is within chance",
            )


def _spread(counts: Floats, trials: Floats, rate: float) -> tuple[float, float]:
    """How far the mean and the variance of binomial ``counts`` are off, in standard deviations."""
    variance = trials * rate * (1 - rate)
    squares = (counts - trials * rate) ** 2 / variance
    fourth = 2 + (1 - 6 * rate * (1 - rate)) / variance
    return (
        float((counts - trials * rate).sum() / math.sqrt(variance.sum())),
        float((squares - 1).sum() / math.sqrt(fourth.sum())),
    )


def _noise_checks(noise: Floats, names: Sequence[tuple[str, int]], false_alarm: float) -> Iterator[Check]:
    """The size of the noise of each weight tensor, and whether devices or rounds share some of it."""
    rounds, devices, _ = noise.shape
    sizes, start = [], 0
    for name, count in names:
        part = noise[:, :, start : start + count]
        sizes.append((name, *mean_square(part, false_alarm / len(names))))
        start += count
    name, ratio, low, high = max(sizes, key=lambda size: max(size[2] - size[1], size[1] - size[3]))
    yield Check(
        "noise has the claimed variance",
        low <= ratio <= high,
        f"{ratio:.4f} of it at {name!r}; {low:.3f} to {high:.3f} is within chance",
    )
    for what, axis, count in (("device", 1, devices), ("round", 0, rounds)):
        means = noise.mean(axis=axis) * math.sqrt(count)
        ratio, _, high = mean_square(means, false_alarm)
        if count > 1:
            yield Check(
                f"noise is fresh on every {what}" if what == "device" else "noise is fresh in every round",
                ratio <= high,
                f"the mean's variance is {ratio:.4f} of fresh noise's; up to {high:.3f} is within chance",
            )


def mean_square(noise: Floats, false_alarm: float) -> tuple[float, float, float]:
    """The mean square of what should be standard normals, and between what it lies by chance, two-sided."""
    count = noise.size
    low, high = (float(chi2.ppf(tail, count)) / count for tail in (false_alarm / 2, 1 - false_alarm / 2))
    return float(np.square(noise).mean()), low * (1 - _SLACK), high * (1 + _SLACK)


def _play(run: Prepared, kind: _Crafted, mechanism: Mechanism, most: int, kinds: int, seed: int) -> _Played:
    """Canary devices of one architecture through all rounds of the run."""
    plan, together = run.plan, len(kind.records)
    rounds = max(2, min(plan.rounds, max(1, _MOST_STEPS // plan.steps)))
    calls = _calls(plan.steps, rounds, plan.sampling_rate)
    devices = _affordable(run, kind, rounds * sum(calls), rounds * len(calls), most) // kinds
    fewest = min(_FEWEST_DEVICES, _MOST_NUMBERS // (rounds * kind.directions.shape[0]))
    devices = max(2, fewest, devices)
    inside = torch.rand((devices, together), generator=seeded_generator(seed, "audit", "coins")) < 0.5
    shards = [kind.records.part(row) for row in inside]
    canaries = kind.on(shards)
    sigma, rate = mechanism.noise_multiplier, mechanism.recipe.sampling_rate
    values, noises, taken = np.zeros(inside.shape), [], []
    for round in range(rounds):
        noisy, quiet = (_sources(run, round, devices, seed) for _ in range(2))
        left = np.zeros((devices, kind.directions.shape[0]))
        for steps in calls:
            some = _plain_steps(mechanism, steps, max(_NOISY_STEP / sigma, _LEAST_STEP))
            seen = canaries.sums(some, noisy.__getitem__)
            clean = canaries.sums(some, lambda name, quiet=quiet: _Quiet(quiet[name]))  # type: ignore[misc]
            noise, along = seen - clean, clean @ kind.directions
            left += noise
            taken.append(solve_triangular(kind.lengths, along.T).T)
            if round < plan.rounds:
                own = taken[-1] * np.diag(kind.lengths) + noise @ kind.directions
                values += log_ratio(own, np.diag(kind.lengths), sigma, rate, steps)
        noises.append(left / (sigma * math.sqrt(sum(calls))))
    names = tuple(
        (name, p.numel())
        for name, p in kind.start.named_parameters()
        if any(p is kept for kept in trained_parameters(kind.start, mechanism.recipe.part))
    )
    return _Played(inside.numpy(), values, np.stack(noises), np.stack(taken), calls * rounds, names)


def _sources(run: Prepared, round: int, devices: int, seed: int) -> dict[str, Randomness]:
    """The run's own source of samples and noise for each canary device, from its beginning."""
    randomness = run.randomness_of(round)
    names = [f"audit-{number:05d}" for number in range(devices)]
    return {name: _Settled(randomness(name), seed) for name in names}


def _calls(steps: int, rounds: int, rate: float) -> tuple[int, ...]:
    """One round's steps, by the call. The sum tells all of full batches; of others each step tells more."""
    if rate == 1:
        return (steps,)
    calls = max(1, min(steps, _CALLS // rounds))
    return tuple(len(part) for part in np.array_split(np.arange(steps), calls))


def _affordable(run: Prepared, kind: _Crafted, steps: int, calls: int, trials: int) -> int:
    """How many canary devices, such that the audit stays within seconds, and within ``trials`` canaries."""
    most = min(
        trials // len(kind.records),
        _MOST_DRAWS // (kind.directions.shape[0] * steps),
        _MOST_DEVICE_CALLS // calls,
    )
    if _one_by_one(run, kind.start):
        most = min(most, _MOST_ONE_BY_ONE // steps)
    return most


def _one_by_one(run: Prepared, student: nn.Module) -> bool:
    """Whether the run trains students like this one after another."""
    mechanism, shard = run.mechanism, run.scenario.devices[0].train
    assert mechanism is not None
    return run.config.student.engine == "opacus" or not is_vectorised(student, shard, mechanism)


def log_ratio(seen: Floats, lengths: Floats, sigma: float, rate: float, steps: int) -> Floats:
    """Log-likelihood ratio of a canary's being there, from the sum of ``steps`` steps in its direction.

    The canary adds its length in each step that samples it, and each step adds noise of standard deviation
    ``sigma``, both in clip norms: ``log sum_k Bin(k; steps, rate) N(seen; k length, steps sigma^2) /
    N(seen; 0, steps sigma^2)``. ``seen`` ``[device, canary]``, ``lengths`` ``[canary]``.
    """
    variance = steps * sigma**2
    if rate == 1:
        total = steps * lengths
        return np.asarray((2 * seen - total) * total / (2 * variance), dtype=np.float64)
    k = np.arange(steps + 1, dtype=np.float64)
    weight = (
        gammaln(steps + 1) - gammaln(k + 1) - gammaln(steps - k + 1)
        + k * math.log(rate) + (steps - k) * math.log1p(-rate)
    )  # fmt: skip
    likely = weight > weight.max() - 60
    moved = k[likely] * lengths[:, None]
    exponent = (2 * seen[..., None] - moved) * moved / (2 * variance)
    return np.asarray(logsumexp(weight[likely] + exponent, axis=-1), dtype=np.float64)


def _merged(checks: Sequence[Check]) -> tuple[Check, ...]:
    """One check of each name: the first that failed, or else the last."""
    found: dict[str, Check] = {}
    for check in checks:
        if check.name not in found or found[check.name].passed:
            found[check.name] = check
    return tuple(found.values())
