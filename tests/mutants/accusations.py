"""How often the closing audit accuses sound runs: ``python tests/mutants/accusations.py --runs 1000``.

One small run is opened, and audited again and again, each time with another seed of all that is random in it:
DP-SGD's samples and noise, the channel's, and the audit's own records and coins. The audit is the one that a
run ends with, only of fewer canaries, so that it takes well under a second.

A sound run is accused with probability at most `SOUND`: the checks' `on_device.FALSE_ALARM` and
`on_channel.FALSE_ALARM`, and the bounds' 1 - `closing.CONFIDENCE`.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

_TESTS = str(Path(__file__).resolve().parents[1])
if __name__ == "__main__":
    # In place of this folder, whose modules are a package's.
    sys.path[:1] = [_TESTS, f"{_TESTS}/support", str(Path(_TESTS).parent)]

from running import federation_of  # noqa: E402
from scipy.stats import binom  # noqa: E402

import audits.mechanisms.closing  # noqa: E402
import audits.mechanisms.on_channel  # noqa: E402
import audits.mechanisms.on_device  # noqa: E402
from audits.mechanisms.on_channel import ReleaseAudit, audit_releases  # noqa: E402
from mutants.mutant import Put  # noqa: E402
from mutants.settings import NOISED, SAMPLED, SMALL  # noqa: E402
from privkd.channels.channel import Channel, NoisedChannel  # noqa: E402
from privkd.config import load_config  # noqa: E402
from privkd.prepared import Prepared, prepare  # noqa: E402
from privkd.privacy.events import Unit  # noqa: E402
from privkd.privacy.noise import NoiseRoot  # noqa: E402
from privkd.progress import Silent  # noqa: E402
from privkd.runs.checkpoint import State  # noqa: E402

SOUND = (
    audits.mechanisms.on_device.FALSE_ALARM
    + audits.mechanisms.on_channel.FALSE_ALARM
    + 1
    - audits.mechanisms.closing.CONFIDENCE
)
KINDS: dict[str, tuple[str, ...]] = {"full batches": (), "sampled": SAMPLED}


def fewest(channel: Channel, rounds: int, seed: int, *, most: int) -> ReleaseAudit:
    """The audit of a channel, with as few canary devices as it can do with."""
    return audit_releases(channel, rounds, seed, most=0)


def cut_short(put: Put) -> None:
    """As few canaries as make an audit of about half a second."""
    put(audits.mechanisms.on_device, "_POOL", 10)
    put(audits.mechanisms.on_device, "_MOST_DRAWS", 120_000)
    put(audits.mechanisms.on_device, "_CALLS", 6)
    put(audits.mechanisms.closing, "audit_releases", fewest)


@dataclass(frozen=True)
class Opened:
    """A small run that is open, with what its ledger says in the end.

    Attributes:
        run: its settings, data and plan.
        state: its beginning: a teacher that public students are distilled from.
        spent: the upper bounds on epsilon of all its rounds, by unit.
    """

    run: Prepared
    state: State
    spent: dict[Unit, float]

    @classmethod
    def of(cls, *settings: str) -> "Opened":
        """A small run on the noised channel."""
        run = prepare(load_config(None, [*SMALL, *NOISED, *settings]))
        channel = NoisedChannel(run.plan.clip_norm, run.plan.rho, run.root)
        federation = federation_of(run, channel)
        for round in range(run.plan.rounds):
            federation._debit(Unit.RECORD, run.plan.training_event, round)
            federation._debit(Unit.DEVICE, channel.event, round)
        spent = {unit: federation.ledger.spent(unit).high for unit in (Unit.RECORD, Unit.DEVICE)}
        return cls(run, federation.begin(), spent)

    def accusations(self, seed: int) -> Iterator[str]:
        """What the audit says against the run with this seed: nothing, if it is sound."""
        run, config = self.run, self.run.config.model_copy(update={"seed": seed})
        channel = NoisedChannel(run.plan.clip_norm, run.plan.rho, NoiseRoot.from_seed(seed))
        again = federation_of(replace(run, config=config), channel)
        audited = audits.mechanisms.closing.closing_audit(again, self.state, Silent())
        yield from (check.name for check in audited.checks if not check.passed)
        for bound in audited.bounds:
            if bound.epsilon > self.spent[bound.unit]:
                yield f"epsilon of at least {bound.epsilon:.3f} per {bound.unit}"


def count(kind: str, runs: int, report: Callable[[int, list[str]], None]) -> list[list[str]]:
    """The accusations of each of so many runs, with the seeds 0, 1, 2, ..."""
    opened = Opened.of(*KINDS[kind])
    found = []
    for seed in range(runs):
        found.append(list(opened.accusations(seed)))
        report(seed, found[-1])
    return found


def most_accused(runs: int, *, chance: float) -> int:
    """How many of so many sound runs are accused at most, but with this ``chance``."""
    return int(binom.isf(chance, runs, SOUND))


def main() -> None:
    """Count, and print."""
    parser = argparse.ArgumentParser(description="How often sound runs are accused.")
    parser.add_argument("--runs", type=int, default=20, help="of each kind")
    parser.add_argument("--kind", choices=KINDS, help="one kind alone")
    arguments = parser.parse_args()
    cut_short(setattr)
    for kind in [arguments.kind] if arguments.kind else list(KINDS):
        start = time.monotonic()
        found = count(kind, arguments.runs, lambda seed, said: print(seed, *said) if said else None)
        accused, words = sum(map(bool, found)), Counter(word for said in found for word in said)
        each = (time.monotonic() - start) / arguments.runs
        expected = f"expected at most {SOUND * arguments.runs:.2g}"
        print(f"{kind}: {accused} of {arguments.runs} accused, {expected}; {each:.2f} s each", dict(words))


if __name__ == "__main__":
    main()
