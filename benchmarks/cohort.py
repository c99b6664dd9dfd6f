"""Many students at once against one after another, side by side in one run; medians.

    python benchmarks/cohort.py [--repeats 5] [--students 64] [--threads N] [--only NAME]

Times are per student and step at an expected batch of 64 records. By default torch takes all its threads,
within each kernel.
"""

import argparse
import multiprocessing.connection
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from privkd.config import DpSgdConfig, FitConfig, ModelConfig
from privkd.data.scenario import LabelledSet
from privkd.models.zoo import build, parameter_count
from privkd.privacy.randomness import SeededRandomness, seeded_generator
from privkd.training.dpsgd import GradSampleMode, Mechanism, fastest_mode, train_private, train_unprotected
from privkd.training.losses import forward_loss
from privkd.training.vectorised import fit_cohort, train_cohort

RECORDS, BATCH, STEPS, CLASSES = 256, 64, 10, 10
RECIPE = DpSgdConfig(steps=STEPS, sampling_rate=BATCH / RECORDS, learning_rate=0.5)
ALPHA, TEMPERATURE = 0.5, 2.0
MECHANISM = Mechanism(RECIPE, 1.0, float(BATCH), alpha=ALPHA, temperature=TEMPERATURE)
FIT = FitConfig(steps=STEPS, batch_size=BATCH)
MODES: tuple[GradSampleMode, ...] = ("hooks", "functorch", "ew")
LOOPED = 4
"""Students that the loops train: their time per student does not depend on how many there are."""
SMALL_BUDGET = 64 << 20
GOALS = {"mlp": 25, "cnn": 4}

Call = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """A row of the table: an architecture of ``width`` on made-up images of ``shape``."""

    name: str
    width: int
    shape: tuple[int, int, int]

    def students(self, count: int) -> list[nn.Module]:
        config = ModelConfig(name=self.name, width=self.width)
        return [build(config, input_shape=self.shape, classes=CLASSES, seed=i) for i in range(count)]

    def shards(self, count: int) -> list[LabelledSet]:
        generator = torch.Generator().manual_seed(0)
        return [
            LabelledSet(
                torch.rand((RECORDS, *self.shape), generator=generator),
                torch.randint(CLASSES, (RECORDS,), generator=generator),
            )
            for _ in range(count)
        ]


SETTINGS = (Setting("mlp", 64, (1, 8, 8)), Setting("cnn", 32, (1, 28, 28)))


@dataclass(frozen=True)
class Contenders:
    """The ways to train the students of one setting, each a call with no arguments."""

    setting: Setting
    count: int

    def calls(self) -> dict[str, tuple[int, Call]]:
        """Name, number of students, and the call that trains them."""
        loops: dict[str, Callable[[nn.Module, LabelledSet, int], object]] = {
            **{f"Opacus, {mode}": partial(_opacus, mode=mode) for mode in MODES},
            "Opacus, ghost": _ghost,
            "plain SGD, one by one": _plain,
            "no DP, one by one": _unprotected,
        }
        few = list(
            zip(self.setting.students(LOOPED), self.setting.shards(LOOPED), range(LOOPED), strict=True)
        )

        def looped(train: Callable[[nn.Module, LabelledSet, int], object]) -> Call:
            return lambda: [train(*student) for student in few]

        models, shards = self.setting.students(self.count), self.setting.shards(self.count)
        return {
            **{name: (LOOPED, looped(train)) for name, train in loops.items()},
            "cohort, DP-SGD": (self.count, partial(private_cohort, models, shards)),
            "cohort, no DP": (self.count, partial(_plain_cohort, models, shards)),
        }


def private_cohort(models: list[nn.Module], shards: list[LabelledSet], **settings: int) -> object:
    """Train the models with DP-SGD as one program."""
    sources = [SeededRandomness(i) for i in range(len(models))]
    return train_cohort(models, shards, [_soft()] * len(models), MECHANISM, sources, **settings)  # type: ignore[arg-type]


