"""The page for three hosts and five devices, followed to its end: from nothing to a better teacher.

Real processes, mutual TLS. A folder stands for each host. Sections 1 to 10 are done as they are written, but
for the names of hosts, ports and sockets, which are this machine's, fewer seconds and a round less. One
device holds records that are nowhere else, and more of them than the others; what passes between the cloud
and the devices is looked at.
"""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hosts import PARTIES, Hosts, Section, edit, enrolled, free_ports, privkd, secret_places
from on_device import write_records
from safetensors.torch import load_file

from privkd.config import DataConfig
from privkd.data.scenario import LabelledSet, build_scenario
from privkd.deployment.device_state import round_file, run_folder
from privkd.deployment.published import PublishedPlan
from privkd.deployment.sockets import Door, call
from privkd.deployment.wire import unpack_answer, unpack_question
from privkd.runs.result import Result
from privkd.secure.shares import fitting_encoding

ROUNDS, SECONDS = 2, 120.0
COUNT = 211
"""Of the records that the marked device has."""
FEWER: Any = {
    "run": {
        "data": {"proxy_records": 40},
        "teacher": {"model": {"name": "mlp", "width": 8}, "fit": {"steps": 30}},
        "student": {
            "models": [{"name": "mlp", "width": 8}],
            "public_fit": {"steps": 10},
            "dp": {"steps": 3, "part": "all"},
        },
        "reverse": {"fit": {"steps": 8}},
        "channel": {"minimum_devices": 2},
    }
}
"""What the quick walk over two devices changes on the page: it looks at all but how good the teacher is."""


@dataclass
class Tap:
    """Listens where the cloud looks for a device, carries on to the device, and keeps what passes."""

    device: str
    device_listens: Path
    before: Callable[[int], None] = lambda round: None
    after: Callable[[str, int], None] = lambda device, round: None
    passed: list[tuple[bytes, bytes]] = field(default_factory=list)

    def __call__(self, question: bytes) -> bytes:
        round = unpack_question(question)[0].round
        self.before(round)
        answer = call(self.device_listens, question, SECONDS)
        self.passed.append((question, answer))
        self.after(self.device, round)
        return answer


@dataclass
class Walk:
    """What is known at the page's end.

    Attributes:
        hosts: the folders.
        run: the run's name.
        taps: on the way to each device.
        records: of the marked device.
        blocks: each device's answers in the clear by device and round, as bytes in each form.
        memory: what was found in the cloud's memory: ``None`` where it cannot be read here.
        said: by commands of the page, by what they are.
    """

    hosts: Hosts
    records: LabelledSet
    run: str = ""
    taps: dict[str, Tap] = field(default_factory=dict)
    blocks: dict[tuple[str, int], list[bytes]] = field(default_factory=dict)
    memory: dict[str, bool] | None = None
    said: dict[str, Any] = field(default_factory=dict)
    cloud: subprocess.Popen[str] | None = None

    @property
    def quick(self) -> bool:
        """Whether it is a walk over fewer devices."""
        return len(self.hosts.boxes) < 5

    @property
    def marked(self) -> str:
        """The device whose records are looked for."""
        return self.hosts.boxes[-1]

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.hosts.base / "cloud" / "cloud" / "runs" / self.run[:12]

    def keep_block(self, device: str, round: int) -> None:
        """Look up what the device answered, which it alone has."""
        state = self.hosts.base / device / "device" / "state"
        block = load_file(state / round_file(self.run, round))["block"]
        plan = PublishedPlan.load(run_folder(state, self.run))[0]
        encoding = fitting_encoding(plan.clip_norm, devices=len(plan.roster), parties=2, rho=plan.rho)
        whole = encoding.encode(block.double().numpy().reshape(1, -1))[0]
        spelt = [block.float(), block.double(), torch.from_numpy(whole), torch.from_numpy(whole).int()]
        middle = block.numel() // 2
        rows = [form.reshape(-1)[middle : middle + 20].numpy() for form in spelt]
        assert all(len(np.unique(row)) > 2 for row in rows)
        self.blocks[device, round] = [row.tobytes() for row in rows]

    def look_into_the_cloud(self, round: int) -> None:
        """Search its memory, once it has what devices answered in the first round."""
        if round == ROUNDS - 1 and self.cloud is not None:
            marked = [form for record in self.records.inputs[:3] for form in forms(record)]
            answers = [form for (_, asked), block in self.blocks.items() if asked == 0 for form in block]
            sought = {"a record": marked, "an answer": answers, "the run's name": [self.run.encode()]}
            self.memory = searched(self.cloud.pid, sought)


