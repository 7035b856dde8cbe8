import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from npo_cli.errors import NpoError, RunFailed
from npo_cli.storage.checkpoints import (
    create_checkpoint,
    demote_checkpoint,
    find_checkpoint,
    find_resume_checkpoint,
    is_complete,
    list_ancestry_checkpoints,
    list_checkpoints,
)
from tests.storage.builders import f32, fork, new_run, safetensors_bytes, write_checkpoint

DIE_INSIDE = """
import os, signal, sys
from pathlib import Path
from npo_cli.storage.checkpoints import create_checkpoint
from npo_cli.storage.layout import open_run
with create_checkpoint(open_run(Path(sys.argv[1])), "main", 20) as folder:
    (folder / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
KEEP_SAVING = """
import sys
from pathlib import Path
from npo_cli.storage.checkpoints import create_checkpoint
from npo_cli.storage.layout import open_run
run = open_run(Path(sys.argv[1]))
for step in range(1, 100000):
    with create_checkpoint(run, "main", step) as folder:
        for number in range(3):
            (folder / f"model-{number}.safetensors").write_bytes(bytes(50_000))
        (folder / "training_state").mkdir()
        (folder / "training_state" / "state.json").write_text("{}")
    sys.stdout.write(".")
    sys.stdout.flush()
