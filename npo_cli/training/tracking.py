"""Experiment trackers: tensorboard, wandb, trackio, and those of plug-ins (`npo_cli.registry.TRACKERS`).

`track_records` passes the records of a training run through and logs their numbers. A branch is one run of a tracker.
Steps that an earlier command logged are not logged again. A tracker that fails is dropped with one warning, and
training continues.
"""

import math
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from npo_cli.config.loading import recipe_to_dict
from npo_cli.config.recipe import Recipe
from npo_cli.distributed.process_group import current_group
from npo_cli.errors import NpoError
from npo_cli.registry import TRACKERS
from npo_cli.storage.evals import read_evals
from npo_cli.storage.layout import RUN_INFO_FILE, RunDir
from npo_cli.storage.lineage import find_first_segment, list_branches
from npo_cli.storage.metrics import read_metrics
from npo_cli.types.autonpo import Transition
from npo_cli.types.rollouts import EvalReport, Notice, StepReport

EVAL_FIELDS = ("accuracy", "accuracy_low", "accuracy_high", "pass_at_k", "mean_length", "truncated_fraction")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackerRun:
    """A branch as a tracker's run."""

    project: str
    group: str
    """Name of the run directory."""
    branch: str
    key: str
    """Run id and branch: the same after a resume."""
    config: Mapping[str, Any]
    """The recipe, and where the branch forked."""
    folder: Path
    """Where the tracker's files go."""


class Tracker:
    """Logs the numbers of one branch. Subclasses implement `__init__`, `log` and `close`."""

    name: ClassVar[str]
    """The value in `tracking.report_to`."""

    def __init__(self, run: TrackerRun) -> None:
        raise NotImplementedError

    @classmethod
    def validate(cls) -> None:
        """Raise `NpoError` if the tracker's package, which has its name, is not installed."""
        spec = find_spec(cls.name)
        # A folder of that name, such as wandb's own, is found as a package without a file.
        if spec is None or spec.origin is None:
            raise NpoError(
                f"tracking.report_to names {cls.name}, which is not installed",
                f"pip install {cls.name}   # or tracking.report_to=[]",
            )

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Log the numbers of one step."""
        raise NotImplementedError

    def close(self) -> None:
        """Write what is left."""


class TensorboardTracker(Tracker):
    """Event files in `RUN/tensorboard/BRANCH`."""

    name = "tensorboard"

    def __init__(self, run: TrackerRun) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(str(run.folder / "tensorboard" / run.branch))

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Write and flush, so that a killed run has logged its steps."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbTracker(Tracker):
    """A run at wandb, or under `RUN/wandb` with WANDB_MODE=offline."""

    name = "wandb"

    def __init__(self, run: TrackerRun) -> None:
        import wandb

        self._run = wandb.init(
            project=run.project,
            group=run.group,
            name=f"{run.group}:{run.branch}",
            id=run.key,
            resume="allow",
            config=dict(run.config),
            dir=str(run.folder),
            settings=wandb.Settings(silent=True),
        )

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Log; wandb ignores steps before the last one."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


class TrackioTracker(Tracker):
    """A run in trackio's local store (TRACKIO_DIR)."""

    name = "trackio"

    def __init__(self, run: TrackerRun) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(
            project=run.project,
            name=f"{run.group}:{run.branch}-{run.key[:8]}",
            group=run.group,
            config=dict(run.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
        )

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Log to the store."""
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is left."""
        self._trackio.finish()


def track_records(root: Path, recipe: Recipe, records: Generator[Any, None, None]) -> Generator[Any, None, None]:
    """The same records, logged to the trackers in `tracking.report_to`."""
    with closing(records):
        if not recipe.tracking.report_to or not current_group().is_main:
            yield from records
            return
        for name in recipe.tracking.report_to:
            TRACKERS.get(name).validate()
        trackers = BranchTrackers(root, recipe)
        try:
            for record in records:
                # Logged first: a consumer may stop at this record.
                yield from trackers.log_record(record)
                yield record
        finally:
            trackers.close()


class BranchTrackers:
    """The trackers of one command, on the branch that is being trained."""

    def __init__(self, root: Path, recipe: Recipe) -> None:
        self.run, self.recipe = RunDir(root), recipe
        self.names = list(recipe.tracking.report_to)
        self.branch: str | None = None
        self.trackers: dict[str, Tracker] = {}
        self.logged = _read_logged(self.run)

    def log_record(self, record: object) -> Iterator[Notice]:
        """Log a record's numbers, unless it has none or they were logged before."""
        numbers = _numbers(record)
        if numbers is None:
            return
        kind, branch, step, values = numbers
        if (kind, branch, step) in self.logged:
            return
        yield from self.switch_branch(branch)
        for name, tracker in list(self.trackers.items()):
            try:
                tracker.log(values, step=step)
            except Exception as error:  # trackers raise many kinds
                yield self.drop_tracker(name, error)

    def switch_branch(self, branch: str) -> Iterator[Notice]:
        """Close the trackers' runs and open those of another branch."""
        if branch == self.branch:
            return
        self.close()
        self.branch = branch
        run = _tracker_run(self.run, self.recipe, branch)
        for name in list(self.names):
            try:
                self.trackers[name] = TRACKERS.get(name)(run)
            except Exception as error:  # no network, no account, no space
                yield self.drop_tracker(name, error)

    def drop_tracker(self, name: str, error: Exception) -> Notice:
        """Stop using a tracker; the warning says why."""
        self.names.remove(name)
        self.trackers.pop(name, None)
        reason = next(iter(str(error).splitlines()), "")
        return Notice(
            message=f"{name} failed and is no longer used in this run ({type(error).__name__}: {reason}); training "
            "continues, and the run directory is complete",
            level="warning",
        )

    def close(self) -> None:
        """Close all trackers, ignoring errors."""
        for tracker in self.trackers.values():
            with suppress(Exception):
                tracker.close()
        self.trackers, self.branch = {}, None


def _read_logged(run: RunDir) -> set[tuple[str, str, int]]:
    """Steps and evaluations on disk, which an earlier command logged; after a kill some of them are executed again."""
    if not (run.root / RUN_INFO_FILE).exists():
        return set()
    steps = {("step", branch, row["step"]) for branch in list_branches(run) for row in read_metrics(run, branch)}
    return steps | {("eval", report.branch, report.step) for report in read_evals(run)}


def _numbers(record: object) -> tuple[str, str, int, Mapping[str, float]] | None:
    """Kind, branch, step and values of a record; None for a record without numbers."""
    match record:
        case StepReport():
            timings = {f"time/{name}": value for name, value in record.timings.items()}
            return "step", record.branch, record.step, _finite({**record.metrics, **timings})
        case EvalReport():
            values = {f"eval/{name}": getattr(record, name) for name in EVAL_FIELDS}
            return "eval", record.branch, record.step, _finite(values)
        case Transition():
            return record.event, record.state.branch, record.step, {f"autonpo/{record.event}": 1.0}
        case _:
            return None


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def _tracker_run(run: RunDir, recipe: Recipe, branch: str) -> TrackerRun:
    segment = find_first_segment(run, branch)
    fork = {name: getattr(segment, name) for name in ("parent", "fork_step", "guide_cache", "guide_until")}
    return TrackerRun(
        project=recipe.tracking.project,
        group=run.root.resolve().name,
        branch=branch,
        key=f"{run.run_id[:8]}-{branch}",
        config={**recipe_to_dict(recipe), "branch": branch, **fork},
        folder=run.root,
    )
