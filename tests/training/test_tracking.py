"""Trackers beside a real run: what they were shown is what is on record, once; when they fail, training does not."""

import errno
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npo_cli.autonpo.run import train_autonpo
from npo_cli.config.loading import recipe_from_dict
from npo_cli.errors import NpoError
from npo_cli.storage.layout import open_run
from npo_cli.storage.metrics import read_metrics
from npo_cli.training.tracking import track_records
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


def test_each_step_is_shown_once_though_step_3_was_made_twice(shown):
    assert curve(shown, "main", "reward") == recorded(shown, "main", "reward")
    assert [step for step, _ in curve(shown, "main", "time/seconds")] == [1, 2, 3, 4]


def test_a_branch_is_a_run_of_its_own_from_its_fork_on(shown):
    assert curve(shown, "again", "entropy") == recorded(shown, "again", "entropy")
    assert [step for step, _ in curve(shown, "again", "entropy")] == [3, 4]


@pytest.mark.slow
def test_interventions_of_autonpo_are_events_on_the_branch_that_they_lead_to(tmp_path):
    recipe = eager_recipe(TB)
    list(track_records(tmp_path / "run", recipe, train_autonpo(tmp_path / "run", recipe)))
    for name in ("trigger", "rolled_back", "capped"):
        moves = [move for move in transitions_of(tmp_path / "run") if move.event == name]
        assert moves
        for branch in {move.state.branch for move in moves}:
            steps = [(move.step, 1.0) for move in moves if move.state.branch == branch]
            assert curve(tmp_path / "run", branch, f"autonpo/{name}") == steps


def test_evaluations_stand_at_their_steps(shown):
    journal = [json.loads(line) for line in (shown / "evals.jsonl").read_text().splitlines()]
    wanted = [(row["step"], pytest.approx(row["accuracy"])) for row in journal if row["branch"] == "main"]
    assert [step for step, _ in wanted] == [0, 2, 4]
    assert curve(shown, "main", "eval/accuracy") == wanted


def test_a_disk_that_fills_up_under_a_tracker_is_told_once_and_ends_nothing(tmp_path, monkeypatch):
    summary = pytest.importorskip("tensorboard.summary")
    write: Callable[..., None] = summary.Writer.add_scalar

    def full(self: object, tag: str, value: float, step: int) -> None:
        if step > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, tag, value, step)

    monkeypatch.setattr(summary.Writer, "add_scalar", full)
    told = warnings_in(training(tmp_path / "run", TB))
    assert [said.startswith("tensorboard failed and shows nothing more of this run (OSError") for said in told] == [
        True
    ]
    assert [step for step, _ in recorded(tmp_path / "run", "main", "reward")] == [1, 2, 3, 4]
    assert [step for step, _ in curve(tmp_path / "run", "main", "reward")] == [1, 2]


def test_a_tracker_that_cannot_begin_is_told_once_and_ends_nothing(scout, tmp_path):
    pytest.importorskip("tensorboard")
    root = copy_run(scout, tmp_path / "run")
    (root / "tensorboard").write_text("in the way")
    records = list(track_records(root, tiny_recipe(TB), start_resume(root, at=2)))
    assert [said.partition(" failed")[0] for said in warnings_in(records)] == ["tensorboard"]
    assert [one.step for one in records if isinstance(one, StepReport)] == [3, 4]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_made(tmp_path, monkeypatch, name):
    found = importlib.util.find_spec
    monkeypatch.setattr("npo_cli.training.tracking.find_spec", lambda wanted: None if wanted == name else found(wanted))
    with pytest.raises(NpoError, match=f"tracking.report_to names {name}, which is not installed") as refused:
        list(training(tmp_path / "run", f"tracking.report_to=[{name}]"))
    assert refused.value.hint.startswith(f"pip install {name}")
    assert not list(tmp_path.iterdir())


def test_without_trackers_nothing_is_added_to_a_run(tmp_path):
    list(training(tmp_path / "run", "train.num_steps=1"))
    assert not {"tensorboard", "wandb"} & {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.slow
def test_wandb_takes_the_same_figures_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert warnings_in(training(tmp_path / "run", "tracking.report_to=[wandb]")) == []
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert b"frac_reward_zero_std" in file.read_bytes() or b"grad_norm" in file.read_bytes()


@pytest.mark.slow
def test_trackio_takes_the_same_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    assert warnings_in(training(tmp_path / "run", "tracking.report_to=[trackio]")) == []
    assert list((tmp_path / "trackio").rglob("npo*.db"))
