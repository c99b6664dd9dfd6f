"""The secure vote, through real processes with a third party, against plain numpy."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rig import LIMITS, Rig, services_inside, soon, strike
from ring import LocalGroup, RingBackend
from running import play, same, small
from safetensors.torch import load_file
from scipy import stats

from audits.membership_audit import views_of
from privkd import prepared
from privkd.channels.registry import open_channel
from privkd.channels.secure import SecureOptions
from privkd.errors import ChannelError, ConfigError, RefusalError
from privkd.privacy.events import NoPrivacy, ZCdp
from privkd.privacy.noise import NoiseRoot, discrete_gaussian
from privkd.privacy.votes import VoteRule, tally, vote_rule
from privkd.secure.client import service_links
from privkd.secure.frames import Kind
from privkd.secure.group import PartyGroup
from privkd.secure.keys import make_keys
from privkd.secure.local import LocalParties
from privkd.secure.party import load_party
from privkd.secure.rounds import admit_terms
from privkd.secure.shares import split
from privkd.secure.terms import RoundTerms, VoteTerms, combine, partial_vote, set_digest
from privkd.secure.upload import Upload, prepare, seal_integers, upload_identifier

Integers = NDArray[np.int64]
ROOT = NoiseRoot.from_seed(3)


def voting_rig(parties: int) -> Iterator[Rig]:
    keys = tuple(bytes([rank + 1]) * 32 for rank in range(parties + 1))
    with LocalParties(parties, third_party=True, limits=LIMITS, noise_keys=keys) as local:
        group = PartyGroup(service_links(local.urls, local.client_tls))
        group.gather(soon())
        yield Rig(group, keys[:parties], local.state, kept={"local": local})
        group.disconnect()


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    yield from voting_rig(request.param)


def votes_of(devices: int, queries: int, classes: int, seed: int = 0) -> Integers:
    """One-hot ``[device, query, class]``, from near unanimity to none."""
    rng = np.random.default_rng(seed)
    law = rng.dirichlet(np.full(classes, 0.3), queries).cumsum(-1)
    chosen = (rng.random((devices, queries, 1)) > law).sum(-1).clip(max=classes - 1)
    return np.eye(classes, dtype=np.int64)[chosen]


def hold(rig: Rig, votes: Integers, threshold: int, *, noisy: bool = True) -> tuple[RoundTerms, list[Upload]]:
    """Open a round for ``votes`` and upload them all."""
    devices, queries, classes = votes.shape
    terms = rig.open(
        devices, entries=queries * classes, bound=int(np.ceil(np.sqrt(queries))),
        sigma2="9/2" if noisy else None,
        votes=VoteTerms(classes=classes, threshold=threshold, threshold_sigma2="4" if noisy else None),
    )  # fmt: skip
    uploads = [prepare(v.astype(float), terms, d) for v, d in zip(votes, terms.roster, strict=True)]
    for upload in uploads:
        rig.put(upload)
    return terms, uploads


def expected(rig: Rig, terms: RoundTerms, uploads: list[Upload], votes: Integers) -> Integers:
    """The oracle: counts, each aggregator's noise by its key, and the tally in the open."""
    counts = votes.sum(axis=0)
    assert terms.votes is not None
    digest = set_digest(terms, [upload_identifier(u.round, u.device, u.upload_id) for u in uploads])
    ballots, scores = counts.copy(), counts.copy()
    for key in rig.noise_keys if terms.variance is not None else ():
        root = NoiseRoot(key)
        assert terms.variance is not None
        assert terms.votes.variance is not None
        ballots += discrete_gaussian(
            terms.variance, counts.size, root.stream("service votes", terms.round, digest)
        ).reshape(counts.shape)
        scores += discrete_gaussian(
            terms.votes.variance, len(counts), root.stream("service threshold", terms.round, digest)
        )[:, None]
    return tally(ballots, scores, terms.votes.threshold).astype(np.int64)


