"""Scratch folders across the death of their process: real processes, real kills."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from npo_cli.inference.process import LOCK_NAME, scratch_folder

ROOT = Path(__file__).parents[2]
HOLDS = """
import time
from npo_cli.inference.process import scratch_folder
with scratch_folder() as folder:
    print(folder, flush=True)
    time.sleep(600)
"""
LOADS = """
from tests.inference.vllm_models import make_engine, tied_policy
from npo_cli.inference.vllm_local import VllmEngine
policy = tied_policy()
make_engine('vllm', policy)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary directory of our own, for this process and those that it starts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@contextmanager
def started(program: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_scratch_folder_is_removed_after_the_block(temporary: Path):
    with scratch_folder() as folder:
        (folder / "adapter_model.safetensors").write_bytes(b"x")
    assert not any(temporary.iterdir())


def test_scratch_folder_of_a_killed_process_is_removed_by_the_next(temporary: Path):
    with started(HOLDS) as dead, started(HOLDS) as living:
        left, held = (Path(process.stdout.readline().strip()) for process in (dead, living))
        os.kill(dead.pid, signal.SIGKILL)
        dead.wait()
        assert left.is_dir() and held.is_dir()
        with scratch_folder() as folder:
            assert set(temporary.iterdir()) == {held, folder}


def test_scratch_folder_of_another_user_stays(temporary: Path):
    (temporary / "npo-scratch-notes").mkdir()
    (temporary / "elsewhere").mkdir()
    (temporary / "elsewhere" / LOCK_NAME).touch()
    with scratch_folder():
        pass
    assert {path.name for path in temporary.iterdir()} == {"npo-scratch-notes", "elsewhere"}


@pytest.mark.vllm
def test_scratch_folder_of_a_killed_vllm_is_removed_by_the_next(temporary: Path):
    with started(LOADS) as loading:
        deadline = time.monotonic() + 120
        while not list(temporary.glob("npo-scratch-*/config.json")):
            assert time.monotonic() < deadline and loading.poll() is None
            time.sleep(0.01)
        # vLLM itself takes seconds to start from here
        time.sleep(1)
        os.kill(loading.pid, signal.SIGKILL)
        loading.wait()
    assert list(temporary.glob("npo-scratch-*/config.json"))
    with scratch_folder():
        pass
    assert not list(temporary.glob("npo-*"))
