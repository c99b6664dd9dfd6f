"""``privkd`` as it is typed, in processes that can be struck at any durable step.

One server process loads the libraries once and forks a process for each command. In it, every call that makes
something durable, every release, every envelope that a device brings to an aggregator and every answer that
it gives is a numbered point of a trace; a strike hits one of them.
"""

import errno
import hashlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

Kind = Literal["none", "before", "within", "after", "pause", "full", "read-only"]
"""``before``, ``within`` and ``after`` are SIGKILL around the call (``within`` cuts a write in half), and
``pause`` is SIGSTOP before it; from the call on, the disk is ``full``, or ``read-only``."""

KEPT = frozenset({"run", "runs", "state"})
"""Names of the folders in which points are counted: a run's, a cloud's runs, a device's state."""

_ERRORS = {"full": errno.ENOSPC, "read-only": errno.EROFS}
_TEMPORARY = re.compile(r"^\.(.+)\.[^.]+\.part$")


@dataclass(frozen=True)
class Strike:
    """What hits a command, and at which of its points."""

    kind: Kind = "none"
    at: int = -1


NOTHING = Strike()
"""Hits at no point."""


@dataclass(frozen=True)
class Answer:
    """How a command ended: its exit code (negative for a signal), its output, and the points it passed."""

    code: int
    out: str
    err: str
    points: tuple[str, ...]

    @property
    def releases(self) -> dict[str, str]:
        """What left the channel, by round: digests of the answers that came in and of those that went out."""
        return dict(point.split()[1:] for point in self.points if point.startswith("released"))

    @property
    def begun(self) -> list[int]:
        """Rounds whose release was begun."""
        return [int(point.split()[1]) for point in self.points if point.startswith("release ")]


