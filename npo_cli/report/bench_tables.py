"""What the tuning of a comparison found, as a table."""

from collections.abc import Sequence

from npo_cli.report.cells import Table, format_number
from npo_cli.report.lines import TunedSetting


def tuning_tables(found: Sequence[TunedSetting]) -> tuple[Table, ...]:
    """One row a method, one column a setting of the grid."""
    settings = list(dict.fromkeys(setting for one in found for setting in one.areas))
    rows = tuple((one.method, *(format_number(one.areas.get(setting)) for setting in settings), one.setting) for one in found)
    note = "held-out accuracy averaged over the steps, means over the tuning seeds"
    return (Table(title="Settings chosen", header=("method", *settings, "chosen"), rows=rows, notes=(note,)),)
