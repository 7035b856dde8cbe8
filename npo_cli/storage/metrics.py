"""What a step leaves besides its rollouts: measurements, which the seed alone decides, wall clock, and events.

Wall clock: what sampling took, in timings.jsonl of a guide cache, a scoring or a probe, and what each step took.

A second is spent where it is spent: what was done again after a kill is there again. Work without such a file
(made by an npo that kept none) counts nothing.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from npo_cli.storage.files import damaged_file_error, now_utc
from npo_cli.storage.jsonl import AppendResult, JsonlLog
from npo_cli.storage.layout import RunDir
from npo_cli.types.rollouts import StepReport


def sampling_timings_path(folder: Path) -> Path:
    """One line a chunk that was sampled or scored."""
    return folder / "timings.jsonl"


def append_sampling_time(folder: Path, seconds: float, *, num_tokens: int) -> None:
    """Note how long a chunk took, and how many tokens were generated in that time (0: they were only scored)."""
    line = {"time": now_utc(), "seconds": seconds, "num_tokens": num_tokens}
    JsonlLog(sampling_timings_path(folder)).append(line)


def sum_sampling_seconds(folder: Path) -> float:
    """Everything noted in that folder; 0 where nothing was."""
    return sum(seconds for _, seconds in _lines(sampling_timings_path(folder)))


def read_step_seconds(run: RunDir, branch: str) -> dict[int, float]:
    """Seconds of each step of the branch; a step executed again after a kill has the sum."""
    spent: dict[int, float] = defaultdict(float)
    for step, seconds in _lines(run.timings_path(branch)):
        if step is not None:
            spent[step] += seconds
    return dict(spent)


def _lines(path: Path) -> list[tuple[int | None, float]]:
    """Step, where the line has one, and seconds of every line; a line without seconds took none."""
    found = []
    for number, row in enumerate(JsonlLog(path).iter_rows(), start=1):
        seconds = row.get("seconds", 0.0)
        if not isinstance(seconds, int | float):
            raise damaged_file_error(f"{path}, line {number}", f"seconds is {seconds!r}")
        found.append((row.get("step"), float(seconds)))
    return found


def encode_metrics(report: StepReport) -> dict[str, Any]:
    """The line of metrics.jsonl: step and branch, then every measurement under its own name."""
    return {"step": report.step, "branch": report.branch, **report.metrics}


def encode_timings(report: StepReport) -> dict[str, Any]:
    """The line of timings.jsonl. It has a time of day, so a step done again has a line of its own."""
    return {"step": report.step, "branch": report.branch, "time": now_utc(), **report.timings}


def read_metrics(run: RunDir, branch: str) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl, oldest first: each has its step."""
    path = run.metrics_path(branch)
    for number, row in enumerate(JsonlLog(path).iter_rows(), start=1):
        if not isinstance(row.get("step"), int):
            raise damaged_file_error(f"{path}, line {number}", "it has no step")
        yield row


def append_event(run: RunDir, kind: str, details: Mapping[str, Any]) -> None:
    """Note that something happened: `kind` is one word such as `resumed`, `differs`, `rolled_back`."""
    JsonlLog(run.events_path).append({"time": now_utc(), "kind": kind, **details})


def find_source_trainer(run: RunDir) -> str | None:
    """Who had trained the first branch of a run that was imported; None for a run of npo's own."""
    events = JsonlLog(run.events_path).iter_rows()
    return next((str(event.get("trainer")) for event in events if event.get("kind") == "imported"), None)


class StepLog:
    """metrics.jsonl and timings.jsonl of one branch, held open for a stretch of training."""

    def __init__(self, run: RunDir, branch: str) -> None:
        self.metrics = JsonlLog(run.metrics_path(branch))
        self.timings = JsonlLog(run.timings_path(branch))

    def write(self, report: StepReport) -> AppendResult:
        """Add one step. `differs`: the step was there with other measurements, which were kept."""
        self.timings.append(encode_timings(report))
        return self.metrics.append_once(encode_metrics(report))

    def sync(self) -> None:
        """Force both down to the disk."""
        self.metrics.sync()
        self.timings.sync()
