"""Questions over NVFlare: one job for each batch, and `courier` as a program in the foreground.

A job's status is never asked for: what counts is the answers that arrived. Each batch is a job of its own, as
a client that restarts does not rejoin one that runs; so whoever was away is in the next.
"""

import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from privkd.deployment.desk import Desk
from privkd.deployment.kits import COURIER_CLASS, ROUNDS_CLASS, enforce, nvflare
from privkd.errors import ConfigError, RunError
from privkd.privacy.events import PartyId

_LOG = logging.getLogger(__name__)
_QUIET = 60.0
"""Jobs that are quiet for so long were lost with their server, or found no device: there is another."""
_GRACE = 10.0
"""The devices of a job have so long to come for their questions: one that was away gets another job."""
_REMOVAL = 30.0
_PAUSE = 1.0
_TASK = "round"
_JOB = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_ROLES = (("client", "PRIVKD_DEVICE_SOCKET", "devices"), ("server", "PRIVKD_CLOUD_SOCKET", "cloud"))
"""Kits, the variable that names each one's socket, and the organisation in its certificate."""


class FlareCarrier:
    """Devices behind NVFlare's clients; see `privkd.deployment.carriers.Carrier`."""

    def __init__(self, socket: Path, operator: Path) -> None:
        """``socket`` is where the server's jobs come to, ``operator`` the kit that may submit them.

        Raises:
            ConfigError: there is no such kit, or nobody can listen there.
        """
        self._startup = operator.absolute() / "startup"
        if not (self._startup / "fed_admin.json").is_file():
            raise ConfigError(f"{operator} is no operator's kit: `privkd courier init` makes one")
        self._ended: list[str] = []
        try:
            self._desk = Desk(socket)
        except OSError as error:
            raise ConfigError(f"{socket}: {error.strerror or error}") from None

    def ask(self, questions: Mapping[PartyId, bytes], seconds: float) -> Mapping[PartyId, bytes]:
        """See `Carrier.ask`."""
        until = time.monotonic() + seconds
        self._desk.lay_out(questions)
        jobs: list[str] = []
        ticket = ""
        while not self._desk.wait(min(_PAUSE, until - time.monotonic())) and time.monotonic() < until:
            lost = self._desk.quiet() > _QUIET
            wanted = self._desk.missing() if lost or not ticket else self._left_out(ticket)
            if not wanted:
                continue
            if lost:
                self._remove(jobs, running=True)
                jobs = []
            ticket = self._desk.ticket()
            jobs += self._submit(ticket, wanted, until)
            # Those of the ask before have ended by now, and the devices are at work.
            self._remove(self._ended)
            self._ended = []
        answers = self._desk.clear()
        if len(answers) < len(questions):
            self._remove(jobs, running=True)
        else:
            self._ended += jobs
        return answers

    def _left_out(self, ticket: str) -> list[PartyId]:
        """Whom the last job began without; nobody, while it may still find them."""
        shown = self._desk.shown(ticket)
        return self._desk.uncollected() if shown is not None and shown > _GRACE else []

    def close(self) -> None:
        """See `Carrier.close`."""
        self._desk.close()

    def _submit(self, ticket: str, devices: Iterable[PartyId], until: float) -> list[str]:
        """The job's name, if the server took it: one that is away is tried again while there is time."""
        with tempfile.TemporaryDirectory() as folder:
            _write_job(Path(folder), ticket, devices)
            # A submission whose answer was lost is found again by its token, and makes no second job.
            words = ("-j", folder, "--submit-token", ticket, *self._kit)
            while (left := until - time.monotonic()) > 0:
                try:
                    return [str(nvflare("job", "submit", *words, seconds=left)["job_id"])]
                except RunError as error:
                    _LOG.warning("no job could be submitted: %s", error)
                    if self._desk.wait(min(_PAUSE, left)):
                        break
        return []

    def _remove(self, jobs: Iterable[str], *, running: bool = False) -> None:
        """Leave nothing of them at the server."""
        for job in jobs:
            for verb in ("abort", "delete") if running else ("delete",):
                with suppress(RunError):
                    nvflare("job", verb, "--force", job, *self._kit, seconds=_REMOVAL)

    @property
    def _kit(self) -> tuple[str, str]:
        return "--startup-kit", str(self._startup)


def _write_job(folder: Path, ticket: str, devices: Iterable[PartyId]) -> None:
    executor = {"tasks": [_TASK], "executor": {"path": COURIER_CLASS, "args": {}}}
    workflow = {"id": "rounds", "path": ROUNDS_CLASS, "args": {"ticket": ticket}}
    common: dict[str, Any] = {"format_version": 2, "task_data_filters": [], "task_result_filters": []}
    config = folder / "app" / "config"
    config.mkdir(parents=True)
    sites = ["server", *devices]
    meta = {"name": "round", "min_clients": 1, "deploy_map": {"app": sites}, "resource_spec": {}}
    for path, tree in (
        (folder / "meta.json", meta),
        (config / "config_fed_client.json", common | {"executors": [executor], "components": []}),
        (config / "config_fed_server.json", common | {"workflows": [workflow], "components": []}),
    ):
        path.write_text(json.dumps(tree))


def courier_command(kit: Path, socket: Path) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of the program that a kit is for: NVFlare's client, or its server.

    Raises:
        ConfigError: it is neither's kit.
    """
    kit = kit.absolute()
    for role, variable, org in _ROLES:
        facts = kit / "startup" / f"fed_{role}.json"
        if facts.is_file():
            words = ["-m", f"nvflare.private.fed.app.{role}.{role}_train", "-m", str(kit), "-s", facts.name]
            own = ["secure_train=true", f"org={org}", "config_folder=config"]
            if role == "client":
                own.append(f"uid={json.loads(facts.read_text())['client']['fqsn']}")
            return [sys.executable, "-u", *words, "--set", *own], {variable: str(socket.absolute())}
    raise ConfigError(f"{kit} is no courier's kit: `privkd courier init` and `package` make them")


def run_courier(kit: Path, socket: Path) -> NoReturn:
    """Become the program that a kit is for, in the foreground, until it is told to end.

    Raises:
        ConfigError: it is no kit, or NVFlare is not installed.
        RunError: the kit is damaged, or another user's.
    """
    command, own = courier_command(kit, socket)
    if find_spec("nvflare") is None:
        raise ConfigError("the courier is NVFlare, which is not installed: pip install 'privkd[nvflare]'")
    # It may have been moved, edited, or written by an older version.
    enforce(kit)
    # NVFlare leaves the folder of each job that it ran.
    for old in kit.iterdir():
        if _JOB.fullmatch(old.name):
            shutil.rmtree(old, ignore_errors=True)
    # No module of the folder that this was started in may stand in for an installed one.
    os.execve(sys.executable, command, os.environ | own | {"PYTHONSAFEPATH": "1"})