@pytest.mark.parametrize(
    ("queries", "classes", "threshold"), [(1, 2, 3), (65, 3, 6), (200, 10, 5), (1100, 4, 7)]
)
def test_the_vote_is_the_tally_and_nothing_else(rig: Rig, queries: int, classes: int, threshold: int) -> None:
    votes = votes_of(9, queries, classes)
    for noisy in (True, False):
        terms, uploads = hold(rig, votes, threshold, noisy=noisy)
        total = rig.close(terms)
        won = total.integers.reshape(queries, classes)
        np.testing.assert_array_equal(won, expected(rig, terms, uploads, votes))
        assert set(won.sum(axis=1)) <= {0, 1}
    if queries > 1:
        assert 0 < won.sum() < queries, "the case shows both outcomes"


def test_draws_and_negative_counts_are_decided_as_in_the_open(rig: Rig) -> None:
    """Every device votes alike, or they draw; the threshold is at the very count, and one above."""
    votes = np.zeros((4, 64, 3), np.int64)
    votes[:2, :, 2] = votes[2:, :, 1] = 1
    for threshold, answered in ((2, 64), (3, 0), (0, 64)):
        terms, _ = hold(rig, votes, threshold, noisy=False)
        won = rig.close(terms).integers.reshape(64, 3)
        assert won.sum() == answered
        assert won[:, 1].sum() == answered, "the lower of two that draw"


def test_what_is_posted_is_uniform_and_a_repeated_vote_is_the_same(rig: Rig) -> None:
    """Each party's bits by themselves, at 1e-6 over 4,000 fair coins; what they hide is mostly 0."""
    votes = votes_of(8, 1000, 4, seed=1)
    terms, uploads = hold(rig, votes, 5)
    first = rig.close(terms).integers
    np.testing.assert_array_equal(first, expected(rig, terms, uploads, votes).ravel())
    posts = []
    for rank in range(len(rig.noise_keys)):
        share = (rig.state(rank) / "rounds" / terms.folder / "share").read_bytes()
        posts.append(share)
        ones = int(np.unpackbits(np.frombuffer(share[64:], np.uint8)).sum())
        assert 5e-7 < stats.binom.cdf(ones, 8 * len(share[64:]), 0.5) < 1 - 5e-7
    assert first.mean() < 0.3
    np.testing.assert_array_equal(combine(terms, posts), first)
    np.testing.assert_array_equal(rig.close(terms).integers, first)
    for rank in range(len(rig.noise_keys)):  # the shares are lost, so the parties vote again
        (rig.state(rank) / "rounds" / terms.folder / "share").unlink()
    np.testing.assert_array_equal(rig.close(terms).integers, first)
    again = (rig.state(0) / "rounds" / terms.folder / "share").read_bytes()
    assert again[64:] != posts[0][64:], "fresh shares of the same outcome"


def test_shares_of_two_sessions_are_never_put_together(rig: Rig) -> None:
    terms, _ = hold(rig, votes_of(4, 10, 3), 3)
    share = np.zeros((10, 3), np.bool_)
    posts = [partial_vote(bytes(32), session, share) for session in ("one", "two")]
    with pytest.raises(ChannelError, match="not of one set"):
        combine(terms, posts)
    assert not combine(terms, [posts[0], posts[0]]).any()
    rig.close(terms)
    local = rig.kept["local"]
    assert isinstance(local, LocalParties)
    first = rig.close(terms)
    (rig.state(1) / "rounds" / terms.folder / "share").unlink()
    os.kill(local.pids[1], signal.SIGKILL)  # only one party has its share, of a session that is gone
    np.testing.assert_array_equal(rig.close(terms).integers, first.integers)


def test_a_device_that_stuffs_the_ballot_fails_the_norm_check(rig: Rig) -> None:
    """Honest votes are as long as allowed: each is rejected with probability 2^-40 at most."""
    votes = votes_of(5, 100, 4)
    votes[4] *= 3
    devices, queries, classes = votes.shape
    terms = rig.open(
        devices, entries=queries * classes, bound=10, projections=256,
        votes=VoteTerms(classes=classes, threshold=3, threshold_sigma2=None),
    )  # fmt: skip
    for block, device in zip(votes, terms.roster, strict=True):
        rig.put(seal_integers(block.ravel(), terms, device))
    total = rig.close(terms)
    assert total.devices == terms.roster[:4]
    counts = votes[:4].sum(axis=0)
    np.testing.assert_array_equal(total.integers.reshape(counts.shape), tally(counts, counts, 3))


