"""A run that was killed and resumed is, bit for bit, the run that was not."""

import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from npo_cli.rollout.batch import build_batch
from npo_cli.storage.jsonl import AppendResult
from npo_cli.storage.metrics import StepLog
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.training.train import train_run
from npo_cli.training.update import Updater
from npo_cli.types.rollouts import StepReport
from tests.helpers.runs import (
    LORA,
    TINY,
    copy_run,
    file_digests,
    open_session_at,
    reproducible_digests,
    resume,
    start_resume,
    stop_after,
    tiny_recipe,
    train,
)
from tests.helpers.warm_process import ForkServer, num_lines, wait_until

KINDS = {
    "plain": (),
    "two updates": ("train.num_updates=2",),
    "dynamic sampling": ("sampling.dynamic=true", "sampling.max_gen_batches=3"),
    "kl to the base": ("loss.kl_coef=0.05",),
    "entropy, schedule, small chunks": (
        *("loss.entropy_coef=0.01", "train.schedule=cosine", "train.warmup_steps=2"),
        *("train.micro_batch_tokens=200", "train.logit_chunk_tokens=50"),
    ),
    "lora": LORA,
    "lora with kl to the base": (*LORA, "loss.kl_coef=0.05"),
    "retention": ("train.keep_full_checkpoints=1", "train.keep_weights_only=1"),
}
LONGER = ("train.num_steps=10", "train.save_every=4")


@pytest.mark.parametrize(
    "kind",
    [kind if kind in ("plain", "dynamic sampling") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
def test_resume_between_checkpoints_is_bitwise_identical(tmp_path, kind):
    train(tmp_path / "straight", *KINDS[kind])
    # Step 3 is recorded, step 2 is the newest checkpoint.
    stop_after(train_run(tmp_path / "dropped", tiny_recipe(*KINDS[kind])), 3)
    reports = resume(tmp_path / "dropped")
    assert [report.step for report in reports] == [3, 4]
    assert reproducible_digests(tmp_path / "dropped") == reproducible_digests(tmp_path / "straight")
    assert len(reproducible_digests(tmp_path / "straight")) >= 2 + 2 * 3


def test_resume_of_a_fork_between_checkpoints_is_bitwise_identical(scout, tmp_path):
    roots = [copy_run(scout, tmp_path / name) for name in ("straight", "dropped")]
    options = {"at": 2, "guide": "near"}
    resume(roots[0], "train.num_steps=6", **options)
    stop_after(start_resume(roots[1], "train.num_steps=6", **options), 5)
    resume(roots[1])
    straight = reproducible_digests(roots[0], "near")
    assert reproducible_digests(roots[1], "near") == straight
    assert {"checkpoints/step_000004/model.safetensors", "checkpoints/step_000006/training_state/state.json"} <= set(
        straight
    )


def test_resume_reads_a_recorded_step_back(tmp_path):
    stop_after(train_run(tmp_path / "run", tiny_recipe()), 3)
    session = open_session_at(tmp_path / "run", 2)
    path = session.run.rollouts_path("main")
    before = path.read_bytes()
    # An engine of None cannot be asked anything.
    batch = build_batch(
        replace(session, engine=None), RolloutLog(path), seed_name="main", step=3, position=8, active_guide=None
    )
    assert batch.on_policy == RolloutLog(path).read_step(3)
    assert batch.position == 12
    assert path.read_bytes() == before


def test_rollouts_of_a_step_are_on_record_before_its_metrics(tmp_path, monkeypatch):
    seen = []
    write = StepLog.write

    def look_and_write(self: StepLog, report: StepReport) -> AppendResult:
        seen.append((report.step, RolloutLog(tmp_path / "run/branches/main/rollouts.jsonl").steps()[-1]))
        return write(self, report)

    monkeypatch.setattr(StepLog, "write", look_and_write)
    train(tmp_path / "run")
    assert seen == [(step, step) for step in range(1, 5)]


def test_rollouts_are_recorded_although_the_update_fails(tmp_path, monkeypatch):
    train(tmp_path / "straight")
    take_step = Updater.take_step
    with monkeypatch.context() as patched:
        patched.setattr(Updater, "take_step", lambda *args, **names: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / "failed")
    assert Updater.take_step is take_step
    assert RolloutLog(tmp_path / "failed/branches/main/rollouts.jsonl").steps() == (1,)
    resume(tmp_path / "failed")
    assert reproducible_digests(tmp_path / "failed") == reproducible_digests(tmp_path / "straight")


def test_resume_repairs_a_torn_line_of_every_log(tmp_path):
    train(tmp_path / "straight")
    stop_after(train_run(tmp_path / "torn", tiny_recipe()), 3)
    branch = tmp_path / "torn" / "branches" / "main"
    for name in ("metrics.jsonl", "timings.jsonl", "rollouts.jsonl"):
        # Half of the last line stays: of the four groups of step 3, three are whole.
        lines = (branch / name).read_bytes().splitlines(keepends=True)
        (branch / name).write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    resume(tmp_path / "torn")
    assert reproducible_digests(tmp_path / "torn") == reproducible_digests(tmp_path / "straight")


def test_resume_before_the_first_checkpoint(tmp_path):
    kind = ("eval.every=2", "loss.kl_coef=0.05")
    train(tmp_path / "straight", *kind)
    records = train_run(tmp_path / "killed", tiny_recipe(*kind))
    next(records)  # the batch arithmetic: the run exists, and nothing is in it yet
    records.close()
    assert not list((tmp_path / "killed").rglob("step_*"))
    resume(tmp_path / "killed")
    assert reproducible_digests(tmp_path / "killed") == reproducible_digests(tmp_path / "straight")
    # The base was evaluated all the same.
    assert file_digests(tmp_path / "killed")["evals.jsonl"] == file_digests(tmp_path / "straight")["evals.jsonl"]


@pytest.mark.parametrize(
    ("log_name", "line"),
    [
        pytest.param("rollouts.jsonl", 12, id="rollouts of step 3 recorded, no checkpoint yet", marks=pytest.mark.slow),
        pytest.param("metrics.jsonl", 7, id="between two checkpoints"),
    ],
)
def test_kill_at_a_line_of_a_log(warm: ForkServer, tmp_path, log_name, line):
    train(tmp_path / "straight", *LONGER)
    root = tmp_path / "killed"
    child = warm.npo("train", "micro", *TINY, *LONGER, "--run", str(root), err=tmp_path / "err")
    wait_until(lambda: num_lines(root / "branches" / "main" / log_name) >= line)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert num_lines(root / "branches" / "main" / "metrics.jsonl") < 10, "it was too late"
    resume(root)
    assert reproducible_digests(root) == reproducible_digests(tmp_path / "straight")


@pytest.mark.slow
def test_kill_twice_during_a_fork(warm: ForkServer, scout, tmp_path):
    roots = [copy_run(scout, tmp_path / name) for name in ("straight", "killed")]
    resume(roots[0], *LONGER, at=2, guide="near")
    metrics = roots[1] / "branches" / "near" / "metrics.jsonl"
    for args, line in ((["--at", "2", "--guide", "near"], 1), ([], 4)):
        child = warm.npo("resume", str(roots[1]), *LONGER, *args, err=tmp_path / "err")
        wait_until(lambda line=line: num_lines(metrics) >= line)
        child.kill()
        assert child.wait() == -signal.SIGKILL
    resume(roots[1])
    assert reproducible_digests(roots[1], "near") == reproducible_digests(roots[0], "near")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "two updates", "dynamic sampling", "kl to the base", "replay"])
