import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npo_cli.cli.output import format_table, print_table, split_columns
from npo_cli.report.table import Table

TABLE = Table(
    title="Runs",
    header=("name", "step", "accuracy"),
    rows=(("main", "5", "0.500 [0.400, 0.600]"), ("文字", "120", "-")),
    notes=("a note",),
)


def test_plain_table_aligns_numbers_right_and_wide_characters():
    assert format_table(TABLE) == (
        "Runs\n"
        "name  step              accuracy\n"
        "main     5  0.500 [0.400, 0.600]\n"
        "文字   120                     -\n"
        "a note\n"
    )


def test_plain_table_never_cuts_a_cell():
    table = Table(title="t", header=("text",), rows=(("x" * 500,),))
    assert "x" * 500 in format_table(table).splitlines()


def test_empty_table_keeps_its_header():
    assert format_table(Table(title="t", header=("a", "b"), rows=())) == "t\na  b\n"


def test_split_table_repeats_the_key_columns():
    # 4 + 2 + 4 = 10 for the keys; with 6 more and a gap 18 fit, the third would make 26
    assert list(split_columns([4, 4, 6, 6, 6], limit=20)) == [[0, 1, 2], [0, 1, 3], [0, 1, 4]]
    assert list(split_columns([4, 4, 6, 6, 6], limit=26)) == [[0, 1, 2, 3], [0, 1, 4]]
    assert list(split_columns([4, 4], limit=3)) == [[0, 1]]
    assert list(split_columns([4], limit=80)) == [[0]]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(10, 120))
def test_split_table_shows_every_column_once(widths, limit):
    found = list(split_columns(widths, limit=limit))
    assert [place for piece in found for place in piece[2:]] == list(range(2, len(widths)))
    for piece in found:
        assert len(piece) <= 3 or sum(widths[place] + 2 for place in piece) - 2 <= limit


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [40, 80, 200])
def test_terminal_table_fits_its_width(monkeypatch, width):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    row = ("main", "20", *(f"cell{place}" for place in range(10)), "[red]long[/red] " * 5)
    print_table(Table(title="t", header=tuple(f"h{place}" for place in range(13)), rows=(row,)))
    shown = terminal.getvalue()
    plain = [line.replace("\x1b[1m", "").replace("\x1b[0m", "").replace("\x1b[1;4m", "") for line in shown.splitlines()]
    assert max(map(len, plain)) <= width
    assert all(f"cell{place}" in shown for place in range(10))
    assert "[red]" in shown
