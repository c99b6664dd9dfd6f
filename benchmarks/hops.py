"""How often the product's code goes from one of its files to another: what a reader who follows it must open.

    python benchmarks/hops.py

Counted are the calls of our functions whose file is not that of our call before: for one step of DP-SGD, as
the vectorised engine takes it in a round, and for a small membership audit of a device's student.
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import privkd
from audits import membership
from privkd.prepared import prepare

ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(f"{ROOT / package}/" for package in ("privkd", "attacks", "audits"))
SMALL = {
    "channel": "plain",
    "controls": False,
    "data": {"devices": 3, "records_per_device": 30, "device_test_records": 4, "proxy_records": 40},
    "rounds": 2,
    "teacher": {"model": {"name": "mlp", "width": 8}, "fit": {"steps": 30}},
    "reverse": {"fit": {"steps": 8}},
}
STUDENT = {"models": [{"name": "mlp", "width": 8}], "public_fit": {"steps": 10}, "engine": "cohort"}

Moves = Counter[tuple[str, str]]
"""How often from which file to which."""


def config_of(steps: int) -> privkd.Config:
    """Settings of a run of about a second, with so many steps of DP-SGD a round."""
    return privkd.Config(**SMALL, student=STUDENT | {"dp": {"steps": steps, "part": "all"}})


def moves_of(work: Callable[[], object]) -> Moves:
    """The moves from file to file while ``work`` is done, in this thread."""
    moves: Moves = Counter()
    before = ""

    def called(frame: FrameType, event: str, _: object) -> None:
        nonlocal before
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(OURS):
            if before not in ("", file):
                moves[_short(before), _short(file)] += 1
            before = file

    sys.setprofile(called)
    try:
        work()
    finally:
        sys.setprofile(None)
    return moves


def _short(file: str) -> str:
    return str(Path(file).relative_to(ROOT))


def of_training(steps: int) -> Moves:
    """The moves of the devices' training in a first round, with so many steps of DP-SGD."""
    prepared = prepare(config_of(steps))
    task = prepared.cloud.publish(prepared.cloud.trained_teacher(), round=0)
    starts = task.dealt(range(prepared.plan.devices))
    return moves_of(lambda: prepared.simulation.train(task, starts, prepared.draws(0), lambda done: None))


def of_a_step() -> Moves:
    """What one step more makes of it."""
    of_training(3)  # What is computed once in a process is computed here.
    return of_training(4) - of_training(3)


def of_an_audit() -> Moves:
    """The moves of a membership audit of a device's student, on a run of three devices."""
    with tempfile.TemporaryDirectory() as folder:
        run = privkd.train(config_of(3), out=Path(folder) / "run")
        return moves_of(lambda: membership(run, view="student", shadows=8, targets=1))


def main() -> None:
    """Print both figures, with the most frequent moves."""
    for what, moves in (("one step of DP-SGD", of_a_step()), ("a small membership audit", of_an_audit())):
        print(f"{what}: {moves.total():,} moves among {len({file for pair in moves for file in pair})} files")
        for (one, other), count in moves.most_common(10):
            print(f"{count:8,} {one} -> {other}")


if __name__ == "__main__":
    main()
