"""Two processes do what one does: the same answers, the same curve, one run directory that either goes on from."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from npo_cli.storage.layout import RunDir
from tests.helpers.runs import TINY, copy_run, resume, train
from tests.helpers.torchrun import is_gone, launch_job, pid_of, run, wait_until
from tests.helpers.warm_process import num_lines

LAST = 20
NOISE = 1e-4
"""Sums in another order differ by about 1e-6 of a figure; those that measure rounding itself are 0 to within this."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alone") / "run"
    train(root, f"train.num_steps={LAST}", "train.save_every=10")
    return root


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("together")
    overrides = [*TINY, f"train.num_steps={LAST}", "train.save_every=10"]
    run("train", "micro", *overrides, "--run", str(home / "run"), log=home / "log")
    return home / "run"


@pytest.fixture(scope="module")
def onward(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The single process's run, four steps further."""
    root = copy_run(alone, tmp_path_factory.mktemp("onward") / "run")
    resume(root, f"train.num_steps={LAST + 4}")
    return root


def metrics(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RunDir(root).metrics_path("main").read_text().splitlines()]


def answers(root: Path) -> list[Any]:
    """Token ids and verdicts of every response, in the order written."""
    lines = map(json.loads, RunDir(root).rollouts_path("main").read_text().splitlines())
    return [(one["response_ids"], one["verdict"]) for line in lines for one in line["rollouts"]]


def checkpoint(root: Path, step: int) -> Path:
    return RunDir(root).checkpoint_folder("main", step)


def assert_same_curve(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.pop("branch") == theirs.pop("branch")
        assert ours == pytest.approx(theirs, rel=NOISE, abs=NOISE)


def test_two_processes_make_the_same_twenty_steps_as_one(alone, together):
    assert len(metrics(together)) == LAST
    assert answers(together) == answers(alone)
    assert_same_curve(metrics(together), metrics(alone))


def test_what_two_processes_save_is_what_one_saves_but_for_the_moments(alone, together):
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        # Before the first update there is no rounding: equal to the byte.
        assert (checkpoint(together, 0) / name).read_bytes() == (checkpoint(alone, 0) / name).read_bytes()
    anchor = checkpoint(together, LAST) / "training_state"
    signed = json.loads((anchor / "npo_training_state.json").read_text())["files"]
    shards = sorted(path.name for path in anchor.glob("shard-*.safetensors"))
    # One file a process, and the manifest speaks for each.
    assert len(shards) == 2
    assert set(shards) <= signed.keys()


def test_one_process_goes_on_from_what_two_saved(together, onward, tmp_path):
    root = copy_run(together, tmp_path / "run")
    resume(root, f"train.num_steps={LAST + 4}")
    assert_same_curve(metrics(root), metrics(onward))


def test_two_go_on_from_what_one_saved_and_a_killed_rank_ends_the_job(alone, onward, tmp_path):
    root, log = copy_run(alone, tmp_path / "run"), tmp_path / "log"
    more = ("train.num_steps=100000", "train.save_every=1000")
    with launch_job("resume", str(root), *more, log=log) as job:
        wait_until(lambda: num_lines(RunDir(root).metrics_path("main")) >= LAST + 4, job, log)
        ranks = [pid_of(job, 0), pid_of(job, 1)]
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        # torchrun gives 1 for whatever failed.
        assert job.wait(60) == 1
        # Far from the deadline of half an hour: a closed connection says it at once.
        assert time.monotonic() - killed < 60
        assert "error: rank 1 died in `" in log.read_text()
    assert all(map(is_gone, ranks))
    assert_same_curve(metrics(root)[: LAST + 4], metrics(onward))
    # Nothing was saved since step 20, and nothing hinders going on from there.
    assert resume(root, until=LAST + 1)[0].step == LAST + 1