def test_kill_at_random_moments(warm: ForkServer, scout, tmp_path, kind):
    """Up to 8 kills per run, at any moment: while the model loads, samples, trains or saves."""
    longer = ("train.num_steps=40", "train.save_every=3")
    roots = [tmp_path / "straight", tmp_path / "killed"]
    if kind == "replay":
        branch, settings = "near", longer
        for root in roots:
            copy_run(scout, root)
        first = ["resume", str(roots[1]), *settings, "--at", "2", "--guide", "near"]
        resume(roots[0], *settings, at=2, guide="near")
    else:
        branch, settings = "main", (*longer, *KINDS[kind])
        first = ["train", "micro", *TINY, *settings, "--run", str(roots[1])]
        train(roots[0], *settings)
    num_kills = kill_again_and_again(warm, first, root=roots[1], branch=branch)
    resume(roots[1])
    assert num_kills >= 5
    assert reproducible_digests(roots[1], branch) == reproducible_digests(roots[0], branch)


def kill_again_and_again(warm: ForkServer, first: list[str], *, root: Path, branch: str) -> int:
    rng, args = random.Random(branch), first
    for num_kills in range(8):
        if num_lines(root / "branches" / branch / "metrics.jsonl") > 25:
            return num_kills
        child = warm.npo(*args, err=root.parent / "err")
        wait_until(lambda: is_born(root, branch))
        time.sleep(rng.uniform(0.0, 0.6))
        child.kill()
        assert child.wait() == -signal.SIGKILL, child.read_stderr()
        args = ["resume", str(root)]
    return 8


def is_born(root: Path, branch: str) -> bool:
    path = root / "segments.jsonl"
    return (root / "npo_run.json").exists() and f'"branch":"{branch}"' in path.read_text()
