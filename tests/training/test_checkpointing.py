"""A disk that fills up costs the step at hand, and nothing that was saved."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from npo_cli.errors import RunFailed
from npo_cli.storage.checkpoints import is_complete
from npo_cli.training.train import train_run
from tests.helpers.runs import (
    TINY,
    copy_run,
    file_digests,
    reproducible_digests,
    resume,
    start_resume,
    tiny_recipe,
    train,
)
from tests.helpers.warm_process import ForkServer


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 24 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], capture_output=True, text=True
    )
    if mounting.returncode:
        pytest.skip(f"no right to mount a small disk: {mounting.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk: Path, *, leaving: int) -> Path:
    """A file that takes all the room but `leaving` bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        file.truncate(max(0, file.tell() - leaving))
    return filler


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
    filler = fill(small_disk, leaving=leaving)
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


def test_checkpoint_with_a_lost_training_state_is_restored_from_the_step_before(tmp_path):
    """Step 4 lost its anchor: the run goes on from step 2, comes out the same, and puts it back."""
    train(tmp_path / "straight", "train.num_steps=6")
    train(tmp_path / "hurt")
    root = copy_run(tmp_path / "hurt", tmp_path / "run")
    (root / "branches/main/checkpoints/step_000004/training_state/optimizer.safetensors").unlink()
    assert [report.step for report in resume(root, "train.num_steps=6")] == [3, 4, 5, 6]
    assert reproducible_digests(root) == reproducible_digests(tmp_path / "straight")
