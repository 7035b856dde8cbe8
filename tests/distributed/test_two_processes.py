"""Two processes equal one: the same rollouts, the same metrics, one run directory that either resumes."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from npo_cli.storage.checkpoints import TRAINING_STATE_FOLDER, TRAINING_STATE_MANIFEST
from npo_cli.storage.layout import RunDir
from tests.helpers.runs import TINY, copy_run, resume, train
from tests.helpers.torchrun import is_gone, launch_job, pid_of, run, wait_until
from tests.helpers.warm_process import num_lines

NUM_STEPS = 20
TOLERANCE = 1e-4
"""Sums in another order differ by about 1e-6 of a value; metrics that measure rounding itself are 0 within this."""


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("single") / "run"
    train(root, f"train.num_steps={NUM_STEPS}", "train.save_every=10")
    return root


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recipe in two processes, started as a user types it."""
    home = tmp_path_factory.mktemp("double")
    overrides = [*TINY, f"train.num_steps={NUM_STEPS}", "train.save_every=10"]
    run("train", "micro", str(home / "run"), *overrides, log=home / "log")
    return home / "run"


@pytest.fixture(scope="module")
def resumed(single: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The single process's run, four steps further."""
    root = copy_run(single, tmp_path_factory.mktemp("resumed") / "run")
    resume(root, f"train.num_steps={NUM_STEPS + 4}")
    return root


def metrics(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RunDir(root).metrics_path("main").read_text().splitlines()]


def responses(root: Path) -> list[Any]:
    """Token ids and verdicts of every response, in the order written."""
    lines = map(json.loads, RunDir(root).rollouts_path("main").read_text().splitlines())
    return [(one["response_ids"], one["verdict"]) for line in lines for one in line["rollouts"]]


def checkpoint(root: Path, step: int) -> Path:
    return RunDir(root).checkpoint_folder("main", step)


def assert_same_metrics(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.pop("branch") == theirs.pop("branch")
        assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE)


def test_two_processes_equal_one_over_twenty_steps(single: Path, double: Path):
    assert len(metrics(double)) == NUM_STEPS
    assert responses(double) == responses(single)
    assert_same_metrics(metrics(double), metrics(single))


def test_only_rank_0_prints_and_each_record_is_written_once(double: Path):
    log = (double.parent / "log").read_text()
    assert log.count("each step: ") == 1
    assert num_lines(RunDir(double).timings_path("main")) == NUM_STEPS
    assert num_lines(RunDir(double).segments_path) == 1


def test_checkpoint_of_two_processes_has_whole_weights_and_one_moment_file_per_rank(single: Path, double: Path):
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        # Before the first update there is no rounding: equal to the byte.
        assert (checkpoint(double, 0) / name).read_bytes() == (checkpoint(single, 0) / name).read_bytes()
    folder = checkpoint(double, NUM_STEPS) / TRAINING_STATE_FOLDER
    listed = json.loads((folder / TRAINING_STATE_MANIFEST).read_text())["files"]
    shards = sorted(path.name for path in folder.glob("shard-*.safetensors"))
    assert len(shards) == 2
    assert set(shards) <= listed.keys()


def test_one_process_resumes_a_run_of_two(double: Path, resumed: Path, tmp_path: Path):
    root = copy_run(double, tmp_path / "run")
    resume(root, f"train.num_steps={NUM_STEPS + 4}")
    assert_same_metrics(metrics(root), metrics(resumed))


@pytest.mark.slow
def test_two_processes_resume_a_run_of_one_and_a_killed_rank_ends_the_job(single: Path, resumed: Path, tmp_path: Path):
    root, log = copy_run(single, tmp_path / "run"), tmp_path / "log"
    more = ("train.num_steps=100000", "train.save_every=1000")
    with launch_job("resume", str(root), *more, log=log) as job:
        wait_until(lambda: num_lines(RunDir(root).metrics_path("main")) >= NUM_STEPS + 4, job, log)
        ranks = [pid_of(job, 0), pid_of(job, 1)]
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        # torchrun exits with 1 for any failure.
        assert job.wait(60) == 1
        # Far from the deadline of half an hour: a closed connection is noticed at once.
        assert time.monotonic() - killed < 60
        assert "error: rank 1 died in `" in log.read_text()
    assert all(map(is_gone, ranks))
    assert_same_metrics(metrics(root)[: NUM_STEPS + 4], metrics(resumed))
    # Nothing was saved since step 20, and the run can be resumed from there.
    assert resume(root, until=NUM_STEPS + 1)[0].step == NUM_STEPS + 1
