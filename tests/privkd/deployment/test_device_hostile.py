"""A hostile cloud, and crashes at every durable step: one charge, one content, one noise for each of them."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attempted import ENCODED, KIND, attempted_channel, terms
from fuzzing import EXAMPLES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from on_device import NAME, Box, Clouds, box, clouds

from privkd.deployment.agreement import agree
from privkd.deployment.device import DeviceProgram
from privkd.deployment.device_state import Delivered, read_ledger
from privkd.deployment.wire import ANSWER_BYTES, Reason, unpack_answer
from privkd.folder import HeldFolder
from privkd.journal import Journal
from privkd.privacy.events import Unit

BUDGET = {"epsilon": 4.0, "device_epsilon": 13.0}
"""Enough for one run and a part of another, and for one attempt more than the rounds of both."""


@pytest.fixture(scope="module")
def two() -> Iterator[tuple[Clouds, Clouds]]:
    """Two runs over a channel with attempts."""
    kind = f"channel.kind={KIND}"
    with attempted_channel():
        yield clouds(kind), clouds(kind, "reverse.trust=1.9")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, two: tuple[Clouds, Clouds]) -> Box:
    """A device that agreed to both, and began its state."""
    folder = tmp_path_factory.mktemp("template")
    made = box(folder, two[0], budget=BUDGET)
    agree(made.owner, two[1].write(folder / "other"), two[1].published.digest)
    made.start()
    made.stop()
    return made


def copied(template: Box, folder: Path) -> Box:
    """The same device in another folder, under the same root key."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template.owner.state, folder)
    return Box(folder, template.owner.model_copy(update={"state": folder}))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[str, int], set[str]]]:
    """The tasks that were trained, by run and round: one stream of randomness each."""
    found: dict[tuple[str, int], set[str]] = {}
    train = DeviceProgram._train

    def noted(self: DeviceProgram, agreement: Any, task: Any, asked: Any) -> Any:
        found.setdefault((agreement.run, task.question.round), set()).add(task.digest)
        return train(self, agreement, task, asked)

    monkeypatch.setattr(DeviceProgram, "_train", noted)
    ENCODED.clear()
    return found


TERMS = [terms(0), terms(0), terms(1), terms(1, 1), terms(2), terms(9), terms(0, -1), terms(0, 1), b"["]
MOVED = ["start.head.bias", "prior", "queries", "teacher.head.bias"]
HEADS: list[dict[str, Any]] = [{"protocol": 3}, {"device": "x"}, {"run": "cd" * 32}]


def _hostile(draw: random.Random) -> dict[str, Any] | None:
    """One question, most of whose parts are an honest cloud's, so that a sequence gets somewhere; or none,
    for a restart."""
    if draw.random() < 0.15:
        return None
    return {
        "cloud": int(draw.random() < 0.3),
        "round": draw.choice([0, 0, 0, 1, 1, 2]),
        "moved": draw.choice(MOVED) if draw.random() < 0.2 else "",
        "terms": draw.choice(TERMS),
        "witness": draw.choice(["last", "last", "ab" * 32]) if draw.random() < 0.3 else None,
        "head": draw.choice(HEADS) if draw.random() < 0.1 else {},
    }


