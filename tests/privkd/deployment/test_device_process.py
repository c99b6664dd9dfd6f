"""The device as a process: the walk of its owner through the commands, what it imports, and real services."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from on_device import NAME, Box, Clouds, box, clouds, write_records
from rig import services_inside
from torch import Tensor

from cli import app
from privkd.channels.registry import open_channel
from privkd.channels.secure import SecureOptions
from privkd.deployment.agreement import agree
from privkd.deployment.device_state import Trained
from privkd.deployment.owner import load_owner, write_owner
from privkd.deployment.published import PublishedPlan
from privkd.deployment.sockets import call
from privkd.deployment.wire import Reason, unpack_answer
from privkd.errors import ConfigError, RunError
from privkd.privacy.noise import NoiseRoot

SECONDS = 60.0
NEVER = {"matplotlib", "skimage", "jinja2", "sklearn"}
"""What a device that reads its own file never loads."""
BEFORE_TRAINING = {*NEVER, "opacus", "scipy", "dp_accounting", "pandas", "crypten"}


@dataclass(frozen=True)
class Answer:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


@pytest.fixture
def cloud() -> Clouds:
    return clouds()


@pytest.fixture
def privkd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """A command of `privkd device` as it is typed in the device's folder, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            app(["device", *words])
        captured = capsys.readouterr()
        return Answer(int(left.value.code or 0), captured.out, captured.err)

    return run