def forms(record: torch.Tensor) -> list[bytes]:
    """One record as bytes: as the owner has it, and scaled."""
    raw = (record * 16).round()
    whole = [raw.numpy().astype(kind).tobytes() for kind in (np.uint8, np.float32, np.float64)]
    return [*whole, record.numpy().tobytes(), record.double().numpy().tobytes()]


def searched(process: int, sought: Mapping[str, list[bytes]]) -> dict[str, bool] | None:
    """Which of these are in a process's memory; ``None`` where that cannot be read."""
    found = dict.fromkeys(sought, False)
    try:
        maps = Path(f"/proc/{process}/maps").read_text().splitlines()
        with Path(f"/proc/{process}/mem").open("rb", 0) as memory:
            for line in maps:
                span, rights, *_ = line.split()
                # What cannot be written is code, and files of the libraries.
                if rights.startswith("rw"):
                    held = _region(memory, *(int(place, 16) for place in span.split("-")))
                    found = {name: found[name] or holds(held, sought[name]) for name in sought}
    except OSError:
        return None
    return found


def _region(memory: FileIO, start: int, end: int) -> bytes:
    """One of a living process's, which may have given it back since."""
    memory.seek(start)
    with contextlib.suppress(OSError):
        return memory.read(end - start) or b""
    return b""


def own_records(folder: Path) -> LabelledSet:
    """Digits like those of the device's part, and equal to none that anybody else has."""
    shard = build_scenario(DataConfig(source="digits", devices=5), seed=0).devices[4].train
    generator = torch.Generator().manual_seed(7)
    chosen = torch.randint(len(shard), (COUNT,), generator=generator)
    moved = (shard.inputs[chosen] * 16) + torch.randint(
        -1, 2, (COUNT, *shard.inputs.shape[1:]), generator=generator
    )
    made = LabelledSet(moved.clamp(0, 16) / 16, shard.labels[chosen])
    write_records(folder / "records.npz", made)
    return made


@pytest.fixture(scope="module", params=[2, pytest.param(5, marks=pytest.mark.slow)], ids="{} devices".format)
def walk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    base = tmp_path_factory.mktemp("walk")
    hosts = Hosts(base, tuple(f"device-{number}" for number in range(request.param)))
    (base / hosts.boxes[-1] / "device").mkdir(parents=True)
    found = Walk(hosts, own_records(base / hosts.boxes[-1] / "device"))
    ports = dict(zip((*PARTIES, "peers"), free_ports(4), strict=True))
    with hosts.ended():
        table = enrolled(
            hosts,
            lambda letter: ("--host", "127.0.0.1", "--port", str(ports[letter])),
            {
                "peers": {"host": "127.0.0.1", "port": ports["peers"]},
                "limits": {"minimum_devices": 2 if found.quick else 4},
            },
        )
        parties_start(hosts, ports)
        cloud_publishes(found, table)
        for box in hosts.boxes:
            owner_agrees(found, box, table)
        doors = tapped(found)
        rounds(found)
        for door in doors:
            door.close()
        yield found


def parties_start(hosts: Hosts, ports: Mapping[str, int]) -> None:
    """Section 6."""
    serve, preflight = Section(6).commands
    for letter in PARTIES:
        process = hosts.start(letter, serve)
        assert process.stdout is not None
        assert "listens on" in process.stdout.readline()
    here = {f"https://{letter}.example:8440": f"https://127.0.0.1:{ports[letter]}" for letter in PARTIES}
    assert "Ready for a round" in hosts.run("a", [here.get(word, word) for word in preflight])


def cloud_publishes(walk: Walk, table: Mapping[str, Any]) -> None:
    """Section 7, and a plan of one round more, to which owners agree while they still can."""
    section, hosts = Section(7), walk.hosts
    init, preflight, enrol, publish = section.commands
    hosts.run("cloud", init)
    seconds = {"answer_seconds": 0.2, "again_seconds": SECONDS / 2, "patience_seconds": SECONDS}
    here = {"sockets": str(hosts.base / "engine" / "{device}.sock"), "run": {"rounds": ROUNDS}, **seconds}
    config = hosts.base / "cloud" / "cloud" / "cloud.toml"
    edit(config, table, *section.files, FEWER if walk.quick else {}, here)
    hosts.run("cloud", preflight)
    for box in hosts.boxes:
        hosts.run("cloud", [box if word == "device-0" else word for word in enrol])
    walk.run = hosts.run("cloud", publish).split()[1]
    second = config.with_name("second.toml")
    second.write_text(config.read_text())
    edit(second, {"published": "second", "run": {"rounds": 1}})
    said = hosts.run("cloud", [word.replace("cloud.toml", "second.toml") for word in publish])
    walk.said["second run"] = said.split()[1]