def _moved(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Other content that the plan allows just as well."""
    if name not in tensors:
        return tensors
    if name == "queries":
        return tensors | {"queries": tensors["queries"] + (1 if int(tensors["queries"][-1]) < 39 else -1)}
    if name == "prior":
        return tensors | {"prior": tensors["prior"].flip(1)}
    return tensors | {name: tensors[name] + 0.01}


@pytest.mark.parametrize("seed", range(max(24, EXAMPLES // 2)))
def test_no_order_of_questions_buys_a_second_noise_or_a_second_charge(
    tmp_path: Path, template: Box, two: tuple[Clouds, Clouds], trained: Any, seed: int
) -> None:
    """Whatever is asked, in whatever order and over restarts."""
    draw = random.Random(seed)
    device = copied(template, tmp_path / "state")
    answers: dict[tuple[str, int, bytes], set[bytes]] = {}
    last: str | None = None
    for _ in range(16):
        step = _hostile(draw)
        if step is None:
            device.start()
            continue
        cloud = two[step["cloud"]]
        last_one = step["round"] == cloud.prepared.plan.rounds
        tensors = _moved(cloud.delivered() if last_one else cloud.tensors(step["round"]), step["moved"])
        witness = last if step["witness"] == "last" else step["witness"]
        head = {"witness": witness} | step["head"]
        invitation = b"" if last_one else step["terms"]
        asked = cloud.ask(step["round"], tensors=tensors, invitation=invitation, **head)
        answer = device.raw(asked)
        said, given = unpack_answer(answer)
        if said.refused is None:
            assert device.raw(asked) == answer
            last = said.ledger or last if step["cloud"] == 0 else last
            answers.setdefault((cloud.published.digest, said.round or 0, invitation), set()).add(answer)
        else:
            assert (given, said.ledger) == (b"", None)
            assert len(answer) == ANSWER_BYTES
    _check(device, two, trained, answers)
    device.stop()


def _check(device: Box, two: tuple[Clouds, Clouds], trained: Any, answers: dict[Any, set[bytes]]) -> None:
    assert all(len(tasks) == 1 for tasks in trained.values()), "one content under each stream of training"
    blocks: dict[tuple[bytes, int], set[bytes]] = {}
    for root, round, _, block in ENCODED:
        blocks.setdefault((root, round), set()).add(block)
    assert all(len(contents) == 1 for contents in blocks.values()), "one content under each stream of noise"
    assert all(len(given) == 1 for given in answers.values()), "a repeat has the same bytes"
    ledger = read_ledger(device.owner)
    if ledger is None:
        return
    spent = {unit: ledger.epsilon(unit, NAME).high for unit in (Unit.RECORD, Unit.DEVICE)}
    assert spent[Unit.RECORD] <= BUDGET["epsilon"]
    assert spent[Unit.DEVICE] <= BUDGET["device_epsilon"]
    encoded = {(root, round, attempt) for root, round, attempt, _ in ENCODED}
    assert len(ledger.charges(Unit.DEVICE, NAME)) == len(encoded)
    assert sum(charge.event.kind == "dp_sgd" for charge in ledger.charges(Unit.RECORD, NAME)) == len(trained)


def test_an_attempt_has_one_set_of_terms_and_the_price_of_a_release(
    tmp_path: Path, template: Box, two: tuple[Clouds, Clouds]
) -> None:
    device = copied(template, tmp_path / "state")

    def ask(attempt: int, expires: int = 0) -> tuple[Any, bytes]:
        return device(two[0].ask(invitation=terms(attempt, expires)))

    (first, block), (other, _) = ask(0), ask(0, expires=1)
    assert (first.refused, other.refused) == (None, Reason.TERMS)
    second, renoised = ask(1)
    assert second.refused is None
    assert renoised != block
    assert ask(0)[0].refused is Reason.TERMS, "it is behind"
    assert ask(8)[0].refused is Reason.TERMS, "one too many"
    ledger = read_ledger(device.owner)
    assert ledger is not None
    assert [charge.label[-2:] for charge in ledger.charges(Unit.DEVICE, NAME)] == [":0", ":1"]
    assert len(ledger.charges(Unit.RECORD, NAME)) == 2
    device.stop()


@settings(max_examples=max(40, EXAMPLES), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_charge_nothing(
    tmp_path: Path, template: Box, two: tuple[Clouds, Clouds], data: st.DataObject
) -> None:
    """A byte of a question's head changed, or the question cut: a refusal, or the same question."""
    device = copied(template, tmp_path / "state")
    message = bytearray(two[0].ask(invitation=terms(0)))
    at = data.draw(st.integers(0, 400))
    if data.draw(st.booleans()):
        message = message[:at]
    else:
        message[at] ^= data.draw(st.integers(1, 255))
    head, _ = device(bytes(message))
    ledger = read_ledger(device.owner)
    assert head.refused in Reason or head.run == two[0].published.digest
    assert ledger is not None
    assert len(ledger.charges(Unit.DEVICE, NAME)) == (0 if head.refused else 1)
    device.stop()


class _KilledError(BaseException):
    """Nobody catches it: the process ends here."""


class Strike:
    """Kills at the ``at``-th durable step, before it or after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, *, after: bool) -> None:
        self.seen, self.at, self.after = 0, at, after
        for kind, name in ((Journal, "append"), (HeldFolder, "_write")):
            monkeypatch.setattr(kind, name, self._struck(getattr(kind, name)))

    def _struck(self, durable: Any) -> Any:
        def struck(*given: Any, **named: Any) -> Any:
            number, self.seen = self.seen, self.seen + 1
            if number == self.at and not self.after:
                raise _KilledError
            done = durable(*given, **named)
            if number == self.at:
                raise _KilledError
            return done

        return struck


DURABLE, DURABLE_DELIVERY = 7, 4
"""Asked, charged, round kept, trained, upload kept, answered, status; and asked, kept, delivered, status."""


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(DURABLE + 1))
def test_a_crash_at_a_durable_step_changes_nothing(
    tmp_path: Path, template: Box, two: tuple[Clouds, Clouds], trained: Any, at: int, after: bool
) -> None:
    asked = two[0].ask(invitation=terms(0))
    unharmed = copied(template, tmp_path / "unharmed")
    expected = unharmed.raw(asked)
    unharmed.stop()
    device = copied(template, tmp_path / "struck")
    device.start()
    with pytest.MonkeyPatch.context() as patch:
        strike = Strike(patch, at, after=after)
        if at < DURABLE:
            with pytest.raises(_KilledError):
                device.raw(asked)
        else:
            device.raw(asked)
            assert strike.seen == DURABLE, "the list of durable steps is whole"
    device.start()
    # The witness names the ledger, whose lines are the same.
    assert device.raw(asked) == expected
    kept = read_ledger(device.owner)
    assert kept is not None
    assert len(kept.charges(Unit.RECORD, NAME)) == 2
    assert len(kept.charges(Unit.DEVICE, NAME)) == 1
    assert len({block for *_, block in ENCODED}) == 1
    device.stop()


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(DURABLE_DELIVERY + 1))
def test_a_crash_in_a_delivery_changes_nothing(
    tmp_path: Path, template: Box, two: tuple[Clouds, Clouds], at: int, after: bool
) -> None:
    told, asked = two[0].ask(invitation=terms(0)), two[0].delivery()
    unharmed, device = copied(template, tmp_path / "unharmed"), copied(template, tmp_path / "struck")
    expected = [unharmed.raw(each) for each in (told, asked)]
    assert device.raw(told) == expected[0]
    with pytest.MonkeyPatch.context() as patch:
        strike = Strike(patch, at, after=after)
        if at < DURABLE_DELIVERY:
            with pytest.raises(_KilledError):
                device.raw(asked)
        else:
            device.raw(asked)
            assert strike.seen == DURABLE_DELIVERY, "the list of durable steps is whole"
    device.start()
    assert device.raw(asked) == expected[1]
    run = two[0].published.digest
    found = [each.state.last(Delivered, run) for each in (unharmed, device)]
    assert found[0] == found[1] is not None, "the same student"
    kept = read_ledger(device.owner)
    assert kept is not None
    assert len(kept.charges(Unit.RECORD, NAME)) == 2
    for each in (unharmed, device):
        each.stop()


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_in_the_first_start_is_gone_on_with(
    tmp_path: Path, two: tuple[Clouds, Clouds], at: int, after: bool
) -> None:
    device = box(tmp_path / "box", two[0], agreed=False)
    with pytest.MonkeyPatch.context() as patch:
        Strike(patch, at, after=after)
        with pytest.raises(_KilledError):
            device.start()
    device.start()
    root = device.state.root
    device.start()
    assert device.state.root == root
    device.stop()
