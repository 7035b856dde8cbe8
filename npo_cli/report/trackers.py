"""tensorboard, wandb and trackio behind one small interface.

A branch is a run of its own, in the group of its run directory. The only file that knows them. It does not know what a
step is: numbers come in under their names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from npo_cli.errors import NpoError


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
