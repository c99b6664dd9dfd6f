"""One party as a service: its rounds behind an address, by gRPC. The protocol is in ``aggregator.proto``.

The connections, handshakes and streams are gRPC's own, in threads that none of our work occupies; the calls
are `PartyServicer`'s. SIGTERM and SIGINT end a service within seconds; SIGHUP has it read its certificates
and limits anew. Where it listens is the first line on stdout; what happens is on stderr, as JSON lines.
"""

import asyncio
import os
import queue
import resource
import signal
import sys
import threading
from collections.abc import Coroutine
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from privkd.errors import ConfigError
from privkd.secure.addresses import joined
from privkd.secure.aggregator_pb2_grpc import add_AggregatorServicer_to_server
from privkd.secure.credentials import ServerCertificates
from privkd.secure.keys import load_noise_key, load_sealing_key, public_hex
from privkd.secure.observed import Log, Observed, StatusListener
from privkd.secure.party import PartyConfig, load_party
from privkd.secure.rounds import Rounds
from privkd.secure.rpc import MAX_MESSAGE_BYTES, OPTIONS
from privkd.secure.servicer import PartyServicer
from privkd.secure.state import held, open_rounds

_GRACE_SECONDS = 2.0
_SOON_SECONDS = 30 * 86_400
_SERVICE = "privkd.v1.Aggregator"
_OPTIONS: list[tuple[str, Any]] = [
    *OPTIONS,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Else a second service could listen on the same port, and take half of the calls.
    ("grpc.so_reuseport", 0),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.max_concurrent_streams", 100),
    # Of a call that waits for room, so much is held.
    ("grpc.http2.lookahead_bytes", 1 << 14),
    ("grpc.http2.bdp_probe", 0),
    # Clients look after connections on which they wait for minutes.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
]
T = TypeVar("T")


class Service:
    """One party's rounds behind its address. ``start`` serves them; ``stop`` ends that and the worker."""

    def __init__(self, party: PartyConfig, log: Log | None = None) -> None:
        """Take up the party's rounds, and listen; calls wait until ``start``.

        Raises:
            ConfigError: keys, certificates or the address do not serve.
            RunError: a journal is damaged.
        """
        self.party = party
        self.log = Log(None) if log is None else log
        self.rounds = _rounds(party)
        self._certificates = None if party.tls is None else ServerCertificates(party.tls)
        self._unready: str | None = "it starts"
        self.observed = Observed(self.log, self.state)
        self._servicer = PartyServicer(self.rounds, party.directory, self.observed, self._certificates)
        self._status: StatusListener | None = None
        self._server, self._port = _run(self._bound())

    async def _bound(self) -> tuple[grpc.aio.Server, int]:
        # Whoever connects and is silent is let go.
        handshake = ("grpc.server_handshake_timeout_ms", int(1000 * self.party.limits.request_seconds))
        server = grpc.aio.server(options=[*_OPTIONS, handshake])
        add_AggregatorServicer_to_server(self._servicer, server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        address = joined(*self.party.address)
        try:
            if self._certificates is None:
                return server, server.add_insecure_port(address)
            return server, server.add_secure_port(address, self._certificates.credentials)
        except RuntimeError:
            listen = self.party.listen
            raise ConfigError(f"{listen=}: it is in use, or no address of this machine") from None

    @property
    def url(self) -> str:
        """Where it is reached."""
        scheme = "grpc" if self._certificates is None else "grpcs"
        return f"{scheme}://{joined(self.party.address[0], self._port)}"

    @property
    def status_port(self) -> int | None:
        """Of the listener for operators, if there is one."""
        return None if self._status is None else self._status.port

    def start(self) -> None:
        """Serve, in threads of its own.

        Raises:
            ConfigError: the address for operators does not serve.
        """
        if self.party.status is not None:
            self._status = StatusListener(self.party.status, self.observed)
        _run(self._started())
        self._unready = None
        self.log.info("listening", url=self.url, party=self.party.name)
        self._warn_of_end()

    async def _started(self) -> None:
        await self._server.start()
        await self._say(health_pb2.HealthCheckResponse.SERVING)

    async def _say(self, status: Any) -> None:
        for name in ("", _SERVICE):
            await self._health.set(name, status)

    def _warn_of_end(self) -> None:
        certificates = self._certificates
        if certificates is not None and certificates.seconds < _SOON_SECONDS:
            self.log.warning("certificate ends soon", ends=f"{certificates.ends:%Y-%m-%dT%H:%M:%SZ}")

    def reload(self, party: PartyConfig) -> None:
        """Take over the limits and certificates of ``party``; no call and no round is dropped for it.

        Raises:
            ConfigError: a certificate does not serve, or something else was changed; all stays as it was.
        """
        changed = party.model_copy(update={"limits": self.party.limits, "tls": self.party.tls})
        if changed != self.party or (party.tls is None) != (self.party.tls is None):
            raise ConfigError("only [limits] and [tls] can be changed without a restart")
        if self._certificates is not None and party.tls is not None:
            self._certificates.reload(party.tls)
        self.party = party
        self.rounds.hold_to(party)
        _run(self._servicer.hold_to(party.limits))
        self._warn_of_end()

    def state(self) -> dict[str, Any]:
        """What an operator wants to know, of what is public."""
        rounds, supervisor = self.rounds.counts(), self.rounds.supervisor
        worker, certificates = supervisor.worker, self._certificates
        seconds = None if certificates is None else certificates.seconds
        expired = "its certificate has ended" if seconds is not None and seconds <= 0 else None
        return {
            "party": self.party.name,
            "url": self.url,
            "unready": self._unready or expired,
            "uploads": rounds.pop("uploads"),
            "rounds": rounds,
            "worker": {
                "running": worker is not None and worker.alive,
                "sessions": supervisor.sessions,
            },
            "certificate_seconds": seconds,
        }

    def stop(self, grace: float = _GRACE_SECONDS) -> None:
        """Take no more calls, end those still on after ``grace`` seconds, and end the worker. Idempotent."""
        self._unready = "it ends"
        _run(self._stopped(grace))
        self.rounds.supervisor.stop()
        self._servicer.close()
        if self._status is not None:
            self._status.stop()
            self._status = None

    async def _stopped(self, grace: float) -> None:
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.stop(grace)


def _rounds(party: PartyConfig) -> Rounds:
    """Those that a service's directory holds.

    Raises:
        ConfigError: a key is missing, or not the one that the members list names.
        RunError: a journal is damaged.
    """
    sealing_key = load_sealing_key(party.sealing_key)
    if public_hex(sealing_key) != party.members[party.rank]:
        raise ConfigError(
            f"{party.sealing_key}: its public key is {public_hex(sealing_key)}, "
            f"but members[{party.rank}] says {party.members[party.rank]}"
        )
    return open_rounds(party, sealing_key, load_noise_key(party.noise_key))


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all services of this process, in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="services", daemon=True).start()
    return loop


