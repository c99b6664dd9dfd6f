"""What ``privkd keys`` and ``privkd aggregator`` do, between the command line's parsing and the services."""

import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from privkd.errors import ConfigError, PrivkdError
from privkd.secure.keys import CLOUD, TestAuthority, create_noise_key, create_sealing_key
from privkd.secure.party import MAX_PARTIES, load_party
from privkd.secure.service import Service


@dataclass(frozen=True)
class KeysRequest:
    """``privkd keys`` as it was typed.

    Attributes:
        out: a folder for all files.
        parties: number of aggregators.
        third_party: whether to make a third party too.
        hosts: host names or addresses of the parties' services, by rank; one for all is enough.
        port: of the first party's service, the others' follow; 0 lets each take any.
        devices: names for which client certificates are made.
        tls: whether to make certificates and to use them.
    """

    out: Path
    parties: int
    third_party: bool
    hosts: tuple[str, ...]
    port: int
    devices: tuple[str, ...]
    tls: bool


def keys_command(request: KeysRequest) -> None:
    """Make keys, test certificates and one configuration a party, and say what is where.

    Raises:
        ConfigError: a setting is out of range, or a file exists already.
    """
    members = _members(request)
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{request.out}: {error.strerror or error}") from None
    ranks = range(request.parties + request.third_party)
    public = [create_sealing_key(request.out / f"party-{rank}.key") for rank in ranks]
    authority = TestAuthority() if request.tls else None
    if authority is not None:
        authority.write(request.out)
        authority.issue(request.out, CLOUD, name=CLOUD)
        for device in request.devices:
            authority.issue(request.out, device, name=device)
    for rank, host in zip(ranks, members, strict=True):
        create_noise_key(request.out / f"party-{rank}.noise")
        if authority is not None:
            authority.issue(request.out, f"party-{rank}.tls", name=f"party-{rank}", hosts=[host])
        settings = _settings(request, rank, host, public)
        (request.out / f"party-{rank}.toml").write_text(tomli_w.dumps(settings))
    sys.stdout.write(
        f"{len(members)} parties in {request.out}: give each party its own party-N files"
        f"{' and ca.pem' if request.tls else ''}, then run `privkd aggregator --config party-N.toml` there\n"
        "each party sets its own [limits] in party-N.toml: max_rho for a round, and max_rho_total for each "
        "device over all rounds, without which a cloud can ask the same device for ever\n"
    )


def _members(request: KeysRequest) -> tuple[str, ...]:
    """Each party's host."""
    if not 2 <= request.parties <= MAX_PARTIES:
        raise ConfigError(f"parties={request.parties}: expected 2 to {MAX_PARTIES}")
    count = request.parties + request.third_party
    if not 0 <= request.port <= 65535 - count:
        raise ConfigError(f"port={request.port}: expected 0 to {65535 - count}")
    for device in request.devices:
        if (
            not device
            or set(device) & set("/\\\0")
            or device.startswith((".", "party-"))
            or device in (CLOUD, "ca")
        ):
            raise ConfigError(f"device {device!r}: its certificate needs a name that can be a file's")
    if len(request.hosts) not in (1, count):
        raise ConfigError(f"{len(request.hosts)} hosts for {count} parties: give one for all, or one each")
    return request.hosts if len(request.hosts) == count else request.hosts * count


def _settings(request: KeysRequest, rank: int, host: str, public: Sequence[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "rank": rank,
        "parties": request.parties,
        "listen": f"{host}:{request.port + rank if request.port else 0}",
        "directory": f"state-{rank}",
        "sealing_key": f"party-{rank}.key",
        "noise_key": f"party-{rank}.noise",
        "members": list(public),
    }
    if request.tls:
        settings["tls"] = {
            "certificate": f"party-{rank}.tls.pem",
            "key": f"party-{rank}.tls.key",
            "client_ca": "ca.pem",
        }
    return settings


def aggregator_command(config: Path, *, while_input: bool = False) -> None:
    """Run one party until it is told to end (SIGINT or SIGTERM); its address is the first line on stdout.

    Args:
        config: the party's TOML.
        while_input: end with the standard input too, and so with whoever holds its other end.

    Raises:
        ConfigError: the configuration, a key or a certificate is wrong.
        RunError: the journal is damaged.
    """
    service = Service(load_party(config))
    done = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: done.set())
    if while_input:
        threading.Thread(target=_after_input, args=(done,), daemon=True).start()
    threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
    sys.stdout.write(f"{service.party.name} listens on {service.url}\n")
    sys.stdout.flush()
    try:
        done.wait()
    finally:
        service.stop()


def _after_input(done: threading.Event) -> None:
    sys.stdin.buffer.read()
    done.set()


if __name__ == "__main__":
    try:
        aggregator_command(Path(sys.argv[1]), while_input=True)
    except PrivkdError as error:
        sys.exit(str(error))
