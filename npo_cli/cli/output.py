"""Tables on stdout: on a terminal split by columns to fit its width, elsewhere aligned plain text, never cut.

Cells are data: their control characters are spelled out and markup in them means nothing.

Draws streams of records: data on stdout, talk on stderr.

On a terminal long work shows bars; elsewhere a plain line now and then. `--json` turns every data record into
one JSON object a line, as it comes.
"""

import contextlib
import dataclasses
import json
import math
import re
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from npo_cli.cli.progress import open_progress
from npo_cli.cli.terminal import escape_for_terminal, is_terminal, print_data
from npo_cli.report.table import Table
from npo_cli.types.autonpo import Transition
from npo_cli.types.rollouts import Notice, Progress, StepReport


def to_json_line(record: Any) -> str:
    """A record as one JSON object that names its kind; a step's metrics and timings stand beside branch and step.

    A move's branch and phase are said beside its step, and its whole state after them.
    """
    values = dataclasses.asdict(record)
    if isinstance(record, StepReport):
        values = {"branch": record.branch, "step": record.step, **record.metrics, **record.timings}
    if isinstance(record, Transition):
        values = {"step": record.step, "branch": record.state.branch, "phase": record.state.phase, **values}
    kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(record).__name__).lower()
    return json.dumps(_plain({"record": kind, **values}), allow_nan=False)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def print_records(records: Iterable[Any], *, as_json: bool, num_steps: int | None = None) -> None:
    """Show talk as it comes; data as JSON lines as they come, or as tables at the end.

    Only a generator is work in progress: the steps in a list were made long ago and move no bar.
    `num_steps` is the last step of the training behind the records, where one is known: it gives the time left.
    """
    from npo_cli.report.tables import TABLES

    data: dict[type, list[Any]] = {kind: [] for kind in TABLES}
    with contextlib.ExitStack() as stack:
        show = None
        if isinstance(records, Generator):
            # A closed pipe or a signal leaves the stage through its own clean-up.
            stack.enter_context(contextlib.closing(records))
            show = stack.enter_context(open_progress(bars=_room_for_bars(as_json=as_json), num_steps=num_steps))
        for record in records:
            if show and isinstance(record, Progress | Notice | StepReport):
                show(record)
            if as_json and not isinstance(record, Progress | Notice):
                print_data(to_json_line(record))
            elif type(record) in data:
                data[type(record)].append(record)
    for kind, some in data.items():
        for table in TABLES[kind](some) if some else ():
            print_table(table)


def _room_for_bars(*, as_json: bool) -> bool:
    """Bars need a terminal that no stream of JSON lines runs through."""
    return is_terminal(sys.stderr) and not (as_json and is_terminal(sys.stdout))


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
