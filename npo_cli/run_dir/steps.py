"""What a step leaves besides its rollouts: measurements, which the seed alone decides, wall clock, and events."""

from collections.abc import Iterator, Mapping
from typing import Any

from npo_cli.records import StepReport
from npo_cli.run_dir.files import damaged_file_error, now_utc
from npo_cli.run_dir.journal import JsonlLog, AppendResult
from npo_cli.run_dir.paths import RunDir


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
