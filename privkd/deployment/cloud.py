"""READ FIRST: the program of a real cloud. It holds public data and what was released to it, and no device.

    init -> enrol -> publish -> (owners agree) -> run, stopped and gone on with at will -> deliver -> report

A run's folder is that of any run (`privkd.runs.folder`), and its rounds are `privkd.federation`'s; what is
other is the fleet: `privkd.deployment.remote`. Killed at any moment, ``run`` asks the interrupted round
again, under the same terms, and devices answer it with the same bytes.
"""

import fcntl
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

from privkd.channels.registry import known
from privkd.config import Config
from privkd.deployment.carriers import Carrier
from privkd.deployment.cloud_settings import TEMPLATE, CloudSettings, Roster
from privkd.deployment.kits import check_name
from privkd.deployment.published import PLAN_FILE, PublishedPlan, public_settings
from privkd.deployment.remote import Patience, RemoteFleet
from privkd.errors import ConfigError, InterruptError, RunError
from privkd.federation import advance
from privkd.plugins import load_plugins
from privkd.prepared import Prepared, prepare, reopen
from privkd.privacy.events import PartyId
from privkd.progress import Progress
from privkd.records import plain
from privkd.run import Run, train_in
from privkd.runs.checkpoint import State
from privkd.runs.elsewhere import Elsewhere
from privkd.runs.folder import RunFolder
from privkd.runs.result import Result
from privkd.secure.certificates import load_request
from privkd.secure.enrolment import approve_shown

_STOP = "stop"
"""File in a run's folder that asks the cloud to end after the round at hand."""

Carry: TypeAlias = Callable[[CloudSettings, Roster], Carrier]
"""Opens what carries questions: `CloudSettings.carrier`, or a test's own."""


@dataclass(frozen=True)
class Approval:
    """The authority's side of an enrolment, where its folder is at hand.

    Attributes:
        request: a device's, ``NAME.csr``.
        authority: the folder.
        fingerprint: as the device told it by another way; not compared unless given.
        ask: is shown who asks for what, and says whether it shall be.
    """

    request: Path
    authority: Path
    fingerprint: str | None = None
    ask: Callable[[str], bool] | None = None

    def certificate(self, name: PartyId) -> Path:
        """Where the authority keeps a device's newest one."""
        return self.authority / "issued" / f"{name}.pem"

    def given_to(self, name: PartyId) -> str:
        """Approve the request, if it is of that name; what to hand back, in words.

        Raises:
            ConfigError: it is another's, or the authority refuses.
        """
        asked = load_request(self.request).name
        if asked != name:
            raise ConfigError(f"{self.request} is the request of {asked}, not of {name}")
        # Anew too, for the same key alone: an enrolment that was cut short is repeated.
        return approve_shown(
            self.request, self.authority, renew=True, expected=self.fingerprint, ask=self.ask
        )


