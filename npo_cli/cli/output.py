"""Prints records: data on stdout, as tables or as JSON lines; progress and notices on stderr.

On a terminal, tables are split by columns to fit its width and progress is shown as bars; elsewhere tables are aligned
plain text, never cut, and progress is a line every few seconds. Cells are data: control characters are escaped, and
markup is not interpreted.
"""

import contextlib
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from npo_cli.activity import Listener, listen
from npo_cli.api.results import save_results, to_named_row
from npo_cli.api.stages import RecordStream
from npo_cli.cli.progress import open_progress
from npo_cli.cli.terminal import (
    COMMAND_LINE,
    escape_for_terminal,
    has_color,
    is_terminal,
    open_console,
    print_data,
    print_notice,
    terminal_width,
)
from npo_cli.report.table import Table
from npo_cli.types.rollouts import Notice, Progress, StepReport
from npo_cli.types.views import Conclusion

COLUMN_GAP = 2
UNLIMITED = 10_000
"""Width of a pipe that has colors."""
SENTENCE_WIDTH = 80
NUM_KEY_COLUMNS = 2
"""Columns that identify a row: repeated when a table is split."""
_NUMBER = re.compile(r"[-+~]?[\d.,]+(e[-+]?\d+)?( ?([kMG]?B|[%x]))?( \[.*\])?|nan|-?inf")


def print_records(
    records: Iterable[Any],
    *,
    as_json: bool,
    num_steps: int | None = None,
    tables: Collection[type] | None = None,
    full: bool = False,
    conclude: Callable[[Sequence[Any]], Conclusion] | None = None,
    out: Path | None = None,
    saved_as: type = object,
) -> None:
    """Print notices and progress as they come; data as JSON lines as they come, or as tables at the end.

    The conclusion is the last JSON line; as text its sentence comes before the tables and its command after them. It is
    among the records, or `conclude` makes it of them. `full`: tables with every column and row. `tables`: the kinds of
    records that have tables; None: all.

    Progress is shown for generators only: the steps in a list are not work in progress. `num_steps` is the last step of
    the training, if known: it gives the time left. `out`: a file for the records; a .csv has those of the kind
    `saved_as`.
    """
    from npo_cli.report.short_tables import SHORT_TABLES
    from npo_cli.report.tables import TABLES

    every: list[Any] = []
    with contextlib.ExitStack() as stack:
        display = None
        if isinstance(records, Generator):
            # On a closed pipe or a signal, closing the generator runs its clean-up.
            stack.enter_context(contextlib.closing(records))
            has_bars = is_terminal(sys.stderr) and not (as_json and is_terminal(sys.stdout))
            display = stack.enter_context(open_progress(bars=has_bars, num_steps=num_steps))
            stack.enter_context(hear_activities(records, display.hear))
        for record in records:
            if display is not None and isinstance(record, Progress | Notice | StepReport):
                display.show(record)
            if isinstance(record, Notice) and not isinstance(records, RecordStream):
                from npo_cli.storage.text_log import log_message

                log_message(record.message, level=record.level)
            if not isinstance(record, Progress | Notice):
                every.append(record)
                if as_json and not isinstance(record, Conclusion):
                    print_data(to_json_line(record))
    if out is not None:
        save_results((one for one in every if not isinstance(one, Conclusion)), out, of=saved_as)
        print_notice(escape_for_terminal(f"results: {out}"))
    conclusion = conclude(every) if conclude else next((one for one in every if isinstance(one, Conclusion)), None)
    if as_json:
        _print_end((), conclusion, as_json=True)
        return
    makers = TABLES if full else SHORT_TABLES
    groups = (
        (kind, [one for one in every if type(one) is kind]) for kind in makers if tables is None or kind in tables
    )
    found = [table for kind, group in groups if group for table in makers[kind](group)]
    _print_end(found, conclusion, as_json=False)


def _print_end(tables: Sequence[Table], conclusion: Conclusion | None, *, as_json: bool) -> None:
    """The sentence, the tables, the next command."""
    if conclusion and as_json:
        print_data(to_json_line(conclusion))
        return
    if conclusion:
        print_sentence(conclusion.sentence)
    for table in tables:
        print_table(table)
    if conclusion and conclusion.next:
        print_data(f"next: {escape_for_terminal(conclusion.next)}")


def print_plan(works: Iterable[Any], *, as_json: bool) -> None:
    """What --dry-run found: the sum, the parts, and the same command without --dry-run."""
    from npo_cli.report.conclusions import conclude_dry_run

    print_records(works, as_json=as_json, conclude=partial(conclude_dry_run, COMMAND_LINE.get()))


