"""What a party takes part in, and which uploads it takes: all that is refused for good."""

import time
from collections.abc import Container
from fractions import Fraction

from privkd.errors import ChannelError
from privkd.privacy.events import PartyId
from privkd.secure.envelope import Header
from privkd.secure.normcheck import MIN_PROJECTIONS
from privkd.secure.party import PartyConfig
from privkd.secure.terms import RoundTerms
from privkd.secure.totals import ROUNDING


class RefusalError(ChannelError):
    """This party will not do what was asked, now or later. ``status`` is HTTP's."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def admit_terms(party: PartyConfig, terms: RoundTerms) -> None:
    """Hold a round's terms to this party's own.

    Raises:
        RefusalError: it does not take part in such a round.
    """
    limits, name = party.limits, f"round {terms.folder}"
    if party.deals:
        raise RefusalError(404, f"{party.name} holds no shares, so it takes part in no round")
    if terms.keys != party.members[: party.parties]:
        raise RefusalError(409, f"{name}: its keys are not those of this party's members")
    if terms.expires <= time.time():
        raise RefusalError(410, f"{name} has expired")
    if terms.minimum < limits.minimum_devices:
        raise RefusalError(
            403, f"{name}: minimum={terms.minimum}, this party asks for {limits.minimum_devices}"
        )
    if terms.entries * 4 > limits.max_upload_bytes:
        raise RefusalError(413, f"{name}: {terms.entries} entries, more than this party takes")
    if terms.needs_third_party and not party.third_party:
        what = "the norm check" if terms.projections else "a vote"
        raise RefusalError(409, f"{name}: {what} needs a third party, and this group has none")
    if 0 < terms.projections < MIN_PROJECTIONS:
        raise RefusalError(
            403, f"{name}: {terms.projections} projections, a norm check takes {MIN_PROJECTIONS}"
        )
    rho = terms.rho
    for limit, most in (("max_rho", limits.max_rho), ("max_rho_total", limits.max_rho_total)):
        if most is not None and (rho is None or rho > Fraction(most) * ROUNDING):
            raise RefusalError(403, f"{name}: less noise than this party's {limit}={most:g} asks for")


def admit_header(party: PartyConfig, roster: Container[PartyId], terms: RoundTerms, header: Header) -> None:
    """Hold an upload's outside to the round that it was sent to.

    Raises:
        RefusalError: it is for another round or party, or of a stranger.
    """
    found = (header.round, header.party, header.parties, header.entries)
    expected = (terms.label, party.rank, party.parties, terms.entries)
    if found != expected:
        names = ("round", "aggregator", "number of aggregators", "number of entries")
        wrong = [name for name, a, b in zip(names, found, expected, strict=True) if a != b]
        raise RefusalError(400, f"{header.device}: upload for another {wrong[0]}")
    if header.device not in roster:
        raise RefusalError(403, f"{header.device}: not on the roster of round {terms.folder}")
