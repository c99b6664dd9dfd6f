"""One party as an HTTPS service.

    GET  /v1/party                    who this is: rank, parties, public key
    POST /v1/session                  {"session", "port"}: start a worker for a group of workers
    PUT  /v1/rounds/<name>            the round's terms; GET what is public of it
    POST /v1/rounds/<name>/uploads    one sealed upload
    POST /v1/rounds/<name>/relay      many sealed uploads, each behind its length; why some are refused
    POST /v1/rounds/<name>/share      {"session", "agree", "kept"}: close the round; this party's part of it
    POST /v1/rounds/<name>/abandon    never release anything of the round

Refusals carry ``{"error": ...}``: 4xx are final, 503 may be tried again. Every request has a deadline in all,
not one for each read, and a limit on its size. With client certificates only the common name ``cloud``
opens, closes, relays and abandons; a device uploads under its own name alone.
"""

import contextlib
import io
import json
import re
import signal
import socket
import ssl
import sys
import threading
import time
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

from privkd.errors import ChannelError, ConfigError, PrivkdError, RefusalError
from privkd.secure.keys import CLOUD, load_noise_key, load_sealing_key, public_hex
from privkd.secure.party import PartyConfig, load_party
from privkd.secure.rounds import Rounds
from privkd.secure.state import held, open_rounds
from privkd.secure.terms import RoundTerms
from privkd.secure.upload import header_of, unpacked

_ROUND = re.compile(r"/v1/rounds/([0-9a-f]{16})(/uploads|/relay|/share|/abandon)?")
_MAX_JSON = 1 << 24


