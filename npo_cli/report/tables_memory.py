"""Tables of `npo plan`: each allocation with its formula, the peak per location, and what each setting would change."""

from collections.abc import Sequence

from npo_cli.report.table import Column, Table, bool_column, build_table, format_bytes, text_column
from npo_cli.types.memory import Allocation, PeakUsage, SettingChange

WHERE_NOTE = "gpu: each training GPU; engine gpu: each of a server; host: each machine."
SIZE = Column("size", lambda one: format_bytes(one.num_bytes))

WHAT = (text_column("where", "location"), text_column("phase"), text_column("what", "label"), SIZE)


def allocations_tables(allocations: Sequence[Allocation]) -> tuple[Table, ...]:
    """One row per allocation; of a GPU or a machine: of each one."""
    return (build_table("Memory and disk", allocations, (*WHAT, text_column("formula")), notes=(WHERE_NOTE,)),)


def short_allocations_tables(allocations: Sequence[Allocation]) -> tuple[Table, ...]:
    """The same without the formulas."""
    notes = (WHERE_NOTE, "uncounted: a tenth of what is counted. --full adds the formulas.")
    return (build_table("Memory and disk", allocations, WHAT, notes=notes),)


def peak_usage_tables(peaks: Sequence[PeakUsage]) -> tuple[Table, ...]:
    """The peak of each location beside its limit."""
    columns = (
        *(text_column("where", "location"), SIZE, text_column("peak in", "peak_phase")),
        Column("limit", lambda one: "-" if one.limit_bytes is None else format_bytes(one.limit_bytes)),
        bool_column("fits", "fits"),
    )
    return (build_table("Peak usage", peaks, columns),)


def setting_changes_tables(changes: Sequence[SettingChange]) -> tuple[Table, ...]:
    """Each setting changed alone."""
    columns = (text_column("where", "location"), text_column("setting"), SIZE, bool_column("fits", "fits", no="no"))
    return (build_table("Settings that reduce it, one at a time", changes, columns),)


PLAN_TABLES = {Allocation: allocations_tables, PeakUsage: peak_usage_tables, SettingChange: setting_changes_tables}
