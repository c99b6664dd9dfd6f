"""The secure channel's cost, side by side with what it replaces: ``python benchmarks/secure.py``.

Real services over TLS on the loopback interface, K = 2, unless a row says otherwise. CPU is user and system
time of the processes named, by the kernel's count.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

sys.path[0] = str(Path(__file__).resolve().parents[1])

from privkd.channels.secure import SecureChannel, SecureOptions  # noqa: E402
from privkd.privacy.noise import Keystream, NoiseRoot, discrete_gaussian  # noqa: E402
from privkd.privacy.votes import vote_rule  # noqa: E402
from privkd.secure.client import send, service_links  # noqa: E402
from privkd.secure.group import PartyGroup, relay  # noqa: E402
from privkd.secure.local import LocalParties  # noqa: E402
from privkd.secure.shares import Form, Share, fitting_encoding  # noqa: E402
from privkd.secure.terms import RoundTerms, VoteTerms  # noqa: E402
from privkd.secure.upload import Header, SharedSecrets, Upload, prepare, seal, unseal  # noqa: E402

QUERIES, CLASSES = 2_000, 10
ENTRIES = QUERIES * CLASSES
CLIP = 30.0
RHO = 0.5
SECONDS = 600.0


def row(name: str, value: str, goal: str = "") -> None:
    """One line of the table."""
    print(f"{name:<66}{value:>20}  {goal}", flush=True)


def median(run: Callable[[], object], repeats: int, clock: Callable[[], float] = time.process_time) -> float:
    """Median time of ``repeats`` runs, after one that warms the caches."""
    run()
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append(clock() - start)
    return statistics.median(times)


def tree_cpu(pids: list[int]) -> float:
    """CPU seconds of processes and of their living children."""
    tick = os.sysconf("SC_CLK_TCK")
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(stat.parent.name) in pids or int(fields[1]) in pids:
            total += (int(fields[11]) + int(fields[12])) / tick
    return total


def open_round(group: PartyGroup, name: int, devices: int) -> RoundTerms:
    """A round of 2,000 queries x 10 classes with noise."""
    encoding = fitting_encoding(CLIP, devices=devices, parties=2, rho=RHO)
    terms = RoundTerms(
        round=name,
        run="5e" * 32,
        keys=group.keys(time.monotonic() + SECONDS),
        entries=ENTRIES,
        minimum=devices,
        fraction_bits=encoding.fraction_bits,
        bound=encoding.bound,
        sigma2=str(Fraction(encoding.bound**2) / (2 * Fraction(RHO))),
        roster=tuple(f"device-{i:04d}" for i in range(devices)),
        expires=int(time.time()) + 3600,
    )
    group.open(terms, time.monotonic() + SECONDS)
    return terms


def device_cost(group: PartyGroup) -> None:
    """What one device sends and computes."""
    terms = open_round(group, 10**6, 2)
    block = np.random.default_rng(0).normal(size=ENTRIES) * 0.1
    upload: Upload = prepare(block, terms, "device-0000")
    size = sum(len(envelope) for envelope in upload.envelopes)
    row("bytes a device, both envelopes", f"{size:,}")
    ratio = size / (4 * ENTRIES)
    row("  over raw float32", f"{ratio:.4f} x", f"goal 1.01 x: {'met' if ratio <= 1.01 else 'MISSED'}")
    cpu = median(lambda: prepare(block, terms, "device-0000"), 50)
    row("device CPU: clip, encode, share, seal", f"{1e3 * cpu:.2f} ms")


def aggregator_cost(group: PartyGroup, parties: LocalParties, name: int, devices: int) -> None:
    """CPU of both parties, services and workers, over a plain sum: uploads one by one, and relayed.

    Each way twice: in a run's first round each aggregator exchanges keys with every device, then no more.
    """
    rng = np.random.default_rng(devices)
    blocks = rng.normal(size=(devices, ENTRIES)).astype(np.float32) * np.float32(0.1)
    plain = median(lambda: blocks.sum(axis=0), 5, time.perf_counter)
    row(f"{devices} devices: a plain numpy float32 sum", f"{1e3 * plain:.2f} ms")
    number = 4 * name
    for way in ("one by one", "relayed"):
        secret = os.urandom(32)
        for when in ("first", "later"):
            terms = open_round(group, number, devices)
            named = zip(blocks, terms.roster, strict=True)
            uploads = [prepare(block, terms, device, secret) for block, device in named]
            round_cost(group, parties, terms, uploads, f"{way}, a run's {when} round", plain)
            number += 1


def round_cost(
    group: PartyGroup,
    parties: LocalParties,
    terms: RoundTerms,
    uploads: list[Upload],
    what: str,
    plain: float,
) -> None:
    """CPU of both parties in a round of ``uploads``, over the seconds of a ``plain`` sum."""
    before, soon = tree_cpu(parties.pids), time.monotonic() + SECONDS
    if what.startswith("relayed"):
        relay(uploads, group.aggregators, deadline=soon)
    else:
        for upload in uploads:
            send(upload, group.aggregators, deadline=soon)
    between = tree_cpu(parties.pids)
    start = time.perf_counter()
    group.close(terms, time.monotonic() + SECONDS)
    wall = time.perf_counter() - start
    after = tree_cpu(parties.pids)
    ratio = (after - before) / plain
    goal = f"goal 15 x: {'met' if ratio <= 15 else 'MISSED'}" if len(uploads) == 1000 else ""
    row(f"  {what}: CPU of both aggregators", f"{1e3 * (after - before):.0f} ms, {ratio:.0f} x", goal)
    row("    receiving and spooling / agreeing, summing, noise",
        f"{1e3 * (between - before):.0f} / {1e3 * (after - between):.0f} ms")  # fmt: skip
    row("    of them agreeing, summing and noise", f"{(after - between) / plain:.1f} x")
    row("    from closing the round to the release", f"{1e3 * wall:.0f} ms")


def floor_cost() -> None:
    """What no upload can do without at each aggregator: one decryption, and once a run one key agreement."""
    key = X25519PrivateKey.generate()
    share = Share(Form.VECTOR, bytes(4 * ENTRIES))
    header = Header(1, 1, "device", bytes(16), 0, 2, ENTRIES, share.form)
    envelope = seal(header, share, key.public_key().public_bytes_raw())
    known = SharedSecrets(key)
    for what, recipient in (("X25519, HKDF, AES-GCM", key), ("HKDF, AES-GCM, the secret known", known)):
        cost = median(lambda recipient=recipient: unseal(envelope, recipient), 200)  # type: ignore[misc]
        row(f"opening one envelope ({what})", f"{1e6 * cost:.0f} us")


def vote_cost(queries: int, devices: int = 100) -> None:
    """A secure vote with noise among two aggregators and a third party."""
    with LocalParties(2, third_party=True) as parties:
        group = PartyGroup(service_links(parties.urls, parties.client_tls))
        group.gather(time.monotonic() + SECONDS)
        rng = np.random.default_rng(0)
        votes = np.eye(CLASSES)[rng.integers(0, CLASSES, (devices, queries))]
        walls, cpus = [], []
        for name in range(1, 5):
            terms = RoundTerms(
                round=name,
                keys=group.keys(time.monotonic() + SECONDS),
                entries=queries * CLASSES,
                minimum=devices,
                fraction_bits=0,
                bound=math.isqrt(queries - 1) + 1,
                sigma2="200",
                roster=tuple(f"device-{i:04d}" for i in range(devices)),
                expires=int(time.time()) + 3600,
                votes=VoteTerms(classes=CLASSES, threshold=20, threshold_sigma2="200"),
            )
            group.open(terms, time.monotonic() + SECONDS)
            uploads = [prepare(v, terms, device) for v, device in zip(votes, terms.roster, strict=True)]
            relay(uploads, group.aggregators, deadline=time.monotonic() + SECONDS)
            before, start = tree_cpu(parties.pids), time.perf_counter()
            group.close(terms, time.monotonic() + SECONDS)
            walls.append(time.perf_counter() - start)
            cpus.append(tree_cpu(parties.pids) - before)
        group.disconnect()
    # The first waits for the workers to come up.
    wall, cpu = statistics.median(walls[1:]), statistics.median(cpus[1:])
    row(f"secure vote, {queries:,} queries x {CLASSES}, {devices} devices: closing to release",
        f"{wall:.2f} s", f"goal 3 s: {'met' if wall <= 3 else 'MISSED'}")  # fmt: skip
    row("  CPU of both aggregators and the third party", f"{cpu:.2f} s")


def channel_cost(
    what: str, aggregators: int, *, services: bool, devices: int = 20, queries: int = 500
) -> None:
    """A run's channel: from nothing to the first release, and a release after that."""
    answers = torch.randn(devices, queries, CLASSES, generator=torch.Generator().manual_seed(0))
    options = SecureOptions(services=services)
    if what == "norm check":
        options = replace(options, projections=64)
    if what == "votes":
        rule = vote_rule(devices=devices, queries=queries, rho=RHO, threshold=0.5, threshold_share=0.5)
        options = replace(options, votes=rule)
        answers = torch.nn.functional.one_hot(answers.argmax(-1), CLASSES).float()
    names = [f"device-{i:04d}" for i in range(devices)]
    root = NoiseRoot.from_seed(0)
    start = time.perf_counter()
    with SecureChannel(CLIP, RHO, root, options, aggregators=aggregators) as channel:
        channel.start()
        started = time.perf_counter() - start
        channel.release(answers, devices=names, round=0)
        first = time.perf_counter() - start
        times = []
        for number in range(1, 6):
            begun = time.perf_counter()
            channel.release(answers, devices=names, round=number)
            times.append(time.perf_counter() - begun)
    where = "services" if services else "parties here"
    row(f"{what}, K = {aggregators}, {where}: start / first / next release",
        f"{started:.2f} / {first:.2f} / {statistics.median(times):.3f} s")  # fmt: skip