def _plain_cohort(models: list[nn.Module], shards: list[LabelledSet]) -> object:
    generators = [seeded_generator(i) for i in range(len(models))]
    soft = [_soft()] * len(models)
    return fit_cohort(models, shards, soft, FIT, generators, alpha=ALPHA, temperature=TEMPERATURE)


def _soft() -> Tensor:
    return torch.zeros(RECORDS, CLASSES)


def _opacus(model: nn.Module, shard: LabelledSet, seed: int, *, mode: GradSampleMode) -> object:
    return train_private(model, shard, _soft(), MECHANISM, SeededRandomness(seed), mode=mode)


def _unprotected(model: nn.Module, shard: LabelledSet, seed: int) -> object:
    generator = seeded_generator(seed)
    return train_unprotected(model, shard, _soft(), FIT, generator, alpha=ALPHA, temperature=TEMPERATURE)


def _losses(model: nn.Module, shard: LabelledSet, chosen: Tensor) -> Tensor:
    logits, soft = model(shard.inputs[chosen]), _soft()[chosen]
    return forward_loss(logits, shard.labels[chosen], soft, alpha=ALPHA, temperature=TEMPERATURE)


def _plain(model: nn.Module, shard: LabelledSet, seed: int) -> None:
    """The same Poisson samples and SGD, without clipping and noise."""
    source = SeededRandomness(seed)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-6)
    for _ in range(STEPS):
        chosen = source.sample(RECORDS, RECIPE.sampling_rate)
        optimizer.zero_grad(set_to_none=True)
        (_losses(model, shard, chosen).sum() / BATCH).backward()
        optimizer.step()


def _ghost(model: nn.Module, shard: LabelledSet, seed: int) -> None:
    """Opacus' ghost clipping, which `student` does not use: one backward pass for norms, one for sums."""
    source, clip = SeededRandomness(seed), RECIPE.clip_norm
    wrapped = GradSampleModuleFastGradientClipping(
        model.train(), loss_reduction="sum", max_grad_norm=clip, use_ghost_clipping=True
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), lr=1e-6),
        noise_multiplier=1.0,
        max_grad_norm=clip,
        expected_batch_size=BATCH,
    )
    for _ in range(STEPS):
        losses = _losses(wrapped, shard, source.sample(RECORDS, RECIPE.sampling_rate))
        optimizer.zero_grad()
        losses.sum().backward(retain_graph=True)
        optimizer.zero_grad()
        factors = wrapped.get_clipping_coef()
        wrapped.disable_hooks()
        (factors * losses).sum().backward()
        wrapped.enable_hooks()
        optimizer.step()
    wrapped.to_standard_module()


