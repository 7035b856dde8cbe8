"""What a step leaves besides its rollouts: metrics, which the seed alone decides, wall clock, its costs, and events."""

from collections.abc import Iterator, Mapping
from typing import Any

from npo_cli.storage.costs import CostLine, costs_path, encode_cost
from npo_cli.storage.files import check_time, damaged_file_error, now_utc
from npo_cli.storage.jsonl import AppendResult, JsonlLog
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import ancestry
from npo_cli.storage.rollout_log import RolloutLog, open_rollouts
from npo_cli.types.rollouts import GroupOutcome, StepReport


def encode_metrics(report: StepReport) -> dict[str, Any]:
    """The line of metrics.jsonl: step and branch, then every metric under its own name."""
    return {"step": report.step, "branch": report.branch, **report.metrics}


def encode_timings(report: StepReport) -> dict[str, Any]:
    """The line of timings.jsonl. It has a time, so a step executed again has its own line."""
    return {"step": report.step, "branch": report.branch, "time": now_utc(), **report.timings}


def training_cost(report: StepReport, *, updates: int) -> CostLine:
    """The step's line of costs.jsonl."""
    tokens = int(report.metrics["tokens"])
    return CostLine(
        kind="train",
        branch=report.branch,
        step=report.step,
        updates=updates,
        tokens=tokens,
        forwards=int(report.metrics.get("forwards", tokens)),
        teacher_tokens=int(report.metrics.get("target/tokens", 0)),
        seconds=report.timings["seconds"],
    )


def read_metrics(run: RunDir, branch: str) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl, oldest first: each has its step, which is one more than that before it."""
    path, before = run.metrics_path(branch), None
    for number, row in enumerate(JsonlLog(path).iter_rows(), start=1):
        step = row.get("step")
        if not isinstance(step, int):
            raise damaged_file_error(f"{path}, line {number}", "it has no step")
        if before is not None and step != before + 1:
            raise damaged_file_error(f"{path}, line {number}", f"step {step} comes after step {before}")
        before = step
        yield row


def read_timings(run: RunDir, branch: str) -> Iterator[dict[str, Any]]:
    """The lines of timings.jsonl, oldest first, checked; a step executed again has several."""
    path = run.timings_path(branch)
    for number, row in enumerate(JsonlLog(path).iter_rows(), start=1):
        line = f"{path}, line {number}"
        check_time(row, "time", line)
        for name, value in row.items():
            if isinstance(value, int | float) and value < 0:
                raise damaged_file_error(line, f"{name} is {value!r}")
        yield row


def append_event(run: RunDir, kind: str, details: Mapping[str, Any]) -> None:
    """Append an event; `kind` is one word such as `resumed`, `differs`, `rolled_back`."""
    JsonlLog(run.events_path).append({"time": now_utc(), "kind": kind, **details})


def read_events(run: RunDir) -> Iterator[dict[str, Any]]:
    """Every event, oldest first, checked."""
    for number, event in enumerate(JsonlLog(run.events_path).iter_rows(), start=1):
        check_time(event, "time", f"{run.events_path}, line {number}")
        if not isinstance(event.get("kind"), str):
            raise damaged_file_error(f"{run.events_path}, line {number}", f"kind is {event.get('kind')!r}")
        yield event


def find_source_trainer(run: RunDir) -> str | None:
    """The trainer of an imported run's first branch; None for a run that npo trained."""
    return next((str(event.get("trainer")) for event in read_events(run) if event["kind"] == "imported"), None)


def list_trained_steps(run: RunDir, branch: str, log: RolloutLog) -> tuple[int, ...]:
    """Recorded steps of a branch, without those that train.staleness sampled ahead and that were not trained yet."""
    staleness = run.read_recipe(branch).get("train", {}).get("staleness", 0)
    trained = max((row["step"] for row in read_metrics(run, branch)), default=0) if staleness else None
    return tuple(step for step in log.steps() if trained is None or step <= trained)


def iter_outcomes(run: RunDir, branch: str, *, last_step: int | None = None) -> Iterator[GroupOutcome]:
    """Every trained group on the branch's line of descent, oldest first, up to `last_step` (None: all)."""
    for span in ancestry(run, branch):
        log = open_rollouts(run.rollouts_path(span.branch))
        for step in list_trained_steps(run, span.branch, log):
            if span.contains(step) and (last_step is None or step <= last_step):
                yield from log.iter_outcomes(step)


class StepLog:
    """metrics.jsonl and timings.jsonl of one branch and the run's costs.jsonl, held open while it is trained."""

    def __init__(self, run: RunDir, branch: str, *, updates_per_step: int) -> None:
        self.metrics = JsonlLog(run.metrics_path(branch))
        self.timings = JsonlLog(run.timings_path(branch))
        self.costs = JsonlLog(costs_path(run))
        self.updates_per_step = updates_per_step

    def write(self, report: StepReport) -> AppendResult:
        """Add one step. `differs`: the step was there with other metrics, which were kept."""
        self.timings.append(encode_timings(report))
        self.costs.append(encode_cost(training_cost(report, updates=self.updates_per_step)))
        return self.metrics.append_once(encode_metrics(report))

    def sync(self) -> None:
        """Force all of them down to the disk."""
        self.metrics.sync()
        self.timings.sync()
        self.costs.sync()