def print_conclusion(conclusion: Conclusion, *, as_json: bool) -> None:
    """The conclusion of a command without tables."""
    if as_json:
        print_data(to_json_line(conclusion))
        return
    for line in textwrap.wrap(escape_for_terminal(conclusion.sentence), width=SENTENCE_WIDTH):
        print_data(line)
    if conclusion.next:
        print_data(f"next: {escape_for_terminal(conclusion.next)}")


def print_sentence(text: str) -> None:
    """A sentence in lines of at most 80 characters, or as wide as the terminal, and an empty line."""
    on_terminal = is_terminal(sys.stdout)
    width = min(SENTENCE_WIDTH, terminal_width(sys.stdout) or SENTENCE_WIDTH)
    is_bold = on_terminal and not os.environ.get("NO_COLOR")
    for line in textwrap.wrap(escape_for_terminal(text), width=width):
        print_data(f"\x1b[1m{line}\x1b[0m" if is_bold else line)
    print_data("")


@contextlib.contextmanager
def hear_activities(records: Generator[Any, None, None], listener: Listener) -> Iterator[None]:
    """Send what happens inside the steps to the listener; a stage's stream computes in a context of its own."""
    (records.listen if isinstance(records, RecordStream) else listen)(listener)
    try:
        yield
    finally:
        listen(None)


def to_json_line(record: Any) -> str:
    """A record as one JSON object with the name of its type in `record`.

    A step's metrics and timings are keys beside branch and step; a transition has the branch and phase of its state.
    """
    return json.dumps(to_named_row(record), allow_nan=False)


def print_table(table: Table) -> None:
    """On a terminal in color and fitted to its width, else as `format_table`."""
    if not has_color(sys.stdout) and not is_terminal(sys.stdout):
        print_data(format_table(table))
        return
    from rich.text import Text

    console = open_console(width=None if is_terminal(sys.stdout) else UNLIMITED)
    console.print(Text(escape_for_terminal(table.title), style="bold underline"))
    columns = _measure_columns(table)
    groups = list(split_columns([width for *_, width in columns], limit=console.width))
    for number, indices in enumerate(groups):
        if number:
            console.print()
        console.print(_to_rich([columns[index] for index in indices]))
    for note in table.notes:
        console.print(Text(escape_for_terminal(note), style="dim"))
    console.print()


def format_table(table: Table) -> str:
    """Title, aligned columns, notes; numbers right-aligned."""
    columns = [_pad(cells, right=right, width=width) for cells, right, width in _measure_columns(table)]
    rows = ((" " * COLUMN_GAP).join(row).rstrip() for row in zip(*columns, strict=True))
    return "\n".join([escape_for_terminal(table.title), *rows, *map(escape_for_terminal, table.notes), ""])


def split_columns(widths: Sequence[int], *, limit: int) -> Iterator[list[int]]:
    """Column indices in groups that fit into `limit`; every group begins with the key columns.

    A column that does not fit beside the key columns has a group of its own.
    """
    keys = list(range(min(NUM_KEY_COLUMNS, len(widths))))
    group = list(keys)
    for index in range(len(keys), len(widths)):
        if len(group) > len(keys) and sum(widths[i] + COLUMN_GAP for i in [*group, index]) - COLUMN_GAP > limit:
            yield group
            group = list(keys)
        group.append(index)
    yield group


def _measure_columns(table: Table) -> list[tuple[list[str], bool, int]]:
    """Per column: its cells with the header first, whether it is right-aligned, its width."""
    from rich.cells import cell_len

    columns = []
    for column in zip(table.header, *table.rows, strict=True):
        cells = [escape_for_terminal(cell) for cell in column]
        columns.append((cells, _is_numeric(cells[1:]), max(map(cell_len, cells))))
    return columns


def _pad(cells: Sequence[str], *, right: bool, width: int) -> list[str]:
    from rich.cells import cell_len

    pads = [" " * (width - cell_len(cell)) for cell in cells]
    return [pad + cell if right else cell + pad for cell, pad in zip(cells, pads, strict=True)]


def _to_rich(columns: Sequence[tuple[list[str], bool, int]]) -> Any:
    from rich.table import Table as RichTable
    from rich.text import Text

    rich_table = RichTable(box=None, pad_edge=False, padding=(0, COLUMN_GAP, 0, 0), header_style="bold")
    for cells, right, width in columns:
        fixed = width if width <= 24 else None
        rich_table.add_column(Text(cells[0]), justify="right" if right else "left", overflow="fold", min_width=fixed)
    for row in zip(*(cells[1:] for cells, *_ in columns), strict=True):
        rich_table.add_row(*map(Text, row))
    return rich_table


def _is_numeric(cells: Sequence[str]) -> bool:
    """Whether every filled cell is a number, possibly with a unit or an interval."""
    filled = [cell for cell in cells if cell not in ("", "-", "not reached")]
    return bool(filled) and all(_NUMBER.fullmatch(cell) for cell in filled)
