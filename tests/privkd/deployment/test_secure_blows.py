"""Devices that are processes, and real aggregators: kills of both, keys and certificates of no use."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from signal import SIGKILL

import pytest
import tally
import torch
from faults import NOTHING, Commands, Kind, Strike
from on_device import NAME, Clouds, clouds
from owners import Home, awake, begun, home, hurried, invitation, secure_channel, settle
from sites import NAMES, Site, site
from torch import Tensor

from privkd.channels.secure import SecureChannel
from privkd.deployment import cloud as real_cloud
from privkd.deployment.agreement import agree
from privkd.deployment.device_state import DeviceState, Trained
from privkd.deployment.published import PublishedPlan
from privkd.deployment.wire import ANSWER_BYTES, Reason, unpack_answer
from privkd.progress import Silent
from privkd.secure.authority import Authority
from privkd.secure.client import ServiceLink
from privkd.secure.group import PartyGroup
from privkd.secure.local import LocalParties

pytestmark = pytest.mark.slow

LIMITS = {"minimum_devices": 1, "request_seconds": 10.0}
SECURE = (
    "channel.kind=secure",
    "channel.minimum_devices=1",
    "privacy.device_epsilon=inf",
    "data.devices=2",
)
MOMENT = 0.3
"""Seconds after which devices train or upload, and a round is being closed."""
KINDS: tuple[Kind, ...] = ("before", "within", "after")


@pytest.fixture
def parties() -> Iterator[LocalParties]:
    with LocalParties(2, tls=False, limits=LIMITS) as found:
        yield found


def keys_of(parties: LocalParties) -> tuple[str, ...]:
    group = PartyGroup([ServiceLink(url, parties.client_tls) for url in parties.urls])
    keys = group.keys(time.monotonic() + 30)
    group.disconnect()
    return tuple(keys)


def asking(parties: LocalParties, keys: tuple[str, ...], number: int = 0) -> Clouds:
    """A cloud over these parties; each ``number`` is a run of its own."""
    channel = {"aggregator_urls": list(parties.urls), "aggregator_keys": list(keys)}
    return hurried(clouds(*SECURE), 0.05 + number / 8192, **channel)


@contextmanager
def opened(
    parties: LocalParties, cloud: Clouds, beside: SecureChannel | None = None
) -> Iterator[SecureChannel]:
    """The cloud's own side, with the first round open; ``beside`` another, whose workers it takes."""
    shown = parties.client_tls
    files = {} if shown is None else {"ca": shown.ca, "certificate": shown.certificate, "key": shown.key}
    channel = secure_channel(cloud, **files)
    if beside is not None:
        channel._parties = beside._parties
    try:
        channel.open(cloud.tasks[0].question, cloud.published.roster)
        yield channel
    finally:
        if beside is None:
            channel.close()


def member(commands: Commands, folder: Path, cloud: Clouds, **files: str) -> Home:
    """A device that pinned the plan's aggregators, and agreed."""
    channel = cloud.published.config.channel
    own = {"urls": list(channel.aggregator_urls), "keys": list(channel.aggregator_keys), **files}
    made = home(commands, folder / "device", cloud.shard, aggregators=own)
    agree(made.owner, cloud.write(folder / "plan"), cloud.published.digest)
    return begun(made)


def block_of(device: Home, run: str) -> Tensor:
    """What a device that is not running answered last, from its own state."""
    with DeviceState.open(device.owner) as state:
        trained = state.last(Trained, run)
        assert trained is not None
        return state.kept_round(trained)["block"]


