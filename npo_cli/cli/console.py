"""Draws streams of records: data on stdout, talk on stderr.

On a terminal long work shows bars; elsewhere a plain line now and then. `--json` turns every data record into
one JSON object a line, as it comes.
"""

import contextlib
import dataclasses
import json
import math
import re
import sys
from collections.abc import Generator, Iterable
from typing import Any

from npo_cli.auto_records import Transition
from npo_cli.cli.progress import open_progress
from npo_cli.cli.terminal import is_terminal, print_data
from npo_cli.records import Notice, Progress, StepReport


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
    from npo_cli.cli.drawing import print_table
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
