"""Real jobs of several processes, started by torchrun as a user starts them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PATIENCE_SECONDS = 240.0


@contextmanager
def launch_job(*args: str, log: Path, module: str = "npo_cli") -> Iterator[subprocess.Popen]:
    """`torchrun -m MODULE ARGS` in two processes, all that they say into a file; it does not outlive the block."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "--shutdown-timeout=2", "-m", module, *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as told, subprocess.Popen(command, stdout=told, stderr=told, env=environment) as job:
        try:
            yield job
        finally:
            job.terminate()


def run(*args: str, log: Path, module: str = "npo_cli") -> None:
    """The same, to its good end."""
    with launch_job(*args, log=log, module=module) as job:
        assert job.wait(PATIENCE_SECONDS) == 0, log.read_text()


def pid_of(job: subprocess.Popen, rank: int) -> int:
    """The process that torchrun started as this rank."""
    if not Path("/proc").is_dir():
        pytest.skip("needs /proc to tell the processes apart")
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            told = (stat.parent / "environ").read_bytes().split(b"\0") if parent == job.pid else ()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"RANK=%d" % rank in told:
            return int(stat.parent.name)
    raise AssertionError(f"no rank {rank} under {job.pid}")


def wait_until(happened: Callable[[], bool], job: subprocess.Popen, log: Path) -> None:
    """Look often, and no longer than the job lives."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    """Nothing of that number runs; a zombie waits only to be counted."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
