"""READ FIRST: the program of a real device. Bytes in, bytes out; it knows no engine and believes no cloud.

A question is checked against what the owner agreed to, charged, answered and kept, each step durable before
the next, so that a crash anywhere replays the same randomness:

    check -> journal its substance -> charge -> train -> keep student and block -> encode -> keep the upload
          -> wait for the moment -> deliver

An answer leaves at a whole multiple of the plan's ``answer_seconds`` after the question first arrived, and a
repeated question gets the same bytes. What goes wrong is a `Reason` for the cloud; words are the owner's. One
past the last round the cloud delivers the last teacher: the device makes of it and of its own student the one
that it is left with, and says that it came.
"""

import contextlib
import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from privkd.channels.channel import Channel, contributions
from privkd.channels.registry import known, open_channel
from privkd.config import ChannelConfig
from privkd.deployment.agreement import Agreement
from privkd.deployment.asked_task import asked_task
from privkd.deployment.delivery import delivered_models, left_with
from privkd.deployment.device_state import (
    STATUS_FILE,
    Answered,
    Asked,
    Delivered,
    DeviceState,
    Seen,
    Trained,
    agreed_runs,
    round_file,
    run_folder,
    upload_file,
)
from privkd.deployment.owner import Owner
from privkd.deployment.wire import (
    MAX_MESSAGE,
    PROTOCOL,
    Answer,
    Question,
    Reason,
    pack_answer,
    substance,
    unpack_question,
)
from privkd.errors import BudgetError, DataError, PrivkdError, TrainingError
from privkd.messages import Task, Upload
from privkd.privacy.accounting import upper_bound
from privkd.privacy.events import Charge, PostProcessing, Unit
from privkd.privacy.randomness import SystemRandomness, seeded_layers

Log = Callable[[Mapping[str, Any]], None]
"""Takes what happened, for the owner alone; no record's contents."""

_MOST_ATTEMPTS = 8
_BLOCK, _STUDENT = "block", "student."


class _RefusedError(Exception):
    """``reason`` is for the cloud, the words for the owner."""

    def __init__(self, reason: Reason, words: str) -> None:
        super().__init__(words)
        self.reason = reason


@dataclass(frozen=True)
class _Ready:
    """What is about to be answered, kept already.

    ``leave`` brings away what is to leave, and gives what of it is for the cloud. ``waited`` says whether its
    moment has come: it has for what was made just now.
    """

    agreement: Agreement
    asked: Asked
    leave: Callable[[], bytes]
    witness: str | None
    waited: bool