def owner_agrees(walk: Walk, box: str, table: Mapping[str, Any]) -> None:
    """Section 8, on one device."""
    section, hosts = Section(8), walk.hosts
    init, preflight, show, agree, run = section.commands
    marked = box == walk.marked
    words = {"device-0": box, "digits": "records.npz" if marked else "digits"}
    hosts.run(box, [words.get(word, word) for word in init])
    own = {name: table["aggregators"][name].replace("cloud", box) for name in ("certificate", "key")}
    number = int(box.rpartition("-")[2])
    records = {"source": "records.npz"} if marked else {"part": [number, 5]}
    socket = {"socket": str(hosts.base / "listen" / f"{box}.sock"), "records": records}
    (hosts.base / "listen").mkdir(exist_ok=True)
    settings = hosts.base / box / "device" / "device.toml"
    changes = [{**each, "records": {}} if marked else each for each in section.files]
    fewer = {"bounds": {"minimum_devices": 2}} if walk.quick else {}
    edit(settings, table, {"aggregators": own}, *changes, fewer, socket)
    hosts.run(box, preflight)
    for name in ("published", "second"):
        for file in ("plan.json", "proxy.safetensors"):
            hosts.carry(f"cloud/cloud/{name}/{file}", f"{box}/{name}/")
    walk.said[box, "show"] = hosts.run(box, show)
    for name, run_name in (("published", walk.run), ("second", walk.said["second run"])):
        named = {"published": name, "DIGEST": run_name}
        hosts.run(box, [named.get(word, word) for word in agree])
    hosts.start(box, run)


def tapped(walk: Walk) -> list[Door]:
    """Everything that the engine carries goes by us."""
    base = walk.hosts.base
    (base / "engine").mkdir()
    for box in walk.hosts.boxes:
        before = walk.look_into_the_cloud if box == walk.marked else Tap.before
        walk.taps[box] = Tap(box, base / "listen" / f"{box}.sock", before, walk.keep_block)
    return [Door(base / "engine" / f"{box}.sock", tap) for box, tap in walk.taps.items()]


def rounds(walk: Walk) -> None:
    """Sections 9 and 10; and the second run, for which no device has anything left."""
    hosts = walk.hosts
    run, status, *of_device = Section(9).commands
    walk.cloud = hosts.start("cloud", [*run, "--json"])
    walk.said["run"], _ = walk.cloud.communicate(timeout=600)
    assert walk.cloud.returncode == 0, (hosts.base / "cloud.log").read_text()
    walk.cloud = None
    walk.said["status"] = json.loads(hosts.run("cloud", [*status, "--json"]))
    for box in hosts.boxes:
        for words in of_device:
            walk.said[box, words[2]] = json.loads(hosts.run(box, [*words, "--json"]))
    for tap in walk.taps.values():
        tap.after = lambda device, round: None
    again = [word.replace("cloud.toml", "second.toml") for word in run]
    with contextlib.chdir(hosts.base / "cloud"):
        walk.said["second exit"] = privkd(*again[1:]).code
    over = [word.replace("cloud.toml", "second.toml") for word in status]
    walk.said["second"] = json.loads(hosts.run("cloud", [*over, "--json"]))
    (report,) = Section(10).commands
    hosts.run("cloud", [str(walk.folder) if word == "RUNFOLDER" else word for word in report])


def below(folder: Path, sought: list[bytes]) -> list[Path]:
    """The files that hold one of these."""
    return [path for path in folder.rglob("*") if path.is_file() and holds(path.read_bytes(), sought)]


def holds(data: bytes, sought: list[bytes]) -> bool:
    return any(one in data for one in sought)


def test_the_teacher_is_better_than_before(walk: Walk) -> None:
    result = Result.read(walk.folder / "result.json")
    before, *_, after = [row.teacher for row in result.rounds]
    assert len(result.rounds) == 1 + ROUNDS
    assert walk.quick or after > before + 0.05
    assert walk.said["status"]["answered"] == [*walk.hosts.boxes]
    assert (walk.said["status"]["finished"], walk.said["status"]["refused"]) == (True, {})