def milliseconds(call: Call, students: int) -> float:
    """Per student and step."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start) / students / STEPS


def medians(calls: dict[str, tuple[int, Call]], repeats: int) -> dict[str, float]:
    """Milliseconds by name; the contenders take turns, so that a busy moment hits all of them."""
    for count, call in calls.values():
        milliseconds(call, count)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, (count, call) in calls.items():
            times[name].append(milliseconds(call, count))
    return {name: statistics.median(found) for name, found in times.items()}


def measure(setting: Setting, students: int, repeats: int) -> None:
    """Print one architecture's table, its floor, and where the cohort's time goes."""
    calls = Contenders(setting, students).calls()
    found = medians(calls, repeats)
    model = setting.students(1)[0]
    count = parameter_count(model)
    print(
        f"\n{setting.name}, width {setting.width}, {setting.shape}, {count:,} parameters, {students} students"
    )
    for name, each in found.items():
        print(f"  {name:22s} {each:8.3f} ms   {1000 / each / STEPS:9.1f} students/s for {STEPS} steps")
    best = min((name for name in found if name.startswith("Opacus")), key=lambda name: found[name])
    chosen = f"Opacus, {fastest_mode(model.train(), torch.zeros(1, *setting.shape), MECHANISM)}"
    private, plain = found["cohort, DP-SGD"], found["cohort, no DP"]
    ratio, goal = found[best] / private, GOALS[setting.name]
    print(f"  cohort over the best Opacus mode ({best.split(', ')[1]}): {ratio:.1f} x, goal {goal} x")
    print(f"  DP over no DP in the cohort: {private / plain:.2f} x, goal under 2 x")
    single = found[chosen] / found["plain SGD, one by one"]
    print(f"  one student: {chosen} is chosen by itself, {single:.2f} x plain SGD")
    floor(setting, count, private)
    if ratio < goal:
        kernels(calls["cohort, DP-SGD"][1], students)


def floor(setting: Setting, parameters: int, private: float) -> None:
    """Print the time that the arithmetic alone takes, and that of drawing the noise."""
    size = 1024
    a, b = torch.rand(size, size), torch.rand(size, size)
    rate = 2 * size**3 / _seconds(lambda: torch.mm(a, b))
    model, shard = setting.students(1)[0].train(), setting.shards(1)[0]
    with FlopCounterMode(display=False) as counter:
        _losses(model, shard, torch.arange(BATCH)).sum().backward()
    flops = counter.get_total_flops()
    least = 1000 * flops / rate
    noise = 1000 * _seconds(lambda: torch.randn(parameters))
    print(
        f"  floor: {flops / 1e6:.2f} Mflop forward and backward at {rate / 1e9:.0f} Gflop/s "
        f"({size} x {size} products) is {least:.4f} ms: the cohort takes {private / least:.1f} x that"
    )
    print(f"  drawing the noise, one student after another in any formulation: {noise:.4f} ms")


def _seconds(call: Call) -> float:
    times = []
    for _ in range(25):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def kernels(call: Call, students: int) -> None:
    """Print where the time goes, by kernel."""
    with profile() as profiler:
        call()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    print(f"  {total / students / STEPS / 1000:.3f} ms of processor time under the profiler, of which")
    for row in rows[:14]:
        each = row.self_cpu_time_total / students / STEPS
        print(f"    {row.key:40.40s} {each:8.1f} us {100 * row.self_cpu_time_total / total:5.1f} %")


def scaling(setting: Setting) -> None:
    """Print the time per device as the cohort grows."""
    print("\nscaling, mlp with DP-SGD")
    for count in (10, 100, 1000):
        models, shards = setting.students(count), setting.shards(1) * count
        call = partial(private_cohort, models, shards)
        print(f"  {count:5d} devices {medians({'': (count, call)}, 5)['']:8.3f} ms")


def memory(setting: Setting, students: int) -> None:
    """Print the peak of each contender in a process of its own, on one thread, beyond what it held before."""
    print(f"\npeak memory beyond libraries, models and data, {setting.name}")
    shares = partial(private_cohort, setting.students(students), setting.shards(students))
    calls = {name: call for name, (_, call) in Contenders(setting, students).calls().items()}
    calls[f"cohort, DP-SGD, budget {SMALL_BUDGET >> 20} MB"] = partial(shares, memory_budget=SMALL_BUDGET)
    for name, call in calls.items():
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_peak, args=(call, sender))
        child.start()
        print(f"  {name:32s} {receiver.recv() / 2**20:8.1f} MB")
        child.join()


def _peak(call: Call, sender: "multiprocessing.connection.Connection") -> None:
    torch.set_num_threads(1)  # a forked process cannot use the threads that its parent started
    small = SETTINGS[0]
    _opacus(small.students(1)[0], small.shards(1)[0], 0, mode="hooks")  # libraries load as they are used
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    sender.send(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--students", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=[setting.name for setting in SETTINGS])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # of Opacus' ghost clipping
    print(f"torch {torch.__version__}, {arguments.threads} threads, medians of {arguments.repeats}")
    chosen = [setting for setting in SETTINGS if arguments.only in (None, setting.name)]
    for setting in chosen:
        memory(setting, arguments.students)
    for setting in chosen:
        measure(setting, arguments.students, arguments.repeats)
    if SETTINGS[0] in chosen:
        scaling(SETTINGS[0])


if __name__ == "__main__":
    main()
