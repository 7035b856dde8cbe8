"""Real `npo` processes that start at once: one process imports everything, and forks an `npo` for each line it reads.

It computes nothing itself, so a child is what a fresh process would be: its own pid, its own signals, its own death.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 60.0
PRODUCERS_VARIABLE = "NPO_TEST_PRODUCERS"
"""Address of a server that forks producers (`warm_producer.py`); without it each command starts a fresh one."""
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "os.chmod")
"""Audit events of Python that change a folder, beside `open`."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True, kw_only=True, slots=True)
class NpoProcess:
    """One running npo."""

    pid: int
    server: "ForkServer"
    err: Path

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code; minus the signal that killed it."""
        return self.server.read_reply()["code"]

    def read_stderr(self) -> str:
        return self.err.read_text()

    def count_changes(self) -> int:
        """How often it changed a file below the folder that was watched."""
        return int(count_file(self.err).read_text() or 0)


def count_file(err: Path) -> Path:
    return err.with_suffix(".changes")


@dataclass(frozen=True, kw_only=True, slots=True)
class ForkServer:
    """The process that forks."""

    process: subprocess.Popen[str]

    def npo(
        self,
        *args: str,
        err: Path,
        limit: int | None = None,
        watched: Path | None = None,
        die_at: int | None = None,
    ) -> NpoProcess:
        """Start `npo ARGS`, stderr into a file; `limit` is the largest file it may write, in bytes.

        Its changes of files below `watched` are counted, and it is killed before the one with number `die_at`.
        """
        request = {"args": args, "err": str(err), "limit": limit, "watched": watched and str(watched), "die_at": die_at}
        request["producers"] = os.environ.get(PRODUCERS_VARIABLE)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return NpoProcess(pid=self.read_reply()["pid"], server=self, err=err)

    def read_reply(self) -> dict[str, int]:
        return json.loads(self.process.stdout.readline())


@contextlib.contextmanager
def start_fork_server() -> Iterator[ForkServer]:
    """A warm process for the block."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, __file__], env=environment, **pipes) as process:
        try:
            assert json.loads(process.stdout.readline()) == {"ready": 1}
            yield ForkServer(process=process)
        finally:
            process.stdin.close()


def wait_until(happened: Callable[[], bool]) -> None:
    """Look every millisecond."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.001)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def serve() -> None:
    """Fork an npo for each line; say its pid, and later its exit code."""
    # Models of transformers are imported when first loaded; this loads one without computing anything.
    from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

    import npo_cli.experiments.demo  # noqa: F401 - all stages, and with them torch and transformers
    from npo_cli.cli.main import main
    from npo_cli.session import producer

    print(json.dumps({"ready": 1}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            for stream, path in ((0, os.devnull), (1, os.devnull), (2, request["err"])):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), stream)
            if request["watched"]:
                watch_changes(request["watched"], count_file(Path(request["err"])), die_at=request["die_at"])
            if request["limit"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
            if request["producers"]:
                from warm_producer import fork_producers  # this folder is where the script is

                producer.start_process = fork_producers(request["producers"])
            main(request["args"])
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


def watch_changes(folder: str, count_to: Path, *, die_at: int | None) -> None:
    """Count the changes that this process makes to files below a folder; die before the one with number `die_at`.

    Kills between the same two changes leave the same on disk, so this number names every kill that matters. Not seen
    is what grows an open file (a torn line is the subject of other tests), and what extension modules do.
    """
    num_changes, inside = 0, f"{folder}/"

    def count(event: str, args: tuple[Any, ...]) -> None:
        nonlocal num_changes
        if not (event in CHANGES or (event == "open" and args[2] & WRITES)):
            return
        path = os.fsdecode(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else ""
        # shutil.rmtree names files relative to their folder, which it has open.
        is_in_open_folder = event in ("os.remove", "os.rmdir") and bool(path) and not os.path.isabs(path)
        if path.startswith(inside) or is_in_open_folder:
            num_changes += 1
            if num_changes == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            os.pwrite(counted, b"%d" % num_changes, 0)

    counted = os.open(count_to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.addaudithook(count)


if __name__ == "__main__":
    serve()
