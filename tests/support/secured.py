"""Clouds of a test over running aggregators."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sites import Site, impatient, site

from privkd.secure.client import service_links
from privkd.secure.group import PartyGroup
from privkd.secure.local import LocalParties

LIMITS = {"minimum_devices": 1, "request_seconds": 10.0}


@contextmanager
def running_aggregators() -> Iterator[str]:
    """The table of a running group with a third party, as of ``cloud.toml``."""
    with LocalParties(2, third_party=True, tls=False, limits=LIMITS) as parties:
        group = PartyGroup(service_links(parties.urls))
        keys = group.keys(float("inf"))
        group.disconnect()
        yield f"[aggregators]\nurls = {list(parties.urls)}\nkeys = {list(keys)}\n[run]\n"


def secured(folder: Path, aggregators: str, *more: str, text: str = "") -> Site:
    """A site over it; ``more`` are settings of its channel."""
    channel = "\n".join(["[run.channel]", 'kind = "secure"', *more])

    def change(given: str) -> str:
        rest, _, _ = given.partition("[run.channel]")
        return impatient(rest.replace("[run]\n", aggregators)) + channel + text

    return site(folder, "plain", change)