class Commands:
    """Runs commands, one at a time or side by side. Use as a context manager."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._count = 0
        paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)

    def run(self, *arguments: object, strike: Strike = NOTHING, cwd: Path | None = None) -> Answer:
        """Run a command to its end."""
        return self.wait(self.start(*arguments, strike=strike, cwd=cwd))

    def start(self, *arguments: object, strike: Strike = NOTHING, cwd: Path | None = None) -> "Started":
        """Start a command, and go on."""
        self._count += 1
        place = self._scratch / f"command-{self._count}"
        place.mkdir(parents=True)
        order = {
            "arguments": [str(argument) for argument in arguments],
            "strike": asdict(strike),
            "cwd": str(cwd or place),
            "place": str(place),
        }
        return Started(int(self._ask(order)), place)

    def wait(self, started: "Started") -> Answer:
        """How a command ended."""
        code = int(self._ask({"wait": started.process}))
        texts = ((started.place / name).read_text() for name in ("out", "err", "trace"))
        out, err, trace = texts
        return Answer(code, out, err, tuple(trace.splitlines()))

    def _ask(self, order: dict[str, Any]) -> str:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return self._server.stdout.readline()


@dataclass(frozen=True)
class Started:
    """A command under way."""

    process: int
    place: Path

    @property
    def passed(self) -> int:
        """How many points it has come to."""
        trace = self.place / "trace"
        return len(trace.read_text().splitlines()) if trace.exists() else 0

    @property
    def ended(self) -> bool:
        """Whether it has; its server reaps it in `Commands.wait`."""
        try:
            return Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    @property
    def said(self) -> str:
        """What it wrote to stderr so far."""
        path = self.place / "err"
        return path.read_text() if path.exists() else ""

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.process, number)

    def go_on(self) -> None:
        """After a pause."""
        self.signal(signal.SIGCONT)


class _Tracer:
    """Counts the points of this process, and strikes."""

    def __init__(self, strike: Strike, trace: int) -> None:
        self._strike = strike
        self._trace = trace
        self._count = 0
        self._write = os.write

    def note(self, line: str) -> None:
        self._write(self._trace, f"{line}\n".encode())

    def wrap(self, name: str, call: Callable[..., Any], where: Callable[..., str]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            place = where(*arguments)
            if not place:
                return call(*arguments, **named)
            number, self._count = self._count, self._count + 1
            self.note(f"{name} {place}")
            self._before(name, number, arguments)
            try:
                return call(*arguments, **named)
            finally:
                if self._strike == Strike("after", number):
                    self._kill()

        return wrapped

    def _before(self, name: str, number: int, arguments: Sequence[Any]) -> None:
        strike = self._strike
        harmless = name in ("release", "upload", "answer") or (strike.kind == "full" and name == "unlink")
        if strike.kind in _ERRORS and number >= strike.at and not harmless:
            code = _ERRORS[strike.kind]
            raise OSError(code, os.strerror(code))
        if number != strike.at:
            return
        if strike.kind == "before":
            self._kill()
        if strike.kind == "within":
            if name == "write":
                self._write(arguments[0], arguments[1][: len(arguments[1]) // 2])
            if name == "answer":
                arguments[0].sendall(len(arguments[1]).to_bytes(8, "little") + arguments[1][:100])
            self._kill()
        if strike.kind == "pause":
            os.kill(os.getpid(), signal.SIGSTOP)

    @staticmethod
    def _kill() -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("a killed process went on")


def _named(path: object) -> str:
    """A file of such a folder, as named in it, without what is random in the name of a temporary one."""
    found = Path(os.fsdecode(path)).absolute()  # type: ignore[arg-type]
    start = next((number for number, part in enumerate(found.parts) if part in KEPT), None)
    if start is None:
        return ""
    match = _TEMPORARY.match(found.name)
    inside = found.parts[start + 1 : -1]
    return "/".join([*inside, match.group(1) if match else found.name])


def _descriptor(descriptor: int, *_: object) -> str:
    return _named(Path(f"/proc/self/fd/{descriptor}").readlink())


def _arm(strike: Strike, trace: int) -> None:
    from privkd.channels.channel import NoisedChannel, PlainChannel
    from privkd.channels.secure import SecureChannel

    tracer = _Tracer(strike, trace)
    for name in ("fsync", "write"):
        setattr(os, name, tracer.wrap(name, getattr(os, name), _descriptor))
    for name in ("link", "replace"):
        setattr(os, name, tracer.wrap(name, getattr(os, name), lambda _, target, **__: _named(target)))
    os.unlink = tracer.wrap("unlink", os.unlink, lambda path, **__: _named(path))
    for kind in (PlainChannel, NoisedChannel, SecureChannel):
        _arm_release(tracer, kind)
    _arm_device(tracer)


def _arm_device(tracer: _Tracer) -> None:
    """What leaves a device: an envelope for an aggregator, and its answer, cut in half by ``within``."""
    from privkd.deployment import sockets
    from privkd.secure.client import ServiceLink

    ServiceLink.upload = tracer.wrap(  # type: ignore[method-assign]
        "upload", ServiceLink.upload, lambda link, *_: link.url
    )
    sockets.send = tracer.wrap("answer", sockets.send, lambda link, _: Path(link.getsockname()).name)


def _arm_release(tracer: _Tracer, kind: Any) -> None:
    inner = kind.carry

    def noted(channel: Any, question: Any, answers: Any, devices: Any) -> Any:
        found = inner(channel, question, answers, devices)
        shown = hashlib.sha256(answers.numpy().tobytes() + found.answers.numpy().tobytes()).hexdigest()
        tracer.note(f"released {question.round} {shown}")
        return found

    def outer(channel: Any, question: Any, answers: Any, devices: Any) -> Any:
        if devices[0].startswith(("replay-", "audit-")):
            # An audit's made-up devices: no release of the run.
            return inner(channel, question, answers, devices)
        point = tracer.wrap("release", lambda _: noted(channel, question, answers, devices), str)
        return point(question.round)

    kind.carry = outer


def _child(order: dict[str, Any]) -> NoReturn:
    place, code = Path(order["place"]), 1
    for descriptor, name in ((1, "out"), (2, "err"), (9, "trace")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(order["cwd"])
    try:
        from cli import app

        _arm(Strike(**order["strike"]), 9)
        app(order["arguments"])
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _warm_up() -> None:
    """Load all that a command loads, and what torch prepares at its first use."""
    from running import play

    for name in (
        "audits.mechanisms.closing",
        "audits.membership_audit",
        "audits.tables",
        "privkd.terminal",
        "privkd.prepared",
        "privkd.deployment.device_service",
        "privkd.deployment.own_records",
        "privkd.deployment.cloud",
        "opacus",
    ):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        play(Path(folder) / "warm", "rounds=1")


def _serve() -> None:
    _warm_up()
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                _child(order)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
