"""Attempts at a round: one that came to nothing is held again, a released one never.

The last test is the point: whatever the order of failures, no honest party makes two shares of one round.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rig import LIMITS, Rig, services_inside, soon, sum_over, uploads_of

from privkd.channels.secure import SecureChannel, SecureOptions
from privkd.errors import ChannelError, RefusalError
from privkd.privacy.noise import NoiseRoot
from privkd.secure.client import service_links
from privkd.secure.group import PartyGroup
from privkd.secure.local import LocalParties
from privkd.secure.party import PartyConfig, load_party
from privkd.secure.service import Service
from privkd.secure.terms import RoundTerms, attempt_label, set_digest
from privkd.secure.upload import prepare

ROOT = NoiseRoot.from_seed(6)
DEVICES = ("a", "b", "c")


@pytest.fixture(scope="module")
def parties() -> Iterator[LocalParties]:
    with LocalParties(2, limits=LIMITS, tls=False) as started:
        yield started


@pytest.fixture
def rig(parties: LocalParties) -> Iterator[Rig]:
    group = PartyGroup(service_links(parties.urls))
    # Names that no other test has used.
    yield Rig(group, (), parties.state, name=time.time_ns() % 2**40)
    group.disconnect()


def abandon(rig: Rig, label: int, *ranks: int) -> None:
    for rank in ranks:
        rig.service(rank).abandon(label, soon())


def events(rig: Rig, rank: int, terms: RoundTerms) -> list[str]:
    return [
        event
        for event in ("opened", "closed", "agreed", "posted", "failed", "abandoned")
        for _ in rig.journal(rank, event, terms)
    ]


def test_every_attempt_has_a_name_uploads_and_noise_of_its_own(rig: Rig) -> None:
    terms = rig.open(sigma2="50")
    second = terms.model_copy(update={"attempt": 1})
    assert terms.label == terms.round
    labels = {attempt_label(round, attempt) for round in range(50) for attempt in range(50)}
    assert len(labels) == 2500
    assert set_digest(second, []) != set_digest(terms, [])
    entropy = b"e" * 32
    first, again = (prepare(np.ones(12), t, "device-0", entropy) for t in (terms, second))
    assert first.upload_id != again.upload_id
    assert again.round == second.label


def test_a_next_attempt_needs_the_former_to_be_abandoned_by_each_party_itself(rig: Rig) -> None:
    terms = rig.open()
    second = terms.model_copy(update={"attempt": 1})
    third = terms.model_copy(update={"attempt": 2})
    with pytest.raises(RefusalError, match="attempt 0 at it was not abandoned here"):
        rig.group.open(second, soon())
    abandon(rig, terms.label, 0, 0)
    with pytest.raises(RefusalError, match="attempt 0 at it was not abandoned here"):
        rig.group.open(second, soon())
    abandon(rig, terms.label, 1)
    rig.group.open(second, soon())
    with pytest.raises(RefusalError, match="attempt 1 at it was not abandoned here"):
        rig.group.open(third, soon())
    with pytest.raises(RefusalError, match="was abandoned"):
        rig.group.open(terms, soon())
    for device, upload in uploads_of(terms).items():
        with pytest.raises(RefusalError, match=f"{device}.*closed|abandoned"):
            rig.put(upload, 0)
    for upload in uploads_of(second).values():
        rig.put(upload)
    np.testing.assert_array_equal(rig.close(second).integers, sum_over(second, second.roster))


def test_a_round_that_was_never_opened_can_be_abandoned_and_then_never_opened(rig: Rig) -> None:
    terms = rig.open()
    unknown = terms.model_copy(update={"round": terms.round + 1})
    rig.name += 1
    abandon(rig, unknown.label, 0, 1, 1)
    with pytest.raises(RefusalError, match="was abandoned"):
        rig.group.open(unknown, soon())


def test_what_was_shared_is_never_abandoned(rig: Rig) -> None:
    terms = rig.open(sigma2="50")
    for upload in uploads_of(terms).values():
        rig.put(upload)
    total = rig.close(terms)
    for rank in range(2):
        with pytest.raises(RefusalError, match="can only be completed"):
            abandon(rig, terms.label, rank)
    with pytest.raises(RefusalError, match="attempt 0 at it was not abandoned here"):
        rig.group.open(terms.model_copy(update={"attempt": 1}), soon())
    assert rig.group.standing(terms, soon()) == terms
    np.testing.assert_array_equal(rig.close(terms).integers, total.integers)


def test_a_failed_round_is_attempted_again_over_more_devices(rig: Rig) -> None:
    terms = rig.open(minimum=3, sigma2="50")
    uploads = uploads_of(terms)
    for device in terms.roster[:2]:
        rig.put(uploads[device])
    with pytest.raises(RefusalError, match="2 uploads agreed, fewer than 3"):
        rig.close(terms)
    again = rig.group.standing(terms, soon())
    assert again.attempt == 1
    assert rig.group.standing(terms, soon()).attempt == 1
    rig.group.open(again, soon())
    for upload in uploads_of(again).values():
        rig.put(upload)
    total = rig.close(again)
    assert total.devices == terms.roster
    for rank in range(2):
        assert events(rig, rank, terms) == ["opened", "closed", "failed", "abandoned"]
        assert events(rig, rank, again) == ["opened", "closed", "agreed", "posted"]
        order = [(r["event"], r["round"]) for r in rig.records(rank)]
        assert order.index(("abandoned", terms.folder)) < order.index(("opened", again.folder))


def test_abandonment_outlives_the_party(parties: LocalParties, rig: Rig) -> None:
    terms = rig.open()
    unknown = terms.model_copy(update={"round": terms.round + 1})
    rig.name += 1
    abandon(rig, terms.label, 0)
    abandon(rig, unknown.label, 0)
    revived = Service(_party(parties, 0))
    with pytest.raises(ChannelError, match="was abandoned"):
        revived.rounds.close(terms.label, "any")
    for dead in (terms, unknown):
        with pytest.raises(ChannelError, match="was abandoned"):
            revived.rounds.open(dead)
    revived.stop()


def _party(parties: LocalParties, rank: int) -> PartyConfig:
    party = load_party(parties.folder / f"party-{rank}.toml")
    return party.model_copy(update={"listen": "127.0.0.1:0"})


def test_a_run_interrupted_for_longer_than_a_round_lives_goes_on(parties: LocalParties) -> None:
    """The channel dies between the uploads and the closing, and comes back when the round has expired."""
    answers = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    options = SecureOptions(urls=parties.urls, run=b"interrupted", lifetime=1)

    def channel(lifetime: int) -> SecureChannel:
        own = SecureOptions(urls=parties.urls, run=b"interrupted", lifetime=lifetime)
        return SecureChannel(9.0, 0.5, ROOT, own, deadline=60.0)

    with (
        SecureChannel(9.0, 0.5, ROOT, options, deadline=1.0) as short,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(PartyGroup, "close", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            short.release(answers, devices=DEVICES, round=3)
    time.sleep(3.1)
    with channel(60) as long:
        first = long.release(answers, devices=DEVICES, round=3)
    with channel(60) as later:
        again = later.release(answers, devices=DEVICES, round=3)
    assert torch.equal(first.answers, again.answers)
    assert first.devices == DEVICES
    for rank in range(2):
        records = Rig(PartyGroup(service_links(parties.urls)), (), parties.state).records(rank)
        mine = [(r["event"], r["round"]) for r in records][-5:]
        assert [event for event, _ in mine] == ["abandoned", "opened", "closed", "agreed", "posted"]
        assert mine[0][1] != mine[1][1]


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["opened", "closed", "agreed"])
def test_whatever_was_not_shared_may_be_abandoned_and_then_never_is(tmp_path: Path, step: str) -> None:
    """One party gets as far as ``step``; after the abandonment neither makes a share, whoever asks."""
    with services_inside(tmp_path) as services:
        group = PartyGroup(service_links([service.url for service in services]))
        rig = Rig(group, (), lambda rank: services[rank].party.directory)
        terms = rig.open(sigma2="50")
        for upload in uploads_of(terms).values():
            rig.put(upload)
        if step != "opened":
            for service in services:
                rounds = service.rounds
                rounds._freeze(rounds._opened(terms.label))
        if step == "agreed":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(services[0].rounds), "_share", _no_share)
                with pytest.raises(ChannelError, match="no share"):
                    rig.close(terms)
        abandon(rig, terms.label, 0, 1)
        with pytest.raises(RefusalError, match="was abandoned"):
            rig.close(terms)
        second = group.standing(terms, soon())
        assert second.attempt == 1
        group.open(second, soon())
        for device in second.roster[:3]:
            rig.put(uploads_of(second)[device])
        assert rig.close(second).devices == second.roster[:3]
        for rank in range(2):
            posted = [r["round"] for r in rig.records(rank) if r["event"] == "posted"]
            assert posted == [second.folder]
        group.disconnect()


def _no_share(*_: object) -> bytes:
    raise RefusalError(409, "no share in this test")
