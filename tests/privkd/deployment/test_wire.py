"""Messages between the cloud and a device: they come back as they went, and damage is told apart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from privkd.deployment.wire import (
    ANSWER_BYTES,
    Answer,
    Question,
    Reason,
    pack_answer,
    pack_question,
    substance,
    unpack_answer,
    unpack_question,
)
from privkd.errors import ChannelError

RUN = "ab" * 32
HEAD = Question(run=RUN, device="clinic-7", round=2, witness="12")
TENSORS = {"queries": torch.arange(5), "teacher.weight": torch.ones(2, 3)}


def test_a_question_comes_back_as_it_went() -> None:
    head, tensors, invitation = unpack_question(pack_question(HEAD, TENSORS, b"terms"))
    assert (head, invitation) == (HEAD, b"terms")
    assert all(tensors[name].equal(tensor) for name, tensor in TENSORS.items())


def test_neither_witness_nor_terms_are_its_substance_and_all_else_is() -> None:
    same = substance(pack_question(HEAD.model_copy(update={"witness": None}), TENSORS, b"other"))
    assert same == substance(pack_question(HEAD, TENSORS, b"terms"))
    others = [HEAD.model_copy(update={name: value}) for name, value in [("run", "cd" * 32), ("round", 3)]]
    changed = [pack_question(other, TENSORS, b"terms") for other in others]
    changed.append(pack_question(HEAD, TENSORS | {"queries": torch.arange(6)}, b"terms"))
    assert all(substance(message) != same for message in changed)


@pytest.mark.parametrize("refused", [None, *Reason])
def test_every_answer_has_one_size(refused: Reason | None) -> None:
    answer = Answer(run=RUN, device="d" * 64, round=10**6, refused=refused, ledger="9:" + "ef" * 32)
    message = pack_answer(answer, b"block")
    assert len(message) == ANSWER_BYTES + len(b"block")
    assert unpack_answer(message) == (answer, b"block")


@given(st.binary(max_size=200), st.integers(0, 60))
def test_damage_is_an_error_of_the_channel(noise: bytes, at: int) -> None:
    message = bytearray(pack_question(HEAD, TENSORS, b"terms"))
    message[at : at + len(noise)] = noise
    for damaged in (noise, bytes(message), bytes(message[:at])):
        try:
            unpack_question(damaged)
        except ChannelError:
            continue