@contextmanager
def running(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """`privkd device run`, once it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "privkd", "device", "run"],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stderr is not None
        assert json.loads(process.stderr.readline())["event"] == "listening"
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_walk_of_an_owner(tmp_path: Path, cloud: Clouds, privkd: Callable[..., Answer]) -> None:
    """init, show, agree, run, a question over the socket, status, ledger, export."""
    digest = quick(cloud, tmp_path / "plan")
    write_records(tmp_path / "records.npz", cloud.shard)
    assert privkd("init", "--name", NAME, "--source", "records.npz").code == 0
    again = privkd("init", "--name", NAME, "--source", "records.npz")
    assert (again.code, again.err.count("\n")) == (2, 1)
    refused = privkd("agree", "plan", "--digest", digest)
    assert refused.code == 2
    assert "minimum_devices" in refused.err
    settings = tmp_path / "device.toml"
    settings.write_text(settings.read_text().replace("minimum_devices = 2", "minimum_devices = 1"))
    shown = privkd("show", "plan")
    assert digest in shown.out
    assert "2.995 of 3 for good" in shown.out
    assert privkd("agree", "plan", "--digest", digest).code == 0
    with running(tmp_path) as process:
        answer = call(tmp_path / "device.sock", cloud.ask(run=digest), SECONDS)
        head, _ = unpack_answer(answer)
        assert head.refused is None
        assert call(tmp_path / "device.sock", cloud.ask(run=digest), SECONDS) == answer
        second = privkd("run")
        assert (second.code, "in use" in second.err) == (2, True)
        found = json.loads(privkd("status", "--json").out)
        assert "2 record" not in privkd("status").out
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
    assert (found["run"], found["round"], found["runs"]) == (digest, 0, [digest])
    assert found["spent"][0]["epsilon"] == pytest.approx(2.0, abs=0.2)
    assert not (tmp_path / "device.sock").exists()
    booked = json.loads(privkd("ledger", "--json").out)["charges"]
    assert [(each["unit"], each["round"]) for each in booked] == [("record", 0), ("record", 0), ("device", 0)]
    assert "PostProcessing" in privkd("ledger").out
    settings.write_text(settings.read_text().replace("epsilon = 3.0   ", "epsilon = 5.0   "))
    assert "privkd device budget" in privkd("run").err
    assert privkd("budget", "--reason", "a second study").code == 0
    exported = privkd("export", "--json")
    assert exported.code == 0, exported.err
    assert json.loads(exported.out)["round"] == 1
    assert (tmp_path / f"{NAME}.pt2").stat().st_size > 0


def quick(cloud: Clouds, folder: Path) -> str:
    """Publish the same run with answers at once; its name."""
    published = PublishedPlan.model_validate(
        cloud.published.model_copy(update={"answer_seconds": 0.2}).tree()
    )
    folder.mkdir(exist_ok=True)
    published.write(folder, cloud.prepared.scenario.proxy)
    return published.digest


@pytest.mark.slow
def test_it_is_killed_and_answers_on(tmp_path: Path, cloud: Clouds) -> None:
    """SIGKILL after the answer, and the next process has the same bytes."""
    device = box(tmp_path, cloud, agreed=False)
    _write_toml(device)
    digest = quick(cloud, tmp_path / "plan")
    agree(load_owner(tmp_path / "device.toml"), tmp_path / "plan", digest)
    answers = []
    for _ in range(2):
        with running(tmp_path):
            answers.append(call(tmp_path / "device.sock", cloud.ask(run=digest), SECONDS))
    assert answers[0] == answers[1]
    assert unpack_answer(answers[0])[0].refused is None


def _write_toml(device: Box) -> None:
    path = write_owner(device.folder, NAME, "records.npz")
    path.write_text(path.read_text().replace("minimum_devices = 2", "minimum_devices = 1"))


def test_it_loads_little_before_it_trains_and_never_what_draws(tmp_path: Path, cloud: Clouds) -> None:
    device = box(tmp_path, cloud)
    _write_toml(device)
    (tmp_path / "question").write_bytes(cloud.ask())
    program = """
import json, sys, threading
from pathlib import Path
from privkd.deployment import device_service
from privkd.deployment.device import DeviceProgram
from privkd.deployment.device_state import DeviceState
from privkd.deployment.owner import load_owner
from privkd.deployment.sockets import Door
owner = load_owner(Path("device.toml"))
state = DeviceState.open(owner)
program = DeviceProgram(owner, state, device_service.write_log, sleep=lambda seconds: None)
door = Door(owner.socket, program.handle)
before = sorted({name.partition(".")[0] for name in sys.modules})
answer = program.handle(Path("question").read_bytes())
print(json.dumps([before, sorted({name.partition(".")[0] for name in sys.modules}), len(answer)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    before, after, size = json.loads(done.stdout)
    assert size > 1000, done.stderr
    assert not BEFORE_TRAINING & set(before)
    assert not NEVER & set(after)


def test_device_toml_is_checked_in_one_line(tmp_path: Path) -> None:
    path = write_owner(tmp_path, NAME, "records.npz")
    assert load_owner(path).state == tmp_path / "state"
    with pytest.raises(RunError):
        write_owner(tmp_path, NAME, "records.npz")
    text = path.read_text()
    for wrong, named in (
        (text.replace("max_steps", "max_step"), "did you mean 'max_steps'"),
        (text.replace("delta = 1e-5", "delta = 2.0"), "budget.delta"),
        (text.replace('start = "00:00"', 'start = "25:00"'), "hours.start"),
        ("name = 3 3", "not TOML"),
    ):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match=named):
            load_owner(path)
    with pytest.raises(ConfigError, match="name"):
        write_owner(tmp_path / "other", "no/name", "records.npz")


@pytest.mark.slow
def test_two_devices_and_real_aggregators_give_the_simulations_mean(tmp_path: Path) -> None:
    """Over services: what they release is the mean of the devices' blocks, and the terms bind."""
    with services_inside(tmp_path / "parties") as services:
        urls = tuple(service.url for service in services)
        keys = services[0].party.members
        summed = ("channel.kind=secure", "privacy.device_epsilon=inf", "channel.minimum_devices=2")
        cloud = clouds(*summed, "data.devices=2")
        tree = cloud.published.tree()
        tree["settings"]["channel"] |= {"aggregator_urls": urls, "aggregator_keys": keys}
        published = PublishedPlan.model_validate(tree)
        own = {"urls": urls, "keys": keys}
        devices = [_member(tmp_path / name, cloud, published, name, own) for name in published.roster]
        question = cloud.tasks[0].question
        run = bytes.fromhex(published.digest)
        options = SecureOptions.of(published.config.channel, run=run, roster=published.roster, votes=None)
        with open_channel(
            "secure", clip_norm=published.clip_norm, root=NoiseRoot.from_system(), options=options
        ) as channel:
            channel.open(question, published.roster)
            for device in devices:
                asked = cloud.ask(
                    run=published.digest, device=device.owner.name, invitation=channel.invitation()
                )
                first = device.raw(asked)
                head, given = unpack_answer(first)
                assert (head.refused, given) == (None, b"")
                assert device.raw(asked) == first
                other = cloud.ask(
                    run=published.digest,
                    device=device.owner.name,
                    invitation=channel.invitation().replace(b'"minimum":2', b'"minimum":1'),
                )
                assert unpack_answer(device.raw(other))[0].refused is Reason.TERMS
            release = channel.collect(question, [])
        mean = torch.stack([_block(device, published.digest) for device in devices]).mean(0)
        expected = mean.reshape(release.answers.shape).float()
        torch.testing.assert_close(release.answers, expected, atol=1e-3, rtol=0)
        assert release.devices == published.roster
        for device in devices:
            device.stop()


def _member(folder: Path, cloud: Clouds, published: PublishedPlan, name: str, own: dict[str, Any]) -> Box:
    number = published.number(name)
    shard = cloud.prepared.simulation.shards[number]
    device = box(
        folder, cloud, shard=shard, agreed=False, name=name, aggregators=own,
        bounds={"minimum_devices": 2}, budget={"device_epsilon": np.inf},
    )  # fmt: skip
    published.write(folder, cloud.prepared.scenario.proxy)
    agree(device.owner, folder, published.digest)
    return device


def _block(device: Box, run: str) -> Tensor:
    trained = device.state.last(Trained, run)
    assert trained is not None
    return device.state.kept_round(trained)["block"]