def _run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run_coroutine_threadsafe(work, _loop()).result()


def serve(config: Path, *, while_input: bool = False) -> None:
    """Run one party until it is told to end (SIGINT or SIGTERM); its address is the first line on stdout.

    Args:
        config: the party's TOML.
        while_input: end with the standard input too, and so with whoever holds its other end. Nothing is then
            logged, as nobody reads it.

    Raises:
        ConfigError: the configuration, a key or a certificate is wrong.
        RunError: the journal is damaged, or another process has the directory.
    """
    party = load_party(config)
    with held(party.directory):
        _serve(party, config, while_input=while_input)


def _serve(party: PartyConfig, config: Path, *, while_input: bool) -> None:
    # Each device has a connection of its own.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    told: queue.SimpleQueue[signal.Signals] = queue.SimpleQueue()
    log = Log(None if while_input else party.log.level)
    service = Service(party, log)
    log.adopt_libraries()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: told.put(signal.Signals(number)))
    if while_input:
        threading.Thread(target=_after_input, args=(told,), daemon=True).start()
    try:
        service.start()
        sys.stdout.write(f"{party.name} listens on {service.url}\n")
        sys.stdout.flush()
        while (number := told.get()) == signal.SIGHUP:
            _reload(service, config)
        service.log.info("ending", signal=number.name)
    finally:
        service.stop()
    service.log.info("ended")


def _reload(service: Service, config: Path) -> None:
    try:
        service.reload(load_party(config))
    except ConfigError as error:
        service.log.warning("not reloaded", reason=str(error))
    else:
        service.log.info("reloaded")


def _after_input(told: "queue.SimpleQueue[signal.Signals]") -> None:
    # Not through a buffer, whose lock would outlive this thread at the end of the process.
    while os.read(sys.stdin.fileno(), 1 << 12):
        pass
    told.put(signal.SIGTERM)
