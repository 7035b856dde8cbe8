"""A kept command lives as long as its parent: real processes, real kills."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

KEEPER = [sys.executable, "-m", "npo_cli.inference.process"]
FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""
"""A command with a child of its own, both asleep."""
STUBBORN = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + FAMILY
PARENT = """
import subprocess, sys
keeper = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)
keeper.wait()
"""


def lives(pid: int) -> bool:
    """Not a zombie either: nobody here may be there to reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, *, seconds=20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def family_of(path: Path) -> list[int]:
    assert wait_for(lambda: path.exists() and len(path.read_text().split()) == 2)
    return [int(pid) for pid in path.read_text().split()]


def kept(*command: str) -> subprocess.Popen[bytes]:
    """A keeper whose parent holds on to the pipe."""
    return subprocess.Popen([*KEEPER, "no-folder", *command], stdin=subprocess.PIPE)


def test_supervisor_returns_the_commands_exit_code():
    for code in (0, 7):
        keeper = kept(sys.executable, "-c", f"raise SystemExit({code})")
        assert keeper.wait(timeout=20) == code
        keeper.stdin.close()


@pytest.mark.parametrize("command", [FAMILY, pytest.param(STUBBORN, marks=pytest.mark.slow)])
def test_supervisor_ends_the_command_when_its_stdin_closes(tmp_path, command):
    keeper = kept(sys.executable, "-c", command, str(tmp_path / "pids"))
    pids = family_of(tmp_path / "pids")
    assert all(map(lives, pids))
    keeper.stdin.close()
    keeper.wait(timeout=20)
    assert wait_for(lambda: not any(map(lives, pids)))


def test_supervisor_ends_the_command_after_kill_9_of_its_parent(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"large")
    command = [*KEEPER, str(folder), sys.executable, "-c", FAMILY, str(tmp_path / "pids")]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *command])
    pids = family_of(tmp_path / "pids")
    parent.kill()
    parent.wait()
    assert wait_for(lambda: not any(map(lives, pids)))
    assert wait_for(lambda: not folder.exists())


def test_supervisor_ends_children_that_outlive_the_command(tmp_path):
    keeper = kept(sys.executable, "-c", FAMILY.rsplit("time.sleep", 1)[0], str(tmp_path / "pids"))
    assert keeper.wait(timeout=20) == 0
    _, child = family_of(tmp_path / "pids")
    assert wait_for(lambda: not lives(child))
    keeper.stdin.close()


@pytest.mark.slow
def test_supervisor_passes_signals_to_the_process_group(tmp_path):
    keeper = kept(sys.executable, "-c", FAMILY, str(tmp_path / "pids"))
    pids = family_of(tmp_path / "pids")
    os.kill(keeper.pid, signal.SIGTERM)
    keeper.wait(timeout=20)
    assert wait_for(lambda: not any(map(lives, pids)))
