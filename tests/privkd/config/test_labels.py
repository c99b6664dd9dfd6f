"""Labels have one form each, whatever the others are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privkd.config.labels import canonical_number, in_order, is_fraction, is_missing, numbers_of, same_number


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("3", "3"), (" 3 ", "3"), ("03", "3"), ("3.0", "3"), ("3e0", "3"), ("+3", "3"), ("-0", "0"),
        ("-3.", "-3"), ("9007199254740993", "9007199254740993"), ("1" * 5000, "1" * 5000),
        ("0.5", "0.5"), ("nan", "nan"), ("1e300", "1e300"), ("1_0", "1_0"), (" cat ", "cat"), ("", ""),
    ],
)  # fmt: skip
def test_form_of_a_number(text: str, form: str) -> None:
    assert canonical_number(text) == form


@given(st.text())
def test_a_form_is_its_own(text: str) -> None:
    assert canonical_number(canonical_number(text)) == canonical_number(text)


@given(st.integers())
def test_whole_numbers_survive(number: int) -> None:
    assert canonical_number(f"{number}") == f"{number}"
    if abs(number) < 2**53:
        assert canonical_number(f"{number}.0") == f"{number}"
        assert same_number(f"{number}.0") == same_number(f"{number}") == number


@pytest.mark.parametrize(
    "code", ["03", "+3", "3e0", "-0", "1_0", " 3", "\u0663", "0x3", "3.1", "nan", "cat", ""]
)
def test_codes_spell_no_number(code: str) -> None:
    assert same_number(code) is None


def test_a_class_is_found_by_name_before_number() -> None:
    assert numbers_of(("12", "012", "7.0")) == {"12": 0, "012": 1, "7.0": 2, 12: 0, 7: 2}


@pytest.mark.parametrize(
    "mark", ["", "NA", "n/a", "#N/A", "<NA>", "nan", "NaN", "NaT", "NULL", "None", " ? "]
)
def test_marks_of_what_is_missing(mark: str) -> None:
    assert is_missing(mark)


@pytest.mark.parametrize("label", ["0", "-", "+", "no", "unknown", "nana", "n", "??"])
def test_what_is_no_such_mark(label: str) -> None:
    assert not is_missing(label)


def test_order() -> None:
    assert in_order(["b", "10", "9", "-1", "a", "9"]) == ("-1", "9", "10", "a", "b")


@pytest.mark.parametrize(
    ("label", "fraction"), [("0.5", True), ("nan", True), ("1e300", True), ("3", False), ("cat", False)]
)
def test_fractions_name_no_class(label: str, fraction: bool) -> None:
    assert is_fraction(label) == fraction
