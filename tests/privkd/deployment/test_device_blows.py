"""`privkd device run` is killed at every durable step, has a wrong clock, and answers on the grid."""

import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import tally
from faults import Commands, Kind, Strike
from on_device import Clouds, clouds
from owners import Home, awake, begun, hurried, invitation
from owners import home as new_home

from privkd.data.scenario import LabelledSet
from privkd.deployment.agreement import agree
from privkd.deployment.device_state import read_ledger
from privkd.deployment.wire import Reason, unpack_answer
from privkd.privacy.events import Unit

KINDS: tuple[Kind, ...] = ("before", "within", "after")


@dataclass(frozen=True)
class Whole:
    """A device that nothing struck: its folder as of before, the questions, its answers and its charges."""

    template: Home
    cloud: Clouds
    answers: tuple[bytes, ...]
    booked: list[dict[str, object]]
    points: tuple[str, ...]

    def questions(self) -> list[bytes]:
        """Of both rounds; the second shows the witness that the first one told."""
        run = self.cloud.published.digest
        told = unpack_answer(self.answers[0])[0].ledger if self.answers else None
        return [self.cloud.ask(0, run=run), self.cloud.ask(1, run=run, witness=told)]


@pytest.fixture(scope="module")
def whole(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    base, cloud = tmp_path_factory.mktemp("whole"), hurried(clouds())
    template = new_home(commands, base / "device", cloud.shard)
    agree(template.owner, cloud.write(base / "plan"), cloud.published.digest)
    begun(template)
    device, answers = template.moved(base / "unharmed"), list[bytes]()
    assert device.start()
    for round in range(2):
        asked = Whole(template, cloud, tuple(answers), [], ()).questions()[round]
        answer = device.ask(asked)
        assert answer is not None
        assert unpack_answer(answer)[0].refused is None
        answers.append(answer)
    ended = device.stop()
    assert ended is not None
    assert ended.code == 0
    return Whole(template, cloud, tuple(answers), device.booked(), ended.points)


def strike(whole: Whole, folder: Path, hit: Strike) -> None:
    """Kill a device there, start it again, and ask what was not answered again."""
    device = whole.template.moved(folder)
    alive = device.start(hit)
    for question, expected in zip(whole.questions(), whole.answers, strict=True):
        answer = device.ask(question) if alive else None
        if answer is None:
            device.stop()
            assert device.start()
            alive, answer = True, device.ask(question)
        assert answer == expected
    device.stop()
    assert [each.code for each in device.ended].count(-9) == 1, "the blow ended it, and nothing else"
    assert device.start()
    assert device.ask(whole.questions()[1]) == whole.answers[1]
    device.stop()
    assert device.booked() == whole.booked
    assert not list(folder.rglob("*.part")), "nothing half-written is left"
    tally.note("kills of a device", "same bytes, charged once")


def strikes(points: tuple[str, ...]) -> list[Strike]:
    """One before, one after and, where something is written or sent, one within each point."""
    return [
        Strike(kind, number)
        for number, point in enumerate(points)
        for kind in KINDS
        if kind != "within" or point.startswith(("write", "answer"))
    ]


def test_the_points_are_all_that_the_program_promises(whole: Whole) -> None:
    """Journal, ledger, student, upload, status, and the answer itself, in the order of the module's words."""
    names = [point.split()[1].rpartition("/")[2] for point in whole.points]
    order = ["journal.jsonl", "ledger.jsonl", "round-000000.safetensors", "round-000000-0.upload"]
    seen = [name for name, _ in itertools.groupby(names)]
    places = [seen.index(name) for name in (*order, "status.json", "device.sock")]
    assert places == sorted(places)
    assert len(whole.booked) == 6


def test_a_kill_at_telling_steps_changes_nothing(tmp_path: Path, whole: Whole) -> None:
    """Charged and not trained; trained and not kept; kept and not told; told in half."""

    def at(name: str) -> int:
        return next(number for number, point in enumerate(whole.points) if point.endswith(name))

    hits = [
        Strike("after", at("write ledger.jsonl")),
        Strike("before", at("round-000000.safetensors")),
        Strike("after", at("round-000000-0.upload") + 2),
        Strike("within", at("answer device.sock")),
    ]
    for number, hit in enumerate(hits):
        strike(whole, tmp_path / str(number), hit)


@pytest.mark.slow
def test_a_kill_at_every_step_changes_nothing(tmp_path: Path, whole: Whole) -> None:
    for number, hit in enumerate(strikes(whole.points)):
        strike(whole, tmp_path / str(number), hit)


SECURE = (
    "channel.kind=secure",
    "channel.minimum_devices=1",
    "channel.deadline=1",
    "privacy.device_epsilon=inf",
    "data.devices=2",
)
CLOCK = """
import time
real = time.time
time.time = lambda: real() + {ahead}
"""
DAY = 86_400


@pytest.mark.parametrize(
    ("ahead", "reason", "words"),
    [
        (2 * DAY, Reason.TERMS, "over or too far ahead"),
        (-DAY, Reason.TERMS, "over or too far ahead"),
        pytest.param(0, Reason.LATER, "127.0.0.1:9", marks=pytest.mark.slow),
    ],
)
def test_a_clock_that_is_days_away_is_told_to_the_owner_and_costs_nothing(
    tmp_path: Path, commands: Commands, ahead: int, reason: Reason, words: str
) -> None:
    """Against the moment at which the cloud's terms end; with a right one it gets as far as the parties."""
    pins = ["ab" * 32, "cd" * 32]
    urls = ["http://127.0.0.1:9", "http://127.0.0.1:10"]
    cloud = hurried(clouds(*SECURE), aggregator_urls=urls, aggregator_keys=pins)
    device = new_home(commands, tmp_path / "d", cloud.shard, aggregators={"urls": urls, "keys": pins})
    agree(device.owner, cloud.write(tmp_path / "plan"), cloud.published.digest)
    (tmp_path / "sitecustomize.py").write_text(CLOCK.format(ahead=ahead))
    path = os.pathsep.join([str(tmp_path), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-m", "privkd", "device", "run"],
        cwd=device.folder, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        assert json.loads(process.stderr.readline())["event"] == "listening"
        answer = device.ask(cloud.ask(run=cloud.published.digest, invitation=invitation(cloud)))
    finally:
        process.kill()
        process.communicate()
    assert answer is not None
    assert unpack_answer(answer)[0].refused is reason
    code, shown, _ = device.status()
    assert (code, shown["refusals"]) == (0, {reason.value: 1})
    assert words in shown["words"]
    assert any("clock" in warning for warning in shown["warnings"]) is (ahead > 0)
    charged = read_ledger(device.owner)
    assert charged is not None
    assert len(charged.charges(Unit.RECORD, device.owner.name)) == (0 if ahead else 2)


def test_ten_records_and_a_thousand_are_answered_at_the_same_moment(
    tmp_path: Path, commands: Commands
) -> None:
    """By the wall, of two processes at once; a second's play for a machine under load."""
    seconds, cloud = 5.0, hurried(clouds(), 5.0)
    homes = []
    for count in (10, 1000):
        shard = cloud.shard
        times = -(-count // len(shard.labels))
        records = LabelledSet(shard.inputs.repeat(times, 1, 1, 1)[:count], shard.labels.repeat(times)[:count])
        homes.append(new_home(commands, tmp_path / str(count), records))
        agree(homes[-1].owner, cloud.write(tmp_path / "plan"), cloud.published.digest)

    def timed(device: Home) -> tuple[float, bytes | None]:
        begun_at = time.monotonic()
        answer = device.ask(cloud.ask(run=cloud.published.digest))
        return time.monotonic() - begun_at, answer

    with awake(homes), ThreadPoolExecutor(2) as pool:
        (few, one), (many, other) = pool.map(timed, homes)
    assert one is not None
    assert other is not None
    assert len(one) == len(other)
    assert unpack_answer(other)[0].refused is None
    assert 0 <= few - seconds < 1.0
    assert 0 <= many - seconds < 1.0
