"""``party.toml``: the settings of one party's service.

``privkd keys`` writes one for each party::

    rank = 0                          # which party this is; the third party's is the number of aggregators
    parties = 2                       # aggregators
    listen = "10.0.0.5:8440"          # where devices and the cloud reach it; port 0 takes any
    directory = "state-0"             # spool and journal; relative to this file, as are all paths
    sealing_key = "party-0.key"       # X25519, PEM
    noise_key = "party-0.noise"       # 32 bytes, secret: whoever has it can take this party's noise off
    members = ["9f..", "07.."]        # the parties' public keys by rank, the third party's last

    [peers]                           # the parties' own links, encrypted under their keys
    host = "127.0.0.1"                # rank 0's address, as the others reach it
    port = 0                          # where rank 0 waits for the others; 0 takes any

    [tls]
    certificate = "party-0.pem"
    key = "party-0.tls.key"
    client_ca = "ca.pem"              # asks clients for certificates; "cloud" opens and closes rounds
    crl = "crl.pem"                   # certificates that client_ca took back; read anew when it changes

    [limits]
    minimum_devices = 2               # this party releases nothing over fewer, whatever the cloud asks
    max_rho = 0.5                     # this party refuses rounds with less noise than this price
    max_rho_total = 2.0               # most that each device may pay in all rounds together
    request_seconds = 30.0            # in which a handshake must be done, and the body of a call have come
    start_seconds = 300.0             # for the worker to come up
    step_seconds = 120.0              # for one step of the worker
    hang_seconds = 20.0               # without a sign of life from the worker before it is ended
    calls_per_caller = 4              # at once, by the name in the certificate; the cloud's are not counted
    calls_per_second = 20.0           # likewise; ten seconds' worth at once
    max_upload_bytes = 67108864
    max_bytes_at_once = 33554432      # of bodies in memory; the others wait unread
    max_round_days = 30.0             # how far ahead a round may expire
    lease_seconds = 30.0              # that one run keeps the workers to itself while others wait
    keep_rounds = 8                   # finished rounds whose sealed uploads are kept
    keep_results = 1000               # finished rounds that can be repeated; older ones go once they expired

    [status]
    listen = "127.0.0.1:9440"         # /healthz, /readyz, /status, /metrics over HTTP; loopback only

    [log]
    level = "info"                    # "debug", "info", "warning" or "error", as JSON lines on stderr

Without ``[tls]`` it listens on the loopback interface only, and elsewhere only with ``client_ca``, as
anybody could open and close rounds otherwise. ``max_rho`` and ``max_rho_total`` are unlimited unless given;
where one is, rounds without noise are refused. A total counts every round of which this party made a share
(``privkd.secure.terms``). Every field is public but what the two key
files hold. On SIGHUP a service reads ``[tls]`` and ``[limits]`` anew, and the certificates with them.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from privkd.config import Positive, PositiveFloat, Settings
from privkd.errors import ConfigError
from privkd.secure.addresses import is_loopback, parse_listen

MAX_PARTIES = 16
Port = Annotated[int, Field(ge=0, le=65535)]


class PeersConfig(Settings):
    """The links among the parties; see the module."""

    host: str = "127.0.0.1"
    port: Port = 0


class TlsConfig(Settings):
    """The service's certificate, and the authority of its clients'; see the module."""

    certificate: Path
    key: Path
    client_ca: Path | None = None
    crl: Path | None = None


class LimitsConfig(Settings):
    """What this party refuses, and how long it waits; see the module."""

    minimum_devices: Positive = 2
    max_rho: PositiveFloat | None = None
    max_rho_total: PositiveFloat | None = None
    request_seconds: PositiveFloat = 30.0
    start_seconds: PositiveFloat = 300.0
    step_seconds: PositiveFloat = 120.0
    hang_seconds: PositiveFloat = 20.0
    calls_per_caller: Positive = 4
    calls_per_second: PositiveFloat = 20.0
    max_upload_bytes: Positive = 1 << 26
    max_bytes_at_once: Positive = 1 << 25
    max_round_days: PositiveFloat = 30.0
    lease_seconds: PositiveFloat = 30.0
    keep_rounds: Positive = 8
    keep_results: Positive = 1000


class StatusConfig(Settings):
    """Where an operator looks; see the module."""

    listen: str

    @model_validator(mode="after")
    def _for_this_machine(self) -> Self:
        if not is_loopback(self.address[0]):
            raise ValueError(f"status.listen={self.listen!r}: it asks nobody for a certificate, so only the "
                             "loopback interface is allowed")  # fmt: skip
        return self

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of ``listen``."""
        return parse_listen("status.listen", self.listen)


