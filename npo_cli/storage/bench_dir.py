"""`methods.json` in the folder of a bench: its runs by method, so that the folder can stand for all of them.

Paths in it are relative to the folder, which may be moved.
"""

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from npo_cli.errors import NpoError
from npo_cli.storage.files import make_folder, read_json, write_json_atomic

BENCH_INDEX_FILE = "methods.json"
DONE_FILE = "done.json"
"""Beside a finished run: the commands that made it."""
WAIT_SECONDS = 60.0
"""For the commands of a killed bench, which finish their step and save."""
POLL_SECONDS = 0.1


@contextmanager
def hold_bench(folder: Path) -> Iterator[int]:
    """Hold the folder for one bench; yields the lock's descriptor, for its commands to inherit.

    The lock lasts until the bench and its commands have ended. Those of a killed bench are waited for; a bench that is
    at work there is an error at once.
    """
    make_folder(folder)
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while not _try_lock(lock):
            holder = os.pread(lock, 20, 0).decode(errors="replace").strip()
            if time.monotonic() > deadline or (holder.isdecimal() and _is_running(int(holder))):
                raise NpoError(
                    f"{folder} is in use by another npo bench (process {holder}), or by its commands",
                    "wait until they end, or choose another --out",
                )
            time.sleep(POLL_SECONDS)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield lock
    finally:
        os.close(lock)


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def save_commands(folder: Path, commands: Sequence[Sequence[str]]) -> None:
    """Record that these npo commands made the run in this folder."""
    write_json_atomic(folder / DONE_FILE, {"commands": [list(command) for command in commands]})


def load_commands(folder: Path) -> list[tuple[str, ...]] | None:
    """The npo commands that made the run in this folder; None before it is finished."""
    path = folder / DONE_FILE
    if not path.exists():
        return None
    return [tuple(map(str, command)) for command in read_json(path)["commands"]]


def save_bench_index(folder: Path, runs: Sequence[tuple[str, Path]]) -> None:
    """Method and run directory of every run, in the order of the table."""
    rows = [{"method": method, "run": run.relative_to(folder).as_posix()} for method, run in runs]
    write_json_atomic(folder / BENCH_INDEX_FILE, {"methods": rows})


def is_bench(folder: Path) -> bool:
    """Whether the folder is the output of `npo bench`."""
    return (folder / BENCH_INDEX_FILE).is_file()


def load_bench_index(folder: Path) -> list[tuple[str, Path]]:
    """Method and run directory, as saved."""
    try:
        return [(str(row["method"]), folder / row["run"]) for row in read_json(folder / BENCH_INDEX_FILE)["methods"]]
    except (KeyError, TypeError) as error:
        path = folder / BENCH_INDEX_FILE
        raise NpoError(f"{path} is not what npo bench writes", "run the same npo bench again to rewrite it") from error
