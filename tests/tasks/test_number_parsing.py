from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npo_cli.tasks.verifiers import last_numeral, read_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", Fraction(42)),
        (" -7 ", Fraction(-7)),
        ("\N{MINUS SIGN}7", Fraction(-7)),
        ("+3", Fraction(3)),
        ("1,234,567.5", Fraction(12345675, 10)),
        ("0.1", Fraction(1, 10)),
        (".5", Fraction(1, 2)),
        ("6/8", Fraction(3, 4)),
        ("-1/3", Fraction(-1, 3)),
        ("1.5e-3", Fraction(15, 10000)),
        ("2E+2", Fraction(200)),
    ],
)
def test_numbers_are_read_exactly(text: str, value: Fraction):
    assert read_number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "4 2",
        "1,23",
        "1,2345",
        "12,34,567",
        "1/0",
        "1/2/3",
        "--1",
        "1.",
        "1e",
        "50%",
        "$5",
        "٣",
        "1e999999999",
        "7" * 401,
    ],
)
def test_text_that_is_not_one_number_is_not_read(text: str):
    assert read_number(text) is None


@given(st.integers())
def test_number_with_commas_equals_the_integer(number: int):
    assert read_number(str(number)) == read_number(f"{number:,}") == number


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=6))
def test_number_decimals_are_exact(number: Decimal):
    assert read_number(f"{number:f}") == Fraction(number)


@given(st.fractions())
def test_number_fractions_are_exact(number: Fraction):
    assert read_number(str(number)) == number


@given(
    st.fractions(max_denominator=1000), st.sampled_from(["The answer is {}.", "3 + 4 = {}", "\\boxed{{{}}}", "**{}**!"])
)
def test_last_number_is_found_in_any_context(number: Fraction, sentence: str):
    assert read_number(last_numeral(sentence.format(number))) == number


@pytest.mark.parametrize(
    ("text", "numeral"),
    [
        ("first 3, then 1,024.", "1,024"),
        ("12-5", "5"),
        ("(12)-5", "5"),
        ("it is -5", "-5"),
        ("x2 and y3", None),
        ("3x2", "3"),
        ("x_1 = 9", "9"),
        ("1,2", "2"),
        ("costs $8.50.", "8.50"),
        ("no number", None),
        ("答案是42", "42"),
        ("½", None),
    ],
)
def test_last_number_of_a_text(text: str, numeral: str | None):
    assert last_numeral(text) == numeral


@given(st.text(max_size=80))
def test_number_parsing_accepts_any_text(text: str):
    found = last_numeral(text)
    assert found is None or any(char in "0123456789" for char in found)
    read_number(text)
