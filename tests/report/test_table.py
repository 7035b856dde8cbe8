import pytest

from npo_cli.report.table import Table, drop_empty_columns, format_bytes, format_count, format_interval, format_number


@pytest.mark.parametrize(
    ("value", "cell"),
    [(None, "-"), (0.12345, "0.123"), (-2.0, "-2.000"), (9999.0, "9999.000"), (123456.0, "1.23e+05"), (1e-9, "0.000")],
)
def test_numbers_keep_three_decimals_until_they_are_large(value, cell):
    assert format_number(value) == cell


def test_counts_have_their_thousands_apart_and_absence_has_a_word():
    assert (format_count(1234567), format_count(0), format_count(None), format_count(None, absent="not reached")) == (
        "1,234,567",
        "0",
        "-",
        "not reached",
    )


@pytest.mark.parametrize(
    ("num_bytes", "cell"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_143_205, "1.1 MB"), (17.5e9, "17.5 GB"), (2.4e12, "2400.0 GB")],
)
def test_sizes_use_the_largest_unit_that_leaves_one(num_bytes, cell):
    assert format_bytes(num_bytes) == cell


def test_an_interval_stands_in_brackets():
    assert format_interval(0.5, 0.4, 0.6) == "0.500 [0.400, 0.600]"


def test_columns_that_say_nothing_are_left_out():
    table = Table(title="t", header=("a", "b", "c"), rows=(("1", "-", ""), ("2", "-", "x")))
    assert drop_empty_columns(table).header == ("a", "c")
    assert drop_empty_columns(table).rows == (("1", ""), ("2", "x"))
