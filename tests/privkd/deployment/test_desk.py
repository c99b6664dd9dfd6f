"""The desk where a courier collects questions: tickets, the first answer, what is late."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from privkd.deployment.desk import Desk, leave, missing, question
from privkd.deployment.sockets import call

QUESTIONS = {"a": b"for a", "b": b"for b\n\n"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cloud.sock"


@pytest.fixture
def desk(path: Path) -> Iterator[Desk]:
    desk = Desk(path)
    yield desk
    desk.close()


def test_questions_are_collected_and_answers_left(desk: Desk, path: Path) -> None:
    desk.lay_out(QUESTIONS)
    ticket = desk.ticket()
    assert desk.shown(ticket) is None
    assert missing(str(path), ticket) == ["a", "b"]
    assert desk.shown(ticket) is not None
    assert question(str(path), ticket, "b") == QUESTIONS["b"]
    assert (desk.missing(), desk.uncollected()) == (["a", "b"], ["a"])
    leave(str(path), ticket, "b", b"of b\n{}")
    assert missing(str(path), ticket) == ["a"]
    assert not desk.wait(0.0)
    leave(str(path), ticket, "a", b"")
    assert desk.wait(0.0)
    assert desk.clear() == {"a": b"", "b": b"of b\n{}"}


def test_the_first_answer_stands_and_nobody_else_answers(desk: Desk, path: Path) -> None:
    desk.lay_out(QUESTIONS)
    ticket = desk.ticket()
    leave(str(path), ticket, "a", b"first")
    leave(str(path), ticket, "a", b"second")
    leave(str(path), ticket, "stranger", b"x")
    assert question(str(path), ticket, "stranger") == b""
    assert desk.clear() == {"a": b"first"}


def test_an_old_ticket_finds_nothing_and_leaves_nothing(desk: Desk, path: Path) -> None:
    desk.lay_out(QUESTIONS)
    old = desk.ticket()
    desk.lay_out(QUESTIONS)
    desk.ticket()
    assert missing(str(path), old) == []
    assert question(str(path), old, "a") == b""
    leave(str(path), old, "a", b"late")
    assert desk.missing() == ["a", "b"]


def test_two_jobs_may_serve_one_batch(desk: Desk, path: Path) -> None:
    desk.lay_out(QUESTIONS)
    first, second = desk.ticket(), desk.ticket()
    leave(str(path), first, "a", b"1")
    leave(str(path), second, "b", b"2")
    assert desk.clear() == {"a": b"1", "b": b"2"}


def test_who_waits_is_woken_by_the_last_answer(desk: Desk, path: Path) -> None:
    desk.lay_out({"a": b"?"})
    ticket = desk.ticket()
    timer = threading.Timer(0.1, leave, [str(path), ticket, "a", b"!"])
    timer.start()
    assert desk.wait(30.0)
    timer.join()


@pytest.mark.parametrize("message", [b"", b"{}", b"[]\n", b"\xff\n", b"1", b'{"ticket": 1}'])
def test_damage_is_answered_with_nothing(desk: Desk, path: Path, message: bytes) -> None:
    desk.lay_out(QUESTIONS)
    desk.ticket()
    assert call(path, message, 10.0) == b""
    assert desk.missing() == ["a", "b"]