def test_each_devices_own_ledger_says_what_was_spent(walk: Walk) -> None:
    priced = PublishedPlan.load(walk.hosts.base / "cloud" / "cloud" / "published")[0].epsilon_record
    assert walk.quick or f"{priced:.4g}" == "2.995", "as the page says"
    for box in walk.hosts.boxes:
        assert f"{priced:.4g} of 3" in walk.said[box, "show"]
        spent = {each["unit"]: each for each in walk.said[box, "status"]["spent"]}
        assert spent["record"]["epsilon"] == pytest.approx(priced)
        assert (spent["record"]["budget"], 2.9 < priced <= 3.0) == (3.0, True)
        assert len(walk.said[box, "ledger"]["charges"]) == 3 * ROUNDS
        assert (walk.hosts.base / box / "student.pt2").stat().st_size > 0


def test_a_second_run_is_refused_by_all_and_nothing_is_released(walk: Walk) -> None:
    assert walk.said["second exit"] == 1
    assert walk.said["second"]["refused"] == dict.fromkeys(walk.hosts.boxes, "budget")
    assert (walk.said["second"]["done"], walk.said["second"]["answered"]) == (0, [])
    folder = walk.folder.with_name(walk.said["second run"][:12])
    assert below(folder, [b'"released"']) == []
    later = (
        "--digest",
        walk.said["second run"],
        "--config",
        walk.hosts.base / walk.marked / "device/device.toml",
    )
    answer = privkd("device", "agree", walk.hosts.base / walk.marked / "second", *later)
    assert (answer.code, "of 3 for good" in answer.err) == (2, True), "nor can an owner agree any more"


def test_the_report_draws_who_ran_where(walk: Walk) -> None:
    page = (walk.folder / "report.md").read_text()
    assert f"{len(walk.hosts.boxes)} devices elsewhere, over socket" in page
    assert page.count("https://127.0.0.1:") >= len(PARTIES)
    assert (walk.folder / "report.html").exists()


def test_no_private_key_is_in_another_folder(walk: Walk) -> None:
    """Of TLS, sealing and noise, and of all of a device's randomness."""
    places = secret_places(walk.hosts.base)
    roots = [path for path in places if path.name == "root.key"]
    assert len(roots) == len(walk.hosts.boxes)
    assert all(found == {secret.parent} for secret, found in places.items())


def test_no_record_and_no_clear_answer_is_with_anybody_else(walk: Walk) -> None:
    base, own = walk.hosts.base, walk.hosts.base / walk.marked
    records = [form for record in walk.records.inputs for form in forms(record)]
    answers = [form for block in walk.blocks.values() for form in block]
    assert len(walk.blocks) == ROUNDS * len(walk.hosts.boxes)
    assert below(own, records), "the twin: its owner has them"
    assert below(own / "device" / "state", answers), "the twin: so it has its answers"
    for folder in ("cloud", "home", *PARTIES):
        assert below(base / folder, [*records, *answers]) == []
    for tap in walk.taps.values():
        for question, answer in tap.passed:
            assert not holds(question + answer, [*records, *answers])


def test_nor_in_the_clouds_memory(walk: Walk) -> None:
    if walk.memory is None:
        pytest.skip(f"the memory of another process cannot be read here ({sys.platform})")
    assert walk.memory == {"a record": False, "an answer": False, "the run's name": True}


def test_nobody_is_told_how_many_records_there_are(walk: Walk) -> None:
    """Neither in words, nor by the size of what a device sends."""
    counted = re.compile(rb"(?<![0-9A-Fa-f.])%d(?![0-9A-Fa-f.])" % COUNT)
    files = [path for name in ("cloud", *PARTIES) for path in (walk.hosts.base / name).rglob("*.json*")]
    assert len(files) > len(PARTIES)
    assert [path for path in files if counted.search(path.read_bytes())] == []
    for tap in walk.taps.values():
        assert not any(counted.search(answer) for _, answer in tap.passed)
    answers = {len(answer) for tap in walk.taps.values() for _, answer in tap.passed}
    assert len(answers) == 1
    uploads = list(walk.hosts.base.glob(f"device-*/device/state/runs/{walk.run}/*upload*"))
    assert len(uploads) == len(walk.hosts.boxes)
    assert len({path.stat().st_size for path in uploads}) == 1


def test_answers_hold_a_name_a_digest_and_nothing_else(walk: Walk) -> None:
    for box, tap in walk.taps.items():
        head, given = unpack_answer(tap.passed[0][1])
        assert (head.device, head.refused, given) == (box, None, b"")
