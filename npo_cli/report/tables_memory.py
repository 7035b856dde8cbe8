"""What a run needs, as tables: each need with the product behind it, a verdict a place, and what each knob would do."""

from collections.abc import Sequence

from npo_cli.report.table import Table, format_bytes
from npo_cli.types.memory import Allocation, PeakUsage, SettingChange


def allocations_tables(needs: Sequence[Allocation]) -> tuple[Table, ...]:
    """One row a need; a GPU's are of each GPU, a host's of each machine."""
    rows = tuple((one.location, one.phase, one.label, format_bytes(one.num_bytes), one.formula) for one in needs)
    note = "gpu: each one that trains; engine gpu: each one of a server; host: each machine; disk: the whole run"
    return (
        Table(title="Where the bytes go", header=("where", "when", "what", "size", "how"), rows=rows, notes=(note,)),
    )


def peak_usage_tables(verdicts: Sequence[PeakUsage]) -> tuple[Table, ...]:
    """The peak of each place beside its limit."""
    rows = tuple(
        (
            *(one.location, format_bytes(one.num_bytes), one.peak_phase),
            *("-" if one.limit_bytes is None else format_bytes(one.limit_bytes), "yes" if one.fits else "NO"),
        )
        for one in verdicts
    )
    return (Table(title="Does it fit", header=("where", "needs", "peak in", "there is", "fits"), rows=rows),)


def setting_changes_tables(knobs: Sequence[SettingChange]) -> tuple[Table, ...]:
    """Each setting alone."""
    rows = tuple((one.location, one.setting, format_bytes(one.num_bytes), "yes" if one.fits else "no") for one in knobs)
    return (Table(title="What would help, alone", header=("where", "setting", "needs", "fits"), rows=rows),)


PLAN_TABLES = {Allocation: allocations_tables, PeakUsage: peak_usage_tables, SettingChange: setting_changes_tables}
