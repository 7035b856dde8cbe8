"""Bars on a terminal: one per unfinished part, and one for what happens inside a step. They leave no trace."""

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from npo_cli.activity import Activity
from npo_cli.cli.progress import GAP, Part, ProgressDisplay, Record, format_count
from npo_cli.cli.terminal import clear_loading, escape_for_terminal, wrap_words
from npo_cli.types.rollouts import Progress

BAR_WIDTH = 16
TIMES_WIDTH = len("elapsed 0:00, left 0:00")


class TimesColumn(ProgressColumn):
    """`elapsed 0:41, left 2:10`; the elapsed time runs on between two records."""

    def __init__(self, display: "BarDisplay") -> None:
        super().__init__(Column(no_wrap=True))
        self.display = display

    def render(self, task: Task) -> Text:
        """Empty for an activity, which has its rate instead."""
        part: Part | None = task.fields["part"]
        return Text(task.fields["rate"] if part is None else part.format_times(self.display.clock()))


class BarDisplay(ProgressDisplay):
    """Draws with rich; the bars begin with the first record or activity."""

    def __init__(self, *, num_steps: int | None = None) -> None:
        super().__init__(num_steps=num_steps)
        columns = (
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=BAR_WIDTH),
            TextColumn("{task.fields[count]}", markup=False, table_column=Column(no_wrap=True)),
            TimesColumn(self),
            TextColumn(
                "{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
            ),
        )
        # Without redirect_stdout=False rich would print stdout to the console of the bars, which is stderr.
        self.bars = rich.progress.Progress(
            *columns,
            console=Console(stderr=True, highlight=False),
            redirect_stdout=False,
            transient=True,
            expand=True,
        )
        self.tasks: dict[str, TaskID] = {}
        self.activity_task: TaskID | None = None

    def show(self, record: Record) -> None:
        """The bar of what happened inside the step ends with the step."""
        self._remove_activity()
        super().show(record)

    def write(self, line: str, *, style: str = "") -> None:
        """Above the bars."""
        self._start()
        for part in wrap_words(line, self.bars.console.width):
            self.bars.console.print(Text(part, style={"33": "yellow"}.get(style, "")), soft_wrap=True)

    def draw(self, part: Part, now: float, *, is_step: bool) -> None:
        """The part's bar; with --verbose a line per step."""
        self._start()
        if self.is_verbose and is_step:
            self.write(part.format_line(part.began))
        record = part.last
        name = escape_for_terminal(record.description)
        if record.description not in self.tasks:
            self.tasks[record.description] = self.bars.add_task(name, count="", note="", rate="", part=part)
        self.bars.update(
            self.tasks[record.description],
            completed=record.done,
            total=record.total or None,
            count=format_count(record.done, record.total),
            note=self._fit_note(record),
            part=part,
        )

    def draw_activity(self, activity: Activity, rate: str, now: float) -> None:
        """A second bar."""
        self._start()
        if self.activity_task is None:
            self.activity_task = self.bars.add_task("", count="", note="", rate="", part=None)
        self.bars.update(
            self.activity_task,
            description=f"  {activity.name}",
            completed=activity.done,
            total=activity.total or None,
            count=f"{activity.done}/{activity.total}" if activity.total else "",
            rate=rate,
        )

    def finish(self, part: Part, now: float) -> None:
        """The bar is replaced by a line."""
        task = self.tasks.pop(part.last.description, None)
        if task is not None:
            self.bars.remove_task(task)
        super().finish(part, now)

    def close(self) -> None:
        """Remove the bars."""
        super().close()
        self.bars.stop()

    def _start(self) -> None:
        if not self.bars.live.is_started:
            clear_loading()
            self.bars.start()

    def _remove_activity(self) -> None:
        if self.activity_task is not None:
            self.bars.remove_task(self.activity_task)
            self.activity_task = None

    def _fit_note(self, record: Progress) -> str:
        """The first items of the note, as many as fit beside the bar."""
        count = format_count(record.done, record.total)
        width = self.bars.console.width - len(record.description) - BAR_WIDTH - len(count) - TIMES_WIDTH - 4
        items = escape_for_terminal(record.note).split(GAP)
        while len(items) > 1 and len(GAP.join(items)) > width:
            items.pop()
        return GAP.join(items)
