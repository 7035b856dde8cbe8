"""Processes and their files: a supervisor that ends with its parent, timeouts, scratch folders, output suppression.

Run as a program (`python -m npo_cli.inference.process FOLDER COMMAND ...`) it is the supervisor of an engine's server:
the parent holds the other end of its stdin, so the pipe closes however the parent ends, `kill -9` included. Then the
command and its children, which are one process group, are terminated, and FOLDER is removed.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

TERMINATE_GRACE_SECONDS = 5.0
"""Seconds between SIGTERM and SIGKILL."""


def main(folder: str, command: list[str]) -> int:
    """Run the command, and terminate it when stdin closes. Returns the command's exit code."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_parent, args=(child.pid,), daemon=True).start()
    # Pass signals on to the group.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _end_group(child.pid))
    code = child.wait()
    _signal_group(child.pid, signal.SIGKILL)  # children that outlived the command
    shutil.rmtree(folder, ignore_errors=True)
    return code if code >= 0 else 128 - code


def _end_with_parent(group: int) -> None:
    while os.read(0, 4096):
        pass
    _end_group(group)


def _end_group(group: int) -> None:
    _signal_group(group, signal.SIGTERM)
    deadline = time.monotonic() + TERMINATE_GRACE_SECONDS
    while time.monotonic() < deadline and _signal_group(group, 0):
        time.sleep(0.05)
    _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: int) -> bool:
    """Whether the process group still exists."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))


TIMEOUT_EXIT_CODE = 1


@contextmanager
def exit_on_timeout(seconds: float, *, phase: str, hint: str) -> Iterator[None]:
    """Run the block; if it still runs after `seconds`, name the phase on stderr and exit the process.

    For calls into C++ that nothing can interrupt. Files are complete at every moment, so this is as safe as `kill -9`.
    """
    # `suppress_output` may redirect stderr in the meantime.
    terminal = os.dup(2)
    message = f"error: the engine hung (phase: {phase}): no response within {seconds:g} s\n  try: {hint}\n"
    timer = threading.Timer(seconds, exit_process, (terminal, message))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        os.close(terminal)


def exit_process(terminal: int, message: str) -> None:
    """Write the message and exit, without cleanup."""
    os.write(terminal, message.encode())
    os._exit(TIMEOUT_EXIT_CODE)


SCRATCH_PREFIX = "npo-scratch-"
LOCK_NAME = "held.lock"


@contextmanager
def scratch_folder(inside: Path | None = None) -> Iterator[Path]:
    """A folder for the block, by default in the temporary directory. Those of killed processes are removed on the way.

    A file lock marks a folder as used: the operating system releases it when the process ends. A process id in the name
    would not do, since ids are reused and differ between containers.
    """
    remove_stale_folders(inside)
    folder = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=inside))
    try:
        with FileLock(folder / LOCK_NAME):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale_folders(inside: Path | None = None) -> None:
    """Remove unlocked scratch folders, except those of other users."""
    for lock in Path(inside or tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*/{LOCK_NAME}"):
        with suppress(Timeout, PermissionError), FileLock(lock, timeout=0):
            shutil.rmtree(lock.parent, ignore_errors=True)


@contextmanager
def suppress_output() -> Iterator[None]:
    """Discard stdout and stderr of this process during the block, C++ included; errors are still raised."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(number) for number in (1, 2)]
    with tempfile.TemporaryFile() as sink, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in (1, 2):
            os.dup2(sink.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, before in zip((1, 2), saved, strict=True):
                os.dup2(before, number)
                os.close(before)
