"""What a device keeps for good: root key, ledger over all runs and clouds, and what it answered to whom.

The folder is the device's user's alone. ``agreements.jsonl`` is written by the owner's command beside a
running device; all else by the device, which holds the folder. Nothing of it but kept uploads ever leaves.
"""

import hashlib
import hmac
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import Field
from torch import Tensor

from privkd.deployment.owner import Owner
from privkd.deployment.wire import Reason
from privkd.errors import RunError
from privkd.folder import HeldFolder
from privkd.journal import Head, Journal
from privkd.privacy.ledger import Ledger
from privkd.privacy.noise import NoiseRoot
from privkd.records import Count, FileRecord, Real, Record

LEDGER_FILE, STATUS_FILE, AGREEMENTS_FILE = "ledger.jsonl", "status.json", "agreements.jsonl"
Step = TypeVar("Step", bound="_Step")


class _Step(Record):
    """A line of the device's journal about one round of a run."""

    run: str
    round: Count


class Asked(_Step):
    """A question was found good: its ``substance``, which no other question of the round may change, and the
    Unix time at which it first ``arrived``."""

    step: Literal["asked"] = "asked"
    substance: str
    arrived: Real


class Trained(_Step):
    """Its student and its block of answers lie in a file of digest ``file``, paid for by ``ledger``."""

    step: Literal["trained"] = "trained"
    file: str
    ledger: Head


class Answered(_Step):
    """What may leave for one ``attempt`` under ``terms`` (a digest) lies in a file of digest ``file``.

    ``witness`` is what the cloud is told of the ledger.
    """

    step: Literal["answered"] = "answered"
    attempt: Count
    terms: str
    file: str
    witness: str
    ledger: Head


class Delivered(_Step):
    """The student that the device is left with lies in a file of digest ``file``; its round is one past the
    last."""

    step: Literal["delivered"] = "delivered"
    file: str


class Seen(FileRecord):
    """``status.json``: what came lately.

    Attributes:
        last_question: Unix time.
        run: of that question, if it could be read.
        round: likewise.
        refusals: how many there were for each reason, over all starts.
        words: why that question was refused; none where it was answered.
    """

    last_question: Real | None = None
    run: str | None = None
    round: Count | None = None
    refusals: Mapping[Reason, Count] = Field(default_factory=dict)
    words: str | None = None


