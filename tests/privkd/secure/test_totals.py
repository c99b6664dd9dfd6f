"""What a device has paid at an aggregator over all rounds: by itself, and among running services."""

import os
import signal
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from rig import LIMITS, Rig, block, services_inside, soon, uploads_of

from privkd.channels.channel import noise_variance
from privkd.errors import ChannelError, RefusalError
from privkd.secure.client import service_links
from privkd.secure.group import PartyGroup
from privkd.secure.local import LocalParties
from privkd.secure.service import Service
from privkd.secure.terms import DeviceTotals, RoundTerms, VoteTerms
from privkd.secure.upload import prepare

BOUND = 100_000
RHO = 0.1
LIMIT = 0.3
SIGMA2 = str(noise_variance(BOUND, RHO))
BEYOND = r"victim: round \w+ would take it beyond this party's max_rho_total=0.3"


# ---- by itself --------------------------------------------------------------------------------------


def test_a_total_is_the_sum_of_the_rounds_prices_each_counted_once() -> None:
    totals = DeviceTotals(1.0)
    for _ in range(3):
        totals.charge(1, ["a", "b"], Fraction(1, 2))
    totals.charge(2, ["a"], Fraction(1, 4))
    assert totals.beyond(["a", "b", "c"], Fraction(1, 4)) == []
    assert totals.beyond(["a", "b", "c"], Fraction(1, 3)) == ["a"]
    assert totals.beyond(["a", "b", "c"], Fraction(2, 3)) == ["a", "b"]
    assert totals.beyond(["a", "b", "c"], None) == ["a", "b", "c"], "no noise is beyond every limit"
    totals.refund(2)
    totals.refund(2)
    totals.refund(7)
    assert totals.beyond(["a", "b"], Fraction(1, 2)) == []


def test_prices_made_of_floats_fit_exactly_as_often_as_they_should() -> None:
    """Ten tenths make one, though as floats they do not; an eleventh does not fit."""
    totals = DeviceTotals(1.0)
    for label in range(10):
        assert not totals.beyond(["a"], Fraction(0.1))
        totals.charge(label, ["a"], Fraction(0.1))
    assert totals.beyond(["a"], Fraction(1, 10**6)) == ["a"]


def test_without_noise_a_total_is_infinite_until_it_is_refunded() -> None:
    totals = DeviceTotals(1e9)
    totals.charge(1, ["a"], None)
    totals.charge(2, ["a"], Fraction(1, 2))
    assert totals.beyond(["a", "b"], Fraction(0)) == ["a"]
    totals.refund(1)
    assert totals.beyond(["a", "b"], Fraction(0)) == []


def test_without_a_limit_nothing_is_beyond_it() -> None:
    totals = DeviceTotals(None)
    totals.charge(1, ["a"], None)
    assert totals.beyond(["a"], None) == []


def test_a_journal_says_what_was_spent_whatever_the_limit_then_was() -> None:
    terms = RoundTerms(
        round=1, keys=("00" * 32, "11" * 32), entries=4, minimum=1, fraction_bits=0, bound=BOUND,
        sigma2=SIGMA2, roster=("a", "b"), expires=1,
    )  # fmt: skip
    free = terms.model_copy(update={"sigma2": None})

    def story(label: int, which: RoundTerms, *events: str) -> list[dict[str, object]]:
        facts = {"opened": {"terms": which.model_dump()}, "agreed": {"devices": ["a"]}}
        return [{"event": e, "round": f"{label:016x}"} | facts.get(e, {}) for e in events]

    shared, given_up, open_still = (
        story(1, terms, "opened", "closed", "agreed", "posted"),
        story(2, terms, "opened", "closed", "agreed", "abandoned"),
        story(3, terms, "opened", "closed"),
    )
    totals = DeviceTotals.recalled(LIMIT, shared + given_up + open_still)
    assert totals.beyond(["a", "b"], Fraction(2 * RHO)) == []
    assert totals.beyond(["a", "b"], Fraction(2.1 * RHO)) == ["a"]
    free_round = story(4, free, "opened", "closed", "agreed")
    assert DeviceTotals.recalled(LIMIT, shared + free_round).beyond(["a", "b"], Fraction(0)) == ["a"]
    vote = terms.model_copy(
        update={"sigma2": "20", "votes": VoteTerms(classes=2, threshold=1, threshold_sigma2="20")}
    )
    voted = DeviceTotals.recalled(LIMIT, story(5, vote, "opened", "closed", "agreed"))
    # Two queries, of 1/40 on the threshold and 1/40 on the votes each.
    assert voted.beyond(["a"], Fraction(2, 10)) == []
    assert voted.beyond(["a"], Fraction(21, 100)) == ["a"]


# ---- among running services -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parties() -> Iterator[LocalParties]:
    with LocalParties(2, limits=LIMITS | {"max_rho_total": LIMIT}) as started:
        yield started


@pytest.fixture
def rig(parties: LocalParties) -> Iterator[Rig]:
    group = PartyGroup(service_links(parties.urls, parties.client_tls))
    # Names that no other test has used.
    yield Rig(group, (), parties.state, name=time.time_ns() % 2**40)
    group.disconnect()


def asked(rig: Rig, *roster: str) -> RoundTerms:
    """A round at ``RHO`` for whoever is on the roster; those who are let in upload."""
    terms = rig.open(roster=roster, sigma2=SIGMA2, bound=BOUND)
    for upload in uploads_of(terms).values():
        rig.put(upload)
    return terms