class LogConfig(Settings):
    """What is written on stderr; see the module."""

    level: Literal["debug", "info", "warning", "error"] = "info"


class Party(Settings):
    """One party among its peers: all that the rounds need to know of it, wherever it runs."""

    rank: Annotated[int, Field(ge=0, le=MAX_PARTIES)]
    parties: Annotated[int, Field(ge=2, le=MAX_PARTIES)]
    members: tuple[str, ...]
    peers: PeersConfig = PeersConfig()
    limits: LimitsConfig = LimitsConfig()

    @model_validator(mode="after")
    def _of_one_group(self) -> Self:
        if len(self.members) not in (self.parties, self.parties + 1):
            raise ValueError(f"{len(self.members)} members: expected the keys of {self.parties} aggregators, "
                             "and the third party's if there is one; `privkd keys group` "
                             "fills them in")  # fmt: skip
        for member in self.members:
            if len(member) != 64 or not set(member) <= set("0123456789abcdef"):
                raise ValueError(f"member {member!r}: expected 64 hexadecimal digits")
        if len(set(self.members)) != len(self.members):
            raise ValueError("members: two parties have one key")
        if self.rank >= len(self.members):
            raise ValueError(f"rank={self.rank}: expected 0 to {len(self.members) - 1}")
        return self

    @property
    def third_party(self) -> bool:
        """Whether the group has a third party, which deals correlated randomness and sees no shares."""
        return len(self.members) > self.parties

    @property
    def deals(self) -> bool:
        """Whether this is the third party itself."""
        return self.rank == self.parties

    @property
    def name(self) -> str:
        """How errors call it."""
        return "third-party" if self.deals else f"aggregator-{self.rank}"

    @property
    def public(self) -> dict[str, Any]:
        """What it says of itself."""
        key, members = self.members[self.rank], len(self.members)
        return {"rank": self.rank, "parties": self.parties, "key": key, "members": members}


class PartyConfig(Party):
    """One party's service; see the module."""

    listen: str
    directory: Path
    sealing_key: Path
    noise_key: Path
    tls: TlsConfig | None = None
    status: StatusConfig | None = None
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _not_open_to_all(self) -> Self:
        host, _ = self.address
        if self.tls is None and not is_loopback(host):
            raise ValueError(f"listen={self.listen!r}: without [tls] only the loopback interface is allowed")
        if self.tls is not None and self.tls.client_ca is None and not is_loopback(host):
            raise ValueError(
                f"listen={self.listen!r}: without tls.client_ca anybody who reaches it could open and close "
                "rounds; set client_ca, or listen on the loopback interface"
            )
        return self

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of ``listen``."""
        return parse_listen("listen", self.listen)


def load_party(path: Path) -> PartyConfig:
    """The party that a TOML file describes; its paths are taken relative to the file's folder.

    Raises:
        ConfigError: the file is missing, not TOML, or a setting is wrong.
    """
    try:
        with path.open("rb") as file:
            tree = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"party configuration {path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"party configuration {path} is not TOML: {error}") from None
    try:
        party = PartyConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(step) for step in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{path}: {f'{name}: ' if name else ''}{message}") from None
    return _anchored(party, path.resolve().parent)


def _anchored(party: PartyConfig, folder: Path) -> PartyConfig:
    tls = party.tls
    if tls is not None:
        tls = tls.model_copy(
            update={
                "certificate": folder / tls.certificate,
                "key": folder / tls.key,
                "client_ca": None if tls.client_ca is None else folder / tls.client_ca,
                "crl": None if tls.crl is None else folder / tls.crl,
            }
        )
    return party.model_copy(
        update={
            "directory": folder / party.directory,
            "sealing_key": folder / party.sealing_key,
            "noise_key": folder / party.noise_key,
            "tls": tls,
        }
    )
