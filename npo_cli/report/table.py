"""A table of text, and how a number becomes a cell.

Absent values are `-`. Sizes are in powers of 1000. An interval is printed `value [low, high]`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A heading, rows of cells, and what a reader must know to read them."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def format_number(value: float | None, *, digits: int = 3) -> str:
    """Fixed digits below 10 000, three significant ones above; `-` for None."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.3g}"


def format_count(value: int | None, *, absent: str = "-") -> str:
    """A whole number with thousands apart."""
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
    """The table without the columns in which no row says anything."""
    kept = [place for place in range(len(table.header)) if any(row[place] not in ("", "-") for row in table.rows)]
    return Table(
        title=table.title,
        header=tuple(table.header[place] for place in kept),
        rows=tuple(tuple(row[place] for place in kept) for row in table.rows),
        notes=table.notes,
    )
