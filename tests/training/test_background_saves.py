"""Checkpoints that a thread writes while the next step runs are those that are written between steps."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from npo_cli.errors import RunFailed
from npo_cli.policy.model import Policy
from npo_cli.storage.checkpoints import read_recorded_logs
from npo_cli.training.train import train_run
from npo_cli.types.rollouts import CheckpointSaved, StepReport
from tests.helpers.runs import LORA, TINY, reproducible_digests, resume, tiny_recipe, train
from tests.helpers.warm_process import ForkServer, num_lines, wait_until

BEHIND, BETWEEN = "train.save_in_background=true", "train.save_in_background=false"
LONGER = ("train.num_steps=6", "train.save_every=2")


def patch_writer(patched: pytest.MonkeyPatch, before: Callable[[int, Path], None]) -> None:
    """Call `before(step, checkpoints/)` before the weights of a checkpoint are written."""
    write_folder = Policy.write_folder

    def look_and_write(self: Policy, folder: Path, tensors: object) -> None:
        before(int(folder.name.removeprefix(".step_").removesuffix(".partial")), folder.parent)
        write_folder(self, folder, tensors)

    patched.setattr(Policy, "write_folder", look_and_write)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        LORA,
        ("train.keep_full_checkpoints=1", "train.keep_weights_only=1"),
        pytest.param(("train.staleness=1",), marks=pytest.mark.slow),
    ],
)
def test_checkpoint_in_the_background_is_that_of_its_step(tmp_path, monkeypatch, settings):
    train(tmp_path / "between", *LONGER, *settings, BETWEEN)

    def wait_for_next_step(step: int, home: Path) -> None:
        if step in (2, 4):
            wait_until(lambda: num_lines(home.parent / "metrics.jsonl") > step)

    with monkeypatch.context() as patched:
        patch_writer(patched, wait_for_next_step)
        train(tmp_path / "behind", *LONGER, *settings, BEHIND)
    assert reproducible_digests(tmp_path / "behind") == reproducible_digests(tmp_path / "between")
    (last, *_) = sorted((tmp_path / "behind/branches/main/checkpoints").glob("step_*4"))
    assert read_recorded_logs(last)["branches/main/metrics.jsonl"].lines == 4


def test_records_come_in_the_same_order_with_saves_in_the_background(tmp_path):
    def order(name: str, setting: str) -> list[tuple[str, int]]:
        records = train_run(tmp_path / name, tiny_recipe(*LONGER, setting))
        return [(type(one).__name__, one.step) for one in records if isinstance(one, StepReport | CheckpointSaved)]

    assert order("behind", BEHIND) == order("between", BETWEEN)


def test_records_that_are_closed_wait_for_the_checkpoint(tmp_path):
    records = train_run(tmp_path / "run", tiny_recipe(*LONGER, BEHIND))
    for record in records:
        if isinstance(record, StepReport) and record.step == 2:
            break
    assert not (tmp_path / "run/branches/main/checkpoints/step_000002").exists()
    records.close()  # before step 2 is saved: there is nothing to wait for
    assert not (tmp_path / "run/branches/main/checkpoints/step_000002").exists()
    assert [report.step for report in resume(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_checkpoint_that_fails_in_the_background_ends_the_run(tmp_path, monkeypatch):
    train(tmp_path / "straight", *LONGER)

    def fail(step: int, home: Path) -> None:
        if step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    root = tmp_path / "failed"
    with monkeypatch.context() as patched:
        patch_writer(patched, fail)
        with pytest.raises(RunFailed, match="no room left to write"):
            list(train_run(root, tiny_recipe(*LONGER, BEHIND)))
    home = root / "branches/main/checkpoints"
    assert sorted(path.name for path in home.iterdir()) == ["step_000000", "step_000002"]
    assert num_lines(root / "branches/main/metrics.jsonl") == 5  # it was learned while the checkpoint failed
    assert [report.step for report in resume(root)] == [3, 4, 5, 6]
    assert reproducible_digests(root) == reproducible_digests(tmp_path / "straight")


def test_kill_while_a_checkpoint_is_written_in_the_background(warm: ForkServer, tmp_path):
    train(tmp_path / "straight", *LONGER)
    root = tmp_path / "killed"
    child = warm.npo("train", "micro", *TINY, *LONGER, BEHIND, "--run", str(root), err=tmp_path / "err")
    partial = root / "branches/main/checkpoints/.step_000002.partial"
    wait_until(partial.exists)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    resume(root)
    assert reproducible_digests(root) == reproducible_digests(tmp_path / "straight")


def test_copies_of_weights_share_what_the_weights_share():
    import torch

    from npo_cli.policy.weights_io import copy_to_cpu

    one = torch.arange(6.0).reshape(2, 3)
    copies = copy_to_cpu({"a": one, "b": one, "c": one[0], "d": one.T, "e": torch.empty(0)})
    assert copies["a"] is copies["b"]
    one.zero_()
    assert copies["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copies["c"].tolist() == [0, 1, 2]
    assert copies["d"].tolist() == [[0, 3], [1, 4], [2, 5]]