class _Reader(io.RawIOBase):
    """A socket's bytes, all under one deadline that a request sets."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.deadline = time.monotonic()

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """One read, within what is left of the request's time."""
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self._connection.settimeout(remaining)
        return self._connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "privkd"
    sys_version = ""
    # An answer is a head and a body: without this the second waits for the first's acknowledgement.
    disable_nagle_algorithm = True

    def setup(self) -> None:
        service = self._service
        seconds = service.party.limits.request_seconds
        self.request.settimeout(seconds)
        if isinstance(self.request, ssl.SSLSocket):
            self.request.do_handshake()
        super().setup()
        self._reader = _Reader(self.connection)
        self.rfile = io.BufferedReader(self._reader, 1 << 16)

    @property
    def _service(self) -> "Service":
        return cast(Service, self.server)

    def handle_one_request(self) -> None:
        seconds = self._service.party.limits.request_seconds
        self._reader.deadline = time.monotonic() + seconds
        self.connection.settimeout(seconds)
        try:
            super().handle_one_request()
        except (OSError, ValueError):
            self.close_connection = True

    def do_GET(self) -> None:
        self._answer(b"")

    def do_PUT(self) -> None:
        self._with_body()

    def do_POST(self) -> None:
        self._with_body()

    def _with_body(self) -> None:
        declared = self.headers.get("Content-Length", "")
        limit = max(self._service.party.limits.max_upload_bytes + 4096, _MAX_JSON)
        if not declared.isdigit() or "Transfer-Encoding" in self.headers:
            self._refuse(411, "a request needs its Content-Length")
        elif len(declared) > 12 or int(declared) > limit:
            self._refuse(413, f"{declared} bytes: more than the limit of {limit}")
        else:
            body = self.rfile.read(int(declared))
            if len(body) != int(declared):
                self.close_connection = True  # it was cut off, and nobody waits for an answer
                return
            self._answer(body)

    def _answer(self, body: bytes) -> None:
        try:
            answer = self._service.answer(self.command, self.path, body, self._caller)
        except RefusalError as refusal:
            self._refuse(refusal.status, str(refusal), keep=True)
        except PrivkdError as error:
            self._refuse(503, str(error), keep=True)
        except Exception as error:  # the service outlives a bug in one request
            self._refuse(500, f"{type(error).__name__}: {error}")
        else:
            self._send(200, answer)

    @cached_property
    def _caller(self) -> str | None:
        """The common name of the client's certificate; none where no certificates are asked for."""
        if not self._service.knows_clients:
            return None
        subject = self.connection.getpeercert().get("subject", ())
        names = [value for parts in subject for key, value in parts if key == "commonName"]
        return names[0] if names else ""

    def _refuse(self, status: int, reason: str, *, keep: bool = False) -> None:
        # An unread body would be taken for the next request.
        self.close_connection = self.close_connection or not keep
        self._send(status, json.dumps({"error": " ".join(reason.split())}).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.connection.settimeout(self._service.party.limits.request_seconds)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """The journal says what matters."""


class Service(ThreadingHTTPServer):
    """One party's rounds behind its address. ``serve_forever`` runs it; ``stop`` ends it and its worker."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, party: PartyConfig) -> None:
        """Take up the party's rounds, and listen.

        Raises:
            ConfigError: keys, certificates or the address do not serve.
        """
        self.party = party
        self.rounds = _rounds(party)
        self._context = _server_context(party)
        self._connections = threading.BoundedSemaphore(party.limits.max_connections)
        try:
            super().__init__(party.address, _Handler)
        except OSError as error:
            raise ConfigError(f"listen={party.listen!r}: {error.strerror or error}") from None

    @property
    def url(self) -> str:
        """Where it is reached."""
        scheme = "https" if self._context else "http"
        host, port = cast(tuple[str, int], self.server_address[:2])
        return f"{scheme}://{host}:{port}"

    @property
    def knows_clients(self) -> bool:
        """Whether clients must show certificates."""
        return self.party.tls is not None and self.party.tls.client_ca is not None

    def answer(self, method: str, path: str, body: bytes, caller: str | None) -> bytes:
        """What a request is answered.

        Raises:
            RefusalError: it is not granted.
            WorkerError: it may be tried again.
        """
        if (method, path) == ("GET", "/v1/party"):
            return json.dumps(self.party.public).encode()
        if (method, path) == ("POST", "/v1/session"):
            _only_cloud(caller)
            fields = _parse(body)
            port = self.rounds.supervisor.join(str(fields.get("session", "")), _port(fields.get("port")))
            return json.dumps({"port": port}).encode()
        match = _ROUND.fullmatch(path)
        if match is None:
            raise RefusalError(404, f"{method} {path[:100]}: no such address")
        label, action = int(match[1], 16), match[2]
        if (method, action) == ("POST", "/uploads"):
            _only_own(caller, body)
            self.rounds.upload(label, body)
            return b"{}"
        _only_cloud(caller)
        match method, action:
            case "GET", None:
                return json.dumps(self.rounds.status(label)).encode()
            case "PUT", None:
                self.rounds.open(_terms(body, label))
            case "POST", "/relay":
                return json.dumps({"refused": self.rounds.upload_all(label, _relayed(body))}).encode()
            case "POST", "/share":
                fields = _parse(body)
                session, agree = str(fields.get("session", "")), fields.get("agree") is not False
                return self.rounds.close(label, session, agree=agree, kept=fields.get("kept") is True)
            case "POST", "/abandon":
                self.rounds.abandon(label)
            case _:
                raise RefusalError(405, f"{method} is not offered at {path}")
        return b"{}"

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept; the handshake is the handler's, so that a silent client stops nobody else."""
        connection, address = super().get_request()
        if self._context is not None:
            try:
                connection = self._context.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
            except OSError:
                connection.close()
                raise
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve in a thread of its own, unless there are too many."""
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """One connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that breaks off is no news."""

    def stop(self) -> None:
        """Stop serving and end the worker. Idempotent; not from the serving thread."""
        self.shutdown()
        self.server_close()
        self.rounds.supervisor.stop()


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


def _server_context(party: PartyConfig) -> ssl.SSLContext | None:
    tls = party.tls
    if tls is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(tls.certificate, tls.key)
        if tls.client_ca is not None:
            context.load_verify_locations(tls.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"[tls] {tls.certificate}, {tls.key}, {tls.client_ca}: {error}") from None
    return context


def _only_cloud(caller: str | None) -> None:
    if caller not in (None, CLOUD):
        raise RefusalError(403, f"{caller!r} may not open, close or relay rounds")


def _only_own(caller: str | None, envelope: bytes) -> None:
    if caller in (None, CLOUD):
        return
    try:
        device = header_of(envelope).device
    except ChannelError as error:
        raise RefusalError(400, str(error)) from error
    if caller != device:
        raise RefusalError(403, f"{caller!r} may not upload for {device}")


def _relayed(body: bytes) -> list[bytes]:
    try:
        return unpacked(body)
    except ChannelError as error:
        raise RefusalError(400, str(error)) from error


def _parse(body: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        fields = json.loads(body)
        if isinstance(fields, dict):
            return fields
    raise RefusalError(400, "expected a JSON object")


def _port(value: Any) -> int | None:
    if value is None or (isinstance(value, int) and 0 < value < 1 << 16):
        return value
    raise RefusalError(400, f"port={value!r}: expected 1 to 65535")


def _terms(body: bytes, label: int) -> RoundTerms:
    try:
        terms = RoundTerms.unpack(body)
    except ChannelError as error:
        raise RefusalError(400, str(error)) from error
    if terms.label != label:
        raise RefusalError(400, f"terms of round {terms.folder} sent to round {label:016x}")
    return terms


def serve(config: Path, *, while_input: bool = False) -> None:
    """Run one party until it is told to end (SIGINT or SIGTERM); its address is the first line on stdout.

    Args:
        config: the party's TOML.
        while_input: end with the standard input too, and so with whoever holds its other end.

    Raises:
        ConfigError: the configuration, a key or a certificate is wrong.
        RunError: the journal is damaged, or another process has the directory.
    """
    party = load_party(config)
    with held(party.directory):
        _serve(Service(party), while_input=while_input)


def _serve(service: Service, *, while_input: bool) -> None:
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