"""


def steps(found) -> list[int]:
    return [checkpoint.step for checkpoint in found]


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_saved_checkpoint_is_signed_and_complete(tmp_path):
    folder = write_checkpoint(new_run(tmp_path), 20)
    manifest = json.loads((folder / "npo.json").read_text())
    assert (manifest["branch"], manifest["step"]) == ("main", 20)
    assert sorted(manifest["files"]) == ["config.json", "model.safetensors"]
    assert manifest["files"]["config.json"] == {"size": 3, "sha256": hashlib.sha256(b"{}\n").hexdigest()}
    state = json.loads((folder / "training_state" / "npo_training_state.json").read_text())
    assert sorted(state["files"]) == ["state.json"]
    assert is_complete(folder) and is_complete(folder, deep=True)
    assert names(folder.parent) == ["step_000020"]


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_the_digest_is_what_the_shell_says(tmp_path):
    run = new_run(tmp_path)
    with create_checkpoint(run, "main", 20) as folder:
        for name in ("model-00002-of-00002", "model-00001-of-00002"):
            (folder / f"{name}.safetensors").write_bytes(name.encode())
        (folder / "config.json").write_text("{}")
    command = "LC_ALL=C sha256sum *.safetensors | sha256sum"
    result = subprocess.run(command, shell=True, cwd=run.checkpoint_folder("main", 20), capture_output=True, text=True)
    assert find_checkpoint(run, "main", 20).digest == result.stdout.split()[0]


def test_the_hidden_name_becomes_the_final_one_only_at_the_end(tmp_path):
    run = new_run(tmp_path)
    with create_checkpoint(run, "main", 20) as folder:
        assert folder.name == ".step_000020.partial"
        (folder / "model.safetensors").write_bytes(b"x")
        assert list_checkpoints(run, "main") == []
    assert steps(list_checkpoints(run, "main")) == [20]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_save_that_fails_leaves_nothing(tmp_path, kind: type[BaseException]):
    run = new_run(tmp_path)
    with pytest.raises(kind), create_checkpoint(run, "main", 20) as folder:
        (folder / "model.safetensors").write_bytes(b"x")
        raise kind
    assert names(run.checkpoints_folder("main")) == []


def test_a_killed_save_leaves_no_final_name_and_the_next_save_clears_it(tmp_path):
    run = new_run(tmp_path)
    write_checkpoint(run, 0)
    child = subprocess.run([sys.executable, "-c", DIE_INSIDE, str(run.root)], check=False)
    assert child.returncode == -signal.SIGKILL
    assert names(run.checkpoints_folder("main")) == [".step_000020.partial", "step_000000"]
    assert steps(list_checkpoints(run, "main")) == [0]
    write_checkpoint(run, 40)
    assert names(run.checkpoints_folder("main")) == ["step_000000", "step_000040"]


@pytest.mark.parametrize("num_saves", [1, 2, 3, 4])
def test_killed_at_any_moment_every_final_name_is_whole(tmp_path, num_saves: int):
    run = new_run(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", KEEP_SAVING, str(run.root)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read(num_saves)
    child.kill()
    child.wait()
    finals = [path for path in run.checkpoints_folder("main").iterdir() if not path.name.startswith(".")]
    assert len(finals) >= num_saves
    assert all(is_complete(folder, deep=True) for folder in finals)
    assert {found.tier for found in list_checkpoints(run, "main")} == {"full"}


def test_a_full_disk_is_explained_and_the_last_checkpoint_is_intact(tmp_path):
    run = new_run(tmp_path)
    write_checkpoint(run, 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        refused = pytest.raises(RunFailed, match=r"no room left to write .*step_000040")
        with refused as caught, create_checkpoint(run, "main", 40) as folder:
            (folder / "model.safetensors").write_bytes(bytes(6000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "npo resume" in caught.value.hint
    assert names(run.checkpoints_folder("main")) == ["step_000020"]
    assert is_complete(run.checkpoint_folder("main", 20), deep=True)


def test_the_full_disk_of_safetensors_itself_is_understood(tmp_path):
    from safetensors.numpy import save_file

    run = new_run(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(RunFailed, match="no room left"), create_checkpoint(run, "main", 40) as folder:
            save_file({"w": np.zeros(2000, dtype=np.float32)}, folder / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(run.checkpoints_folder("main")) == []


def test_completeness_sees_a_short_file_and_deeply_a_changed_one(tmp_path):
    folder = write_checkpoint(new_run(tmp_path), 20)
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + b"!")
    assert is_complete(folder) and not is_complete(folder, deep=True)
    weights.write_bytes(good[:-1])
    assert not is_complete(folder)
    weights.unlink()
    assert not is_complete(folder)
    weights.write_bytes(good)
    assert is_complete(folder, deep=True)
    (folder / "npo.json").write_text('{"files": []}')
    assert not is_complete(folder)


def test_a_damaged_training_state_leaves_a_guide(tmp_path):
    run = new_run(tmp_path)
    (write_checkpoint(run, 20) / "training_state" / "state.json").unlink()
    assert [found.tier for found in list_checkpoints(run, "main")] == ["weights"]


def test_saving_the_same_weights_again_keeps_the_old_folder_and_mends_its_training_state(tmp_path):
    run = new_run(tmp_path)
    folder = write_checkpoint(run, 20)
    before = os.stat(folder / "model.safetensors").st_ino
    demote_checkpoint(find_checkpoint(run, "main", 20))
    assert find_checkpoint(run, "main", 20).tier == "weights"
    write_checkpoint(run, 20)
    assert find_checkpoint(run, "main", 20).tier == "full"
    (folder / "training_state" / "state.json").write_text("damaged")
    write_checkpoint(run, 20)
    assert (folder / "training_state" / "state.json").read_text() == '{"step": 20}\n'
    assert os.stat(folder / "model.safetensors").st_ino == before
    assert names(folder) == ["config.json", "model.safetensors", "npo.json", "training_state"]


def test_other_weights_never_overwrite_a_checkpoint(tmp_path):
    run = new_run(tmp_path)
    folder = write_checkpoint(run, 20)
    with pytest.raises(NpoError, match="holds other weights") as caught:
        write_checkpoint(run, 20, weight=21.0)
    assert "--at STEP" in caught.value.hint
    assert is_complete(folder, deep=True) and names(folder.parent) == ["step_000020"]
    assert (folder / "model.safetensors").read_bytes() == safetensors_bytes({"w": ("F32", [1], f32(20.0))})


def test_a_damaged_checkpoint_makes_room_for_a_new_one(tmp_path):
    run = new_run(tmp_path)
    (write_checkpoint(run, 20) / "model.safetensors").write_bytes(b"half")
    folder = write_checkpoint(run, 20)
    assert is_complete(folder, deep=True) and names(folder.parent) == ["step_000020"]


def test_history_follows_the_line_of_descent(tmp_path):
    run = new_run(tmp_path)
    for step in (0, 20, 40, 60):
        write_checkpoint(run, step)
    fork(run, "late", parent="main", at=40)
    for step in (60, 80):
        write_checkpoint(run, step, branch="late", weight=step + 0.5)
    fork(run, "early", parent="late", at=20)  # 20 is main's: late gave nothing to this line
    line = [(found.branch, found.step) for found in list_ancestry_checkpoints(run, "late")]
    assert line == [("main", 0), ("main", 20), ("main", 40), ("late", 60), ("late", 80)]
    assert steps(list_ancestry_checkpoints(run, "early")) == [0, 20]
    assert find_checkpoint(run, "late", 60).branch == "late"
    assert find_checkpoint(run, "main", 60).branch == "main"


def test_a_step_without_a_checkpoint_is_answered_with_those_that_exist(tmp_path):
    run = new_run(tmp_path)
    with pytest.raises(NpoError, match="it has steps: none"):
        find_checkpoint(run, "main", 0)
    write_checkpoint(run, 0)
    write_checkpoint(run, 20)
    with pytest.raises(NpoError, match="no complete checkpoint of step 30 on branch main; it has steps: 0, 20"):
        find_checkpoint(run, "main", 30)


def test_a_branch_goes_on_from_its_own_anchor_or_from_its_fork_never_from_before(tmp_path):
    run = new_run(tmp_path)
    for step in (0, 20, 40, 60):
        write_checkpoint(run, step)
    fork(run, "late", parent="main", at=40)
    assert (find_resume_checkpoint(run, "main").step, find_resume_checkpoint(run, "late").step) == (60, 40)
    write_checkpoint(run, 60, branch="late")
    write_checkpoint(run, 80, branch="late", anchor=False)
    assert find_resume_checkpoint(run, "late").path == run.checkpoint_folder("late", 60)
    fork(run, "lost", parent="main", at=40)
    demote_checkpoint(find_checkpoint(run, "main", 40))
    with pytest.raises(NpoError, match=r"branch lost of .* has no complete checkpoint with a training state"):
        find_resume_checkpoint(run, "lost")
