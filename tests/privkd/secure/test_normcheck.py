"""The norm check: in the open with numpy, and among real parties with a third one."""

import time
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from privkd.errors import RefusalError
from privkd.secure.client import send, service_links
from privkd.secure.fixedpoint import FixedPoint
from privkd.secure.group import PartyGroup
from privkd.secure.local import LocalParties
from privkd.secure.normcheck import (
    FALSE_ALARM,
    MAX_PROJECTIONS,
    MIN_PROJECTIONS,
    NormTest,
    challenge_key,
    false_alarm,
    project,
    rows,
    tolerance,
)
from privkd.secure.shares import from_ring, split, to_ring
from privkd.secure.terms import RoundTerms
from privkd.secure.upload import prepare, seal_integers

C = 50_000
ENTRIES = 300
M = 64


def projected(block: NDArray[np.int64], key: bytes, count: int = M) -> NDArray[np.int64]:
    """The twin: integers, one row after another, then the ring's representative."""
    signs = rows(key, count, len(block)).astype(object)
    return np.array(
        [(sum(signs[j] * block.astype(object)) + 2**31) % 2**32 - 2**31 for j in range(count)], np.int64
    )


def of_norm(norm: float, seed: int = 0) -> NDArray[np.int64]:
    direction = np.random.default_rng(seed).normal(size=ENTRIES)
    return np.trunc(direction / np.linalg.norm(direction) * norm).astype(np.int64)


CHEATS = {
    "half as long again, many times over": of_norm(4 * C),
    "one entry of 2^31": np.eye(1, ENTRIES, dtype=np.int64)[0] * -(2**31),
    "two entries of 2^31": (np.arange(ENTRIES) < 2).astype(np.int64) * -(2**31),
    "four entries of 2^30": (np.arange(ENTRIES) < 4).astype(np.int64) * 2**30,
    "every entry of 2^31": np.full(ENTRIES, -(2**31)),
    "one of 2^16, whose square is 0 modulo 2^32": np.eye(1, ENTRIES, dtype=np.int64)[0] * 2**20,
}


def test_rows_are_of_the_stated_law_and_projections_are_shared_exactly() -> None:
    signs = rows(b"k" * 32, 64, 2000)
    counts = np.array([(signs == value).sum() for value in (-1, 0, 1)])
    assert stats.chisquare(counts, np.array([1, 2, 1]) * signs.size / 4).pvalue > 1e-6
    assert (rows(b"k" * 32, 64, 2000) == signs).all()
    assert (rows(b"l" * 32, 64, 2000) != signs).any()
    block = np.random.default_rng(1).integers(-(2**31), 2**31, ENTRIES)
    shares = [share.expand(ENTRIES) for share in split(block, 3)]
    key = challenge_key([b"a", b"b"])
    total = np.sum([project(share, rows(key, M, ENTRIES)) for share in shares], axis=0, dtype=np.uint32)
    np.testing.assert_array_equal(from_ring(total), projected(block, key))
    assert challenge_key([b"a", b"b"]) != challenge_key([b"ab", b""])


@pytest.mark.parametrize("cheat", CHEATS)
def test_cheats_fail_and_honest_blocks_pass(cheat: str) -> None:
    """Over 40 challenges; honest blocks are as long as allowed, and fail with 2^-40 each at most."""
    test = NormTest.of(C, M)
    keys = [challenge_key([bytes([i])]) for i in range(40)]
    caught = ~test.passes(np.stack([projected(CHEATS[cheat], key) for key in keys]))
    assert caught.all()
    assert test.passes(np.stack([projected(of_norm(C), key) for key in keys])).all()


def test_a_naive_sum_of_squares_or_signs_without_zeros_are_fooled() -> None:
    """The broken twins: this is what the range and the zeros are for."""
    cheat = CHEATS["two entries of 2^31"]
    signs = np.where(rows(b"s" * 32, M, ENTRIES) >= 0, 1, -1)
    assert (from_ring(to_ring(signs.astype(np.int64) @ cheat)) == 0).all()
    wide = np.int64(2) ** 31
    squares = np.array([wide * wide] * 4).sum(dtype=np.int64)
    assert squares == 0


def test_a_dense_cheat_passes_as_often_as_the_chi_square_says() -> None:
    """Over 4,000 challenges, at 1e-6 (binomial); the rates are those of the module's table."""
    trials = 4000
    for m, factor, stated in [(29, 3.0, 9.4e-3), (64, 2.0, 5.7e-2)]:
        expected = stats.chi2.cdf(tolerance(m) * m / factor**2, m)
        assert expected == pytest.approx(stated, rel=0.01)
        block = of_norm(factor * C).astype(np.float64)
        drawn = np.stack([rows(i.to_bytes(32, "big"), m, ENTRIES) @ block for i in range(trials)])
        passed = int(NormTest.of(C, m).passes(drawn.astype(np.int64)).sum())
        # The law is that of a Gaussian up to the rows' kurtosis, hence the tenth.
        low, high = stats.binom.ppf([5e-7, 1 - 5e-7], trials, [0.9 * expected, 1.1 * expected])
        assert low <= passed <= high


def test_the_tolerance_is_the_least_that_keeps_honest_devices_unnamed() -> None:
    for m in range(1, MAX_PROJECTIONS + 1):
        assert 0.999 * FALSE_ALARM < false_alarm(m, tolerance(m)) <= FALSE_ALARM

    def slips(m: int) -> float:
        """How often a dense block of norm 3 C passes."""
        return float(stats.chi2.cdf(tolerance(m) * m / 9, m))

    assert slips(MIN_PROJECTIONS) < 0.01 < slips(MIN_PROJECTIONS - 1)
    assert all(slips(m) < 0.01 for m in range(MIN_PROJECTIONS, MAX_PROJECTIONS + 1))


