"""What a training run yields, shown by trackers as well. Every record passes through unchanged.

A step that was on record before is not shown again. A tracker that fails is told of once and left out from then on:
nothing that it does ends a run.

tensorboard, wandb and trackio behind one small interface.

A branch is a run of its own, in the group of its run directory. The only file that knows them. It does not know what a
step is: numbers come in under their names.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from npo_cli.config.loading import recipe_to_dict
from npo_cli.config.recipe import Recipe
from npo_cli.distributed.process_group import current_group
from npo_cli.errors import NpoError
from npo_cli.storage.layout import RUN_INFO_FILE, RunDir
from npo_cli.storage.lineage import find_first_segment, list_branches
from npo_cli.storage.metrics import read_metrics
from npo_cli.storage.sample_store import read_evals
from npo_cli.types.autonpo import Transition
from npo_cli.types.rollouts import EvalReport, Notice, StepReport


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackerRun:
    """What a tracker calls a branch."""

    project: str
    group: str
    """Name of the run directory."""
    branch: str
    key: str
    """Run id and branch: the same after a resume."""
    config: Mapping[str, Any]
    """The recipe in force, and where the branch left its parent."""
    folder: Path
    """Where files of the tracker go."""


class Tracker(Protocol):
    """One branch, shown somewhere."""

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Numbers of one step."""

    def close(self) -> None:
        """Nothing more will come."""


class TensorboardTracker:
    """Event files in `RUN/tensorboard/BRANCH`."""

    def __init__(self, shown: TrackerRun) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(str(shown.folder / "tensorboard" / shown.branch))

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Written through at once: a killed run has shown what it did."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbTracker:
    """A run at wandb, or under `RUN/wandb` with WANDB_MODE=offline."""

    def __init__(self, shown: TrackerRun) -> None:
        import wandb

        self._run = wandb.init(
            project=shown.project,
            group=shown.group,
            name=f"{shown.group}:{shown.branch}",
            id=shown.key,
            resume="allow",
            config=dict(shown.config),
            dir=str(shown.folder),
            settings=wandb.Settings(silent=True),
        )

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """wandb drops steps that lie behind."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


class TrackioTracker:
    """A run in trackio's local store (TRACKIO_DIR)."""

    def __init__(self, shown: TrackerRun) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(
            project=shown.project,
            name=f"{shown.group}:{shown.branch}-{shown.key[:8]}",
            group=shown.group,
            config=dict(shown.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
        )

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Into the store."""
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is left."""
        self._trackio.finish()


TRACKERS: Mapping[str, Callable[[TrackerRun], Tracker]] = {
    "tensorboard": TensorboardTracker,
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
}


def validate_trackers_installed(names: tuple[str, ...]) -> None:
    """A tracker that is not installed is told before anything begins."""
    for name in names:
        found = find_spec(name)
        # A folder of that name, which wandb itself leaves, passes for a package without a file.
        if found is None or found.origin is None:
            raise NpoError(
                f"tracking.report_to names {name}, which is not installed",
                f"pip install {name}   # or tracking.report_to=[]",
            )


EVAL_FIELDS = ("accuracy", "accuracy_low", "accuracy_high", "pass_at_k", "mean_length", "truncated_fraction")


def track_records(root: Path, recipe: Recipe, records: Generator[Any, None, None]) -> Generator[Any, None, None]:
    """The same records; `tracking.report_to` chooses who else sees them."""
    with closing(records):
        if not recipe.tracking.report_to or not current_group().is_main:
            yield from records
            return
        validate_trackers_installed(recipe.tracking.report_to)
        audience = BranchTrackers(root, recipe)
        try:
            for record in records:
                # Shown first: whoever stops at this record has seen it.
                yield from audience.log_record(record)
                yield record
        finally:
            audience.close()


class BranchTrackers:
    """The trackers of one command, each on the branch that was trained last."""

    def __init__(self, root: Path, recipe: Recipe) -> None:
        self.run, self.recipe = RunDir(root), recipe
        self.names = list(recipe.tracking.report_to)
        self.branch: str | None = None
        self.open: dict[str, Tracker] = {}
        self.shown = _on_record(self.run)

    def log_record(self, record: object) -> Iterator[Notice]:
        """Show a record's numbers, if it has any that were not shown before."""
        told = _numbers(record)
        if told is None:
            return
        kind, branch, step, values = told
        if (kind, branch, step) in self.shown:
            return
        yield from self.switch_branch(branch)
        for name, tracker in list(self.open.items()):
            try:
                tracker.log(values, step=step)
            except Exception as error:  # whatever a foreign program dies of
                yield self.drop_tracker(name, error)

    def switch_branch(self, branch: str) -> Iterator[Notice]:
        """Another branch is another run of each tracker."""
        if branch == self.branch:
            return
        self.close()
        self.branch = branch
        shown = _shown(self.run, self.recipe, branch)
        for name in list(self.names):
            try:
                self.open[name] = TRACKERS[name](shown)
            except Exception as error:  # no network, no account, no room
                yield self.drop_tracker(name, error)

    def drop_tracker(self, name: str, error: Exception) -> Notice:
        """Once is enough."""
        self.names.remove(name)
        self.open.pop(name, None)
        first = next(iter(str(error).splitlines()), "")
        return Notice(
            message=f"{name} failed and shows nothing more of this run ({type(error).__name__}: {first}); "
            "training goes on, and its own files are whole",
            level="warning",
        )

    def close(self) -> None:
        """Close every tracker; one that cannot be closed has nothing to say that counts."""
        for tracker in self.open.values():
            try:
                tracker.close()
            except Exception:
                continue
        self.open, self.branch = {}, None


def _on_record(run: RunDir) -> set[tuple[str, str, int]]:
    """Steps and evaluations that an earlier command made: executed again after a kill, they were shown already."""
    if not (run.root / RUN_INFO_FILE).exists():
        return set()
    steps = {("step", branch, row["step"]) for branch in list_branches(run) for row in read_metrics(run, branch)}
    return steps | {("eval", report.branch, report.step) for report in read_evals(run)}


def _numbers(record: object) -> tuple[str, str, int, Mapping[str, float]] | None:
    """Kind, branch, step and what to show of a record; None of one that is no measurement."""
    match record:
        case StepReport():
            return "step", record.branch, record.step, _finite({**record.metrics, **_timed(record.timings)})
        case EvalReport():
            values = {f"eval/{name}": getattr(record, name) for name in EVAL_FIELDS}
            return "eval", record.branch, record.step, _finite(values)
        case Transition():
            return record.event, record.state.branch, record.step, {f"autonpo/{record.event}": 1.0}
        case _:
            return None


def _timed(timings: Mapping[str, float]) -> dict[str, float]:
    return {f"time/{name}": value for name, value in timings.items()}


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def _shown(run: RunDir, recipe: Recipe, branch: str) -> TrackerRun:
    born = find_first_segment(run, branch)
    fork = {
        "parent": born.parent,
        "fork_step": born.fork_step,
        "guide_cache": born.guide_cache,
        "guide_until": born.guide_until,
    }
    return TrackerRun(
        project=recipe.tracking.project,
        group=run.root.resolve().name,
        branch=branch,
        key=f"{run.run_id[:8]}-{branch}",
        config={**recipe_to_dict(recipe), "branch": branch, **fork},
        folder=run.root,
    )