class DeviceProgram:
    """Answers questions; see the module. May be called from several threads."""

    def __init__(
        self,
        owner: Owner,
        state: DeviceState,
        log: Log,
        *,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Answer for ``owner`` out of ``state``; ``now`` is Unix time."""
        self._owner, self._state, self._log = owner, state, log
        self._now, self._sleep = now, sleep
        self._lock, self._noting = threading.Lock(), threading.Lock()
        self._agreements: dict[str, Agreement] = {}
        kept = state.path / STATUS_FILE
        self._seen = Seen.read(kept) if kept.exists() else Seen()

    def handle(self, message: bytes) -> bytes:
        """The answer to a question of the cloud's, whatever it is; never an error."""
        head: Question | None = None
        refused: _RefusedError
        try:
            head, tensors, invitation = _parsed(message, self._owner.name)
            with self._lock:
                ready = self._ready(head, substance(message), tensors, invitation)
            if not ready.waited:
                self._wait(ready.agreement, ready.asked)
            given = ready.leave()
            answer = self._answer(head, None, ready.witness)
            self._note(head, None, "")
            return pack_answer(answer, given)
        except _RefusedError as error:
            refused = error
        except BudgetError as error:
            refused = _RefusedError(Reason.BUDGET, str(error))
        except DataError:
            # Its words may quote a record.
            refused = _RefusedError(Reason.LATER, "records cannot be read: `privkd device agree` says why")
        except PrivkdError as error:
            refused = _RefusedError(Reason.LATER, str(error))
        except Exception as error:  # A device says nothing of what went wrong in it.
            refused = _RefusedError(Reason.LATER, f"unexpected {type(error).__name__} {_place(error)}")
        self._note(head, refused.reason, str(refused))
        return pack_answer(self._answer(head, refused.reason, None))

    def _answer(self, head: Question | None, refused: Reason | None, witness: str | None) -> Answer:
        run, round = (None, None) if head is None else (head.run, head.round)
        return Answer(run=run, device=self._owner.name, round=round, refused=refused, ledger=witness)

    def _ready(self, head: Question, digest: str, tensors: Mapping[str, Tensor], invitation: bytes) -> _Ready:
        """What to answer, kept and paid for."""
        agreement = self._agreed(head.run)
        if head.witness is not None and not self._state.bears_out(head.run, head.witness):
            words = "the cloud was told of charges that this ledger lacks: was it restored from a copy?"
            raise _RefusedError(Reason.WITNESS, words)
        asked = self._asked_before(agreement, head.round, digest)
        if head.round == agreement.plan.rounds:
            return self._delivery(agreement, head, digest, tensors, invitation, asked)
        with _as(Reason.QUESTION):
            task = asked_task(agreement, head.round, tensors)
        channel = self._channel(agreement)
        with _as(Reason.TERMS):
            attempt = channel.accept(task.question, invitation)
        terms = hashlib.sha256(invitation).hexdigest()
        answered = self._answered_before(head, attempt, terms)
        if asked is None:
            self._check_start(agreement, task)
            asked = self._asked_now(head, digest)
        fresh = answered is None
        if answered is None:
            # Held until the moment has come: who knocks meanwhile cannot tell how long a training takes.
            try:
                answered = self._make(agreement, task, asked, channel, attempt, terms)
            finally:
                self._wait(agreement, asked)
        upload = Upload(self._owner.name, head.round, self._state.kept_upload(answered))
        leave = partial(_brought, agreement, channel, upload)
        return _Ready(agreement, asked, leave, answered.witness, waited=fresh)

    def _delivery(
        self,
        agreement: Agreement,
        head: Question,
        digest: str,
        tensors: Mapping[str, Tensor],
        invitation: bytes,
        asked: Asked | None,
    ) -> _Ready:
        """The student that the device is left with, kept. Nothing leaves, not even a witness of the ledger:
        no charge was made, so that it would show whether another run's was."""
        with _as(Reason.QUESTION):
            start, teacher = delivered_models(agreement, tensors, invitation)
        asked = asked or self._asked_now(head, digest)
        fresh = self._state.last(Delivered, head.run) is None
        if fresh:
            try:
                self._take(agreement, asked, start, teacher)
            finally:
                self._wait(agreement, asked)
        return _Ready(agreement, asked, bytes, None, waited=fresh)

    def _take(
        self, agreement: Agreement, asked: Asked, start: torch.nn.Module, teacher: torch.nn.Module | None
    ) -> None:
        """Make the student that the device is left with, and keep it."""
        self._check_hours()
        state, run, labels = self._state, agreement.run, (self._owner.name, asked.substance)
        root, own = state.run_root(run), self._last_student(agreement)
        batches = torch.Generator().manual_seed(_seed(root.subkey("deliver", *labels)))
        with seeded_layers(_seed(root.subkey("deliver layers", *labels))):
            student = left_with(agreement, own, start, teacher, batches)
        file = state.save(round_file(run, asked.round), _named(student))
        state.add(Delivered(run=run, round=asked.round, file=file))

    def _agreed(self, run: str) -> Agreement:
        """The run, if the owner agreed and it still lies within the bounds."""
        if run in self._agreements:
            return self._agreements[run]
        if run not in agreed_runs(self._owner):
            raise _RefusedError(Reason.NOT_AGREED, f"nobody agreed to run {run}")
        with _as(Reason.NOT_AGREED):
            agreement = Agreement.read(
                run_folder(self._state.path, run), self._owner.name, self._owner.encoders
            )
            self._owner.check(agreement.published)
        if agreement.run != run:
            raise _RefusedError(Reason.NOT_AGREED, f"the plan kept for run {run} is another's")
        self._agreements[run] = agreement
        return agreement

    def _asked_before(self, agreement: Agreement, round: int, digest: str) -> Asked | None:
        last = self._state.last(Asked, agreement.run)
        end = agreement.plan.rounds + agreement.published.config.student.delivers
        if round >= end or (last is not None and round < last.round):
            raise _RefusedError(Reason.ROUND_OVER, f"round {round} is over, or beyond the plan's")
        if last is None or last.round != round:
            return None
        if last.substance != digest:
            raise _RefusedError(Reason.CHANGED, f"round {round} was asked before otherwise")
        return last

    def _asked_now(self, head: Question, digest: str) -> Asked:
        asked = Asked(run=head.run, round=head.round, substance=digest, arrived=self._now())
        self._state.add(asked)
        return asked

    def _answered_before(self, head: Question, attempt: int, terms: str) -> Answered | None:
        last = self._state.last(Answered, head.run, round=head.round)
        if attempt >= _MOST_ATTEMPTS or (last is not None and attempt < last.attempt):
            raise _RefusedError(Reason.TERMS, f"attempt {attempt} is over, or one too many")
        if last is None or last.attempt != attempt:
            return None
        if last.terms != terms:
            raise _RefusedError(Reason.TERMS, f"attempt {attempt} was answered under other terms")
        return last

    def _check_start(self, agreement: Agreement, task: Task) -> None:
        if not task.starts and self._state.last(Trained, agreement.run) is None:
            raise _RefusedError(Reason.QUESTION, "no student to begin with, and none of a round before")

    def _charges(self, agreement: Agreement, round: int, attempt: int) -> list[Charge]:
        """What an attempt at a round costs. A repeated one costs nothing more."""
        name, run, plan = self._owner.name, agreement.run, agreement.plan
        free = PostProcessing("a DP-SGD student's answers")
        return [
            Charge(Unit.RECORD, name, plan.training_event, round, run),
            Charge(Unit.RECORD, name, free, round, f"{run}:answers"),
            # Another attempt may meet other noise.
            Charge(Unit.DEVICE, name, plan.device_event, round, f"{run}:{attempt}"),
        ]

    def _check_run_bounds(self, agreement: Agreement, round: int, attempt: int) -> None:
        """Raise `BudgetError` where the run would cost more than the owner allows a run."""
        bounds, delta = self._owner.bounds, self._owner.budget.delta
        charges = self._charges(agreement, round, attempt)
        mosts = {Unit.RECORD: bounds.max_epsilon_per_run, Unit.DEVICE: bounds.max_device_epsilon_per_run}
        for unit, most in mosts.items():
            booked = self._state.ledger.charges(unit, self._owner.name)
            own = {each.key: each.event for each in booked if each.label.startswith(agreement.run)}
            own |= {each.key: each.event for each in charges if each.unit is unit}
            if not math.isinf(most) and (cost := upper_bound(tuple(own.values()), delta)) > most:
                raise BudgetError(f"run {agreement.run} would cost {cost:.4g} per {unit} of {most:g}")

    def _check_hours(self) -> None:
        if not self._owner.hours.allow(datetime.fromtimestamp(self._now()).astimezone()):
            raise _RefusedError(Reason.LATER, "outside of the hours in which this device may train")

    def _make(
        self, agreement: Agreement, task: Task, asked: Asked, channel: Channel, attempt: int, terms: str
    ) -> Answered:
        """Charge an attempt, train unless the round was trained, encode, and keep what may leave."""
        state, run, round = self._state, agreement.run, task.question.round
        self._check_hours()
        self._check_run_bounds(agreement, round, attempt)
        state.ledger.debit_all(self._charges(agreement, round, attempt))
        trained = state.last(Trained, run, round=round) or self._train(agreement, task, asked)
        block = state.kept_round(trained)[_BLOCK].numpy()
        payload = channel.encode(task.question, block, self._owner.name).payload
        state.write_bytes(upload_file(run, round, attempt), payload)
        answered = Answered(
            run=run,
            round=round,
            attempt=attempt,
            terms=terms,
            file=hashlib.sha256(payload).hexdigest(),
            witness=state.witness(run),
            ledger=state.paid,
        )
        state.add(answered)
        state.forget_before(run, round, attempt)
        return answered

    def _train(self, agreement: Agreement, task: Task, asked: Asked) -> Trained:
        """This round's student and block, kept."""
        from privkd.deployment.own_records import own_records
        from privkd.device import Draws, answer

        state, run, round = self._state, agreement.run, task.question.round
        records = own_records(self._owner.records, agreement.published)
        own = agreement.published.config.student.start == "own"
        before = self._last_student(agreement) if own else None
        root, name = state.run_root(run), self._owner.name
        # Of the substance too: were the state restored, another question would not meet the same noise.
        labels = (name, round, asked.substance)
        batches = torch.Generator().manual_seed(_seed(root.subkey("batches", *labels)))
        draws = Draws(SystemRandomness(root, *labels), batches)
        student = task.start(agreement.number, before)
        shape = (1, *task.question.prior.shape)
        with seeded_layers(_seed(root.subkey("layers", *labels))):
            try:
                made = answer(task, agreement.number, records, draws, before)
                student, answers = made.student, made.block[None]
            except TrainingError:
                answers = torch.full(shape, math.nan)
        # What is not finite is sent as zeros: nobody is told that a training failed.
        block = torch.from_numpy(contributions(answers, [name], round)[0])
        file = state.save(round_file(run, round), {_BLOCK: block, **_named(student)})
        trained = Trained(run=run, round=round, file=file, ledger=state.paid)
        state.add(trained)
        return trained

    def _last_student(self, agreement: Agreement) -> torch.nn.Module | None:
        """The student of the last round that this device trained in, if there was any."""
        last = self._state.last(Trained, agreement.run)
        return None if last is None else kept_student(self._state.kept_round(last), agreement)

    def _channel(self, agreement: Agreement) -> Channel:
        config, plan, own = agreement.published.config, agreement.plan, self._owner.aggregators
        files = {"ca": own.ca, "certificate": own.certificate, "key": own.key}
        return open_channel(
            config.channel.kind,
            clip_norm=plan.clip_norm,
            rho=plan.rho,
            root=self._state.run_root(agreement.run),
            aggregators=config.channel.aggregators,
            deadline=config.channel.deadline,
            options=self._options(agreement, config.channel.model_copy(update=files)),
        )

    def _options(self, agreement: Agreement, channel: ChannelConfig) -> Any:
        if not known(channel.kind).has_parties:
            return None
        from privkd.channels.secure import SecureOptions

        return SecureOptions.of(
            channel,
            run=bytes.fromhex(agreement.run),
            roster=agreement.published.roster,
            votes=agreement.plan.votes,
        )

    def _wait(self, agreement: Agreement, asked: Asked) -> None:
        """Sleep until the next moment at which an answer may leave."""
        seconds = agreement.published.answer_seconds
        elapsed = max(0.0, self._now() - asked.arrived)
        self._sleep(seconds - elapsed % seconds)

    def _note(self, head: Question | None, refused: Reason | None, words: str) -> None:
        """Say what happened in the log and in the status; neither may stop an answer."""
        now = self._now()
        run, round = (None, None) if head is None else (head.run, head.round)
        with self._noting:
            counts = dict(self._seen.refusals)
            if refused is not None:
                counts[refused] = counts.get(refused, 0) + 1
            said = None if refused is None else f"{refused}: {words}"
            self._seen = Seen(last_question=now, run=run, round=round, refusals=counts, words=said)
            with contextlib.suppress(PrivkdError):
                self._state.write_json(STATUS_FILE, self._seen.tree())
        happened = "answered" if refused is None else "refused"
        reason = {} if refused is None else {"reason": refused.value, "words": words}
        with contextlib.suppress(Exception):
            self._log({"time": now, "event": happened, "run": run, "round": round, **reason})


def kept_student(kept: Mapping[str, Tensor], agreement: Agreement) -> torch.nn.Module:
    """The student in what `DeviceState.kept_round` gives, in evaluation mode."""
    student = agreement.student()
    student.load_state_dict(
        {name.removeprefix(_STUDENT): value for name, value in kept.items() if name.startswith(_STUDENT)}
    )
    return student.eval()


def _named(student: torch.nn.Module) -> dict[str, Tensor]:
    return {f"{_STUDENT}{key}": value for key, value in student.state_dict().items()}


def _brought(agreement: Agreement, channel: Channel, upload: Upload) -> bytes:
    """Bring an upload to the aggregators; what is left for the cloud."""
    until = time.monotonic() + agreement.published.config.channel.deadline
    with channel:
        return channel.deliver(upload, until)


def _parsed(message: bytes, device: str) -> tuple[Question, dict[str, Tensor], bytes]:
    if len(message) > MAX_MESSAGE:
        raise _RefusedError(Reason.PROTOCOL, f"a message of {len(message)} bytes")
    try:
        head, tensors, invitation = unpack_question(message)
    except Exception as error:  # Whatever a library stumbles over in hostile bytes.
        raise _RefusedError(Reason.PROTOCOL, f"not a question ({type(error).__name__})") from None
    if head.protocol != PROTOCOL or head.device != device:
        raise _RefusedError(Reason.PROTOCOL, f"protocol {head.protocol} for {head.device}")
    return head, tensors, invitation


@contextlib.contextmanager
def _as(reason: Reason) -> Iterator[None]:
    """Turn what a check finds wrong into a refusal for ``reason``."""
    try:
        yield
    except (PrivkdError, RuntimeError, ValueError) as error:
        _refuse(reason, error)


def _refuse(reason: Reason, error: Exception) -> NoReturn:
    words = str(error) if isinstance(error, PrivkdError) else type(error).__name__
    raise _RefusedError(reason, words) from None


def _seed(key: bytes) -> int:
    return int.from_bytes(key[:8], "big") >> 1


def _place(error: BaseException) -> str:
    """Where an error was raised, without its words."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f"at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
