"""The table of `--dry-run`: what a command would do, and what it would cost."""

from collections.abc import Sequence

from npo_cli.report.table import Column, Table, build_table, count_column, format_bytes, text_column
from npo_cli.types.views import PlannedWork


def planned_work_tables(works: Sequence[PlannedWork]) -> tuple[Table, ...]:
    """One row per part of the work; columns without an entry are left out."""
    columns = (
        *(text_column("part", "work"), text_column("steps"), count_column("steps", "num_steps")),
        *(count_column("prompts"), count_column("samples"), Column("tokens", _format_tokens)),
        Column("time", lambda one: _format_time(one.recorded_seconds)),
        Column("disk", lambda one: "-" if one.num_bytes is None else format_bytes(one.num_bytes)),
    )
    notes = ["samples, tokens, disk: upper bounds."]
    if any(one.recorded_tokens is not None for one in works):
        notes.append("~ and time: estimated from recorded steps.")
    return (build_table("Dry run", works, columns, notes=notes, drops_empty=True),)


def _format_tokens(work: PlannedWork) -> str:
    """The estimate where there is one, else the bound."""
    if work.recorded_tokens is not None:
        return f"~{work.recorded_tokens:,}"
    return "-" if work.max_tokens is None else f"{work.max_tokens:,}"


def _format_time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, hours = round(seconds / 60), round(seconds / 3600, 1)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{hours} h"


DRY_RUN_TABLES = {PlannedWork: planned_work_tables}
