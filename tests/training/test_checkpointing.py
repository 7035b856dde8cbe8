"""What a full disk, a lost file, a moved folder and a umask do to a run."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from npo_cli.errors import RunFailed
from npo_cli.storage.checkpoints import is_complete
from npo_cli.training.train import train_run
from npo_cli.types.rollouts import Notice, StepReport
from tests.helpers.runs import (
    TINY,
    copy_run,
    file_digests,
    reproducible_digests,
    resume,
    sample,
    start_resume,
    steps_of,
    tiny_recipe,
    train,
)
from tests.helpers.small_disk import fill_disk, mount_small_disk
from tests.helpers.warm_process import ForkServer


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    with mount_small_disk(tmp_path / "disk", megabytes=24) as disk:
        yield disk


@pytest.mark.parametrize(
    "leaving",
    [
        pytest.param(0, id="no room for the rollouts", marks=pytest.mark.slow),
        pytest.param(1_000_000, id="no room for a checkpoint"),
    ],
)
def test_checkpoint_on_a_full_disk_ends_the_run_and_resume_continues(small_disk, tmp_path, leaving):
    train(tmp_path / "straight")
    root = small_disk / "run"
    records = train_run(root, tiny_recipe())
    while not (root / "branches/main/checkpoints/step_000002").exists():
        next(records)
    saved = file_digests(root / "branches/main/checkpoints")
    filler = fill_disk(small_disk, leaving=leaving)
    with pytest.raises(RunFailed) as caught:
        list(records)
    assert caught.value.exit_code == 1
    assert "disk" in caught.value.hint
    assert "npo resume" in caught.value.hint
    assert file_digests(root / "branches/main/checkpoints") == saved
    assert not list(root.rglob(".step_*"))
    # Still full: the same words again.
    with pytest.raises(RunFailed):
        list(start_resume(root))
    filler.unlink()
    resume(root)
    assert reproducible_digests(root) == reproducible_digests(tmp_path / "straight")


def test_checkpoint_above_a_file_size_limit_ends_the_run_with_two_lines(warm: ForkServer, tmp_path):
    """1.3 MB: the weights fit, the moments of the first update do not."""
    train(tmp_path / "straight")
    root = tmp_path / "limited"
    child = warm.npo("train", "micro", *TINY, "--run", str(root), err=tmp_path / "err", limit=1_300_000)
    assert child.wait() == 1
    error, hint = child.read_stderr().splitlines()[-2:]
    assert error.startswith("error: no room left to write ")
    assert "step_000002" in error
    assert hint.startswith("  try: free some disk space")
    assert "Traceback" not in child.read_stderr()
    assert [path.name for path in (root / "branches/main/checkpoints").iterdir()] == ["step_000000"]
    assert is_complete(root / "branches/main/checkpoints/step_000000", deep=True)
    resume(root)
    assert reproducible_digests(root) == reproducible_digests(tmp_path / "straight")


@pytest.mark.parametrize("step", [1, 2], ids=["before the next rollouts", "before the evaluation"])
@pytest.mark.parametrize("is_renamed", [True, False], ids=["renamed", "deleted"])
def test_run_directory_that_vanishes_while_training_ends_the_run_with_one_error(tmp_path, is_renamed, step):
    root = tmp_path / "run"
    records = train_run(root, tiny_recipe("eval.every=2"))
    while not (isinstance(record := next(records), StepReport) and record.step == step):
        pass
    if is_renamed:
        root.rename(tmp_path / "moved")
    else:
        shutil.rmtree(root)
    with pytest.raises(RunFailed) as caught:
        list(records)
    assert caught.value.message == f"{root} was renamed or deleted while npo was writing in it"
    assert not root.exists()
    if is_renamed:
        resume(tmp_path / "moved")
        train(tmp_path / "straight", "eval.every=2")
        assert reproducible_digests(tmp_path / "moved") == reproducible_digests(tmp_path / "straight")


def test_run_directory_that_vanishes_before_a_checkpoint_is_not_created_again(tmp_path):
    root = tmp_path / "run"
    records = train_run(root, tiny_recipe())
    while not (isinstance(record := next(records), StepReport) and record.step == 2):
        pass
    shutil.rmtree(root)
    with pytest.raises(RunFailed, match="was renamed or deleted"):
        list(records)
    assert not root.exists()


def test_every_file_of_a_run_has_the_mode_that_the_umask_leaves(tmp_path):
    before = os.umask(0o002)
    try:
        train(tmp_path / "run", "eval.every=2")
        sample(tmp_path / "run")
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*")}
    assert {path: oct(mode) for path, mode in modes.items() if mode != (0o775 if path.is_dir() else 0o664)} == {}


def test_checkpoint_with_a_lost_training_state_is_restored_from_the_step_before(tmp_path):
    """Step 4 lost its optimizer: it is named, the run resumes from step 2, comes out the same, and puts it back."""
    train(tmp_path / "straight", "train.num_steps=6")
    train(tmp_path / "hurt")
    root = copy_run(tmp_path / "hurt", tmp_path / "run")
    lost = root / "branches/main/checkpoints/step_000004/training_state/optimizer.safetensors"
    lost.unlink()
    records = list(start_resume(root, "train.num_steps=6"))
    assert [record.message for record in records if isinstance(record, Notice) and record.level == "warning"] == [
        f"skipped step 4 of main, whose training state is damaged: {lost} is missing"
    ]
    assert [report.step for report in steps_of(records)] == [3, 4, 5, 6]
    assert reproducible_digests(root) == reproducible_digests(tmp_path / "straight")
