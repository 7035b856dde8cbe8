"""Tables of text from records: a column is a heading and how a record becomes a cell.

Absent values are `-`. Sizes are in powers of 1000. An interval is printed `value [low, high]`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A title, rows of cells, and notes on how to read them."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table of records."""

    heading: str
    cell: Callable[[Any], str]


def build_table(
    title: str,
    records: Sequence[Any],
    columns: Sequence[Column],
    *,
    notes: Sequence[str] = (),
    drops_empty: bool = False,
) -> Table:
    """One row per record. `drops_empty` leaves out columns in which every cell is empty or `-`."""
    rows = tuple(tuple(column.cell(record) for column in columns) for record in records)
    table = Table(title=title, header=tuple(column.heading for column in columns), rows=rows, notes=tuple(notes))
    return drop_empty_columns(table) if drops_empty else table


def text_column(heading: str, name: str | None = None) -> Column:
    """The attribute `name` (by default the heading) as text."""
    return Column(heading, lambda record: _text(getattr(record, name or heading)))


def _text(value: object) -> str:
    return "-" if value is None or value == "" else str(value)


def count_column(heading: str, name: str | None = None, *, hides_zero: bool = False) -> Column:
    """A whole number; `hides_zero` prints 0 as absent."""

    def cell(record: Any) -> str:
        value = getattr(record, name or heading)
        return format_count(None if hides_zero and not value else value)

    return Column(heading, cell)


def number_column(heading: str, name: str | None = None, *, digits: int = 3) -> Column:
    """A number with fixed digits."""
    return Column(heading, lambda record: format_number(getattr(record, name or heading), digits=digits))


def interval_column(heading: str, name: str) -> Column:
    """The attributes `name`, `name_low` and `name_high`."""

    def cell(record: Any) -> str:
        value, low, high = (getattr(record, f"{name}{end}") for end in ("", "_low", "_high"))
        return format_number(value) if low is None or high is None else format_interval(value, low, high)

    return Column(heading, cell)


def bool_column(heading: str, name: str, *, yes: str = "yes", no: str = "NO") -> Column:
    """A yes or no."""
    return Column(heading, lambda record: yes if getattr(record, name) else no)


def format_number(value: float | None, *, digits: int = 3) -> str:
    """Fixed digits below 10 000, three significant ones above; `-` for None."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.3g}"


def format_count(value: int | None, *, absent: str = "-") -> str:
    """A whole number with thousands separators."""
    return absent if value is None else f"{value:,}"


def format_interval(value: float, low: float, high: float) -> str:
    """`0.500 [0.400, 0.600]`."""
    return f"{format_number(value)} [{format_number(low)}, {format_number(high)}]"


def format_bytes(num_bytes: float) -> str:
    """Bytes in the largest unit of 1000 that leaves at least 1: `1.1 MB`."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def drop_empty_columns(table: Table) -> Table:
    """The table without the columns in which every cell is empty or `-`."""
    kept = [index for index in range(len(table.header)) if any(row[index] not in ("", "-") for row in table.rows)]
    return Table(
        title=table.title,
        header=tuple(table.header[index] for index in kept),
        rows=tuple(tuple(row[index] for index in kept) for row in table.rows),
        notes=table.notes,
    )