def strike(
    commands: Commands,
    folder: Path,
    parties: LocalParties,
    cloud: Clouds,
    hit: Strike,
    beside: SecureChannel | None = None,
) -> tuple[str, ...]:
    """Kill a device of a run, go on, and add up; the points that were passed by the process that was hit."""
    device, run = member(commands, folder, cloud), cloud.published.digest
    with opened(parties, cloud, beside) as channel:
        question = cloud.ask(run=run, invitation=channel.invitation())
        first = device.ask(question) if device.start(hit) else None
        struck = device.stop()
        assert struck is not None
        assert struck.code == (0 if hit.kind == "none" else -9)
        assert device.start()
        answer = device.ask(question)
        assert answer is not None
        assert unpack_answer(answer)[0].refused is None
        assert first in (None, answer)
        assert device.ask(question) == answer
        device.stop()
        release = channel.collect(cloud.tasks[0].question, [])
    assert len(device.booked()) == 3
    assert release.devices == (NAME,)
    expected = block_of(device, run).reshape(release.answers.shape).float()
    torch.testing.assert_close(release.answers, expected, atol=1e-3, rtol=0)
    return struck.points


def test_a_device_killed_at_every_step_is_in_the_sum_once(
    tmp_path: Path, commands: Commands, parties: LocalParties
) -> None:
    """Also between two aggregators, one of which has its envelope: the same bytes come again."""
    keys = keys_of(parties)
    with opened(parties, asking(parties, keys)) as beside:

        def struck(number: int, hit: Strike) -> tuple[str, ...]:
            cloud = asking(parties, keys, number)
            return strike(commands, tmp_path / str(number), parties, cloud, hit, beside)

        points = struck(1, NOTHING)
        assert sum(point.startswith("upload") for point in points) == 2
        hits = [
            Strike(kind, number)
            for number, point in enumerate(points)
            for kind in KINDS
            if kind != "within" or point.startswith(("write", "answer"))
        ]
        for number, hit in enumerate(hits, start=2):
            struck(number, hit)
            tally.note("kills of a device with aggregators", "same bytes, charged once, sum exact")


class Killing(Silent):
    """Kills an aggregator a moment after the cloud says a certain thing."""

    def __init__(self, parties: LocalParties, words: str, rank: int) -> None:
        self._parties, self._words, self._rank = parties, words, rank
        self.killed: list[int] = []

    def stage(self, name: str) -> None:
        if self._words in name:
            threading.Timer(MOMENT, self._kill).start()

    def _kill(self) -> None:
        self.killed.append(self._parties.pids[self._rank])
        os.kill(self.killed[-1], SIGKILL)


def secured(folder: Path, parties: LocalParties, keys: tuple[str, ...]) -> Site:
    table = f"[aggregators]\nurls = {list(parties.urls)}\nkeys = {list(keys)}\n[run]\n"
    change = lambda text: text.replace("[run]\n", table).replace('kind = "plain"', 'kind = "secure"')  # noqa: E731
    return site(folder, "plain", change)


@pytest.mark.parametrize(("words", "rank"), [("asking", 0), ("asking", 1), ("channel", 0), ("channel", 1)])
def test_an_aggregator_killed_in_every_round_changes_no_sum(
    tmp_path: Path, commands: Commands, parties: LocalParties, words: str, rank: int
) -> None:
    """While devices train and upload, and while it closes; it is started again and goes on from its disk."""
    keys = keys_of(parties)
    found = secured(tmp_path / "s", parties, keys)
    own = {"urls": list(parties.urls), "keys": list(keys)}
    homes = settle(commands, found, aggregators=own)
    blow = Killing(parties, words, rank)
    with awake([*homes.values()]):
        done = real_cloud.run(found.config, blow)
    assert done is not None
    assert len(set(blow.killed)) == 2, "another process in each round"
    assert [release.devices for release in found.releases()] == [NAMES, NAMES]
    mean = torch.stack([block_of(each, found.plan.digest) for each in homes.values()]).mean(0)
    last = found.releases()[-1].answers
    torch.testing.assert_close(last, mean.reshape(last.shape).float(), atol=1e-3, rtol=0)
    for each in homes.values():
        assert len(each.booked()) == 6
    tally.note("kills of an aggregator with devices", "sums exact, charged once")


