"""Tables on stdout: on a terminal split by columns to fit its width, elsewhere aligned plain text, never cut.

Cells are data: their control characters are spelled out and markup in them means nothing.
"""

import re
import sys
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from npo_cli.cli.terminal import is_terminal, print_data, escape_for_terminal
from npo_cli.report.cells import Table

COLUMN_GAP = 2
NUM_KEY_COLUMNS = 2
"""Columns that say which row it is: repeated where a table is split."""
_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?( ?([kMG]?B|[%x]))?( \[.*\])?|nan|-?inf")


def print_table(table: Table) -> None:
    """In colour and fitted to the width on a terminal, else as `plain_table`."""
    if not is_terminal(sys.stdout):
        print_data(format_table(table))
        return
    console = Console(highlight=False)
    console.print(Text(escape_for_terminal(table.title), style="bold underline"))
    columns = _columns(table)
    for places in split_columns([width for *_, width in columns], limit=console.width):
        console.print(_drawn([columns[place] for place in places]))
        console.print()
    for note in table.notes:
        console.print(Text(escape_for_terminal(note), style="dim"))
    console.print()


def format_table(table: Table) -> str:
    """Title, aligned columns, notes; numbers to the right."""
    columns = [_padded(cells, right=right, width=width) for cells, right, width in _columns(table)]
    rows = ((" " * COLUMN_GAP).join(row).rstrip() for row in zip(*columns, strict=True))
    return "\n".join([escape_for_terminal(table.title), *rows, *map(escape_for_terminal, table.notes), ""])


def split_columns(widths: Sequence[int], *, limit: int) -> Iterator[list[int]]:
    """Columns by place, in groups that fit side by side; every group begins with the key columns.

    A column that is too wide even alone with the keys makes its own group.
    """
    keys = list(range(min(NUM_KEY_COLUMNS, len(widths))))
    piece = list(keys)
    for place in range(len(keys), len(widths)):
        if len(piece) > len(keys) and sum(widths[one] + COLUMN_GAP for one in [*piece, place]) - COLUMN_GAP > limit:
            yield piece
            piece = list(keys)
        piece.append(place)
    yield piece


def _columns(table: Table) -> list[tuple[list[str], bool, int]]:
    """Of each column: its visible cells with the heading first, whether it holds numbers, its width."""
    found = []
    for column in zip(table.header, *table.rows, strict=True):
        cells = [escape_for_terminal(cell) for cell in column]
        found.append((cells, _numeric(cells[1:]), max(map(cell_len, cells))))
    return found


def _padded(cells: Sequence[str], *, right: bool, width: int) -> list[str]:
    pads = [" " * (width - cell_len(cell)) for cell in cells]
    return [pad + cell if right else cell + pad for cell, pad in zip(cells, pads, strict=True)]


def _drawn(columns: Sequence[tuple[list[str], bool, int]]) -> RichTable:
    drawn = RichTable(box=None, pad_edge=False, padding=(0, COLUMN_GAP, 0, 0), header_style="bold")
    for cells, right, width in columns:
        fixed = width if width <= 24 else None
        drawn.add_column(Text(cells[0]), justify="right" if right else "left", overflow="fold", min_width=fixed)
    for row in zip(*(cells[1:] for cells, *_ in columns), strict=True):
        drawn.add_row(*map(Text, row))
    return drawn


def _numeric(cells: Sequence[str]) -> bool:
    """A column whose every filled cell is a number, perhaps with a unit or an interval."""
    filled = [cell for cell in cells if cell not in ("", "-", "not reached")]
    return bool(filled) and all(_NUMBER.fullmatch(cell) for cell in filled)
