"""Damage of every kind to bytes that were fine, and a guard against hanging on it."""

import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = 50
"""Hostile inputs that each test tries: pytest's ``--fuzz-examples``, put here before tests are collected."""

_NUMBERS = [
    struct.pack(form, value)
    for form in ("<I", ">I", "<Q", ">Q")
    for value in (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
]
_HANGING_SECONDS = 60


def fuzzed(*, commands: bool = False) -> settings:
    """Settings of a fuzzing test; those that go through whole ``commands`` try fewer."""
    examples = max(1, EXAMPLES // 10) if commands else EXAMPLES
    return settings(max_examples=examples, suppress_health_check=list(HealthCheck))


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """``whole`` with up to four wounds: bytes flipped, cut, put in, repeated, made extreme; or any bytes."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=400))
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        end = min(len(data), at + draw(st.integers(1, 64)))
        wound = draw(st.sampled_from(["flip", "number", "cut", "end", "insert", "copy"]))
        if wound == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif wound == "number":
            number = draw(st.sampled_from(_NUMBERS))
            data[at : at + len(number)] = number
        elif wound == "cut":
            del data[at:end]
        elif wound == "end":
            del data[at:]
        elif wound == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        else:
            data[at:at] = data[at:end]
    return bytes(data)


@contextmanager
def no_hang() -> Iterator[None]:
    """Fails where something takes a minute that should take a moment."""

    def stuck(_: int, __: FrameType | None) -> None:
        raise AssertionError(f"hangs: no end after {_HANGING_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stuck)
    signal.alarm(_HANGING_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
