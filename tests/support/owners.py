"""Devices as their owners have them: a folder each, and `privkd device run` as a process at its socket."""

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from signal import SIGTERM
from typing import Any

import tomli_w
from faults import NOTHING, Answer, Commands, Started, Strike
from on_device import NAME, Clouds, write_records
from sites import NAMES, Site

from privkd.channels.secure import SecureChannel, SecureOptions
from privkd.data.scenario import LabelledSet
from privkd.deployment.agreement import agree
from privkd.deployment.device_state import DeviceState
from privkd.deployment.owner import DEVICE_FILE, Owner, load_owner
from privkd.deployment.published import PublishedPlan
from privkd.deployment.sockets import call
from privkd.privacy.noise import NoiseRoot

SECONDS = 90.0
_BLOW_SECONDS = 10.0


@dataclass
class Home:
    """A device's folder, and the processes that ran in it, the last one perhaps still.

    Attributes:
        folder: with ``device.toml``, its records and its state.
        commands: what runs them.
        ended: how those before ended.
    """

    folder: Path
    commands: Commands
    ended: list[Answer] = field(default_factory=list)
    _running: Started | None = None
    _doomed: bool = False

    @property
    def owner(self) -> Owner:
        return load_owner(self.folder / DEVICE_FILE)

    @property
    def process(self) -> Started:
        assert self._running is not None
        return self._running

    def start(self, strike: Strike = NOTHING) -> bool:
        """Run it; whether it lives until it listens."""
        assert self._running is None
        self._running = self.commands.start("device", "run", strike=strike, cwd=self.folder)
        self._doomed = strike != NOTHING
        while not self._running.ended:
            if '"listening"' in self._running.said:
                return True
            time.sleep(0.01)
        return False

    def ask(self, question: bytes, seconds: float = SECONDS) -> bytes | None:
        """Its answer; ``None`` where it ends before it has given it."""
        try:
            return call(self.owner.socket, question, seconds)
        except OSError:
            return None

    def stop(self) -> Answer | None:
        """End it, unless it has or a blow is about to; how it ended."""
        if self._running is None:
            return None
        until = time.monotonic() + _BLOW_SECONDS
        while self._doomed and not self._running.ended and time.monotonic() < until:
            time.sleep(0.01)
        if not self._running.ended:
            self._running.signal(SIGTERM)
        self.ended.append(self.commands.wait(self._running))
        self._running = None
        return self.ended[-1]

    def log(self) -> list[dict[str, Any]]:
        """What it told its owner, over all processes."""
        said = [*(each.err for each in self.ended), self._running.said if self._running else ""]
        return [json.loads(line) for line in "".join(said).splitlines()]

    def booked(self) -> list[dict[str, Any]]:
        """Every charge, as `privkd device ledger` tells it."""
        told = self.commands.run("device", "ledger", "--json", cwd=self.folder)
        return list(json.loads(told.out)["charges"])

    def status(self) -> tuple[int, dict[str, Any], str]:
        """Exit code of `privkd device status --json`, what it shows, and what it says beside."""
        told = self.commands.run("device", "status", "--json", cwd=self.folder)
        return told.code, json.loads(told.out), told.err

    def moved(self, folder: Path) -> "Home":
        """A copy of the folder, under the same root key."""
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("*.sock"))
        return Home(folder, self.commands)


def home(
    commands: Commands,
    folder: Path,
    shard: LabelledSet,
    *,
    name: str = NAME,
    socket: str = "device.sock",
    minimum: int = 1,
    aggregators: Mapping[str, Any] | None = None,
) -> Home:
    """A device that has agreed to nothing yet."""
    folder.mkdir(parents=True)
    write_records(folder / "records.npz", shard)
    settings = {
        "name": name,
        "socket": socket,
        "records": {"source": "records.npz"},
        "bounds": {"minimum_devices": minimum},
        "budget": {"device_epsilon": float("inf")},
        "aggregators": dict(aggregators or {}),
    }
    (folder / DEVICE_FILE).write_text(tomli_w.dumps(settings))
    return Home(folder, commands)


def begun(device: Home) -> Home:
    """The same with a state, so that its copies have one root key."""
    DeviceState.open(device.owner).close()
    return device


def hurried(cloud: Clouds, seconds: float = 0.05, **channel: Any) -> Clouds:
    """The same run with answers at multiples of ``seconds``, and other settings of its channel."""
    tree = cloud.published.tree()
    tree["answer_seconds"] = seconds
    tree["settings"]["channel"] |= channel
    return replace(cloud, published=PublishedPlan.model_validate(tree))


def secure_channel(cloud: Clouds, **settings: Any) -> SecureChannel:
    """The cloud's own half of the channel, with other ``settings`` of it."""
    plan = cloud.published
    channel = plan.config.channel.model_copy(update=settings)
    run = bytes.fromhex(plan.digest)
    options = SecureOptions.of(channel, run=run, roster=plan.roster, votes=None)
    return SecureChannel(
        plan.clip_norm, plan.rho, NoiseRoot.from_system(), options, deadline=channel.deadline
    )


def invitation(cloud: Clouds) -> bytes:
    """The terms that the plan gives now, without any party's knowing."""
    channel, roster = secure_channel(cloud), cloud.published.roster
    question = cloud.tasks[0].question
    request = channel._request(question, len(roster), channel._minimum(roster, roster))
    return channel._terms(cloud.published.config.channel.aggregator_keys, roster, 0, request).pack()


def settle(commands: Commands, found: Site, **owner: Any) -> dict[str, Home]:
    """The devices of a site, each with its records, agreed and begun."""
    base, homes = found.config.parent, {}
    for name in NAMES:
        shard = found.doubles[name].records
        homes[name] = home(commands, base / name, shard, name=name, socket=f"../{name}.sock", **owner)
        agree(homes[name].owner, base / "published", found.plan.digest)
        begun(homes[name])
    return homes


@contextmanager
def awake(homes: Sequence[Home]) -> Iterator[None]:
    """All of them listen."""
    with ExitStack() as stack:
        for each in homes:
            stack.callback(each.stop)
            assert each.start(), each.process.said
        yield
