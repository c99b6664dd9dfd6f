"""Many devices at once on the parties' services: ``python benchmarks/services.py --devices 1000``.

Real services on the loopback interface, K = 2, 2,000 queries x 10 classes. Every device has a certificate
and connections of its own, opened when all upload at once and closed when it is done; it tries again as
``privkd.secure.client`` does. CPU and memory are those of the services alone, by the kernel's count. Then the
round is closed, and its sum compared with the devices' own.
"""

import argparse
import asyncio
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np

sys.path[0] = str(Path(__file__).resolve().parents[1])

from privkd.secure.aggregator_pb2_grpc import AggregatorStub  # noqa: E402
from privkd.secure.client import ClientTls, service_links  # noqa: E402
from privkd.secure.group import PartyGroup  # noqa: E402
from privkd.secure.local import LocalParties  # noqa: E402
from privkd.secure.rpc import FINAL, stream  # noqa: E402
from privkd.secure.terms import RoundTerms  # noqa: E402
from privkd.secure.upload import Upload, prepare  # noqa: E402

ENTRIES = 20_000
SECONDS = 900.0
ATTEMPT_SECONDS = 15.0


@dataclass
class Outcome:
    """What became of the uploads to one aggregator."""

    seconds: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    refused: int = 0


async def uploaded(url: str, tls: grpc.ChannelCredentials, upload: Upload, rank: int, found: Outcome) -> None:
    """One device's upload to one aggregator."""
    begun, pause, patience = time.monotonic(), 0.05, ATTEMPT_SECONDS
    while True:
        async with grpc.aio.secure_channel(
            url.partition("://")[2], tls, [("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            try:
                body = stream(upload.round, upload.envelopes[rank], upload.device)
                await AggregatorStub(channel).Upload(body, timeout=patience)
                found.seconds.append(time.monotonic() - begun)
                return
            except grpc.aio.AioRpcError as error:
                code = error.code()
            except asyncio.CancelledError:
                # What gRPC raises where the deadline comes while a piece is being sent.
                code = grpc.StatusCode.CANCELLED
            found.failures[code.name] += 1
            if code in FINAL or time.monotonic() - begun > SECONDS:
                found.refused += 1
                return
        await asyncio.sleep(pause * random.uniform(0.5, 1.0))
        pause, patience = min(2 * pause, 2.0), 2 * patience


def cpu_seconds(pid: int) -> float:
    """Of a process alone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_peak(pid: int) -> int:
    """The most that a process had in memory, in MB."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) // 1000


def certificates(
    parties: LocalParties, names: tuple[str, ...], folder: Path
) -> list[grpc.ChannelCredentials]:
    """One for each device."""
    assert parties.authority is not None
    found = []
    for name in names:
        parties.authority.issue(folder, name, name=name)
        own = ClientTls(parties.folder / "ca.pem", folder / f"{name}.pem", folder / f"{name}.key")
        found.append(own.credentials())
    return found


def load(parties: LocalParties, group: PartyGroup, devices: int, folder: Path) -> None:
    """All at once to one aggregator, then to the other; then the sum."""
    deadline = time.monotonic() + SECONDS
    terms = RoundTerms(
        round=devices, keys=group.keys(deadline), entries=ENTRIES, minimum=devices, fraction_bits=0,
        bound=1 << 20, sigma2=None, roster=tuple(f"device-{i:05d}" for i in range(devices)),
        expires=int(time.time() + 2 * SECONDS),
    )  # fmt: skip
    group.open(terms, deadline)
    rng, total, uploads = np.random.default_rng(0), np.zeros(ENTRIES, np.int64), []
    for device in terms.roster:
        block = rng.integers(-100, 100, ENTRIES)
        total += block
        uploads.append(prepare(block, terms, device))
    credentials = certificates(parties, terms.roster, folder)

    async def crowd(rank: int, found: Outcome) -> None:
        url = parties.urls[rank]
        pairs = zip(credentials, uploads, strict=True)
        await asyncio.gather(*(uploaded(url, tls, upload, rank, found) for tls, upload in pairs))

    for rank, pid in enumerate(parties.pids):
        found, before, start = Outcome(), cpu_seconds(pid), time.monotonic()
        asyncio.run(crowd(rank, found))
        wall, cpu = time.monotonic() - start, cpu_seconds(pid) - before
        p50, p99 = np.quantile(found.seconds, [0.5, 0.99])
        print(f"{devices} at once to aggregator {rank}: p50 {p50:.2f} s, p99 {p99:.2f} s, last {wall:.1f} s")
        print(f"    CPU {1e3 * cpu / devices:.2f} ms an upload, memory at most {memory_peak(pid)} MB")
        again = dict(found.failures) or "none"
        print(f"    refused for good: {found.refused}; failures tried again: {again}; "
              f"load average {os.getloadavg()[0]:.1f} of {os.cpu_count()}", flush=True)  # fmt: skip
    released = group.close(terms, time.monotonic() + SECONDS)
    exact = bool((released.integers == total).all()) and len(released.devices) == devices
    print(f"    the sum is {'exact' if exact else 'WRONG'}")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=[1000])
    arguments = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for devices in arguments.devices:
        with LocalParties(2) as parties, tempfile.TemporaryDirectory() as folder:
            group = PartyGroup(service_links(parties.urls, parties.client_tls))
            group.gather(time.monotonic() + SECONDS)
            load(parties, group, devices, Path(folder))
            group.disconnect()


if __name__ == "__main__":
    main()
