"""Clouds of a test, published, with devices of this process."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from double import Double
from on_device import Box, write_records

from privkd.data import build_scenario
from privkd.deployment import cloud
from privkd.deployment.agreement import agree
from privkd.deployment.carriers import Carrier, InProcessCarrier
from privkd.deployment.cloud_settings import CloudSettings
from privkd.deployment.owner import Owner
from privkd.deployment.published import PublishedPlan
from privkd.deployment.wire import unpack_question
from privkd.messages import Release
from privkd.prepared import reopen
from privkd.progress import Silent
from privkd.runs.checkpoint import load_transcript
from privkd.runs.folder import RunFolder

NAMES = ("ada", "bob", "cy")
RUN = """
engine = "socket"
sockets = "{device}.sock"
patience_seconds = 60
again_seconds = 20
answer_seconds = 0.05
[run]
rounds = 2
seed = 4711
[run.data]
records_per_device = 30
device_test_records = 4
proxy_records = 40
[run.teacher]
model = { name = "mlp", width = 8 }
fit = { steps = 30 }
[run.student]
models = [{ name = "mlp", width = 8 }, { name = "mlp", width = 6 }]
public_fit = { steps = 10 }
dp = { steps = 3, part = "all" }
engine = "opacus"
[run.reverse]
fit = { steps = 8 }
tolerance = 1.0
"""
CHANNELS = {
    "plain": '[run.channel]\nkind = "plain"\n',
    "noised": '[run.channel]\nkind = "noised"\n[run.privacy]\ndevice_epsilon = 8.0\n',
    "own students": '[run.channel]\nkind = "plain"\n',
}


@dataclass
class Site:
    """A cloud's folder, published, and its devices."""

    config: Path
    doubles: dict[str, Double]

    @property
    def plan(self) -> PublishedPlan:
        return PublishedPlan.load(self.config.parent / "published")[0]

    @property
    def folder(self) -> Path:
        return self.config.parent / "runs" / self.plan.digest[:12]

    def run(self, carrier: Carrier | None = None, **more: Any) -> Any:
        carried = carrier or InProcessCarrier(self.doubles)
        return cloud.run(self.config, Silent(), carry=lambda *_: carried, **more)

    def releases(self) -> tuple[Release, ...]:
        with RunFolder.resume(self.folder) as folder:
            blank = reopen(folder).cloud.untrained_teacher()
            return tuple(each.release for each in load_transcript(folder, blank).exchanges)


def site(folder: Path, channel: str = "plain", change: Callable[[str], str] = str) -> Site:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "cloud.toml"
    text = RUN + CHANNELS[channel]
    if channel == "own students":
        text = text.replace('engine = "opacus"', 'engine = "opacus"\nstart = "own"')
    config.write_text(change(text))
    for name in NAMES:
        cloud.enrol(config, name)
    cloud.publish(config)
    return Site(config, doubles(config))


def doubles(config: Path) -> dict[str, Double]:
    """Devices with the records that a simulation of the same settings would give them."""
    settings = CloudSettings.read(config).run
    owners = build_scenario(settings.data.model_copy(update={"devices": len(NAMES)}), settings.seed).devices
    published = config.parent / "published"
    return {name: Double(name, published, owner.train) for name, owner in zip(NAMES, owners, strict=True)}


def real_devices(found: Site, **owner: Any) -> dict[str, Box]:
    """Programs in place of the doubles, with the same records; ``owner`` are settings of all their owners."""
    boxes = {}
    for name, double in found.doubles.items():
        folder = found.config.parent / f"{name}.device"
        folder.mkdir()
        records = write_records(folder / "records.npz", double.records)
        fields = {
            "name": name,
            "state": folder / "state",
            "socket": folder / "device.sock",
            "records": {"source": str(records)},
            "bounds": {"minimum_devices": 1},
        }
        boxes[name] = Box(folder, Owner.model_validate(fields | owner))
        agree(boxes[name].owner, found.config.parent / "published", found.plan.digest)
    return boxes


def same_releases(one: Site, other: Site) -> bool:
    pairs = list(zip(one.releases(), other.releases(), strict=True))
    return all(
        torch.equal(a.answers, b.answers) and torch.equal(a.queries, b.queries) and a.devices == b.devices
        for a, b in pairs
    )


class Picky:
    """Carries nothing to some devices in some rounds."""

    def __init__(self, devices: Mapping[str, Callable[[bytes], bytes]], away: Mapping[int, set[str]]) -> None:
        self._inner, self._away = InProcessCarrier(devices), away

    def ask(self, questions: Mapping[str, bytes], seconds: float) -> Mapping[str, bytes]:
        round = unpack_question(next(iter(questions.values())))[0].round
        there = {name: questions[name] for name in questions if name not in self._away.get(round, set())}
        return self._inner.ask(there, seconds)

    def close(self) -> None: ...


def impatient(text: str) -> str:
    return text.replace("patience_seconds = 60", "patience_seconds = 0.3")
