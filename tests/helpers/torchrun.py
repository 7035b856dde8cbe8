"""Real jobs of two processes, started by torchrun as a user starts them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

TIMEOUT_SECONDS = 240.0


@contextmanager
def launch_job(*args: str, log: Path, module: str = "npo_cli") -> Iterator[subprocess.Popen]:
    """`torchrun -m MODULE ARGS` in two processes, their output into a file; ended with the block."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "--shutdown-timeout=2", "-m", module, *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as job:
        try:
            yield job
        finally:
            job.terminate()


def run(*args: str, log: Path, module: str = "npo_cli") -> None:
    """The same until it ends, without an error."""
    with launch_job(*args, log=log, module=module) as job:
        assert job.wait(TIMEOUT_SECONDS) == 0, log.read_text()


def pid_of(job: subprocess.Popen, rank: int) -> int:
    """The process that torchrun started as this rank."""
    if not Path("/proc").is_dir():
        pytest.skip("needs /proc to tell the processes apart")
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            variables = (stat.parent / "environ").read_bytes().split(b"\0") if parent == job.pid else ()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"RANK=%d" % rank in variables:
            return int(stat.parent.name)
    raise AssertionError(f"no rank {rank} under {job.pid}")


def wait_until(has_happened: Callable[[], bool], job: subprocess.Popen, log: Path) -> None:
    """Poll while the job runs."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not has_happened():
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    """No process of that number runs; a zombie has ended."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