def sampler_cost() -> None:
    """The discrete Gaussian against OpenDP's, where that is installed."""
    count, sigma2 = 1_000_000, 1 << 40
    ours = median(lambda: discrete_gaussian(sigma2, count, Keystream(bytes(32))), 3)
    row("1e6 exact discrete Gaussians, sigma = 2^20", f"{ours:.2f} s")
    try:
        from opendp import prelude as dp
    except ImportError:
        row("  against OpenDP's", "not installed")
        return
    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T=int)), dp.l2_distance(T=float)
    measurement = dp.m.make_gaussian(*space, scale=2.0**20)
    small = [0] * (count // 20)
    theirs = 20 * median(lambda: measurement(small), 1)
    met = "met" if theirs / ours >= 100 else "MISSED"
    row("  against OpenDP's", f"{theirs:.1f} s, {theirs / ours:.0f} x", f"goal 100 x: {met}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=[10, 100, 1000])
    arguments = parser.parse_args()
    with LocalParties(2) as parties:
        group = PartyGroup(service_links(parties.urls, parties.client_tls))
        group.gather(time.monotonic() + SECONDS)
        device_cost(group)
        warm = open_round(group, 1, 2)
        for device in warm.roster:
            send(
                prepare(np.zeros(ENTRIES), warm, device),
                group.aggregators,
                deadline=time.monotonic() + SECONDS,
            )
        group.close(warm, time.monotonic() + SECONDS)
        for number, devices in enumerate(arguments.devices):
            aggregator_cost(group, parties, 2 + number, devices)
        group.disconnect()
    floor_cost()
    vote_cost(1000)
    for what, aggregators in (("mean", 2), ("mean", 3), ("norm check", 2), ("votes", 2)):
        for services in (False, True):
            channel_cost(what, aggregators, services=services)
    sampler_cost()


if __name__ == "__main__":
    main()