def test_a_group_without_a_third_party_holds_no_vote(tmp_path: Path) -> None:
    with services_inside(tmp_path) as services:
        group = PartyGroup(service_links([service.url for service in services]))
        other = Rig(group, (), lambda rank: services[rank].party.directory)
        with pytest.raises(RefusalError, match="a vote needs a third party"):
            hold(other, votes_of(4, 5, 3), 2)
        group.disconnect()
        # A run is told before it begins, so before anything is spent.
        rule = vote_rule(devices=4, queries=5, rho=None, threshold=0.5, threshold_share=0.5)
        options = SecureOptions(urls=tuple(service.url for service in services), votes=rule)
        channel = open_channel("secure", clip_norm=1.0, root=ROOT, options=options)
        with channel, pytest.raises(ConfigError, match="the services have none"):
            channel.start()


def test_a_party_holds_votes_to_its_own_price(tmp_path: Path) -> None:
    make_keys(tmp_path, third_party=True, tls=False)
    party = load_party(tmp_path / "party-0.toml")
    votes = VoteTerms(classes=3, threshold=2, threshold_sigma2="7")
    terms = RoundTerms(
        round=1, keys=party.members[:2], entries=30, minimum=2, fraction_bits=0, bound=4, sigma2="5",
        roster=("a", "b"), expires=int(time.time()) + 60, votes=votes,
    )  # fmt: skip
    price = float(terms.rho or 0)
    for rho, kept in ((price, True), (0.99 * price, False)):
        limits = party.limits.model_copy(update={"max_rho": rho})
        bound = party.model_copy(update={"limits": limits})
        if kept:
            admit_terms(bound, terms)
            continue
        with pytest.raises(ChannelError, match="less noise"):
            admit_terms(bound, terms)


def test_an_audit_knows_what_a_vote_shows() -> None:
    game = prepared.prepare(small("channel.kind=secure", "channel.aggregation=votes"))
    assert views_of(game, "all") == ("student", "gradient")
    assert views_of(game, "student") == ("student",)
    for view in ("secure_sum", "teacher"):
        with pytest.raises(ConfigError, match="'votes' the views are student and gradient"):
            views_of(game, view)


@pytest.mark.slow
def test_workers_killed_and_stopped_at_the_vote(tmp_path: Path) -> None:
    strikes = [
        ("aggregator-0", signal.SIGKILL, False),
        ("aggregator-1", signal.SIGSTOP, False),
        ("aggregator-1", signal.SIGKILL, True),
        ("aggregator-0", signal.SIGSTOP, True),
    ]
    with services_inside(tmp_path, third_party=True) as services:
        group = PartyGroup(service_links([service.url for service in services]))
        keys = tuple(service.party.noise_key.read_bytes() for service in services[:2])
        rig = Rig(group, keys, lambda rank: services[rank].party.directory)
        votes = votes_of(6, 100, 5)
        for victim, blow, after in strikes:
            terms, uploads = hold(rig, votes, 4)
            with pytest.MonkeyPatch.context() as patch:
                hit = strike(patch, victim, Kind.VOTE, blow, after=after)
                total = rig.close(terms)
                assert len(hit) == 1
            np.testing.assert_array_equal(total.integers, expected(rig, terms, uploads, votes).ravel())
        group.disconnect()


@pytest.mark.parametrize(
    "change",
    [
        {"entries": 31}, {"sigma2": None}, {"noise": "devices"}, {"fraction_bits": 2},
        {"sigma2": str(2**61)},
        {"votes": {"classes": 1, "threshold": 1, "threshold_sigma2": "1"}},
        {"votes": {"classes": 3, "threshold": -1, "threshold_sigma2": "1"}},
        {"votes": {"classes": 3, "threshold": 1, "threshold_sigma2": "0"}},
        {"votes": {"classes": 3, "threshold": 1, "threshold_sigma2": None}},
    ],
)  # fmt: skip
def test_terms_of_a_vote_are_checked(change: dict[str, object]) -> None:
    fields: dict[str, object] = {
        "round": 1, "keys": ("00" * 32, "11" * 32), "entries": 30, "minimum": 2, "fraction_bits": 0,
        "bound": 4, "sigma2": "5", "roster": ("a", "b"), "expires": int(time.time()) + 60,
        "votes": {"classes": 3, "threshold": 2, "threshold_sigma2": "7"},
    }  # fmt: skip
    terms = RoundTerms.model_validate(fields)
    assert RoundTerms.unpack(terms.pack()) == terms
    assert terms.rho == 10 * (Fraction(1, 10) + Fraction(1, 14))
    with pytest.raises(ValueError, match=r"votes|expected|greater|none"):
        RoundTerms.model_validate(fields | change)