QUERIES, CLASSES = 30, ENTRIES // 30
ENCODING = FixedPoint.for_clip_norm(QUERIES**0.5)


def honest(kind: str) -> NDArray[np.int64]:
    """A block as long as the clip norm allows of its kind, encoded as a device does."""
    rng = np.random.default_rng(3)
    chosen = np.eye(CLASSES)[rng.integers(CLASSES, size=QUERIES)]
    blocks = {
        "dense": 1e3 * rng.normal(size=ENTRIES),
        "softmax": 0.97 * chosen + 0.03 / CLASSES,
        "one-hot": chosen,
        "one entry": 1e3 * np.eye(1, ENTRIES)[0],
    }
    return ENCODING.encode(blocks[kind].reshape(1, -1))[0]


def squared_sums(kind: str, m: int, trials: int, *, zeros: bool = True) -> NDArray[np.float64]:
    """Sums of squared projections over ``m C^2 / 2``, through the module's own rows, shares and ring;
    without ``zeros`` by a broken twin's rows, of +1 and -1 alone."""
    block = to_ring(honest(kind))
    signs = rows(challenge_key([kind.encode()]), m * trials, ENTRIES)
    signs = signs if zeros else np.where(signs >= 0, 1, -1).astype(np.int8)
    drawn = from_ring(project(block, signs)).reshape(trials, m).astype(np.float64)
    found: NDArray[np.float64] = (drawn**2).sum(axis=1) / (m * ENCODING.bound**2 / 2)
    return found


@pytest.mark.parametrize("kind", ["dense", "softmax", "one-hot", "one entry"])
@pytest.mark.parametrize(("m", "trials"), [(29, 4000), (64, 2000), (256, 500)])
def test_honest_blocks_stay_under_the_bound_and_are_never_named(kind: str, m: int, trials: int) -> None:
    """At tolerances whose false alarms can be seen: binomial, 1e-6 each; and none at the one that is used,
    where the chance is ``trials`` 2^-40 at most. Rows without zeros exceed the bound."""
    sums = squared_sums(kind, m, trials)
    twins = squared_sums(kind, m, trials, zeros=False)
    for tau in (1.1, 1.2, 1.35, 1.5):
        allowed = stats.binom.isf(1e-6, trials, false_alarm(m, tau))
        assert (sums >= tau).sum() <= allowed
        assert tau < 1.35 or (twins >= tau).sum() > allowed
    test = NormTest.of(ENCODING.bound, m)
    assert (sums * m * ENCODING.bound**2 / 2 <= test.threshold).all()


def test_the_old_tolerance_named_honest_devices() -> None:
    """1.35 for every m named 10 % of them at m = 29: the power of the test above."""
    assert (squared_sums("dense", 29, 4000) > 1.35).mean() > 0.05
    assert (squared_sums("softmax", 64, 2000) > 1.35).any()


def test_impossible_tests_are_refused() -> None:
    for bound, count in [(1 << 23, 64), (100, 0), (100, 257)]:
        with pytest.raises(ValueError, match="expected up to"):
            NormTest.of(bound, count)
    for bits in range(23):
        test = NormTest.of(1 << bits, 256)
        # All high bits of all projections set, on top of the largest squares: still below 2^63.
        high = 31 - test.range_bits
        assert 256 * (1 << 2 * test.range_bits) + 256 * high * (test.threshold + 1) < 1 << 63


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def group(request: pytest.FixtureRequest) -> Iterator[PartyGroup]:
    with LocalParties(request.param, third_party=True) as parties:
        opened = PartyGroup(service_links(parties.urls, parties.client_tls))
        opened.gather(time.monotonic() + 120)
        yield opened
        opened.disconnect()


def test_cheating_devices_are_named_and_the_round_goes_on(group: PartyGroup) -> None:
    """Five honest devices as long as the bound (false alarms of 2^-40 each at most), and every cheat."""
    deadline = time.monotonic() + 240
    honest = {f"honest-{i}": of_norm(C, i) for i in range(5)}
    blocks = honest | {name.replace(" ", "-"): block for name, block in CHEATS.items()}
    terms = RoundTerms(
        round=1, keys=group.keys(deadline), entries=ENTRIES, minimum=2, fraction_bits=0, bound=C, sigma2=None,
        roster=tuple(blocks), expires=int(time.time()) + 300, projections=M,
    )  # fmt: skip
    group.open(terms, deadline)
    for device, block in blocks.items():
        # A cheat skips the clipping; an honest device cannot.
        upload = prepare(block, terms, device) if device in honest else seal_integers(block, terms, device)
        send(upload, group.aggregators, deadline=deadline)
    total = group.close(terms, deadline)
    assert total.devices == tuple(sorted(honest))
    np.testing.assert_array_equal(total.integers, np.sum(list(honest.values()), axis=0))
    assert set(total.left_out) == set(blocks) - set(honest)
    assert all(why.endswith("rejected by the norm check") for why in total.left_out.values())
    np.testing.assert_array_equal(group.close(terms, deadline).integers, total.integers)
    few = terms.model_copy(update={"round": 2, "projections": MIN_PROJECTIONS - 1})
    with pytest.raises(RefusalError, match="28 projections, a norm check takes 29"):
        group.open(few, deadline)
