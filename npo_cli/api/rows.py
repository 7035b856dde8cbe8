"""Records as rows: dicts with the keys that `--json` prints."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from npo_cli.types.autonpo import Transition
from npo_cli.types.rollouts import StepReport

Row = dict[str, Any]


def to_row(record: Any) -> Row:
    """A record as plain data: NaN and infinities, which JSON lacks, are None.

    A step's metrics and timings are keys beside branch and step; a transition has the branch and phase of its state.
    """
    values = dataclasses.asdict(record)
    if isinstance(record, StepReport):
        values = {"branch": record.branch, "step": record.step, **record.metrics, **record.timings}
    if isinstance(record, Transition):
        values = {"step": record.step, "branch": record.state.branch, "phase": record.state.phase, **values}
    return _to_json(values)


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _to_json(inner) for key, inner in value.items()}
    return [_to_json(inner) for inner in value] if isinstance(value, list | tuple) else value


def to_table(rows: Iterable[Row], *, columns: Iterable[str], as_list: bool) -> Any:
    """A pandas DataFrame, with these columns even if it has no row; a list of dicts if asked for or without pandas.

    Columns that only some rows have, such as `inject/...`, are filled with NaN.
    """
    rows = list(rows)
    if not as_list:
        try:
            import pandas
        except ModuleNotFoundError:
            return rows
        return pandas.DataFrame(rows, columns=None if rows else list(columns))
    return rows


def list_columns(kind: type) -> list[str]:
    """Column names of a kind of record."""
    return [field.name for field in dataclasses.fields(kind)]