def test_a_device_is_asked_no_further_than_its_total_even_after_a_restart(
    parties: LocalParties, rig: Rig
) -> None:
    """Three rounds at 0.1 each, some closed again and again; then it is left out, and the others go on."""
    for number in range(3):
        terms = asked(rig, "victim", f"made-up-{number}")
        first = rig.close(terms)
        np.testing.assert_array_equal(rig.close(terms).integers, first.integers)
        assert first.devices == (f"made-up-{number}", "victim")
    for rank in range(2):
        os.kill(parties.pids[rank], signal.SIGKILL)
    terms = rig.open(roster=("victim", "other", "third"), sigma2=SIGMA2, bound=BOUND)
    uploads = uploads_of(terms)
    for rank in range(2):
        with pytest.raises(RefusalError, match=BEYOND):
            rig.post(rank, terms.round, uploads["victim"].envelopes[rank])
    for device in ("other", "third"):
        rig.put(uploads[device])
    total = rig.close(terms)
    assert total.devices == ("other", "third")
    assert "max_rho_total=0.3" in total.left_out["victim"]


def test_rounds_that_no_total_could_hold_are_not_even_opened(rig: Rig) -> None:
    for sigma2 in (None, str(noise_variance(BOUND, 1.01 * LIMIT))):
        with pytest.raises(RefusalError, match=r"less noise than this party's max_rho_total=0\.3 asks for"):
            rig.open(sigma2=sigma2, bound=BOUND)
    rig.open(sigma2=str(noise_variance(BOUND, LIMIT)), bound=BOUND)


def test_of_rounds_open_at_once_those_are_released_that_fit(rig: Rig) -> None:
    """All let the device in, as none has cost it anything; the fourth is refused before a share is made."""
    rounds = [asked(rig, "busy", f"company-{number}") for number in range(4)]
    for terms in rounds[:3]:
        assert "busy" in rig.close(terms).devices
    with pytest.raises(RefusalError, match=r"busy: round \w+ would take it beyond"):
        rig.close(rounds[3])
    for rank in range(2):
        assert not rig.journal(rank, "agreed", rounds[3])
        assert not (rig.state(rank) / "rounds" / rounds[3].folder / "share").exists()


def test_attempts_that_came_to_nothing_cost_nothing(rig: Rig) -> None:
    terms = rig.open(roster=("patient", "late"), sigma2=SIGMA2, bound=BOUND)
    for _ in range(5):
        rig.put(prepare(block(0), terms, "patient"))
        with pytest.raises(RefusalError, match="1 uploads agreed, fewer than 2"):
            rig.close(terms)
        terms = rig.group.standing(terms, soon())
        rig.group.open(terms, soon())
    for device in terms.roster:
        rig.put(prepare(block(0), terms, device))
    assert rig.close(terms).devices == ("late", "patient")


def test_one_aggregator_with_a_limit_is_enough_and_an_abandoned_set_costs_nothing(tmp_path: Path) -> None:
    """A set was agreed on and no share made of it; of the attempts after it the limit then admits three."""
    with services_inside(tmp_path, limits={1: {"max_rho_total": LIMIT}}) as services:
        group = PartyGroup(service_links([service.url for service in services]))
        rig = Rig(group, (), lambda rank: services[rank].party.directory)
        terms = asked(rig, "victim", "made-up")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(services[0].rounds), "_share", _no_share)
            with pytest.raises(RefusalError, match="no share"):
                rig.close(terms)
        assert rig.journal(1, "agreed", terms)
        for endpoint in group.aggregators:
            endpoint.abandon(terms.label, soon())
        for number in range(3):
            assert "victim" in rig.close(asked(rig, "victim", f"company-{number}")).devices
        last = rig.open(roster=("victim", "other", "third"), sigma2=SIGMA2, bound=BOUND)
        uploads = uploads_of(last)
        rig.put(uploads["victim"], 0)
        with pytest.raises(RefusalError, match=BEYOND):
            rig.put(uploads["victim"], 1)
        for device in ("other", "third"):
            rig.put(uploads[device])
        assert rig.close(last).devices == ("other", "third")
        group.disconnect()


def test_without_a_limit_a_cloud_can_ask_for_ever(tmp_path: Path) -> None:
    """The twin that shows what the limit is for; and a limit set too late makes no more shares."""
    with services_inside(tmp_path) as services:
        group = PartyGroup(service_links([service.url for service in services]))
        rig = Rig(group, (), lambda rank: services[rank].party.directory)
        for _ in range(4):
            rig.close(asked(rig, "victim", "made-up"))
        agreed = asked(rig, "victim", "made-up")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(services[0].rounds), "_share", _no_share)
            with pytest.raises(ChannelError, match="no share"):
                rig.close(agreed)
        group.disconnect()
        for service in services:
            limits = service.party.limits.model_copy(update={"max_rho_total": LIMIT})
            revived = Service(service.party.model_copy(update={"limits": limits}))
            with pytest.raises(RefusalError, match=BEYOND.replace("victim", "(victim|made-up)")):
                revived.rounds.close(agreed.label, "any", agree=False)
            with pytest.raises(RefusalError, match=BEYOND.replace("victim", "(victim|made-up)")):
                revived.rounds.close(agreed.label, "any", agree=False)
            revived.stop()


def _no_share(*_: object) -> bytes:
    raise RefusalError(409, "no share in this test")