def init(path: Path) -> str:
    """Write a commented ``cloud.toml``; what to do next, in words.

    Raises:
        ConfigError: there is one already, or it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x") as file:
            file.write(TEMPLATE)
    except FileExistsError:
        raise ConfigError(f"{path} exists already, and is not overwritten") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    return f"{path}: say there what to run; then `privkd cloud enrol NAME` for each device, and publish"


def enrol(path: Path, name: str, certificate: Path | None = None, approval: Approval | None = None) -> str:
    """Put a device on the roster, or replace its ``certificate`` there; what was done, in words.

    Args:
        path: of ``cloud.toml``.
        name: the device's.
        certificate: a copy of its certificate.
        approval: give it its certificate first, or one anew for the same key; recorded for ``certificate``.

    Raises:
        ConfigError: the name is none for a device or for the engine, or its request is another's or refused.
        RunError: a plan is published whose roster lacks it.
    """
    settings = CloudSettings.read(path)
    roster, standing = Roster.at(settings.roster), published_in(settings)
    if standing is not None and name not in standing.roster and not _finished(settings, standing):
        raise RunError(
            f"{settings.published} is published for a roster without {name}, and the roster is part of "
            f"the plan: finish run {standing.digest[:12]}, or remove that folder and publish anew"
        )
    if settings.engine == "nvflare":
        check_name(name)
    roster, said = roster.joined(name, certificate), ""
    if approval is not None:
        said = approval.given_to(name) + "\n"
        roster = roster.joined(name, approval.certificate(name))
    _write(settings.roster, roster.model_dump_json(indent=2) + "\n")
    number = roster.names.index(name)
    return f"{said}{name} is device {number} of {len(roster.names)}, counted from 0, on {settings.roster}"


def publish(path: Path) -> str:
    """Write what devices are given; the run's name and what it asks of owners, in words.

    Raises:
        InputError: bad settings, data or models.
        BudgetError: no noise reaches the budget.
        RunError: the plan that is published was begun with, and is not finished; or it cannot be written.
    """
    settings = CloudSettings.read(path)
    config = settings.config(Roster.at(settings.roster))
    prepared = prepare(config, public=True)
    plan, standing = _plan_of(settings, prepared), published_in(settings)
    plan.checked(len(prepared.scenario.proxy))
    if standing is not None and standing.digest != plan.digest and _begun(settings, standing):
        raise RunError(
            f"{settings.published}: run {standing.digest[:12]} was begun and is not finished, and devices "
            "agreed to it: finish it, or name another folder with `published`"
        )
    try:
        settings.published.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{settings.published}: {error.strerror or error}") from None
    plan.write(settings.published, prepared.scenario.proxy)
    return (
        f"run {plan.digest}\n"
        f"{len(plan.roster)} devices, {plan.config.rounds} rounds; "
        f"epsilon {plan.epsilon_record:.4g} per record, {plan.epsilon_device:.4g} per device, whole run\n"
        f"give {settings.published} to each device's owner, who agrees to it by that name"
    )


def run(
    path: Path,
    progress: Progress,
    *,
    rounds: int | None = None,
    announce: Callable[[Path, Prepared], None] | None = None,
    carry: Carry = CloudSettings.carrier,
) -> Run | None:
    """Play all rounds that are left, or at most ``rounds``; the finished run, or ``None`` before its end.

    After the last one each device is brought the last teacher, or those who lack it; nobody must take it.

    Args:
        path: of ``cloud.toml``.
        progress: told of every stage.
        rounds: at most so many, then stop.
        announce: told where the run goes.
        carry: opens what carries questions.

    Raises:
        InputError: bad settings, or other ones, data or code than those that were published.
        ChannelError: too few devices answered, or a party failed; nothing was released in that round.
        InterruptError: told to stop by a signal.
    """
    if rounds is not None and rounds < 1:
        raise ConfigError(f"rounds={rounds}: expected 1 or more")
    settings = CloudSettings.read(path)
    roster = Roster.at(settings.roster)
    plan = _still_published(settings, settings.config(roster))
    with _interruptible(path), _run_folder(settings, plan) as (folder, prepared, resumed):
        if announce is not None:
            announce(folder.path, prepared)
        with closing(carry(settings, roster)) as carrier:
            muster = _muster(settings, carrier)
            enough = _until(folder, rounds)
            state = advance(prepared, folder, progress, muster, resumed=resumed, enough=enough)
            if state.round < prepared.plan.rounds:
                return None
            result = _result(folder, prepared, progress)
            fleet, student = muster(prepared, folder, progress), prepared.config.student
            if student.delivers and fleet.lacking:
                fleet.deliver(state.teacher, prepared.last_students(state), student.own_weight)
        return Run(folder.path, folder.config, result)


def _result(folder: RunFolder, prepared: Prepared, progress: Progress) -> Result:
    """That of the run, all of whose rounds are played."""
    written = folder.path / "result.json"
    if written.exists():
        return Result.read(written)
    return train_in(folder.config, folder, progress, resumed=True, prepared=prepared)


def _until(folder: RunFolder, rounds: int | None) -> Callable[[State], bool]:
    """Whether it is enough: ``rounds`` more were played, or somebody asked to stop since now."""
    asked, first = folder.path / _STOP, _rounds_in(folder)
    asked.unlink(missing_ok=True)

    def enough(state: State) -> bool:
        return asked.exists() or (rounds is not None and state.round - first >= rounds)

    return enough


def stop(path: Path) -> str:
    """Have the running cloud end after the round at hand; what happens, in words.

    Raises:
        RunError: none is running.
    """
    settings = CloudSettings.read(path)
    standing = published_in(settings)
    folder = None if standing is None else run_folder(settings, standing)
    if folder is None or not is_running(folder):
        raise RunError(f"{path}: no cloud is running")
    _write(folder / _STOP, "")
    return "the cloud ends after the round at hand; `privkd cloud run` goes on"


def published_in(settings: CloudSettings) -> PublishedPlan | None:
    """The plan that is published; ``None`` before there is one. Raises as `PublishedPlan.load`."""
    if not (settings.published / PLAN_FILE).exists():
        return None
    return PublishedPlan.load(settings.published)[0]


def run_folder(settings: CloudSettings, plan: PublishedPlan) -> Path:
    """Where the run of ``plan`` is kept."""
    return settings.runs / plan.digest[:12]


def is_running(folder: Path) -> bool:
    """Whether a process holds the run in ``folder``."""
    try:
        with (folder / ".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _begun(settings: CloudSettings, plan: PublishedPlan) -> bool:
    """Whether the run of ``plan`` was begun and is not finished."""
    folder = run_folder(settings, plan)
    return (folder / "journal.jsonl").exists() and not _finished(settings, plan)


def _finished(settings: CloudSettings, plan: PublishedPlan) -> bool:
    return (run_folder(settings, plan) / "result.json").exists()


def _plan_of(settings: CloudSettings, prepared: Prepared) -> PublishedPlan:
    names = Roster.at(settings.roster).names
    return PublishedPlan.of(prepared.config, prepared.scenario, prepared.plan, names, settings.answer_seconds)


def _still_published(settings: CloudSettings, config: Config) -> PublishedPlan:
    """The published plan, if it is still that of the settings."""
    plan = published_in(settings)
    if plan is None:
        raise RunError(f"{settings.published}: nothing is published yet; `privkd cloud publish` does it")
    now = (
        plain(public_settings(config, plan.inputs)),
        Roster.at(settings.roster).names,
        settings.answer_seconds,
    )
    if now != (plan.tree()["settings"], plan.roster, plan.answer_seconds):
        raise RunError(
            f"{settings.published}: the settings or the roster changed since the plan was published; bring "
            "them back, or publish anew"
        )
    return plan


@contextmanager
def _run_folder(settings: CloudSettings, plan: PublishedPlan) -> Iterator[tuple[RunFolder, Prepared, bool]]:
    """The folder of the run, the run, and whether it was begun before."""
    path, config = run_folder(settings, plan), settings.config(Roster.at(settings.roster))
    resumed = (path / "journal.jsonl").exists()
    load_plugins(config.plugins)
    with RunFolder.resume(path) if resumed else RunFolder.create(path, config) as folder:
        where = Elsewhere(
            run=plan.digest,
            roster=plan.roster,
            engine=settings.engine,
            aggregators=config.channel.aggregator_urls if known(config.channel.kind).has_parties else (),
        )
        facts = where.tree()
        folder.note(facts.pop("step"), **facts)
        prepared = reopen(folder)
        if _plan_of(settings, prepared).digest != plan.digest:
            raise RunError(
                f"{settings.published}: the data changed since the plan was published, or they are read by "
                "another version: bring them back, or publish anew"
            )
        yield folder, prepared, resumed


def _muster(
    settings: CloudSettings, carrier: Carrier
) -> Callable[[Prepared, RunFolder, Progress], RemoteFleet]:
    patience = Patience(
        settings.patience_seconds,
        settings.again_seconds,
        min(settings.answer_seconds, settings.again_seconds),
    )

    def muster(prepared: Prepared, folder: RunFolder, progress: Progress) -> RemoteFleet:
        where, channel = prepared.elsewhere, prepared.config.channel
        assert where is not None
        everybody = len(where.roster) if known(channel.kind).has_parties else 1
        return RemoteFleet(
            where,
            carrier,
            patience,
            prepared.plan.rounds,
            channel.minimum_devices or everybody,
            folder.journal,
            progress,
        )

    return muster


def _rounds_in(folder: RunFolder) -> int:
    """How many rounds were committed."""
    return max(0, sum(row.get("step") == "round" for row in folder.journal) - 1)


@contextmanager
def _interruptible(path: Path) -> Iterator[None]:
    """Turn an interruption into one line; SIGTERM is one too."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # Only the main thread may say what a signal does.
    mine = threading.current_thread() is threading.main_thread()
    before: Any = signal.signal(signal.SIGTERM, interrupt) if mine else None
    try:
        yield
    except KeyboardInterrupt:
        words = "what was committed stands, and the round at hand is asked again"
        raise InterruptError(f"stopped: {words} by `privkd cloud run --config {path}`") from None
    finally:
        if mine:
            signal.signal(signal.SIGTERM, before)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f".{path.name}.part")
        half.write_text(text)
        half.replace(path)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from None
