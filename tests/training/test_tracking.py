"""Trackers in real runs: they log what is on disk, once; if one fails, training continues."""

import errno
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from npo_cli.autonpo.run import train_autonpo
from npo_cli.config.loading import recipe_from_dict
from npo_cli.errors import NpoError
from npo_cli.registry import TRACKERS
from npo_cli.storage.layout import open_run
from npo_cli.storage.metrics import read_metrics
from npo_cli.training.tracking import Tracker, TrackerRun, track_records
from npo_cli.training.train import train_run
from npo_cli.types.rollouts import Notice, StepReport
from tests.helpers.autonpo_runs import eager_recipe, transitions_of
from tests.helpers.runs import copy_run, start_resume, stop_after, tiny_recipe

TB = "tracking.report_to=[tensorboard]"


def training(root: Path, *overrides: str) -> Any:
    recipe = tiny_recipe(*overrides)
    return track_records(root, recipe, train_run(root, recipe))


def going_on(root: Path, *overrides: str, **options: Any) -> Any:
    recipe = recipe_from_dict(open_run(root).read_recipe("main"))
    return track_records(root, recipe, start_resume(root, *overrides, **options))


def warnings_in(records: Any) -> list[str]:
    return [one.message for one in records if isinstance(one, Notice) and one.level == "warning"]


def curve(root: Path, branch: str, tag: str) -> list[tuple[int, float]]:
    """What tensorboard itself reads back, with repeated steps."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    points = []
    for path in sorted((root / "tensorboard" / branch).iterdir()):
        for event in EventFileLoader(str(path)).Load():
            points += [(event.step, value.tensor.float_val[0]) for value in event.summary.value if value.tag == tag]
    return points


def recorded(root: Path, branch: str, name: str) -> list[tuple[int, float]]:
    rows = read_metrics(open_run(root), branch)
    return [(row["step"], pytest.approx(row[name])) for row in rows]


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Path:
    """Killed after step 3, with step 2 saved, and gone on with; then rolled back to step 2 once more."""
    pytest.importorskip("tensorboard")
    root = tmp_path_factory.mktemp("shown") / "run"
    stop_after(training(root, TB, "eval.every=2", "eval.samples_per_prompt=1"), 3)
    list(going_on(root))
    list(going_on(root, at=2, new_branch="again"))
    return root


def test_tracker_logs_each_step_once_even_after_a_kill(shown):
    assert curve(shown, "main", "reward") == recorded(shown, "main", "reward")
    assert [step for step, _ in curve(shown, "main", "time/seconds")] == [1, 2, 3, 4]


def test_tracker_logs_a_branch_as_its_own_run_from_the_fork(shown):
    assert curve(shown, "again", "entropy") == recorded(shown, "again", "entropy")
    assert [step for step, _ in curve(shown, "again", "entropy")] == [3, 4]


@pytest.mark.slow
def test_tracker_logs_autonpo_events_on_their_branch(tmp_path):
    recipe = eager_recipe(TB)
    list(track_records(tmp_path / "run", recipe, train_autonpo(tmp_path / "run", recipe)))
    for name in ("trigger", "rolled_back", "limit_reached"):
        moves = [move for move in transitions_of(tmp_path / "run") if move.event == name]
        assert moves
        for branch in {move.state.branch for move in moves}:
            steps = [(move.step, 1.0) for move in moves if move.state.branch == branch]
            assert curve(tmp_path / "run", branch, f"autonpo/{name}") == steps


def test_tracker_logs_evaluations_at_their_steps(shown):
    log = [json.loads(line) for line in (shown / "evals.jsonl").read_text().splitlines()]
    wanted = [(row["step"], pytest.approx(row["accuracy"])) for row in log if row["branch"] == "main"]
    assert [step for step, _ in wanted] == [0, 2, 4]
    assert curve(shown, "main", "eval/accuracy") == wanted


def test_tracker_that_fails_while_logging_gives_one_warning(tmp_path, monkeypatch):
    summary = pytest.importorskip("tensorboard.summary")
    write: Callable[..., None] = summary.Writer.add_scalar

    def full(self: object, tag: str, value: float, step: int) -> None:
        if step > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, tag, value, step)

    monkeypatch.setattr(summary.Writer, "add_scalar", full)
    (warning,) = warnings_in(training(tmp_path / "run", TB))
    assert warning.startswith("tensorboard failed and is no longer used in this run (OSError")
    assert [step for step, _ in recorded(tmp_path / "run", "main", "reward")] == [1, 2, 3, 4]
    assert [step for step, _ in curve(tmp_path / "run", "main", "reward")] == [1, 2]


def test_tracker_that_cannot_start_gives_one_warning(scout, tmp_path):
    pytest.importorskip("tensorboard")
    root = copy_run(scout, tmp_path / "run")
    (root / "tensorboard").write_text("in the way")
    records = list(track_records(root, tiny_recipe(TB), start_resume(root, at=2)))
    assert [said.partition(" failed")[0] for said in warnings_in(records)] == ["tensorboard"]
    assert [one.step for one in records if isinstance(one, StepReport)] == [3, 4]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_tracker_that_is_not_installed_is_refused_before_anything_is_written(tmp_path, monkeypatch, name):
    found = importlib.util.find_spec
    monkeypatch.setattr("npo_cli.training.tracking.find_spec", lambda wanted: None if wanted == name else found(wanted))
    with pytest.raises(NpoError, match=f"tracking.report_to names {name}, which is not installed") as refused:
        list(training(tmp_path / "run", f"tracking.report_to=[{name}]"))
    assert refused.value.hint.startswith(f"pip install {name}")
    assert not list(tmp_path.iterdir())


def test_run_without_trackers_has_no_tracker_files(tmp_path):
    list(training(tmp_path / "run", "train.num_steps=1"))
    assert not {"tensorboard", "wandb"} & {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.slow
def test_wandb_tracker_logs_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert warnings_in(training(tmp_path / "run", "tracking.report_to=[wandb]")) == []
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert b"frac_reward_zero_std" in file.read_bytes() or b"grad_norm" in file.read_bytes()


@pytest.mark.slow
def test_trackio_tracker_logs(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    assert warnings_in(training(tmp_path / "run", "tracking.report_to=[trackio]")) == []
    assert list((tmp_path / "trackio").rglob("npo*.db"))


class ListTracker(Tracker):
    """A whole tracker in one class."""

    name = "list"
    logged: ClassVar[list[tuple[str, int, float]]] = []

    def __init__(self, run: TrackerRun) -> None:
        self.branch = run.branch

    @classmethod
    def validate(cls) -> None:
        """Needs no package."""

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self.logged += [(self.branch, step, values["reward"])]


def test_tracker_from_a_plug_in_logs_every_step(tmp_path):
    ListTracker.logged.clear()
    with TRACKERS.registered(ListTracker):
        list(training(tmp_path / "run", "tracking.report_to=[list]", "train.num_steps=2"))
    expected = recorded(tmp_path / "run", "main", "reward")
    assert ListTracker.logged == [("main", step, reward) for step, reward in expected]


@pytest.mark.parametrize("name", TRACKERS.names())
def test_tracker_class_has_its_registered_name(name):
    assert issubclass(TRACKERS.get(name), Tracker)
    assert TRACKERS.get(name).name == name


def test_tracker_that_is_unknown_gets_the_nearest_name():
    with pytest.raises(NpoError, match=r"tracking\.report_to=wandbb is not a known tracker: did you mean wandb\?"):
        tiny_recipe("tracking.report_to=[wandbb]")
