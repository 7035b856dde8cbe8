"""One writer at a time in a run directory, which finds its logs as the last one left them.

The lock is the operating system's, on an open file, so it is released when its process ends, however it ends. A
note of the holder beside it is only used for the error message of the next process.

Atomic directories: built under a hidden name beside the final one, then renamed.
"""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from npo_cli.distributed.process_group import current_group, on_main_rank
from npo_cli.errors import NpoError
from npo_cli.storage.checkpoints import check_recorded_logs
from npo_cli.storage.files import decode_record, now_utc, read_json, write_json_atomic
from npo_cli.storage.layout import RunDir, check_unused
from npo_cli.storage.log_head import check_size, seal_log
from npo_cli.storage.text_log import log_command


@dataclass(frozen=True, kw_only=True, slots=True)
class LockHolder:
    """The process that holds the lock."""

    pid: int
    host: str
    command: str
    since: str
    """ISO 8601, UTC."""


@contextmanager
def lock_run(run: RunDir, *, checks_logs: bool = True) -> Iterator[None]:
    """Hold the run's lock for the block; an error that names the holder, at once, where another process holds it.

    Of several ranks, rank 0 holds it. A run with a log that was cut is refused (`checks_logs`). Where the block
    ends well, every log is sealed: lines that are lost from then on are reported.
    """
    lock = FileLock(run.lock_path, timeout=0)
    _acquire(lock, run)
    try:
        command = " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
        write_json_atomic(
            run.holder_path, LockHolder(pid=os.getpid(), host=platform.node(), command=command, since=now_utc())
        )
        try:
            with log_command(run):
                if checks_logs:
                    _check_logs(run)
                yield
                _seal_logs(run)
        finally:
            if current_group().is_main:
                run.holder_path.unlink(missing_ok=True)
    finally:
        lock.release()


@contextmanager
def hold_unchanged(run: RunDir) -> Iterator[None]:
    """Refuse what `lock_run` refuses, and keep other processes from writing; nothing is written (`--dry-run`)."""
    lock = FileLock(run.lock_path, timeout=0)
    _acquire(lock, run)
    try:
        _check_logs(run)
        yield
    finally:
        lock.release()


@on_main_rank
def _check_logs(run: RunDir) -> None:
    for path in run.list_logs():
        check_size(path)
    check_recorded_logs(run)


@on_main_rank
def _seal_logs(run: RunDir) -> None:
    for path in run.list_logs():
        seal_log(path)


@on_main_rank
def _acquire(lock: FileLock, run: RunDir) -> None:
    try:
        lock.acquire()
    except Timeout as error:
        raise run_locked_error(run) from error
    except PermissionError as error:
        raise NpoError(f"cannot write in {run.root}: {error.strerror}", "check the folder's permissions") from error


def run_locked_error(run: RunDir) -> NpoError:
    """The error for a run directory that another process holds."""
    try:
        holder = decode_record(LockHolder, read_json(run.holder_path), run.holder_path)
    except NpoError:
        # The lock was just taken, or the note was lost: only the lock counts.
        return NpoError(f"{run.root} is in use by another npo process", "wait until it ends, then try again")
    return NpoError(
        f"{run.root} is in use by process {holder.pid} on {holder.host} (`{holder.command}`, since {holder.since})",
        f"wait until it ends, or stop it with: kill {holder.pid}",
    )


UNFINISHED_SUFFIX = ".unfinished"
BUILDER_LOCK_SUFFIX = ".unfinished.lock"


@contextmanager
def atomic_directory(root: Path, *, flag: str = "RUN") -> Iterator[Path]:
    """A hidden sibling that becomes `root` when the block ends well, else it is removed.

    What a killed writer left is removed. A second writer is refused while the first one holds the lock beside it.
    """
    check_unused(root, flag=flag)
    hidden = root.absolute().parent / f".{root.name}{UNFINISHED_SUFFIX}"
    made = [folder for folder in hidden.parents if not folder.exists()]
    hidden.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(hidden.parent / f".{root.name}{BUILDER_LOCK_SUFFIX}", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        hint = f"wait until it ends, or choose another folder for {flag}"
        raise NpoError(f"another npo process is writing {root}", hint) from error
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir()
        yield hidden
        check_unused(root, flag=flag)
        hidden.rename(root.absolute())
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        for folder in made:
            if not any(folder.iterdir()):
                folder.rmdir()