@dataclass(frozen=True)
class Guarded:
    """Aggregators that ask for certificates, and a cloud over them."""

    parties: LocalParties
    cloud: Clouds

    @property
    def authority(self) -> Authority:
        assert self.parties.authority is not None
        return self.parties.authority

    def shown(
        self, commands: Commands, folder: Path, issuer: Authority | None = None, cloud: Clouds | None = None
    ) -> Home:
        """A device with a certificate of its own, of ``issuer`` or else the one that is trusted."""
        folder.mkdir()
        (issuer or self.authority).issue(folder, "own", name=NAME)
        files = {"certificate": str(folder / "own.pem"), "key": str(folder / "own.key")}
        ca = str(self.parties.folder / "ca.pem")
        return member(commands, folder, cloud or self.cloud, ca=ca, **files)


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    with LocalParties(2, limits=LIMITS) as parties:
        yield Guarded(parties, asking(parties, keys_of(parties)))


def refused_at_once(device: Home, question: bytes, words: str) -> int:
    """Ask; the cloud hears ``later`` and no word, the owner hears why; how much was charged."""
    assert device.start()
    begun_at = time.monotonic()
    answer = device.ask(question)
    assert time.monotonic() - begun_at < 5, "at once, and not at the channel's deadline of two minutes"
    assert answer is not None
    head, given = unpack_answer(answer)
    assert (head.refused, head.ledger, given, len(answer)) == (Reason.LATER, None, b"", ANSWER_BYTES)
    assert words.encode() not in answer
    code, shown, _ = device.status()
    assert (code, shown["refusals"]) == (0, {"later": 1})
    assert words in shown["words"]
    assert words in device.log()[-1]["words"]
    device.stop()
    tally.note("keys and certificates that do not serve", "refused at once, told to the owner alone")
    return len(device.booked())


def test_certificates_that_do_not_serve_are_told_to_the_owner_alone(
    tmp_path: Path, commands: Commands, guarded: Guarded
) -> None:
    """One that has ended costs nothing; one that others must judge is found out after the charge."""
    with opened(guarded.parties, guarded.cloud) as channel:
        asked = guarded.cloud.ask(run=guarded.cloud.published.digest, invitation=channel.invitation())
        good = guarded.shown(commands, tmp_path / "good")
        assert good.start()
        answer = good.ask(asked)
        assert answer is not None
        assert unpack_answer(answer)[0].refused is None, "the twin"
        good.stop()
        foreign = guarded.shown(commands, tmp_path / "foreign", Authority.create(tmp_path / "other"))
        assert refused_at_once(foreign, asked, "does not accept this client's certificate") == 3
        lost = guarded.shown(commands, tmp_path / "lost")
        guarded.authority.revoke(NAME)
        assert refused_at_once(lost, asked, "revoked") == 3
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(guarded.authority, "_until", lambda _: datetime.now(UTC) + timedelta(seconds=1))
            old = guarded.shown(commands, tmp_path / "old")
        time.sleep(1.1)
        assert refused_at_once(old, asked, "expired on") == 0


def test_an_aggregator_of_another_key_gets_nothing(
    tmp_path: Path, commands: Commands, guarded: Guarded
) -> None:
    """A hostile cloud's plan and terms name the key that the owner pinned; who listens there has another."""
    good = guarded.cloud.published.config.channel.aggregator_keys
    pinned = ["ab" * 32, good[1]]
    tree = guarded.cloud.published.tree()
    tree["settings"]["channel"]["aggregator_keys"] = pinned
    hostile = replace(guarded.cloud, published=PublishedPlan.model_validate(tree))
    device = guarded.shown(commands, tmp_path / "d", cloud=hostile)
    asked = hostile.ask(run=hostile.published.digest, invitation=invitation(hostile))
    assert refused_at_once(device, asked, "are not the pinned ones; nothing was sent") == 3