def test_the_numpy_backend_holds_the_same_vote() -> None:
    group = LocalGroup(2, timeout=10)
    votes = votes_of(7, 50, 4).sum(axis=0)
    shares = [[s.expand(200).reshape(50, 4) for s in split(votes.ravel(), 2)] for _ in range(2)]
    found: list[NDArray[np.bool_]] = [np.zeros((50, 4), np.bool_)] * 2

    def run(rank: int) -> None:
        found[rank] = RingBackend(rank, group).winners(shares[0][rank], shares[1][rank], 5)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    np.testing.assert_array_equal(found[0] ^ found[1], tally(votes, votes, 5))


# ---- the channel and the run ------------------------------------------------------------------------


def test_the_channel_releases_labels_and_its_price() -> None:
    votes = torch.from_numpy(votes_of(6, 40, 5)).to(torch.float32)
    devices = [f"device-{i}" for i in range(6)]
    rule = vote_rule(devices=6, queries=40, rho=None, threshold=0.5, threshold_share=0.5)
    with open_channel("secure", clip_norm=1.0, root=ROOT, options=SecureOptions(votes=rule)) as channel:
        release = channel.release(votes, devices=devices, round=0)
        assert isinstance(channel.event, NoPrivacy)
        counts = votes.sum(0)
        clear = counts.amax(-1) >= 3
        assert torch.equal(release.answers.sum(-1) > 0, clear)
        assert torch.equal(release.answers[clear].argmax(-1), counts[clear].argmax(-1))
        assert release.noise_std == 0.0
        broken, zeroed = votes.clone(), votes.clone()
        broken[2, 3, 1], zeroed[2] = torch.nan, 0
        found, expected = (channel.release(v, devices=devices, round=2) for v in (broken, zeroed))
        assert torch.equal(found.answers, expected.answers)
        assert found.devices == tuple(devices), "whoever cannot vote is not named"
        for bad, words in [(votes / 2, "not one-hot"), (votes[:, :9], "priced for 40"),
                           (1 - votes, "not one-hot")]:  # fmt: skip
            with pytest.raises(ChannelError, match=words):
                channel.release(bad, devices=devices, round=1)


def test_a_rule_that_costs_more_than_the_channel_is_refused() -> None:
    rule = vote_rule(devices=6, queries=40, rho=1.0, threshold=0.5, threshold_share=0.5)
    for rho, options, words in [
        (0.5, SecureOptions(votes=rule), "less than the votes' rule costs"),
        (None, SecureOptions(votes=rule), "not that of the votes' rule"),
        (1.0, SecureOptions(votes=VoteRule(40, 3, None, None)), "not that of the votes' rule"),
        (1.0, SecureOptions(votes=rule, noise="devices"), "would spoil it"),
    ]:
        with pytest.raises(ConfigError, match=words):
            open_channel("secure", clip_norm=1.0, root=ROOT, rho=rho, options=options)
    channel = open_channel("secure", clip_norm=1.0, root=ROOT, rho=1.0, options=SecureOptions(votes=rule))
    assert channel.event == ZCdp(1.0)


def test_a_run_votes_and_its_repetition_is_the_same(tmp_path: Path) -> None:
    overrides = ("channel.kind=secure", "channel.aggregation=votes", "privacy.device_epsilon=60",
                 "reverse.queries=12", "rounds=1")  # fmt: skip
    result = play(tmp_path / "a", *overrides)
    play(tmp_path / "b", *overrides)
    assert same(tmp_path / "a", tmp_path / "b")
    wire = load_file(tmp_path / "a" / "rounds" / "001" / "wire.safetensors")
    assert wire["answers"].shape == (12, 10)
    assert set(wire["answers"].sum(-1).tolist()) == {0.0, 1.0}, "labels, and queries without one"
    assert set(wire["answers"].flatten().tolist()) == {0.0, 1.0}
    device = next(row for row in result.ledger if row.unit == "device")
    assert 0.98 * 60 < device.epsilon.high <= 60
