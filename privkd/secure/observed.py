"""What an operator sees of a party's service: log lines, metrics, and whether it is well.

Log lines are JSON objects on stderr. They and the metrics name callers, calls, codes, times and sizes; never
a key, an answer, an envelope or where a file lies. What is seen without a certificate is on a listener of its
own, which the loopback interface alone reaches (``[status] listen``):

    /healthz    200 while the process answers
    /readyz     200 while it takes calls, else 503 and why not
    /status     its state as one JSON object
    /metrics    Prometheus

Failed handshakes are nowhere: gRPC does not tell of them.
"""

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    make_wsgi_app,
)
from prometheus_client.core import GaugeMetricFamily, Metric

from privkd.errors import ConfigError
from privkd.secure.party import StatusConfig

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_REASONS = {400: "malformed", 403: "forbidden", 404: "unknown", 409: "state", 410: "expired", 413: "size"}


class Log:
    """JSON lines for machines to read."""

    def __init__(self, level: str | None) -> None:
        """``level``: the least that is written; none to write nothing."""
        self._logger = logging.Logger("privkd", logging.CRITICAL if level is None else level.upper())
        handler = logging.NullHandler() if level is None else logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Lines())
        self._handler = handler
        self._logger.addHandler(handler)

    def adopt_libraries(self) -> None:
        """Write what libraries log as lines too, from warnings on, in place of their own text on stderr."""
        logging.getLogger().addHandler(self._handler)

    def write(self, level: int, event: str, **facts: object) -> None:
        """One event; a fact that is ``None`` is left out."""
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, extra={"facts": facts})

    def info(self, event: str, **facts: object) -> None:
        """An event that is as it should be."""
        self.write(logging.INFO, event, **facts)

    def warning(self, event: str, **facts: object) -> None:
        """An event that somebody should look at."""
        self.write(logging.WARNING, event, **facts)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        head = {"time": f"{moment}.{int(record.msecs):03}Z", "level": record.levelname.lower()}
        facts = vars(record).get("facts")
        if facts is None:
            # Of a library; its text could quote what must not be written down.
            kind = record.exc_info[0] if record.exc_info else None
            facts = {"logger": record.name, "error": kind and kind.__name__}
            return json.dumps(head | {"event": "library"} | facts)
        return json.dumps(head | {"event": record.msg} | {k: v for k, v in facts.items() if v is not None})


@dataclass
class Call:
    """One call as it goes."""

    name: str
    caller: str | None
    size: int | None = None
    code: str = "OK"
    reason: str | None = None


class Observed:
    """The metrics and the log of one service."""

    def __init__(self, log: Log, state: Callable[[], Mapping[str, Any]]) -> None:
        """``state``: what `Service.state` says, at any time and from any thread."""
        self.log = log
        self.state = state
        self.registry = registry = CollectorRegistry()
        self._calls = Counter("privkd_calls", "Calls answered", ["call", "code"], registry=registry)
        self._seconds = Histogram(
            "privkd_call_seconds", "From a call to its answer", ["call"], buckets=_SECONDS, registry=registry
        )
        self._bytes = Counter("privkd_upload_bytes", "Bytes of uploads taken", registry=registry)
        self._refused = Counter("privkd_refusals", "Calls refused, by reason", ["reason"], registry=registry)
        ProcessCollector(registry=registry)
        registry.register(self)

    def ended(self, call: Call, seconds: float, status: int | None = None) -> None:
        """Count a call, and write its line; ``status``: of its `RefusalError`."""
        self._calls.labels(call.name, call.code).inc()
        self._seconds.labels(call.name).observe(seconds)
        if call.code == "OK" and call.size is not None:
            self._bytes.inc(call.size)
        elif call.code == "RESOURCE_EXHAUSTED":
            self._refused.labels("too many calls").inc()
        elif status is not None:
            self._refused.labels(_REASONS.get(status, "other")).inc()
        # A line for each of many thousand uploads that went well is for those who ask for it.
        usual = logging.DEBUG if call.name in ("Upload", "Status", "About") else logging.INFO
        self.log.write(
            usual if call.code == "OK" else logging.WARNING,
            "call",
            caller=call.caller,
            call=call.name,
            code=call.code,
            ms=round(1e3 * seconds, 1),
            bytes=call.size,
            reason=call.reason,
        )

    def collect(self) -> Iterator[Metric]:
        """For Prometheus: what is counted when it asks."""
        state = self.state()
        rounds = GaugeMetricFamily("privkd_rounds", "Rounds held, by how far they are", labels=["state"])
        for name, count in state["rounds"].items():
            rounds.add_metric([name], count)
        yield rounds
        yield GaugeMetricFamily("privkd_uploads", "Uploads of rounds not released", value=state["uploads"])
        yield GaugeMetricFamily(
            "privkd_worker_sessions", "Workers started, over restarts too", value=state["worker"]["sessions"]
        )
        yield GaugeMetricFamily("privkd_worker_up", "Whether a worker runs", value=state["worker"]["running"])
        if state["certificate_seconds"] is not None:
            yield GaugeMetricFamily(
                "privkd_certificate_seconds", "Until the certificate ends", value=state["certificate_seconds"]
            )


class StatusListener:
    """The addresses of the module, served by a thread until ``stop``."""

    def __init__(self, status: StatusConfig, observed: Observed) -> None:
        """Listen. Raises `ConfigError` where the address does not serve."""
        host, port = status.address
        try:
            self._server = make_server(host, port, _App(observed), _Server, _Quiet)
        except OSError as error:
            raise ConfigError(f"status.listen={status.listen!r}: {error.strerror or error}") from None
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


class _App:
    def __init__(self, observed: Observed) -> None:
        self._observed = observed
        self._metrics = make_wsgi_app(observed.registry)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return self._metrics(environ, start_response)
        state = self._observed.state()
        unready = state["unready"]
        status, body = {
            "/healthz": ("200 OK", "ok"),
            "/readyz": ("503 Service Unavailable", unready) if unready else ("200 OK", "ready"),
            "/status": ("200 OK", json.dumps(state)),
        }.get(path, ("404 Not Found", "/healthz, /readyz, /status or /metrics"))
        kind = "application/json" if path == "/status" else "text/plain; charset=utf-8"
        start_response(status, [("Content-Type", kind)])
        return [body.encode() + b"\n"]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False


class _Quiet(WSGIRequestHandler):
    timeout = 10

    def log_message(self, format: str, *args: Any) -> None:
        """The log is of the service's own calls."""
