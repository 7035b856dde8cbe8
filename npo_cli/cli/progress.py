"""Long work on stderr: bars on a terminal, a plain line every few seconds elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from npo_cli.cli.terminal import escape_for_terminal, print_status
from npo_cli.types.rollouts import Notice, Progress, StepReport

ProgressCallback = Callable[[Progress | Notice | StepReport], None]

_SECONDS_BETWEEN_LINES = 5.0


@contextlib.contextmanager
def open_progress(*, bars: bool, num_steps: int | None = None) -> Iterator[ProgressCallback]:
    """Yield a function that shows one record. Steps are counted towards `num_steps` if it is known."""
    if bars:
        with _open_bars() as progress:
            yield lambda record: _show_in_bars(progress, to_progress(record, num_steps=num_steps))
    else:
        lines = PlainProgress()
        yield lambda record: lines.show(to_progress(record, num_steps=num_steps))


def to_progress(record: Progress | Notice | StepReport, *, num_steps: int | None) -> Progress | Notice:
    """A training step as progress with reward, entropy and tokens per second as its note; other records unchanged."""
    if not isinstance(record, StepReport):
        return record
    shown = (
        ("reward", record.metrics.get("reward"), "{:.3f}"),
        ("entropy", record.metrics.get("entropy"), "{:.3f}"),
        ("tok/s", record.timings.get("tokens_per_second"), "{:.0f}"),
    )
    note = "  ".join(f"{name} {form.format(value)}" for name, value, form in shown if value is not None)
    return Progress(description=f"training {record.branch}", done=record.step, total=num_steps or 0, note=note)


class PlainProgress:
    """One line for the first and last record of each description, and one every few seconds between."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started: dict[str, tuple[float, int]] = {}
        self._last_shown: dict[str, float] = {}

    def show(self, record: Progress | Notice) -> None:
        if isinstance(record, Notice):
            print_status(_format_notice(record))
            return
        now = self._clock()
        started, first = self._started.setdefault(record.description, (now, record.done))
        due = now - self._last_shown.get(record.description, -_SECONDS_BETWEEN_LINES) >= _SECONDS_BETWEEN_LINES
        if due or record.done == record.total:
            self._last_shown[record.description] = now
            left = format_time_left(record, seconds=now - started, num_done=record.done - first)
            print_status(
                "  ".join(
                    filter(
                        None,
                        [
                            f"{escape_for_terminal(record.description)} {_format_count(record)}",
                            escape_for_terminal(record.note),
                            left,
                        ],
                    )
                )
            )


def format_time_left(record: Progress, *, seconds: float, num_done: int) -> str:
    """`1:12 left` at the rate so far; empty if rate or total is unknown."""
    if num_done <= 0 or record.total <= record.done:
        return ""
    left = round(seconds / num_done * (record.total - record.done))
    hours, minutes = left // 3600, left // 60 % 60
    return f"{hours}:{minutes:02d}:{left % 60:02d} left" if hours else f"{minutes}:{left % 60:02d} left"


def _format_count(record: Progress) -> str:
    return f"{record.done}/{record.total}" if record.total else f"{record.done}"


def _format_notice(record: Notice) -> str:
    return f"{'warning: ' if record.level == 'warning' else ''}{escape_for_terminal(record.message)}"


@contextlib.contextmanager
def _open_bars() -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(compact=True),
    )
    # Without redirect_stdout=False rich would print stdout to the console of the bars, which is stderr.
    with Progress(*columns, console=Console(stderr=True, highlight=False), redirect_stdout=False) as bars:
        yield bars


def _show_in_bars(bars: Any, record: Progress | Notice) -> None:
    from rich.text import Text

    if isinstance(record, Notice):
        bars.console.print(Text(_format_notice(record), style="yellow" if record.level == "warning" else ""))
        return
    description = escape_for_terminal(record.description)
    task = next((task.id for task in bars.tasks if task.description == description), None)
    if task is None:
        task = bars.add_task(description, total=record.total or None, note="", completed=record.done)
    bars.update(task, completed=record.done, total=record.total or None, note=escape_for_terminal(record.note))