class DeviceState(HeldFolder):
    """The state of one device, held by its process; see `open`."""

    subject = "this device"
    when_kept = "what was there is kept, and the question may be asked again"
    root: NoiseRoot
    ledger: Ledger

    @classmethod
    def open(cls, owner: Owner) -> Self:
        """Begin the state of the owner's device, or go on with it.

        Raises:
            RunError: it is in use, damaged or restored in part, another device's, open to other users, or its
                key is gone.
            ConfigError: the owner's budget is not the ledger's.
        """
        private_folder(owner.state)
        state = cls(owner.state)
        with state._closed_on_error():
            state._begin(owner)
        return state

    def _begin(self, owner: Owner) -> None:
        ledger = self.path / LEDGER_FILE
        if not len(self.journal) and ledger.exists():
            raise RunError(
                f"{self.path} has a ledger and no journal: restore it, {self.subject} cannot go on"
            )
        name = self.note("device", name=owner.name)["name"]
        if name != owner.name:
            raise RunError(
                f"{self.path} is the state of {name}, not of {owner.name}: a device's name is for good"
            )
        self.root = NoiseRoot(self.secret("root.key", NoiseRoot.from_system().key))
        heads = [record["ledger"] for record in self.journal if "ledger" in record]
        last = Head(**heads[-1]) if heads else None
        if ledger.exists() and (found := Ledger.load(ledger).budgets) != owner.budget.budgets:
            held = ", ".join(f"{each.unit} {each.epsilon:g} at {each.delta:g}" for each in found)
            raise RunError(
                f"the budget for good is {held}, and [budget] says otherwise: put it back, or change it for "
                "a reason with `privkd device budget`"
            )
        self.ledger = Ledger.open(ledger, owner.budget.budgets, must_exist=bool(heads), at_least=last)

    @property
    def paid(self) -> Head:
        """How far the ledger has come."""
        head = self.ledger.head
        assert head is not None
        return head

    def last(self, kind: type[Step], run: str, **wanted: int) -> Step | None:
        """The last step of this kind in the run, with those values."""
        sought = {"step": kind.model_fields["step"].default, "run": run, **wanted}
        for record in reversed(tuple(self.journal)):
            if all(record.get(name) == value for name, value in sought.items()):
                return kind.model_validate(record)
        return None

    def add(self, step: _Step) -> None:
        """Journal a step; it is durable when this returns. Raises `RunError`."""
        self.journal.append(step.tree())

    def kept_round(self, step: Trained | Delivered) -> dict[str, Tensor]:
        """Student and block of a round, or the student that was delivered. Raises `RunError` where they are
        gone or changed."""
        return self.load(round_file(step.run, step.round), step.file)

    def kept_upload(self, answered: Answered) -> bytes:
        """What left, or was about to. Raises `RunError` where it is gone or changed."""
        path = self.path / upload_file(answered.run, answered.round, answered.attempt)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RunError(f"{path}: {error.strerror or error}; this attempt is not answered again") from None
        if hashlib.sha256(data).hexdigest() != answered.file:
            raise RunError(f"{path} is damaged or was changed: this attempt is not answered again")
        return data

    def forget_before(self, run: str, round: int, attempt: int) -> None:
        """Remove uploads and students of the run that an answer has taken the place of."""
        folder = run_folder(self.path, run)
        kept = {Path(round_file(run, round)).name, Path(upload_file(run, round, attempt)).name}
        for path in folder.glob("round-*"):
            if path.name not in kept:
                path.unlink()

    def run_root(self, run: str) -> NoiseRoot:
        """Where all that this device draws in the run comes from."""
        return NoiseRoot(self.root.subkey("run", run))

    def witness(self, run: str) -> str:
        """What the run's cloud is told of the ledger as it is: a keyed digest, so that it learns neither how
        many charges there are nor what other runs added."""
        return _keyed(self._witness_key(run), self.ledger.digests[-1])

    def bears_out(self, run: str, witness: str) -> bool:
        """Whether the ledger continues the one of which the run's cloud was told ``witness``."""
        key = self._witness_key(run)
        return any(hmac.compare_digest(_keyed(key, each), witness) for each in self.ledger.digests)

    def _witness_key(self, run: str) -> bytes:
        return self.root.subkey("witness", run)


def _keyed(key: bytes, digest: str) -> str:
    return hmac.digest(key, digest.encode(), "sha256").hex()


def run_folder(state: Path, run: str) -> Path:
    """Where the plan of a run, its student and its kept upload lie."""
    return state / "runs" / run


def round_file(run: str, round: int) -> str:
    """Student and block of a round, below the state's folder; the delivered student is one past the last."""
    return f"runs/{run}/round-{round:06d}.safetensors"


def upload_file(run: str, round: int, attempt: int) -> str:
    """What leaves for one attempt at a round, likewise."""
    return f"runs/{run}/round-{round:06d}-{attempt}.upload"


def private_folder(path: Path) -> None:
    """Make the folder for this user alone.

    Raises:
        RunError: it cannot be made, or others may look into it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from None
    if mode & 0o077:
        raise RunError(f"{path} is open to other users (mode {mode:o}): chmod 700 {path}")


def agree_to(owner: Owner, run: str) -> None:
    """Journal that the owner agrees to the run, once. Raises `RunError`."""
    agreements = Journal(owner.state / AGREEMENTS_FILE)
    if run not in {record.get("run") for record in agreements}:
        agreements.append({"run": run, "device": owner.name, "at": int(time.time()), "user": os.getuid()})


def agreed_runs(owner: Owner) -> tuple[str, ...]:
    """The runs to which the owner agreed, as of now. Raises `RunError` where their journal is damaged."""
    agreements = Journal(owner.state / AGREEMENTS_FILE)
    return tuple(str(record["run"]) for record in agreements if record.get("device") == owner.name)


def read_ledger(owner: Owner) -> Ledger | None:
    """The device's ledger, to be looked at beside a running device; ``None`` before its first start."""
    path = owner.state / LEDGER_FILE
    return Ledger.load(path) if path.exists() else None
