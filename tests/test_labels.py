"""Labels have one form each, whatever the others are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privkd.labels import canonical_label, in_order, is_fraction


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("3", "3"), (" 3 ", "3"), ("03", "3"), ("3.0", "3"), ("3e0", "3"), ("+3", "3"), ("-0", "0"),
        ("-3.", "-3"), ("9007199254740993", "9007199254740993"), ("1" * 5000, "1" * 5000),
        ("0.5", "0.5"), ("nan", "nan"), ("1e300", "1e300"), ("1_0", "1_0"), (" cat ", "cat"), ("", ""),
    ],
)  # fmt: skip
def test_form(text: str, form: str) -> None:
    assert canonical_label(text) == form


@given(st.text())
def test_a_form_is_its_own(text: str) -> None:
    assert canonical_label(canonical_label(text)) == canonical_label(text)


@given(st.integers())
def test_whole_numbers_survive(number: int) -> None:
    assert canonical_label(f"{number}") == f"{number}"
    if abs(number) < 2**53:
        assert canonical_label(f"{number}.0") == f"{number}"


def test_order() -> None:
    assert in_order(["b", "10", "9", "-1", "a", "9"]) == ("-1", "9", "10", "a", "b")


@pytest.mark.parametrize(
    ("label", "fraction"), [("0.5", True), ("nan", True), ("1e300", True), ("3", False), ("cat", False)]
)
def test_fractions_name_no_class(label: str, fraction: bool) -> None:
    assert is_fraction(label) == fraction
