"""The same devices in the cloud's process and over its engine: equal releases, ledgers and teachers."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hosts import Hosts
from on_device import write_records
from running import charges, weights
from sites import NAMES, Site, same_releases, site

from privkd.deployment.agreement import agree
from privkd.deployment.carriers import InProcessCarrier, SocketCarrier
from privkd.deployment.cloud_status import status
from privkd.deployment.device import DeviceProgram
from privkd.deployment.device_state import DeviceState, read_ledger
from privkd.deployment.owner import load_owner, write_owner
from privkd.privacy.events import Charge, Unit


def owned(found: Site, name: str) -> Path:
    """A device's folder: its settings, its records, its root key, and its owner's agreement."""
    folder = found.config.parent / name
    settings = write_owner(folder, name, "records.npz")
    settings.write_text(settings.read_text().replace("minimum_devices = 2", "minimum_devices = 1"))
    write_records(folder / "records.npz", found.doubles[name].records)
    owner = load_owner(settings)
    agree(owner, found.config.parent / "published", found.plan.digest)
    DeviceState.open(owner).close()
    return folder


@contextmanager
def in_this_process(found: Site) -> Iterator[Mapping[str, Callable[[bytes], bytes]]]:
    """The devices' programs on their folders."""
    with ExitStack() as stack:
        programs = {}
        for name in NAMES:
            owner = load_owner(found.config.parent / name / "device.toml")
            state = stack.enter_context(DeviceState.open(owner))
            programs[name] = DeviceProgram(owner, state, lambda what: None).handle
        yield programs


def ledgers(found: Site) -> dict[str, dict[Unit, list[Charge]]]:
    """Each device's own."""
    owners = {name: load_owner(found.config.parent / name / "device.toml") for name in NAMES}
    books = {name: read_ledger(owner) for name, owner in owners.items()}
    return {
        name: {unit: list(book.charges(unit, name)) for unit in Unit}
        for name, book in books.items()
        if book is not None
    }


def test_the_same_root_keys_give_the_same_in_process_and_over_the_engine(tmp_path: Path) -> None:
    one, other = site(tmp_path / "one", "noised"), site(tmp_path / "two", "noised")
    for name in NAMES:
        shutil.copytree(owned(one, name), tmp_path / "two" / name)
    with in_this_process(one) as programs:
        one.run(InProcessCarrier(programs))
    hosts = Hosts(tmp_path / "two", NAMES)
    with hosts.ended():
        for name in NAMES:
            hosts.start(name, ["privkd", "device", "run"])
        sockets = {name: tmp_path / "two" / name / "device.sock" for name in NAMES}
        while not all(path.exists() for path in sockets.values()):
            assert all(process.poll() is None for process in hosts.running)
            time.sleep(0.05)
        other.run(SocketCarrier(sockets))
    assert one.plan.digest == other.plan.digest
    assert one.releases()[0].devices == NAMES
    assert one.releases()[0].noise_std > 0
    assert same_releases(one, other)
    assert charges(one.folder) == charges(other.folder)
    assert weights(one.folder) == weights(other.folder)
    assert len(ledgers(one)) == len(NAMES)
    assert ledgers(one) == ledgers(other)
    assert status(one.config).witnesses == status(other.config).witnesses
