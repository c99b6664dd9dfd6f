"""What hostile devices do to the teacher, by aggregation rule: ``python benchmarks/hostile_devices.py``.

Hostile devices see what the honest ones send, agree among each other, and put whatever they like on the wire,
past any clipping of their own. The table holds the teacher's accuracy on the test set, a mean over seeds.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path[0] = str(Path(__file__).resolve().parents[1])

from privkd.channels.channel import PlainChannel  # noqa: E402
from privkd.cloud import RULES  # noqa: E402
from privkd.config import load_config  # noqa: E402
from privkd.federation import Federation  # noqa: E402
from privkd.fleet import SimulatedFleet  # noqa: E402
from privkd.messages import Question, Release, Task, Upload  # noqa: E402
from privkd.plan import budgets  # noqa: E402
from privkd.prepared import prepare  # noqa: E402
from privkd.privacy.ledger import Ledger  # noqa: E402
from privkd.progress import Silent  # noqa: E402
from privkd.runs.checkpoint import State  # noqa: E402
from privkd.runs.fingerprints import UNKEPT  # noqa: E402


def wrong(honest: Tensor) -> Tensor:
    """A wrong class that all attackers agree on, next to the honest choice, ``[query, class]``."""
    chosen = honest.mean(0).argmax(-1)
    return F.one_hot((chosen + 1) % honest.shape[-1], honest.shape[-1]).to(honest)


def away(honest: Tensor) -> Tensor:
    """From the honest choice to the wrong class as far as a row of norm 1 reaches, ``[query, class]``."""
    right = F.one_hot(honest.mean(0).argmax(-1), honest.shape[-1]).to(honest)
    return (wrong(honest) - right) / 2**0.5


def first_class(honest: Tensor) -> Tensor:
    """Always the same answer ``[query, class]``."""
    return F.one_hot(torch.zeros(honest.shape[1], dtype=torch.int64), honest.shape[-1]).to(honest)


Attack = Callable[[Tensor], Tensor]
"""From honest blocks ``[device, query, class]`` to what every attacker sends ``[query, class]``."""

ATTACKS: Mapping[str, Attack] = {
    "NaN": lambda honest: torch.full_like(honest[0], torch.nan),
    "infinities": lambda honest: torch.full_like(honest[0], torch.inf),
    "huge norms": lambda honest: 1e30 * wrong(honest),
    "constant answers": first_class,
    "copies of another's": lambda honest: honest[0],
    "colluding votes": wrong,
    "colluding, against": away,
}


class HostileChannel(PlainChannel):
    """The plain channel, with the blocks of the last ``hostile`` devices replaced on the wire."""

    def __init__(self, clip_norm: float, attack: Attack, hostile: int) -> None:
        super().__init__(clip_norm)
        self._attack = attack
        self._hostile = hostile

    def collect(self, question: Question, uploads: Sequence[Upload]) -> Release:
        """What the cloud receives."""
        found = super().collect(question, uploads)
        if not self._hostile:
            return found
        honest = found.answers[: len(uploads) - self._hostile]
        sent = self._attack(honest).expand(self._hostile, *honest.shape[1:])
        return replace(found, answers=torch.cat([honest, sent]))


@dataclass(frozen=True)
class Remembering(SimulatedFleet):
    """The same devices; students of a task that was published before are not trained again."""

    known: dict[str, list[nn.Module]] = field(default_factory=dict)

    def _train(self, task: Task, before: Sequence[nn.Module]) -> list[nn.Module]:
        if task.digest not in self.known:
            self.known[task.digest] = super()._train(task, before)
        return self.known[task.digest]


@dataclass(frozen=True)
class Seed:
    """One seed's run, and its state before the first round."""

    run: Federation
    begun: State

    @classmethod
    def of(cls, seed: int, asked: argparse.Namespace) -> "Seed":
        """Prepare the run, and train the teacher on public data."""
        settings = ["channel.kind=plain", "data.device_test_records=0", f"privacy.epsilon={asked.epsilon}",
                    f"teacher.model={asked.teacher}"]  # fmt: skip
        sizes = {"seed": seed, "data.devices": asked.devices, "rounds": asked.rounds}
        config = load_config(None, settings, sizes)
        prepared = prepare(config)
        channel, ledger = PlainChannel(prepared.plan.clip_norm), Ledger(None, budgets(config))
        run = Federation(prepared, ledger, channel, Silent(), Remembering(prepared, Silent(), UNKEPT))
        return cls(run, run.begin())

    def accuracies(self, rule: str, attack: Attack, share: float) -> tuple[float, float]:
        """Of the teacher and of the control with zero devices, after all rounds."""
        prepared = self.run.prepared
        cloud, plan = prepared.cloud, prepared.plan
        reverse = cloud.config.reverse.model_copy(update={"aggregation": rule})
        cloud = replace(cloud, config=cloud.config.model_copy(update={"reverse": reverse}))
        channel = HostileChannel(plan.clip_norm, attack, round(share * plan.devices))
        run = replace(self.run, prepared=replace(prepared, cloud=cloud), channel=channel)
        state, students = self.begun, tuple[nn.Module, ...]()
        for _ in range(plan.rounds):
            state, students = run.play(state, students)
        return state.figures[-1].teacher, state.figures[-1].control


def mean_of(seeds: Sequence[Seed], rule: str, attack: Attack, share: float) -> tuple[float, float]:
    """The mean accuracies, in %."""
    teachers, controls = zip(*(seed.accuracies(rule, attack, share) for seed in seeds), strict=True)
    return 100 * statistics.fmean(teachers), 100 * statistics.fmean(controls)


def survived(accuracy: Mapping[float, Mapping[str, float]], control: float) -> float:
    """The largest share of attackers up to which the teacher beats the control under every attack."""
    survivors = 0.0
    for share, by_attack in sorted(accuracy.items()):
        if min(by_attack.values()) <= control:
            break
        survivors = share
    return survivors


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--teacher", default="mlp", help="mlp is quick to train again for each cell")
    parser.add_argument("--rules", nargs="+", choices=tuple(RULES), default=tuple(RULES))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.3])
    return parser.parse_args()


def main() -> None:
    """Print one block for each rule."""
    asked = options()
    seeds = [Seed.of(seed, asked) for seed in asked.seeds]
    before = 100 * statistics.fmean(seed.begun.figures[0].teacher for seed in seeds)
    for rule in asked.rules:
        honest, control = mean_of(seeds, rule, ATTACKS["NaN"], 0.0)
        found = {
            share: {name: mean_of(seeds, rule, attack, share)[0] for name, attack in ATTACKS.items()}
            for share in asked.shares
        }
        limit = survived(found, control)
        print(f"{rule}: teacher before {before:.1f} %, with zero devices {control:.1f} %;", end=" ")
        print(f"gains under every attack at {limit:.0%} of attackers. Accuracy after, in %, by attackers:")
        print(f"  {'attack':<22}{'0 %':>8}" + "".join(f"{share:>8.0%}" for share in found))
        for name in ATTACKS:
            cells = "".join(f"{found[share][name]:>8.1f}" for share in found)
            print(f"  {name:<22}{honest:>8.1f}{cells}", flush=True)


if __name__ == "__main__":
    main()
